"""What cutting tensors into parts and joining them takes: copies, measured by size, and which cuts copy at all."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
import torch

from llmsys.lancet.costs import MessageTable
from llmsys.lancet.passes.calls import outputs_of
from llmsys.lancet.passes.capture import Captured
from llmsys.lancet.passes.pieces import cut_in
from llmsys.lancet.runtime import irregular
from llmsys.lancet.runtime.profiler import Bench, Prepared

_SIZES = tuple(1 << power for power in range(14, 26, 2))
_ROW_BYTES = 1024


def measure_copies(bench: Bench) -> Mapping[str, MessageTable]:
    """By the bytes of the whole, of two parts: "cat" of them, "slice" to contiguous parts of rows that alternate, "add"
    of two tensors, "rows" of an irregular join.
    """
    tables = {}
    for what, make in {"cat": _cat, "slice": _slice, "add": _add, "rows": _join_rows}.items():
        ms = [
            bench.time_ms(f"{what} {size} bytes", lambda make=make, size=size: make(size, bench.device))  # type: ignore[misc]
            for size in _SIZES
        ]
        rising = tuple(np.maximum.accumulate(ms).tolist())  # noise must not make a larger copy faster
        tables[what] = MessageTable(sizes_bytes=tuple(map(float, _SIZES)), ms=rising)
    return tables


def copied_slices(captured: Captured) -> frozenset[tuple[str, int]]:
    """The (tensor, axis) of which parts are copies, as `passes.pieces.slice_parts` makes them: the parts of a
    contiguous tensor are contiguous, and so are those of a dimension with the capacity inside an outer factor.
    """
    graph = captured.graph
    values = {name: outputs_of(node)[0] for node, name in captured.names.items()}
    wanted = {
        (name, axis)
        for op in graph.ops
        for split in op.splits
        for name, axis in zip(op.inputs, split.inputs, strict=True)
        if axis >= 0
    }
    return frozenset(where for where in wanted if _is_copied(captured, values[where[0]], *where))


def _is_copied(captured: Captured, value: object, name: str, axis: int) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    if cut_in(captured, name, axis).outer > 1:
        return True
    return bool(value.is_contiguous()) and prod(value.shape[:axis]) > 1


def _halves(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    rows = size // _ROW_BYTES // 2
    first, second = (torch.ones(rows, _ROW_BYTES // 4, device=device) for _ in range(2))
    return first, second


def _cat(size: int, device: torch.device) -> Prepared:
    parts = _halves(size, device)
    return Prepared(run=lambda: torch.cat(parts), hot=parts)


def _slice(size: int, device: torch.device) -> Prepared:
    whole = torch.ones(size // (2 * _ROW_BYTES), 2, _ROW_BYTES // 4, device=device)
    return Prepared(run=lambda: [whole[:, half : half + 1].contiguous() for half in range(2)], hot=(whole,))


def _add(size: int, device: torch.device) -> Prepared:
    first, second = (torch.ones(size // 4, device=device) for _ in range(2))
    return Prepared(run=lambda: first + second, hot=(first, second))


def _join_rows(size: int, device: torch.device) -> Prepared:
    """Two full parts of two experts."""
    rows = size // _ROW_BYTES // 2
    order = torch.arange(rows, device=device)[:, None]
    x = torch.ones(rows, _ROW_BYTES // 4, device=device)
    parts = [irregular.dispatch(x, order % 2, order // 2 + half * (rows // 2), 2) for half in range(2)]
    buffers, of_parts = [buffer for buffer, _ in parts], [rows_of for _, rows_of in parts]
    shape = (2, rows, _ROW_BYTES // 4)
    run = lambda: irregular.join(buffers, of_parts, rows, ("g", "e", "c"), shape=shape)  # noqa: E731
    return Prepared(run=run, hot=tuple(buffers))
