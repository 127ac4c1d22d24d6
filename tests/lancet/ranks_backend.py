"""What the ranks of test_backend.py run: planned steps of a small model of experts against the same steps run eagerly.

Ranks are started once; each check gives None, or its traceback.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from llmsys.lancet.baselines import CapacityPipelining
from llmsys.lancet.config import PlannerConfig
from llmsys.lancet.costs import CostModel, TableCosts
from llmsys.lancet.graph import PARTIAL, REPLICATED, Graph, Split, is_irregular
from llmsys.lancet.passes.overlap_scheduler import TorchOverlap
from llmsys.lancet.passes.planning import Planning
from llmsys.lancet.plan import Plan, Region, check_plan, cut_sizes
from llmsys.lancet.planner import Lancet
from llmsys.lancet.runtime import LancetBackend
from llmsys.models.moe import GPT2MoE, GPT2MoEConfig, MoEConfig
from tests.lancet.fx_plans import as_captured, random_order, random_region, ranged

NUM_RANKS = 2
SEEDS = (0, 1, 2)
Check = Callable[[], None]
CHECKS: dict[str, Check] = {}
ORDERS: list[str] = []
"""Checks of plans that only reorder; `PARTS`: of plans that cut."""
PARTS: list[str] = []


def check(names: list[str]) -> Callable[[Check], Check]:
    def keep(function: Check) -> Check:
        names.append(function.__name__)
        CHECKS[function.__name__] = function
        return function

    return keep


def run_checks(names: tuple[str, ...]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        torch._dynamo.reset()
        try:
            CHECKS[name]()
            found[name] = None
        except BaseException:
            found[name] = traceback.format_exc()
    return found


class Made:
    """A planner that a test gives as a function of the graph."""

    def __init__(self, make: Callable[[Graph], Plan]) -> None:
        self.name = "test"
        self._make = make

    def make(self, graph: Graph, costs: CostModel, config: PlannerConfig) -> Plan:
        return self._make(graph)


class Ones:
    """Every op takes 1 ms whole, and a little more than its share in parts; nothing else costs."""

    name = "ones"

    def op_ms(self, graph: Any, op: Any, num_parts: int = 1, split: Any = None) -> float:
        return 0.0 if op.is_view else (1.0 / num_parts + (0.01 if num_parts > 1 else 0.0))

    def slice_ms(self, tensor: Any, axis: int, num_parts: int) -> float:
        return 0.0

    def join_ms(self, tensor: Any, axis: int, num_parts: int) -> float:
        return 0.01


def model(gate: str = "top_k", num_layers: int = 2, **moe: Any) -> GPT2MoE:
    settings = {"top_k": 1 if gate == "switch" else 2, "capacity_factor": 1.0} | moe
    layer = MoEConfig(hidden=16, ffn_hidden=32, num_experts=4, gate=gate, **settings)  # type: ignore[arg-type]
    config = GPT2MoEConfig(
        num_layers=num_layers, num_heads=2, ffn_hidden=32, moe=layer, moe_every=1, vocab_size=40, max_seq_len=8
    )
    return GPT2MoE(config, group=dist.group.WORLD)


def batches(num_steps: int, batch: int = 4) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(100 + dist.get_rank())
    for _ in range(num_steps):
        tokens = torch.randint(0, 40, (batch, 9), generator=rng)
        yield tokens[:, :-1], tokens[:, 1:]


def train(step: Callable[..., Any], parameters: list[nn.Parameter], num_steps: int) -> list[list[torch.Tensor]]:
    """Loss and gradients of each step of SGD."""
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    found = []
    for seed, (tokens, targets) in enumerate(batches(num_steps)):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        loss = step(tokens, targets)
        loss.backward()
        found.append([loss.detach().clone(), *(p.grad.clone() for p in parameters if p.grad is not None)])
        optimizer.step()
    return found


def compare(backend: LancetBackend, num_steps: int, *, tolerance: float = 0.0, **settings: Any) -> None:
    """Steps of the compiled model against those of the eager one."""
    eager, compiled = model(**settings), model(**settings)
    expected = train(eager, list(eager.parameters()), num_steps)
    found = train(torch.compile(compiled, backend=backend, fullgraph=True), list(compiled.parameters()), num_steps)
    assert backend.steps, "nothing was planned"
    for step, (want, got) in enumerate(zip(expected, found, strict=True)):
        assert len(want) == len(got)
        for number, (a, b) in enumerate(zip(want, got, strict=True)):
            if tolerance == 0.0:
                assert torch.equal(a, b), f"step {step}, tensor {number}: {(a - b).abs().max()} apart"
            else:
                distance = (a - b).norm() / (a.norm() + 1e-12)
                assert distance <= tolerance, f"step {step}, tensor {number}: {distance} apart"


def backend_of(make: Callable[[Graph], Plan]) -> LancetBackend:
    return LancetBackend(costs=TableCosts(ops_ms={}), planning=Planning(planner=Made(make), timeout_s=60.0))


@check(ORDERS)
def as_captured_is_bit_equal() -> None:
    compare(backend_of(as_captured), 2)


@check(ORDERS)
def random_orders_are_bit_equal() -> None:
    for seed in range(2):
        torch._dynamo.reset()
        compare(backend_of(lambda graph, seed=seed: random_order(graph, seed)), 3)  # type: ignore[misc]


class Watched(LancetBackend):
    """Runs what was captured beside each planned forward and backward, and compares all results: what the forward
    saves too, so experts, slots and drops. Integers must be equal, other numbers close.
    """

    def _planned(self, *args: Any) -> Any:
        step = super()._planned(*args)
        if step is not None:
            pairs = ((step.forward, step.captured.forward), (step.backward, step.captured.backward))
            for planned, captured in pairs:
                if planned is not None:
                    planned.register_forward_hook(lambda _, args, found, captured=captured: same(captured, args, found))
        return step


def same(captured: Any, args: Any, found: Any) -> None:
    names = [getattr(n, "name", "none") for n in captured.graph.output_node().args[0]]
    for name, want, got in zip(names, captured(*args), found, strict=True):
        if isinstance(want, torch.Tensor):
            assert want.shape == got.shape, name
            if want.is_floating_point():
                torch.testing.assert_close(
                    got, want, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
                )
            else:
                assert torch.equal(want, got), name


def watched(make: Callable[[Graph], Plan], timeout_s: float = 60.0) -> LancetBackend:
    return Watched(costs=Ones(), planning=Planning(planner=Made(make), timeout_s=timeout_s))


def between(graph: Graph, first: str, last: str, *, first_number: int = 0, last_number: int = 0) -> range:
    """From the op of one target to that of another, both included."""
    firsts, lasts = ([i for i, op in enumerate(graph.ops) if op.target == t] for t in (first, last))
    return range(firsts[first_number], lasts[last_number] + 1)


def carried(graph: Graph, ops: range, start: Callable[[str], bool]) -> dict[int, int]:
    """Splits that carry the cut of the first op's ``start`` axes through the range, as far as they fit."""
    chosen: dict[int, int] = {}
    axes: dict[str, int] = {}
    for index in ops:
        op = graph.ops[index]
        for place, split in enumerate(op.splits):
            inside = [n in axes for n in op.inputs]
            if any(inside) or start(op.target):
                fits = all(
                    axes[n] == axis if n in axes else axis == REPLICATED or (axis >= 0 and n not in axes)
                    for n, axis in zip(op.inputs, split.inputs, strict=True)
                )
                cuts_outside = any(a >= 0 for n, a in zip(op.inputs, split.inputs, strict=True) if n not in axes)
                if fits and (any(inside) or cuts_outside) and all(a > PARTIAL for a in split.outputs):
                    chosen[index] = place
                    axes.update({t.name: a for t, a in zip(op.outputs, split.outputs, strict=True)})
                    break
    return chosen


