"""Random scattered batches, and what NumPy makes of them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from tests.comm.endpoint import Bytes


def layout(
    rng: np.random.Generator, block_bytes: int, num_blocks: int, destination_bytes: int, source_bytes: int
) -> tuple[Any, Any, Any]:
    """(destinations, sources, lengths) in any order: destinations apart or adjacent, sources anywhere, some empty."""
    lengths = rng.integers(max(block_bytes // 2, 1), block_bytes + 1, num_blocks)
    lengths[rng.random(num_blocks) < 0.1] = 0
    gaps = rng.integers(0, 3, num_blocks) * (rng.random(num_blocks) < 0.5)
    destinations = np.cumsum(gaps + lengths) - lengths
    assert destinations[-1] + lengths[-1] <= destination_bytes
    sources = rng.integers(0, source_bytes - block_bytes + 1, num_blocks)
    # Runs that are adjacent on both sides, so that there is something to coalesce.
    for index in np.flatnonzero(rng.random(num_blocks) < 0.4):
        follows = sources[index - 1] + lengths[index - 1] if index else 0
        if index and gaps[index] == 0 and follows + lengths[index] <= source_bytes:
            sources[index] = follows
    order = rng.permutation(num_blocks)
    return destinations[order], sources[order], lengths[order]


def copied(destination: Bytes, source: Bytes, entries: tuple[Any, Any, Any]) -> Bytes:
    """The oracle: what NumPy makes of it."""
    result = destination.copy()
    for to, begin, length in zip(*entries, strict=True):
        result[to : to + length] = source[begin : begin + length]
    return result


def num_runs(entries: tuple[Any, Any, Any]) -> int:
    """Operations that are left when entries adjacent on both sides are one."""
    rows = sorted(row for row in zip(*entries, strict=True) if row[2])
    joins = sum(a[0] + a[2] == b[0] and a[1] + a[2] == b[1] for a, b in itertools.pairwise(rows))
    return len(rows) - joins
