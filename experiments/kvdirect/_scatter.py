"""Which blocks of one memory go to which blocks of another, and contents by which every byte can be checked."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llmsys.core.errors import InputError

RUN_LENGTH = 8
SHUFFLED, RUNS, CONTIGUOUS = "single blocks, shuffled", f"runs of {RUN_LENGTH} blocks, shuffled", "contiguous blocks"
WORD_BYTES = 8

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no two offsets have the same word
_CHUNK_WORDS = 128 << 10  # 1 MiB, which stays in the cache

Words = NDArray[np.uint64]
Offsets = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """A scatter of `num_blocks` blocks of `block_bytes`; both sides are permutations of the same range of memory.

    kind: SHUFFLED: single blocks in random order on both sides. RUNS: runs of RUN_LENGTH blocks, adjacent on both
    sides, in random order. CONTIGUOUS: all in order.
    """

    kind: str
    block_bytes: int
    num_blocks: int
    seed: int

    def __post_init__(self) -> None:
        run = RUN_LENGTH if self.kind == RUNS else 1
        if self.num_blocks < 1 or self.num_blocks % run or self.block_bytes < 1 or self.block_bytes % WORD_BYTES:
            raise InputError(
                f"blocks cannot be laid out as {self.kind!r}",
                expected=f"a multiple of {run} blocks, each a multiple of {WORD_BYTES} bytes",
                found=f"{self.num_blocks} blocks of {self.block_bytes} bytes",
                fix="choose block sizes and a total that are powers of two",
            )

    @property
    def size_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def quarter(self) -> Pattern:
        """The same with about a quarter of the blocks."""
        run = RUN_LENGTH if self.kind == RUNS else 1
        return replace(self, num_blocks=max(self.num_blocks // 4 // run, 1) * run)

    def blocks(self) -> tuple[Offsets, Offsets]:
        """(local, remote) block numbers of the copies, in the order in which a caller would name them."""
        if self.kind == CONTIGUOUS:
            both = np.arange(self.num_blocks, dtype=np.int64)
            return both, both
        random = np.random.default_rng(self.seed)
        return self._shuffled(random), self._shuffled(random)

    def _shuffled(self, random: np.random.Generator) -> Offsets:
        run = RUN_LENGTH if self.kind == RUNS else 1
        runs = random.permutation(self.num_blocks // run)
        return (runs[:, None] * run + np.arange(run)).reshape(-1)


def fill(memory: Words) -> None:
    """Gives each word of `memory` a value that only its offset has."""
    for begin in range(0, memory.size, _CHUNK_WORDS):
        part = memory[begin : begin + _CHUNK_WORDS]
        part[:] = _words(begin, part.size)


def num_wrong_bytes(memory: Words, pattern: Pattern) -> int:
    """How many bytes of `memory` are not those that `pattern` copies there from filled memory; all are looked at."""
    words = pattern.block_bytes // WORD_BYTES
    local, remote = pattern.blocks()
    blocks = memory[: pattern.num_blocks * words].reshape(pattern.num_blocks, words)
    inside = _words(0, words)
    wrong = 0
    step = max(_CHUNK_WORDS // words, 1)
    for begin in range(0, pattern.num_blocks, step):
        chosen = slice(begin, begin + step)
        starts = remote[chosen].astype(np.uint64) * np.uint64(words) * _FACTOR
        found = blocks[local[chosen]]
        found -= starts[:, None]
        if not np.array_equal(found, np.broadcast_to(inside, found.shape)):
            found ^= inside
            wrong += int(np.count_nonzero(found.view(np.uint8)))
    return wrong


def _words(begin: int, count: int) -> Words:
    return np.arange(begin, begin + count, dtype=np.uint64) * _FACTOR
