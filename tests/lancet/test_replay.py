"""Replay of measured times: hand-made records of a step whose lanes are known."""

from __future__ import annotations

import pytest

from llmsys.core.errors import InputError
from llmsys.lancet.costs import TableCosts
from llmsys.lancet.graph import Graph, Tensor
from llmsys.lancet.plan import Instruction, Plan, Run, Start, Wait
from llmsys.lancet.runtime.measure import Recorded
from llmsys.lancet.runtime.replay import replay
from llmsys.lancet.simulator import simulate
from tests.lancet.fx_plans import plan_of
from tests.lancet.steps import all_to_all, op

GRAPH = Graph(
    name="two messages",
    inputs=(Tensor(name="x", shape=(25, 10)),),
    ops=(op("a", "x"), all_to_all("c", "a"), all_to_all("e", "a"), op("b", "a"), op("d", "c", "e")),
    outputs=("d", "b"),
)
A, C, E, B, D = range(5)
PLAN: Plan = plan_of(GRAPH, [Run(op=A), Start(op=C), Start(op=E), Run(op=B), Wait(op=C), Wait(op=E), Run(op=D)])
COSTS = TableCosts(ops_ms={"a": 1.0, "b": 1.0, "c": 5.0, "d": 1.0, "e": 5.0})


def recorded(*durations_ms: float) -> list[Recorded]:
    found, at_s = [], 100.0
    for instruction, ms in zip(PLAN.instructions, durations_ms, strict=True):
        found.append(Recorded(label=instruction, start_s=at_s, end_s=at_s + ms / 1e3))
        at_s += ms / 1e3
    return found


def replayed(*durations_ms: float) -> tuple[dict[Instruction, float], float]:
    put_back = replay(GRAPH, PLAN, recorded(*durations_ms), COSTS)
    again = simulate(GRAPH, PLAN, put_back.costs, durations_ms=put_back.durations_ms)
    return dict(put_back.durations_ms), again.step_ms


def test_a_wait_that_blocks_tells_the_end_of_its_message() -> None:
    """Starts end at 11 and 12; both waits block, until 40 and 60: the second message begins where the first ends."""
    found, step_ms = replayed(10.0, 1.0, 1.0, 8.0, 20.0, 20.0, 5.0)
    assert found[Start(op=C)] == pytest.approx(40.0 - 11.0)
    assert found[Start(op=E)] == pytest.approx(60.0 - 40.0)
    assert found[Run(op=B)] == pytest.approx(8.0)
    assert step_ms == pytest.approx(65.0)


def test_a_wait_that_does_not_block_leaves_the_message_its_expected_time() -> None:
    """The first wait begins at 62 and takes 0.01 ms: a message of 5 ms was long there."""
    found, step_ms = replayed(10.0, 1.0, 1.0, 50.0, 0.01, 0.02, 5.0)
    assert found[Start(op=C)] == pytest.approx(5.0)
    assert found[Start(op=E)] == pytest.approx(5.0)
    assert found[Wait(op=C)] == pytest.approx(0.01)
    assert step_ms == pytest.approx(67.03)


def test_a_message_that_was_faster_than_expected_ends_before_its_wait() -> None:
    found, step_ms = replayed(10.0, 1.0, 1.0, 2.0, 0.01, 0.01, 5.0)
    assert found[Start(op=C)] == pytest.approx(14.0 - 11.0)
    assert found[Start(op=E)] == pytest.approx(0.01)
    assert step_ms == pytest.approx(19.02, abs=0.02)


def test_records_of_another_plan_are_refused() -> None:
    with pytest.raises(InputError, match="not one of this plan"):
        replay(GRAPH, PLAN, recorded(*[1.0] * 7)[:4], COSTS)
