"""Strided and gathered elements as runs of bytes, for one view or for two views side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmsys.core.errors import InputError

IntArray = NDArray[np.int64]

MAX_RUNS = 1 << 27  # 1 GiB of offsets for each side; more is a mistake in the view or needs several batches


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Runs:
    """Contiguous runs of bytes in the order of a view's elements, each as long as it can be.

    offsets, lengths: int64 arrays of shape (n,), in bytes; offsets count from the beginning of the view's region.
    """

    offsets: IntArray
    lengths: IntArray

    @property
    def size_bytes(self) -> int:
        return int(self.lengths.sum())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Axis:
    """One dimension of one or more views of equal shape; each view is a side.

    strides: bytes from one index to the next, for each side. indices: for each side the index that stands at each
    position, shape (size,), or None where it is the position itself.
    """

    size: int
    strides: tuple[int, ...]
    indices: tuple[IntArray | None, ...]

    @property
    def gathered(self) -> bool:
        return any(i is not None for i in self.indices)

    def offsets(self, side: int) -> IntArray:
        positions = self.indices[side]
        if positions is None:
            positions = np.arange(self.size, dtype=np.int64)
        return positions * self.strides[side]


def common_runs(axes: Sequence[Axis], itemsize: int, num_sides: int) -> tuple[list[IntArray], IntArray]:
    """Runs that are contiguous on every side, in C order of the axes, none adjacent to the next one on all sides.

    Returns offsets for each side, counted from the element at position (0, ..., 0) were no axis gathered, and
    lengths; all int64 of shape (n,), in bytes. The work is one pass over the runs of the innermost axis.

    Raises:
        InputError: there would be more than `MAX_RUNS`.
    """
    if any(axis.size == 0 for axis in axes):
        return [np.empty(0, dtype=np.int64) for _ in range(num_sides)], np.empty(0, dtype=np.int64)
    outer, length = _peel(_collapse(axes), itemsize)
    num_runs = 1
    for axis in outer:
        num_runs *= axis.size
    if num_runs > MAX_RUNS:
        raise InputError(
            "a view has too many separate runs of bytes",
            expected=f"at most {MAX_RUNS} runs of {length} bytes before adjacent ones are merged",
            found=f"{num_runs}",
            fix="take several smaller views, or lay the tensor out with its innermost dimension contiguous",
        )
    offsets = []
    for side in range(num_sides):
        sums = np.zeros(1, dtype=np.int64)
        for axis in outer:
            sums = np.add.outer(sums, axis.offsets(side)).reshape(-1)
        offsets.append(sums)
    return _merge(offsets, length)


def _collapse(axes: Sequence[Axis]) -> list[Axis]:
    """Joins neighbours that one longer axis describes on every side."""
    done: list[Axis] = []
    for axis in axes:
        if axis.size == 1 and not axis.gathered:
            continue
        before = done[-1] if done else None
        if (
            before is not None
            and not before.gathered
            and not axis.gathered
            and all(b == s * axis.size for b, s in zip(before.strides, axis.strides, strict=True))
        ):
            done[-1] = Axis(size=before.size * axis.size, strides=axis.strides, indices=axis.indices)
        else:
            done.append(axis)
    return done


def _peel(axes: list[Axis], itemsize: int) -> tuple[list[Axis], int]:
    """The outer axes and the bytes of one run: the innermost axis, if it is contiguous on every side."""
    if axes and not axes[-1].gathered and all(stride == itemsize for stride in axes[-1].strides):
        return axes[:-1], axes[-1].size * itemsize
    return axes, itemsize


def _merge(offsets: list[IntArray], length: int) -> tuple[list[IntArray], IntArray]:
    """Joins runs of equal length with the next one where all sides go on without a gap."""
    num_runs = offsets[0].size
    starts = np.ones(num_runs, dtype=np.bool_)
    if num_runs > 1:
        adjacent = offsets[0][1:] - offsets[0][:-1] == length
        for side in offsets[1:]:
            adjacent &= side[1:] - side[:-1] == length
        np.logical_not(adjacent, out=starts[1:])
    if starts.all():
        return offsets, np.full(num_runs, length, dtype=np.int64)
    first = np.flatnonzero(starts)
    return [side[first] for side in offsets], np.diff(first, append=num_runs) * length
