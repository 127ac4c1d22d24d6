"""What the tests of endpoints share: workers in one process, each with a cache, and a record of what they heard."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmsys.comm.transports import transport_class
from llmsys.comm.transports.base import Peer, Transport, TransportConfig
from llmsys.kvdirect.blocks import BlockPool, Blocks
from llmsys.kvdirect.config import KvConfig
from llmsys.kvdirect.holds import Access, Outcome
from llmsys.kvdirect.runtime import Connection, KvEndpoint, Listener
from llmsys.kvdirect.tickets import Ticket

SECRET = "a secret of the tests"
WAIT_S = 60.0
"""For what takes milliseconds, on a machine that is busy with other things."""
BLOCK_SHAPE = (4, 6)


class Heard(Listener):
    """Writes down what an endpoint says, and lets tests wait for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.events: list[tuple[Any, ...]] = []

    def joined(self, peer: Peer) -> None:
        self._add("joined", peer.name, peer.generation)

    def lost(self, peer: Peer, reason: str) -> None:
        self._add("lost", peer.name, peer.generation)

    def received(self, peer: Peer, payload: bytes) -> None:
        self._add("received", peer.name, payload)

    def cancelled(self, peer: Peer, request_id: str) -> None:
        self._add("cancelled", peer.name, request_id)

    def ended(self, request_id: str, outcome: Outcome) -> None:
        self._add("ended", request_id, outcome)

    def wait(self, *event: Any, timeout_s: float = WAIT_S) -> None:
        """Until an event that begins with this has come."""
        size = len(event)
        with self._changed:
            assert self._changed.wait_for(lambda: event in [e[:size] for e in self.events], timeout_s), self.events

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        with self._changed:
            return [event[1:] for event in self.events if event[0] == kind]

    def _add(self, *event: Any) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()


@dataclass
class Worker:
    """An endpoint with one tensor "kv" of `num_blocks` blocks, a pool of them, and what it heard."""

    endpoint: KvEndpoint
    cache: torch.Tensor
    pool: BlockPool
    heard: Heard

    @property
    def transport(self) -> Any:
        return self.endpoint.transport

    @property
    def name(self) -> str:
        return self.endpoint.transport.local.name

    def fill(self, blocks: Blocks, seed: int) -> NDArray[np.float32]:
        """Gives blocks contents that occur nowhere else; returns them."""
        values = np.random.default_rng(seed).random((len(blocks), *BLOCK_SHAPE), dtype=np.float32)
        self.cache[blocks.ids] = torch.from_numpy(values)
        return values

    def read(self, blocks: Blocks) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self.cache[blocks.ids].numpy()
        return found

    def hold(
        self, request_id: str, peer: str | Worker, num_blocks: int, *, access: Access = Access.READ, seed: int = 1
    ) -> tuple[Ticket, Blocks, NDArray[np.float32]]:
        """A ticket as the peer gets it, its blocks, and what they hold."""
        blocks = self.pool.allocate(num_blocks)
        values = self.fill(blocks, seed)
        peer_name = peer if isinstance(peer, str) else peer.name
        ticket = self.endpoint.hold(request_id, self.pool, blocks, peer_name=peer_name, tensors=["kv"], access=access)
        return Ticket.from_bytes(ticket.to_bytes()), blocks, values

    def connect(self, other: Worker) -> Connection:
        return self.endpoint.connect(other.transport.local.address, timeout_s=WAIT_S)


@dataclass
class Job:
    """Makes workers, and ends them. `transport`: what configurations call it."""

    transport: str
    workers: list[Worker] = field(default_factory=list)

    def new_transport(self, name: str = "", **settings: Any) -> Transport:
        config = TransportConfig(name=name, secret=SECRET, **({"lease_s": WAIT_S} | settings))
        return transport_class(self.transport)(config)  # type: ignore[call-arg]

    def worker(
        self,
        name: str,
        *,
        num_blocks: int = 32,
        kv: KvConfig | None = None,
        listener: Listener | None = None,
        **settings: Any,
    ) -> Worker:
        heard = Heard()
        endpoint = KvEndpoint(self.new_transport(name, **settings), kv, listener=listener or heard)
        cache = torch.zeros(num_blocks, *BLOCK_SHAPE)
        worker = Worker(endpoint, cache, BlockPool(num_blocks), heard)
        self.workers.append(worker)
        endpoint.tensors.register("kv", cache)
        return worker

    def pair(self, **settings: Any) -> tuple[Worker, Worker, Connection]:
        """A holder, an initiator, and its connection."""
        prefill, decode = self.worker("prefill", **settings), self.worker("decode", **settings)
        return prefill, decode, decode.connect(prefill)


@contextmanager
def new_job(transport: str) -> Iterator[Job]:
    job = Job(transport)
    try:
        yield job
    finally:
        for worker in job.workers:
            if hasattr(worker.transport, "resume"):
                worker.transport.resume()
        for worker in job.workers:
            worker.endpoint.close()


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for what nothing tells of, such as the end of a quarantine."""
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"{what} has not come"
        time.sleep(0.01)


def transfer(
    holder: Worker, initiator: Worker, request_id: str, num_blocks: int, access: Access = Access.READ, seed: int = 1
) -> None:
    """A whole request, checked at both ends; afterwards all blocks are free."""
    # First of all: a hold for a connection that is just ending, of which the holder does not know, ends with it.
    connection = initiator.connect(holder)
    ticket, theirs, values = holder.hold(request_id, initiator, num_blocks, access=access, seed=seed)
    mine = initiator.pool.allocate(num_blocks)
    if access is Access.WRITE:
        values = initiator.fill(mine, seed + 1)
    initiator.endpoint.transfer(connection, ["kv"], ticket, mine)
    initiator.endpoint.complete(connection, ticket).wait(WAIT_S)
    assert np.array_equal(holder.read(theirs) if access is Access.WRITE else initiator.read(mine), values)
    assert holder.endpoint.wait_held(request_id, WAIT_S) is Outcome.COMPLETED
    initiator.pool.release(mine)
    if access is Access.WRITE:
        holder.pool.release(theirs)


def run_threads(calls: list[Callable[[], None]]) -> None:
    """Runs all at once; raises what one of them raised."""
    errors: list[BaseException] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    deadline_s = time.monotonic() + 2 * WAIT_S
    for thread in threads:
        thread.join(max(deadline_s - time.monotonic(), 0.0))
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]
