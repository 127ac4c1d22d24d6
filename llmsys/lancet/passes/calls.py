"""One operator call of an FX graph, as the rules of splits see it: shapes, and where the tensors stand in it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llmsys.lancet.graph import REPLICATED, Split

Shape = tuple[int, ...]


def operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes among the arguments, in their order, as often as they are used."""
    found: list[fx.Node] = []

    def visit(used: fx.Node) -> fx.Node:
        found.append(used)
        return used

    fx.map_arg((node.args, node.kwargs), visit)
    return tuple(found)


def outputs_of(node: fx.Node) -> tuple[Any, ...]:
    """The values that a node makes, as tracing saw them: several for an operator of several results."""
    value = node.meta.get("val")
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def is_getitem(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def place_of(getitem: fx.Node) -> int:
    """Which result a getitem takes."""
    place = getitem.args[1]
    assert isinstance(place, int)
    return place


def has_symbols(value: object) -> bool:
    """Whether a value of tracing is, or has a size or stride that is, known only at run time."""
    if isinstance(value, torch.Tensor):
        return any(isinstance(n, torch.SymInt) for n in (*value.shape, *value.stride()))
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """``inputs``: shapes of `operands`; ``outputs``: of all results, in the order of the schema, () for no tensor."""

    node: fx.Node
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]

    @classmethod
    def of(cls, node: fx.Node) -> Call:
        return cls(
            node=node,
            inputs=tuple(_shape(outputs_of(n)[0]) for n in operands(node)),
            outputs=tuple(_shape(value) for value in outputs_of(node)),
        )

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """The argument at ``place`` of the schema, however it was passed."""
        return self.node.args[place] if place < len(self.node.args) else self.node.kwargs.get(name, default)

    def split(self, inputs: dict[int, int], outputs: Sequence[int]) -> Split:
        """A split in which inputs that are not named are used whole."""
        axes = tuple(inputs.get(place, REPLICATED) for place in range(len(self.inputs)))
        return Split(inputs=axes, outputs=tuple(outputs))


Rule = Callable[[Call], Iterator[Split]]


def _shape(value: Any) -> Shape:
    return tuple(int(n) for n in value.shape) if isinstance(value, torch.Tensor) else ()
