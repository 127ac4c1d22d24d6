"""Axes of ranges: what section 5 of the paper says of MoE layers, and equality with brute force on random graphs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmsys.core.errors import ConfigError, InputError
from llmsys.lancet import axis_csp, cp_sat
from llmsys.lancet.axes import Inference, infer_splits, range_problem
from llmsys.lancet.axis_csp import AFTER, BEFORE, SPLIT
from llmsys.lancet.config import AxisSolver
from llmsys.lancet.graph import LAST, PARTIAL, REPLICATED, Graph, is_irregular
from tests.lancet.mini_moe import BATCH, BY_BATCH, CAPACITY, LOCAL_ROWS, ROWS, TOKENS, Builder, mini_step, places

SOLVERS: tuple[AxisSolver, ...] = ("cp_sat", "propagate")
both_solvers = pytest.mark.parametrize("solver", SOLVERS)


def infer(graph: Graph, first: str, last: str, solver: AxisSolver) -> Inference:
    return infer_splits(graph, graph.index_of[first], graph.index_of[last], solver=solver)


@both_solvers
def test_a_whole_layer_is_cut_along_the_batch_and_irregularly_between_the_all_to_alls(solver: AxisSolver) -> None:
    graph = mini_step(1)
    found = infer(graph, "l0.norm", "head", solver)
    chosen = places(graph, found.ops, found.splits)
    whole = {"l0.cast", "l0.loss"}
    assert set(chosen) == {op.name for op in graph.ops} - whole
    assert chosen["l0.residual"] == ((0, 0), (0,))
    assert chosen["l0.out"] == ((0, REPLICATED), (0,))
    assert chosen["l0.gate"] == ((0, REPLICATED), (0, 0, LAST))
    assert chosen["l0.to_experts"] == chosen["l0.from_experts"] == ((ROWS,), (ROWS,))
    assert chosen["l0.experts"] == ((LOCAL_ROWS, REPLICATED), (LOCAL_ROWS,))
    assert (found.units, found.stopped_by) == (BATCH, None)


@both_solvers
@pytest.mark.parametrize("last", ["l0.from_experts", "head"])
def test_from_the_first_all_to_all_on_only_the_capacity_can_be_cut(solver: AxisSolver, last: str) -> None:
    graph = mini_step(1)
    found = infer(graph, "l0.to_experts", last, solver)
    chosen = places(graph, found.ops, found.splits)
    assert list(chosen) == ["l0.to_experts", "l0.to_local", "l0.experts", "l0.to_senders", "l0.from_experts"]
    assert chosen["l0.to_local"] == ((1,), (2,))
    assert found.units == CAPACITY


@both_solvers
def test_before_the_gate_nothing_is_cut_where_the_gate_needs_the_whole_batch(solver: AxisSolver) -> None:
    graph = mini_step(1, is_token_major=False)
    found = infer(graph, "l0.norm", "head", solver)
    assert found.stopped_by == graph.index_of["l0.gate"]
    assert graph.ops[found.ops[0]].name == "l0.dispatch" and graph.ops[found.ops[-1]].name == "head"
    assert places(graph, found.ops, found.splits)["l0.combine"] == ((ROWS, 0, 0), (0,))
    assert found.units == TOKENS


@both_solvers
def test_every_all_to_all_of_the_range_is_split_or_nothing_is(solver: AxisSolver) -> None:
    b = Builder()
    sent = b.op("dispatch", [b.given("x", 8, 4)], [(4, 16, 16)], [((0,), (ROWS,))])
    there = b.exchange("first", sent)
    mixed = b.op("mix", [there], [(4, 16, 16)])
    b.exchange("second", mixed)
    graph = b.graph("second")
    assert infer(graph, "dispatch", "first", solver).ops == (0, 1)
    assert infer(graph, "dispatch", "second", solver).ops == ()
    assert infer(graph, "dispatch", "dispatch", solver).ops == ()
    assert infer(graph, "second", "second", solver).ops == (3,)


@both_solvers
def test_weight_gradients_between_all_to_alls_are_sums_of_the_parts(solver: AxisSolver) -> None:
    graph = mini_step(1, has_backward=True)
    found = infer(graph, "l0.from_experts.dx", "l0.to_experts.dx", solver)
    chosen = places(graph, found.ops, found.splits)
    assert chosen["l0.experts.dw"] == ((2, 2), (PARTIAL,))
    assert len(chosen) == 6


@both_solvers
def test_random_ops_keep_their_order(solver: AxisSolver) -> None:
    b = Builder()
    x = b.op("early", [b.given("x", 16, 16)], [(16, 16)], BY_BATCH, random=True)
    noise = b.op("noise", [b.given("z", 4)], [(4,)], random=True)
    y = b.op("sent", [x], [(4, 16, 16)], [((0,), (ROWS,))])
    there = b.exchange("there", y)
    b.op("last", [there, noise], [(4, 16, 16)], [((ROWS, REPLICATED), (ROWS,))])
    # "last" needs "noise" before the parts, and then "early" may not be in parts.
    found = infer(b.graph("last"), "early", "last", solver)
    assert found.ops in ((2, 3, 4), (0, 2, 3))
    assert len(found.ops) == 3


@both_solvers
def test_all_cut_dimensions_are_multiples_of_the_smallest(solver: AxisSolver) -> None:
    b = Builder()
    odd = b.op("odd", [b.given("x", 9, 4)], [(8, 4)], [((0,), (0,))])
    even = b.op("even", [odd], [(16, 4)], BY_BATCH)
    sent = b.op("sent", [even], [(4, 16, 16)], [((0,), (ROWS,))])
    b.exchange("there", sent)
    found = infer(b.graph("there"), "odd", "there", solver)
    assert (found.ops, found.units) == ((1, 2, 3), 8)
    graph = b.graph("there")
    assert infer_splits(graph, 0, 3, solver=solver, units=16).ops == (2, 3)
    assert infer_splits(graph, 0, 3, solver=solver, units=5).ops == ()


@both_solvers
def test_what_no_op_needs_in_parts_runs_whole(solver: AxisSolver) -> None:
    b = Builder()
    x = b.op("x", [b.given("in", 16, 16)], [(16, 16)], BY_BATCH)
    b.op("saved", [x], [(16, 16)], BY_BATCH, is_view=True)
    sent = b.op("sent", [x], [(4, 16, 16)], [((0,), (ROWS,))])
    there = b.exchange("there", sent)
    y = b.op("y", [there], [(16, 16)], [((ROWS,), (0,))])
    turned = b.op("turned", [b.given("weight", 16, 16)], [(16, 16)], BY_BATCH, is_view=True)
    b.op("z", [y, turned], [(16, 16)])
    b.op("kept", [y], [(16, 16)], BY_BATCH, is_view=True)
    b.op("last", [y], [(16, 16)], BY_BATCH)
    found = infer(b.graph("z", "saved", "kept", "last"), "x", "last", solver)
    assert found.ops == (0, 2, 3, 4, 8)


def test_a_range_must_be_one() -> None:
    with pytest.raises(InputError, match="no range") as caught:
        infer_splits(mini_step(1), 3, 2)
    assert "first 3, last 2" in str(caught.value)


def test_without_or_tools_the_other_solver_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ortools.py").write_text("raise ImportError('no such package')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cp_sat, "_child", None)
    axis_csp.solve.cache_clear()
    graph = mini_step(1)
    with pytest.raises(ConfigError, match="need OR-Tools") as caught:
        infer(graph, "l0.norm", "head", "cp_sat")
    assert "set axis_solver to 'propagate'" in str(caught.value)
    assert infer(graph, "l0.norm", "head", "propagate").ops
    cp_sat._child.end()


@both_solvers
def test_equal_layers_are_solved_once(solver: AxisSolver) -> None:
    graph = mini_step(3)
    axis_csp.solve.cache_clear()
    found = [infer(graph, f"l{layer}.norm", f"l{layer}.sum", solver) for layer in range(3)]
    assert axis_csp.solve.cache_info().misses == 1
    names = [{graph.ops[op].name.partition(".")[2] for op in one.ops} for one in found]
    assert names[0] == names[1] == names[2] and len(names[0]) > 10


def random_graph(seed: int) -> Graph:
    """Up to six ops with axes drawn from few values, so that many edges fit and many do not."""
    draw = random.Random(seed)
    b = Builder()
    tensors = [b.given("a", 8, 8), b.given("b", 8, 8)]
    for index in range(draw.randint(2, 6)):
        inputs = draw.sample(tensors, min(len(tensors), draw.choice((1, 1, 2))))
        num_outputs = draw.choice((1, 1, 2))
        used, made = (0, 0, 1, REPLICATED, ROWS), (0, 0, 1, ROWS, REPLICATED, PARTIAL, LAST)
        splits = [
            (tuple(draw.choice(used) for _ in inputs), tuple(draw.choice(made) for _ in range(num_outputs)))
            for _ in range(draw.choice((0, 1, 2, 2)))
        ]
        kind = "all_to_all" if draw.random() < 0.3 or index == 1 else "compute"
        b.op(
            f"op{index}",
            inputs,
            [(8, 8)] * num_outputs,
            splits,
            kind=kind,
            group="g" if kind != "compute" else "",
            random=draw.random() < 0.3,
        )
        tensors += [tensor.name for tensor in b.ops[-1].outputs]
    return b.graph(tensors[-1])


def runs(graph: Graph, choices: tuple[int, ...]) -> bool:
    """Whether ops can run: those of BEFORE, then the split ones, then those of AFTER. Choices: -1, a split, or 99."""
    phases = [BEFORE if c < 0 else AFTER if c == 99 else SPLIT for c in choices]
    drawn = [phase for phase, op in zip(phases, graph.ops, strict=True) if op.random]
    if drawn != sorted(drawn):
        return False
    whole = {tensor.name for tensor in graph.inputs}
    in_parts: dict[str, int] = {}
    for phase in (BEFORE, SPLIT, AFTER):
        for op, choice, own in zip(graph.ops, choices, phases, strict=True):
            if own != phase:
                continue
            if phase != SPLIT:
                if not whole.issuperset(op.inputs):
                    return False
                whole |= {tensor.name for tensor in op.outputs}
                continue
            split = op.splits[choice]
            for name, axis in zip(op.inputs, split.inputs, strict=True):
                if axis == REPLICATED:
                    if name not in whole:
                        return False
                elif (axis < 0 and not is_irregular(axis)) or in_parts.get(name, axis) != axis:
                    return False
                elif name not in in_parts:
                    if name not in whole or is_irregular(axis):
                        return False
                    in_parts[name] = axis  # a slice; all others must be the same
            in_parts.update({tensor.name: axis for tensor, axis in zip(op.outputs, split.outputs, strict=True)})
        whole |= in_parts.keys()
    return True


def all_choices(graph: Graph) -> Iterator[tuple[int, ...]]:
    """Of ops that an all-to-all is joined with by a path, from before or after (see `axes`)."""
    comm = sum(1 << i for i in graph.comm_ops())
    after = [i for i in range(len(graph.ops)) if comm >> i & 1 or graph.ancestors[i] & comm]
    worth = {i for i in range(len(graph.ops)) if i in after or any(graph.ancestors[a] >> i & 1 for a in after)}
    options = []
    for index, op in enumerate(graph.ops):
        whole = [] if op.is_comm else [-1, 99]
        options.append([*whole, *(range(len(op.splits)) if index in worth else ())])
    return itertools.product(*options)


@pytest.mark.parametrize("block", range(4))
def test_solvers_find_as_many_split_ops_as_brute_force(block: int) -> None:
    num_solved = 0
    for seed in range(block * 40, block * 40 + 40):
        graph = random_graph(seed)
        solutions = [c for c in all_choices(graph) if runs(graph, c)]
        best = max((sum(0 <= place < 99 for place in c) for c in solutions), default=0)
        for solver in SOLVERS:
            problem = range_problem(graph, 0, len(graph.ops) - 1)
            assert sum(place is not None for place in axis_csp.solve(problem, solver)) == best, (seed, solver)
            found = infer_splits(graph, 0, len(graph.ops) - 1, solver=solver)
            assert bool(found.ops) == bool(best)
            of_op = dict(zip(found.ops, found.splits, strict=True))
            fits = (c for c in solutions if all(of_op.get(i, -1) == (p if p < 99 else -1) for i, p in enumerate(c)))
            assert not best or any(True for _ in fits), (seed, solver)
        num_solved += best > 0
    assert num_solved > 5
