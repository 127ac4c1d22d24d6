"""What planners and the simulator ask about costs, and the simplest answer: a table of given times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from llmsys.core.errors import InputError
from llmsys.lancet.graph import Graph, Op, Split, Tensor


class CostModel(Protocol):
    """Times of one device in ms; equal questions get equal answers.

    ``op_ms``: of the whole op, or with ``num_parts`` > 1 of ONE of that many equal parts under ``split``, which is one
    of ``op.splits``. Of a communication op, the time on its lane. A view costs 0. ``graph`` holds the op's tensors.
    ``slice_ms``, ``join_ms``: of cutting a tensor into parts along dimension ``axis``, or an irregular axis of it, and
    of putting parts together: all parts at once. ``name`` says where the numbers are from.
    """

    @property
    def name(self) -> str: ...

    def op_ms(self, graph: Graph, op: Op, num_parts: int = 1, split: Split | None = None) -> float: ...

    def slice_ms(self, tensor: Tensor, axis: int, num_parts: int) -> float: ...

    def join_ms(self, tensor: Tensor, axis: int, num_parts: int) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TableCosts:
    """Given times, for tests and for times that were measured op by op.

    ``ops_ms``: of whole ops by name. A part of k costs ``parts_ms[name, k]`` if given, else the whole divided by k plus
    ``part_overhead_ms``. ``copies_ms``: of slicing or joining a tensor by name, 0 for others, whatever the number of
    parts. InputError for an op without a time; views need none.
    """

    ops_ms: Mapping[str, float]
    parts_ms: Mapping[tuple[str, int], float] = field(default_factory=dict)
    copies_ms: Mapping[str, float] = field(default_factory=dict)
    part_overhead_ms: float = 0.0
    name: str = "table"

    def op_ms(self, graph: Graph, op: Op, num_parts: int = 1, split: Split | None = None) -> float:
        if op.is_view:
            return 0.0
        if num_parts > 1 and (op.name, num_parts) in self.parts_ms:
            return self.parts_ms[op.name, num_parts]
        if op.name not in self.ops_ms:
            raise InputError(
                f"costs {self.name!r} have no time of op {op.name!r} of graph {graph.name!r}",
                expected="a time in ops_ms for every op that is no view",
                found=f"{len(self.ops_ms)} times",
                fix=f"add ops_ms[{op.name!r}]",
            )
        whole_ms = self.ops_ms[op.name]
        return whole_ms if num_parts == 1 else whole_ms / num_parts + self.part_overhead_ms

    def slice_ms(self, tensor: Tensor, axis: int, num_parts: int) -> float:
        return self.copies_ms.get(tensor.name, 0.0)

    def join_ms(self, tensor: Tensor, axis: int, num_parts: int) -> float:
        return self.copies_ms.get(tensor.name, 0.0)
