"""Which ranges of a step run in parts: the dynamic program of the paper's partition pass.

Consecutive ops are put in groups. T(n), the least time of the first n groups, is the minimum over i < n and k of
T(i) + P(i, n, k), where P is the time of groups i to n in k parts: see `pipeline`. One part means that the ops run
whole, with communication started as early as their order allows and waited for before its first use. A range in parts
holds one or two all-to-alls, those of one MoE layer, so that there is at most one pipeline for each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import numpy as np

from llmsys import _C
from llmsys.core.errors import InputError
from llmsys.lancet.axes import Inference, infer_splits
from llmsys.lancet.config import AxisSolver, PlannerConfig
from llmsys.lancet.costs import CostModel
from llmsys.lancet.graph import Graph, Phase
from llmsys.lancet.plan import Region
from llmsys.lancet.regions import Prices, layout, span

MAX_ALL_TO_ALLS = 2
_MAX_NAMES = 6  # of ops in a note
_MAX_IMBALANCE = 1.05  # of the largest part to the mean; costs are those of equal parts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """Groups ``first`` to ``end``, exclusive, in ``num_parts`` parts by the splits of ``inference``."""

    first: int
    end: int
    num_parts: int
    cost_ms: float
    inference: Inference | None = None


def choose_regions(
    graph: Graph, costs: CostModel, config: PlannerConfig, *, phase: Phase = "forward"
) -> tuple[tuple[Region, ...], tuple[str, ...]]:
    """The regions of one phase that make it fastest, in its order, and notes about what could not be cut.

    Reads ``max_parts``, ``group_fraction``, ``axis_solver``, ``solver_limit`` and ``seed`` of ``config``. The same
    arguments give the same regions. InputError if ops of another phase lie between the first and last of ``phase``.
    """
    return _Search(graph, costs, config, phase).run()


def region_ms(graph: Graph, region: Region, costs: CostModel) -> float:
    """What the span of a region takes by itself, from idle lanes to the end of its last instruction."""
    found = layout(graph, *span(graph, region), dict(zip(region.ops, region.splits, strict=True)))
    return Prices(graph=graph, costs=costs).times_ms(found, [region.num_parts])[0]


def capacity_region(
    graph: Graph, first_a2a: int, second_a2a: int, degree: int, *, solver: AxisSolver = "propagate"
) -> Region | None:
    """Two all-to-alls and what is between them, in ``degree`` parts of the capacity, as Tutel does; in either phase.

    None where that cannot be cut, or not in so many parts. Weight gradients between the two become sums of parts'.
    """
    found = infer_splits(graph, first_a2a, second_a2a, solver=solver)
    if not found.ops or not 1 < degree <= found.units:
        return None
    return Region(num_parts=degree, ops=found.ops, splits=found.splits)


def group_bounds(graph: Graph, prices: Prices, first: int, last: int, group_fraction: float) -> list[int]:
    """Where groups begin, and ``last + 1``. Each all-to-all is a group by itself.

    Other groups are full with ``group_fraction`` of the time between MoE layers: the longest computation between the
    second all-to-all of a pair and the first of the next, or with one pair before or after it.
    """
    comm = [i for i in range(first, last + 1) if graph.ops[i].kind == "all_to_all"]
    whole_ms = [prices.op_ms(i) for i in range(first, last + 1)]
    edges = [first - 1, *comm, last + 1]
    between_ms = [sum(whole_ms[a + 1 - first : b - first]) for a, b in pairwise(edges)]
    limit_ms = group_fraction * max(between_ms[2:-1:2], default=max(between_ms[0], between_ms[-1]))
    bounds = [first]
    filled_ms = 0.0
    for index in range(first, last + 1):
        is_cut = graph.ops[index].kind == "all_to_all" or index - 1 in comm
        if index > first and (is_cut or filled_ms >= limit_ms):
            bounds.append(index)
            filled_ms = 0.0
        filled_ms += whole_ms[index - first]
    return [*bounds, last + 1]


class _Search:
    """One call of `choose_regions`."""

    def __init__(self, graph: Graph, costs: CostModel, config: PlannerConfig, phase: Phase) -> None:
        self.graph, self.config = graph, config
        self.prices = Prices(graph=graph, costs=costs)
        self.all_to_alls = [i for i in graph.select(phase) if graph.ops[i].kind == "all_to_all"]
        self.bounds = self._bounds(graph.select(phase), phase)

    def _bounds(self, ops: Sequence[int], phase: Phase) -> list[int]:
        if not ops or not self.all_to_alls:
            return []
        if ops[-1] - ops[0] + 1 != len(ops):
            other = next(i for i in range(ops[0], ops[-1]) if self.graph.ops[i].phase != phase)
            raise InputError(
                f"graph {self.graph.name!r} mixes its phases",
                expected=f"all {phase} ops in one run",
                found=f"op {self.graph.ops[other].name!r} among them",
                fix="order the graph's ops by phase",
            )
        return group_bounds(self.graph, self.prices, ops[0], ops[-1], self.config.group_fraction)

    def run(self) -> tuple[tuple[Region, ...], tuple[str, ...]]:
        if not self.bounds:
            return (), ()
        candidates = self._candidates()
        _, places = _C.cover_ranges(
            len(self.bounds) - 1,
            np.array([c.first for c in candidates], dtype=np.int64),
            np.array([c.end for c in candidates], dtype=np.int64),
            np.array([c.cost_ms for c in candidates], dtype=np.float64),
        )
        cover = (candidates[place] for place in places)
        regions = tuple(
            Region(num_parts=c.num_parts, ops=c.inference.ops, splits=c.inference.splits)
            for c in cover
            if c.inference is not None
        )
        possible = {op for c in candidates if c.inference is not None for op in c.inference.ops}
        return regions, tuple(self._notes(regions, possible))

    def _candidates(self) -> list[_Candidate]:
        """Whole ranges come first, so that parts must be faster."""
        num_groups = len(self.bounds) - 1
        whole, parts = [], []
        for first in range(num_groups):
            for end in range(first + 1, num_groups + 1):
                ops = range(self.bounds[first], self.bounds[end])
                num_comm = sum(a in ops for a in self.all_to_alls)
                if num_comm > MAX_ALL_TO_ALLS:
                    break
                if end == first + 1 or num_comm:
                    whole.append(_Candidate(first=first, end=end, num_parts=1, cost_ms=self._whole_ms(ops)))
                if num_comm:
                    parts += self._in_parts(first, end)
        return [*whole, *parts]

    def _whole_ms(self, ops: range) -> float:
        if not ops:
            return 0.0
        return self.prices.times_ms(layout(self.graph, ops.start, ops.stop - 1, {}), [1])[0]

    def _in_parts(self, first: int, end: int) -> list[_Candidate]:
        """Ranges whose split ops begin later, or end earlier, are left to the smaller range that has the same ones."""
        ops = range(self.bounds[first], self.bounds[end])
        found = self._infer(ops.start, ops.stop - 1)
        counts = part_counts(found.units, self.config.max_parts)
        if not found.ops or not counts:
            return []
        if found.ops[0] >= self.bounds[first + 1] or found.ops[-1] < self.bounds[end - 1]:
            return []
        inner = layout(self.graph, found.ops[0], found.ops[-1], dict(zip(found.ops, found.splits, strict=True)))
        around_ms = self._whole_ms(range(ops.start, found.ops[0])), self._whole_ms(range(found.ops[-1] + 1, ops.stop))
        return [
            _Candidate(
                first=first,
                end=end,
                num_parts=count,
                cost_ms=around_ms[0] + inner_ms + around_ms[1],
                inference=found,
            )
            for count, inner_ms in zip(counts, self.prices.times_ms(inner, counts), strict=True)
        ]

    def _infer(self, first: int, last: int) -> Inference:
        config = self.config
        return infer_splits(
            self.graph, first, last, solver=config.axis_solver, solver_limit=config.solver_limit, seed=config.seed
        )

    def _notes(self, regions: Sequence[Region], possible: Set[int]) -> Iterator[str]:
        in_parts = {op for region in regions for op in region.ops}
        stops = sorted({stop for region in regions if (stop := self._stop(region)) is not None})
        if stops:
            yield f"{self._names(stops)} cannot be split: only ops after it are pipelined"
        whole = [a for a in self.all_to_alls if a not in in_parts]
        if impossible := [a for a in whole if a not in possible]:
            yield f"{self._names(impossible)} cannot be split: not pipelined"
        if slower := [a for a in whole if a in possible]:
            yield f"no range around {self._names(slower)} is faster in parts: not pipelined"

    def _stop(self, region: Region) -> int | None:
        """The op because of which the region could not begin earlier, as far as the all-to-all before."""
        first_comm = next(op for op in region.ops if op in self.all_to_alls)
        earliest = max((a + 1 for a in self.all_to_alls if a < first_comm), default=self.bounds[0])
        stop = self._infer(earliest, region.ops[-1]).stopped_by
        return stop if stop is not None and stop not in region.ops else None

    def _names(self, ops: Sequence[int]) -> str:
        """The first few names; with the target, unless it is communication, as names from torch say little."""
        shown = [self.graph.ops[op] for op in ops[:_MAX_NAMES]]
        names = ", ".join(op.name if op.is_comm else f"{op.name} ({op.target})" for op in shown)
        return names if len(ops) <= _MAX_NAMES else f"{names} and {len(ops) - _MAX_NAMES} more"


def part_counts(units: int, max_parts: int) -> list[int]:
    """The numbers of parts, from 2, into which ``units`` can be cut so that no part is much larger than the mean."""
    most = range(2, min(units, max_parts) + 1)
    return [count for count in most if ceil(units / count) * count <= _MAX_IMBALANCE * units]
