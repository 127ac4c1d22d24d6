"""Where rows lie: segments of rows, their parts for a chunked exchange, and the permutations between two orders."""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def offsets(sizes: IntArray) -> IntArray:
    """The first row of each segment when segments of ``sizes`` (any shape, in C order) follow one another."""
    flat = sizes.ravel()
    return (np.cumsum(flat) - flat).reshape(sizes.shape)


def part_bounds(sizes: IntArray, num_parts: int, capacity: int | None) -> IntArray:
    """Cut each segment of ``sizes`` (any shape) into ``num_parts`` runs of rows: bounds, shape (num_parts + 1, ...).

    Part p of a segment has its rows from bounds[p] up to bounds[p + 1]. Without ``capacity`` the parts of a segment
    are equal, to a row. With it, part p has the slots from ``p * capacity // num_parts`` up to that of p + 1 as far as
    they are filled (Lancet's irregular capacity axis), so late parts may be empty.
    """
    part = np.arange(num_parts + 1, dtype=np.int64).reshape(-1, *[1] * sizes.ndim)
    if capacity is None:
        return cast(IntArray, part * sizes // num_parts)
    return cast(IntArray, np.minimum(part * capacity // num_parts, sizes))


def segment_rows(starts: IntArray, sizes: IntArray) -> IntArray:
    """The row numbers of segments (first row and length of each, in C order), one segment after another."""
    starts, sizes = starts.ravel(), sizes.ravel()
    begins = np.cumsum(sizes) - sizes
    return cast(IntArray, np.arange(sizes.sum(), dtype=np.int64) + np.repeat(starts - begins, sizes))


def transposed_rows(sizes: IntArray) -> IntArray:
    """Row numbers that bring segments of ``sizes``, shape (a, b, ...), from C order into the order (b, a, ...)."""
    return segment_rows(offsets(sizes).swapaxes(0, 1), sizes.swapaxes(0, 1))


def unchunked_rows(part_sizes: IntArray) -> IntArray:
    """Row numbers that turn chunks, one after another, into what one exchange gives.

    ``part_sizes`` has shape (chunks, ranks, buckets). In each chunk, rows are in the order of ranks and buckets.
    """
    return segment_rows(np.moveaxis(offsets(part_sizes), 0, -1), np.moveaxis(part_sizes, 0, -1))
