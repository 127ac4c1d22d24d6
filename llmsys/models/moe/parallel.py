"""What expert-parallel training does outside of the compiled step: agree on shapes before, average gradients after."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from llmsys.core.errors import InputError
from llmsys.models.moe.layer import MoELayer


def check_capacity(layer: MoELayer, num_tokens: int, group: dist.ProcessGroup | None = None) -> int:
    """The capacity for ``num_tokens`` tokens, after all ranks of the group have found that theirs is the same.

    A collective call, to be made before the first step of each new shape: ranks whose capacities differ would hang in
    the all-to-all, or get rows of others. ``group`` defaults to the layer's; without one nothing is exchanged. Blocks,
    at most for the group's own timeout. Raises InputError on every rank, with the values of two that differ.
    """
    capacity = layer.config.capacity(num_tokens)
    group = layer.group if group is None else group
    if group is None:
        return capacity
    found: list[tuple[int, int]] = [(0, 0)] * dist.get_world_size(group)
    dist.all_gather_object(found, (capacity, num_tokens), group=group)
    for rank, (theirs, tokens) in enumerate(found):
        if theirs != found[0][0]:
            raise InputError(
                "capacity differs by rank",
                expected=f"the same capacity on all ranks; rank 0 has {found[0][0]} for {found[0][1]} tokens",
                found=f"rank {rank} has {theirs} for {tokens} tokens",
                fix="give every rank equally many tokens: drop or pad the last batch, or set one capacity_factor",
            )
    return capacity


def average_gradients(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Make each gradient that of the mean of the ranks' losses, in place. A collective call; blocks.

    Gradients of what every rank holds are averaged over the ranks. Those of experts are sums over all ranks' tokens
    already, because the backward all-to-all brought them: they are only divided by the number of ranks. A parameter
    without a gradient counts as one of zeros.
    """
    num_ranks = dist.get_world_size(group)
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    experts = {id(parameter) for layer in layers if layer.group is not None for parameter in layer.expert_parameters()}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if id(parameter) not in experts:
            dist.all_reduce(parameter.grad, group=group)
        parameter.grad /= num_ranks
