"""Views of registered tensors: which bytes of a region hold which elements. Arithmetic only, no memory is touched."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from llmsys.comm.registry.runs import Axis, IntArray, Runs, common_runs
from llmsys.comm.transports.base import Region, RemoteRegion
from llmsys.core.errors import InputError

R_co = TypeVar("R_co", bound=Region | RemoteRegion | None, covariant=True)

_GATHER_SORT_RATIO = 16  # below this share of an axis, sorting its indices is cheaper than marking them


class Addressable(ABC, Generic[R_co]):
    """Something whose elements are addressed like a tensor's: a tensor descriptor, a tensor at hand, or a view.

    A `dim` is a number, negative from the end, or one of the names given when the tensor was registered.
    All operations give views of the same memory and cost nothing; an index out of bounds is an `InputError`.
    """

    __slots__ = ()

    @abstractmethod
    def view(self) -> View[R_co]:
        """All elements."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.view().shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements, like a contiguous copy; an expanded tensor occupies less."""
        return self.num_elements * self.view().itemsize

    def slice(self, dim: int | str, start: int, stop: int) -> View[R_co]:
        """Indices start, ..., stop - 1 of one dimension: a range of heads, say. 0 <= start <= stop <= size."""
        view = self.view()
        axis = view.axis(dim)
        size = view.shape[axis]
        if not 0 <= start <= stop <= size:
            raise _out_of_bounds(view, axis, f"slice {start}:{stop}", f"0 <= start <= stop <= {size}")
        indices = view.indices[axis]
        if indices is not None:
            return view.with_axis(axis, size=stop - start, indices=indices[start:stop])
        # An empty slice keeps its offset, so that one at the end of a region does not point behind it.
        moved = start * view.strides_bytes[axis] if stop > start else 0
        return view.with_axis(axis, size=stop - start, moved_bytes=moved)

    def block(self, dim: int | str, index: int) -> View[R_co]:
        """One index of one dimension, which the view then lacks: one KV block, or one layer."""
        view = self.view()
        axis = view.axis(dim)
        if not 0 <= index < view.shape[axis]:
            raise _out_of_bounds(view, axis, f"index {index}", f"0 <= index < {view.shape[axis]}")
        indices = view.indices[axis]
        position = index if indices is None else int(indices[index])
        moved = view.with_axis(axis, size=1, moved_bytes=position * view.strides_bytes[axis])
        kept = [a for a in range(len(view.shape)) if a != axis]
        return moved.with_order(kept)

    def blocks(self, dim: int | str, indices: ArrayLike) -> View[R_co]:
        """The given indices of one dimension, shape (n,), in this order; an index may come twice."""
        view = self.view()
        axis = view.axis(dim)
        chosen = checked_indices(indices, view, axis)
        before = view.indices[axis]
        return view.with_axis(axis, size=chosen.size, indices=chosen if before is None else before[chosen])

    def permute(self, dims: Sequence[int | str]) -> View[R_co]:
        """The same elements with dimensions in the order of `dims`, which names each once."""
        view = self.view()
        order = [view.axis(dim) for dim in dims]
        if sorted(order) != list(range(len(view.shape))):
            raise InputError(
                f"a permutation of tensor {view.name!r} does not name each dimension once",
                expected=f"each of the {len(view.shape)} dimensions once",
                found=f"{list(dims)}",
                fix="list every dimension in its new place",
            )
        return view.with_order(order)

    def runs(self) -> Runs:
        """The bytes of all elements in C order, as maximal contiguous runs. Time and memory go with the runs.

        Raises:
            InputError: more than `runs.MAX_RUNS`.
        """
        view = self.view()
        (offsets,), lengths = common_runs(axes_of(view), view.itemsize, 1)
        return Runs(offsets=offsets + view.offset_bytes, lengths=lengths)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class View(Addressable[R_co]):
    """Elements of a tensor: `shape` of them, the first at `offset_bytes` of the region, `strides_bytes` apart.

    name, dtype: the tensor's. dims: names of the dimensions, or empty.
    indices: for each dimension None, or which index stands at each position, int64 of shape (size,); strides and
    offset then are those of index 0.
    region: the memory; None for a tensor without elements, and for a view of a bare descriptor.
    """

    name: str
    dtype: str
    itemsize: int
    offset_bytes: int
    shape: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    dims: tuple[str, ...]
    indices: tuple[IntArray | None, ...]
    region: R_co

    def view(self) -> View[R_co]:
        return self

    def axis(self, dim: int | str) -> int:
        """The number of a dimension, 0 <= number < len(shape)."""
        if isinstance(dim, str):
            if dim in self.dims:
                return self.dims.index(dim)
            found, expected = f"{dim!r}", f"one of {', '.join(self.dims)}" if self.dims else "a number: it has no names"
        else:
            if -len(self.shape) <= dim < len(self.shape):
                return dim % len(self.shape)
            found, expected = f"{dim}", f"{-len(self.shape)} <= dim < {len(self.shape)}" if self.shape else "none"
        raise InputError(
            f"tensor {self.name!r} of shape {self.shape} has no such dimension",
            expected=f"dim: {expected}",
            found=found,
            fix="give another dim, or name the dimensions with dims= where the tensor is registered",
        )

    def with_axis(self, axis: int, *, size: int, moved_bytes: int = 0, indices: IntArray | None = None) -> View[R_co]:
        return replace(
            self,
            offset_bytes=self.offset_bytes + moved_bytes,
            shape=(*self.shape[:axis], size, *self.shape[axis + 1 :]),
            indices=(*self.indices[:axis], indices, *self.indices[axis + 1 :]),
        )

    def with_order(self, order: Sequence[int]) -> View[R_co]:
        return replace(
            self,
            shape=tuple(self.shape[a] for a in order),
            strides_bytes=tuple(self.strides_bytes[a] for a in order),
            dims=tuple(self.dims[a] for a in order) if self.dims else (),
            indices=tuple(self.indices[a] for a in order),
        )

    def overlaps_itself(self) -> bool:
        """Whether two of its elements share a byte, so that it cannot be written to."""
        if self.num_elements < 2:
            return False
        reach = self.itemsize
        by_stride = sorted(range(len(self.shape)), key=lambda a: abs(self.strides_bytes[a]))
        for axis in by_stride:
            size, stride, indices = self.shape[axis], abs(self.strides_bytes[axis]), self.indices[axis]
            if size == 1:
                continue
            if indices is not None and not all_different(indices):
                return True
            if stride < reach:
                return stride == 0 or _runs_overlap(self.runs())
            span = size - 1 if indices is None else int(indices.max() - indices.min())
            reach += stride * span
        return False


