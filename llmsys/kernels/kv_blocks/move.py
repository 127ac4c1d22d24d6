"""The one kernel behind all moves, and how tensors are described to it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Literal

import torch
import triton
import triton.language as tl

from llmsys.core.errors import InputError

Implementation = Literal["auto", "torch", "triton"]

_UNITS = (torch.int64, torch.int32, torch.int16, torch.int8)
_TILE = 2048  # units that one program moves
_MAX_COLS = 1024


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _move_kernel(  # type: ignore[no-untyped-def]
    source,
    destination,
    source_index,
    destination_index,
    num_rows,
    num_cols,
    size0,
    size1,
    size2,
    source_group,
    source_high,
    source_low,
    source0,
    source1,
    source2,
    source_col,
    destination_group,
    destination_high,
    destination_low,
    destination0,
    destination1,
    destination2,
    destination_col,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """Copy boxes of size0 x size1 x size2 x num_cols units, one for each entry of the indices, by tiles ROWS x COLS.

    A row is (entry, index0, index1, index2). An entry of index i lies at i // group * high + i % group * low; without
    an index, i is the entry itself.
    """
    # 64 bits from the start: a product of two 32-bit values would wrap in caches of more than 2^31 units.
    tile = tl.program_id(0).to(tl.int64)
    col_tiles = (num_cols + COLS - 1) // COLS
    row = tile // col_tiles * ROWS + tl.arange(0, ROWS)
    col = tile % col_tiles * COLS + tl.arange(0, COLS)
    live = row < num_rows
    index2 = row % size2
    index1 = row // size2 % size1
    index0 = row // size2 // size1 % size0
    entry = row // size2 // size1 // size0
    if source_index is None:
        read = entry
    else:
        read = tl.load(source_index + entry, mask=live, other=0)
    if destination_index is None:
        write = entry
    else:
        write = tl.load(destination_index + entry, mask=live, other=0)
    read = read // source_group * source_high + read % source_group * source_low
    read += index0 * source0 + index1 * source1 + index2 * source2
    write = write // destination_group * destination_high + write % destination_group * destination_low
    write += index0 * destination0 + index1 * destination1 + index2 * destination2
    mask = live[:, None] & (col < num_cols)[None, :]
    units = tl.load(source + read[:, None] + (col * source_col)[None, :], mask=mask)
    tl.store(destination + write[:, None] + (col * destination_col)[None, :], units, mask=mask)


# Decided by triton when the decorator ran, so later changes of TRITON_INTERPRET do not count.
_INTERPRETED = not isinstance(_move_kernel, triton.JITFunction)


def use_triton(implementation: Implementation, tensor: torch.Tensor) -> bool:
    able = tensor.is_cuda or _INTERPRETED
    if implementation not in ("auto", "torch", "triton"):
        raise InputError(
            "no such implementation",
            expected="'auto', 'torch' or 'triton'",
            found=repr(implementation),
            fix="set implementation",
        )
    if implementation == "triton" and not able:
        raise InputError(
            "Triton cannot run here",
            expected="CUDA tensors, or TRITON_INTERPRET=1 before this package is imported",
            found=f"tensors on {tensor.device}",
            fix="set implementation='auto', or the environment variable TRITON_INTERPRET=1",
        )
    return able and implementation != "torch"


def launch(
    source: torch.Tensor,
    destination: torch.Tensor,
    source_index: torch.Tensor | None,
    destination_index: torch.Tensor | None,
    *,
    whole_blocks: bool,
) -> None:
    """Entries of the indices are blocks or slots; an index of None counts the other side's entries from 0."""
    index = destination_index if source_index is None else source_index
    assert index is not None
    dims = (0, 2, 3, 4) if whole_blocks else (0, 3, 4)
    box = _collapsed([(destination.stride(d), source.stride(d), source.shape[d]) for d in dims])
    sizes = [size for _, _, size in box]
    num_rows, num_cols = len(index) * math.prod(sizes[:3]), sizes[3]
    if not num_rows * num_cols:
        return
    cols = min(_MAX_COLS, triton.next_power_of_2(num_cols))
    rows = _TILE // cols
    groups = [1 if whole_blocks else tensor.shape[2] for tensor in (source, destination)]
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(source.device) if source.is_cuda else nullcontext():
        _move_kernel[(triton.cdiv(num_rows, rows) * triton.cdiv(num_cols, cols),)](
            source,
            destination,
            source_index,
            destination_index,
            num_rows,
            num_cols,
            *sizes[:3],
            *(groups[0], source.stride(1), source.stride(2), *(stride for _, stride, _ in box)),
            *(groups[1], destination.stride(1), destination.stride(2), *(stride for stride, _, _ in box)),
            ROWS=rows,
            COLS=cols,
        )


def _collapsed(dims: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Four dimensions (destination stride, source stride, size) from outermost to innermost at the destination.

    Neighbours that are one run on both sides become one dimension; the list is filled up in front with size 1.
    """
    merged: list[tuple[int, int, int]] = []
    for theirs, ours, size in sorted((dim for dim in dims if dim[2] != 1), reverse=True):
        if merged and merged[-1][:2] == (theirs * size, ours * size):
            size *= merged.pop()[2]
        merged.append((theirs, ours, size))
    return [(0, 0, 1)] * (4 - len(merged)) + merged


def as_units(source: torch.Tensor, destination: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as integers of the greatest width that divides every address in them."""
    for unit in _UNITS:
        if all(_holds_units(tensor, unit.itemsize) for tensor in (source, destination)):
            break
    return source.detach().view(unit), destination.detach().view(unit)


def _holds_units(tensor: torch.Tensor, width: int) -> bool:
    itemsize = tensor.dtype.itemsize
    if width <= itemsize:
        return width == itemsize
    *outer, last = tensor.stride()
    places = [tensor.shape[-1], tensor.storage_offset(), *outer]
    return last == 1 and tensor.data_ptr() % width == 0 and all(place * itemsize % width == 0 for place in places)


def block_first(tensor: torch.Tensor) -> list[int]:
    """Dimensions with the block first, and then as they lie in memory."""
    strides = tensor.stride()
    return [1, *sorted((0, 2, 3, 4), key=lambda dim: -strides[dim])]
