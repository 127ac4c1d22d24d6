"""A worker of `sync_overhead`: one side of a transfer, by message passing or by KVDirect, with a clock at every step.

All times are of CLOCK_MONOTONIC, which two processes of one host share. A step is reported with its own beginning and
end, so that what no step accounts for can be seen.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing import connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

import llmsys.comm.registry.tensors  # noqa: F401 - imports torch, once, before workers are forked
from experiments.kvdirect._contents import BlockMemory
from experiments.kvdirect._nursery import Channel, Progress
from experiments.kvdirect._worker_settings import PACKED, PYTHON, TARGET
from llmsys.comm.transports.base import TransportConfig
from llmsys.comm.transports.gloo_pair import Blocks as MessageBlocks
from llmsys.comm.transports.gloo_pair import GlooPair, pack_blocks, unpack_blocks
from llmsys.comm.transports.ucx import UcxOptions, UcxTransport
from llmsys.kvdirect.blocks import BlockPool
from llmsys.kvdirect.runtime import KvEndpoint
from llmsys.kvdirect.tickets import Ticket

TIMEOUT_S = 60.0

Steps = dict[str, tuple[float, float]]
"""Name of a step: its beginning and its end."""

_STEP_SIZE = 384  # a model step multiplies square matrices of this size
_STEP_REPEATS = 24  # so often, which takes some hundredths of a second on one core


class SyncWorker:
    """See the module's text. Methods in pairs: one side serves, the other fetches."""

    def __init__(self, channel: Channel) -> None:
        self._busy: threading.Thread | None = None
        self._stop_busy = threading.Event()

    def commands(self) -> Mapping[str, Callable[..., Any]]:
        return {
            "start_messages": self.start_messages,
            "serve_messages": self.serve_messages,
            "fetch_messages": self.fetch_messages,
            "start_endpoint": self.start_endpoint,
            "hold": self.hold,
            "connect": self.connect,
            "pull": self.pull,
            "be_busy": self.be_busy,
            "be_idle": self.be_idle,
        }

    # -- how busy the target is ----------------------------------------------------------------------------------------

    def be_busy(self, progress: Progress, *, state: str) -> None:
        """Computes on a thread beside, until `be_idle`."""
        self._stop_busy.clear()
        loop = _python_step if state == PYTHON else _model_step
        self._busy = threading.Thread(target=self._loop, args=(loop,), name="busy", daemon=True)
        self._busy.start()

    def _loop(self, step: Callable[[], None]) -> None:
        while not self._stop_busy.is_set():
            step()

    def be_idle(self, progress: Progress) -> None:
        self._stop_busy.set()
        if self._busy is not None:
            self._busy.join()
        self._busy = None

    # -- message passing -----------------------------------------------------------------------------------------------

    def start_messages(
        self, progress: Progress, *, rank: int, port: int, num_blocks: int, block_bytes: int, request_blocks: int
    ) -> None:
        """Joins the other side; TARGET listens at `port` for the INITIATOR to tell each other their addresses."""
        where = ("127.0.0.1", port)
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(connection.Listener(where)) if rank == TARGET else None
            progress.reached("listening")

            def swap(own: bytes) -> bytes:
                with listener.accept() if listener else connection.Client(where) as other:
                    other.send_bytes(own)
                    return other.recv_bytes()

            self._pair = GlooPair(rank, swap, host=where[0], stall_s=TIMEOUT_S)
        self._block_bytes = block_bytes
        self._cache = np.zeros(num_blocks * block_bytes, dtype=np.uint8)
        self._staging = np.zeros(request_blocks * block_bytes, dtype=np.uint8)
        self._memory = _block_memory(self._cache.reshape(num_blocks, block_bytes))
        if rank == TARGET:
            _fill(self._memory, num_blocks)

    def serve_messages(self, progress: Progress, *, method: str, num_blocks: int, between_steps: bool) -> Steps:
        """Answers one request for blocks. between_steps: it is looked at only when a model step has ended."""
        steps: Steps = {}
        request = np.zeros(num_blocks, dtype=np.int64)
        progress.reached("waiting")
        if between_steps:
            self._receive_between_steps(request)
        else:
            self._move(_whole(request), sends=False)
        received_s = time.monotonic()
        steps["request"] = (received_s, received_s)
        blocks = self._blocks(request)
        if method == PACKED:
            begin_s = time.monotonic()
            pack_blocks(blocks, self._staging)
            steps["gather"] = (begin_s, time.monotonic())
            blocks = _whole(self._staging)
        begin_s = time.monotonic()
        self._move(blocks, sends=True)
        steps["send"] = (begin_s, time.monotonic())
        done = np.zeros(1, dtype=np.int64)
        self._move(_whole(done), sends=False)
        self._move(_whole(done), sends=True)
        return steps

    def _receive_between_steps(self, request: NDArray[np.int64]) -> None:
        arrived = threading.Event()

        def receive() -> None:
            self._move(_whole(request), sends=False)
            arrived.set()

        receiver = threading.Thread(target=receive, name="receiver", daemon=True)
        receiver.start()
        while not arrived.is_set():
            _model_step()
        receiver.join()

    def fetch_messages(self, progress: Progress, *, method: str, remote_ids: list[int], local_ids: list[int]) -> Any:
        """One request: ask, receive, unpack, and the round trip that tells both sides that it is over."""
        steps: Steps = {}
        self._memory.poison(np.array(local_ids))
        request = np.array(remote_ids)
        local = self._blocks(np.array(local_ids))
        total_s = time.perf_counter()
        begin_s = time.monotonic()
        self._move(_whole(request), sends=True)
        steps["request"] = (begin_s, begin_s)
        self._move(_whole(self._staging) if method == PACKED else local, sends=False)
        steps["receive"] = (begin_s, time.monotonic())
        if method == PACKED:
            begin_s = time.monotonic()
            unpack_blocks(local, self._staging)
            steps["scatter"] = (begin_s, time.monotonic())
        begin_s = time.monotonic()
        done = np.zeros(1, dtype=np.int64)
        self._move(_whole(done), sends=True)
        self._move(_whole(done), sends=False)
        steps["completion"] = (begin_s, time.monotonic())
        total_s = time.perf_counter() - total_s
        return {"steps": steps, "total_s": total_s, "num_wrong": self._num_wrong(self._memory, local_ids, remote_ids)}

    def _blocks(self, block_ids: NDArray[np.int64]) -> MessageBlocks:
        return MessageBlocks(
            memories=[self._cache],
            which=np.zeros_like(block_ids),
            offsets=block_ids * self._block_bytes,
            lengths=np.full_like(block_ids, self._block_bytes),
        )

    def _move(self, blocks: MessageBlocks, *, sends: bool) -> None:
        self._pair.wait(self._pair.post(blocks, sends=sends))

    # -- KVDirect ------------------------------------------------------------------------------------------------------

    def start_endpoint(
        self, progress: Progress, *, name: str, library: str, fast: bool, num_blocks: int, block_bytes: int
    ) -> str:
        """fast: shared memory and CMA are used, else UCX over TCP. Returns the address."""
        tls = "" if fast else "tcp,self"
        options = UcxOptions(library=library, tls=tls, shm=fast, cma=fast)
        self._endpoint = KvEndpoint(UcxTransport(TransportConfig(name=name), options))
        self._pool = BlockPool(num_blocks)
        shape = (num_blocks, block_bytes)
        own = np.zeros(shape, dtype=np.uint8)
        self._endpoint.tensors.register_memory(
            "cma", own.ctypes.data, own.nbytes, shape=shape, dtype="uint8", owner=own
        )
        shared = self._endpoint.tensors.allocate("shm", shape, "uint8").numpy()
        self._memories = {"shm": _block_memory(shared), "cma": _block_memory(own)}
        for memory in self._memories.values():
            _fill(memory, num_blocks)
        return self._endpoint.transport.local.address

    def hold(self, progress: Progress, *, request: str, peer: str, tensor: str, num_blocks: int) -> str:
        blocks = self._pool.allocate(num_blocks)
        ticket = self._endpoint.hold(request, self._pool, blocks, peer_name=peer, tensors=[tensor])
        return ticket.to_bytes().hex()

    def connect(self, progress: Progress, *, address: str) -> None:
        self._connection = self._endpoint.connect(address, timeout_s=TIMEOUT_S)

    def pull(self, progress: Progress, *, ticket: str, local_ids: list[int]) -> Any:
        """One request: transfer and completion, posted one after the other; the answer ends it."""
        remote = Ticket.from_bytes(bytes.fromhex(ticket))
        (tensor,) = remote.tensors
        memory = self._memories[tensor]
        local = np.array(local_ids)
        memory.poison(local)
        pairs = np.stack([local, remote.blocks.ids], axis=1)
        total_s = time.perf_counter()
        begin_s = time.monotonic()
        transfer = self._endpoint.transfer(self._connection, [tensor], remote, pairs)
        self._endpoint.complete(self._connection, remote).wait(TIMEOUT_S)
        end_s = time.monotonic()
        total_s = time.perf_counter() - total_s
        stats = transfer.stats
        posted_s, started_s, finished_s = (ns / 1e9 for ns in (stats.posted_ns, stats.started_ns, stats.finished_ns))
        steps: Steps = {
            "post": (begin_s, posted_s),
            "start": (posted_s, started_s),
            "data": (started_s, finished_s),
            "completion": (finished_s, end_s),
        }
        return {
            "steps": steps,
            "total_s": total_s,
            "num_wrong": self._num_wrong(memory, local_ids, remote.blocks.ids.tolist()),
            "paths": list(getattr(transfer, "paths", ())),
        }

    def _num_wrong(self, memory: BlockMemory, local_ids: list[int], remote_ids: list[int]) -> int:
        return memory.num_wrong(np.array(local_ids), _keys(np.array(remote_ids)))[0]


def _block_memory(array: Any) -> BlockMemory:
    words = array.view(np.uint64)
    return BlockMemory(words.reshape(len(array), -1))


def _keys(block_ids: Any) -> Any:
    return block_ids.astype(np.uint64) << np.uint64(32) | np.uint64(1)


def _fill(memory: BlockMemory, num_blocks: int) -> None:
    ids = np.arange(num_blocks)
    memory.fill(ids, _keys(ids))


def _python_step() -> None:
    total = 0
    for value in range(2000):
        total += value


def _model_step() -> None:
    x = np.full((_STEP_SIZE, _STEP_SIZE), 0.001, dtype=np.float32)
    weight = np.full((_STEP_SIZE, _STEP_SIZE), 0.002, dtype=np.float32)
    for _ in range(_STEP_REPEATS):
        x = np.maximum(x @ weight, 0.0)


def _whole(array: NDArray[Any]) -> MessageBlocks:
    """One message of an array's bytes."""
    one = np.zeros(1, dtype=np.int64)
    return MessageBlocks(memories=[array.view(np.uint8)], which=one, offsets=one, lengths=one + array.nbytes)


def make_service(channel: Channel) -> SyncWorker:
    return SyncWorker(channel)
