"""The Triton kernels of dispatch and combine, with the signatures of `reference`.

For CUDA tensors, or any where TRITON_INTERPRET=1 was set before this file is imported. They are queued on the current
stream of the tensors' device, and the host does not wait. A choice whose expert or slot is out of range is dropped.

Only Triton's built-in functions are called: those of its own library are interpreted or not by what the environment
said when triton itself was imported.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from llmsys.kernels.moe.reference import accumulator

_TILE = 4096  # elements that one program holds
_MAX_COLS = 1024
_TRITON_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _add(first, second):  # type: ignore[no-untyped-def]
    return first + second


@triton.jit
def _places(experts, slots, choice, live, num_experts, capacity):  # type: ignore[no-untyped-def]
    """The rows of the buffer at which choices lie, and which of them are not dropped."""
    expert = tl.load(experts + choice, mask=live, other=-1)
    slot = tl.load(slots + choice, mask=live, other=-1)
    kept = (expert >= 0) & (expert < num_experts) & (slot >= 0) & (slot < capacity)
    return expert * capacity + slot, kept


@triton.jit  # type: ignore[untyped-decorator]
def _dispatch_kernel(  # type: ignore[no-untyped-def]
    x,
    weights,
    experts,
    slots,
    buffer,
    num_tokens,
    num_experts,
    capacity,
    num_choices: tl.constexpr,
    hidden: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """Write a tile of ``x``, ROWS tokens x COLS columns, to the places of its choices. All tensors are contiguous."""
    # 64 bits from the start: buffers may have more than 2^31 elements.
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)
    live = token < num_tokens
    inside = (col < hidden)[None, :]
    tile = tl.load(x + token[:, None] * hidden + col[None, :], mask=live[:, None] & inside)
    for k in range(num_choices):
        place, kept = _places(experts, slots, token * num_choices + k, live, num_experts, capacity)
        row = tile
        if weights is not None:
            factor = tl.load(weights + token * num_choices + k, mask=kept, other=0).to(ACCUMULATOR)
            row = (tile.to(ACCUMULATOR) * factor[:, None]).to(tile.dtype)
        tl.store(buffer + place[:, None] * hidden + col[None, :], row, mask=kept[:, None] & inside)


@triton.jit  # type: ignore[untyped-decorator]
def _combine_kernel(  # type: ignore[no-untyped-def]
    buffer,
    weights,
    experts,
    slots,
    out,
    num_tokens,
    num_experts,
    capacity,
    num_choices: tl.constexpr,
    hidden: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """Add the rows of a tile's choices in their order. All tensors are contiguous."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)
    live = token < num_tokens
    inside = (col < hidden)[None, :]
    total = tl.full((ROWS, COLS), 0, ACCUMULATOR)
    for k in range(num_choices):
        place, kept = _places(experts, slots, token * num_choices + k, live, num_experts, capacity)
        row = tl.load(buffer + place[:, None] * hidden + col[None, :], mask=kept[:, None] & inside, other=0)
        if weights is None:
            total += row.to(ACCUMULATOR)
        else:
            factor = tl.load(weights + token * num_choices + k, mask=kept, other=0).to(ACCUMULATOR)
            total += row.to(ACCUMULATOR) * factor[:, None]
    tl.store(out + token[:, None] * hidden + col[None, :], total.to(out.dtype.element_ty), mask=live[:, None] & inside)


@triton.jit  # type: ignore[untyped-decorator]
def _weights_grad_kernel(  # type: ignore[no-untyped-def]
    grad,
    buffer,
    experts,
    slots,
    out,
    num_tokens,
    num_experts,
    capacity,
    num_choices: tl.constexpr,
    hidden: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """Dot products for one choice of ROWS tokens. All tensors are contiguous."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    choice = token * num_choices + tl.program_id(1)
    live = token < num_tokens
    place, kept = _places(experts, slots, choice, live, num_experts, capacity)
    total = tl.full((ROWS, COLS), 0, ACCUMULATOR)
    for first in range(0, hidden, COLS):
        col = first + tl.arange(0, COLS)
        mask = kept[:, None] & (col < hidden)[None, :]
        row = tl.load(buffer + place[:, None] * hidden + col[None, :], mask=mask, other=0).to(ACCUMULATOR)
        total += row * tl.load(grad + token[:, None] * hidden + col[None, :], mask=mask, other=0).to(ACCUMULATOR)
    tl.store(out + choice, tl.reduce(total, 1, _add), mask=live)


# Decided by triton when the decorator ran, so later changes of TRITON_INTERPRET do not count.
INTERPRETED = not isinstance(_combine_kernel, triton.JITFunction)


def dispatch(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    experts: torch.Tensor,
    slots: torch.Tensor,
    num_experts: int,
    capacity: int,
) -> torch.Tensor:
    buffer = x.new_zeros(num_experts, capacity, x.shape[1])
    _launch(_dispatch_kernel, (x, weights, experts, slots, buffer), buffer, experts)
    return buffer


def combine(
    buffer: torch.Tensor, weights: torch.Tensor | None, experts: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    out = buffer.new_empty(len(experts), buffer.shape[2])
    _launch(_combine_kernel, (buffer, weights, experts, slots, out), buffer, experts)
    return out


def combine_weights_grad(
    grad: torch.Tensor, buffer: torch.Tensor, experts: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    out = torch.empty(experts.shape, dtype=accumulator(buffer.dtype), device=buffer.device)
    _launch(_weights_grad_kernel, (grad, buffer, experts, slots, out), buffer, experts, choices_apart=True)
    return out


def _launch(  # type: ignore[no-untyped-def]
    kernel,
    tensors: tuple[torch.Tensor | None, ...],
    buffer: torch.Tensor,
    experts: torch.Tensor,
    *,
    choices_apart=False,
) -> None:
    """``choices_apart``: a program for each choice that walks over all columns, instead of one for each column tile."""
    num_tokens, num_choices = experts.shape
    num_experts, capacity, hidden = buffer.shape
    if not num_tokens or not num_choices or not hidden:
        for tensor in tensors[-1:]:
            assert tensor is not None
            tensor.zero_()
        return
    cols = min(_MAX_COLS, triton.next_power_of_2(hidden))
    rows = min(max(1, _TILE // cols), triton.next_power_of_2(num_tokens))
    grid = (triton.cdiv(num_tokens, rows), num_choices if choices_apart else triton.cdiv(hidden, cols))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(buffer.device) if buffer.is_cuda else nullcontext():
        kernel[grid](
            *(None if tensor is None else tensor.contiguous() for tensor in tensors),
            num_tokens,
            num_experts,
            capacity,
            num_choices,
            hidden,
            ACCUMULATOR=_TRITON_TYPES[accumulator(buffer.dtype)],
            ROWS=rows,
            COLS=cols,
        )
