"""Cutting and joining tensors in an FX graph: which elements a part has, and the nodes that copy them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from llmsys.core.errors import PlanError
from llmsys.lancet.passes.capture import Captured
from llmsys.lancet.passes.layout import Cut, cut_of
from llmsys.lancet.plan import Region

_aten = torch.ops.aten


def cut_in(captured: Captured, tensor: str, axis: int) -> Cut:
    return cut_of(captured.graph.tensors[tensor].shape, captured.layouts.get(tensor, ()), axis)


def region_units(captured: Captured, number: int, region: Region) -> int:
    """The smallest size that the region cuts along a regular axis: all its cuts are at multiples of what it divides.

    Raises PlanError for more parts than units, and for a dimension that is no multiple of them.
    """
    cuts: dict[tuple[str, int], int] = {}
    for index, place in zip(region.ops, region.splits, strict=True):
        op = captured.graph.ops[index]
        split = op.splits[place]
        names = (*op.inputs, *(tensor.name for tensor in op.outputs))
        for name, axis in zip(names, (*split.inputs, *split.outputs), strict=True):
            if axis >= 0:
                cuts[name, axis] = cut_in(captured, name, axis).size
    units = min(cuts.values(), default=region.num_parts)
    uneven = next((where for where, size in cuts.items() if size % units), None)
    if uneven is not None or region.num_parts > units:
        found = f"{units} units" if uneven is None else f"{cuts[uneven]} of tensor {uneven[0]!r}, dimension {uneven[1]}"
        raise PlanError(
            f"region {number} cannot be cut in {region.num_parts} parts",
            expected=f"at most {units} parts, and every cut dimension a multiple of the smallest one, {units}",
            found=found,
            fix="plan with fewer parts (max_parts), or choose batch and capacity so that they divide",
        )
    return units


def part_bounds(cut: Cut, num_parts: int, units: int) -> list[int]:
    """Where the parts of ``cut.size`` elements begin, and the end of the last."""
    return [cut.size // units * (part * units // num_parts) for part in range(num_parts + 1)]


def part_length(cut: Cut, num_parts: int, units: int, part: int) -> int:
    """The size of the cut dimension in a part."""
    bounds = part_bounds(cut, num_parts, units)
    return cut.outer * (bounds[part + 1] - bounds[part]) * cut.inner


def slice_parts(
    graph: fx.Graph, whole: fx.Node, value: torch.Tensor, axis: int, cut: Cut, bounds: Sequence[int]
) -> list[fx.Node]:
    """The parts of ``whole``, which tracing saw as ``value``; views if they lie in one piece.

    Parts of a contiguous tensor are contiguous, copied where needed: some kernels (the backward of layer_norm on the
    CPU in torch 2.13) read tensors that tracing found contiguous without looking at strides.
    """
    shape = list(value.shape)
    if cut.outer == 1:
        parts = [graph.call_function(_aten.slice.Tensor, (whole, axis, b, e)) for b, e in pairwise(bounds)]
        if not value.is_contiguous():
            return parts
        return [graph.call_function(_aten.contiguous.default, (part,)) for part in parts]
    before, after = shape[:axis], shape[axis + 1 :]
    opened = graph.call_function(_aten.reshape.default, (whole, [*before, cut.outer, cut.size, cut.inner, *after]))
    parts = []
    for begin, end in pairwise(bounds):
        piece = graph.call_function(_aten.slice.Tensor, (opened, axis + 1, begin, end))
        length = cut.outer * (end - begin) * cut.inner
        parts.append(graph.call_function(_aten.reshape.default, (piece, [*before, length, *after])))
    return parts


def cat_parts(
    graph: fx.Graph, parts: Sequence[fx.Node], value: torch.Tensor, axis: int, cut: Cut, bounds: Sequence[int]
) -> fx.Node:
    """The whole of the parts, with the order of strides of ``value``, what tracing saw: later views rely on it."""
    shape = list(value.shape)
    if cut.outer == 1:
        order = stride_order(value)
        if order == sorted(order):
            return graph.call_function(_aten.cat.default, (list(parts), axis))
        moved = [graph.call_function(_aten.permute.default, (part, order)) for part in parts]
        whole = graph.call_function(_aten.cat.default, (moved, order.index(axis)))
        return graph.call_function(_aten.permute.default, (whole, inverse(order)))
    before, after = shape[:axis], shape[axis + 1 :]
    opened = [
        graph.call_function(_aten.reshape.default, (part, [*before, cut.outer, end - begin, cut.inner, *after]))
        for part, (begin, end) in zip(parts, pairwise(bounds), strict=True)
    ]
    whole = graph.call_function(_aten.cat.default, (opened, axis + 1))
    return with_strides(graph, graph.call_function(_aten.reshape.default, (whole, shape)), value)


def with_strides(graph: fx.Graph, node: fx.Node, value: torch.Tensor) -> fx.Node:
    """A contiguous tensor, copied to the order of strides of ``value`` if that is another."""
    order = stride_order(value)
    if order == sorted(order):
        return node
    moved = graph.call_function(_aten.permute.default, (node, order))
    copied = graph.call_function(_aten.clone.default, (moved,), {"memory_format": torch.contiguous_format})
    return graph.call_function(_aten.permute.default, (copied, inverse(order)))


def sum_parts(graph: fx.Graph, parts: Sequence[fx.Node]) -> fx.Node:
    whole = parts[0]
    for part in parts[1:]:
        whole = graph.call_function(_aten.add.Tensor, (whole, part))
    return whole


def stride_order(value: torch.Tensor) -> list[int]:
    """The dimensions from the outermost in memory to the innermost; those of size 1 stay where they are."""
    strides: list[Any] = list(value.stride())
    dims = [d for d in range(value.ndim) if value.shape[d] != 1]
    by_stride = iter(sorted(dims, key=lambda d: -strides[d]))
    return [next(by_stride) if value.shape[d] != 1 else d for d in range(value.ndim)]


def inverse(order: Sequence[int]) -> list[int]:
    return [order.index(d) for d in range(len(order))]
