"""The custom ops of mixture-of-experts layers, in torch's namespace "llmsys".

They run eagerly and inside torch.compile (fullgraph), on CPU and CUDA, change none of their inputs and give the same
result on each run. T tokens, E experts, K choices of a token, C slots of an expert (its capacity), H hidden elements.
``experts`` and ``slots`` are int64 (T, K): choice k of token t has slot ``slots[t, k]`` of expert ``experts[t, k]``, or
was dropped where the slot is -1. No two choices may have the same slot. On the CPU ids out of range raise InputError;
on CUDA, where looking at them would make the host wait, such choices are treated as dropped.

Gradients are of first order: a second backward through them raises torch's error.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch.library import custom_op

from llmsys.kernels.moe import reference, routing, rows
from llmsys.kernels.moe.checks import (
    require_buffer,
    require_choices,
    require_like,
    require_rows,
    require_scores,
    require_used,
    require_weights,
)

_CHOICES = "Tensor experts, Tensor slots"


def _kernels(tensor: torch.Tensor) -> ModuleType:
    return rows if tensor.is_cuda else reference


@custom_op(
    "llmsys::moe_route",
    mutates_args=(),
    schema="(Tensor scores, Tensor used, str gate, int top_k, SymInt capacity) -> (Tensor, Tensor, Tensor)",
)
def moe_route(scores: torch.Tensor, used: torch.Tensor, gate: str, top_k: int, capacity: int) -> routing.Routes:
    """Choose experts and slots by ``scores`` (T, E): (experts, slots, used_after). Not differentiable.

    ``used``: int64 (E,), the slots of each expert that are taken already. ``used_after``: the same with those given
    here. ``gate``:

    - "switch" (Fedus et al. 2021): the best expert; ``top_k`` is 1;
    - "top_k": the ``top_k`` best, the best first;
    - "random": as "top_k", for scores that the caller drew at random;
    - "batch_prioritized" (Riquelme et al. 2021): as "top_k", but slots go to all first choices before any second one,
      and in each round to the tokens with the greatest scores first;
    - "expert_choice" (Zhou et al. 2022): each expert takes tokens of the greatest scores until it is full. K is then E,
      choice e of every token is expert e, and ``top_k`` is not used.

    The first three give free slots to tokens in their order, and to each one's choices in theirs; what finds an expert
    full is dropped. So routing a batch in consecutive slices, each with the ``used_after`` of the one before, gives
    what routing the whole gives: the capacity passing of Lancet (MLSys'24). The other two need the whole batch.
    """
    require_scores(scores, used, gate, top_k, capacity)
    require_used(used, capacity)
    return routing.route(scores, used, gate, top_k, capacity)


@moe_route.register_fake
def _(scores: torch.Tensor, used: torch.Tensor, gate: str, top_k: int, capacity: int) -> routing.Routes:
    require_scores(scores, used, gate, top_k, capacity)
    num_choices = scores.shape[1] if gate == "expert_choice" else top_k
    experts, slots = (used.new_empty(scores.shape[0], num_choices) for _ in range(2))
    return experts, slots, torch.empty_like(used)


@custom_op(
    "llmsys::moe_dispatch",
    mutates_args=(),
    schema=f"(Tensor x, {_CHOICES}, SymInt num_experts, SymInt capacity) -> Tensor",
)
def moe_dispatch(
    x: torch.Tensor, experts: torch.Tensor, slots: torch.Tensor, num_experts: int, capacity: int
) -> torch.Tensor:
    """The experts' buffers (E, C, H): the rows of ``x`` (T, H) in the slots of their choices, zeros in the others."""
    require_rows("x", x, experts)
    require_choices(experts, slots, num_experts, capacity)
    found: torch.Tensor = _kernels(x).dispatch(x, None, experts, slots, num_experts, capacity)
    return found


@moe_dispatch.register_fake
def _(x: torch.Tensor, experts: torch.Tensor, slots: torch.Tensor, num_experts: int, capacity: int) -> torch.Tensor:
    return x.new_empty(num_experts, capacity, x.shape[1])


@custom_op("llmsys::moe_gather", mutates_args=(), schema=f"(Tensor buffer, {_CHOICES}) -> Tensor")
def moe_gather(buffer: torch.Tensor, experts: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Of each token, the sum of its rows of ``buffer`` (E, C, H): (T, H). The gradient of `moe_dispatch` in x."""
    require_buffer(buffer, experts, slots)
    found: torch.Tensor = _kernels(buffer).combine(buffer, None, experts, slots)
    return found


@moe_gather.register_fake
def _(buffer: torch.Tensor, experts: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return buffer.new_empty(experts.shape[0], buffer.shape[2])


@custom_op("llmsys::moe_combine", mutates_args=(), schema=f"(Tensor buffer, Tensor weights, {_CHOICES}) -> Tensor")
def moe_combine(
    buffer: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """Of each token, its rows of ``buffer`` (E, C, H) times ``weights`` (T, K), added: (T, H) of the buffer's type.

    Rows are added in the order of the choices. A token all of whose choices were dropped gets zeros.
    """
    require_buffer(buffer, experts, slots)
    require_weights(weights, experts)
    found: torch.Tensor = _kernels(buffer).combine(buffer, weights, experts, slots)
    return found


@moe_combine.register_fake
def _(buffer: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return buffer.new_empty(experts.shape[0], buffer.shape[2])


@custom_op(
    "llmsys::moe_combine_buffer_grad",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor weights, {_CHOICES}, SymInt num_experts, SymInt capacity) -> Tensor",
)
def moe_combine_buffer_grad(
    grad: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    slots: torch.Tensor,
    num_experts: int,
    capacity: int,
) -> torch.Tensor:
    """The gradient of `moe_combine` in the buffer: rows of ``grad`` (T, H) times their weights, in (E, C, H)."""
    require_rows("grad", grad, experts)
    require_weights(weights, experts)
    require_choices(experts, slots, num_experts, capacity)
    found: torch.Tensor = _kernels(grad).dispatch(grad, weights, experts, slots, num_experts, capacity)
    return found


@moe_combine_buffer_grad.register_fake
def _(
    grad: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    slots: torch.Tensor,
    num_experts: int,
    capacity: int,
) -> torch.Tensor:
    return grad.new_empty(num_experts, capacity, grad.shape[1])


@custom_op(
    "llmsys::moe_combine_weights_grad",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor buffer, {_CHOICES}) -> Tensor",
)
def moe_combine_weights_grad(
    grad: torch.Tensor, buffer: torch.Tensor, experts: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """The gradient of `moe_combine` in the weights, (T, K): float32 for half precision, else the buffer's type.

    Dropped choices get zeros.
    """
    require_buffer(buffer, experts, slots)
    require_rows("grad", grad, experts)
    require_like("grad", grad, buffer)
    found: torch.Tensor = _kernels(buffer).combine_weights_grad(grad, buffer, experts, slots)
    return found


@moe_combine_weights_grad.register_fake
def _(grad: torch.Tensor, buffer: torch.Tensor, experts: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return torch.empty(experts.shape, dtype=reference.accumulator(buffer.dtype), device=buffer.device)


def _keep_dispatch(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, experts, slots, _, _ = inputs
    ctx.save_for_backward(experts, slots)


def _dispatch_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return moe_gather(grad, *ctx.saved_tensors), None, None, None, None


def _keep_combine(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    buffer, weights, experts, slots = inputs
    ctx.save_for_backward(buffer if ctx.needs_input_grad[1] else None, weights, experts, slots)
    ctx.places = buffer.shape[:2]


def _combine_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    buffer, weights, experts, slots = ctx.saved_tensors
    buffer_grad = weights_grad = None
    if ctx.needs_input_grad[0]:
        buffer_grad = moe_combine_buffer_grad(grad, weights, experts, slots, *ctx.places)
    if ctx.needs_input_grad[1]:
        weights_grad = moe_combine_weights_grad(grad, buffer, experts, slots).to(weights.dtype)
    return buffer_grad, weights_grad, None, None


moe_dispatch.register_autograd(_dispatch_backward, setup_context=_keep_dispatch)
moe_combine.register_autograd(_combine_backward, setup_context=_keep_combine)
