"""Lancet's plans: valid, never slower than their own parts, the same every time, and what their notes say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmsys.core.errors import ConfigError
from llmsys.lancet import planner
from llmsys.lancet.baselines import PLANNERS, AsCaptured, RaiseSink, planner_named
from llmsys.lancet.config import PlannerConfig
from llmsys.lancet.costs import TableCosts
from llmsys.lancet.drafting import Decisions, Drafter
from llmsys.lancet.graph import Graph, Tensor
from llmsys.lancet.plan import WHOLE, Plan, Run, Start, Wait, check_plan
from llmsys.lancet.planner import Lancet, move_weight_gradients
from tests.lancet.steps import all_to_all, gpt_step, moe_backward, op, random_step

pytestmark = pytest.mark.native

QUICK = PlannerConfig(axis_solver="propagate")
DW = replace(QUICK, partition="none")
PARTS = replace(QUICK, weight_gradients="none")
NEITHER = replace(DW, weight_gradients="none")


@pytest.mark.parametrize("seed", range(30))
def test_moves_are_valid_and_never_slower(seed: int) -> None:
    """On graphs of any form, with two groups, collectives, random ops, views, and phases that are mixed in the list."""
    graph, costs = random_step(np.random.default_rng(500 + seed), 80)
    plans = [
        Lancet().make(graph, costs, replace(DW, weight_gradients=w, solver_limit=0.1)) for w in ("greedy", "exact")
    ]
    for plan in plans:
        check_plan(plan, graph)
        for baseline in (AsCaptured(), RaiseSink()):
            assert plan.estimate.step_ms <= baseline.make(graph, costs, QUICK).estimate.step_ms
        for target, hidden in plan.hidden_under.items():
            assert graph.ops[target].kind == "all_to_all"
            for index in hidden:
                assert graph.independent(index, target) and graph.ops[index].phase == "backward"


def test_moves_help_on_random_graphs() -> None:
    gained = 0
    for seed in range(20):
        graph, costs = random_step(np.random.default_rng(900 + seed), 80)
        sunk = Lancet().make(graph, costs, NEITHER).estimate.step_ms
        gained += Lancet().make(graph, costs, DW).estimate.step_ms < sunk - 1e-9
    assert gained > 8


def test_weight_gradients_run_between_start_and_wait() -> None:
    graph, costs = moe_backward()
    plan = Lancet().make(graph, costs, DW)
    names = [graph.ops[i.op].name for i in plan.instructions if isinstance(i, Run | Start | Wait)]
    kinds = [type(i).__name__ for i in plan.instructions]
    assert [f"{kind} {name}" for kind, name in zip(kinds, names, strict=True)] == [
        "Run h1", "Run loss", "Run d2", "Run e1", "Start a1", "Run view2", "Run dw2", "Run cast2", "Start sum2",
        "Wait a1", "Run d1", "Run e0", "Start a0", "Run dw1", "Run cast1", "Wait a0", "Run d0", "Wait sum2",
    ]  # fmt: skip
    named = {graph.ops[a].name: [graph.ops[i].name for i in ops] for a, ops in plan.hidden_under.items()}
    assert named == {"a1": ["view2", "dw2", "cast2"], "a0": ["dw1", "cast1"]}


@pytest.mark.parametrize("data_group", ["dp", "ep"])
def test_both_passes_beat_each_on_a_gpt(data_group: str) -> None:
    graph, costs = gpt_step(data_parallel=data_group == "ep", data_group=data_group)
    steps = {
        name: Lancet().make(graph, costs, config).estimate.step_ms
        for name, config in (("both", QUICK), ("dw", DW), ("parts", PARTS), ("neither", NEITHER))
    }
    assert steps["both"] < min(steps["dw"], steps["parts"])
    assert max(steps["dw"], steps["parts"]) < steps["neither"]


def test_the_first_all_to_alls_are_hidden_too() -> None:
    """A unit is used where it is needed, if others could be elsewhere: all of the backward pass is hidden here."""
    graph, costs = gpt_step()
    plan = Lancet().make(graph, costs, DW)
    targets = [a for a in graph.comm_ops("all_to_all") if graph.ops[a].phase == "backward"]
    assert set(plan.hidden_under) == set(targets)


def test_a_gate_that_needs_the_whole_batch_is_noted() -> None:
    graph, costs = gpt_step(gate="batch_prioritized")
    plan = Lancet().make(graph, costs, QUICK)
    split = {op for region in plan.regions for op in region.ops}
    assert plan.regions and plan.notes
    assert not any(graph.ops[op].target == "moe_route" for op in split)


def test_a_unit_is_not_wasted_on_what_other_ops_hide() -> None:
    """The gate's branch hides 3 ms of a1: it gets the short weight gradient, and a2 the long one."""
    ops = (
        op("h", "x", phase="forward"),
        op("d3", "h"),
        op("long", "d3"),
        op("short", "d3"),
        op("e3", "d3"),
        all_to_all("a1", "e3"),
        op("branch", "e3"),
        op("d2", "a1", "branch"),
        all_to_all("a2", "d2"),
        op("d1", "a2"),
    )
    graph = Graph(name="branch", inputs=(Tensor(name="x", shape=(1,)),), ops=ops, outputs=("d1", "long", "short"))
    times = {"a1": 4.0, "a2": 4.0, "branch": 3.0, "long": 4.0}
    costs = TableCosts(ops_ms={found.name: times.get(found.name, 1.0) for found in ops})
    plan = Lancet().make(graph, costs, DW)
    hidden = {graph.ops[a].name: [graph.ops[i].name for i in under] for a, under in plan.hidden_under.items()}
    assert hidden == {"a1": ["short"], "a2": ["long"]}
    assert plan.estimate.exposed_comm_ms == 0


