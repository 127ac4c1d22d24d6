"""A worker of the fault rounds: an endpoint that holds blocks, pulls, pushes, and says what it saw.

What it does with blocks is what shows mistakes: a block is overwritten the moment it is freed, and contents are keyed
by owner (see `_contents`). A request is judged only by what an application could judge it by: its acknowledgement.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import llmsys.comm.registry.tensors  # noqa: F401 - imports torch, once, before workers are forked
from experiments.kvdirect._contents import WORD_BYTES, BlockMemory, block_keys
from experiments.kvdirect._nursery import Channel, Progress
from experiments.kvdirect._worker_settings import KINDS, FaultSettings
from llmsys.comm.transports.base import Peer, Request, TransportConfig
from llmsys.comm.transports.ucx import UcxOptions, UcxTransport
from llmsys.core.errors import DeadlineError, InfeasibleError, LlmsysError, PeerLostError
from llmsys.kvdirect.blocks import BlockPool, Blocks
from llmsys.kvdirect.config import KvConfig
from llmsys.kvdirect.holds import Access, Outcome
from llmsys.kvdirect.runtime import Completion, Connection, KvEndpoint, Listener
from llmsys.kvdirect.tickets import Ticket

NUM_TENSORS = 2
WAIT_S = 60.0  # for what a round's own deadlines bound much earlier


class PoisoningPool(BlockPool):
    """A pool whose blocks lose their contents at the moment they are freed."""

    def __init__(self, num_blocks: int, memories: list[BlockMemory]) -> None:
        super().__init__(num_blocks)
        self._memories = memories

    def release(self, blocks: Blocks) -> None:
        for memory in self._memories if self.is_current(blocks) else []:
            memory.poison(blocks.ids)
        super().release(blocks)


class FaultWorker(Listener):
    """See the module's text."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._memories: dict[str, list[BlockMemory]] = {kind: [] for kind in KINDS}
        self._connections: dict[str, list[Connection]] = {}
        self._leaked: list[int] = []
        self._start_lock = threading.Lock()

    def commands(self) -> Mapping[str, Callable[..., Any]]:
        return {
            "warm": self.warm,
            "start": self.start,
            "hold": self.hold,
            "settle": self.settle,
            "transfer": self.transfer,
            "connect": self.connect,
            "disconnect": self.disconnect,
            "abort": self.abort,
            "use_stale": self.use_stale,
            "census": self.census,
            "close": self.close,
        }

    # -- Listener ----------------------------------------------------------------------------------------------------

    def joined(self, peer: Peer) -> None:
        self._channel.event("joined", peer=peer.name, generation=peer.generation)

    def lost(self, peer: Peer, reason: str) -> None:
        if self._settings.sabotage == "leaks":
            self._leaked += [os.dup(0) for _ in range(40)]
        self._channel.event("lost", peer=peer.name, generation=peer.generation, reason=reason)

    def ended(self, request_id: str, outcome: Outcome) -> None:
        self._channel.event("ended", request=request_id, outcome=outcome.value)

    # -- commands ----------------------------------------------------------------------------------------------------

    def warm(self, progress: Progress, *, library: str) -> None:
        """Loads UCX, which takes most of a start, before it is known who this will be."""
        with self._start_lock:
            UcxTransport(TransportConfig(name="spare"), UcxOptions(library=library)).close()

    def start(self, progress: Progress, **settings: Any) -> dict[str, Any]:
        self._settings = config = FaultSettings(**settings)
        with self._start_lock:
            transport = UcxTransport(
                TransportConfig(name=config.name, port=config.port, lease_s=config.lease_s),
                UcxOptions(
                    library=config.library,
                    tls="" if config.fast_paths else "tcp,self",
                    shm=config.fast_paths,
                    cma=config.fast_paths,
                    slice_bytes=config.slice_bytes,
                    test_slice_delay_us=config.slice_delay_us,
                ),
            )
        kv = KvConfig(unclaimed_timeout_s=config.unclaimed_timeout_s, quarantine_s=config.quarantine_s)
        self._endpoint = KvEndpoint(transport, kv, listener=self)
        self._pools = {kind: PoisoningPool(config.num_blocks, self._memories[kind]) for kind in KINDS}
        for kind in KINDS:
            for name in _tensor_names(kind):
                self._add_tensor(kind, name)
        _break_a_rule(self._endpoint, config.sabotage)
        local = transport.local
        return {"address": local.address, "generation": local.generation}

    def _add_tensor(self, kind: str, name: str) -> None:
        shape = (self._settings.num_blocks, self._settings.block_bytes)
        if kind == "shm":
            memory = self._endpoint.tensors.allocate(name, shape, "uint8").numpy()
        else:
            memory = np.zeros(shape, dtype=np.uint8)
            self._endpoint.tensors.register_memory(
                name, memory.ctypes.data, memory.nbytes, shape=shape, dtype="uint8", owner=memory
            )
        words = memory.view(np.uint64).reshape(shape[0], shape[1] // WORD_BYTES)
        self._memories[kind].append(BlockMemory(words))

    def hold(
        self, progress: Progress, *, request: str, peer: str, access: str, kind: str, num_blocks: int
    ) -> dict[str, Any]:
        """Blocks for a request, with their contents if they are to be read; and the ticket."""
        blocks = self._allocate(kind, num_blocks)
        # No ticket is out yet, so nobody reads what is not there.
        ticket = self._endpoint.hold(
            request, self._pools[kind], blocks, peer_name=peer, tensors=_tensor_names(kind), access=Access(access)
        )
        if ticket.access is Access.READ:
            self._fill(kind, blocks.ids, ticket)
        if self._settings.sabotage == "frees_early" and ticket.access is Access.READ:
            self._pools[kind].unpin(blocks, release=True)
        return {"ticket": ticket.to_bytes().hex()}

    def settle(self, progress: Progress, *, ticket: str, timeout_s: float) -> dict[str, Any]:
        """Waits until a held request has ended; checks what was written if it was completed, and frees that."""
        held = Ticket.from_bytes(bytes.fromhex(ticket))
        try:
            outcome = self._endpoint.wait_held(held.request_id, timeout_s)
        except DeadlineError:
            return {"outcome": "held", "num_wrong": 0, "num_poisoned": 0}
        wrong = (0, 0)
        if outcome is Outcome.COMPLETED and held.access is Access.WRITE:
            wrong = self._num_wrong(_kind_of(held), held.blocks.ids, held)
            self._pools[_kind_of(held)].release(held.blocks)
        return {"outcome": outcome.value, "num_wrong": wrong[0], "num_poisoned": wrong[1]}

    def transfer(
        self, progress: Progress, *, ticket: str, pause_at: str, pipelined: bool, connect_timeout_s: float, seed: int
    ) -> dict[str, Any]:
        """A whole request: connect, transfer, complete; then judges the bytes by what the acknowledgement allows.

        pause_at: the stage at which to wait for the driver. pipelined: the completion is posted right after the data.
        """
        remote = Ticket.from_bytes(bytes.fromhex(ticket))
        kind = _kind_of(remote)
        local = self._allocate(kind, len(remote.blocks))
        order = np.random.default_rng(seed).permutation(len(remote.blocks))
        pairs = np.stack([local.ids[order], remote.blocks.ids], axis=1)
        stages = _Stages(progress, pause_at)
        request: Request | None = None
        try:
            stages.reach("connecting")
            connection = self._connect(remote.address, connect_timeout_s)
            if remote.access is Access.WRITE:
                self._fill(kind, pairs[:, 0], remote)
            request = self._endpoint.transfer(connection, _tensor_names(kind), remote, pairs)
            stages.reach("posted")
            if not pipelined:
                request.wait(WAIT_S)
                stages.reach("moved")
            completion = self._endpoint.complete(connection, remote)
            stages.reach("completing")
            completion.wait(WAIT_S)
            result: dict[str, Any] = {"outcome": "acknowledged", "at_s": time.monotonic()}
            stages.reach("acknowledged")
            wrong = (0, 0) if remote.access is Access.WRITE else self._num_wrong(kind, pairs[:, 0], remote)
            return result | {"wrong": wrong, "stage": stages.last}
        except LlmsysError as error:
            result = {"outcome": "failed", "at_s": time.monotonic(), "stage": stages.last}
            return result | {"error": type(error).__name__, "text": str(error)}
        finally:
            # Only when nothing can be written into them any more, well or not.
            if request is not None:
                _wait_ended(request)
            self._pools[kind].release(local)

    def connect(self, progress: Progress, *, address: str, timeout_s: float) -> str:
        """Returns why it could not, if so; the request that follows says the same."""
        try:
            self._connect(address, timeout_s)
        except LlmsysError as error:
            return str(error)
        return ""

    def disconnect(self, progress: Progress, *, address: str) -> int:
        """How many connections there were."""
        peers = [peer for peer in self._endpoint.members() if peer.address == address]
        for peer in peers:
            self._endpoint.transport.disconnect(peer)
        return len(peers)

    def abort(self, progress: Progress, *, ticket: str, timeout_s: float) -> None:
        """Tells the holder that a request that failed here is not wanted any more."""
        remote = Ticket.from_bytes(bytes.fromhex(ticket))
        with contextlib.suppress(PeerLostError):  # the holder has then lost us too, and gives the blocks up by itself
            self._endpoint.abort(self._connect(remote.address, timeout_s), remote).wait(timeout_s)

    def use_stale(self, progress: Progress, *, ticket: str, transfer: bool, timeout_s: float) -> dict[str, Any]:
        """Tries a ticket of a former life, over a new and over the old connection; says how each try was refused."""
        remote = Ticket.from_bytes(bytes.fromhex(ticket))
        tries: dict[str, Any] = {}
        kind = _kind_of(remote)
        local = self._allocate(kind, len(remote.blocks))
        pairs = np.stack([local.ids, remote.blocks.ids], axis=1)
        new = self._connect(remote.address, timeout_s)
        old = [connection for connection in self._connections[remote.address] if not connection.alive]
        for which, connection in [("new", new), *(("old", connection) for connection in old)]:
            try:
                if transfer:
                    self._endpoint.transfer(connection, _tensor_names(kind), remote, pairs).wait(timeout_s)
                self._endpoint.complete(connection, remote).wait(timeout_s)
                tries[which] = "accepted"
            except LlmsysError as error:
                tries[which] = type(error).__name__
        self._pools[kind].release(local)
        return tries

    def census(self, progress: Progress) -> dict[str, Any]:
        """What this process has now: for the checks that nothing leaks."""
        with open("/proc/self/maps") as maps:
            num_shared = sum("/dev/shm/" in line or "ucx_shm" in line for line in maps)
        with open("/proc/self/statm") as statm:
            resident_bytes = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return {
            "num_fds": len(os.listdir("/proc/self/fd")),
            "num_threads": len(os.listdir("/proc/self/task")),
            "num_shared_mappings": num_shared,
            "resident_mib": resident_bytes / 2**20,
            "num_held": self._endpoint.num_held,
            "num_missing": sum(pool.num_blocks - pool.num_free for pool in self._pools.values()),
            "num_quarantined": self._endpoint.num_quarantined_blocks,
        }

    def close(self, progress: Progress) -> dict[str, Any]:
        """Closes the endpoint; returns what is left of it."""
        self._endpoint.close()
        with open("/proc/self/maps") as maps:
            return {"num_shared_mappings": sum("ucx_shm" in line for line in maps)}

    # -- inside -------------------------------------------------------------------------------------------------------

    def _connect(self, address: str, timeout_s: float) -> Connection:
        """A connection; the one before it is remembered, to see that it is of no use any more."""
        connection = self._endpoint.connect(address, timeout_s=timeout_s)
        known = self._connections.setdefault(address, [])
        if connection not in known:
            self._connections[address] = [*known[-1:], connection]
        return connection

    def _allocate(self, kind: str, num_blocks: int) -> Blocks:
        """Waits for blocks that are still in quarantine."""
        deadline_s = time.monotonic() + WAIT_S
        while True:
            try:
                return self._pools[kind].allocate(num_blocks)
            except InfeasibleError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.05)

    def _fill(self, kind: str, block_ids: Any, ticket: Ticket) -> None:
        for index, memory in enumerate(self._memories[kind]):
            memory.fill(block_ids, block_keys(ticket, index))

    def _num_wrong(self, kind: str, block_ids: Any, ticket: Ticket) -> tuple[int, int]:
        counts = [
            memory.num_wrong(block_ids, block_keys(ticket, index)) for index, memory in enumerate(self._memories[kind])
        ]
        return sum(wrong for wrong, _ in counts), sum(poisoned for _, poisoned in counts)


