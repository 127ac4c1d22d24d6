"""The replay check: the times that a step was measured to take, put back through its plan.

If the simulator then gives the measured makespan, the schedule that it simulates is the one that ran, and what is left
of a difference between prediction and measurement is an error of the costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmsys.core.errors import InputError
from llmsys.lancet.costs import CostModel
from llmsys.lancet.graph import Graph, Op, Split, Tensor
from llmsys.lancet.plan import WHOLE, Instruction, Plan, Start, Wait
from llmsys.lancet.runtime.measure import Recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Measured times for a simulator: of each instruction, and of launches through ``costs``."""

    durations_ms: Mapping[Instruction, float]
    costs: LaunchCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchCosts:
    """``base`` with measured launches: the compute lane's time in the starts of each op, mean over its parts."""

    base: CostModel
    starts_ms: Mapping[str, float]

    @property
    def name(self) -> str:
        return f"replay of {self.base.name}"

    def op_ms(self, graph: Graph, op: Op, num_parts: int = 1, split: Split | None = None) -> float:
        return self.base.op_ms(graph, op, num_parts, split)

    def slice_ms(self, tensor: Tensor, axis: int, num_parts: int) -> float:
        return self.base.slice_ms(tensor, axis, num_parts)

    def join_ms(self, tensor: Tensor, axis: int, num_parts: int) -> float:
        return self.base.join_ms(tensor, axis, num_parts)

    def launch_ms(self, graph: Graph, op: Op, num_parts: int, split: Split | None = None) -> tuple[float, float]:
        return self.starts_ms.get(op.name, 0.0), 0.0


def replay(graph: Graph, plan: Plan, recorded: Sequence[Recorded], costs: CostModel) -> Replay:
    """Measured times of all instructions of ``plan``.

    The end of a communication is seen only by a wait that blocks. One whose wait did not block is taken to last as
    ``costs`` says, but not beyond its wait; what a wait does after the arrival is what ``costs`` says of it, as far as
    the wait was that long. Raises InputError if the recorded run was one of another plan.
    """
    spans = {r.label: r for r in recorded}
    missing = [i for i in plan.instructions if i not in spans and not _is_empty(graph, i)]
    if missing:
        raise InputError(
            f"the recorded run was not one of this plan of {plan.planner!r}",
            expected=f"each of its {len(plan.instructions)} instructions",
            found=f"{len(missing)} not recorded, the first is {missing[0]}",
            fix="record a step that was rewritten by this plan",
        )
    durations: dict[Instruction, float] = {}
    starts: dict[str, list[float]] = {}
    lane_free_s: dict[str, float] = {}
    waits = {(i.op, i.part): spans[i] for i in plan.instructions if isinstance(i, Wait)}
    for instruction in plan.instructions:
        if instruction not in spans:
            durations[instruction] = 0.0
        elif isinstance(instruction, Start):
            op = graph.ops[instruction.op]
            starts.setdefault(op.name, []).append(spans[instruction].duration_ms)
            begin_s = max(spans[instruction].end_s, lane_free_s.get(op.group, 0.0))
            wait = waits[instruction.op, instruction.part]
            took_ms, after_ms = _communication(graph, plan, costs, instruction, wait, begin_s)
            durations[instruction] = took_ms
            durations[Wait(op=instruction.op, part=instruction.part)] = after_ms
            lane_free_s[op.group] = begin_s + took_ms / 1e3
        elif not isinstance(instruction, Wait):
            durations[instruction] = spans[instruction].duration_ms
    launches = {name: sum(times) / len(times) for name, times in starts.items()}
    return Replay(durations_ms=durations, costs=LaunchCosts(base=costs, starts_ms=launches))


def _is_empty(graph: Graph, instruction: Instruction) -> bool:
    """Whether it may have no node: what runs only to keep an order, and slices that are views of nothing."""
    return not isinstance(instruction, Start | Wait)


def _communication(
    graph: Graph, plan: Plan, costs: CostModel, start: Start, wait: Recorded, begin_s: float
) -> tuple[float, float]:
    """ms on the lane, and ms of the wait after the arrival."""
    op = graph.ops[start.op]
    region = next((r for r in plan.regions if start.op in r.ops), None) if start.part != WHOLE else None
    num_parts, split = 1, None
    if region is not None:
        num_parts, split = region.num_parts, op.splits[region.splits[region.ops.index(start.op)]]
    launch = getattr(costs, "launch_ms", None)
    after_ms = min(launch(graph, op, num_parts, split)[1] if launch else 0.0, wait.duration_ms)
    expected_ms = costs.op_ms(graph, op, num_parts, split)
    arrived_s = wait.end_s - after_ms / 1e3
    blocked = wait.duration_ms > 2 * after_ms + 0.1
    end_s = arrived_s if blocked else min(begin_s + expected_ms / 1e3, wait.start_s)
    if not blocked:
        after_ms = wait.duration_ms
    return max(0.0, (end_s - begin_s) * 1e3), after_ms
