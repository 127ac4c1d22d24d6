"""Batches for a transport: which bytes of a remote tensor go to, or come from, which bytes of a local one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from llmsys.comm.registry.runs import Axis, IntArray, common_runs
from llmsys.comm.registry.view import Addressable, View, axes_of
from llmsys.comm.transports.base import Copies, Region, RemoteRegion
from llmsys.core.errors import InputError

Side = Literal["local", "remote"]
LocalView = View[Region | None]
RemoteView = View[RemoteRegion | None]
_LOCAL, _REMOTE = 0, 1


def copies(
    local: Addressable[Region | None], remote: Addressable[RemoteRegion | None], *, into: Side = "local"
) -> list[Copies]:
    """Entries that copy every element of one view to the same position of the other; for `Transport.read` or `write`.

    Each entry is contiguous on both sides and as long as it can be. Entries come in the order of the target's memory
    as far as strides tell it, and dimensions that both views permute in the same way cost nothing. A list of one
    `Copies`, or empty when the views have no elements.

    into: the side that is written: "local" for a read (pull), "remote" for a write (push).

    Raises:
        InputError: shapes, dtypes or names of dimensions differ; elements of the target overlap; too many runs.
    """
    local_view, remote_view = local.view(), remote.view()
    _check_pair(local_view, remote_view, into)
    return _grouped([(local_view, remote_view, _entries(local_view, remote_view, into))])


def block_copies(
    local: Sequence[Addressable[Region | None]],
    remote: Sequence[Addressable[RemoteRegion | None]],
    local_ids: ArrayLike,
    remote_ids: ArrayLike,
    *,
    dim: int | str = 0,
    into: Side = "local",
) -> list[Copies]:
    """Entries that copy between block `remote_ids[i]` of `remote[t]` and block `local_ids[i]` of `local[t]`, all i, t.

    local, remote: one tensor for each layer, or for each layer and K or V; the same ids hold for all of them.
    dim: the dimension whose indices are blocks, of any size on either side; the others must be equal.
    local_ids, remote_ids: integers of shape (n,); those of the target must differ from each other.

    Blocks that follow each other on both sides become one entry (KVDirect's coalescing: sort by block, break where
    either side jumps). Tensors of one layout share that work. One `Copies` for each pair of regions.

    Raises:
        InputError: as `copies`; not as many local as remote tensors or ids; an id out of bounds.
    """
    _check_counts(local, remote)
    done: dict[object, _Entries] = {}
    parts = []
    for one, other in zip(local, remote, strict=True):
        pair = one.view(), other.view()
        key = _layout(*pair)
        entries = done.get(key)
        if entries is None:
            chosen = _choose(*pair, local_ids, remote_ids, dim)
            _check_pair(*chosen, into)
            entries = _entries(*chosen, into)
            if not any(i is not None for view in pair for i in view.indices):
                done[key] = entries
        parts.append((*pair, entries))
    return _grouped(parts)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Entries:
    """Entries relative to the first element of each view, so that they hold for every tensor of the layout."""

    local: IntArray
    remote: IntArray
    lengths: IntArray


def _layout(*views: View[Any]) -> object:
    return tuple((view.shape, view.strides_bytes, view.dtype, view.dims) for view in views)


def _choose(
    local: LocalView, remote: RemoteView, local_ids: ArrayLike, remote_ids: ArrayLike, dim: int | str
) -> tuple[LocalView, RemoteView]:
    sizes = np.shape(local_ids), np.shape(remote_ids)
    if sizes[0] != sizes[1]:
        raise InputError(
            "blocks are copied in pairs",
            expected="as many remote_ids as local_ids",
            found=f"shapes {sizes[0]} and {sizes[1]}",
            fix="give one remote block for each local block",
        )
    return local.blocks(dim, local_ids), remote.blocks(dim, remote_ids)


def _check_counts(local: Sequence[object], remote: Sequence[object]) -> None:
    if len(local) != len(remote):
        raise InputError(
            "blocks are copied between tensors in pairs",
            expected=f"a remote tensor for each of the {len(local)} local ones",
            found=f"{len(remote)} remote tensors",
            fix="give the same layers on both sides, in the same order",
        )


def _check_pair(local: LocalView, remote: RemoteView, into: Side) -> None:
    _check_equal("dtypes", local, local.dtype, remote, remote.dtype)
    _check_equal("shapes", local, local.shape, remote, remote.shape)
    if local.dims and remote.dims:
        _check_equal("dimensions", local, local.dims, remote, remote.dims)
    if into not in ("local", "remote"):
        raise InputError(
            "a copy has no target",
            expected="into: 'local' for a read or 'remote' for a write",
            found=f"{into!r}",
            fix="set into to the side that is written",
        )
    target: View[Any] = local if into == "local" else remote
    if target.overlaps_itself():
        raise InputError(
            f"elements of the {into} tensor {target.name!r} overlap, so copying into it has no defined result",
            expected="a target whose elements, and blocks, are all different",
            found=f"shape {target.shape}, strides_bytes {target.strides_bytes}, or an index that comes twice",
            fix="copy into a tensor that is not expanded, and name each target block once",
        )


def _check_equal(what: str, local: LocalView, ours: object, remote: RemoteView, theirs: object) -> None:
    if ours != theirs:
        raise InputError(
            f"{what} of local tensor {local.name!r} and remote tensor {remote.name!r} differ",
            expected=f"{ours} on both sides",
            found=f"{ours} here and {theirs} there",
            fix="copy views of equal shape, dtype and order of dimensions (see slice, blocks and permute)",
        )


def _entries(local: LocalView, remote: RemoteView, into: Side) -> _Entries:
    target = _LOCAL if into == "local" else _REMOTE
    axes = sorted(axes_of(local, remote), key=lambda axis: -abs(axis.strides[target]))
    flips = [0, 0]
    ordered = []
    for axis in axes:
        if axis.gathered:
            axis = _sorted_by(axis, target)
        elif all(stride < 0 for stride in axis.strides):
            # Backwards on both sides is forwards on both, where runs can be longer than one element.
            flips = [f + s * (axis.size - 1) for f, s in zip(flips, axis.strides, strict=True)]
            axis = Axis(size=axis.size, strides=(-axis.strides[0], -axis.strides[1]), indices=axis.indices)
        ordered.append(axis)
    sides, lengths = common_runs(ordered, local.itemsize, 2)
    return _Entries(local=sides[_LOCAL] + flips[_LOCAL], remote=sides[_REMOTE] + flips[_REMOTE], lengths=lengths)


def _sorted_by(axis: Axis, target: int) -> Axis:
    """The same pairs of indices, those of the target ascending."""
    indices = axis.indices[target]
    if indices is None or bool((indices[1:] > indices[:-1]).all()):
        return axis
    order = np.argsort(indices)
    return Axis(
        size=axis.size,
        strides=axis.strides,
        indices=tuple(order if i is None else i[order] for i in axis.indices),
    )


def _grouped(parts: list[tuple[LocalView, RemoteView, _Entries]]) -> list[Copies]:
    """One `Copies` for each pair of regions, in order of first use."""
    groups: dict[tuple[int, int], tuple[Region, RemoteRegion, list[_Entries]]] = {}
    for local, remote, entries in parts:
        if entries.lengths.size == 0:
            continue
        ours, theirs = local.region, remote.region
        if ours is None or theirs is None:
            raise _no_memory(remote if theirs is None else local)
        _, _, group = groups.setdefault((ours.region_id, theirs.remote_id), (ours, theirs, []))
        group.append(
            _Entries(
                local=entries.local + local.offset_bytes,
                remote=entries.remote + remote.offset_bytes,
                lengths=entries.lengths,
            )
        )
    return [
        Copies(
            local=ours,
            remote=theirs,
            local_offsets=np.concatenate([entries.local for entries in group]),
            remote_offsets=np.concatenate([entries.remote for entries in group]),
            lengths=np.concatenate([entries.lengths for entries in group]),
        )
        for ours, theirs, group in groups.values()
    ]


def _no_memory(view: View[Any]) -> InputError:
    return InputError(
        f"the view of tensor {view.name!r} has no region at hand",
        expected="views of registry[name] and remote[name]",
        found="a view of a bare descriptor",
        fix="take the tensor from its registry, which knows the region",
    )