def axes_of(*views: View[Any]) -> list[Axis]:
    """The dimensions of views of equal shape, side by side."""
    return [
        Axis(
            size=size,
            strides=tuple(view.strides_bytes[a] for view in views),
            indices=tuple(view.indices[a] for view in views),
        )
        for a, size in enumerate(views[0].shape)
    ]


def checked_indices(indices: ArrayLike, view: View[R_co], axis: int) -> IntArray:
    """A copy as int64 of shape (n,). Raises InputError: not that, or out of bounds."""
    given = np.asarray(indices)
    if given.size == 0 and given.ndim == 1:
        return np.empty(0, dtype=np.int64)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise InputError(
            f"the indices into tensor {view.name!r} are not a 1-d array of integers",
            expected="integers of shape (n,)",
            found=f"{given.dtype} of shape {given.shape}",
            fix="give a list or an int64 array",
        )
    size = view.shape[axis]
    if given.min() < 0 or given.max() >= size:
        first = int(np.flatnonzero((given < 0) | (given >= size))[0])
        raise _out_of_bounds(view, axis, f"index {given[first]} at position {first}", f"0 <= index < {size}")
    return given.astype(np.int64)


def all_different(indices: IntArray) -> bool:
    """Whether no value of a non-empty array comes twice."""
    low = indices.min()
    span = int(indices.max() - low) + 1
    if span > _GATHER_SORT_RATIO * indices.size:
        ordered = np.sort(indices)
        return bool((ordered[1:] != ordered[:-1]).all())
    seen = np.zeros(span, dtype=np.bool_)
    seen[indices - low] = True
    return int(np.count_nonzero(seen)) == indices.size


def _runs_overlap(runs: Runs) -> bool:
    order = np.argsort(runs.offsets, kind="stable")
    starts = runs.offsets[order]
    ends = starts + runs.lengths[order]
    return bool((starts[1:] < ends[:-1]).any())


def _out_of_bounds(view: View[R_co], axis: int, found: str, expected: str) -> InputError:
    label = f"{axis} ({view.dims[axis]})" if view.dims else f"{axis}"
    return InputError(
        f"{found} is out of bounds for dimension {label} of size {view.shape[axis]} of tensor {view.name!r}",
        expected=expected,
        found=found,
        fix=f"stay within the shape {view.shape}",
    )
