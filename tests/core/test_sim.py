from __future__ import annotations

import numpy as np
import pytest

from llmsys.core.errors import InputError, PlanError
from llmsys.core.sim import EventLoop, FairShareLink, LaneOp, poisson_arrivals_ms, run_lanes
from llmsys.core.timeline import Timeline


def op(op_id: object, lane: str, duration: float, *depends_on: object, kind: str = "") -> LaneOp:
    return LaneOp(op_id=op_id, lane=lane, duration_ms=duration, depends_on=depends_on, kind=kind)


def times(timeline: Timeline) -> dict[str, tuple[float, float]]:
    return {span.name: (span.start_ms, span.end_ms) for span in timeline.spans}


def pipeline_1f1b(num_stages: int, num_micro_batches: int, fw: float, bw: float) -> dict[str, list[LaneOp]]:
    lanes = {}
    for s in range(num_stages):
        warmup = min(num_stages - s, num_micro_batches)
        order = [("F", m) for m in range(warmup)]
        for m in range(num_micro_batches):
            order.append(("B", m))
            if m + warmup < num_micro_batches:
                order.append(("F", m + warmup))
        ops = []
        for kind, m in order:
            if kind == "F":
                needs = [("F", m, s - 1)] if s else []
            else:
                needs = [("B", m, s + 1)] if s + 1 < num_stages else [("F", m, s)]
            ops.append(op((kind, m, s), f"stage{s}", fw if kind == "F" else bw, *needs, kind=kind))
        lanes[f"stage{s}"] = ops
    return lanes


def test_order_lane_and_dependencies_set_the_start() -> None:
    timeline = run_lanes(
        {
            "b": [op("b0", "b", 1.0, "a1"), op("b1", "b", 5.0)],
            "a": [op("a0", "a", 2.0), op("a1", "a", 3.0), op("a2", "a", 1.0, "b1", "a1")],
            "empty": [],
        }
    )
    assert times(timeline) == {"a0": (0, 2), "a1": (2, 5), "b0": (5, 6), "b1": (6, 11), "a2": (11, 12)}
    assert timeline.lanes == ("b", "a", "empty")
    assert run_lanes({}).spans == ()


def test_name_kind_and_args_reach_the_span() -> None:
    ops = [LaneOp(op_id=("F", 0), lane="a", duration_ms=1, kind="forward", name="F0", args=(("mb", 0),))]
    (span,) = run_lanes({"a": [*ops]}).spans
    assert (span.name, span.kind, span.args) == ("F0", "forward", (("mb", 0),))


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(1, 3), (2, 2), (4, 4), (4, 9), (3, 1)])
def test_1f1b_has_its_textbook_makespan_and_bubble(num_stages: int, num_micro_batches: int) -> None:
    timeline = run_lanes(pipeline_1f1b(num_stages, num_micro_batches, fw=1.0, bw=2.0))
    assert timeline.makespan_ms == pytest.approx((num_micro_batches + num_stages - 1) * 3.0)
    bubble = (num_stages - 1) / (num_micro_batches + num_stages - 1)
    assert timeline.bubble_fraction() == pytest.approx(bubble)


def test_random_graphs_agree_with_the_definition() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        lanes: dict[str, list[LaneOp]] = {"a": [], "b": [], "c": []}
        for number in range(60):
            lane = str(rng.choice(list(lanes)))
            needs = rng.choice(number, size=min(number, int(rng.integers(0, 4))), replace=False).tolist()
            # A dependency listed twice must count once.
            lanes[lane].append(op(number, lane, float(rng.integers(0, 5)), *needs, *needs[:1]))
        spans = {int(span.name): span for span in run_lanes(lanes).spans}
        assert len(spans) == 60
        for ops in lanes.values():
            for position, item in enumerate(ops):
                bounds = [spans[int(str(d))].end_ms for d in item.depends_on]
                bounds.append(spans[int(str(ops[position - 1].op_id))].end_ms if position else 0.0)
                assert spans[int(str(item.op_id))].start_ms == max(bounds)


