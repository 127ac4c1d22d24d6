"""The planner's own estimate: a recurrence over the instructions of a plan.

The compute lane has one clock and each group's lane another. A run, a slice or a join moves the first on; a start puts
its communication behind what is on its lane; a wait sets the first clock to the end of what it waits for. With costs
that have a ``launch_ms(graph, op, num_parts, split)``, a start and a wait also take that much of the compute lane. The
simulator computes the same from lanes and shares no code with this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmsys.lancet.costs import CostModel
from llmsys.lancet.graph import Graph, Op, Split
from llmsys.lancet.plan import WHOLE, Instruction, Join, Region, Slice, Start, Wait

Launch = Callable[[Graph, Op, int, Split | None], tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """What a list of instructions takes, in ms. ``exposed_at``: how long waits for each communication op blocked."""

    step_ms: float
    compute_ms: float
    comm_ms: float
    exposed_comm_ms: float
    exposed_at: Mapping[int, float]


class Pricer:
    """Times of instructions under one cost model; each op, part and copy is asked for once."""

    def __init__(self, graph: Graph, costs: CostModel) -> None:
        self.graph = graph
        self.costs = costs
        self.whole_ms = [costs.op_ms(graph, op) for op in graph.ops]
        self._parts: dict[tuple[int, int, int], float] = {}
        self._launch: Launch | None = getattr(costs, "launch_ms", None)

    def run(self, instructions: Sequence[Instruction], regions: Sequence[Region]) -> Times:
        """The recurrence; instructions have to be in a valid order. Linear in their number."""
        splits = {op: s for region in regions for op, s in zip(region.ops, region.splits, strict=True)}
        num_parts = {op: region.num_parts for region in regions for op in region.ops}
        clocks = _Clocks()
        for instruction in instructions:
            if isinstance(instruction, Slice | Join):
                clocks.compute(self._copy_ms(instruction, regions[instruction.region]))
                continue
            op, part = instruction.op, instruction.part
            split, parts = (None, 1) if part == WHOLE else (splits[op], num_parts[op])
            if isinstance(instruction, Wait):
                clocks.wait(op, part)
                clocks.compute(self._launch_ms(op, parts, split)[1])
                continue
            took = self.whole_ms[op] if split is None else self.part_ms(op, split, parts)
            if isinstance(instruction, Start):
                clocks.compute(self._launch_ms(op, parts, split)[0])
                clocks.start(op, part, self.graph.ops[op].group, took)
            else:
                clocks.compute(took)
        return clocks.times()

    def part_ms(self, op: int, split: int, num_parts: int) -> float:
        """Of one part of an op."""
        key = (op, split, num_parts)
        if key not in self._parts:
            described = self.graph.ops[op]
            self._parts[key] = self.costs.op_ms(self.graph, described, num_parts, described.splits[split])
        return self._parts[key]

    def _launch_ms(self, op: int, num_parts: int, split: int | None) -> tuple[float, float]:
        """Of the compute lane: for a start, and for a wait after the communication is over."""
        if self._launch is None:
            return 0.0, 0.0
        described = self.graph.ops[op]
        return self._launch(self.graph, described, num_parts, None if split is None else described.splits[split])

    def _copy_ms(self, instruction: Slice | Join, region: Region) -> float:
        tensor = self.graph.tensors[instruction.tensor]
        price = self.costs.slice_ms if isinstance(instruction, Slice) else self.costs.join_ms
        return price(tensor, instruction.axis, region.num_parts)


class _Clocks:
    """The clocks of the lanes, and what passed on them."""

    def __init__(self) -> None:
        self.now = self.compute_ms = self.comm_ms = self.exposed_ms = 0.0
        self.lane_free: dict[str, float] = {}
        self.ends: dict[tuple[int, int], float] = {}
        self.exposed_at: dict[int, float] = {}

    def compute(self, took: float) -> None:
        self.now += took
        self.compute_ms += took

    def start(self, op: int, part: int, group: str, took: float) -> None:
        end = self.lane_free[group] = max(self.now, self.lane_free.get(group, 0.0)) + took
        self.ends[op, part] = end
        self.comm_ms += took

    def wait(self, op: int, part: int) -> None:
        blocked = self.ends[op, part] - self.now
        if blocked > 0:
            self.now += blocked
            self.exposed_ms += blocked
            self.exposed_at[op] = self.exposed_at.get(op, 0.0) + blocked

    def times(self) -> Times:
        return Times(
            step_ms=self.now,
            compute_ms=self.compute_ms,
            comm_ms=self.comm_ms,
            exposed_comm_ms=self.exposed_ms,
            exposed_at=self.exposed_at,
        )
