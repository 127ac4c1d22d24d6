"""The all-to-all of one part of a batch, whose experts get a number of rows only the run knows (the paper's Fig. 10).

The gate of an unpartitioned layer fills buffers of ``capacity`` slots for each expert. A part of the batch fills some
of these slots, the same ones, since the gate passes the used capacity on. Here a part has a dense buffer of its own,
as small as its fullest expert asks for, and `PartRows` remembers which slot of the whole each row belongs to. On the
wire go the counts, then filled rows only, each with its slot: never padding.

    buffer, sent = dispatch(x, experts, slots, num_experts)
    pending = start(buffer, sent, group_name, name)             # other work goes on here
    buffer, received = wait(pending)                            # (ranks * local experts, C', H), source by source
    ... experts ...
    pending = start_back(buffer, received, sent, group_name, name)
    y = combine(wait_back(pending), weights, experts, slots, sent)

"Bucket" is an expert at a sender (experts of rank 0 first), and a pair (source rank, local expert) at a receiver. All
ranks of the group start the same operations in the same order. Nothing here has an autograd formula: the backward of a
step that ran in parts uses the whole tensors, which `join` makes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from llmsys.comm.all_to_all import all_to_all_known, all_to_all_uneven
from llmsys.comm.messenger import DEFAULT_TIMEOUT_S, Handle
from llmsys.comm.row_exchange import Received
from llmsys.comm.row_parts import IntArray, segment_rows
from llmsys.core.errors import InputError
from llmsys.kernels.moe.ops import moe_combine, moe_dispatch

_DIGITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTORS = ("g", "e", "c")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartRows:
    """Which rows of a part's buffer, shape (buckets, capacity, H), are filled, and their slots in the whole.

    ``counts``, shape (buckets,): bucket b has its rows in the places 0 to counts[b] of the buffer, in increasing order
    of their slots. ``slots``, shape (rows,), int64, on the buffer's device: bucket after bucket. ``local_slots``, shape
    (T, K): for each choice of the part's tokens its place in the expert's bucket, -1 for a dropped one; None at a
    receiver. ``num_ranks``: of the sources at a receiver, 1 at a sender.
    """

    counts: IntArray
    slots: torch.Tensor
    capacity: int
    local_slots: torch.Tensor | None = None
    num_ranks: int = 1

    @property
    def num_buckets(self) -> int:
        return len(self.counts)

    def places(self) -> torch.Tensor:
        """The filled rows of the buffer as its first two dimensions count them, on its device."""
        starts = np.arange(self.num_buckets, dtype=np.int64) * self.capacity
        return torch.from_numpy(segment_rows(starts, self.counts)).to(self.slots.device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pending:
    """An all-to-all under way; to be waited for once, by `wait`, or by `wait_back` if it ``leads_back``."""

    handle: Handle[Received]
    row_shape: tuple[int, ...]
    num_ranks: int
    sent: PartRows
    leads_back: bool


def dispatch(
    x: torch.Tensor, experts: torch.Tensor, slots: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, PartRows]:
    """The rows of ``x`` (T, H) in buckets, shape (num_experts, C_p, H), zero where not filled.

    ``experts`` and ``slots``, (T, K): expert and slot of each choice in the whole batch's buffers, slot -1 if dropped.
    C_p is the number of rows of the fullest expert, at least 1. On CUDA this waits for the device, to learn it.
    """
    local, ordered_slots, counts = _local_slots(experts, slots, num_experts)
    capacity = max(1, int(counts.max(initial=0)))
    buffer: torch.Tensor = moe_dispatch(x, experts, local, num_experts, capacity)
    return buffer, PartRows(counts=counts, slots=ordered_slots, capacity=capacity, local_slots=local)


def _local_slots(
    experts: torch.Tensor, slots: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, IntArray]:
    """Places within the experts' buckets (T, K); slots bucket after bucket; rows of each bucket."""
    if experts.shape != slots.shape or slots.ndim != 2:
        raise _wrong("experts and slots", "two of one shape (T, K)", f"{tuple(experts.shape)}, {tuple(slots.shape)}")
    flat_slots = slots.reshape(-1)
    kept = torch.nonzero(flat_slots >= 0).squeeze(1)
    kept_experts, kept_slots = experts.reshape(-1)[kept], flat_slots[kept]
    by_slot = torch.argsort(kept_slots)
    order = by_slot[torch.argsort(kept_experts[by_slot], stable=True)]
    counts: IntArray = torch.bincount(kept_experts, minlength=num_experts).cpu().numpy()
    if len(counts) != num_experts:
        raise _wrong("experts", f"numbers below num_experts={num_experts}", f"{len(counts) - 1}")
    starts = np.cumsum(counts) - counts
    places = np.arange(len(kept), dtype=np.int64) - np.repeat(starts, counts)
    local = torch.full_like(flat_slots, -1)
    local[kept[order]] = torch.from_numpy(places).to(slots.device)
    return local.view(slots.shape), kept_slots[order], counts


