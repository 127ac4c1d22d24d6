"""The simulator against the planner's estimate, which is other code, and against steps worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest

from llmsys.core.errors import InputError, PlanError
from llmsys.lancet.baselines import AsCaptured, CapacityPipelining, RaiseSink
from llmsys.lancet.config import PlannerConfig
from llmsys.lancet.costs import CostModel, RooflineCosts, TableCosts
from llmsys.lancet.estimate import Pricer
from llmsys.lancet.graph import Graph, Op, Split, is_irregular
from llmsys.lancet.plan import Instruction, Plan, Run, Start, Wait
from llmsys.lancet.planner import Lancet, Planner
from llmsys.lancet.simulator import SimulationResult, simulate
from tests.lancet.steps import gpt_step, moe_backward, random_step

pytestmark = pytest.mark.native

QUICK = PlannerConfig(axis_solver="propagate")


class Launches:
    """Starts and waits take time of the compute lane too, by how the op is cut."""

    def launch_ms(self, graph: Graph, op: Op, num_parts: int, split: Split | None) -> tuple[float, float]:
        assert (num_parts == 1) == (split is None) and (split is None or split in op.splits)
        return (0.25, 0.5) if split is None or is_irregular(split.inputs[0]) else (0.125, 1.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchCosts(Launches, TableCosts):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRoofline(Launches, RooflineCosts):
    pass


def assert_as_estimated(result: SimulationResult, plan: Plan) -> None:
    for name in ("step_ms", "compute_ms", "comm_ms", "exposed_comm_ms"):
        assert getattr(result, name) == pytest.approx(getattr(plan.estimate, name), abs=1e-9), name
    # The compute lane is busy or waits for communication, and nothing else.
    assert result.compute_ms + result.exposed_comm_ms == pytest.approx(result.step_ms, abs=1e-9)
    assert result.exposed_compute_ms + result.overlapped_ms + result.exposed_comm_ms == pytest.approx(result.step_ms)


@pytest.mark.parametrize("with_launch", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_estimate_and_simulation_are_equal(seed: int, with_launch: bool) -> None:
    graph, costs = random_step(np.random.default_rng(seed), 60)
    if with_launch:
        costs = LaunchCosts(ops_ms=costs.ops_ms)
    for planner in (AsCaptured(), RaiseSink(), Lancet()):
        plan = planner.make(graph, costs, replace(QUICK, partition="none"))
        assert_as_estimated(simulate(graph, plan, costs), plan)


@pytest.mark.parametrize("with_launch", [False, True])
@pytest.mark.parametrize("planner", [Lancet(), CapacityPipelining(degree=2), CapacityPipelining(degree=4)])
def test_they_are_equal_with_parts(planner: Planner, with_launch: bool) -> None:
    graph, costs = gpt_step()
    if with_launch:
        assert isinstance(costs, RooflineCosts)
        costs = LaunchRoofline(**{one.name: getattr(costs, one.name) for one in fields(costs)})
    plan = planner.make(graph, costs, QUICK)
    assert plan.regions
    result = simulate(graph, plan, costs)
    assert_as_estimated(result, plan)
    kinds = {span.kind for span in result.timeline.spans}
    assert kinds == {"forward", "backward", "copies", "all_to_all", *(("launch",) if with_launch else ())}
    assert set(result.timeline.lanes) == {"compute", "comm ep"}


def by_hand() -> tuple[Graph, CostModel, Plan]:
    graph, costs = moe_backward()
    return graph, costs, Lancet().make(graph, costs, replace(QUICK, partition="none"))


def test_a_step_by_hand() -> None:
    """a1 hides dw2 and cast2 (5 of its 5 ms), a0 hides dw1 and cast1 (3.5 of 3.5): nothing is exposed."""
    graph, costs, plan = by_hand()
    result = simulate(graph, plan, costs)
    start = {span.name: span.start_ms for span in result.timeline.spans}
    expected = {"h1": 0, "loss": 1, "d2": 2, "e1": 3, "a1": 4, "dw2": 4, "cast2": 8, "sum2": 9, "d1": 9, "e0": 10}
    expected |= {"a0": 11, "dw1": 11, "cast1": 14, "d0": 14.5}
    assert start == expected
    assert result.exposed_comm_ms == 0
    assert result.step_ms == result.compute_ms == 15.5
    assert result.comm_ms == 5 + 3.5 + 1
    captured = simulate(graph, AsCaptured().make(graph, costs, QUICK), costs)
    assert captured.step_ms == 15.5 + 9.5 and captured.exposed_comm_ms == 9.5 and captured.overlapped_ms == 0


def test_measured_times_replace_modelled_ones() -> None:
    graph, costs, plan = by_hand()
    index = graph.index_of
    given: dict[Instruction, float] = {
        Start(op=index["a1"]): 9.0,
        Run(op=index["h1"]): 2.5,
        Wait(op=index["a0"]): 0.75,
    }
    result = simulate(graph, plan, costs, durations_ms=given)
    # 1.5 more at the first op; a1 is exposed for the 4 ms that nothing hides; 0.75 after a0.
    assert result.step_ms == 15.5 + 1.5 + 4 + 0.75
    assert result.exposed_comm_ms == 4
    everything = {i: 1.0 for i in plan.instructions if not isinstance(i, Wait)}
    with pytest.raises(InputError) as error:
        simulate(graph, plan, costs, durations_ms={**everything, Run(op=0, part=3): 1.0})
    assert "run 0.3" in error.value.found


def test_a_broken_plan_is_not_simulated() -> None:
    graph, costs, plan = by_hand()
    with pytest.raises(PlanError, match="a start without a wait"):
        simulate(graph, replace(plan, instructions=plan.instructions[:-1]), costs)


def test_times_are_asked_for_once() -> None:
    """Planning asks a cost model for each op once, however many orders it tries."""
    graph, costs = random_step(np.random.default_rng(0), 30)
    asked: list[str] = []

    class Counting(TableCosts):
        def op_ms(self, graph: Graph, op: Op, *args: object, **more: object) -> float:
            asked.append(op.name)
            return costs.op_ms(graph, op)

    counting = Counting(**{field.name: getattr(costs, field.name) for field in fields(costs)})
    pricer = Pricer(graph, counting)
    plan = RaiseSink().make(graph, costs, QUICK)
    for _ in range(3):
        pricer.run(plan.instructions, ())
    assert len(asked) == len(graph.ops)
