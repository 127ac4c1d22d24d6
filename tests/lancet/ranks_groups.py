"""What the ranks of test_groups.py run: default costs of steps that use several groups and several collectives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives

from llmsys.lancet.passes.planning import Planning
from llmsys.lancet.runtime import LancetBackend
from llmsys.lancet.runtime.measured_costs import MeasuredCosts
from llmsys.lancet.runtime.step_costs import measured_step_costs

NUM_RANKS = 4


class Kept:
    """The default costs, kept for the test."""

    def __init__(self) -> None:
        self.costs: MeasuredCosts | None = None

    def __call__(self, captured: Any) -> MeasuredCosts:
        self.costs = measured_step_costs(captured)
        return self.costs


def plan_and_run() -> dict[str, Any]:
    """Experts over pairs of ranks and over all, and an auxiliary loss that is summed across the pairs, as data parallel
    ranks do.

    Returns what the costs know of the step, and how far the loss is from the eager one.
    """
    torch.set_num_threads(1)
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    crossed = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    experts, others = pairs[rank // 2], crossed[rank % 2]
    torch.manual_seed(rank)
    first, second = (torch.randn(64, 64, requires_grad=True) for _ in range(2))
    x = torch.randn(64, 64)

    def step(x: torch.Tensor) -> torch.Tensor:
        rows = collectives.all_to_all_single_autograd(x @ first, None, None, experts)  # type: ignore[arg-type]
        rows = collectives.all_to_all_single_autograd(torch.relu(rows), None, None, dist.group.WORLD)  # type: ignore[arg-type]
        mean = collectives.all_reduce(rows.detach().mean(0), "sum", others)
        gathered = collectives.all_gather_tensor(rows.detach()[:2], 0, experts)
        spread = collectives.reduce_scatter_tensor(gathered, "sum", 0, experts)
        return (rows @ second).square().mean() + mean.mean() + spread.mean()

    expected = step(x).detach()
    kept = Kept()
    backend = LancetBackend(costs=kept, planning=Planning(timeout_s=120.0))
    loss = torch.compile(step, backend=backend, fullgraph=True)(x)
    loss.backward()
    assert kept.costs is not None
    graph, costs = backend.steps[0].graph, kept.costs
    comm = [graph.ops[op] for op in graph.comm_ops()]
    return {
        "lanes": [(op.kind, op.group) for op in comm],
        "links": {lane: link.num_ranks for lane, link in costs.links.items()},
        "ms": [(costs.op_ms(graph, op), costs.launch_ms(graph, op, 1)) for op in comm],
        "apart": float((loss.detach() - expected).abs()),
    }
