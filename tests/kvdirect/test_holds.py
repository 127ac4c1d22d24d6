"""Holds: each ends once, in the right way, and no block is free while a peer may use it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llmsys.core.errors import ConfigError, InputError
from llmsys.kvdirect.blocks import Blocks
from llmsys.kvdirect.config import KvConfig
from llmsys.kvdirect.holds import MAX_REQUEST_ID_BYTES, Access, Outcome
from tests.kvdirect.holder import Holder

READ, WRITE = Access.READ, Access.WRITE


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
    with pytest.raises(InputError, match="cannot be held for another"):
        holder.table.open("w", holder.pool, blocks, peer_name="rank 0", access=WRITE, now_s=0.0)
    assert holder.complete("r/1", 1, blocks) is Outcome.COMPLETED
    assert holder.pool.num_free == 6
    assert holder.complete("r/0", 0, blocks) is Outcome.COMPLETED
    assert holder.pool.num_free == 10


@pytest.mark.parametrize("order", [("completed", "aborted"), ("aborted", "completed"), ("aborted", "aborted")])
def test_several_writers_share_blocks_and_what_one_completed_stays(holder: Holder, order: tuple[str, str]) -> None:
    blocks = holder.pool.allocate(4)
    for rank in range(2):
        holder.table.peer_joined(rank, f"rank {rank}", 7)
        holder.table.open(f"w/{rank}", holder.pool, blocks, peer_name=f"rank {rank}", access=WRITE, now_s=0.0)
    for rank, end in enumerate(order):
        if end == "completed":
            assert holder.complete(f"w/{rank}", rank, blocks) is Outcome.COMPLETED
        else:
            assert holder.table.abort(f"w/{rank}", rank) is Outcome.ABORTED
    assert holder.pool.num_free == (6 if "completed" in order else 10)


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
