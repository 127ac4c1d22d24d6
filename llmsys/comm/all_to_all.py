"""All-to-all of rows that runs beside the caller: even, uneven, chunked, and hierarchical.

Rows are along dimension 0, grouped by destination: first those for rank 0 of the group, then for rank 1, and so on.
What arrives is grouped by source in the same way. ``send_sizes`` counts the rows for each destination, shape (ranks,),
or those of each bucket of each destination, shape (ranks, buckets): with a bucket for each expert of a rank, the
receiver learns how many rows each of its experts got. Sizes that the receiver does not know are exchanged first, and
then only real rows move, never padding: the two-phase irregular all-to-all of Lancet (MLSys'24).

Every function starts the operation and returns a handle at once. All ranks of ``group`` (None: the default group)
start the same operations in the same order. Until its handle is done, ``rows`` must not be written to; a change is
found and raised. Rows of any dtype and stride may be sent, on CPU (gloo) or CUDA (nccl); there is no autograd but in
`all_to_all_autograd`. ``name`` is in every error, and must be the same on all ranks. ``timeout_s`` bounds the whole
operation: DeadlineError then names the ranks that did not answer, and gloo's group cannot be used any more; a peer's
end is a PeerLostError. Ranks that disagree in operation, name, dtype, trailing shape or sizes all get an InputError
that has both sides, before any row moves, and the group stays usable; so they do when one refuses its own input.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from llmsys.comm.messenger import DEFAULT_TIMEOUT_S, Deadline, Handle
from llmsys.comm.row_exchange import Call, Received, RowExchange, Sizes, checked_sizes, refusing, take_rows, wrong_sizes
from llmsys.comm.row_parts import IntArray, segment_rows, unchunked_rows
from llmsys.core.errors import ConfigError, InputError


def all_to_all(
    rows: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    name: str = "",
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Handle[Received]:
    """Start an even all-to-all: an equal share of ``rows`` for each rank, equally many on all ranks."""
    call = Call("even all-to-all", group, name, timeout_s)
    size = call.messenger.size
    share = len(rows) // size if rows.ndim else 0
    sizes = [share] * size
    with refusing(call, rows):
        if rows.ndim == 0 or share * size != len(rows):
            raise InputError(
                f"{call.operation.what}: rows cannot be shared evenly",
                expected=f"a multiple of {size} rows, for {size} ranks",
                found=f"shape {tuple(rows.shape)}",
                fix="use all_to_all_uneven, or send a multiple",
            )
        exchange = RowExchange(call, rows, sizes)
    return exchange.start(replace(exchange.terms, num_rows=share), receive_sizes=exchange.sizes)[0]


def all_to_all_known(
    rows: torch.Tensor,
    send_sizes: Sizes,
    receive_sizes: Sizes,
    *,
    group: dist.ProcessGroup | None = None,
    name: str = "",
    timeout_s: float = DEFAULT_TIMEOUT_S,
    verify: bool = True,
) -> Handle[Received]:
    """Start an uneven all-to-all whose receiver knows the sizes too; ``receive_sizes`` counts rows by source.

    With ``verify`` all ranks compare all sizes first. Without, the rows set out at once, and sizes that do not match
    are undefined: with gloo they end the process, or leave rows unwritten. Then no other rank may ``verify``.
    """
    call = Call("all-to-all of known sizes", group, name, timeout_s)
    with refusing(call if verify else None, rows):
        exchange = RowExchange(call, rows, send_sizes)
        found = checked_sizes(call, receive_sizes, "receive_sizes")
        if found.shape != exchange.given_shape:
            raise wrong_sizes(call, "receive_sizes", f"shape {exchange.given_shape}, as send_sizes", found.shape)
    return exchange.start(exchange.terms, receive_sizes=found.reshape(exchange.sizes.shape), verify=verify)[0]


def all_to_all_uneven(
    rows: torch.Tensor,
    send_sizes: Sizes,
    *,
    group: dist.ProcessGroup | None = None,
    name: str = "",
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Handle[Received]:
    """Start a two-phase all-to-all: sizes, then rows. Any size may be zero, also all of a rank."""
    call = Call("two-phase all-to-all", group, name, timeout_s)
    with refusing(call, rows):
        exchange = RowExchange(call, rows, send_sizes)
    return exchange.start(exchange.terms)[0]


class ChunkedHandle:
    """Handles of the chunks, which arrive in order: compute on one while the next ones travel."""

    def __init__(self, chunks: Sequence[Handle[Received]]) -> None:
        self.chunks = tuple(chunks)

    def done(self) -> bool:
        return all(chunk.done() for chunk in self.chunks)

    def wait(self, timeout_s: float | None = None) -> Received:
        """Block until all chunks are there; equal, bit for bit, to what the unchunked operation returns (a copy)."""
        deadline = None if timeout_s is None else Deadline.after(timeout_s)
        parts = []
        for chunk in self.chunks:
            parts.append(chunk.wait(None if deadline is None else max(deadline.remaining_s, 1e-6)))
        sizes = np.stack([part.sizes for part in parts])
        order = unchunked_rows(sizes.reshape(*sizes.shape[:2], -1))
        return Received(rows=take_rows(torch.cat([part.rows for part in parts]), order), sizes=sizes.sum(axis=0))


def all_to_all_chunked(
    rows: torch.Tensor,
    send_sizes: Sizes,
    num_chunks: int,
    *,
    capacity: int | None = None,
    group: dist.ProcessGroup | None = None,
    name: str = "",
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> ChunkedHandle:
    """Start a two-phase all-to-all in ``num_chunks`` parts, which set out in order.

    Sizes are exchanged once, for all chunks. Without ``capacity`` a chunk has an equal part of each segment of
    ``send_sizes``. With it, segments are filled slots of buffers of ``capacity`` rows (see `pack_capacity`), and a
    chunk has those in its part of the capacity: the partition along Lancet's irregular capacity axis.
    """
    call = Call("chunked all-to-all", group, name, timeout_s)
    with refusing(call, rows):
        exchange = RowExchange(call, rows, send_sizes)
        if num_chunks < 1:
            raise wrong_sizes(call, "num_chunks", "at least 1", num_chunks)
        if capacity is not None and exchange.sizes.max(initial=0) > capacity:
            found = f"a size of {exchange.sizes.max()}"
            raise wrong_sizes(call, "send_sizes", f"at most the capacity {capacity}", found)
    terms = replace(exchange.terms, num_chunks=num_chunks, capacity=capacity)
    return ChunkedHandle(exchange.start(terms))


def all_to_all_hierarchical(
    rows: torch.Tensor,
    send_sizes: Sizes,
    *,
    ranks_per_node: int | None = None,
    group: dist.ProcessGroup | None = None,
    name: str = "",
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Handle[Received]:
    """Start a two-phase all-to-all in two steps; what arrives equals, bit for bit, that of `all_to_all_uneven`.

    Rows first go within the node to the rank that has the destination's place, then between nodes, so a rank sends
    one large message to each other node instead of one to each rank there. Ranks are numbered node by node.
    ``ranks_per_node`` defaults to LOCAL_WORLD_SIZE for a group of all ranks. Each step has its exchange of sizes.
    """
    call = Call("hierarchical all-to-all", group, name, timeout_s)
    per_node = _ranks_per_node(call, ranks_per_node)
    node, place = divmod(call.messenger.rank, per_node)
    within = tuple(range(node * per_node, (node + 1) * per_node))
    across = tuple(range(place, call.messenger.size, per_node))
    with refusing(call, rows, (within, across)):
        exchange = RowExchange(call, rows, send_sizes)
    return exchange.start_hierarchical(within, across)


def _ranks_per_node(call: Call, given: int | None) -> int:
    size = call.messenger.size
    setting = "ranks_per_node"
    if given is None:
        setting = "LOCAL_WORLD_SIZE"
        found = os.environ.get(setting, "")
        whole = size == dist.get_world_size()
        given = int(found) if whole and found.isdecimal() else 0
    if given < 1 or size % given:
        raise ConfigError(
            f"{call.operation.what}: the ranks do not fill nodes",
            expected=f"a number of ranks a node that divides {size}, the ranks of the group",
            found=f"{setting}={given}" if given else "neither ranks_per_node nor, for all ranks, LOCAL_WORLD_SIZE",
            fix=f"set {setting}, or use all_to_all_uneven",
        )
    return given


def all_to_all_autograd(
    rows: torch.Tensor,
    send_sizes: Sizes,
    *,
    group: dist.ProcessGroup | None = None,
    name: str = "",
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> tuple[torch.Tensor, IntArray]:
    """`all_to_all_uneven`, waited for, as (rows, sizes); gradients of the rows return to where they came from.

    The backward all-to-all takes part on every rank or on none: also a rank that received no row must use the result
    in its loss.
    """
    found, sizes = cast(
        tuple[torch.Tensor, IntArray],
        _AllToAll.apply(rows, send_sizes, group, name, timeout_s),  # type: ignore[no-untyped-call]
    )
    return found, sizes


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, send_sizes: Sizes, *how: Any) -> tuple[torch.Tensor, IntArray]:
        group, name, timeout_s = how
        received = all_to_all_uneven(rows, send_sizes, group=group, name=name, timeout_s=timeout_s).wait()
        ctx.exchange = (send_sizes, received.sizes, how)
        return received.rows, received.sizes

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        send_sizes, receive_sizes, (group, name, timeout_s) = ctx.exchange
        handle = all_to_all_known(
            gradients[0], receive_sizes, send_sizes, group=group, name=f"backward of {name}", timeout_s=timeout_s
        )
        return handle.wait().rows, None, None, None, None


def pack_capacity(buffers: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """The filled rows of ``buffers``, shape (segments, capacity, ...), one segment after another.

    The first ``sizes[i]`` slots of buffer i are filled; ``sizes`` may have any shape of as many entries.
    """
    counts = np.asarray(sizes, dtype=np.int64).ravel()
    starts = np.arange(len(counts), dtype=np.int64) * buffers.shape[1]
    return take_rows(buffers.flatten(0, 1), segment_rows(starts, counts))


def unpack_capacity(rows: torch.Tensor, sizes: Sizes, capacity: int) -> torch.Tensor:
    """The inverse of `pack_capacity`: buffers of ``capacity`` rows, zero where they are not filled."""
    counts = np.asarray(sizes, dtype=np.int64).ravel()
    buffers = rows.new_zeros((len(counts) * capacity, *rows.shape[1:]))
    starts = np.arange(len(counts), dtype=np.int64) * capacity
    buffers[torch.from_numpy(segment_rows(starts, counts)).to(rows.device)] = rows
    return buffers.reshape(len(counts), capacity, *rows.shape[1:])
