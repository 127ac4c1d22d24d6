"""Checks of what the custom ops get. Values are looked at on the CPU only: elsewhere the host would have to wait."""

from __future__ import annotations

import torch

from llmsys.core.errors import InputError
from llmsys.kernels.moe.routing import GATES


def require_scores(scores: torch.Tensor, used: torch.Tensor, gate: str, top_k: int, capacity: int) -> None:
    if gate not in GATES:
        raise InputError(
            "no such gate", expected=f"one of {', '.join(GATES)}", found=repr(gate), fix="set gate to one of these"
        )
    if scores.ndim != 2 or scores.shape[1] < 1 or not scores.is_floating_point():
        raise _wrong("scores", "floating-point numbers of shape (tokens, experts), with an expert", scores)
    num_experts = scores.shape[1]
    if used.shape != (num_experts,) or used.dtype != torch.int64:
        raise _wrong("used", f"torch.int64 of shape ({num_experts},), the slots taken of each expert", used)
    most = 1 if gate == "switch" else num_experts
    if gate != "expert_choice" and not 1 <= top_k <= most:
        raise InputError(
            f"gate {gate!r} cannot choose so many experts",
            expected=f"top_k from 1 to {most}, with {num_experts} experts",
            found=f"top_k={top_k}",
            fix="set top_k, or the gate 'top_k' for more than one expert",
        )
    if capacity < 1:
        raise InputError("no capacity", expected="at least 1", found=f"capacity={capacity}", fix="raise capacity")


def require_used(used: torch.Tensor, capacity: int) -> None:
    if used.device.type == "cpu" and not 0 <= int(used.min()) <= int(used.max()) <= capacity:
        raise InputError(
            "the used slots do not fit the capacity",
            expected=f"numbers from 0 to the capacity {capacity}",
            found=f"from {int(used.min())} to {int(used.max())}",
            fix="pass zeros, or used_after of a call with the same capacity",
        )


def require_choices(experts: torch.Tensor, slots: torch.Tensor, num_experts: int, capacity: int) -> None:
    for name, ids in (("experts", experts), ("slots", slots)):
        if ids.ndim != 2 or not ids.shape[1] or ids.shape != experts.shape or ids.dtype != torch.int64:
            raise _wrong(name, "torch.int64 of shape (tokens, choices), at least one choice, equal for both", ids)
    if num_experts < 1 or capacity < 1:
        raise InputError(
            "buffers without slots",
            expected="at least one expert and a capacity of at least 1",
            found=f"num_experts={num_experts}, capacity={capacity}",
            fix="set both to those that the gate had",
        )
    if experts.device.type != "cpu" or not experts.numel():
        return
    for name, ids, first, end in (("experts", experts, 0, num_experts), ("slots", slots, -1, capacity)):
        low, high = (int(value) for value in ids.aminmax())
        if low < first or high >= end:
            raise InputError(
                f"{name} are out of range",
                expected=f"numbers from {first} to {end - 1}",
                found=f"from {low} to {high}",
                fix="pass the experts, slots and capacity of one call of moe_route",
            )


def require_buffer(buffer: torch.Tensor, experts: torch.Tensor, slots: torch.Tensor) -> None:
    if buffer.ndim != 3 or not buffer.is_floating_point():
        raise _wrong("buffer", "floating-point numbers of shape (experts, capacity, hidden)", buffer)
    require_choices(experts, slots, buffer.shape[0], buffer.shape[1])


def require_rows(name: str, rows: torch.Tensor, experts: torch.Tensor) -> None:
    if rows.ndim != 2 or not rows.is_floating_point() or experts.ndim != 2 or len(rows) != len(experts):
        raise _wrong(name, f"a row for each token, where experts is {tuple(experts.shape)}", rows)


def require_weights(weights: torch.Tensor, experts: torch.Tensor) -> None:
    if weights.shape != experts.shape or not weights.is_floating_point():
        raise _wrong("weights", f"floating-point numbers of shape {tuple(experts.shape)}, as experts", weights)


def require_like(name: str, rows: torch.Tensor, buffer: torch.Tensor) -> None:
    if rows.shape[1] != buffer.shape[2] or rows.dtype != buffer.dtype:
        raise _wrong(name, f"rows of {buffer.dtype} and {buffer.shape[2]} elements, as those of the buffer", rows)


def _wrong(name: str, expected: str, found: torch.Tensor) -> InputError:
    return InputError(
        f"{name} has the wrong shape or type",
        expected=expected,
        found=f"{found.dtype} of shape {tuple(found.shape)}",
        fix=f"pass {name} as the op's docstring describes it",
    )