class _Stages:
    """Tells the driver what a request has reached, and waits for it where it wants."""

    def __init__(self, progress: Progress, pause_at: str) -> None:
        self._progress, self._pause_at = progress, pause_at
        self.last = "start"

    def reach(self, stage: str) -> None:
        self.last = stage
        self._progress.reached(stage)
        if self._pause_at == stage:
            self._progress.wait_for_go(WAIT_S)


def _tensor_names(kind: str) -> list[str]:
    return [f"{kind}.{index}" for index in range(NUM_TENSORS)]


def _kind_of(ticket: Ticket) -> str:
    return ticket.tensors[0].partition(".")[0]


def _wait_ended(request: Request) -> None:
    try:
        request.wait(WAIT_S)
    except DeadlineError:
        raise
    except LlmsysError:
        pass  # it has ended, which is all that matters here


def _break_a_rule(endpoint: KvEndpoint, sabotage: str) -> None:
    """Makes this endpoint wrong in one way, for tests of the rounds themselves."""
    holds: Any = endpoint._holds
    any_endpoint: Any = endpoint
    if sabotage == "frees_early":
        # What is read was freed when the ticket was made; the hold goes on as if the blocks were its own.
        free = holds._free
        holds._free = lambda hold, *args, **options: hold.access is Access.READ or free(hold, *args, **options)
    elif sabotage == "never_frees":
        holds.peer_lost = lambda *_, **__: None
    elif sabotage == "forgets_loss":
        complete = holds.complete
        over = (Outcome.PEER_LOST, Outcome.UNCLAIMED)

        def completed_all_the_same(*args: Any) -> Outcome:
            outcome: Outcome = complete(*args)
            return Outcome.COMPLETED if outcome in over else outcome

        holds.complete = completed_all_the_same
    elif sabotage == "takes_stale_tickets":
        honest = endpoint.complete

        def complete_without_asking(connection: Connection, ticket: Ticket) -> Completion | _Agreed:
            is_stale = ticket.generation != connection.peer.generation
            return _Agreed() if is_stale else honest(connection, ticket)

        any_endpoint._check_ticket = lambda connection, ticket: None
        any_endpoint.complete = complete_without_asking


class _Agreed:
    """A completion that never asked the holder."""

    def wait(self, timeout_s: float) -> None:
        pass


def make_service(channel: Channel) -> FaultWorker:
    return FaultWorker(channel)
