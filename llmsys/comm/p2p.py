"""Asynchronous point-to-point transfers in a planned order.

A plan is each rank's list of transfers. `Channels` are made once and hold the connections; `Channels.open` takes this
rank's plan of, say, one training iteration, makes sure that every two ranks list their common transfers in one order,
and returns a `PlannedTransfers`, which posts them in that order only. Two ranks that post common transfers in one
order, and wait only for transfers that they have posted, cannot deadlock: DynaPipe's communication planning makes
such lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from llmsys.comm.all_to_all import all_to_all, all_to_all_uneven
from llmsys.comm.messenger import (
    DEFAULT_TIMEOUT_S,
    Deadline,
    Handle,
    Messenger,
    Operation,
    Outgoing,
    Posted,
    as_bytes,
    run_beside,
)
from llmsys.core.errors import InputError, PlanError

_UNUSABLE = "\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTransfer:
    """One tensor that this rank sends to ``peer`` or receives from it; the peer's plan has the other half.

    ``peer`` is a rank of the group. ``name`` (as "activation 3 of stage 1") and ``channel`` are the same on both sides.
    """

    direction: Literal["send", "receive"]
    peer: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    channel: str


class Channels:
    """Connections among the ranks of ``group`` (None: the default group): for each name, one each way.

    Every channel has a process group of its own for transfers to higher ranks and one for those to lower ranks, so
    that activations and gradients that cross each other, or a channel that is held up, never block another. All
    ranks of the group make them together, with the same ``names``; blocks until all have. ``timeout_s`` is the
    default limit of transfers, and that of this call and of `open`. CPU tensors need gloo, CUDA tensors nccl.
    Raises InputError if the names differ by rank, DeadlineError and PeerLostError.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        group: dist.ProcessGroup | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._timeout_s = timeout_s
        self._whole = Messenger(group)
        self._control_device = _control_device(self._whole)
        self._num_opened = 0
        listed = ", ".join(names)
        nothing = torch.zeros(self._whole.size, dtype=torch.uint8, device=self._control_device)
        all_to_all(nothing, group=self._whole.group, name=f"channels {listed}", timeout_s=timeout_s).wait()
        self._messengers = {(name, up): self._open_group(name) for name in names for up in (False, True)}

    def _open_group(self, name: str) -> Messenger:
        ranks = list(self._whole.global_ranks)
        group = dist.new_group(
            ranks,
            timeout=timedelta(seconds=self._timeout_s),
            use_local_synchronization=True,  # so that ranks outside the group need not take part
            group_desc=f"llmsys channel {name}",
        )
        return Messenger(group)

    def open(self, plan: Sequence[PlannedTransfer]) -> PlannedTransfers:
        """Compare this rank's ``plan`` with those of its peers; all ranks of the group call it together. Blocks.

        Every rank raises PlanError if any two ranks do not list their common transfers alike (names the first that
        differs) or a plan cannot be carried out; then nothing was posted.
        """
        own = list(plan)
        problem = self._own_problem(own)
        lists = [[_UNUSABLE] if problem else self._common(own, peer) for peer in range(self._whole.size)]
        theirs = self._swap_texts(["\n".join(lines) for lines in lists], "plans of transfers")
        problems = [problem] if problem else []
        for peer, text in enumerate(theirs):
            if peer != self._whole.rank and not problem and text != _UNUSABLE:
                problems += self._difference(peer, lists[peer], text.split("\n") if text else [])
        verdicts = self._swap_texts([problems[0] if problems else ""] * self._whole.size, "verdicts on plans")
        found = [f"rank {self._whole.global_ranks[peer]}: {text}" for peer, text in enumerate(verdicts) if text]
        if found:
            raise PlanError(
                "the ranks' plans of transfers do not go together",
                expected="any two ranks list the transfers between them alike, and in one order",
                found="; ".join(found),
                fix="make all ranks' lists from one plan; nothing was posted",
            )
        self._num_opened += 1
        return PlannedTransfers(self._messengers, own, self._num_opened, self._timeout_s)

    def _own_problem(self, plan: list[PlannedTransfer]) -> str:
        for number, transfer in enumerate(plan):
            bad = (
                (not 0 <= transfer.peer < self._whole.size or transfer.peer == self._whole.rank, "peer"),
                ((transfer.channel, True) not in self._messengers, "channel"),
                (transfer.direction not in ("send", "receive"), "direction"),
                ("\n" in transfer.name, "name"),
                (any(size < 0 for size in transfer.shape), "shape"),
            )
            for wrong, field in bad:
                if wrong:
                    return f"transfer {number} of its plan has {field} {getattr(transfer, field)!r}"
        return ""

    def _common(self, plan: Sequence[PlannedTransfer], peer: int) -> list[str]:
        """The transfers with ``peer``, in order, as both sides must list them."""
        ranks = self._whole.global_ranks
        lines = []
        for transfer in plan:
            if transfer.peer == peer:
                ends = (self._whole.rank, peer) if transfer.direction == "send" else (peer, self._whole.rank)
                what = f"{str(transfer.dtype).removeprefix('torch.')}{list(transfer.shape)}"
                route = f"from rank {ranks[ends[0]]} to {ranks[ends[1]]}"
                lines.append(f"{transfer.name!r} of {what} {route} on {transfer.channel!r}")
        return lines

    def _difference(self, peer: int, own: list[str], theirs: list[str]) -> list[str]:
        for number, (mine, other) in enumerate(zip_longest(own, theirs)):
            if mine != other:
                rank = self._whole.global_ranks[peer]
                here, there = mine or "missing", other or "missing"
                return [f"transfer {number} of those with rank {rank} is {here} here, {there} there"]
        return []

    def _swap_texts(self, texts: Sequence[str], what: str) -> list[str]:
        encoded = [text.encode() for text in texts]
        rows = torch.from_numpy(np.frombuffer(b"".join(encoded), dtype=np.uint8).copy()).to(self._control_device)
        sizes = [len(text) for text in encoded]
        group, timeout_s = self._whole.group, self._timeout_s
        received = all_to_all_uneven(rows, sizes, group=group, name=what, timeout_s=timeout_s).wait()
        data, found, first = received.rows.cpu().numpy().tobytes(), [], 0
        for size in received.sizes.tolist():
            found.append(data[first : first + size].decode())
            first += size
        return found


