"""Holds: each ends once, in the right way, and no block is free while a peer may use it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from llmsys.core.errors import ConfigError, InputError
from llmsys.kvdirect.blocks import BlockPool, Blocks
from llmsys.kvdirect.config import KvConfig
from llmsys.kvdirect.holds import MAX_REQUEST_ID_BYTES, Access, Hold, HoldTable, Outcome

READ, WRITE = Access.READ, Access.WRITE
CONFIG = KvConfig(unclaimed_timeout_s=60.0, quarantine_s=30.0)


@dataclass
class Holder:
    """A table with a pool of ten blocks, and what it said had ended."""

    config: KvConfig = CONFIG
    ended: list[tuple[str, Outcome]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = BlockPool(10)
        self.table = HoldTable(self.config, self._ended)

    def _ended(self, hold: Hold, outcome: Outcome) -> None:
        # Whoever hears of the end may use the blocks at once, and may ask the table.
        assert self.table.outcome(hold.request_id) is outcome
        self.ended.append((hold.request_id, outcome))

    def open(
        self, request_id: str, *, peer: str = "decode", access: Access = READ, num_blocks: int = 2, now_s: float = 0.0
    ) -> Blocks:
        blocks = self.pool.allocate(num_blocks)
        self.table.open(request_id, self.pool, blocks, peer_name=peer, access=access, now_s=now_s)
        return blocks

    def complete(self, request_id: str, peer_id: int, blocks: Blocks) -> Outcome:
        outcome = self.table.complete(request_id, peer_id, blocks.digest())
        self.table.tell(answered=request_id)
        return outcome


@pytest.fixture
def holder() -> Iterator[Holder]:
    holder = Holder()
    yield holder
    names = [name for name, _ in holder.ended]
    assert len(names) == len(set(names))


def test_a_completed_read_frees_the_blocks_and_a_completed_write_leaves_them(holder: Holder) -> None:
    holder.table.peer_joined(1, "decode", 7)
    read, written = holder.open("r"), holder.open("w", access=WRITE)
    assert holder.table.num_held == 2 and holder.pool.num_free == 6
    assert holder.complete("r", 1, read) is Outcome.COMPLETED
    assert holder.complete("w", 1, written) is Outcome.COMPLETED
    assert holder.pool.num_free == 8 and holder.pool.is_current(written)
    holder.pool.release(written)
    assert holder.ended == [("r", Outcome.COMPLETED), ("w", Outcome.COMPLETED)]


def test_a_completion_can_be_repeated_by_the_same_process_with_the_same_blocks_only(holder: Holder) -> None:
    holder.table.peer_joined(1, "decode", 7)
    blocks = holder.open("r")
    for _ in range(3):
        assert holder.complete("r", 1, blocks) is Outcome.COMPLETED
    assert holder.complete("r", 1, Blocks(ids=blocks.ids, tags=blocks.tags + 1)) is Outcome.STALE
    # A restarted peer with the old ticket, and a stranger: what they read was not covered by the hold.
    holder.table.peer_joined(2, "decode", 8)
    holder.table.peer_joined(3, "other", 9)
    assert holder.complete("r", 2, blocks) is Outcome.FOREIGN
    assert holder.complete("r", 3, blocks) is Outcome.FOREIGN
    # Another connection of the process that completed it.
    holder.table.peer_joined(4, "decode", 7)
    assert holder.complete("r", 4, blocks) is Outcome.COMPLETED
    assert holder.ended == [("r", Outcome.COMPLETED)]


def test_a_held_request_is_completed_by_its_peer_with_its_blocks_only(holder: Holder) -> None:
    holder.table.peer_joined(1, "decode", 7)
    holder.table.peer_joined(2, "other", 7)
    blocks = holder.open("r")
    assert holder.complete("r", 2, blocks) is Outcome.FOREIGN
    assert holder.complete("r", 99, blocks) is Outcome.FOREIGN
    assert holder.complete("r", 1, Blocks(ids=blocks.ids[::-1], tags=blocks.tags[::-1])) is Outcome.STALE
    assert holder.complete("unknown", 1, blocks) is Outcome.UNKNOWN
    assert holder.table.num_held == 1 and holder.table.outcome("r") is None and not holder.ended


def test_a_lost_reader_frees_at_once_and_a_lost_writer_after_the_quarantine(holder: Holder) -> None:
    holder.table.peer_joined(1, "decode", 7)
    holder.open("r")
    holder.open("w", access=WRITE)
    holder.table.peer_lost(1, now_s=100.0)
    holder.table.tell()
    assert holder.ended == [("r", Outcome.PEER_LOST), ("w", Outcome.PEER_LOST)]
    assert (holder.pool.num_free, holder.table.num_quarantined_blocks) == (8, 2)
    assert holder.table.expire(129.9) == 130.0
    assert holder.pool.num_free == 8
    assert holder.table.expire(130.0) is None
    assert (holder.pool.num_free, holder.table.num_quarantined_blocks) == (10, 0)


def test_without_a_quarantine_lost_writers_free_at_once() -> None:
    holder = Holder(KvConfig(quarantine_s=0.0))
    holder.table.peer_joined(1, "decode", 7)
    holder.open("w", access=WRITE)
    holder.table.peer_lost(1, now_s=100.0)
    assert holder.pool.num_free == 10


def test_a_hold_outlives_all_but_the_last_connection_of_its_process(holder: Holder) -> None:
    for peer_id in (1, 2):
        holder.table.peer_joined(peer_id, "decode", 7)
    holder.open("r")
    holder.table.peer_lost(1, now_s=1.0)
    assert holder.table.num_held == 1
    holder.table.peer_lost(2, now_s=2.0)
    assert holder.table.num_held == 0


def test_a_hold_is_bound_to_the_newest_process_of_its_name(holder: Holder) -> None:
    """A restarted peer is there before the end of its former life is known."""
    holder.table.peer_joined(1, "decode", 7)
    old = holder.open("for the old one")
    holder.table.peer_joined(2, "decode", 8)
    new = holder.open("for the new one")
    assert holder.complete("for the new one", 1, new) is Outcome.FOREIGN
    assert holder.complete("for the old one", 2, old) is Outcome.FOREIGN
    holder.table.peer_lost(1, now_s=1.0)
    assert holder.table.outcome("for the new one") is None
    assert holder.complete("for the old one", 2, old) is Outcome.PEER_LOST
    assert holder.complete("for the new one", 2, new) is Outcome.COMPLETED


def test_a_peer_that_never_comes_does_not_keep_blocks(holder: Holder) -> None:
    blocks = holder.open("a", now_s=0.0)
    holder.open("b", now_s=1.0)
    holder.open("c", peer="other", now_s=2.0)
    holder.table.peer_joined(1, "other", 7)
    assert holder.table.expire(59.9) == 60.0
    assert holder.table.expire(60.0) == 61.0
    assert holder.table.expire(1000.0) is None
    holder.table.tell()
    assert holder.ended == [("a", Outcome.UNCLAIMED), ("b", Outcome.UNCLAIMED)]
    assert holder.table.num_held == 1 and holder.pool.num_free == 8
    holder.table.peer_joined(2, "decode", 7)
    assert holder.complete("a", 2, blocks) is Outcome.UNCLAIMED


def test_expiry_passes_over_what_does_not_expire(holder: Holder) -> None:
    """A hold in front that was claimed, or completed, does not keep later ones from expiring."""
    first = holder.open("claimed", peer="other", now_s=0.0)
    second = holder.open("completed", peer="third", now_s=0.0)
    holder.open("late", now_s=1.0)
    holder.table.peer_joined(1, "other", 7)
    holder.table.peer_joined(2, "third", 7)
    holder.complete("completed", 2, second)
    assert holder.table.expire(61.0) is None
    holder.table.tell()
    assert ("late", Outcome.UNCLAIMED) in holder.ended and holder.table.outcome("claimed") is None
    assert holder.complete("claimed", 1, first) is Outcome.COMPLETED


@pytest.mark.parametrize("answer", ["complete", "abort", "loss"])
def test_a_cancelled_request_stays_held_until_its_peer_has_stopped(holder: Holder, answer: str) -> None:
    holder.table.peer_joined(1, "decode", 7)
    blocks = holder.open("r")
    assert holder.table.cancel("r") is None and holder.table.cancel("r") is None
    assert holder.table.num_held == 1 and holder.pool.num_free == 8
    if answer == "complete":
        assert holder.complete("r", 1, blocks) is Outcome.ABORTED
    elif answer == "abort":
        assert holder.table.abort("r", 1) is Outcome.ABORTED
    else:
        holder.table.peer_lost(1, now_s=1.0)
    assert holder.pool.num_free == 10
    assert holder.table.cancel("r") is (Outcome.PEER_LOST if answer == "loss" else Outcome.ABORTED)


def test_cancel_before_the_peer_is_there_frees_at_once(holder: Holder) -> None:
    holder.open("r")
    assert holder.table.cancel("r") is Outcome.ABORTED and holder.pool.num_free == 10
    assert holder.table.cancel("never held") is Outcome.UNKNOWN


def test_only_its_peer_aborts_a_request(holder: Holder) -> None:
    holder.table.peer_joined(1, "decode", 7)
    holder.table.peer_joined(2, "other", 7)
    holder.open("r", access=WRITE)
    assert holder.table.abort("r", 2) is Outcome.FOREIGN
    assert holder.table.abort("r", 1) is Outcome.ABORTED
    # It said that it does not write any more.
    assert holder.pool.num_free == 10 and holder.table.num_quarantined_blocks == 0
    assert holder.table.abort("r", 1) is Outcome.ABORTED


def test_a_peer_that_comes_too_late_hears_which_writes_were_given_up(holder: Holder) -> None:
    for name in ("unclaimed", "cancelled", "aborted", "completed", "lost"):
        holder.open(name, access=WRITE, num_blocks=1, now_s=-60.0 if name == "unclaimed" else 0.0)
    holder.open("read", num_blocks=1, now_s=-60.0)
    holder.open("of another", peer="other", access=WRITE, num_blocks=1, now_s=-60.0)
    holder.table.expire(0.0)
    holder.table.cancel("cancelled")
    assert holder.table.peer_joined(1, "decode", 7) == ("unclaimed", "cancelled")
    holder.table.abort("aborted", 1)
    holder.table.cancel("lost")
    holder.table.peer_lost(1, now_s=1.0)
    assert holder.table.peer_joined(2, "decode", 8) == ("unclaimed", "cancelled", "completed", "lost")


def test_what_is_remembered_is_bounded() -> None:
    holder = Holder(KvConfig(remembered_requests=3))
    for index in range(8):
        holder.open(f"{index}", access=WRITE if index % 2 else READ)
        holder.table.cancel(f"{index}")
        holder.table.tell()
    assert [holder.table.outcome(f"{i}") is Outcome.ABORTED for i in range(8)] == [False] * 5 + [True] * 3
    assert holder.table.peer_joined(1, "decode", 7) == ("5", "7")
    holder.open("0")
    with pytest.raises(InputError, match="aborted"):
        holder.open("7")


def test_several_readers_share_blocks_and_the_last_one_frees_them(holder: Holder) -> None:
    """As the ranks of a peer of another tensor-parallel size do."""
    blocks = holder.pool.allocate(4)
    for rank in range(2):
        holder.table.peer_joined(rank, f"rank {rank}", 7)
        holder.table.open(f"r/{rank}", holder.pool, blocks, peer_name=f"rank {rank}", access=READ, now_s=0.0)
    with pytest.raises(InputError, match="one peer writes"):
        holder.table.open("w", holder.pool, blocks, peer_name="rank 0", access=WRITE, now_s=0.0)
    assert holder.complete("r/1", 1, blocks) is Outcome.COMPLETED
    assert holder.pool.num_free == 6
    assert holder.complete("r/0", 0, blocks) is Outcome.COMPLETED
    assert holder.pool.num_free == 10


def test_the_owner_cannot_free_what_is_held(holder: Holder) -> None:
    blocks = holder.open("r")
    with pytest.raises(InputError, match="cancel"):
        holder.pool.release(blocks)
    with pytest.raises(InputError):
        holder.table.open("r", holder.pool, blocks, peer_name="decode", access=READ, now_s=0.0)
    holder.table.cancel("r")
    with pytest.raises(InputError):
        holder.table.open("again", holder.pool, blocks, peer_name="decode", access=READ, now_s=0.0)
    assert holder.table.num_held == 0 and holder.pool.num_free == 10


@pytest.mark.parametrize("request_id", ["", "x" * (MAX_REQUEST_ID_BYTES + 1), "\ud800"])
def test_ids_that_cannot_be_sent_are_refused(holder: Holder, request_id: str) -> None:
    with pytest.raises(InputError, match="no usable id"):
        holder.open(request_id)
    assert holder.pool.num_free == 8  # those that were allocated for it are the caller's
    holder.open("é" * (MAX_REQUEST_ID_BYTES // 2))


def test_what_its_peer_ended_is_told_after_the_answer(holder: Holder) -> None:
    """Who hears of a completion may close the endpoint, so the answer must be on its way before."""
    holder.table.peer_joined(1, "decode", 7)
    blocks = holder.open("r")
    holder.table.complete("r", 1, blocks.digest())
    holder.table.tell()
    assert holder.table.outcome("r") is None and not holder.ended
    assert holder.pool.num_free == 10
    holder.table.tell(answered="r")
    assert holder.ended == [("r", Outcome.COMPLETED)]


def test_close_ends_all_and_keeps_back_what_may_be_written(holder: Holder) -> None:
    holder.table.peer_joined(1, "decode", 7)
    for name, peer, access in [("r", "decode", READ), ("w", "decode", WRITE), ("u", "nobody", WRITE)]:
        holder.open(name, peer=peer, access=access)
    holder.table.close()
    holder.table.close()
    holder.table.tell()
    assert {outcome for _, outcome in holder.ended} == {Outcome.ABORTED} and len(holder.ended) == 3
    assert holder.pool.num_free == 8
    with pytest.raises(InputError, match="closed"):
        holder.open("late")


@pytest.mark.parametrize("name", ["unclaimed_timeout_s", "exchange_timeout_s", "remembered_requests", "quarantine_s"])
def test_settings_out_of_range(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        KvConfig(**{name: -1})


# -- a state machine against a model ---------------------------------------------------------------------------------


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

    def busy(self) -> set[int]:
        """Blocks that must not be free: somebody may be touching them, or owns them."""
        used = [r for r in self.requests.values() if r.outcome is None or r.until_s is not None]
        return self.kept | {int(i) for request in used for i in request.blocks.ids}

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
        self.rng.choice([*actions, self.abort, self.pass_time, self.use_written])()
        self.holder.table.tell()
        self.check()

    def open(self) -> None:
        num_blocks = self.rng.randint(1, 3)
        peer, access = self.rng.choice("abc"), self.rng.choice([READ, WRITE])
        shared = [r for r in self.model.requests.values() if r.outcome is None and r.access is READ]
        if access is READ and shared and self.rng.random() < 0.4:
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
        session = (self.rng.choice("aabbc"), self.rng.randint(1, 2))
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
        """The owner of completed writes frees them."""
        for request in self.model.requests.values():
            ids = set(request.blocks.ids.tolist())
            if request.access is WRITE and request.outcome is Outcome.COMPLETED and ids <= self.model.kept:
                if self.holder.pool.is_current(request.blocks):
                    self.holder.pool.release(request.blocks)
                    self.model.kept -= ids
                return

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
