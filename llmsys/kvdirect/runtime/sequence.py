"""Transfers between workers that lay their caches out differently: tensor-parallel size, block size, dimension order.

Beyond the paper, whose workers are alike. A worker reads, from each source rank that `layout.source_ranks` names, the
heads that both hold, either range by range straight into its cache, or in long runs into a staging buffer that a
kernel then re-lays out, whichever the cost model says is faster.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from llmsys.comm.registry import View
from llmsys.comm.transports.base import Copies, Region, RemoteRegion, Request
from llmsys.core.errors import InputError, LlmsysError
from llmsys.kernels.kv_blocks import logical_view, map_tokens, relayout_blocks

from ..holds import Access
from ..layout import KvLayout, RelayoutCosts, RelayoutPlan, Segments, plan_relayout, transfer_segments
from ..layout.segments import BlockIds
from ..tickets import Ticket
from .connection import Connection
from .endpoint import KvEndpoint

AnyView = TypeVar("AnyView", bound=View[Any])

HOST_COSTS = RelayoutCosts(segment_overhead_us=0.5, link_gb_per_s=4.0, copy_gb_per_s=3.0, kernel_launch_us=200.0)
"""Rough costs of one host's memory (process_vm_readv and a torch gather); give measured ones where it matters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCache:
    """This side's cache: for each layer the name of its registered tensor and the tensor, of shape `layout.shape`.

    Raises:
        InputError: not one name and one contiguous tensor of that shape and element size for each layer.
    """

    tensors: tuple[str, ...]
    memory: tuple[torch.Tensor, ...]
    layout: KvLayout

    def __post_init__(self) -> None:
        _check_count(self.tensors, self.layout, "this side")
        _check_count(self.memory, self.layout, "this side")
        for name, tensor in zip(self.tensors, self.memory, strict=True):
            if (
                tuple(tensor.shape) != self.layout.shape
                or tensor.element_size() != self.layout.itemsize
                or not tensor.is_contiguous()
            ):
                raise InputError(
                    f"tensor {name!r} is not laid out as said",
                    expected=f"shape {self.layout.shape}, {self.layout.itemsize} bytes an element, contiguous",
                    found=f"shape {tuple(tensor.shape)}, {tensor.element_size()} bytes, strides {tensor.stride()}",
                    fix="correct the layout, or register the tensor of that layout",
                )


@dataclass(slots=True, kw_only=True, eq=False)
class SequenceTransfer:
    """One sequence on its way. `finish` brings it into the cache; `KvEndpoint.complete` acknowledges it as usual.

    The data may be used after both, in any order. Not thread safe.

    plan: which method was taken, and what each was estimated to take; None for writes, which go range by range.
    """

    request: Request
    plan: RelayoutPlan | None
    _endpoint: KvEndpoint
    _local: LocalCache
    _blocks: NDArray[np.int64]
    _first_token: int
    _num_tokens: int
    _staging: torch.Tensor | None
    _staging_name: str
    _finished: bool = False

    def finish(self, timeout_s: float) -> None:
        """Waits for the bytes and, where they were staged, moves them into the cache. Does nothing the second time.

        Raises:
            DeadlineError: not there yet; call again. TransportError: the transfer failed.
        """
        if self._finished:
            return
        try:
            self.request.wait(timeout_s)
        except LlmsysError:
            if self.request.done():
                self.discard()
            raise
        if self._staging is not None and self.plan is not None and self.plan.staging is not None:
            self._relayout(self.plan, self.plan.staging, self._staging)
            self.discard()
        self._finished = True

    def discard(self) -> None:
        """Frees the staging buffer, where there still is one: when the sequence is not wanted any more.

        Raises:
            InputError: the transfer is still under way.
        """
        if self._staging is not None:
            self._endpoint.tensors.unregister(self._staging_name)
            self._staging = None

    def _relayout(self, plan: RelayoutPlan, layout: KvLayout, buffer: torch.Tensor) -> None:
        local = self._local
        targets = [logical_view(layer, local.layout.order) for layer in local.memory]
        dtype = targets[0].dtype
        staged = [logical_view(layer.view(dtype).view(layout.shape), layout.order) for layer in buffer]
        tokens = map_tokens(
            staged[0],
            targets[0],
            [np.arange(layout.num_blocks)],
            [self._blocks],
            [self._num_tokens - self._first_token],
            source_first_tokens=[plan.staging_first_token],
            destination_first_tokens=[self._first_token],
        )
        for source, target in zip(staged, targets, strict=True):
            relayout_blocks(
                source,
                target,
                tokens,
                source_head=plan.staging_first_head,
                destination_head=plan.heads.begin - local.layout.heads.begin,
                num_heads=len(plan.heads),
            )


