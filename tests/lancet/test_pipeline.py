"""The stage pipeline: times worked out by hand, equality with C++, and a second simulation of random ranges."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from llmsys import _C
from llmsys.lancet.axis_csp import AFTER, BEFORE, SPLIT
from llmsys.lancet.pipeline import COMPUTE, Durations, Pipeline, Step, end_times, walk
from llmsys.lancet.plan import WHOLE


def pipeline(
    roles: tuple[int, ...],
    lanes: tuple[int, ...],
    *,
    waits: dict[int, tuple[int, ...]] | None = None,
    slices: dict[int, tuple[int, ...]] | None = None,
    joins: tuple[int, ...] = (),
    uses: dict[int, tuple[int, ...]] | None = None,
) -> Pipeline:
    lists = [tuple((of or {}).get(op, ()) for op in range(len(roles))) for of in (waits, slices, uses)]
    return Pipeline(roles=roles, lanes=lanes, waits=lists[0], slices=lists[1], joins=joins, uses=lists[2])


def durations(
    ops: tuple[float, ...], slices: tuple[float, ...] = (), joins: tuple[float, ...] = (), launch: float = 0.0
) -> Durations:
    launches = (launch,) * len(ops)
    return Durations(ops_ms=ops, starts_ms=launches, waits_ms=launches, slices_ms=slices, joins_ms=joins)


def texts(steps: tuple[Step, ...]) -> str:
    return " ".join(f"{s.verb}{s.number}" + ("" if s.part == WHOLE else f".{s.part}") for s in steps)


# gate, all-to-all, experts, all-to-all, combine
LAYER = pipeline(
    (SPLIT,) * 5, (COMPUTE, 0, COMPUTE, 0, COMPUTE), waits={2: (1,), 4: (3,)}, slices={0: (0,)}, joins=(0, 4)
)


def test_two_parts_of_a_layer() -> None:
    # gate 0-1 1-2; first all-to-all 1-5 5-9; experts 5-7 9-11; second 9-13 13-17; combine 13-14 17-18
    found = walk(LAYER, durations((1.0, 4.0, 2.0, 4.0, 1.0), (0.0,), (0.0, 0.0)), 2)
    assert found.end_ms == 18.0
    assert texts(found.steps) == (
        "slice0 run0.0 start1.0 run0.1 start1.1 join0 wait1.0 run2.0 start3.0 wait1.1 run2.1 start3.1 "
        "wait3.0 run4.0 wait3.1 run4.1 join1"
    )


def test_a_join_is_put_where_the_compute_lane_waits_anyway() -> None:
    # The first wait leaves 2 to 5 idle, the next ones 7 to 9 and 11 to 13.
    times = durations((1.0, 4.0, 2.0, 4.0, 1.0), (0.0,), (2.5, 0.5))
    assert walk(LAYER, times, 2).end_ms == 18.5
    assert walk(LAYER, replace(times, joins_ms=(3.0, 0.5)), 2).end_ms == 18.5  # fits exactly
    longer = walk(LAYER, replace(times, joins_ms=(3.5, 0.5)), 2)
    assert longer.end_ms == 22.0  # fits nowhere, so it comes at the end and before the other
    assert texts(longer.steps).endswith("run4.1 join0 join1")


def test_a_join_comes_before_the_op_that_needs_it() -> None:
    ops = pipeline(
        (SPLIT, SPLIT, AFTER, AFTER), (COMPUTE,) * 4, joins=(0, 1), uses={3: (1,)}
    )  # nothing waits: join 0 comes last
    found = walk(ops, durations((1.0, 1.0, 1.0, 1.0), (), (0.25, 0.5)), 2)
    assert texts(found.steps) == "run0.0 run1.0 run0.1 run1.1 run2 join1 run3 join0"
    assert found.end_ms == 6.75


def test_a_range_that_begins_with_communication_starts_all_of_its_parts_first() -> None:
    ops = pipeline((SPLIT,) * 3, (0, COMPUTE, 0), waits={1: (0,)}, slices={0: (0,)}, joins=(2,))
    found = walk(ops, durations((4.0, 3.0, 4.0), (0.5,), (0.25,), launch=0.125), 2)
    assert (
        texts(found.steps)
        == "slice0 start0.0 start0.1 wait0.0 run1.0 start2.0 wait0.1 run1.1 start2.1 wait2.0 wait2.1 join0"
    )
    # transfers 0.625-4.625-8.625; wait and run to 7.75, start to 7.875, transfer 8.625-12.625; wait and run
    # 8.625-8.75-11.75-11.875; transfer 12.625-16.625; its wait to 16.75; join
    assert found.end_ms == 17.0


def test_whole_ops_run_before_and_after() -> None:
    ops = pipeline(
        (SPLIT, BEFORE, AFTER, BEFORE), (COMPUTE, 0, COMPUTE, COMPUTE), waits={3: (1,)}, uses={2: (0,)}, joins=(0,)
    )
    found = walk(ops, durations((1.0, 2.0, 1.0, 1.0), (), (0.5,)), 3)
    assert texts(found.steps) == "start1 wait1 run3 run0.0 run0.1 run0.2 join0 run2"
    assert found.end_ms == 7.5


def test_communication_that_nothing_needs_is_waited_for() -> None:
    found = walk(pipeline((SPLIT, BEFORE), (0, 1)), durations((2.0, 3.0)), 2)
    assert texts(found.steps) == "start1 start0.0 start0.1 wait0.0 wait0.1 wait1"
    assert found.end_ms == 4.0


def random_range(draw: random.Random) -> tuple[Pipeline, int, int]:
    """A pipeline whose ops take what earlier ones make, and its numbers of slices and of joins."""
    num_ops = draw.randint(1, 14)
    roles: list[int] = []
    waits, slices, uses, joins = {}, {}, {}, []
    lanes = [draw.choice((COMPUTE, COMPUTE, 0, 0, 1)) for _ in range(num_ops)]
    join_of: dict[int, int] = {}
    num_slices = 0
    for op in range(num_ops):
        producers = sorted(draw.sample(range(op), min(op, draw.randint(0, 3))))
        least = max((max(roles[p], AFTER if roles[p] == AFTER else BEFORE) for p in producers), default=BEFORE)
        role = max(least, draw.choice((BEFORE, SPLIT, SPLIT, SPLIT, AFTER)))
        roles.append(role)
        waits[op] = tuple(p for p in producers if lanes[p] != COMPUTE and not (role == AFTER and roles[p] == SPLIT))
        if role == SPLIT:
            own = draw.choice((0, 0, 1, 2))
            slices[op] = tuple(range(num_slices, num_slices + own))
            num_slices += own
            if draw.random() < 0.5:
                join_of[op] = len(joins)
                joins.append(op)
        if role == AFTER:
            for p in producers:
                if roles[p] == SPLIT and p not in join_of:
                    join_of[p] = len(joins)
                    joins.append(p)
            uses[op] = tuple(join_of[p] for p in producers if roles[p] == SPLIT)
    made = pipeline(tuple(roles), tuple(lanes), waits=waits, slices=slices, joins=tuple(joins), uses=uses)
    return made, num_slices, len(joins)


def random_times(draw: random.Random, num_ops: int, num_slices: int, num_joins: int) -> Durations:
    def some(count: int, most: float) -> tuple[float, ...]:
        return tuple(draw.choice((0.0, draw.random() * most, draw.random() * most)) for _ in range(count))

    return Durations(
        ops_ms=some(num_ops, 3.0),
        starts_ms=some(num_ops, 0.1),
        waits_ms=some(num_ops, 0.1),
        slices_ms=some(num_slices, 0.5),
        joins_ms=some(num_joins, 1.0),
    )


@pytest.mark.native
def test_native_times_equal_the_walk_bit_for_bit() -> None:
    draw = random.Random(1)
    for _ in range(400):
        ops, num_slices, num_joins = random_range(draw)
        counts = [1, 2, 3, 8]
        rows = [random_times(draw, len(ops.roles), num_slices, num_joins) for _ in counts]
        expected = [walk(ops, row, count).end_ms for row, count in zip(rows, counts, strict=True)]
        assert end_times(ops, rows, counts) == expected


def test_steps_replayed_on_lanes_end_when_the_walk_says_and_in_a_valid_order() -> None:
    draw = random.Random(2)
    for _ in range(200):
        ops, num_slices, num_joins = random_range(draw)
        times, num_parts = random_times(draw, len(ops.roles), num_slices, num_joins), draw.randint(1, 4)
        found = walk(ops, times, num_parts)
        assert sorted(found.steps, key=str) == sorted(set(found.steps), key=str)
        assert replayed_end(ops, times, num_parts, found.steps) == found.end_ms
        for op, role in enumerate(ops.roles):
            parts = [step.part for step in found.steps if step.verb in ("run", "start") and step.number == op]
            assert parts == (list(range(num_parts)) if role == SPLIT else [WHOLE])


def replayed_end(ops: Pipeline, times: Durations, num_parts: int, steps: tuple[Step, ...]) -> float:
    """Asserts that every step finds what it needs done."""
    now, lanes, ends = 0.0, [0.0] * 2, {}
    done: set[tuple[int, int]] = set()
    joined, cut = set(), set()
    for step in steps:
        key = (step.number, step.part)
        if step.verb in ("run", "start"):
            for producer in ops.waits[step.number]:
                assert (producer, step.part if ops.roles[producer] == SPLIT else WHOLE) in done
            assert joined.issuperset(ops.uses[step.number]) and cut.issuperset(ops.slices[step.number])
        if step.verb == "run":
            now += times.ops_ms[step.number]
            done.add(key)
        elif step.verb == "start":
            now += times.starts_ms[step.number]
            lane = ops.lanes[step.number]
            lanes[lane] = ends[key] = max(now, lanes[lane]) + times.ops_ms[step.number]
        elif step.verb == "wait":
            now = max(now, ends.pop(key)) + times.waits_ms[step.number]
            done.add(key)
        elif step.verb == "slice":
            now += times.slices_ms[step.number]
            cut.add(step.number)
        else:
            assert all((ops.joins[step.number], part) in done for part in range(num_parts))
            now += times.joins_ms[step.number]
            joined.add(step.number)
    assert not ends and len(joined) == len(ops.joins)
    return now


@pytest.mark.native
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"roles": np.array([1, 3])}, "a role must be 0, 1 or 2, got 3"),
        ({"lanes": np.array([-1])}, "got 2 roles and 1 lanes"),
        ({"lanes": np.array([-2, 0])}, "a lane must be in"),
        ({"joins": np.array([2])}, "a join of op 2, of 2 ops"),
        ({"waits": (np.array([0, 1, 1]), np.array([2]))}, "waits must be in"),
        ({"uses": (np.array([0, 2, 1]), np.array([0]))}, "uses: offsets must rise"),
        ({"slices": (np.array([0, 1, 1]), np.array([1]))}, "slice 1 of 1"),
        ({"num_parts": np.array([0])}, "must be positive, got 0"),
        ({"ops_ms": np.zeros((1, 3))}, "ops_ms must have shape"),
    ],
)
def test_native_times_refuse_what_is_inconsistent(changes: dict[str, object], message: str) -> None:
    empty = (np.array([0, 0, 0]), np.array([], dtype=np.int64))
    good: dict[str, object] = {
        "roles": np.array([1, 1]),
        "lanes": np.array([-1, 0]),
        "waits": empty,
        "slices": empty,
        "joins": np.array([0]),
        "uses": empty,
        "num_parts": np.array([2]),
        "ops_ms": np.zeros((1, 2)),
        "starts_ms": np.zeros((1, 2)),
        "waits_ms": np.zeros((1, 2)),
        "slices_ms": np.zeros((1, 1)),
        "joins_ms": np.zeros((1, 1)),
    }
    assert _C.pipeline_times(**good) == [0.0]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        _C.pipeline_times(**(good | changes))  # type: ignore[arg-type]
