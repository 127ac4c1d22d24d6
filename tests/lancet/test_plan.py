"""Plans as text, and every rule of `check_plan` on a plan that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from llmsys.core.errors import PlanError
from llmsys.lancet.baselines import CapacityPipelining, RaiseSink
from llmsys.lancet.config import PlannerConfig
from llmsys.lancet.graph import LAST, PARTIAL, REPLICATED, Graph, irregular
from llmsys.lancet.plan import (
    Instruction,
    Join,
    Plan,
    Region,
    Run,
    Slice,
    Start,
    Wait,
    check_plan,
    describe,
    from_text,
    instruction_text,
    to_text,
)
from llmsys.lancet.planner import Lancet
from tests.lancet.steps import gpt_step, moe_backward, random_step

pytestmark = pytest.mark.native

QUICK = PlannerConfig(axis_solver="propagate")


def hand_plan() -> tuple[Graph, Plan]:
    graph, costs = moe_backward()
    return graph, Lancet().make(graph, costs, replace(QUICK, partition="none"))


@pytest.fixture(scope="module")
def gpt() -> tuple[Graph, Plan]:
    graph, costs = gpt_step()
    return graph, Lancet().make(graph, costs, QUICK)


@pytest.mark.parametrize("seed", range(8))
def test_text_round_trip_of_random_plans(seed: int) -> None:
    graph, costs = random_step(np.random.default_rng(seed), 50)
    plan = Lancet().make(graph, costs, replace(QUICK, partition="none"))
    assert from_text(to_text(plan)) == plan == from_text(to_text(plan, graph))


def test_text_round_trip_with_regions_and_odd_names(gpt: tuple[Graph, Plan]) -> None:
    graph, plan = gpt
    assert plan.regions and plan.hidden_under
    assert from_text(to_text(plan, graph)) == plan
    odd = replace(
        plan,
        planner='a "b"  # c',
        graph_name="line\nbreak\u2028",
        notes=("  # no comment", "", "ünï"),
        hidden_under={3: (), 5: (7, 2)},
        instructions=(
            *(Join(region=1, tensor='t "x"  # y', axis=axis) for axis in (0, 11, REPLICATED, PARTIAL, LAST)),
            Slice(region=0, tensor="", axis=irregular(3)),
            Start(op=2, part=0),
            Wait(op=2),
        ),
        estimate=replace(plan.estimate, step_ms=0.1 + 0.2, peak_mb=1e300, comm_ms=5e-324),
    )
    assert from_text(to_text(odd)) == odd
    assert from_text(to_text(odd, graph)) == odd


def test_one_line_for_each_instruction() -> None:
    graph, plan = hand_plan()
    lines = to_text(plan, graph).splitlines()
    assert lines[0] == "llmsys lancet plan, version 1"
    body = lines[lines.index("run 0           # h1 compute forward") :]
    assert len(body) == len(plan.instructions)
    assert instruction_text(Join(region=2, tensor="x", axis=irregular(1))) == 'join region 2 axis irregular(1) "x"'
    assert instruction_text(Run(op=3, part=1)) == "run 3.1"


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("llmsys lancet plan", "llmsys dynapipe plan", 1),
        ('planner "', "planner '", 2),
        ("step_ms=", "steps_ms=", 5),
        ("step_ms=", "step_ms=x", 5),
        ("num_parts=", "parts=", 6),
        ("run 0\n", "run 00\n", 0),
        ("run 0\n", "run 0.x\n", 0),
        ("run 0\n", "jump 0\n", 0),
        ("run 0\n", "\n", 0),
        ("wait ", "wait  ", 0),
    ],
)
def test_damaged_text_names_its_line(gpt: tuple[Graph, Plan], old: str, new: str, line: int) -> None:
    text = to_text(gpt[1])
    assert old in text
    changed = text.replace(old, new, 1)
    place = line or text[: text.index(old)].count("\n") + 1
    with pytest.raises(PlanError, match=f"line {place} of the plan's text"):
        from_text(changed)


def test_truncated_text_is_refused() -> None:
    text = to_text(hand_plan()[1])
    lines = text.splitlines()
    for stop in range(5):
        with pytest.raises(PlanError, match="of the plan's text"):
            from_text("\n".join(lines[:stop]))
    # A whole number of instructions reads as a plan; whether it is all of one, check_plan tells.
    graph, _ = hand_plan()
    with pytest.raises(PlanError, match=r"a start without a wait|an op is missing"):
        check_plan(from_text("\n".join(lines[:-1]) + "\n"), graph)


def test_describe_names_what_hides_what(gpt: tuple[Graph, Plan]) -> None:
    graph, plan = hand_plan()
    text = describe(plan, graph)
    assert "a1  backward  parts 1  hides behind: view2, dw2, cast2" in text
    assert "15.500 ms expected" in text and "0.000 ms exposed" in text
    text = describe(gpt[1], gpt[0])
    assert "region 1:" in text and "and " in text


Change = Callable[[list[Instruction], Callable[[str], int]], None]


def drop(kind: type[Instruction], name: str) -> Change:
    def change(instructions: list[Instruction], index: Callable[[str], int]) -> None:
        instructions.remove(kind(op=index(name)))  # type: ignore[call-arg]

    return change


def add(kind: type[Instruction], name: str, at: int, **more: int) -> Change:
    def change(instructions: list[Instruction], index: Callable[[str], int]) -> None:
        instructions.insert(at, kind(op=index(name), **more))  # type: ignore[call-arg]

    return change


def swap(first: tuple[type[Instruction], str], second: tuple[type[Instruction], str]) -> Change:
    def change(instructions: list[Instruction], index: Callable[[str], int]) -> None:
        a, b = (instructions.index(kind(op=index(name))) for kind, name in (first, second))  # type: ignore[call-arg]
        instructions[a], instructions[b] = instructions[b], instructions[a]

    return change


@pytest.mark.parametrize(
    ("change", "summary", "found"),
    [
        (drop(Run, "dw1"), "an input is missing", "it does not exist yet"),
        (drop(Run, "d0"), "an op is missing", "no instruction of it"),
        (add(Run, "h1", 1), "run twice", "it was run before"),
        (add(Run, "h1", 3), "the phases mix", "op 'h1'"),
        (add(Run, "d0", 3, part=1), "wrong part", "part 1"),
        (add(Run, "a0", 3), "wrong kind of instruction", "run 13"),
        (add(Start, "d0", 3), "wrong kind of instruction", "start 14"),
        (add(Wait, "a1", 3), "a wait without its start", "none pending"),
        (drop(Wait, "sum2"), "a start without a wait", "none"),
        (drop(Wait, "a0"), "an input is missing", "it does not exist yet"),
        (swap((Run, "h1"), (Run, "loss")), "an input is missing", "it does not exist yet"),
        (swap((Run, "loss"), (Run, "d2")), "an input is missing", "it does not exist yet"),
        (swap((Run, "view2"), (Start, "a1")), "an op does not hide what it should", "no such all-to-all is on its way"),
        (swap((Run, "cast1"), (Wait, "a0")), "an op does not hide what it should", "no such all-to-all is on its way"),
    ],
)
def test_broken_rules_of_whole_ops(change: Change, summary: str, found: str) -> None:
    graph, plan = hand_plan()
    instructions = list(plan.instructions)
    change(instructions, lambda name: graph.index_of[name])
    with pytest.raises(PlanError, match=f"breaks a rule: {summary}") as error:
        check_plan(replace(plan, instructions=tuple(instructions)), graph)
    assert error.value.found == found
    marked = [line for line in error.value.grid.splitlines() if line.startswith(">")]
    assert len(marked) == 1


@pytest.mark.parametrize("order", ["all-to-alls of group 'ep'", "random ops"])
def test_all_to_alls_and_random_ops_keep_their_order(order: str) -> None:
    """Two ops that nothing joins change places, which only this rule forbids."""
    comm = order != "random ops"
    for seed in range(200):
        graph, costs = random_step(np.random.default_rng(seed), 60)
        plan = RaiseSink().make(graph, costs, QUICK)
        kind = Start if comm else Run
        listed = [
            i
            for i in plan.instructions
            if isinstance(i, kind)
            and (
                graph.ops[i.op].kind == "all_to_all" and graph.ops[i.op].group == "ep"
                if comm
                else graph.ops[i.op].random
            )
        ]
        for first, second in pairwise(listed):
            at, to = plan.instructions.index(first), plan.instructions.index(second)
            if graph.ops[first.op].phase != graph.ops[second.op].phase or to != at + 1:
                continue
            if not graph.independent(first.op, second.op):
                continue
            instructions = list(plan.instructions)
            instructions[at], instructions[to] = second, first
            with pytest.raises(PlanError, match=f"{order} change their order"):
                check_plan(replace(plan, instructions=tuple(instructions)), graph)
            return
    raise AssertionError("no graph had two such ops next to each other")


def moved(plan: Plan, change: Callable[[list[Instruction]], None]) -> Plan:
    instructions = list(plan.instructions)
    change(instructions)
    return replace(plan, instructions=tuple(instructions))


def first(plan: Plan, kind: type[Instruction], part: int | None = None) -> Instruction:
    return next(
        i for i in plan.instructions if isinstance(i, kind) and (part is None or getattr(i, "part", None) == part)
    )


def test_broken_rules_of_parts(gpt: tuple[Graph, Plan]) -> None:
    graph, plan = gpt
    cut, joined = first(plan, Slice), first(plan, Join)
    last_part, start_part = first(plan, Run, part=1), first(plan, Start, part=1)
    chained = next(i for i in plan.instructions if isinstance(i, Run) and graph.ops[i.op].chained)
    assert isinstance(cut, Slice) and isinstance(joined, Join) and isinstance(last_part, Run)
    cases: list[tuple[Callable[[list[Instruction]], None], str, str]] = [
        (lambda i: i.remove(cut), "an input is missing", "it exists only whole: a slice is missing"),
        (lambda i: i.remove(joined), "an input is missing", "it exists only in parts: a join is missing"),
        (lambda i: i.remove(last_part), "", ""),
        (lambda i: i.remove(start_part), "a wait without its start", "none pending"),
        (lambda i: i.insert(i.index(joined), joined), "a join that cannot be", "it is whole already"),
        (lambda i: i.insert(i.index(cut), cut), "a slice that cannot be", "its parts exist already"),
        (lambda i: i.insert(0, joined), "a join that cannot be", "0 of "),
        (lambda i: i.insert(0, replace(cut, axis=9)), "a slice along no dimension", "9"),
        (lambda i: i.insert(0, replace(cut, region=99)), "unknown tensor or region", "Slice(region=99"),
        (lambda i: i.insert(0, replace(cut, tensor="nothing")), "unknown tensor or region", "Slice(region="),
        (lambda i: i.insert(0, Run(op=last_part.op)), "wrong part", "the whole"),
        (lambda i: i.insert(0, Run(op=chained.op, part=1)), "a chained part is too early", "part 1"),
        (lambda i: i.insert(0, Run(op=len(graph.ops))), "unknown op", str(len(graph.ops))),
    ]
    for change, summary, found in cases:
        with pytest.raises(PlanError, match=f"breaks a rule: {summary}") as error:
            check_plan(moved(plan, change), graph)
        assert error.value.found.startswith(found), summary
        assert error.value.grid.count(">") >= 1
    at = plan.instructions.index(joined)
    late = (*plan.instructions[:at], *plan.instructions[at + 1 :], joined)
    with pytest.raises(PlanError, match="breaks a rule"):
        check_plan(replace(plan, instructions=late), graph)


def test_broken_regions(gpt: tuple[Graph, Plan]) -> None:
    graph, plan = gpt
    region = plan.regions[0]
    cases: list[tuple[Region, str]] = [
        (replace(region, num_parts=1), "1"),
        (replace(region, ops=()), "()"),
        (replace(region, ops=region.ops[::-1]), str(region.ops[::-1])),
        (replace(region, ops=(*region.ops[:-1], len(graph.ops))), f"op {len(graph.ops)}"),
        (replace(region, splits=region.splits[1:]), f"{len(region.ops) - 1} splits"),
        (replace(region, splits=(*region.splits[:-1], 7)), "split 7"),
        (replace(region, num_parts=9), "9 parts of dimensions [8]"),
    ]
    for broken, found in cases:
        with pytest.raises(PlanError, match="region 0 is broken") as error:
            check_plan(replace(plan, regions=(broken, *plan.regions[1:])), graph)
        assert error.value.found == found
    with pytest.raises(PlanError, match="region 1 is broken") as error:
        check_plan(replace(plan, regions=(region, region)), graph)
    assert error.value.found == f"op {region.ops[0]} is in two"


def test_a_plan_of_another_graph_is_refused() -> None:
    graph, plan = hand_plan()
    other = replace(graph, outputs=graph.outputs[:-1])
    with pytest.raises(PlanError, match="made for another graph") as error:
        check_plan(plan, other)
    assert other.fingerprint in error.value.expected and plan.fingerprint in error.value.found
    with pytest.raises(PlanError, match="estimate makes no sense"):
        check_plan(replace(plan, estimate=replace(plan.estimate, peak_mb=float("nan"))), graph)
    with pytest.raises(PlanError, match="hidden_under is not the order"):
        hidden = {target: ops[::-1] for target, ops in plan.hidden_under.items()}
        check_plan(replace(plan, hidden_under=hidden), graph)


def test_partial_sums_have_to_be_joined() -> None:
    """The experts' weight gradients of a capacity pipeline."""
    graph, costs = gpt_step(2)
    plan = CapacityPipelining(degree=2).make(graph, costs, QUICK)
    partial = next(i for i in plan.instructions if isinstance(i, Join) and i.axis == PARTIAL)
    with pytest.raises(PlanError) as error:
        check_plan(moved(plan, lambda i: i.remove(partial)), graph)
    assert "parts" in error.value.found and partial.tensor in str(error.value)
