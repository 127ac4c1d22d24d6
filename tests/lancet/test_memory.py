"""Peak memory against a plain account of what is alive, and plans that keep a limit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmsys.core.errors import InfeasibleError
from llmsys.lancet.baselines import RaiseSink
from llmsys.lancet.config import PlannerConfig
from llmsys.lancet.costs import TableCosts
from llmsys.lancet.drafting import Decisions, Drafter
from llmsys.lancet.graph import LAST, PARTIAL, REPLICATED, Graph, Op, Split, Tensor, irregular
from llmsys.lancet.memory import MB, alive_at, find_peak, kept_alive
from llmsys.lancet.plan import Instruction, Join, Region, Run, Slice, Start, Wait
from llmsys.lancet.planner import Lancet
from tests.lancet.steps import all_to_all, op, random_step


def account(graph: Graph, instructions: tuple[Instruction, ...]) -> tuple[float, int]:
    """Bytes alive at each instruction, by asking of each tensor whether a later instruction needs its memory."""
    root = {tensor.name: tensor.name for tensor in graph.inputs}
    for found in graph.ops:
        for tensor in found.outputs:
            root[tensor.name] = root[found.inputs[0]] if found.is_view else tensor.name
    touched: list[set[str]] = []
    for i in instructions:
        assert isinstance(i, Run | Start | Wait)
        found = graph.ops[i.op]
        touched.append({root[name] for name in (*found.inputs, *(tensor.name for tensor in found.outputs))})
    inputs = {tensor.name for tensor in graph.inputs}
    kept = {root[name] for name in graph.outputs}
    best = (-1.0, 0)
    for place in range(len(instructions)):
        before = set().union(*touched[: place + 1])
        after = set().union(kept, *touched[place:])
        alive = (before & after) | inputs
        size = float(sum(graph.tensors[name].size_bytes for name in alive))
        best = max(best, (size, -place))
    return best[0], -best[1]


@pytest.mark.parametrize("seed", range(20))
def test_peak_is_that_of_a_plain_account(seed: int) -> None:
    graph, costs = random_step(np.random.default_rng(seed), 40)
    for planner in (RaiseSink(), Lancet()):
        plan = planner.make(graph, costs, PlannerConfig(partition="none"))
        size, place = account(graph, plan.instructions)
        found = find_peak(graph, plan.instructions, ())
        assert found.peak_mb == pytest.approx(size / MB, rel=1e-12)
        if size > sum(tensor.size_bytes for tensor in graph.inputs):
            assert found.place == place
        assert plan.estimate.peak_mb == found.peak_mb


def split_graph() -> Graph:
    """A whole tensor cut in parts of 1000 bytes, through a chained op, to a whole one."""
    x = Tensor(name="x", shape=(100, 10))
    used = Tensor(name="used", shape=(50,))

    def part_op(name: str, outputs: tuple[Tensor, ...], split: Split, *inputs: str, chained: bool = False) -> Op:
        return Op(name=name, kind="compute", target=name, inputs=inputs, outputs=outputs, phase="forward",
                  splits=(split,), chained=chained)  # fmt: skip

    y, after = Tensor(name="y", shape=(100, 10)), Tensor(name="after", shape=(50,))
    z, total = Tensor(name="z", shape=(20, 50)), Tensor(name="total", shape=(1000,))
    ops = (
        part_op("gate", (y, after), Split(inputs=(0, REPLICATED), outputs=(0, LAST)), "x", "used", chained=True),
        part_op("mix", (z, total), Split(inputs=(0,), outputs=(irregular(1), PARTIAL)), "y"),
    )
    return Graph(name="split", inputs=(x, used), ops=ops, outputs=("z", "total", "after"))


def test_parts_take_their_share() -> None:
    graph = split_graph()
    region = Region(num_parts=4, ops=(0, 1), splits=(0, 0))
    instructions: list[Instruction] = [Slice(region=0, tensor="x", axis=0)]
    for part in range(4):
        instructions += [Run(op=0, part=part), Run(op=1, part=part)]
    instructions += [
        Join(region=0, tensor="total", axis=PARTIAL),
        Join(region=0, tensor="after", axis=LAST),
        Join(region=0, tensor="z", axis=irregular(1)),
    ]
    # Inputs, the parts of z, all partial sums and their sum, the last state; y is gone.
    peak = find_peak(graph, instructions, [region])
    assert peak.peak_mb == pytest.approx((4200 + 4000 + 4 * 4000 + 4000 + 200) / MB)
    assert instructions[peak.place] == Join(region=0, tensor="total", axis=PARTIAL)


def test_a_slice_along_another_dimension_is_a_copy() -> None:
    """Of 4000 bytes, of which each part is freed after its use; along the first dimension it is none."""
    x, y = Tensor(name="x", shape=(100, 10)), Tensor(name="y", shape=(10,))
    splits = (Split(inputs=(1,), outputs=(0,)), Split(inputs=(0,), outputs=(PARTIAL,)))
    ops = (Op(name="sum", kind="compute", target="sum", inputs=("x",), outputs=(y,), phase="forward", splits=splits),)
    graph = Graph(name="copied", inputs=(x,), ops=ops, outputs=("y",))
    runs: list[Instruction] = [Run(op=0, part=0), Run(op=0, part=1)]
    for split, axis, expected in ((0, 1, 4000 + 4000 + 20), (1, 0, 4000 + 3 * 40)):
        made = splits[split].outputs[0]
        listed = [Slice(region=0, tensor="x", axis=axis), *runs, Join(region=0, tensor="y", axis=made)]
        found = find_peak(graph, listed, [Region(num_parts=2, ops=(0,), splits=(split,))])
        assert found.peak_mb == pytest.approx(expected / MB)


def activations(num_layers: int = 6) -> tuple[Graph, dict[str, float]]:
    """A backward pass that frees an activation (1000 bytes) a layer, unless its weight gradient waits."""
    names = [f"h{layer}" for layer in range(num_layers)]
    ops = [op(name, "x" if not layer else f"h{layer - 1}", phase="forward") for layer, name in enumerate(names)]
    last = names[-1]
    for layer in reversed(range(num_layers)):
        ops.append(op(f"d{layer}", last))
        ops.append(op(f"w{layer}", f"d{layer}", f"h{layer}", rows=1))
        last = f"d{layer}"
    ops += [all_to_all("a", last), op("wide", "a", rows=90), op("end", "wide")]
    inputs = (Tensor(name="x", shape=(25, 10)),)
    outputs = ("end", *(f"w{layer}" for layer in range(num_layers)))
    graph = Graph(name="activations", inputs=inputs, ops=tuple(ops), outputs=outputs)
    return graph, {o.name: 10.0 if o.name == "a" else 2.0 for o in ops}


def test_moves_are_dropped_until_the_limit_holds() -> None:
    graph, times = activations()
    costs = TableCosts(ops_ms=times)
    config = PlannerConfig(partition="none")
    free = Lancet().make(graph, costs, config)
    captured = free.estimate.captured_peak_mb
    assert free.estimate.peak_mb > captured
    (moved,) = free.hidden_under.values()
    assert len(moved) == 5
    steps, moves = [free.estimate.step_ms], [5]
    for limit in (free.estimate.peak_mb - 1e-3, captured):
        plan = Lancet().make(graph, costs, replace(config, memory_limit_mb=limit))
        assert plan.estimate.peak_mb <= limit
        steps.append(plan.estimate.step_ms)
        moves.append(sum(map(len, plan.hidden_under.values())))
        assert any(f"memory_limit_mb={limit:g} keeps" in note for note in plan.notes)
    assert steps == sorted(steps) and moves == sorted(moves, reverse=True)
    assert 5 > moves[1] > 0, "one move too many must not cost all of them"
    with pytest.raises(InfeasibleError) as error:
        Lancet().make(graph, costs, replace(config, memory_limit_mb=captured - 1e-3))
    assert f"{captured:.6g} MB as captured" in error.value.found
    assert "h0" in error.value.found


def test_the_limit_drops_regions_too() -> None:
    """Partial sums are what is too much."""
    graph = split_graph()
    drafter = Drafter(graph, TableCosts(ops_ms={"gate": 1.0, "mix": 2.0}))
    draft = drafter.draft(Decisions(regions=(Region(num_parts=4, ops=(0, 1), splits=(0, 0)),), units={}))
    captured = drafter.captured.peak.peak_mb
    assert draft.peak.peak_mb > captured
    assert drafter.within(draft, draft.peak.peak_mb) is draft
    found = drafter.within(draft, captured)
    assert found is not None and found.decisions.regions == () and found.peak.peak_mb == captured
    assert found.decisions.notes == (
        f"memory_limit_mb={captured:g} keeps 0 of 0 weight-gradient moves and 1 of 1 regions out",
    )
    assert drafter.within(draft, captured * 0.9) is None


def test_kept_alive_divides_what_units_share() -> None:
    graph, _ = activations(2)
    graph = replace(graph, ops=(*graph.ops, op("v1", "d1", "h1")))
    index = graph.index_of
    order = ["h0", "h1", "d1", "d0", "a", "w1", "v1", "w0", "wide", "end"]
    instructions: list[Instruction] = []
    for name in order:
        instructions += [Start(op=index[name]), Wait(op=index[name])] if name == "a" else [Run(op=index[name])]
    units = {1: (index["w1"],), 2: (index["v1"],), 0: (index["w0"],)}
    # At d1: h0 and h1 wait for units; d1 is needed by d0 as well.
    at = order.index("d1")
    assert kept_alive(graph, instructions, units, at) == {1: 500.0, 2: 500.0, 0: 1000.0}
    after = order.index("a")
    assert kept_alive(graph, instructions, units, after + 1) == {1: 1000.0, 2: 1000.0, 0: 2000.0}
    # Of w1 and v1 only the second still holds both.
    assert kept_alive(graph, instructions, units, instructions.index(Run(op=index["w1"]))) == {2: 2000.0, 0: 2000.0}
    assert list(alive_at(graph, instructions, (), after)) == ["h0", "h1", "d1", "d0", "a"]