ROUTE, DISPATCH, COMBINE = (f"llmsys.moe_{name}.default" for name in ("route", "dispatch", "combine"))
ALL_TO_ALL = "_c10d_functional.all_to_all_single.default"


def partitioned(first: str, last: str, num_parts: int, gate: str, **numbers: int) -> None:
    plans: list[Plan] = []

    def make(graph: Graph) -> Plan:
        ops = between(graph, first, last, **numbers)
        chosen = carried(graph, ops, lambda target: target == first)
        assert {ops[0], ops[-1]} <= set(chosen), f"the range is not carried through: {chosen}"
        plans.append(ranged(graph, chosen, num_parts))
        check_plan(plans[-1], graph)
        return plans[-1]

    compare(watched(make), 2, tolerance=1e-5, gate=gate)
    assert dist.get_rank() or plans


@check(PARTS)
def capacity_in_parts() -> None:
    """Tutel's axis: from one all-to-all to the next, forward and backward."""
    partitioned(ALL_TO_ALL, ALL_TO_ALL, 4, "top_k", first_number=0, last_number=1)
    torch._dynamo.reset()
    partitioned(ALL_TO_ALL, ALL_TO_ALL, 2, "top_k", first_number=4, last_number=5)


@check(PARTS)
def tokens_in_parts_after_the_gate() -> None:
    partitioned(DISPATCH, COMBINE, 2, "batch_prioritized")