def _control_device(messenger: Messenger) -> torch.device:
    on_cpu = "cpu:" in dist.get_backend_config(messenger.group)
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


class PlannedTransfers:
    """The transfers of one plan, to be posted one after another; made by `Channels.open`. For one thread."""

    def __init__(
        self,
        messengers: dict[tuple[str, bool], Messenger],
        plan: Sequence[PlannedTransfer],
        number: int,
        timeout_s: float,
    ) -> None:
        self._messengers = messengers
        self._plan = tuple(plan)
        self._timeout_s = timeout_s
        self._tag = number  # of the plan; within it, messages between two ranks arrive in the order they were posted
        self._num_posted = 0
        self._open: list[Handle[torch.Tensor]] = []

    def send(self, name: str, tensor: torch.Tensor, *, timeout_s: float | None = None) -> Handle[torch.Tensor]:
        """Post the plan's next transfer, which must be the send ``name``; returns at once.

        ``tensor`` must have the planned shape and dtype, and must not be written to until the handle is done. Raises
        PlanError if another transfer comes next, InputError for another tensor than planned.
        """
        transfer = self._next("send", name)
        self._check_tensor(transfer, tensor)
        return self._post(transfer, tensor, timeout_s)

    def receive(
        self,
        name: str,
        *,
        out: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
        timeout_s: float | None = None,
    ) -> Handle[torch.Tensor]:
        """Post the plan's next transfer, which must be the receive ``name``; returns at once.

        The handle's result is ``out``, contiguous and of the planned shape and dtype, or a new tensor on ``device``.
        Raises as `send` does.
        """
        transfer = self._next("receive", name)
        if out is None:
            out = torch.empty(transfer.shape, dtype=transfer.dtype, device=device)
        self._check_tensor(transfer, out)
        if not out.is_contiguous():
            raise InputError(
                f"{self._what(transfer)}: out cannot be written to in one piece",
                expected="a contiguous tensor",
                found=f"strides {out.stride()}",
                fix="receive into a new tensor and copy, or pass a contiguous one",
            )
        return self._post(transfer, out, timeout_s)

    def finish(self, timeout_s: float | None = None) -> None:
        """Block until every transfer has ended. Raises PlanError if some were not posted; else as `Handle.wait`."""
        if self._num_posted < len(self._plan):
            raise PlanError(
                f"{len(self._plan) - self._num_posted} transfers of the plan were not posted",
                expected=f"{len(self._plan)} transfers posted before the end",
                found=f"{self._num_posted} posted, the next is {self._what(self._plan[self._num_posted])}",
                fix="post every transfer of the plan, or plan without it",
            )
        deadline = Deadline.after(self._timeout_s if timeout_s is None else timeout_s)
        for handle in self._open:
            handle.wait(max(deadline.remaining_s, 1e-6))

    def _what(self, transfer: PlannedTransfer) -> str:
        route = "to" if transfer.direction == "send" else "from"
        messenger = self._messengers[transfer.channel, True]
        return f"{transfer.direction} of {transfer.name!r} {route} {messenger.ranks_text([transfer.peer])}"

    def _next(self, direction: str, name: str) -> PlannedTransfer:
        transfer = self._plan[self._num_posted] if self._num_posted < len(self._plan) else None
        if transfer is None or (transfer.direction, transfer.name) != (direction, name):
            raise PlanError(
                f"the {direction} of {name!r} does not come next in the plan",
                expected="the end of the plan" if transfer is None else self._what(transfer),
                found=f"{direction} of {name!r}, after {self._num_posted} of {len(self._plan)} transfers",
                fix="post the transfers in the order of the plan that was opened",
            )
        return transfer

    def _check_tensor(self, transfer: PlannedTransfer, tensor: torch.Tensor) -> None:
        if (tuple(tensor.shape), tensor.dtype) != (tuple(transfer.shape), transfer.dtype):
            raise InputError(
                f"{self._what(transfer)}: the tensor is not as planned",
                expected=f"{transfer.dtype} of shape {tuple(transfer.shape)}",
                found=f"{tensor.dtype} of shape {tuple(tensor.shape)}",
                fix="plan the shape that is sent",
            )

    def _post(self, transfer: PlannedTransfer, tensor: torch.Tensor, timeout_s: float | None) -> Handle[torch.Tensor]:
        sending = transfer.direction == "send"
        deadline = Deadline.after(self._timeout_s if timeout_s is None else timeout_s)
        operation = Operation(f"{self._what(transfer)} on channel {transfer.channel!r}", deadline)
        outgoing = Outgoing(tensor) if sending else None
        posted = self._post_bytes(operation, transfer, tensor if outgoing is None else outgoing.data)
        handle: Handle[torch.Tensor] = Handle(operation)
        messenger = self._messengers[transfer.channel, True]

        def run() -> None:
            messenger.wait(operation, "part", posted)
            if outgoing is not None:
                outgoing.check(operation)
            handle._finish(tensor)

        run_beside(operation, [handle], run, tensor.device)
        self._num_posted += 1
        # Those that went well are forgotten, as each holds its tensor.
        self._open = [*(earlier for earlier in self._open if not earlier.succeeded()), handle]
        return handle

    def _post_bytes(self, operation: Operation, transfer: PlannedTransfer, data: torch.Tensor) -> list[Posted]:
        peer = transfer.peer
        up = (self._messengers[transfer.channel, True].rank < peer) == (transfer.direction == "send")
        message = [(peer, as_bytes(data[None]))]
        messenger = self._messengers[transfer.channel, up]
        if transfer.direction == "send":
            return messenger.post(operation, self._tag, sends=message, grouped=False)
        return messenger.post(operation, self._tag, receives=message, grouped=False)
