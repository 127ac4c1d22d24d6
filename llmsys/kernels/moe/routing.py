"""Gates: which experts a token goes to, and which slots of their buffers its rows get.

Vectorised torch, the same on CPU and CUDA; on CUDA the host does not wait. Ties of scores go to the lower expert id,
and between tokens to the earlier token, so a result does not depend on the device or on how a batch is cut.
"""

from __future__ import annotations

import torch

TOKEN_MAJOR_GATES = ("switch", "top_k", "random")
GATES = (*TOKEN_MAJOR_GATES, "batch_prioritized", "expert_choice")

Routes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def route(scores: torch.Tensor, used: torch.Tensor, gate: str, top_k: int, capacity: int) -> Routes:
    """(experts, slots, used_after) of the tokens of ``scores``; see the custom op ``moe_route``."""
    if gate == "expert_choice":
        return _experts_choose(scores, used, capacity)
    experts = best_experts(scores, top_k)
    if gate != "batch_prioritized":
        ranks, counts = _ranks_by_expert(experts.flatten(), scores.shape[1])
        return experts, *_slots(experts, ranks.view_as(experts), counts, used, capacity)
    # Riquelme et al. 2021: all first choices before any second one, each by decreasing score of the token.
    order = scores.amax(dim=1).argsort(descending=True, stable=True) if len(scores) else used[:0]
    ranks, counts = _ranks_by_expert(experts[order].T.flatten(), scores.shape[1])
    by_token = torch.empty_like(experts).index_copy_(0, order, ranks.view(top_k, -1).T)
    return experts, *_slots(experts, by_token, counts, used, capacity)


def best_experts(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """The ``top_k`` experts of the greatest scores, int64 (T, top_k), best first.

    ``Tensor.topk`` says nothing about ties, and a stable sort of all experts takes five times as long.
    """
    if top_k == 1:
        return scores.argmax(dim=1, keepdim=True)
    left = scores.clamp(min=torch.finfo(scores.dtype).min)  # so that only taken experts have -inf
    chosen = []
    for _ in range(top_k):
        chosen.append(left.argmax(dim=1, keepdim=True))
        left.scatter_(1, chosen[-1], -torch.inf)
    return torch.cat(chosen, dim=1)


def _ranks_by_expert(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each entry, how many earlier entries are equal; and how many entries each expert has."""
    in_order, place = experts.sort(stable=True)
    ids = torch.arange(num_experts + 1, device=experts.device)
    first = torch.searchsorted(in_order, ids)
    ranks = torch.arange(len(experts), device=experts.device) - first[in_order]
    return torch.empty_like(experts).index_copy_(0, place, ranks), first.diff()


def _slots(
    experts: torch.Tensor, ranks: torch.Tensor, counts: torch.Tensor, used: torch.Tensor, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    slots = used[experts] + ranks
    return slots.masked_fill_(slots >= capacity, -1), (used + counts).clamp_(max=capacity)


def _experts_choose(scores: torch.Tensor, used: torch.Tensor, capacity: int) -> Routes:
    num_tokens, num_experts = scores.shape
    order = scores.T.argsort(dim=1, descending=True, stable=True)
    free = used[:, None] + torch.arange(num_tokens, device=scores.device)
    free.masked_fill_(free >= capacity, -1)
    slots = torch.empty_like(order).scatter_(1, order, free).T.contiguous()
    experts = torch.arange(num_experts, device=scores.device).repeat(num_tokens, 1)
    return experts, slots, (used + num_tokens).clamp_(max=capacity)
