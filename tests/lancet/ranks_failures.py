"""What the ranks of test_backend_failures.py run: what users of overlap report to fail, and the public call."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import nn

from llmsys.core.errors import InputError, LlmsysError
from llmsys.lancet.planner import Lancet
from llmsys.lancet.runtime import LancetBackend, Planning, optimize
from llmsys.models.moe import MoEConfig, MoELayer
from tests.lancet.fx_plans import as_captured, random_order
from tests.lancet.ranks_backend import (
    COMBINE,
    ROUTE,
    Made,
    Ones,
    batches,
    between,
    carried,
    model,
    ranged,
)

NUM_RANKS = 2
CHECKS: dict[str, Callable[[], None]] = {}
PLANNING = Planning(planner=Made(as_captured), timeout_s=60.0)


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def run_checks(names: tuple[str, ...]) -> dict[str, str | None]:
    from tests.lancet import ranks_backend

    ranks_backend.CHECKS.update(CHECKS)
    return ranks_backend.run_checks(names)


@check
def graphs_that_differ_are_refused_before_anything_runs() -> None:
    weights = torch.ones(8, 8 + dist.get_rank(), requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        return exchange(x @ weights).sum()

    step = optimize(function, costs=Ones(), planning=PLANNING)
    with pytest.raises(InputError, match="the graphs of ranks 0 and 1 differ, first in line") as caught:
        step(torch.ones(4, 8))
    assert "rank 0 has: input" in caught.value.expected
    assert "[8,9]" in caught.value.found
    dist.barrier()  # the group still works


def exchange(x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = collectives.all_to_all_single_autograd(x, None, None, dist.group.WORLD)  # type: ignore[arg-type]
    return found


@check
def another_shape_on_one_rank_is_refused() -> None:
    """The last batch of an epoch: a hang elsewhere (Tutel#182, DeepSpeed#6809)."""
    weights = torch.ones(8, 8, requires_grad=True)
    step = optimize(lambda x: exchange(x @ weights).sum(), costs=Ones(), planning=PLANNING)
    step(torch.ones(4, 8)).backward()
    with pytest.raises(InputError, match="differ, first in line"):
        step(torch.ones(2 + 4 * dist.get_rank(), 8))
    step(torch.ones(8, 8)).backward()
    assert len(step.steps) == 2


@check
def one_rank_that_cannot_capture_stops_all() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        if dist.get_rank() == 1:
            group = dist.group.WORLD.group_name  # type: ignore[union-attr]
            return torch.ops._c10d_functional.all_to_all_single(x, [2, 2], [2, 2], group) + 1
        return exchange(x) + 1

    step = optimize(function, costs=Ones(), planning=PLANNING)
    with pytest.raises(LlmsysError, match="is used before it was waited for"):
        step(torch.ones(4, 8))


@check
def one_rank_that_cannot_measure_stops_all() -> None:
    def costs(captured: Any) -> Ones:
        if dist.get_rank() == 1:
            raise InputError("no clock", expected="a clock", found="none", fix="buy one")
        return Ones()

    step = optimize(lambda x: exchange(x) + 1, costs=costs, planning=PLANNING)
    with pytest.raises(LlmsysError, match="no clock"):
        step(torch.ones(4, 8))


@check
def raw_autograd_collectives_leave_no_dead_ones() -> None:
    weights = torch.ones(8, 8, requires_grad=True)
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]

    def function(x: torch.Tensor) -> torch.Tensor:
        op = torch.ops._c10d_functional_autograd.all_to_all_single
        for _ in range(2):
            x = collectives.wait_tensor(op(x @ weights, [2, 2], [2, 2], group))
        return x.square().sum()

    step = optimize(function, costs=Ones(), planning=PLANNING)
    for _ in range(2):
        step(torch.ones(4, 8)).backward()
    graph = step.graph
    assert len(graph.comm_ops("all_to_all")) == 4
    eager = torch.ones(8, 8, requires_grad=True)
    x = torch.ones(4, 8)
    for _ in range(2):
        x = exchange(x @ eager)
    x.square().sum().backward()
    assert torch.equal(2 * eager.grad, weights.grad)


@check
def expert_gradients_are_not_doubled() -> None:
    """EP=2 expert gradients exactly 2x (pytorch#160285): against one process that has all experts and all tokens."""
    rank = dist.get_rank()
    config = MoEConfig(hidden=8, ffn_hidden=16, num_experts=4, gate="top_k", top_k=2, capacity_factor=None)
    ours, reference = MoELayer(config, group=dist.group.WORLD), MoELayer(config)
    step = optimize(lambda x: ours(x)[0].square().sum(), costs=Ones(), planning=PLANNING)
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3))
    step(x[rank]).backward()
    reference(x.reshape(12, 8))[0].square().sum().backward()
    mine = slice(2 * rank, 2 * rank + 2)
    for name in ("up", "down"):
        wanted, found = getattr(reference, name).grad[mine], getattr(ours, name).grad
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


