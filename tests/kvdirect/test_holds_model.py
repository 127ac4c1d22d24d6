"""Random histories of holds against a model: each ends once, and no block is free while a peer may use it."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest

from llmsys.core.errors import InputError
from llmsys.kvdirect.blocks import Blocks
from llmsys.kvdirect.holds import Access, Outcome
from tests.kvdirect.holder import CONFIG, Holder

READ, WRITE = Access.READ, Access.WRITE


@dataclass
class Request:
    """What the model knows of a request. session: to whom it is bound; until_s: the end of its quarantine."""

    blocks: Blocks
    peer: str
    access: Access
    expires_s: float
    session: tuple[str, int] | None
    cancelled: bool = False
    outcome: Outcome | None = None
    until_s: float | None = None


class Model:
    """The rules in the plainest form: a list of requests, a list of connections, and no clever bookkeeping."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self.connections: dict[int, tuple[str, int]] = {}
        self.now_s = 0.0
        self.kept: set[int] = set()  # blocks of completed writes, which are their owner's

    def bind(self) -> None:
        for request in self.requests.values():
            if request.outcome is None and request.session is None:
                sessions = [session for session in self.connections.values() if session[0] == request.peer]
                request.session = sessions[-1] if sessions else None

    def end(self, request: Request, outcome: Outcome) -> None:
        request.outcome = outcome
        if request.access is WRITE and outcome is Outcome.PEER_LOST:
            request.until_s = self.now_s + CONFIG.quarantine_s
        if request.access is WRITE and outcome is Outcome.COMPLETED:
            self.kept |= set(request.blocks.ids.tolist())

    def pass_time(self) -> None:
        for request in self.requests.values():
            if request.outcome is None and request.session is None and request.expires_s <= self.now_s:
                self.end(request, Outcome.UNCLAIMED)
            if request.until_s is not None and request.until_s <= self.now_s:
                request.until_s = None

    def touched(self) -> set[int]:
        """Blocks that a peer may be reading or writing."""
        used = [r for r in self.requests.values() if r.outcome is None or r.until_s is not None]
        return {int(i) for request in used for i in request.blocks.ids}

    def busy(self) -> set[int]:
        """Blocks that must not be free."""
        return self.kept | self.touched()

    def complete(self, request: Request, peer_id: int, stale: bool) -> Outcome:
        session = self.connections.get(peer_id)
        if request.outcome is Outcome.COMPLETED:
            is_same = session == request.session and session is not None
            return Outcome.STALE if stale else Outcome.COMPLETED if is_same else Outcome.FOREIGN
        if request.outcome is not None:
            return request.outcome
        if session is None or session != request.session:
            return Outcome.FOREIGN
        if stale:
            return Outcome.STALE
        self.end(request, Outcome.ABORTED if request.cancelled else Outcome.COMPLETED)
        assert request.outcome is not None
        return request.outcome