@check(PARTS)
def tokens_in_parts_with_the_gate() -> None:
    for num_parts, gate in ((2, "top_k"), (4, "switch")):
        torch._dynamo.reset()
        partitioned(ROUTE, COMBINE, num_parts, gate)


@check(PARTS)
def attention_to_attention_in_parts() -> None:
    """From the attention before a layer of experts to the one after it."""
    attention = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    partitioned(attention, attention, 2, "switch", first_number=0, last_number=1)


def planned_by(planner: Any, **config: Any) -> Watched:
    planning = Planning(planner=planner, config=PlannerConfig(**config), timeout_s=60.0)
    return Watched(costs=Ones(), planning=planning)


@check(ORDERS)
def torch_overlap_is_bit_equal_and_overlaps() -> None:
    backend = planned_by(TorchOverlap())
    compare(backend, 2)
    plan = backend.steps[0].plan
    assert plan.planner == "torch_overlap"
    assert plan.estimate.exposed_comm_ms < 0.9 * plan.estimate.comm_ms


@check(ORDERS)
def weight_gradients_move_and_stay_bit_equal() -> None:
    backend = planned_by(Lancet(), partition="none")
    compare(backend, 2)
    assert any(backend.steps[0].plan.hidden_under.values())


@check(PARTS)
def lancet_cuts_and_moves() -> None:
    backend = planned_by(Lancet(), max_parts=2)
    compare(backend, 2, tolerance=1e-5)
    plan = backend.steps[0].plan
    assert plan.regions
    assert any(is_irregular(op_split.outputs[0]) for op_split in used_splits(backend.steps[0].graph, plan))


@check(PARTS)
def capacity_pipelining_runs() -> None:
    backend = planned_by(CapacityPipelining(degree=2))
    compare(backend, 2, tolerance=1e-5)
    assert backend.steps[0].plan.regions


def used_splits(graph: Graph, plan: Plan) -> list[Split]:
    return [
        graph.ops[op].splits[place]
        for region in plan.regions
        for op, place in zip(region.ops, region.splits, strict=True)
    ]


@check(PARTS)
def random_ranges_make_the_whole() -> None:
    """Splits that fit each other, drawn at random: batch, capacity, hidden and irregular ones, forward or backward."""
    for seed in SEEDS:
        torch._dynamo.reset()
        torch.manual_seed(seed)

        def make(graph: Graph, seed: int = seed) -> Plan:
            ops = graph.select("backward" if seed % 3 == 2 else "forward")
            rng = random.Random(seed)
            while True:
                start = rng.randrange(len(ops) * 2 // 3)
                chosen = random_region(graph, ops[start : start + 40], rng.randrange(1 << 30))
                region = Region(num_parts=2, ops=tuple(chosen), splits=tuple(chosen.values()))
                sizes = cut_sizes(graph, region)
                if len(chosen) > 8 and all(size % min(sizes) == 0 for size in sizes) and min(sizes) > 1:
                    break
            plan = ranged(graph, chosen, 2)
            check_plan(plan, graph)
            return plan

        compare(watched(make), 1, tolerance=1e-5, gate="top_k")
