"""The mixture-of-experts layer, with its experts spread over the ranks of a process group.

All of forward is captured by torch.compile(fullgraph=True): shapes follow from the shape of the input, and no value is
looked at on the host.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import _functional_collectives as collectives

from llmsys.core.errors import ConfigError
from llmsys.kernels.moe import moe_combine, moe_dispatch, moe_route
from llmsys.models.moe.config import MoEConfig, capacity_of
from llmsys.models.seeds import seeded_normal
from llmsys.models.transformer import FeedForward, activate, input_columns


class MoELayer(nn.Module):
    """Rank r of the ``group``'s G ranks holds experts [r * E / G, (r + 1) * E / G). Without a group, all of them.

    Every rank of the group calls forward and backward equally often, with tokens for which the capacities are equal:
    `check_capacity` finds out. ``key``: what the parameters are drawn from, the seed first; equal on all ranks.
    ``output_std``: of the experts' second matrices, ``config.init_std`` by default.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        group: dist.ProcessGroup | None = None,
        key: tuple[object, ...] = (0, "moe"),
        output_std: float | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.group = group
        self._slots_per_token = config.slots_per_token
        self.num_ranks = 1 if group is None else dist.get_world_size(group)
        if config.num_experts % self.num_ranks:
            raise ConfigError(
                "experts cannot be shared evenly",
                expected=f"a multiple of {self.num_ranks}, the ranks of the group",
                found=f"num_experts={config.num_experts}",
                fix="set num_experts, or use another group",
            )
        per_rank = config.num_experts // self.num_ranks
        first = 0 if group is None else dist.get_rank(group) * per_rank
        self.expert_ids = range(first, first + per_rank)
        down_std = config.init_std if output_std is None else output_std
        up_shape = (config.hidden, input_columns(config.ffn_hidden, config.activation))
        self.up = self._experts(up_shape, config.init_std, *key, "up")
        self.down = self._experts((config.ffn_hidden, config.hidden), down_std, *key, "down")
        self.router: nn.Parameter | None = None
        if config.gate != "random":
            weights = seeded_normal((config.num_experts, config.hidden), config.init_std, *key, "router")
            self.router = nn.Parameter(weights)
        self.shared = _shared_expert(config, down_std, (*key, "shared")) if config.shared_ffn_hidden else None

    def _experts(self, shape: tuple[int, int], std: float, *key: object) -> nn.Parameter:
        return nn.Parameter(torch.stack([seeded_normal(shape, std, *key, expert) for expert in self.expert_ids]))

    def expert_parameters(self) -> tuple[nn.Parameter, ...]:
        """Those that differ by rank: the matrices of this rank's experts."""
        return self.up, self.down

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(T, hidden) to (T, hidden), and the weighted load-balancing loss of this rank's tokens if there is one.

        A token all of whose choices are dropped gets zeros, and what the shared expert makes of it.
        """
        config = self.config
        capacity = capacity_of(x.shape[0], self._slots_per_token)
        scores = self._scores(x)
        used = torch.zeros(config.num_experts, dtype=torch.int64, device=x.device)
        experts, slots, _ = moe_route(scores, used, config.gate, config.top_k, capacity)
        buffer = moe_dispatch(x, experts, slots, config.num_experts, capacity)
        buffer = self._exchange(self._compute(self._exchange(buffer)))
        y = moe_combine(buffer, self._weights(scores, experts), experts, slots)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, self._aux_loss(scores, experts) if config.aux_loss_weight else None

    def _scores(self, x: torch.Tensor) -> torch.Tensor:
        if self.router is None:
            return torch.rand(x.shape[0], self.config.num_experts, device=x.device)
        logits = F.linear(x, self.router)
        return torch.softmax(logits.float() if logits.dtype.itemsize < 4 else logits, dim=-1)

    def _weights(self, scores: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        if self.router is None:
            return torch.full_like(scores[:, : self.config.top_k], 1.0 / self.config.top_k)
        weights = scores.gather(1, experts)
        return weights / weights.sum(dim=1, keepdim=True) if self.config.renormalise else weights

    def _exchange(self, buffer: torch.Tensor) -> torch.Tensor:
        """All-to-all of (E, C, H): dimension 0 is (rank, expert of the rank) on both sides."""
        if self.group is None:
            return buffer
        received: torch.Tensor = collectives.all_to_all_single_autograd(buffer, None, None, self.group)
        return received

    def _compute(self, buffer: torch.Tensor) -> torch.Tensor:
        """Each of this rank's experts on the rows that all ranks sent it."""
        (num_experts, capacity, hidden), ranks, mine = buffer.shape, self.num_ranks, len(self.expert_ids)
        rows = buffer.view(ranks, mine, capacity, hidden).permute(1, 0, 2, 3).reshape(mine, ranks * capacity, hidden)
        rows = torch.bmm(activate(torch.bmm(rows, self.up), self.config.activation), self.down)
        return rows.view(mine, ranks, capacity, hidden).permute(1, 0, 2, 3).reshape(num_experts, capacity, hidden)

    def _aux_loss(self, scores: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        num_experts = self.config.num_experts
        ids = torch.arange(num_experts, device=experts.device)
        share = (experts.unsqueeze(2) == ids).to(scores.dtype).mean(dim=(0, 1))
        return self.config.aux_loss_weight * num_experts * (share * scores.mean(dim=0)).sum()


def _shared_expert(config: MoEConfig, down_std: float, key: tuple[object, ...]) -> FeedForward:
    return FeedForward(
        config.hidden,
        config.shared_ffn_hidden,
        activation=config.activation,
        bias=False,
        std=config.init_std,
        output_std=down_std,
        key=key,
    )