class Machine:
    """Does the same to a table and to the model, and compares them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.holder = Holder()
        self.model = Model()
        self.num_requests = 0
        self.num_connections = 0

    def step(self) -> None:
        actions = [
            self.open,
            self.open,
            self.join,
            self.join,
            self.lose,
            self.lose,
            self.complete,
            self.complete,
            self.cancel,
        ]
        self.rng.choice([*actions, self.lose, self.abort, self.pass_time, self.use_written])()
        self.holder.table.tell()
        self.check()

    def open(self) -> None:
        num_blocks = self.rng.randint(1, 3)
        peer, access = self.rng.choice("abc"), self.rng.choice([READ, WRITE])
        shared = [r for r in self.model.requests.values() if r.outcome is None and r.access is access]
        if shared and self.rng.random() < 0.4:
            blocks = self.rng.choice(shared).blocks
        elif num_blocks <= self.holder.pool.num_free:
            blocks = self.holder.pool.allocate(num_blocks)
        else:
            return
        self.num_requests += 1
        name, now_s = f"{self.num_requests}", self.model.now_s
        self.holder.table.open(name, self.holder.pool, blocks, peer_name=peer, access=access, now_s=now_s)
        self.model.requests[name] = Request(blocks, peer, access, now_s + CONFIG.unclaimed_timeout_s, None)
        self.model.bind()

    def join(self) -> None:
        self.num_connections += 1
        session = (self.rng.choice("aaabbbc"), self.rng.randint(1, 2))
        self.holder.table.peer_joined(self.num_connections, *session)
        self.model.connections[self.num_connections] = session
        self.model.bind()

    def lose(self) -> None:
        if not self.model.connections:
            return
        peer_id = self.rng.choice(list(self.model.connections))
        self.holder.table.peer_lost(peer_id, now_s=self.model.now_s)
        session = self.model.connections.pop(peer_id)
        if session not in self.model.connections.values():
            for request in self.model.requests.values():
                if request.outcome is None and request.session == session:
                    self.model.end(request, Outcome.PEER_LOST)

    def complete(self) -> None:
        if not self.model.requests:
            return
        name = self.rng.choice(list(self.model.requests)[-12:])
        request = self.model.requests[name]
        own = [p for p, session in self.model.connections.items() if session == request.session]
        peer_id = self.rng.choice(own) if own and self.rng.random() < 0.7 else self.rng.randint(1, 30)
        stale = self.rng.random() < 0.1
        digest = b"another" if stale else request.blocks.digest()
        expected = self.model.complete(request, peer_id, stale)
        assert self.holder.table.complete(name, peer_id, digest) is expected
        self.holder.table.tell(answered=name)

    def cancel(self) -> None:
        if not self.model.requests:
            return
        name = self.rng.choice(list(self.model.requests)[-12:])
        request = self.model.requests[name]
        outcome = self.holder.table.cancel(name)
        if request.outcome is None and request.session is None:
            self.model.end(request, Outcome.ABORTED)
        elif request.outcome is None:
            request.cancelled = True
        assert outcome is request.outcome

    def abort(self) -> None:
        running = [(n, r) for n, r in self.model.requests.items() if r.outcome is None]
        if not running or not self.model.connections:
            return
        name, request = self.rng.choice(running)
        peer_id = self.rng.choice(list(self.model.connections))
        outcome = self.holder.table.abort(name, peer_id)
        self.holder.table.tell(answered=name)
        if self.model.connections[peer_id] == request.session:
            self.model.end(request, Outcome.ABORTED)
        assert outcome is (request.outcome or Outcome.FOREIGN)

    def pass_time(self) -> None:
        self.model.now_s += self.rng.choice([1.0, 10.0, 40.0])
        self.holder.table.expire(self.model.now_s)
        self.model.pass_time()

    def use_written(self) -> None:
        """The owner of completed writes frees them, when all other writers of the same blocks have ended too."""
        for request in self.model.requests.values():
            ids = set(request.blocks.ids.tolist())
            if ids <= self.model.kept and self.holder.pool.is_current(request.blocks):
                if ids & self.model.touched():
                    with pytest.raises(InputError):
                        self.holder.pool.release(request.blocks)
                else:
                    self.holder.pool.release(request.blocks)
                    self.model.kept -= ids

    def check(self) -> None:
        model, table, pool = self.model, self.holder.table, self.holder.pool
        busy = model.busy()
        assert pool.num_free == pool.num_blocks - len(busy)
        assert table.num_held == sum(request.outcome is None for request in model.requests.values())
        quarantined = [r for r in model.requests.values() if r.until_s is not None]
        assert table.num_quarantined_blocks == sum(len(r.blocks) for r in quarantined)
        for name, request in list(model.requests.items())[-20:]:
            assert table.outcome(name) is request.outcome
            if request.outcome is None or request.until_s is not None:
                assert pool.is_current(request.blocks)
        ends = [(name, request.outcome) for name, request in model.requests.items() if request.outcome is not None]
        assert sorted(self.holder.ended) == sorted(ends)
        # What is given out next is nobody's.
        if pool.num_free:
            blocks = pool.allocate(pool.num_free)
            assert not busy & set(np.asarray(blocks.ids).tolist())
            pool.release(blocks)


@pytest.mark.parametrize("seed", range(6))
def test_random_histories_agree_with_a_model(seed: int) -> None:
    machine = Machine(seed)
    for _ in range(400):
        machine.step()
    # The histories do reach all ends.
    outcomes = {outcome for _, outcome in machine.holder.ended}
    assert outcomes == {Outcome.COMPLETED, Outcome.PEER_LOST, Outcome.ABORTED, Outcome.UNCLAIMED}
