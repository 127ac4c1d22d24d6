"""What the ranks of test_irregular.py run: a layer in parts against the same layer whole, on dense buffers.

All ranks draw the routes of all ranks from one seed, in plain loops, so the whole layer needs no code under test.
"""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist

from llmsys.comm.launch import current_rank
from llmsys.core.errors import InputError
from llmsys.lancet.runtime import irregular

Check = Callable[[int, int], None]

WIDTH = 6
LOCAL_EXPERTS = 3
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def run_checks() -> dict[str, str | None]:
    """The traceback of each check that failed on this rank, by name."""
    info = current_rank()
    found: dict[str, str | None] = {}
    for name, function in CHECKS.items():
        try:
            function(info.rank, info.world_size)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
        dist.barrier()
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tokens of one rank and their routes, as a gate would give them."""

    x: torch.Tensor
    experts: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor
    capacity: int

    @property
    def num_tokens(self) -> int:
        return len(self.x)


def drawn(
    rng: np.random.Generator,
    num_tokens: int,
    num_experts: int,
    capacity: int,
    *,
    skew: float = 0.0,
    by_priority: bool = False,
    top_k: int = 2,
    dtype: torch.dtype = torch.float32,
    width: int = WIDTH,
) -> Batch:
    """Slots in the order of tokens, or of a random priority; ``skew``: the share of tokens whose expert is 0."""
    experts = np.zeros((num_tokens, top_k), dtype=np.int64)
    for token in range(num_tokens):
        preferred = rng.permutation(num_experts)
        if rng.random() < skew:
            preferred = np.concatenate([[0], preferred[preferred != 0]])
        experts[token] = preferred[:top_k]
    slots = np.full((num_tokens, top_k), -1)
    used = [0] * num_experts
    for token in rng.permutation(num_tokens) if by_priority else range(num_tokens):
        for choice in range(top_k):
            expert = experts[token, choice]
            if used[expert] < capacity:
                slots[token, choice] = used[expert]
                used[expert] += 1
    return Batch(
        x=torch.from_numpy(rng.standard_normal((num_tokens, width))).to(dtype),
        experts=torch.from_numpy(experts),
        slots=torch.from_numpy(slots.astype(np.int64)),
        weights=torch.from_numpy(rng.random((num_tokens, top_k))).to(dtype),
        capacity=capacity,
    )


def whole_dispatch(batch: Batch, num_experts: int) -> torch.Tensor:
    buffer = batch.x.new_zeros(num_experts, batch.capacity, batch.x.shape[1])
    for token in range(batch.num_tokens):
        for expert, slot in zip(batch.experts[token].tolist(), batch.slots[token].tolist(), strict=True):
            if slot >= 0:
                buffer[expert, slot] = batch.x[token]
    return buffer


def whole_combine(batch: Batch, buffer: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(batch.x)
    for token in range(batch.num_tokens):
        for choice in range(batch.slots.shape[1]):
            slot = int(batch.slots[token, choice])
            if slot >= 0:
                y[token] += batch.weights[token, choice] * buffer[batch.experts[token, choice], slot]
    return y


def exchanged(buffer: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(buffer)
    dist.all_to_all_single(result, buffer.contiguous())
    return result


def expert(buffer: torch.Tensor, rank: int) -> torch.Tensor:
    """Rows (local experts, rows, H) through experts that all differ; zero stays zero."""
    scale = torch.arange(1, len(buffer) + 1, dtype=buffer.dtype) + 10 * rank
    return (buffer * scale[:, None, None]).relu() - buffer


def by_expert(buffer: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """From (ranks * local experts, C, H) to (local experts, ranks * C, H)."""
    grouped = buffer.view(num_ranks, -1, *buffer.shape[1:]).permute(1, 0, 2, 3)
    return grouped.reshape(len(grouped), -1, buffer.shape[-1])


def by_source(buffer: torch.Tensor, num_ranks: int) -> torch.Tensor:
    grouped = buffer.view(len(buffer), num_ranks, -1, buffer.shape[-1]).permute(1, 0, 2, 3)
    return grouped.reshape(len(buffer) * num_ranks, -1, buffer.shape[-1])


@dataclass(slots=True, kw_only=True)
class Parts:
    """What a layer in parts made: the tensors of each part, and the rows of each at the sender and receiver."""

    sent: list[irregular.PartRows]
    received: list[irregular.PartRows]
    dispatched: list[torch.Tensor]
    arrived: list[torch.Tensor]
    inner: list[torch.Tensor]
    returned: list[torch.Tensor]
    y: list[torch.Tensor]


def in_parts(batch: Batch, bounds: Sequence[int], rank: int, num_ranks: int) -> Parts:
    """All parts are started before the first is waited for."""
    made = Parts(sent=[], received=[], dispatched=[], arrived=[], inner=[], returned=[], y=[])
    name, pending = dist.group.WORLD.group_name, []
    cuts = list(itertools.pairwise(bounds))
    for number, (low, high) in enumerate(cuts):
        x, experts, slots = batch.x[low:high], batch.experts[low:high], batch.slots[low:high]
        buffer, rows = irregular.dispatch(x, experts, slots, num_ranks * LOCAL_EXPERTS)
        made.dispatched.append(buffer)
        made.sent.append(rows)
        pending.append(irregular.start(buffer, rows, name, f"part {number}", 60.0))
    back = []
    for number, there in enumerate(pending):
        buffer, rows = irregular.wait(there)
        made.arrived.append(buffer)
        made.received.append(rows)
        made.inner.append(expert(by_expert(buffer, num_ranks), rank))
        result = by_source(made.inner[-1], num_ranks)
        back.append(irregular.start_back(result, rows, made.sent[number], name, f"part {number} back", 60.0))
    for (low, high), rows, there in zip(cuts, made.sent, back, strict=True):
        made.returned.append(irregular.wait_back(there))
        weights, experts, slots = batch.weights[low:high], batch.experts[low:high], batch.slots[low:high]
        made.y.append(irregular.combine(made.returned[-1], weights, experts, slots, rows))
    return made


def compare(batches: Sequence[Batch], num_parts: int, rank: int, num_ranks: int) -> None:
    """Every tensor of the whole layer, and the layer's result, from parts."""
    batch = batches[rank]
    num_experts, capacity = num_ranks * LOCAL_EXPERTS, batch.capacity
    bounds = [part * batch.num_tokens // num_parts for part in range(num_parts + 1)]
    made = in_parts(batch, bounds, rank, num_ranks)

    dispatched = whole_dispatch(batch, num_experts)
    arrived = exchanged(dispatched)
    inner = expert(by_expert(arrived, num_ranks), rank)
    returned = exchanged(by_source(inner, num_ranks))
    outer = ("g", "e", "c")
    joined = [
        (dispatched, made.dispatched, made.sent, outer),
        (arrived, made.arrived, made.received, outer),
        (inner, made.inner, made.received, ("e", "g", "c")),
        (returned, made.returned, made.sent, outer),
    ]
    for expected, parts, rows, order in joined:
        found = irregular.join(parts, rows, capacity, order, shape=tuple(expected.shape))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat(made.y), whole_combine(batch, returned))
    split = irregular.join(
        made.arrived, made.received, capacity, outer, shape=(num_ranks, LOCAL_EXPERTS, capacity, arrived.shape[-1])
    )
    assert torch.equal(split.flatten(0, 1), arrived)