def test_leftovers_go_to_what_is_still_exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where communication queues, more than the paper's rule knows of is exposed; using it never costs time."""

    def steps(seed: int) -> list[float]:
        drafter = Drafter(*random_step(np.random.default_rng(seed), 80))
        plain = drafter.draft(Decisions(units={}))
        return [draft.times.step_ms for draft in move_weight_gradients(drafter, plain, DW)]

    seeds = range(900, 940)
    more = [steps(seed) for seed in seeds]
    monkeypatch.setattr(planner, "MAX_ROUNDS", 0)
    less = [steps(seed) for seed in seeds]
    assert all(a <= b for m, n in zip(more, less, strict=True) for a, b in zip(m, n, strict=True))
    assert sum(min(m) < min(n) for m, n in zip(more, less, strict=True) if m) >= 2


def test_a_unit_pinned_by_other_communication_is_noted() -> None:
    ops = (
        op("d1", "x"),
        all_to_all("a", "d1"),
        op("s", "x"),
        op("sum", "s", kind="collective"),
        op("after_sum", "sum"),
        op("d0", "a"),
    )
    graph = Graph(name="late", inputs=(Tensor(name="x", shape=(1,)),), ops=ops, outputs=("d0", "after_sum"))
    costs = TableCosts(ops_ms={found.name: 4.0 if found.name == "a" else 1.0 for found in ops})
    # Waits sink below both anyway; a move of "s" alone is worth nothing, and the plan without notes is chosen.
    assert Lancet().make(graph, costs, DW).notes == ()
    ops = (*ops[:2], op("d0", "a"), *ops[2:5], op("w", "d1"))
    graph = Graph(name="late", inputs=graph.inputs, ops=ops, outputs=("d0", "after_sum", "w"))
    plan = Lancet().make(graph, replace(costs, ops_ms={**costs.ops_ms, "w": 1.0}), DW)
    assert plan.notes == (
        "1 of 3 independent units cannot run directly after any all-to-all: other communication or a random op is in "
        "the way",
    )


def test_a_reached_solver_limit_is_noted() -> None:
    graph, costs = gpt_step(8)
    plan = Lancet().make(graph, costs, replace(DW, weight_gradients="exact", solver_limit=1e-6))
    (note,) = plan.notes
    assert "not proven best" in note and "solver_limit=1e-06" in note


def test_same_input_same_plan() -> None:
    graph, costs = gpt_step()
    config = replace(QUICK, weight_gradients="exact")
    assert Lancet().make(graph, costs, config) == Lancet().make(graph, costs, config)


def test_graphs_without_anything_to_do() -> None:
    x = (Tensor(name="x", shape=(2,)),)
    for ops in ((), (op("only", "x", phase="forward"),), (all_to_all("a", "x"),)):
        graph = Graph(name="bare", inputs=x, ops=ops, outputs=tuple(found.name for found in ops))
        plan = Lancet().make(graph, TableCosts(ops_ms={"only": 1.0, "a": 2.0}), DW)
        assert isinstance(plan, Plan) and plan.hidden_under == {}
        assert all(i.part == WHOLE for i in plan.instructions if isinstance(i, Run | Start | Wait))


def test_planners_by_name() -> None:
    assert [planner_named(name).name for name in PLANNERS] == list(PLANNERS)
    with pytest.raises(ConfigError, match="unknown planner"):
        planner_named("lancte")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_parts", 0),
        ("max_parts", 2.0),
        ("group_fraction", 0),
        ("group_fraction", 1.5),
        ("memory_limit_mb", 0),
        ("memory_limit_mb", float("nan")),
        ("weight_gradients", "best"),
        ("partition", "all"),
        ("axis_solver", ""),
        ("solver_limit", 0.0),
        ("seed", -1),
    ],
)
def test_config_refuses(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        PlannerConfig(**{name: value})  # type: ignore[arg-type]
    assert error.value.fix == f"set {name}" and error.value.found == repr(value)
