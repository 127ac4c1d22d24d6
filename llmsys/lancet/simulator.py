"""The simulator: runs a plan on lanes, one for compute and one for each communication group.

It reads only the plan, the graph and the cost model, not what the planner expected, and shares no code with the
planner's own estimate; tests hold the two equal. Given measured times it is the replay check: they have to reproduce
the measured step.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from llmsys.core.errors import InputError
from llmsys.core.sim import LaneOp, run_lanes
from llmsys.core.timeline import Selection, Timeline
from llmsys.lancet.costs import CostModel
from llmsys.lancet.graph import Graph, Split
from llmsys.lancet.plan import (
    WHOLE,
    Instruction,
    Join,
    Plan,
    Run,
    Slice,
    Start,
    Wait,
    check_plan,
    instruction_text,
)

COMPUTE = "compute"
COPIES = "copies"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimulationResult:
    """One step. ``step_ms`` = computation that nothing overlaps + ``overlapped_ms`` + ``exposed_comm_ms``.

    ``compute_ms``: the compute lane is busy, slices and joins included. ``comm_ms``: the sum of all communication,
    also where two groups communicate at once. ``exposed_comm_ms``: some communication runs and the compute lane waits.
    ``overlapped_ms``: both are busy. ``timeline``: lane "compute" with kinds "forward", "backward", "copies" (slices
    and joins) and "launch"; for each group a lane "comm <group>" with kinds "all_to_all" and "collective".
    """

    step_ms: float
    compute_ms: float
    comm_ms: float
    exposed_comm_ms: float
    overlapped_ms: float
    timeline: Timeline

    @property
    def exposed_compute_ms(self) -> float:
        """Computation during which no communication runs."""
        return self.compute_ms - self.overlapped_ms


def simulate(
    graph: Graph, plan: Plan, costs: CostModel, *, durations_ms: Mapping[Instruction, float] | None = None
) -> SimulationResult:
    """Run ``plan``, which has to pass `check_plan`, with the times of ``costs``.

    ``durations_ms`` replaces the times of the instructions that it names, as for measured ones: of a start, the
    communication's; of a wait, what it takes after the communication is over. InputError for an instruction that is
    not in the plan.
    """
    check_plan(plan, graph)
    lanes = _Lanes(graph, plan, costs, dict(durations_ms or {}))
    for instruction in plan.instructions:
        lanes.step(instruction)
    lanes.refuse_unused()
    timeline = run_lanes(lanes.ops)
    comm = tuple(lane for lane in lanes.ops if lane != COMPUTE)
    busy = Selection(lanes=comm)
    return SimulationResult(
        step_ms=timeline.end_ms,
        compute_ms=timeline.busy_ms(COMPUTE),
        comm_ms=sum(span.duration_ms for span in timeline.select(busy)),
        exposed_comm_ms=timeline.exposed_ms(busy, COMPUTE),
        overlapped_ms=timeline.overlap_ms(busy, COMPUTE),
        timeline=timeline,
    )


class _Lanes:
    """Turns instructions into lane ops, in their order.

    A wait that takes no time is no op: the next op of the compute lane depends on what it waits for.
    """

    def __init__(self, graph: Graph, plan: Plan, costs: CostModel, given_ms: dict[Instruction, float]) -> None:
        self.graph, self.plan, self.costs, self.given_ms = graph, plan, costs, given_ms
        groups = dict.fromkeys(graph.ops[op].group for op in graph.comm_ops())
        self.ops: dict[str, list[LaneOp]] = {lane: [] for lane in (COMPUTE, *(f"comm {group}" for group in groups))}
        self.region_of = {op: region for region in plan.regions for op in region.ops}
        self.waits: list[Hashable] = []

    def step(self, instruction: Instruction) -> None:
        if isinstance(instruction, Slice | Join):
            self._compute(instruction, self._copy_ms(instruction), COPIES, instruction_text(instruction))
            return
        op = self.graph.ops[instruction.op]
        name = op.name if instruction.part == WHOLE else f"{op.name} part {instruction.part}"
        if isinstance(instruction, Run):
            self._compute(instruction, self._op_ms(instruction), op.phase, name)
        elif isinstance(instruction, Start):
            self._compute(("launch", instruction), self._launch_ms(instruction)[0], "launch", f"start {name}")
            self._communicate(instruction, op.group, op.kind, name)
        else:
            self.waits.append(("comm", instruction.op, instruction.part))
            took = self.given_ms.pop(instruction, self._launch_ms(instruction)[1])
            self._compute(("launch", instruction), took, "launch", f"wait {name}")

    def _compute(self, op_id: Hashable, took: float, kind: str, name: str) -> None:
        if took == 0:
            return
        op = LaneOp(op_id=op_id, lane=COMPUTE, duration_ms=took, depends_on=tuple(self.waits), kind=kind, name=name)
        self.ops[COMPUTE].append(op)
        self.waits = []

    def _communicate(self, instruction: Start, group: str, kind: str, name: str) -> None:
        before = self.ops[COMPUTE][-1:]
        lane = f"comm {group}"
        op = LaneOp(
            op_id=("comm", instruction.op, instruction.part),
            lane=lane,
            duration_ms=self._op_ms(instruction),
            depends_on=(*(op.op_id for op in before), *self.waits),
            kind=kind,
            name=name,
        )
        self.ops[lane].append(op)

    def _op_ms(self, instruction: Run | Start) -> float:
        if instruction in self.given_ms:
            return self.given_ms.pop(instruction)
        op = self.graph.ops[instruction.op]
        return self.costs.op_ms(self.graph, op, *self._cut(instruction))

    def _cut(self, instruction: Run | Start | Wait) -> tuple[int, Split | None]:
        """Into how many parts an instruction's op is cut, and how."""
        if instruction.part == WHOLE:
            return 1, None
        region = self.region_of[instruction.op]
        place = region.splits[region.ops.index(instruction.op)]
        return region.num_parts, self.graph.ops[instruction.op].splits[place]

    def _copy_ms(self, instruction: Slice | Join) -> float:
        if instruction in self.given_ms:
            return self.given_ms.pop(instruction)
        tensor = self.graph.tensors[instruction.tensor]
        num_parts = self.plan.regions[instruction.region].num_parts
        if isinstance(instruction, Slice):
            return self.costs.slice_ms(tensor, instruction.axis, num_parts)
        return self.costs.join_ms(tensor, instruction.axis, num_parts)

    def _launch_ms(self, instruction: Start | Wait) -> tuple[float, float]:
        """What the start and the wait take of the compute lane, for costs that say so."""
        launch = getattr(self.costs, "launch_ms", None)
        if launch is None:
            return 0.0, 0.0
        start_ms, wait_ms = launch(self.graph, self.graph.ops[instruction.op], *self._cut(instruction))
        return float(start_ms), float(wait_ms)

    def refuse_unused(self) -> None:
        if self.given_ms:
            raise InputError(
                "durations_ms has times of instructions that the plan does not have",
                expected="only instructions of the plan",
                found=f"{len(self.given_ms)} others, the first is {instruction_text(next(iter(self.given_ms)))!r}",
                fix="pass times that were measured with this plan",
            )