def test_deadlock_names_heads_dependencies_and_cycle() -> None:
    with pytest.raises(PlanError) as caught:
        run_lanes(
            {
                "a": [op("a0", "a", 1.0), op("a1", "a", 1.0, "b1"), op("a2", "a", 1.0)],
                "b": [op("b0", "b", 1.0, "a2"), op("b1", "b", 1.0)],
                "c": [op("c0", "c", 1.0, "a0", "b1")],
                "d": [op("d0", "d", 1.0)],
            }
        )
    assert str(caught.value) == "\n".join(
        [
            "deadlock: 3 of 4 lanes are stuck",
            "  expected: an order of each lane in which every op can run",
            "  found: 2 of 7 ops ran",
            "    lane 'a': head 'a1' waits for 'b1' (1 behind the head of lane 'b')",
            "    lane 'b': head 'b0' waits for 'a2' (1 behind the head of lane 'a')",
            "    lane 'c': head 'c0' waits for 'b1' (1 behind the head of lane 'b')",
            "    cycle of lanes: 'a' -> 'b' -> 'a'",
            "  fix: reorder one lane of the cycle so that the op which is waited for comes before its head",
            "a | a0 [a1] a2",
            "b | [b0] b1",
            "c | [c0]",
        ]
    )


def test_deadlock_of_an_op_with_its_own_lane_and_of_two_cycles() -> None:
    with pytest.raises(PlanError, match="cycle of lanes: 'a' -> 'a'"):
        run_lanes({"a": [op(0, "a", 1.0, 1), op(1, "a", 1.0)]})
    with pytest.raises(PlanError, match=r"0 \(the head of lane 'a'\)"):
        run_lanes({"a": [op(0, "a", 1.0, 0)]})
    with pytest.raises(PlanError) as caught:
        run_lanes({lane: [op(lane, lane, 1.0, needs)] for lane, needs in zip("abcd", "badc", strict=True)})
    assert caught.value.found.count("cycle of lanes") == 2


def test_broken_lists() -> None:
    with pytest.raises(PlanError, match="list of another lane"):
        run_lanes({"a": [op(0, "b", 1.0)]})
    with pytest.raises(PlanError, match="given twice"):
        run_lanes({"a": [op(0, "a", 1.0)], "b": [op(0, "b", 1.0)]})
    with pytest.raises(PlanError, match="no lane runs"):
        run_lanes({"a": [op(0, "a", 1.0, "ghost")]})
    for duration in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="impossible duration"):
            op(0, "a", duration)


def test_twenty_thousand_ops() -> None:
    lanes = pipeline_1f1b(8, 1250, fw=1.0, bw=2.0)
    assert sum(map(len, lanes.values())) == 20_000
    # 1F1B: every micro-batch takes fw + bw on a stage, and filling and draining the other stages costs that once each.
    assert run_lanes(lanes).makespan_ms == pytest.approx((1250 + 8 - 1) * 3.0)


def test_event_loop_order_and_until() -> None:
    loop, seen = EventLoop(), []
    loop.schedule(5, lambda: seen.append("late"))
    loop.schedule(1, lambda: (seen.append("first"), loop.schedule(1, lambda: seen.append("third")))[0])
    loop.schedule(1, lambda: seen.append("second"))
    assert loop.run(until_ms=1) == 1
    assert seen == ["first", "second", "third"], "equal times run in order of scheduling"
    assert loop.run(until_ms=4) == 4
    assert seen[-1] == "third"
    assert loop.run() == 5
    assert seen[-1] == "late"
    for at_ms in (4.9, float("nan"), float("inf")):
        with pytest.raises(InputError, match="cannot be scheduled"):
            loop.schedule(at_ms, lambda: None)


def transfers(capacity: float, *jobs: tuple[float, float, float]) -> list[float]:
    """Finish times of jobs (start_ms, size in MB of 10^6 bytes, cap in GB/s; 0 for none) on one link."""
    loop = EventLoop()
    link = FairShareLink(loop, capacity_gb_per_s=capacity)
    finish = [-1.0] * len(jobs)

    def begin(number: int, size_mb: float, cap: float) -> None:
        limit = {"max_gb_per_s": cap} if cap else {}
        link.start(size_mb * 1e6, lambda: finish.__setitem__(number, loop.now_ms), **limit)

    for number, (start, size, cap) in enumerate(jobs):
        loop.schedule(start, lambda number=number, size=size, cap=cap: begin(number, size, cap))
    loop.run()
    assert link.num_active == 0
    return finish


