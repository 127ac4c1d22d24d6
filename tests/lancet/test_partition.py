"""The partition search: the dynamic program against brute force, limits, notes, Tutel's ranges, and its time."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from math import ceil, inf, isinf

import numpy as np
import pytest

from llmsys import _C
from llmsys.core.errors import InputError
from llmsys.core.specs import NODES
from llmsys.lancet import axis_csp
from llmsys.lancet.axes import infer_splits
from llmsys.lancet.config import PlannerConfig
from llmsys.lancet.costs import CostModel, TableCosts, cluster_costs
from llmsys.lancet.estimate import Pricer
from llmsys.lancet.graph import Graph
from llmsys.lancet.partition import capacity_region, choose_regions, group_bounds, part_counts, region_ms
from llmsys.lancet.pipeline import walk
from llmsys.lancet.plan import Region
from llmsys.lancet.regions import Prices, emit, layout
from llmsys.lancet.workload import StepConfig, build_step, moe_model
from tests.lancet.mini_moe import BATCH, Builder, mini_step

QUICK = PlannerConfig(axis_solver="propagate")


def costs_of(graph: Graph, *, comm_ms: float = 4.0, overhead_ms: float = 0.05) -> TableCosts:
    times = {op.name: comm_ms if op.is_comm else 1.0 for op in graph.ops}
    return TableCosts(ops_ms=times, part_overhead_ms=overhead_ms)


def oracle_cover(num_groups: int, candidates: Sequence[tuple[int, int, float]]) -> tuple[float, list[int]]:
    """T(n) by recursion over all candidates; of equals the first in the list."""
    best: list[tuple[float, list[int]]] = [(0.0, [])]
    for n in range(1, num_groups + 1):
        found: tuple[float, list[int]] = (inf, [])
        for place, (first, end, cost_ms) in enumerate(candidates):
            if end == n and best[first][0] + cost_ms < found[0]:
                found = (best[first][0] + cost_ms, [*best[first][1], place])
        best.append(found)
    return best[-1]


@pytest.mark.native
def test_the_native_cover_equals_the_oracle_bit_for_bit() -> None:
    draw = random.Random(0)
    num_impossible = 0
    for _ in range(300):
        num_groups = draw.randint(0, 9)
        candidates = []
        for _ in range(draw.randint(0, 30) if num_groups else 0):
            first = draw.randrange(num_groups)
            cost_ms = draw.choice((draw.random(), float(draw.randint(0, 3))))
            candidates.append((first, draw.randint(first + 1, num_groups), cost_ms))
        expected = oracle_cover(num_groups, candidates)
        columns = [np.array([c[i] for c in candidates], dtype=(np.int64, np.int64, np.float64)[i]) for i in range(3)]
        total_ms, chosen = _C.cover_ranges(num_groups, *columns)
        assert (total_ms, chosen.tolist()) == expected
        num_impossible += isinf(total_ms)
    assert 10 < num_impossible < 290


@pytest.mark.native
def test_the_native_cover_refuses_candidates_outside() -> None:
    good = (np.array([0]), np.array([2]), np.array([1.0]))
    assert _C.cover_ranges(2, *good)[0] == 1.0
    with pytest.raises(ValueError, match=r"candidate 0 is \[0, 2\) of 1"):
        _C.cover_ranges(1, *good)
    with pytest.raises(ValueError, match="2 ends"):
        _C.cover_ranges(2, good[0], np.array([1, 2]), good[2])


def oracle_total_ms(graph: Graph, costs: CostModel, config: PlannerConfig) -> tuple[float, tuple[Region, ...]]:
    """T of the whole phase with P from the Python walk, over all ranges of groups and all numbers of parts."""
    ops = graph.select("forward")
    prices = Prices(graph=graph, costs=costs)
    bounds = group_bounds(graph, prices, ops[0], ops[-1], config.group_fraction)

    def walked_ms(first: int, last: int, places: dict[int, int], num_parts: int) -> float:
        if first > last:
            return 0.0
        found = layout(graph, first, last, places)
        return walk(found.pipeline, prices.durations(found, num_parts), num_parts).end_ms

    best: list[tuple[float, tuple[Region, ...]]] = [(0.0, ())]
    for n in range(1, len(bounds)):
        options = []
        for i in range(n):
            first, last = bounds[i], bounds[n] - 1
            if sum(graph.ops[op].kind == "all_to_all" for op in range(first, last + 1)) > 2:
                continue
            options.append((best[i][0] + walked_ms(first, last, {}, 1), best[i][1]))
            found = infer_splits(graph, first, last, solver=config.axis_solver)
            if not found.ops:
                continue
            places = dict(zip(found.ops, found.splits, strict=True))
            before, after = walked_ms(first, found.ops[0] - 1, {}, 1), walked_ms(found.ops[-1] + 1, last, {}, 1)
            for k in range(2, min(found.units, config.max_parts) + 1):
                if ceil(found.units / k) * k <= 1.05 * found.units:
                    inner = walked_ms(found.ops[0], found.ops[-1], places, k)
                    region = Region(num_parts=k, ops=found.ops, splits=found.splits)
                    options.append((best[i][0] + (before + inner + after), (*best[i][1], region)))
        best.append(min(options, key=lambda option: (option[0], len(option[1]))))
    return best[-1]


def planned_ms(graph: Graph, costs: CostModel, regions: Sequence[Region]) -> float:
    """Of the forward: regions, and around them everything whole, waiting for each communication at once."""
    total_ms, done = 0.0, 0
    prices = Prices(graph=graph, costs=costs)
    for region in regions:
        total_ms += sum(prices.op_ms(op) for op in range(done, region.ops[0])) + region_ms(graph, region, costs)
        done = region.ops[-1] + 1
    return total_ms + sum(prices.op_ms(op) for op in range(done, len(graph.select("forward"))))


@pytest.mark.parametrize("is_token_major", [True, False])
@pytest.mark.parametrize("comm_ms", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("overhead_ms", [0.0, 0.1, 0.4])
def test_the_regions_are_as_fast_as_the_best_of_all_ranges(
    is_token_major: bool, comm_ms: float, overhead_ms: float
) -> None:
    graph = mini_step(2, is_token_major=is_token_major)
    costs = costs_of(graph, comm_ms=comm_ms, overhead_ms=overhead_ms)
    regions, _ = choose_regions(graph, costs, QUICK)
    best_ms, _ = oracle_total_ms(graph, costs, QUICK)
    assert planned_ms(graph, costs, regions) == pytest.approx(best_ms, rel=1e-12)


def test_long_all_to_alls_are_pipelined_with_what_is_around_them() -> None:
    graph = mini_step(2)
    costs = costs_of(graph, comm_ms=6.0)
    regions, notes = choose_regions(graph, costs, QUICK)
    assert notes == ()
    assert [sum(graph.ops[op].is_comm for op in region.ops) for region in regions] == [2, 2]
    for layer, region in enumerate(regions):
        names = {graph.ops[op].name for op in region.ops}
        assert {f"l{layer}.gate", f"l{layer}.experts", f"l{layer}.combine"} <= names
        assert region.ops[0] < graph.index_of[f"l{layer}.gate"]
        assert 2 <= region.num_parts <= 8 and BATCH % region.num_parts == 0
    assert planned_ms(graph, costs, regions) < 0.8 * planned_ms(graph, costs, ())
    assert choose_regions(graph, costs, replace(QUICK, axis_solver="cp_sat")) == (regions, notes)


def test_no_more_parts_than_asked_for() -> None:
    graph = mini_step(2)
    costs = costs_of(graph, comm_ms=6.0, overhead_ms=0.0)
    assert max(region.num_parts for region in choose_regions(graph, costs, QUICK)[0]) > 2
    limited, _ = choose_regions(graph, costs, replace(QUICK, max_parts=2))
    assert {region.num_parts for region in limited} == {2}
    assert choose_regions(graph, costs, replace(QUICK, max_parts=1))[0] == ()


def test_a_gate_that_needs_the_whole_batch_is_named() -> None:
    graph = mini_step(2, is_token_major=False)
    regions, notes = choose_regions(graph, costs_of(graph), QUICK)
    assert notes == ("l0.gate (gate), l1.gate (gate) cannot be split: only ops after it are pipelined",)
    assert [graph.ops[region.ops[0]].name for region in regions] == ["l0.dispatch", "l1.dispatch"]


def test_a_step_that_parts_would_slow_down_stays_whole() -> None:
    graph = mini_step(1)
    regions, notes = choose_regions(graph, costs_of(graph, overhead_ms=10.0), QUICK)
    assert regions == ()
    assert notes == ("no range around l0.to_experts, l0.from_experts is faster in parts: not pipelined",)


def test_an_all_to_all_without_splits_is_named() -> None:
    graph = mini_step(1)
    ops = tuple(replace(op, splits=()) if op.name == "l0.from_experts" else op for op in graph.ops)
    graph = Graph(name="mini", inputs=graph.inputs, ops=ops, outputs=graph.outputs)
    _, notes = choose_regions(graph, costs_of(graph), QUICK)
    assert "l0.from_experts cannot be split: not pipelined" in notes


def test_a_step_without_all_to_alls_has_no_regions() -> None:
    b = Builder()
    b.op("only", [b.given("x", 8, 8)], [(8, 8)], [((0,), (0,))])
    graph = b.graph("only")
    assert choose_regions(graph, costs_of(graph), QUICK) == ((), ())
    assert choose_regions(graph, costs_of(graph), QUICK, phase="backward") == ((), ())


def test_mixed_phases_are_refused() -> None:
    graph = mini_step(1)
    ops = tuple(replace(op, phase="backward") if op.name == "l0.experts" else op for op in graph.ops)
    mixed = Graph(name="mixed", inputs=graph.inputs, ops=ops, outputs=graph.outputs)
    with pytest.raises(InputError, match="mixes its phases") as caught:
        choose_regions(mixed, costs_of(mixed), QUICK)
    assert "'l0.experts'" in str(caught.value)


def test_the_estimate_of_a_region_is_that_of_the_plan() -> None:
    graph = mini_step(2)
    costs = costs_of(graph, comm_ms=6.0)
    pricer = Pricer(graph, costs)
    regions, _ = choose_regions(graph, costs, QUICK)
    for region in regions:
        assert region_ms(graph, region, costs) == pricer.run(emit(graph, 0, region, costs), [region]).step_ms


def test_groups_end_at_all_to_alls_and_when_they_are_full() -> None:
    graph = mini_step(2)
    costs = costs_of(graph)
    bounds = group_bounds(graph, Prices(graph=graph, costs=costs), 0, len(graph.ops) - 1, 0.2)
    comm = graph.comm_ops()
    assert {*comm, *(op + 1 for op in comm)} <= set(bounds)
    # Between the layers are 11 ops of 1 ms and 2 views: a fifth of that is 2.2 ms, so three ops fill a group.
    starts = [graph.ops[bound].name for bound in bounds if comm[1] < bound < comm[2]]
    assert starts == ["l0.combine", "l1.cube", "l1.cast", "l1.loss"]


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_capacity_regions_are_the_range_between_two_all_to_alls(phase: str) -> None:
    graph = mini_step(1, has_backward=True)
    first, second = graph.comm_ops()[:2] if phase == "forward" else graph.comm_ops()[2:]
    region = capacity_region(graph, first, second, 4)
    assert region is not None
    assert region.num_parts == 4 and (region.ops[0], region.ops[-1]) == (first, second)
    assert capacity_region(graph, first, second, 1) is None
    assert capacity_region(graph, first, second, 17) is None
    assert capacity_region(graph, first, second, 16) is not None


def test_parts_are_nearly_equal() -> None:
    assert part_counts(24, 8) == [2, 3, 4, 5, 6, 8]
    assert part_counts(5, 8) == [5]
    assert part_counts(4096, 8) == [2, 3, 4, 5, 6, 7, 8]
    assert part_counts(1, 8) == []


def test_notes_name_six_ops_and_count_the_rest() -> None:
    graph = mini_step(4)
    _, notes = choose_regions(graph, costs_of(graph, overhead_ms=10.0), QUICK)
    names = ", ".join(f"l{layer}.{way}_experts" for layer in range(3) for way in ("to", "from"))
    assert notes == (f"no range around {names} and 2 more is faster in parts: not pipelined",)


def test_a_model_of_24_layers_is_planned_in_20_seconds_of_one_core() -> None:
    graph = build_step(StepConfig(model=moe_model("gpt2_l_moe"), num_gpus=16, batch_per_gpu=24, gate="switch"))
    costs = cluster_costs(NODES["p4de"], 16, arithmetic="tf32")
    axis_csp.solve.cache_clear()
    began = time.process_time()
    regions, _ = choose_regions(graph, costs, PlannerConfig())
    assert time.process_time() - began < 20.0
    assert len(regions) == 12
    assert axis_csp.solve.cache_info().hits > 3 * axis_csp.solve.cache_info().misses
