"""Dispatch and combine in plain torch: what the Triton kernels are tested against, and what runs on the CPU.

Shapes as in the custom ops. ``slots`` of -1 are dropped choices: they are not written, and read as rows of zeros. Half
precision is multiplied and added in float32. Every result is the same on each run.
"""

from __future__ import annotations

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which products of elements of ``dtype`` are added."""
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype


def dispatch(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    experts: torch.Tensor,
    slots: torch.Tensor,
    num_experts: int,
    capacity: int,
) -> torch.Tensor:
    """Row ``slots[t, k]`` of expert ``experts[t, k]`` is ``x[t]``, times ``weights[t, k]`` if given; else zeros."""
    num_choices, size = experts.numel(), num_experts * capacity
    if not num_choices:
        return x.new_zeros(num_experts, capacity, x.shape[1])
    places = torch.where(slots < 0, size, experts * capacity + slots).flatten()
    choice = torch.full((size + 1,), num_choices, device=x.device)
    choice.scatter_(0, places, torch.arange(num_choices, device=x.device))
    free = choice[:size] == num_choices
    choice = choice[:size].clamp_(max=num_choices - 1)
    rows = x.index_select(0, choice // experts.shape[1])
    if weights is not None:
        factor = weights.flatten().index_select(0, choice)[:, None]
        rows = (rows.to(accumulator(x.dtype)) * factor.to(accumulator(x.dtype))).to(x.dtype)
    return rows.index_fill_(0, free.nonzero().flatten(), 0).view(num_experts, capacity, x.shape[1])


def combine(
    buffer: torch.Tensor, weights: torch.Tensor | None, experts: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """Of each token, the sum of its rows of ``buffer``, each times its weight if given, in the order of choices."""
    total: torch.Tensor | None = None
    for k in range(experts.shape[1]):
        rows = _rows(buffer, None if weights is None else weights[:, k], experts[:, k], slots[:, k])
        total = rows if total is None else total.add_(rows)
    assert total is not None
    return total.to(buffer.dtype)


def combine_weights_grad(
    grad: torch.Tensor, buffer: torch.Tensor, experts: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """Of each choice, the dot product of ``grad[t]`` and its row of ``buffer``."""
    dtype = accumulator(buffer.dtype)
    found = torch.zeros(experts.shape, dtype=dtype, device=buffer.device)
    for k in range(experts.shape[1]):
        found[:, k] = (_rows(buffer, None, experts[:, k], slots[:, k]) * grad.to(dtype)).sum(dim=1)
    return found


def _rows(
    buffer: torch.Tensor, weights: torch.Tensor | None, experts: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """New rows in the accumulator's type, one for each entry of ``experts``."""
    dtype = accumulator(buffer.dtype)
    places = (experts * buffer.shape[1] + slots).masked_fill_(slots < 0, 0)
    rows = buffer.flatten(0, 1).index_select(0, places).to(dtype)
    if weights is not None:
        rows.mul_(weights[:, None].to(dtype))
    # Filled last: neither a row that has not arrived nor a weight of a dropped choice may be NaN in the result.
    return rows.index_fill_(0, (slots < 0).nonzero().flatten(), 0)