def start(
    buffer: torch.Tensor, rows: PartRows, group_name: str, name: str, timeout_s: float = DEFAULT_TIMEOUT_S
) -> Pending:
    """Send each expert's rows to its rank: counts, then rows. Returns at once; both go on beside the caller.

    ``buffer``: what `dispatch` made; it may be written to at once.
    ``name`` is in every error and equal on all ranks. Raises InputError; later errors come from `wait`.
    """
    group, num_ranks = _group(group_name)
    if rows.num_buckets % num_ranks:
        raise _wrong("rows", f"a multiple of {num_ranks} experts, for {num_ranks} ranks", f"{rows.num_buckets}")
    packed, row_shape = _packed(buffer, rows, with_slots=True)
    sizes = rows.counts.reshape(num_ranks, -1)
    handle = all_to_all_uneven(packed, sizes, group=group, name=name, timeout_s=timeout_s)
    return Pending(handle=handle, row_shape=row_shape, num_ranks=num_ranks, sent=rows, leads_back=False)


def wait(pending: Pending) -> tuple[torch.Tensor, PartRows]:
    """Block until the rows of `start` are there: the buffer (ranks * local experts, C', H), source after source.

    C' is the number of rows of the fullest bucket, at least 1. Raises what `comm.all_to_all` lists.
    """
    _check_direction(pending, leads_back=False)
    received = pending.handle.wait()
    counts = received.sizes.reshape(-1)
    num_columns = math.prod(pending.row_shape)
    # A copy, since bytes at an odd place cannot be viewed as int32.
    digits = received.rows[:, num_columns:].clone(memory_format=torch.contiguous_format)
    rows = PartRows(
        counts=counts,
        slots=digits.view(torch.int64 if digits.itemsize == 8 else torch.int32).reshape(-1).to(torch.int64),
        capacity=max(1, int(counts.max(initial=0))),
        num_ranks=pending.num_ranks,
    )
    return _unpacked(received.rows[:, :num_columns], rows, pending), rows