class Lopsided(nn.Module):
    """A layer whose router gives every token to expert 0, of rank 0: rank 1 gets no row at all."""

    def __init__(self) -> None:
        super().__init__()
        config = MoEConfig(hidden=8, ffn_hidden=16, num_experts=4, gate="switch", capacity_factor=2.0)
        self.layer = MoELayer(config, group=dist.group.WORLD)
        nn.init.zeros_(self.layer.router)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0].square().sum()


@check
def a_rank_without_tokens_takes_part() -> None:
    """PaddleFormers#3010, nccl#1593: forward and backward, whole and in parts of the tokens."""
    for num_parts in (1, 2):
        torch._dynamo.reset()
        eager, ours = Lopsided(), Lopsided()

        def make(graph: Any, num_parts: int = num_parts) -> Any:
            if num_parts == 1:
                return random_order(graph, 0)
            return ranged(graph, carried(graph, between(graph, ROUTE, COMBINE), lambda t: t == ROUTE), num_parts)

        step = optimize(ours, costs=Ones(), planning=Planning(planner=Made(make), timeout_s=60.0))
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
        eager(x).backward()
        step(x).backward()
        for want, found in zip(eager.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(found.grad, want.grad, rtol=1e-5, atol=1e-7)
        assert dist.get_rank() == 0 or not ours.layer.up.grad.any()


@check
def splits_that_only_the_data_knows_run_whole() -> None:
    """pytorch#155205, #117486: uneven all-to-alls whose sizes are tensors, also of zero rows."""
    weights, eager = (torch.full((4, 4), 0.5, requires_grad=True) for _ in range(2))

    def run(x: torch.Tensor, sizes: torch.Tensor, received: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        send, receive = sizes.tolist(), received.tolist()
        for size in (*send, *receive):
            torch._check(size >= 0)
        torch._check(sum(send) == x.shape[0])
        rows = collectives.all_to_all_single_autograd(torch.relu(x @ w), receive, send, dist.group.WORLD)  # type: ignore[arg-type]
        return (rows @ w).square().sum()

    backend = LancetBackend(costs=Ones(), planning=Planning(planner=Lancet(), timeout_s=60.0))
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        step = torch.compile(run, backend=backend, fullgraph=True, dynamic=False)
        for pattern in ([[2, 2], [1, 3]], [[4, 0], [4, 0]], [[0, 4], [3, 1]]):
            mine = dist.get_rank()
            sizes, received = torch.tensor(pattern[mine]), torch.tensor([row[mine] for row in pattern])
            x = torch.randn(4, 4, generator=torch.Generator().manual_seed(mine))
            step(x, sizes, received, weights).backward()
            run(x, sizes, received, eager).backward()
            assert torch.equal(weights.grad, eager.grad)
    assert len(backend.steps) == 1
    assert all(op.splits == () for op in backend.steps[0].graph.ops if op.kind == "all_to_all")
    assert not backend.steps[0].plan.regions


@check
def inference_is_planned_too() -> None:
    eager, ours = model(), model()
    step = optimize(ours, costs=Ones(), planning=Planning(planner=Made(lambda g: random_order(g, 1)), timeout_s=60.0))
    with torch.no_grad():
        for tokens, _ in batches(2):
            assert torch.equal(step(tokens), eager(tokens))
    assert step.steps[0].backward is None
    assert {op.phase for op in step.graph.ops} == {"forward"}
    assert len(step.graph.comm_ops("all_to_all")) == 4


@check
def a_step_without_communication_runs_as_it_is() -> None:
    step = optimize(lambda x: (x * 2).sum(), costs=Ones(), planning=PLANNING)
    x = torch.ones(3 + dist.get_rank(), requires_grad=True)
    step(x).backward()
    assert x.grad.eq(2).all()
    assert step.steps == ()
    assert "no step that communicates" in step.describe()


@check
def the_public_call_with_measured_costs() -> None:
    """As in the README: nothing given but the model. Costs are measured, the plan is described."""
    assert "XDG_CACHE_HOME" in os.environ
    config = MoEConfig(hidden=8, ffn_hidden=16, num_experts=4, gate="switch")
    layer = MoELayer(config, group=dist.group.WORLD)
    with torch.no_grad():
        step = optimize(layer)
        x = torch.randn(8, 8)
        torch.testing.assert_close(step(x)[0], layer(x)[0])
    assert step.plan.estimate.step_ms > 0
    assert step.plan.planner == "lancet"
    assert "all_to_all_single_1" in step.describe()
    assert next(iter(step.parameters())) is layer.up


@check
def symbolic_sizes_are_planned_once() -> None:
    """Shapes that change from step to step, compiled with dynamic sizes: reordered, not cut."""
    ours, eager = (torch.full((4, 4), 0.5, requires_grad=True) for _ in range(2))

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (exchange(torch.relu(exchange(x @ w) @ w)) @ w).square().sum()

    backend = LancetBackend(costs=Ones(), planning=Planning(planner=Lancet(), timeout_s=60.0))
    step = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    for rows in (6, 10, 2):
        x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
        step(x, ours).backward()
        run(x, eager).backward()
        assert torch.equal(ours.grad, eager.grad)
    assert len(backend.steps) == 1
    assert backend.steps[0].captured.has_symbols
    assert not backend.steps[0].plan.regions
