"""Blocks of a key-value cache: who has them, and which of several owners over time is meant.

A block id alone is ambiguous: after a block was freed and given to another request, a late reader of the first one
would read the second one's keys and values without noticing. So each block has a tag that changes whenever the block
changes hands, and whoever speaks of blocks names both.

Blocks that peers may be touching are pinned: nobody can free them, their owner neither, until the last pin is gone.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmsys.core.errors import ConfigError, InfeasibleError, InputError

_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blocks:
    """Some blocks of a pool during one ownership. ids, tags: int64 arrays of shape (n,), copies; ids are different.

    Raises:
        InputError: other shapes or types, or an id that comes twice.
    """

    ids: NDArray[np.int64]
    tags: NDArray[np.int64]

    def __post_init__(self) -> None:
        for name in ("ids", "tags"):
            object.__setattr__(self, name, _as_integers(name, getattr(self, name)))
        if len(self.ids) != len(self.tags) or len(np.unique(self.ids)) != len(self.ids):
            raise InputError(
                "these are not blocks",
                expected="a tag for each id, and every id once",
                found=f"{len(self.ids)} ids, {len(np.unique(self.ids))} different ones, and {len(self.tags)} tags",
                fix="use blocks as BlockPool.allocate gave them",
            )

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self) -> bytes:
        """16 bytes that are equal for the same ids and tags in the same order, and for no others."""
        data = self.ids.astype("<i8").tobytes() + self.tags.astype("<i8").tobytes()
        return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


class BlockPool:
    """Gives out the blocks of a cache and takes them back. Thread safe; no call blocks."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ConfigError(
                "a pool needs at least one block",
                expected="num_blocks >= 1",
                found=f"num_blocks={num_blocks}",
                fix="give the number of blocks of the cache",
            )
        # Re-entrant, so that `unpin` frees in one step by a `release` that a subclass may have extended.
        self._lock = threading.RLock()
        self._tags = np.zeros(num_blocks, dtype=np.int64)
        self._used = np.zeros(num_blocks, dtype=bool)
        self._num_pins = np.zeros(num_blocks, dtype=np.int64)
        self._written = np.zeros(num_blocks, dtype=bool)
        self._kept = np.zeros(num_blocks, dtype=bool)
        # The most recently freed block is given out first: its pages are warm, and reuse bugs show early.
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_blocks(self) -> int:
        return len(self._tags)

    @property
    def num_free(self) -> int:
        with self._lock:
            return len(self._free)

    def allocate(self, num_blocks: int) -> Blocks:
        """Takes blocks.

        Raises:
            InputError: a negative number. InfeasibleError: not as many are free.
        """
        if num_blocks < 0:
            raise InputError(
                "blocks cannot be allocated", expected="0 or more", found=f"{num_blocks}", fix="correct num_blocks"
            )
        with self._lock:
            if num_blocks > len(self._free):
                raise InfeasibleError(
                    "the pool has too few free blocks",
                    expected=f"{num_blocks} free blocks",
                    found=f"{len(self._free)} of {len(self._tags)}",
                    fix="wait until requests end, or make the pool larger",
                )
            taken = self._free[len(self._free) - num_blocks :][::-1]
            del self._free[len(self._free) - num_blocks :]
            ids = np.array(taken, dtype=np.int64)
            self._used[ids] = True
            self._tags[ids] += 1
            return Blocks(ids=ids, tags=self._tags[ids])

    def release(self, blocks: Blocks) -> None:
        """Gives blocks back; from now on their tags are no longer current.

        Raises:
            InputError: they are not the caller's to give back: freed already, or of a later owner; or peers may still
                be touching them. Then none is given back.
        """
        with self._lock:
            self._require_current(blocks)
            pinned = blocks.ids[self._num_pins[blocks.ids] > 0]
            if pinned.size:
                raise InputError(
                    "blocks were given back that peers may be reading or writing",
                    expected="blocks of no open hold, and out of quarantine",
                    found=f"{pinned.size} that are, the first is block {pinned[0]}",
                    fix="leave that to the hold, which gives them back when it ends; `cancel` the request to end it",
                )
            self._used[blocks.ids] = False
            self._tags[blocks.ids] += 1
            self._free.extend(blocks.ids[::-1].tolist())

    def is_current(self, blocks: Blocks) -> bool:
        """Whether all of them still belong to the owner that these tags were given to."""
        with self._lock:
            return not self._not_current(blocks).size

    def pin(self, blocks: Blocks, *, writes: bool) -> None:
        """Keeps blocks from being released until `unpin`. Several readers may share blocks, or several writers.

        Raises:
            InputError: the blocks are not current, or some are pinned for writers and this is to read, or vice versa.
        """
        with self._lock:
            self._require_current(blocks)
            ids = blocks.ids
            taken = ids[(self._num_pins[ids] > 0) & (self._written[ids] != writes)]
            if taken.size:
                raise InputError(
                    "blocks that one peer writes cannot be held for another that reads them",
                    expected="blocks that are only read, or only written, at a time",
                    found=f"{taken.size} that are held for the other, the first is block {taken[0]}",
                    fix="hold blocks for readers when what they are to read has been written and completed",
                )
            self._kept[ids] &= self._num_pins[ids] > 0
            self._num_pins[ids] += 1
            self._written[ids] = writes

    def unpin(self, blocks: Blocks, *, release: bool) -> None:
        """Takes one pin off. With the last one blocks are given back, if all of their pins said `release`."""
        with self._lock:
            ids = blocks.ids
            self._num_pins[ids] -= 1
            self._kept[ids] |= not release
            free = (self._num_pins[ids] == 0) & ~self._kept[ids]
            self.release(Blocks(ids=ids[free], tags=blocks.tags[free]))

    def _require_current(self, blocks: Blocks) -> None:
        wrong = self._not_current(blocks)
        if wrong.size:
            raise InputError(
                "blocks are not held any more by who uses them",
                expected=f"tags {self._tags[wrong][:5].tolist()} of blocks {wrong[:5].tolist()}, in use",
                found=f"tags {blocks.tags[np.isin(blocks.ids, wrong)][:5].tolist()}",
                fix="use blocks as BlockPool.allocate gave them, and release each set once",
            )

    def _not_current(self, blocks: Blocks) -> NDArray[np.int64]:
        ids = blocks.ids
        if ids.size and (ids.min() < 0 or ids.max() >= len(self._tags)):
            raise InputError(
                "blocks are not of this pool",
                expected=f"ids from 0 to {len(self._tags) - 1}",
                found=f"ids from {ids.min()} to {ids.max()}",
                fix="give blocks back to the pool they came from",
            )
        wrong: NDArray[np.int64] = ids[~self._used[ids] | (self._tags[ids] != blocks.tags)]
        return wrong


def _as_integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(
            f"{name} of blocks must be whole numbers in a row",
            expected="integers of shape (n,)",
            found=f"{array.dtype} of shape {array.shape}",
            fix="use blocks as BlockPool.allocate gave them",
        )
    return array.astype(np.int64)