def draw_all(seed: int, num_ranks: int, num_tokens: Sequence[int], capacity: int, **how: object) -> list[Batch]:
    rng = np.random.default_rng(seed)
    return [drawn(rng, n, num_ranks * LOCAL_EXPERTS, capacity, **how) for n in num_tokens]  # type: ignore[arg-type]


@check
def slots_in_the_order_of_tokens(rank: int, num_ranks: int) -> None:
    for seed, num_parts in enumerate((1, 2, 3, 5)):
        compare(draw_all(seed, num_ranks, [20] * num_ranks, 5), num_parts, rank, num_ranks)


@check
def slots_in_the_order_of_priority(rank: int, num_ranks: int) -> None:
    for seed, num_parts in enumerate((1, 2, 4)):
        compare(draw_all(seed, num_ranks, [17] * num_ranks, 4, by_priority=True), num_parts, rank, num_ranks)


@check
def all_tokens_to_one_expert(rank: int, num_ranks: int) -> None:
    compare(draw_all(7, num_ranks, [24] * num_ranks, 16, skew=1.0, top_k=1), 3, rank, num_ranks)


@check
def a_rank_without_tokens(rank: int, num_ranks: int) -> None:
    for empty in range(2):
        counts = [0 if source == empty else 13 for source in range(num_ranks)]
        compare(draw_all(3, num_ranks, counts, 6), 2, rank, num_ranks)


