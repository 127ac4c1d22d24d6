"""The paper's rule against a search for paths, and what can be moved against moving it."""

from __future__ import annotations

import time

import numpy as np
import pytest

from llmsys.lancet.graph import Graph, Op, Tensor
from llmsys.lancet.labelling import find_candidates, label
from llmsys.lancet.ordering import defer
from tests.lancet.steps import all_to_all, moe_backward, op, random_step


def reaches(graph: Graph, first: int, second: int) -> bool:
    """Depth-first search along tensors."""
    stack, seen = [first], {first}
    while stack:
        at = stack.pop()
        if at == second:
            return True
        for tensor in graph.ops[at].outputs:
            for user in graph.consumers[tensor.name]:
                if user not in seen:
                    seen.add(user)
                    stack.append(user)
    return False


@pytest.mark.parametrize("seed", range(25))
def test_label_is_no_path_either_way_in_the_phase(seed: int) -> None:
    graph, _ = random_step(np.random.default_rng(seed), 35)
    all_to_alls, sets = label(graph)
    assert all_to_alls == tuple(i for i in graph.comm_ops("all_to_all") if graph.ops[i].phase == "backward")
    for index, found in enumerate(graph.ops):
        for j, target in enumerate(all_to_alls):
            free = (
                found.phase == "backward"
                and found.kind == "compute"
                and not reaches(graph, index, target)
                and not reaches(graph, target, index)
            )
            assert bool(sets[index] >> j & 1) == free, (index, target)


@pytest.mark.parametrize("seed", range(25))
def test_every_movable_unit_runs_directly_after_the_start(seed: int) -> None:
    """One at a time: behind the all-to-all come only the unit and what it needs; no all-to-all or random op moves."""
    graph, costs = random_step(np.random.default_rng(100 + seed), 50)
    candidates = find_candidates(graph, [costs.op_ms(graph, found) for found in graph.ops])
    fixed = [i for i in graph.select("backward") if graph.ops[i].kind == "all_to_all" or graph.ops[i].random]
    for target, units, labelled in zip(candidates.all_to_alls, candidates.movable, candidates.labelled, strict=True):
        assert set(units) <= set(labelled)
        for unit in units:
            ops = candidates.units[unit].ops
            order, hidden = defer(graph, "backward", {target: ops})
            assert sorted(order) == sorted(graph.select("backward"))
            position = {index: place for place, index in enumerate(order)}
            for index in order:
                same = [i for i in graph.predecessors[index] if graph.ops[i].phase == "backward"]
                assert all(position[i] < position[index] for i in same)
            assert [i for i in order if i in set(fixed)] == fixed
            assert set(ops) <= set(hidden[target])
            behind = [i for i in order[position[target] + 1 :] if not graph.ops[i].is_comm]
            assert tuple(behind[: len(hidden[target])]) == hidden[target]


def test_a_weight_gradient_moves_with_its_cast_and_its_view() -> None:
    graph, costs = moe_backward()
    names = [found.name for found in graph.ops]
    candidates = find_candidates(graph, [costs.op_ms(graph, found) for found in graph.ops])
    units = {names[u.seed]: ([names[i] for i in u.ops], u.duration_ms) for u in candidates.units}
    assert units == {
        "dw2": (["view2", "dw2", "cast2"], 5.0),
        "dw1": (["dw1", "cast1"], 3.5),
    }
    found = [[names[candidates.units[u].seed] for u in units] for units in candidates.movable]
    assert dict(zip([names[a] for a in candidates.all_to_alls], found, strict=True)) == {
        "a1": ["dw2"],
        "a0": ["dw2", "dw1"],
    }


def test_a_unit_that_needs_a_later_collective_is_labelled_but_not_movable() -> None:
    ops = (
        op("d1", "x"),
        all_to_all("a", "d1"),
        op("s", "x"),
        op("sum", "s", kind="collective"),
        op("after_sum", "sum"),
        op("d0", "a"),
    )
    graph = Graph(name="late", inputs=(Tensor(name="x", shape=(1,)),), ops=ops, outputs=("d0", "after_sum"))
    candidates = find_candidates(graph, [1.0] * len(ops))
    seeds = [graph.ops[unit.seed].name for unit in candidates.units]
    assert [seeds[u] for u in candidates.labelled[0]] == ["s", "after_sum"]
    assert [seeds[u] for u in candidates.movable[0]] == ["s"]


def test_a_cheap_consumer_that_could_hide_more_is_a_unit_of_its_own() -> None:
    """The gate's weight gradient under the second all-to-all, its branch only under the first."""
    ops = (
        op("d", "x"),
        all_to_all("a1", "d"),
        op("branch", "d"),
        op("dw", "branch"),
        op("e", "a1", "branch"),
        all_to_all("a2", "e"),
        op("d0", "a2"),
    )
    graph = Graph(name="gate", inputs=(Tensor(name="x", shape=(1,)),), ops=ops, outputs=("d0", "dw"))
    candidates = find_candidates(graph, [0.1 if found.name == "dw" else 1.0 for found in ops])
    seeds = [graph.ops[unit.seed].name for unit in candidates.units]
    found = [[seeds[unit] for unit in units] for units in candidates.movable]
    assert found == [["branch", "dw"], ["dw"]]


def test_thousands_of_ops_are_labelled_quickly() -> None:
    """A chain with a weight gradient at each link: 8000 ops, 100 all-to-alls, a second or so."""
    ops: list[Op] = []
    last = "x"
    for number in range(4000):
        if number % 40 == 20:
            ops.append(all_to_all(f"a{number}", last))
            last = f"a{number}"
        ops.append(op(f"d{number}", last))
        ops.append(op(f"w{number}", last, "x"))
        last = f"d{number}"
    graph = Graph(name="long", inputs=(Tensor(name="x", shape=(1,)),), ops=tuple(ops), outputs=(last,))
    begin = time.process_time()
    candidates = find_candidates(graph, [1.0] * len(ops))
    assert time.process_time() - begin < 20
    assert len(candidates.all_to_alls) == 100
    assert [len(units) for units in candidates.movable] == list(range(20, 4000, 40))
