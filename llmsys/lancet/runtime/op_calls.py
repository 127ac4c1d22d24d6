"""The calls that an op of a captured step, or a part of it, makes: with what they are measured, and under which key."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from llmsys.lancet.graph import Split, dimension_of, is_irregular
from llmsys.lancet.passes.calls import operands, outputs_of
from llmsys.lancet.passes.capture import Captured
from llmsys.lancet.passes.pieces import cut_in
from llmsys.lancet.runtime import irregular
from llmsys.lancet.runtime.profiler import Bench, Operand, Prepared, Values

_HOT_OPS = 12  # what the last operations made is taken to be in the cache
_SIZES_FIRST = ("aten.slice_backward.default", "aten.select_backward.default")  # whose second argument is a shape


class OpCall:
    """One op of the step, or the largest of ``num_parts`` equal parts of it under ``split``.

    Contents are random; indices are in range, and choices of gates have slots of their own. Parts along an irregular
    axis have their share of the capacity: all slots are taken to be filled.
    """

    def __init__(self, captured: Captured, index: int, split: Split | None = None, num_parts: int = 1) -> None:
        self._captured = captured
        self._index = index
        self._op = captured.graph.ops[index]
        self._node = captured.nodes[index].node
        self._split = split
        self._num_parts = num_parts
        values = _VALUES.get(self._op.target, _nothing_special)(self._node)
        self._operands = [self._operand(place, values) for place in range(len(operands(self._node)))]

    def time_ms(self, bench: Bench) -> float:
        return bench.time_ms(self.key(), lambda: self._prepared(bench.device))

    def key(self) -> str:
        args, kwargs = _filled(self._arguments(), iter(map(_Shown, self._operands)))
        kind = " irregular" if self._irregular_kind() else ""
        return f"{self._op.target}{kind} {args} {kwargs}"

    def _operand(self, place: int, values: Mapping[int, tuple[Values, tuple[int, ...]]]) -> Operand | int:
        node = operands(self._node)[place]
        value = outputs_of(node)[0]
        if not isinstance(value, torch.Tensor):
            return int(value)
        name = self._captured.names[node]
        what, limits = values.get(place, ("any", ()))
        made_by = self._captured.graph.producers.get(name, -math.inf)
        operand = Operand(
            shape=tuple(int(n) for n in value.shape),
            stride=tuple(int(n) for n in value.stride()),
            dtype=value.dtype,
            values=what,
            limits=limits,
            is_hot=self._index - made_by <= _HOT_OPS,
        )
        axis = self._split.inputs[place] if self._split is not None else -1
        return self._part_of(operand, name, axis)

    def _part_of(self, operand: Operand, name: str, axis: int) -> Operand:
        if axis < 0 and not is_irregular(axis):
            return operand
        dim = dimension_of(axis)
        return operand.resized(dim, self._part_length(name, axis))

    def _part_length(self, name: str, axis: int) -> int:
        cut = cut_in(self._captured, name, dimension_of(axis))
        return cut.outer * -(-cut.size // self._num_parts) * cut.inner

    def _irregular_kind(self) -> str:
        """Whether the part runs as a function of `irregular`."""
        if self._split is None or self._op.target not in _IRREGULAR:
            return ""
        return _IRREGULAR[self._op.target]

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = self._node.args, dict(self._node.kwargs)
        axis = self._split.outputs[0] if self._split is not None else -1
        if self._op.target in _SIZES_FIRST and axis >= 0:
            sizes = list(self._op.outputs[0].shape)
            sizes[axis] = self._part_length(self._op.outputs[0].name, axis)
            args = (args[0], sizes, *args[2:])
        return args, kwargs

    def function(self, device: torch.device) -> Callable[[], object]:
        """The call, with inputs made on ``device``."""
        return self._function([o.make(device) if isinstance(o, Operand) else o for o in self._operands])

    def _prepared(self, device: torch.device) -> Prepared:
        made = [o.make(device) if isinstance(o, Operand) else o for o in self._operands]
        hot = tuple(
            t
            for t, o in zip(made, self._operands, strict=True)
            if isinstance(t, torch.Tensor) and isinstance(o, Operand) and o.is_hot
        )
        return Prepared(run=self._function(made), hot=hot)

    def _function(self, made: list[Any]) -> Callable[[], object]:
        kind = self._irregular_kind()
        if kind == "dispatch":
            x, chosen, chosen_slots = made
            num_experts = int(self._node.args[3])  # type: ignore[arg-type]
            return lambda: irregular.dispatch(x, chosen, chosen_slots, num_experts)
        if kind == "combine":
            buffer, weights, experts, slots = made
            rows_in = buffer.new_zeros(len(experts), 1)
            _, rows = irregular.dispatch(rows_in, experts, slots, len(buffer))
            buffer = buffer.new_ones(len(buffer), rows.capacity, buffer.shape[2])
            return lambda: irregular.combine(buffer, weights, experts, slots, rows)
        args, kwargs = _filled(self._arguments(), iter(made))
        target = self._node.target
        assert callable(target)
        return lambda: target(*args, **kwargs)


class _Shown:
    """Prints as the operand does."""

    def __init__(self, operand: Operand | int) -> None:
        self._operand = operand

    def __repr__(self) -> str:
        return str(self._operand)


def _filled(value: Any, operands: Iterator[Any]) -> Any:
    """The arguments of a node with the next operand in place of each node."""
    if isinstance(value, fx.Node):
        return next(operands)
    if isinstance(value, dict):
        return {key: _filled(inner, operands) for key, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(_filled(inner, operands) for inner in value)
    if isinstance(value, list):
        return [_filled(inner, operands) for inner in value]
    return value


_IRREGULAR = {"llmsys.moe_dispatch.default": "dispatch", "llmsys.moe_combine.default": "combine"}

_Found = Mapping[int, tuple[Values, tuple[int, ...]]]


def _nothing_special(node: fx.Node) -> _Found:
    return {}


def _shape(node: fx.Node, place: int) -> tuple[int, ...]:
    return tuple(int(n) for n in outputs_of(operands(node)[place])[0].shape)


def _below_first(dim: int, place: int) -> Callable[[fx.Node], _Found]:
    """Indices at operand ``place`` into dimension ``dim`` of the first operand."""
    return lambda node: {place: ("below", (_shape(node, 0)[dim],))}


def _below_given_dim(node: fx.Node) -> _Found:
    """Indices at the second operand into the dimension that the second argument names."""
    assert isinstance(node.args[1], int)
    return {1: ("below", (_shape(node, 0)[node.args[1]],))}


def _embedding_backward(node: fx.Node) -> _Found:
    assert isinstance(node.args[2], int)
    return {1: ("below", (node.args[2],))}


def _of_choices(first: int, experts: int, capacity: int | None = None) -> Callable[[fx.Node], _Found]:
    """Choices at operands ``first`` and ``first`` + 1. ``experts``, ``capacity``: places of these in the arguments; a
    buffer at operand ``experts`` has both where there is no ``capacity``."""

    def values(node: fx.Node) -> _Found:
        if capacity is None:
            limits = _shape(node, experts)[:2]
        else:
            limits = (int(node.args[experts]), int(node.args[capacity]))  # type: ignore[arg-type]
        return {first: ("experts", limits), first + 1: ("slots", limits)}

    return values


_VALUES: dict[str, Callable[[fx.Node], _Found]] = {
    "aten.embedding.default": _below_first(0, 1),
    "aten.embedding_dense_backward.default": _embedding_backward,
    "aten.nll_loss_forward.default": _below_first(1, 1),
    "aten.nll_loss_backward.default": lambda node: {2: ("below", (_shape(node, 1)[1],))},
    "aten.gather.default": _below_given_dim,
    "aten.index_select.default": _below_given_dim,
    "aten.scatter.src": _below_given_dim,
    "aten.scatter.value": _below_given_dim,
    "aten.scatter_add.default": _below_given_dim,
    "llmsys.moe_dispatch.default": _of_choices(1, 3, 4),
    "llmsys.moe_combine.default": _of_choices(2, 0),
    "llmsys.moe_gather.default": _of_choices(1, 0),
    "llmsys.moe_combine_buffer_grad.default": _of_choices(2, 4, 5),
    "llmsys.moe_combine_weights_grad.default": _of_choices(2, 1),
}
