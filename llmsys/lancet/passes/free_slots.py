"""Free slots of an expert's buffer: what an uncut run computes in them, and a run in parts does not.

Slots that no token fills are zero when a buffer is dispatched. A bias, or any function that is not zero at zero, then
computes something in them. A part has filled rows only, and joining parts puts zeros in free slots. Most uses do not
mind: combine does not read free slots, and their gradients are zero. Others would: a loss of the whole buffer, or a
division, where zero by zero makes a gradient NaN. Operators whose results are used so are not cut by filled rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from llmsys.lancet.graph import Op, is_irregular
from llmsys.lancet.passes.layout import Layout
from llmsys.lancet.passes.rules import SQUEEZES, VIEWS_BY_SIZE

_MAKERS = ("llmsys.moe_dispatch.default", "llmsys.moe_combine_buffer_grad.default")
_READERS = ("llmsys.moe_combine.default", "llmsys.moe_combine_weights_grad.default", "llmsys.moe_gather.default")
_MOVES = (
    *VIEWS_BY_SIZE,
    *SQUEEZES,
    *(f"aten.{name}" for name in ("permute.default", "transpose.int", "unsqueeze.default", "expand.default")),
    *(f"aten.{name}.default" for name in ("detach", "alias", "clone", "_to_copy", "split_with_sizes", "stack", "cat")),
    *(f"aten.{name}" for name in ("split.Tensor", "slice.Tensor", "select.int", "unbind.int", "chunk.default")),
    "aten.slice_backward.default",
    "aten.select_backward.default",
    "_c10d_functional.all_to_all_single.default",
)
_ZERO_AT_ZERO = frozenset(
    [
        "abs",
        "amax",
        "elu",
        "erf",
        "expm1",
        "gelu",
        "leaky_relu",
        "log1p",
        "mean",
        "neg",
        "relu",
        "sign",
        "silu",
        "sin",
        "sqrt",
        "square",
        "sum",
        "tanh",
    ]
)
_PRODUCTS = ("mul", "bmm", "mm")
_NOT_AT_ZERO = ("reciprocal", "rsqrt", "log", "log2", "log10", "remainder", "fmod", "floor_divide", "digamma", "lgamma")


@dataclass(frozen=True, slots=True)
class _State:
    """Of a tensor with free slots: zero in them in every run, or with another content by the ops ``sources``."""

    sources: frozenset[int] = frozenset()

    @property
    def is_zero(self) -> bool:
        return not self.sources


def keep_safe_splits(
    ops: Sequence[Op], nodes: Sequence[fx.Node], layouts: Mapping[str, Layout], results: Collection[str]
) -> list[Op]:
    """The ops, of which those that bring something into free slots that is used as a whole lose irregular splits.

    ``nodes``: of each op. ``results``: the tensors that the step returns to its caller.
    """
    kept = list(ops)
    while unsafe := _unsafe_sources(kept, nodes, layouts, results):
        for index in unsafe:
            splits = (s for s in kept[index].splits if not any(map(is_irregular, s.outputs)))
            kept[index] = replace(kept[index], splits=tuple(splits))
    return kept


def _unsafe_sources(
    ops: Sequence[Op], nodes: Sequence[fx.Node], layouts: Mapping[str, Layout], results: Collection[str]
) -> set[int]:
    states: dict[str, _State] = {}
    unsafe: set[int] = set()
    for index, (op, node) in enumerate(zip(ops, nodes, strict=True)):
        inputs = [states.get(name) for name in op.inputs]
        if not any(inputs) and op.target not in _MAKERS:
            continue
        made = _made(index, op, node, inputs)
        if made is None:
            unsafe.update(*(state.sources for state in inputs if state is not None))
        elif isinstance(made, _State):
            # Gradients of buffers have no layout; weight gradients, taken for such, do no harm.
            has_slots = (layouts.get(tensor.name) or op.phase == "backward" for tensor in op.outputs)
            states.update({tensor.name: made for tensor, has in zip(op.outputs, has_slots, strict=True) if has})
    for name in results:
        if name in states:
            unsafe.update(states[name].sources)
    return unsafe


def _made(index: int, op: Op, node: fx.Node, inputs: Sequence[_State | None]) -> _State | str | None:
    """The state of the results; "none" if they have no free slots; None if they depend on what free slots hold."""
    if op.target in _MAKERS:
        return _State()
    if op.target in _READERS:
        return "none"
    if _stays_zero(op, node, inputs):
        return _State()
    mixed = frozenset().union(*(state.sources for state in inputs if state is not None))
    if mixed and op.target in _MOVES:
        return _State(mixed)
    if not any(is_irregular(axis) for split in op.splits for axis in split.outputs):
        return None if mixed else "none"
    if mixed and _fails_at_zero(op, node, inputs):
        return None
    return _State(mixed or frozenset((index,)))


def _stays_zero(op: Op, node: fx.Node, inputs: Sequence[_State | None]) -> bool:
    zeros = [state is not None and state.is_zero for state in inputs]
    name = _name(op)
    if name.endswith("_backward") and op.target not in _MOVES:
        return zeros[0]  # linear in the gradient
    if name in _PRODUCTS:
        return any(zeros)
    if name == "div":
        return zeros[0] and not any(state is not None and state.sources for state in inputs[1:])
    if name in ("add", "sub"):
        return all(zeros) and len(zeros) == 2
    if name == "pow":
        return all(zeros) and _exponent(node) > 0
    return all(zeros) and (op.target in _MOVES or name in _ZERO_AT_ZERO)


def _fails_at_zero(op: Op, node: fx.Node, inputs: Sequence[_State | None]) -> bool:
    """Whether the op may not be finite where its inputs are the zeros that a join leaves."""
    name = _name(op)
    if name == "div":
        return any(state is not None and state.sources for state in inputs[1:])
    return name in _NOT_AT_ZERO or (name == "pow" and _exponent(node) < 0)


def _exponent(node: fx.Node) -> float:
    exponent = node.args[1]
    return float(exponent) if isinstance(exponent, int | float) else -1.0


def _name(op: Op) -> str:
    parts = op.target.split(".")
    return parts[1] if len(parts) > 1 else op.target