def transfer_sequence(
    endpoint: KvEndpoint,
    connection: Connection,
    local: LocalCache,
    remote: Ticket,
    local_blocks: BlockIds,
    num_tokens: int,
    *,
    first_token: int = 0,
    costs: RelayoutCosts = HOST_COSTS,
) -> SequenceTransfer:
    """Moves tokens [first_token, num_tokens) of one sequence between this side's cache and the ticket's.

    Only the heads that both ranks hold move. The ticket's blocks are that side's block table; `local_blocks` is this
    side's. A read may be staged, see `layout.plan_relayout`; a write goes range by range. Returns at once.

    Raises:
        InputError: the ticket has no layout, layouts are of other models or not those of the tensors, a table is too
            short, or the request is over. DescriptorError, PeerLostError, LeaseExpiredError: as `KvEndpoint.transfer`.
    """
    layout = _layout_of(remote)
    _check_count(remote.tensors, layout, str(connection))
    table = np.array(local_blocks)
    plan, segments = _plan(local.layout, table, remote, layout, num_tokens, first_token, costs)
    here = [_layer(endpoint.tensors[tensor].view(), local.layout) for tensor in local.tensors]
    _check_registered(endpoint, local)
    staging, name = None, f"staging-{uuid.uuid4().hex}"
    with contextlib.ExitStack() as undo, connection.using_tensors() as tensors:
        there = [_layer(tensors[tensor].view(), layout) for tensor in remote.tensors]
        if plan is not None and plan.staging is not None:
            staging = torch.empty(plan.staging.num_layers, plan.staging.layer_bytes, dtype=torch.uint8)
            endpoint.tensors.register(name, staging)
            undo.callback(endpoint.tensors.unregister, name)
            here = [endpoint.tensors[name].block(0, layer) for layer in range(len(staging))]
        request = endpoint.post(connection, remote, _copies(here, there, segments, reads=plan is not None))
        undo.pop_all()
    return SequenceTransfer(
        request=request,
        plan=plan,
        _endpoint=endpoint,
        _local=local,
        _blocks=table,
        _first_token=first_token,
        _num_tokens=num_tokens,
        _staging=staging,
        _staging_name=name,
    )


def _layout_of(ticket: Ticket) -> KvLayout:
    if ticket.layout is None:
        raise InputError(
            f"the ticket of request {ticket.request_id!r} does not say how the cache lies in memory",
            expected="a ticket with a layout",
            found="layout=None",
            fix="pass layout= to KvEndpoint.hold",
        )
    return ticket.layout


def _plan(
    ours: KvLayout,
    table: NDArray[np.int64],
    remote: Ticket,
    theirs: KvLayout,
    num_tokens: int,
    first_token: int,
    costs: RelayoutCosts,
) -> tuple[RelayoutPlan | None, Segments]:
    """What moves; and, for a read, the plan that says so."""
    ids = remote.blocks.ids
    if remote.access is Access.WRITE:
        return None, transfer_segments(ours, theirs, table, ids, num_tokens, first_token=first_token)
    # The holder only holds: it does not pack anything for us.
    costs = replace(costs, source_gathers=False)
    plan = plan_relayout(theirs, ours, ids, table, num_tokens, first_token=first_token, costs=costs)
    return plan, plan.segments


def _copies(
    here: Sequence[View[Region | None]], there: Sequence[View[RemoteRegion | None]], segments: Segments, *, reads: bool
) -> list[Copies]:
    """Entries of all layers. Each layer has the same ranges, so they are looked up once."""
    one = segments.layer == 0
    source, destination = segments.source_offset_bytes[one], segments.destination_offset_bytes[one]
    ours, theirs = (destination, source) if reads else (source, destination)
    return [
        Copies(
            local=local.region,
            remote=remote.region,
            local_offsets=ours + local.offset_bytes,
            remote_offsets=theirs + remote.offset_bytes,
            lengths=segments.length_bytes[one],
        )
        for local, remote in zip(here, there, strict=True)
        if local.region is not None and remote.region is not None and len(source)
    ]


def _layer(view: AnyView, layout: KvLayout) -> AnyView:
    """The view, if its memory is one layer of that layout: ranges are computed from the layout alone."""
    strides = tuple(layout.strides_bytes[dim] for dim in layout.order)
    # The stride of a dimension of size 1 means nothing.
    differ = [size > 1 and a != b for size, a, b in zip(view.shape, view.strides_bytes, strides, strict=False)]
    if view.shape != layout.shape or view.itemsize != layout.itemsize or any(differ):
        raise InputError(
            f"tensor {view.name!r} is not laid out as said",
            expected=f"shape {layout.shape}, strides of {strides} bytes",
            found=f"shape {view.shape}, strides of {view.strides_bytes} bytes",
            fix="give `hold` or LocalCache the layout of the tensors that are registered under these names",
        )
    return view


def _check_registered(endpoint: KvEndpoint, local: LocalCache) -> None:
    for name, tensor in zip(local.tensors, local.memory, strict=True):
        if endpoint.tensors[name].descriptor.address != tensor.data_ptr():
            raise InputError(
                f"the tensor of this side's layer {name!r} is not the one that is registered under that name",
                expected="the registered tensor itself",
                found="another one",
                fix="give LocalCache the tensors that were registered",
            )


def _check_count(tensors: Sized, layout: KvLayout, where: str) -> None:
    if len(tensors) != layout.num_layers:
        raise InputError(
            f"the cache at {where} does not have one tensor for each layer",
            expected=f"{layout.num_layers} tensors",
            found=f"{len(tensors)}",
            fix="name one tensor for each layer of the layout, in order",
        )