def start_back(
    buffer: torch.Tensor,
    received: PartRows,
    sent: PartRows,
    group_name: str,
    name: str,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Pending:
    """Send the rows that `wait` gave back to where they came from; no counts are exchanged. Otherwise as `start`."""
    group, num_ranks = _group(group_name)
    packed, row_shape = _packed(buffer, received, with_slots=False)
    handle = all_to_all_known(
        packed,
        received.counts.reshape(num_ranks, -1),
        sent.counts.reshape(num_ranks, -1),
        group=group,
        name=name,
        timeout_s=timeout_s,
        verify=False,  # the way there has told both sides
    )
    return Pending(handle=handle, row_shape=row_shape, num_ranks=num_ranks, sent=sent, leads_back=True)


def wait_back(pending: Pending) -> torch.Tensor:
    """Block until the rows of `start_back` are there, in the buffer (experts, C_p, ...) that `dispatch` laid out."""
    _check_direction(pending, leads_back=True)
    return _unpacked(pending.handle.wait().rows, pending.sent, pending)


def combine(
    buffer: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, slots: torch.Tensor, rows: PartRows
) -> torch.Tensor:
    """Each token's weighted sum of its rows of ``buffer`` (experts, C_p, H), shape (T, H): `dispatch` undone.

    ``weights``, ``experts`` and ``slots``, (T, K), are those of the same part; dropped choices count as zero.
    """
    if rows.local_slots is None or rows.local_slots.shape != slots.shape:
        found = "rows of a receiver" if rows.local_slots is None else f"rows of {tuple(rows.local_slots.shape)} choices"
        raise _wrong("rows", f"those that dispatch made of this part's {tuple(slots.shape)} choices", found)
    result: torch.Tensor = moe_combine(buffer, weights, experts, rows.local_slots)
    return result


def join(
    parts: Sequence[torch.Tensor],
    rows: Sequence[PartRows],
    capacity: int,
    order: tuple[str, ...],
    *,
    shape: tuple[int, ...],
) -> torch.Tensor:
    """The whole tensor of ``shape``: each part's filled rows at their slots, zero in all other places.

    The leading dimensions of ``shape`` are made of the factors in ``order``, each once: "g" for ranks, "e" for experts
    of a rank, "c" for ``capacity``; "c" comes last of them. So (experts, C, H) at a sender and (ranks * local experts,
    C, H) at a receiver are ("g", "e", "c"), and (local experts, ranks * C, H) is ("e", "g", "c"). The parts have the
    same layout, with the capacities of ``rows``.
    """
    _check_join(parts, rows, capacity, order, shape)
    num_buckets, num_ranks = rows[0].num_buckets, rows[0].num_ranks
    bucket_places = np.arange(num_buckets, dtype=np.int64)
    if order.index("e") < order.index("g"):  # where bucket (g, e) lies when e comes first
        bucket_places = bucket_places.reshape(-1, num_ranks).T.reshape(-1)
    whole = parts[0].new_zeros(num_buckets * capacity, math.prod(shape) // (num_buckets * capacity))
    for part, mine in zip(parts, rows, strict=True):
        sources = segment_rows(bucket_places * mine.capacity, mine.counts)
        targets = torch.from_numpy(np.repeat(bucket_places * capacity, mine.counts)).to(part.device) + mine.slots
        flat = part.reshape(num_buckets * mine.capacity, -1)
        whole.index_copy_(0, targets, flat.index_select(0, torch.from_numpy(sources).to(part.device)))
    return whole.reshape(shape)


def _check_join(
    parts: Sequence[torch.Tensor],
    rows: Sequence[PartRows],
    capacity: int,
    order: tuple[str, ...],
    shape: tuple[int, ...],
) -> None:
    if not parts or len(parts) != len(rows) or len({r.num_buckets for r in rows}) != 1:
        raise _wrong("rows", "rows of equally many buckets for each part, at least one", f"{len(rows)} of {len(parts)}")
    if sorted(order) != sorted(_FACTORS) or order[-1] != "c":
        raise _wrong("order", "'g' and 'e' in either order, then 'c'", f"{order}")
    size = rows[0].num_buckets * capacity
    leading = {math.prod(shape[:number]) for number in range(len(shape) + 1)}
    if size not in leading:
        raise _wrong("shape", f"leading dimensions that make {rows[0].num_buckets} buckets * {capacity}", f"{shape}")
    num_columns = math.prod(shape) // size
    for part, mine in zip(parts, rows, strict=True):
        if part.numel() != mine.num_buckets * mine.capacity * num_columns:
            expected = f"{mine.num_buckets} buckets of {mine.capacity} rows of {num_columns}"
            raise _wrong("parts", expected, f"shape {tuple(part.shape)}")
        if len(mine.slots) and int(mine.slots.max()) >= capacity:
            raise _wrong("capacity", f"above the largest slot {int(mine.slots.max())}", f"{capacity}")


def _packed(buffer: torch.Tensor, rows: PartRows, *, with_slots: bool) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The filled rows, flat, each with the digits of its slot behind it if asked for; and the shape of a row."""
    if buffer.shape[:2] != (rows.num_buckets, rows.capacity):
        raise _wrong("buffer", f"shape ({rows.num_buckets}, {rows.capacity}, ...)", f"shape {tuple(buffer.shape)}")
    row_shape = tuple(buffer.shape[2:])
    flat = buffer.reshape(rows.num_buckets * rows.capacity, math.prod(row_shape))
    if not with_slots:
        return flat.index_select(0, rows.places()), row_shape
    digit = _DIGITS[buffer.itemsize]
    digits = rows.slots.to(torch.int64 if buffer.itemsize == 8 else torch.int32).view(digit)
    digits = digits.reshape(len(rows.slots), max(1, 4 // buffer.itemsize))
    packed = flat.new_empty(len(rows.slots), flat.shape[1] + digits.shape[1])
    torch.index_select(flat, 0, rows.places(), out=packed[:, : flat.shape[1]])
    packed.view(digit)[:, flat.shape[1] :] = digits
    return packed, row_shape


def _unpacked(flat: torch.Tensor, rows: PartRows, pending: Pending) -> torch.Tensor:
    buffer = flat.new_zeros(rows.num_buckets * rows.capacity, flat.shape[1])
    buffer.index_copy_(0, rows.places(), flat)
    return buffer.reshape(rows.num_buckets, rows.capacity, *pending.row_shape)


def _group(group_name: str) -> tuple[dist.ProcessGroup, int]:
    # How functional collectives find the group that a graph names.
    group: dist.ProcessGroup = distributed_c10d._resolve_process_group(group_name)  # type: ignore[attr-defined,arg-type]
    return group, group.size()


def _check_direction(pending: Pending, *, leads_back: bool) -> None:
    if pending.leads_back != leads_back:
        raise _wrong("pending", f"one of {'start_back' if leads_back else 'start'}", "one of the other direction")


def _wrong(argument: str, expected: str, found: str) -> InputError:
    return InputError(f"{argument} cannot be used", expected=expected, found=found, fix=f"set {argument}")
