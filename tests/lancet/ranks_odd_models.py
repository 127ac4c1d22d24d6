"""What the ranks of test_odd_models.py run: models and steps that users have, against the same ones run eagerly."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmsys.core.errors import LlmsysError
from llmsys.lancet.config import PlannerConfig
from llmsys.lancet.runtime import Planning, optimize
from llmsys.models.moe import MoEConfig, MoELayer
from tests.lancet.ranks_backend import Ones, batches, model

NUM_RANKS = 2
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def run_checks(names: tuple[str, ...]) -> dict[str, str | None]:
    from tests.lancet import ranks_backend

    ranks_backend.CHECKS.update(CHECKS)
    return ranks_backend.run_checks(names)


class Dear(Ones):
    """All-to-alls take ten times as long as other ops, so ranges around them run in parts."""

    def op_ms(self, graph: Any, op: Any, num_parts: int = 1, split: Any = None) -> float:
        return super().op_ms(graph, op, num_parts, split) * (10.0 if op.kind == "all_to_all" else 1.0)


def compare(make: Callable[[], nn.Module], *, batch: int = 4, parts: bool = True) -> None:
    """One step of the optimized model and of an eager one: bit-equal, or close where ranges run in ``parts``."""
    torch._dynamo.reset()
    eager, ours = make(), make()
    planning = Planning(config=PlannerConfig(max_parts=2, partition="dp" if parts else "none"), timeout_s=60.0)
    step = optimize(ours, costs=Dear(), planning=planning)
    (inputs,) = batches(1, batch)
    losses = []
    for run in (eager, step):
        torch.manual_seed(0)
        losses.append(run(*inputs))
        losses[-1].backward()
    assert bool(step.plan.regions) == parts, step.describe()
    pairs = [(losses[0].detach(), losses[1].detach())]
    pairs += [(p.grad, q.grad) for p, q in zip(eager.parameters(), ours.parameters(), strict=True)]
    for want, found in pairs:
        if want is None or found is None:
            assert want is found
        elif step.plan.regions:
            assert (want - found).norm() <= 1e-5 * want.norm(), (want - found).norm() / want.norm()
        else:
            assert torch.equal(want, found)


class Plain(nn.Module):
    """A layer in the style of GShard, of plain torch ops only, and a loss."""

    def __init__(self, top_k: int = 2) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(7)
        self.top_k = top_k
        self.embedding = nn.Parameter(torch.randn(40, 16, generator=rng))
        self.router = nn.Parameter(0.3 * torch.randn(16, 4, generator=rng))
        mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        self.up = nn.Parameter(0.3 * torch.randn(4, 16, 32, generator=rng)[mine].clone())
        self.down = nn.Parameter(0.3 * torch.randn(4, 32, 16, generator=rng)[mine].clone())

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = F.embedding(tokens, self.embedding).reshape(-1, 16)
        combine = self._combine(torch.softmax(x @ self.router, -1))
        buffer = torch.einsum("tec,th->ech", (combine > 0).to(x.dtype), x)
        rows = _exchange(buffer).view(2, 2, -1, 16).transpose(0, 1).reshape(2, -1, 16)
        rows = torch.einsum("eci,eih->ech", F.gelu(torch.einsum("ech,ehi->eci", rows, self.up)), self.down)
        buffer = _exchange(rows.view(2, 2, -1, 16).transpose(0, 1).reshape(4, -1, 16))
        y = x + torch.einsum("tec,ech->th", combine, buffer)
        return F.cross_entropy(y @ self.embedding.t(), targets.reshape(-1))

    def _combine(self, scores: torch.Tensor) -> torch.Tensor:
        capacity = self.top_k * len(scores) // 4
        values, experts = scores.topk(self.top_k, -1)
        used, combine = torch.zeros(4, dtype=torch.int64), torch.zeros(())
        for choice in range(self.top_k):
            mask = F.one_hot(experts[:, choice], 4)
            places = torch.cumsum(mask, 0) - 1 + used
            used = used + mask.sum(0)
            kept = mask * (places < capacity)
            slots = F.one_hot((places * kept).sum(-1), capacity) * kept.sum(-1, keepdim=True)
            combine = combine + torch.einsum("te,tc->tec", values[:, choice, None] * kept, slots.to(scores.dtype))
        return combine


def _exchange(buffer: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = collectives.all_to_all_single_autograd(buffer.contiguous(), None, None, dist.group.WORLD)  # type: ignore[arg-type]
    return found


@check
def a_gate_of_plain_operators() -> None:
    compare(Plain)
    compare(Plain, parts=False)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = F.embedding(tokens, self.inner.token_embedding).view(-1, 16)
        for block in self.inner.blocks:
            x = checkpoint(lambda x, block=block: F.dropout(block(x, 8)[0], 0.1), x, use_reentrant=False)
        return F.cross_entropy(F.linear(x, self.inner.token_embedding), targets.reshape(-1))


@check
def checkpoints_draw_the_same_dropout_again() -> None:
    compare(Checkpointed, parts=False)
    compare(Checkpointed)


class Biased(MoELayer):
    """Experts with biases, and a loss of all that they compute, in free slots too."""

    def _compute(self, buffer: torch.Tensor) -> torch.Tensor:
        (experts, capacity, hidden), ranks, mine = buffer.shape, self.num_ranks, len(self.expert_ids)
        rows = buffer.view(ranks, mine, capacity, hidden).permute(1, 0, 2, 3).reshape(mine, -1, hidden)
        rows = F.gelu(torch.bmm(rows, self.up) + 0.1 + self.up.mean(1, keepdim=True))
        self.penalty = rows.square().mean()
        rows = torch.bmm(rows, self.down) + 0.3
        return rows.view(mine, ranks, capacity, hidden).permute(1, 0, 2, 3).reshape(experts, capacity, hidden)


class Penalised(nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        config = MoEConfig(hidden=16, ffn_hidden=32, num_experts=4, gate="top_k", top_k=2, capacity_factor=2.0)
        self.weight = weight
        self.embedding = nn.Parameter(model().token_embedding.detach() * 10)
        self.layer = Biased(config, group=dist.group.WORLD)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = F.embedding(tokens, self.embedding).view(-1, 16)
        x = x + self.layer(x)[0]
        loss = F.cross_entropy(F.linear(x, self.embedding), targets.reshape(-1))
        return loss + self.weight * self.layer.penalty if self.weight else loss


@check
def what_experts_compute_in_free_slots_is_kept() -> None:
    for weight in (0.0, 1.0):
        compare(lambda weight=weight: Penalised(weight))  # type: ignore[misc]


def _frozen() -> nn.Module:
    made = model()
    for layer in made.moe_layers:
        layer.up.requires_grad_(False)
        layer.router.requires_grad_(False)  # type: ignore[union-attr]
    return made


def _tied() -> nn.Module:
    made = model()
    made.moe_layers[1].up = made.moe_layers[0].up
    return made


@check
def frozen_tied_and_single_sequences() -> None:
    compare(_frozen)
    compare(_tied, batch=3)
    compare(model, batch=1)


@check
def any_error_of_one_rank_reaches_all() -> None:
    def costs(captured: Any) -> Ones:
        if dist.get_rank() == 1:
            raise ValueError("no clock")
        return Ones()

    step = optimize(model(), costs=costs, planning=Planning(timeout_s=60.0))
    (inputs,) = batches(1)
    begin_s = time.monotonic()
    with pytest.raises(LlmsysError if dist.get_rank() == 0 else Exception, match="no clock"):
        step(*inputs)
    assert time.monotonic() - begin_s < 45.0