@pytest.mark.parametrize(
    ("jobs", "wanted"),
    [
        # The link passes 1 MB a millisecond.
        ([(0, 10, 0)], [10]),
        ([(0, 10, 0), (0, 10, 0)], [20, 20]),
        # Alone for 4 ms (6 left), together 12 ms, then the second alone for its last 4.
        ([(0, 10, 0), (4, 10, 0)], [16, 20]),
        # Together until the small one is through at 6, then alone.
        ([(0, 10, 0), (0, 3, 0)], [13, 6]),
        ([(0, 3, 0), (10, 5, 0)], [3, 15]),
        ([(0, 4, 0), (0, 4, 0), (0, 4, 0), (0, 4, 0)], [16] * 4),
        # The capped one takes a quarter, the other the rest.
        ([(0, 10, 0.25), (0, 7.5, 0)], [40, 10]),
        ([(0, 10, 0.5)], [20]),
        # Caps of 0.1 and 0.8 beside a free one: 0.1, 0.45, 0.45.
        ([(0, 1, 0.1), (0, 4.5, 0.8), (0, 4.5, 0)], [10, 10, 10]),
        ([(2, 0, 0)], [2]),
        ([(0, 10, 0), (5, 0, 0)], [10, 5]),
    ],
)
def test_fair_share_closed_forms(jobs: list[tuple[float, float, float]], wanted: list[float]) -> None:
    assert transfers(1.0, *jobs) == pytest.approx(wanted)


def test_fair_share_conserves_work() -> None:
    rng = np.random.default_rng(0)
    jobs = [(float(rng.uniform(0, 10)), float(rng.uniform(10, 20)), 0.0) for _ in range(50)]
    finish = transfers(2.0, *jobs)
    # Busy from the first start to the end, as the work never runs out before the last arrival.
    total_ms = sum(size for _, size, _ in jobs) / 2.0
    assert max(finish) == pytest.approx(min(start for start, _, _ in jobs) + total_ms)
    assert all(end >= start + size / 2.0 for end, (start, size, _) in zip(finish, jobs, strict=True))


def test_transfers_can_start_transfers_and_report_in_order() -> None:
    loop = EventLoop()
    link = FairShareLink(loop, capacity_gb_per_s=1.0)
    seen: list[tuple[str, float]] = []
    link.start(
        1e6,
        lambda: (seen.append(("a", loop.now_ms)), link.start(1e6, lambda: seen.append(("c", loop.now_ms)))),
    )
    link.start(1e6, lambda: seen.append(("b", loop.now_ms)))
    loop.run()
    assert seen == [("a", 2.0), ("b", 2.0), ("c", 3.0)]


def test_late_transfers_end_in_spite_of_rounding() -> None:
    # At 1e9 ms one step of a float is 1e-7 ms, more than the transfer takes.
    assert transfers(100.0, (1e9, 1e-6, 0), (1e9, 1.0, 0)) == pytest.approx([1e9, 1e9 + 0.01])


def test_bad_link_values() -> None:
    with pytest.raises(InputError, match="capacity_gb_per_s"):
        FairShareLink(EventLoop(), capacity_gb_per_s=0.0)
    link = FairShareLink(EventLoop(), capacity_gb_per_s=1.0)
    with pytest.raises(InputError, match="transfer size"):
        link.start(-1.0, lambda: None)
    with pytest.raises(InputError, match="max_gb_per_s"):
        link.start(1.0, lambda: None, max_gb_per_s=0.0)


def test_poisson_arrivals() -> None:
    arrivals = poisson_arrivals_ms(rate_per_s=50.0, num_arrivals=20_000, seed=3)
    assert arrivals.shape == (20_000,) and (np.diff(arrivals) >= 0).all() and arrivals[0] > 0
    gaps = np.diff(arrivals)
    assert gaps.mean() == pytest.approx(20.0, rel=0.03)
    assert gaps.std() == pytest.approx(20.0, rel=0.05), "exponential gaps: deviation equals mean"
    assert (arrivals == poisson_arrivals_ms(rate_per_s=50.0, num_arrivals=20_000, seed=3)).all()
    assert (arrivals[:10] != poisson_arrivals_ms(rate_per_s=50.0, num_arrivals=10, seed=4)).any()
    assert poisson_arrivals_ms(rate_per_s=1.0, num_arrivals=0, seed=0).shape == (0,)
    with pytest.raises(InputError, match="rate_per_s"):
        poisson_arrivals_ms(rate_per_s=0.0, num_arrivals=1, seed=0)
    with pytest.raises(InputError, match="number of arrivals"):
        poisson_arrivals_ms(rate_per_s=1.0, num_arrivals=-1, seed=0)
