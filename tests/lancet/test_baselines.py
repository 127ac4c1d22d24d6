"""Baselines: no overlap, overlap without moving computation, and all-to-alls pipelined with experts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmsys.core.errors import ConfigError, InfeasibleError
from llmsys.lancet.baselines import AsCaptured, CapacityPipelining, RaiseSink
from llmsys.lancet.config import PlannerConfig
from llmsys.lancet.plan import Join, Run, Slice, Start, Wait, check_plan
from tests.lancet.steps import gpt_step, moe_backward, random_step

pytestmark = pytest.mark.native

CONFIG = PlannerConfig()


@pytest.mark.parametrize("seed", range(10))
def test_as_captured_waits_at_once_and_keeps_the_order(seed: int) -> None:
    graph, costs = random_step(np.random.default_rng(seed), 60)
    plan = AsCaptured().make(graph, costs, CONFIG)
    order = [i.op for i in plan.instructions if isinstance(i, Run | Start)]
    assert order == [*graph.select("forward"), *graph.select("backward")]
    for first, second in zip(plan.instructions, plan.instructions[1:], strict=False):
        assert isinstance(second, Wait) == isinstance(first, Start)
    assert plan.estimate.exposed_comm_ms == pytest.approx(plan.estimate.comm_ms, abs=1e-9)
    assert plan.estimate.peak_mb == plan.estimate.captured_peak_mb


@pytest.mark.parametrize("seed", range(20))
def test_raise_sink_keeps_computation_and_is_never_later(seed: int) -> None:
    """Starts are not after any op that could follow them, waits not before any that could go before."""
    graph, costs = random_step(np.random.default_rng(50 + seed), 60)
    plan = RaiseSink().make(graph, costs, CONFIG)
    runs = [i.op for i in plan.instructions if isinstance(i, Run)]
    compute = [i for phase in ("forward", "backward") for i in graph.select(phase) if not graph.ops[i].is_comm]
    assert runs == compute
    assert plan.estimate.step_ms <= AsCaptured().make(graph, costs, CONFIG).estimate.step_ms + 1e-9
    made: set[str] = set()
    for place, i in enumerate(plan.instructions):
        if isinstance(i, Wait) and place + 1 < len(plan.instructions):
            following = plan.instructions[place + 1 :]
            # Behind a wait: what uses it, or another wait for the same op's sake, or the end of the phase.
            users = {u for tensor in graph.ops[i.op].outputs for u in graph.consumers[tensor.name]}
            after = next((f for f in following if isinstance(f, Run | Start) and f.op in users), None)
            between = following[: following.index(after)] if after is not None else following
            phase = graph.ops[i.op].phase
            assert not any(isinstance(f, Run) and graph.ops[f.op].phase == phase for f in between)
        if isinstance(i, Run | Wait):
            made.update(tensor.name for tensor in graph.ops[i.op].outputs)


def test_capacity_pipelining_cuts_each_layer_in_both_passes() -> None:
    graph, costs = gpt_step(4)
    plan = CapacityPipelining(degree=2).make(graph, costs, CONFIG)
    check_plan(plan, graph)
    assert len(plan.regions) == 2
    for region in plan.regions:
        exchanges = [graph.ops[op] for op in region.ops if graph.ops[op].kind == "all_to_all"]
        assert [found.phase for found in exchanges] == ["forward", "forward", "backward", "backward"]
        assert len({found.layer for found in exchanges}) == 1 and region.num_parts == 2
    split = {op for region in plan.regions for op in region.ops}
    assert split >= set(graph.comm_ops("all_to_all"))


def test_what_the_experts_saved_is_neither_joined_nor_cut() -> None:
    """Tensors between the two all-to-alls of the forward pass exist in the parts that the backward pass wants."""
    graph, costs = gpt_step(2)
    plan = CapacityPipelining(degree=2).make(graph, costs, CONFIG)
    (region,) = plan.regions
    made = {tensor.name for op in region.ops for tensor in graph.ops[op].outputs}
    sliced = {i.tensor for i in plan.instructions if isinstance(i, Slice)}
    assert sliced and not sliced & made
    joined = [i.tensor for i in plan.instructions if isinstance(i, Join)]
    inside = {name for name in made if set(graph.consumers[name]) <= set(region.ops) and name not in graph.outputs}
    saved = {n for n in inside if any(graph.ops[u].phase == "backward" for u in graph.consumers[n])
             and graph.ops[graph.producers[n]].phase == "forward"}  # fmt: skip
    assert saved and not saved & set(joined)
    # Without that, the experts' activations would be joined and cut again, which costs more.
    alone = CapacityPipelining(degree=2).make(graph, costs, CONFIG).estimate.step_ms
    assert alone < AsCaptured().make(graph, costs, CONFIG).estimate.step_ms


def test_the_fastest_degree_is_taken() -> None:
    graph, costs = gpt_step(4)
    steps = {
        degree: CapacityPipelining(degree=degree).make(graph, costs, CONFIG).estimate.step_ms for degree in (1, 2, 4, 8)
    }
    best = CapacityPipelining().make(graph, costs, CONFIG)
    assert best.estimate.step_ms == min(steps.values())
    assert best.notes == (f"overlap degree {min(steps, key=lambda k: steps[k])}: 2 layers in parts",)
    assert steps[1] == RaiseSink().make(graph, costs, CONFIG).estimate.step_ms


@pytest.mark.parametrize("planner", [AsCaptured(), RaiseSink(), CapacityPipelining()])
def test_baselines_say_when_memory_does_not_suffice(planner) -> None:  # type: ignore[no-untyped-def]
    graph, costs = moe_backward()
    peak = planner.make(graph, costs, CONFIG).estimate.peak_mb
    assert planner.make(graph, costs, replace(CONFIG, memory_limit_mb=peak)).estimate.peak_mb == peak
    with pytest.raises(InfeasibleError, match=planner.name):
        planner.make(graph, costs, replace(CONFIG, memory_limit_mb=peak * 0.99))


@pytest.mark.parametrize("degree", [0, -1, 1.5])
def test_degrees_are_whole_numbers(degree: float) -> None:
    with pytest.raises(ConfigError, match="degree is out of range"):
        CapacityPipelining(degree=degree)  # type: ignore[arg-type]
