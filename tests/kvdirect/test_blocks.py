"""Block pools against a model: who owns what, and which tags are current."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest

from llmsys.core.errors import ConfigError, InfeasibleError, InputError
from llmsys.kvdirect.blocks import BlockPool, Blocks


def some(ids: list[int], tags: list[int]) -> Blocks:
    return Blocks(ids=np.array(ids), tags=np.array(tags))


def test_a_block_has_another_tag_for_every_owner() -> None:
    pool = BlockPool(3)
    seen = set()
    for _ in range(5):
        blocks = pool.allocate(2)
        seen |= set(zip(blocks.ids.tolist(), blocks.tags.tolist(), strict=True))
        pool.release(blocks)
        assert not pool.is_current(blocks)
    assert len(seen) == 10


def test_the_most_recently_freed_block_is_given_out_first() -> None:
    pool = BlockPool(4)
    first, _ = pool.allocate(2), pool.allocate(1)
    pool.release(first)
    assert pool.allocate(2).ids.tolist() == first.ids.tolist()


def test_taking_more_than_there_is_takes_nothing() -> None:
    pool = BlockPool(3)
    pool.allocate(2)
    with pytest.raises(InfeasibleError, match="2 free blocks"):
        pool.allocate(2)
    assert pool.num_free == 1
    assert len(pool.allocate(0)) == 0
    with pytest.raises(InputError):
        pool.allocate(-1)
    with pytest.raises(ConfigError):
        BlockPool(0)


@pytest.mark.parametrize(
    ("ids", "tags"),
    [([0], [1]), ([3], [0]), ([-1], [0]), ([4], [0])],
    ids=["freed already", "never given out", "negative", "not of the pool"],
)
def test_what_is_not_the_callers_is_not_released(ids: list[int], tags: list[int]) -> None:
    pool = BlockPool(4)
    pool.release(pool.allocate(1))
    kept = pool.allocate(1)
    with pytest.raises(InputError):
        pool.release(some([*kept.ids, *ids], [*kept.tags, *tags]))
    assert pool.num_free == 3 and pool.is_current(kept)


@pytest.mark.parametrize(
    ("ids", "tags"),
    [([1, 1], [1, 1]), ([1, 2], [1]), ([[1]], [[1]]), ([1.5], [1]), ([1], ["a"])],
    ids=["twice", "a tag too few", "two dimensions", "not whole", "text"],
)
def test_what_are_not_blocks(ids: list[object], tags: list[object]) -> None:
    with pytest.raises(InputError):
        Blocks(ids=np.array(ids), tags=np.array(tags))


def test_blocks_are_copies() -> None:
    ids = np.arange(3)
    blocks = Blocks(ids=ids, tags=ids)
    ids[0] = 9
    assert blocks.ids.tolist() == [0, 1, 2] == blocks.tags.tolist()


def test_a_digest_names_ids_tags_and_their_order() -> None:
    digests = {
        some(i, t).digest() for i, t in [([1, 2], [3, 4]), ([2, 1], [3, 4]), ([1, 2], [3, 5]), ([1], [2]), ([], [])]
    }
    assert len(digests) == 5
    assert some([1, 2], [3, 4]).digest() == some([1, 2], [3, 4]).digest()
    # Ids and tags do not run into each other.
    assert some([1, 2], [3, 4]).digest() != some([1, 3], [2, 4]).digest()


def test_pinned_blocks_are_freed_with_the_last_pin() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    part = some(blocks.ids[:2].tolist(), blocks.tags[:2].tolist())
    pool.pin(blocks, writes=False)
    pool.pin(part, writes=False)
    with pytest.raises(InputError, match="3 that are"):
        pool.release(blocks)
    pool.unpin(blocks, release=True)
    assert pool.num_free == 2
    with pytest.raises(InputError):
        pool.release(part)
    pool.unpin(part, release=True)
    assert pool.num_free == 4


@pytest.mark.parametrize("keeps", [(True, False), (False, True)])
def test_what_one_writer_completed_stays_its_owners(keeps: tuple[bool, bool]) -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    for _ in keeps:
        pool.pin(blocks, writes=True)
    for keep in keeps:
        pool.unpin(blocks, release=not keep)
    assert pool.is_current(blocks) and pool.num_free == 2
    # Later holds of the same owner know nothing of that.
    pool.pin(blocks, writes=False)
    pool.unpin(blocks, release=True)
    assert pool.num_free == 4


def test_readers_and_writers_do_not_share_blocks() -> None:
    pool = BlockPool(4)
    written, read = pool.allocate(1), pool.allocate(1)
    pool.pin(written, writes=True)
    pool.pin(read, writes=False)
    for blocks, writes in [(written, False), (read, True)]:
        with pytest.raises(InputError, match="cannot be held for another"):
            pool.pin(blocks, writes=writes)
    pool.unpin(written, release=False)
    pool.pin(written, writes=False)
    with pytest.raises(InputError, match="not held any more"):
        pool.pin(some([3], [1]), writes=False)


def test_random_operations_agree_with_a_model() -> None:
    """The model: which blocks are free, the current tag of the others, and how often each is pinned."""
    rng = random.Random(1)
    pool = BlockPool(12)
    owned: list[Blocks] = []
    pins: list[Blocks] = []
    given_out: set[tuple[int, int]] = set()
    for _ in range(2000):
        pinned = {int(i) for blocks in pins for i in blocks.ids}
        match rng.choice(["allocate", "release", "pin", "unpin"]):
            case "allocate":
                count = rng.randint(1, 4)
                num_free = 12 - sum(map(len, owned))
                if count > num_free:
                    with pytest.raises(InfeasibleError):
                        pool.allocate(count)
                    continue
                blocks = pool.allocate(count)
                names = set(zip(blocks.ids.tolist(), blocks.tags.tolist(), strict=True))
                assert not names & given_out and not {i for i, _ in names} & {int(i) for b in owned for i in b.ids}
                given_out |= names
                owned.append(blocks)
            case "release" if owned:
                blocks = rng.choice(owned)
                if pinned & set(blocks.ids.tolist()):
                    with pytest.raises(InputError):
                        pool.release(blocks)
                else:
                    pool.release(blocks)
                    owned.remove(blocks)
            case "pin" if owned:
                blocks = rng.choice(owned)
                pool.pin(blocks, writes=False)
                pins.append(blocks)
            case "unpin" if pins:
                blocks = pins.pop(rng.randrange(len(pins)))
                pool.unpin(blocks, release=True)
                if blocks not in pins:
                    owned.remove(blocks)
        assert pool.num_free == 12 - sum(map(len, owned))
        assert all(pool.is_current(blocks) for blocks in owned)


def test_threads_never_own_the_same_block() -> None:
    pool = BlockPool(16)
    owners = np.zeros(16, dtype=np.int64)
    wrong: list[int] = []

    def work(me: int) -> None:
        rng = random.Random(me)
        for _ in range(300):
            try:
                blocks = pool.allocate(rng.randint(1, 5))
            except InfeasibleError:
                continue
            wrong.extend(np.flatnonzero(owners[blocks.ids]).tolist())
            owners[blocks.ids] = me
            wrong.extend(np.flatnonzero(owners[blocks.ids] != me).tolist())
            owners[blocks.ids] = 0
            pool.release(blocks)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and pool.num_free == 16
