"""What the ranks of test_measured.py run: a small step that is measured, planned by that, run and recorded."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llmsys.core.errors import InputError
from llmsys.lancet.baselines import AsCaptured
from llmsys.lancet.config import PlannerConfig
from llmsys.lancet.costs import MessageTable
from llmsys.lancet.graph import LAST, PARTIAL, is_irregular
from llmsys.lancet.passes.calls import outputs_of
from llmsys.lancet.passes.capture import Captured, capture
from llmsys.lancet.passes.pieces import cut_in, slice_parts
from llmsys.lancet.passes.rewrite import rewrite
from llmsys.lancet.plan import Plan, Start, Wait
from llmsys.lancet.planner import Lancet
from llmsys.lancet.runtime import irregular
from llmsys.lancet.runtime.measure import Result, Step, by_communication, measured_timeline
from llmsys.lancet.runtime.measured_costs import MeasuredCosts, averaged, measure_costs
from llmsys.lancet.runtime.messages import LinkTimes, MessageTimes, measure_all_to_all
from llmsys.lancet.runtime.profiler import Bench, BenchSettings
from llmsys.lancet.runtime.replay import replay
from llmsys.lancet.simulator import simulate
from llmsys.models.moe import GPT2MoE, GPT2MoEConfig, MoEConfig

NUM_RANKS = 2
Check = Callable[["Fixture"], None]
CHECKS: dict[str, Check] = {}
QUICK = BenchSettings(num_warmup=1, min_repeats=1, max_repeats=2, budget_ms=0.0, evict_mb=0.0)


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


class Fixture:
    """A captured step with its inputs and eager gradients, and its measured costs."""

    def __init__(self) -> None:
        from functorch.compile import default_partition, make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        torch.set_num_threads(1)
        moe = MoEConfig(hidden=32, ffn_hidden=64, num_experts=4)
        config = GPT2MoEConfig(num_layers=2, num_heads=2, ffn_hidden=64, moe=moe, vocab_size=64, max_seq_len=16)
        model = GPT2MoE(config, group=dist.group.WORLD)
        draw = torch.Generator().manual_seed(dist.get_rank())
        tokens = torch.randint(0, 64, (4, 16), generator=draw)
        kept: dict[str, Any] = {}

        def keep(name: str) -> Any:
            def compiler(module: torch.fx.GraphModule, _: object) -> Any:
                kept[name] = module

                def run(*args: Any) -> Any:
                    kept.setdefault(f"{name} inputs", args)
                    return module(*args)

                return make_boxed_func(run)

            return compiler

        backend = aot_autograd(fw_compiler=keep("fw"), bw_compiler=keep("bw"), partition_fn=default_partition)
        torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(tokens, tokens).backward()
        self.gradients = {p.data_ptr(): p.grad for p in model.parameters()}
        self.inputs: tuple[Any, ...] = kept["fw inputs"]
        self.captured: Captured = capture(kept["fw"], kept["bw"])
        self.link: LinkTimes = measure_all_to_all([4096, 16384, 65536], row_bytes=128, num_repeats=2)
        self.bench = Bench(settings=QUICK)
        self.costs: MeasuredCosts = measure_costs(self.captured, self.bench, {"group0": self.link}, num_parts=(2, 4))

    def run(self, plan: Plan) -> Result:
        forward, backward = rewrite(self.captured, plan, irregular)
        assert backward is not None and self.captured.backward is not None
        step = Step(forward, backward, signature=(self.captured.forward, self.captured.backward))
        step.run(self.inputs)
        return step.run(self.inputs)


def run_checks() -> dict[str, str | None]:
    fixture = Fixture()
    found: dict[str, str | None] = {}
    for name, function in CHECKS.items():
        try:
            function(fixture)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    return found


@check
def every_op_has_a_cost_and_all_ranks_have_the_same(fixture: Fixture) -> None:
    graph, costs = fixture.captured.graph, fixture.costs
    found = []
    for op in graph.ops:
        ms = [costs.op_ms(graph, op)]
        ms += [costs.op_ms(graph, op, k, split) for split in op.splits for k in (2, 3, 4, 8)]
        assert all(one >= 0 for one in ms) and (op.is_view or min(ms) > 0), op
        assert not op.is_view or max(ms) == 0
        found += [*ms, *(costs.launch_ms(graph, op, 2, op.splits[0]) if op.is_comm else ())]
    everyones: list[Any] = [None] * NUM_RANKS
    dist.all_gather_object(everyones, (found, graph.fingerprint))
    assert everyones[0] == everyones[1]


@check
def equal_ops_are_measured_once(fixture: Fixture) -> None:
    before = fixture.bench.num_measured
    again = measure_costs(fixture.captured, fixture.bench, {"group0": fixture.link}, num_parts=(2, 4))
    assert fixture.bench.num_measured == before
    assert again == fixture.costs


@check
def a_slow_rank_sets_the_pace_of_all(fixture: Fixture) -> None:
    name = next(iter(fixture.costs.ops_ms))
    mine = 1.0 + 2.0 * dist.get_rank()
    parts = {(name, 0): ((1, mine), (2, mine / 2))}
    both = averaged(replace(fixture.costs, ops_ms={name: mine, "other": 1.0}, parts_ms=parts), None)
    assert both.ops_ms == pytest.approx({name: 2.0 * 4 / 3, "other": 4 / 3})  # totals of 2 and 4 ms
    assert both.parts_ms[name, 0] == ((1, pytest.approx(8 / 3)), (2, pytest.approx(4 / 3)))
    assert both.links == fixture.costs.links and both.copies == fixture.costs.copies


@check
def parts_between_those_measured_are_interpolated(fixture: Fixture) -> None:
    graph, costs = fixture.captured.graph, fixture.costs
    op = next(op for op in graph.ops if op.splits and not op.is_view and not op.is_comm)
    of = {k: k * costs.op_ms(graph, op, k, op.splits[0]) for k in (2, 3, 4, 8)}
    assert of[3] == pytest.approx((of[2] + of[4]) / 2)
    assert of[8] == pytest.approx(of[4])


@check
def joins_cost_copies(fixture: Fixture) -> None:
    tensor = max(fixture.captured.graph.tensors.values(), key=lambda t: t.size_bytes)
    costs = fixture.costs
    assert costs.join_ms(tensor, LAST, 4) == 0 < costs.join_ms(tensor, 0, 4)
    assert costs.join_ms(tensor, PARTIAL, 4) == pytest.approx(3 * costs.join_ms(tensor, PARTIAL, 2))


@check
def slices_that_lie_in_pieces_cost_copies(fixture: Fixture) -> None:
    graph, costs = fixture.captured.graph, fixture.costs
    buffer = next(op.outputs[0] for op in graph.ops if op.target.startswith("llmsys.moe_dispatch"))
    assert costs.slice_ms(buffer, 1, 2) > 0 == costs.slice_ms(buffer, 1, 1) == costs.slice_ms(buffer, 0, 2)
    assert costs.copied_slices  # and what rewriting a plan copies is what costs
    values = {name: outputs_of(node)[0] for node, name in fixture.captured.names.items()}
    for name, axis in sorted(costs.copied_slices):
        value, cut, graph_of_slices = values[name], cut_in(fixture.captured, name, axis), torch.fx.Graph()
        whole = graph_of_slices.placeholder("whole")
        ends = [0, cut.size // 2, cut.size]
        graph_of_slices.output(slice_parts(graph_of_slices, whole, value, axis, cut, ends))
        tensor = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        parts = torch.fx.GraphModule(torch.nn.Module(), graph_of_slices)(tensor)
        assert parts[1].untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr(), (name, axis)


@check
def irregular_parts_send_no_more_than_the_choices(fixture: Fixture) -> None:
    """Buffers have 1.25 times as many rows as there are tokens; a regular part has its share of them all."""
    graph, costs = fixture.captured.graph, fixture.costs
    there, back = (graph.ops[op] for op in graph.comm_ops("all_to_all")[:2])
    assert {name: costs.irregular[name].kind for name in (there.name, back.name)} == {
        there.name: "there",
        back.name: "back",
    }
    assert costs.irregular[there.name].fill == costs.irregular[back.name].fill == pytest.approx(1 / 1.25)
    flat = MessageTable(sizes_bytes=(0.0, 1e6), ms=(0.0, 1e3))  # 1 us for each byte
    none = MessageTable(sizes_bytes=(0.0, 1e6), ms=(0.0, 0.0))
    one = MessageTimes(start=flat, lane=flat, wait=flat, stream=flat, taken=none)
    known = replace(costs, links={"group0": replace(fixture.link, dense=one, there=one, back=one)})
    size = graph.tensors[there.inputs[0]].size_bytes
    dense, rows = there.splits
    assert is_irregular(rows.inputs[0]) and not is_irregular(dense.inputs[0])
    assert known.op_ms(graph, there, 2, dense) == pytest.approx(size / 2 / 1e3)
    assert known.op_ms(graph, there, 2, rows) == pytest.approx(size / 2 / 1e3 / 1.25)
    assert known.launch_ms(graph, there, 2, rows) == pytest.approx((size / 2 / 1e3 / 1.25,) * 2)
    assert known.launch_ms(graph, there, 2, dense) == pytest.approx((size / 2 / 1e3,) * 2)


@check
def what_a_message_takes_of_computation_is_counted_once(fixture: Fixture) -> None:
    graph, costs = fixture.captured.graph, fixture.costs
    op = graph.ops[graph.comm_ops("all_to_all")[0]]
    table = {ms: MessageTable(sizes_bytes=(0.0, 1.0), ms=(ms, ms)) for ms in (1.0, 2.0, 3.0, 8.0, 6.0)}
    times = MessageTimes(start=table[1.0], lane=table[8.0], wait=table[2.0], stream=table[6.0], taken=table[3.0])
    known = replace(costs, links={"group0": replace(fixture.link, dense=times)})
    assert known.launch_ms(graph, op, 1) == (4.0, 2.0) and known.op_ms(graph, op) == 5.0
    assert known.op_ms(graph, op, 2, op.splits[0]) == 3.0


@check
def an_op_of_another_step_is_an_error(fixture: Fixture) -> None:
    graph = fixture.captured.graph
    other = MeasuredCosts(name="none", ops_ms={}, parts_ms={}, copies=fixture.costs.copies, links={})
    op = next(op for op in graph.ops if not op.is_view and not op.is_comm)
    with pytest.raises(InputError, match="no measured time"):
        other.op_ms(graph, op)


@check
def times_of_a_link_round_trip_through_text(fixture: Fixture) -> None:
    assert LinkTimes.from_json(fixture.link.to_json()) == fixture.link
    with pytest.raises(InputError, match="no times of all-to-alls"):
        LinkTimes.from_json('{"num_ranks": 2}')
    with pytest.raises(InputError, match="cannot be measured"):
        measure_all_to_all([64, 128], row_bytes=128)


@check
def a_recorded_step_is_the_eager_step_without_gaps(fixture: Fixture) -> None:
    plan = AsCaptured().make(fixture.captured.graph, fixture.costs, PlannerConfig())
    result = fixture.run(plan)
    for given, gradient in zip(fixture.inputs, result.gradients, strict=True):
        assert gradient is None or torch.equal(gradient, fixture.gradients[given.data_ptr()])
    labels = [r.label for r in result.recorded]
    assert labels == [i for i in plan.instructions if i in set(labels)]
    comm = [i for i in plan.instructions if isinstance(i, Start | Wait)]
    assert set(comm) <= set(labels) and len(comm) == 2 * len(fixture.captured.graph.comm_ops())
    pairs = list(itertools.pairwise(result.recorded))
    gaps = [b for a, b in pairs if a.end_s != b.start_s]
    assert [r.label for r in gaps] == [next(r.label for r in result.recorded if _is_backward(fixture, r.label))]
    assert result.waited_ms == pytest.approx(sum(r.duration_ms for r in result.recorded if isinstance(r.label, Wait)))
    assert 0 < result.waited_ms < result.step_ms


def _is_backward(fixture: Fixture, label: Any) -> bool:
    return fixture.captured.graph.ops[label.op].phase == "backward"


@check
def replayed_times_give_the_measured_length(fixture: Fixture) -> None:
    graph = fixture.captured.graph
    for planner in (AsCaptured(), Lancet()):
        plan = planner.make(graph, fixture.costs, PlannerConfig(max_parts=2))
        result = fixture.run(plan)
        put_back = replay(graph, plan, result.recorded, fixture.costs)
        again = simulate(graph, plan, put_back.costs, durations_ms=put_back.durations_ms)
        assert again.step_ms == pytest.approx(result.step_ms, rel=0.05)
    with pytest.raises(InputError, match="not one of this plan"):
        replay(graph, plan, result.recorded[:5], fixture.costs)


@check
def a_timeline_shows_each_communication(fixture: Fixture) -> None:
    graph = fixture.captured.graph
    plan = AsCaptured().make(graph, fixture.costs, PlannerConfig())
    result = fixture.run(plan)
    timeline = measured_timeline(graph, result)
    comm = [span for span in timeline.spans if span.lane.startswith("comm ")]
    assert len(comm) == len(graph.comm_ops())
    assert timeline.end_ms == pytest.approx(result.step_ms, rel=0.05)


@check
def any_graph_can_be_recorded_by_its_communication(fixture: Fixture) -> None:
    assert fixture.captured.backward is not None
    step = Step(fixture.captured.forward, fixture.captured.backward, label_of=by_communication)
    result = step.run(fixture.inputs)
    kinds = [r.label[0] for r in result.recorded if isinstance(r.label, tuple)]
    num = len(fixture.captured.graph.comm_ops())
    assert kinds.count("start") == kinds.count("wait") == num
    assert result.waited_ms > 0


@check
def graphs_that_are_no_step_are_refused(fixture: Fixture) -> None:
    with pytest.raises(InputError, match="not one step"):
        Step(fixture.captured.forward, fixture.captured.forward)