@check
def parts_without_tokens_and_no_tokens_at_all(rank: int, num_ranks: int) -> None:
    compare(draw_all(4, num_ranks, [3] * num_ranks, 6), 5, rank, num_ranks)
    compare(draw_all(4, num_ranks, [0] * num_ranks, 6), 2, rank, num_ranks)


@check
def other_types_carry_their_slots_too(rank: int, num_ranks: int) -> None:
    for dtype, width in ((torch.float64, 5), (torch.bfloat16, 5), (torch.float16, 4)):
        batches = draw_all(5, num_ranks, [70] * num_ranks, 64, skew=0.9, top_k=1, dtype=dtype, width=width)
        compare(batches, 2, rank, num_ranks)


@check
def only_filled_rows_are_sent(rank: int, num_ranks: int) -> None:
    """One token to the last rank, in its expert's slot 999: neither the buffers nor what arrives grow with that."""
    experts = torch.full((1, 1), num_ranks * LOCAL_EXPERTS - 1)
    buffer, rows = irregular.dispatch(torch.ones(1, 4), experts, torch.full((1, 1), 999), num_ranks * LOCAL_EXPERTS)
    assert buffer.shape == (num_ranks * LOCAL_EXPERTS, 1, 4)
    pending = irregular.start(buffer, rows, dist.group.WORLD.group_name, "one row", 60.0)
    arrived, received = irregular.wait(pending)
    assert pending.handle.wait().rows.shape[0] == (num_ranks if rank == num_ranks - 1 else 0)
    assert arrived.shape == (num_ranks * LOCAL_EXPERTS, 1, 4)
    assert received.slots.tolist() == ([999] * num_ranks if rank == num_ranks - 1 else [])


@check
def the_exchange_goes_on_without_the_caller(rank: int, num_ranks: int) -> None:
    """Rows follow the counts although nobody waits: the handle is done while the caller only looks."""
    batch = draw_all(1, num_ranks, [40] * num_ranks, 30)[rank]
    buffer, rows = irregular.dispatch(batch.x, batch.experts, batch.slots, num_ranks * LOCAL_EXPERTS)
    pending = irregular.start(buffer, rows, dist.group.WORLD.group_name, "unattended", 60.0)
    buffer.zero_()  # what is sent was packed
    end_s = time.monotonic() + 60.0
    while not pending.handle.done():
        assert time.monotonic() < end_s
        time.sleep(0.001)
    arrived, _ = irregular.wait(pending)
    assert bool(arrived.any())


@check
def a_wrong_direction_is_refused(rank: int, num_ranks: int) -> None:
    batch = draw_all(1, num_ranks, [4] * num_ranks, 4)[rank]
    buffer, rows = irregular.dispatch(batch.x, batch.experts, batch.slots, num_ranks * LOCAL_EXPERTS)
    pending = irregular.start(buffer, rows, dist.group.WORLD.group_name, "there", 60.0)
    with pytest.raises(InputError, match="pending cannot be used"):
        irregular.wait_back(pending)
    _, received = irregular.wait(pending)
    with pytest.raises(InputError, match="dispatch made"):
        irregular.combine(buffer, batch.weights, batch.experts, batch.slots, received)
