"""How rows are moved: the engine of `all_to_all`, which has the functions to call and their contracts.

An operation's thread agrees with its peers, posts the messages of all chunks, and finishes each chunk's handle when
its messages have been waited for. A message is all that one rank gets of one chunk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist

from llmsys.comm.agreement import Parties, Terms, agree, refuse
from llmsys.comm.messenger import Deadline, Handle, Messenger, Operation, Outgoing, Posted, as_bytes, run_beside
from llmsys.comm.row_parts import IntArray, offsets, part_bounds, transposed_rows
from llmsys.core.errors import DeadlineError, InputError

Sizes = Sequence[int] | Sequence[Sequence[int]] | IntArray

# The tags of an operation; agreeing takes two. A hierarchical operation has two steps.
_AGREE = (0, 3)
_ROWS = (2, 5)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Received:
    """Rows in the order of their sources, and how many came from each: ``sizes`` has the shape of ``send_sizes``."""

    rows: torch.Tensor
    sizes: IntArray


class Call:
    """One call of a function of `all_to_all`, with its place among the group's operations."""

    def __init__(self, kind: str, group: dist.ProcessGroup | None, name: str, timeout_s: float) -> None:
        deadline = Deadline.after(timeout_s)
        self.kind = kind
        self.name = name
        self.messenger = Messenger(group)
        self.turn = self.messenger.take_turn()
        self.operation = Operation(f"{kind} {name!r} (operation {self.turn.number} of its group)", deadline)

    def parties(self, device: torch.device, members: Sequence[int] | None = None) -> Parties:
        return Parties(
            messenger=self.messenger,
            operation=self.operation,
            turn=self.turn,
            members=tuple(range(self.messenger.size) if members is None else members),
            device=device,
        )

    def in_turn(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """``run``, after the operations before it have posted their messages where only order tells them apart."""

        def ordered() -> None:
            try:
                before = self.turn.before if device.type == "cuda" else None
                if before is not None and not before.wait(self.operation.deadline.remaining_s):
                    raise DeadlineError(
                        f"{self.operation.what} had no turn within {self.operation.deadline.timeout_s:g} s",
                        expected="operations of a group take their turns in time",
                        found="the one before it has not posted its messages",
                        fix="look at what the one before it waits for, or raise timeout_s",
                    )
                run()
            finally:
                self.turn.posted.set()

        return ordered


@contextlib.contextmanager
def refusing(
    call: Call | None, rows: torch.Tensor, meetings: Sequence[Sequence[int] | None] = (None,)
) -> Iterator[None]:
    """While input is checked: an InputError is also told to the peers of each step, beside the caller."""
    try:
        yield
    except InputError as error:
        if call is not None:
            reason = f"{error.summary.rpartition(': ')[2]}: {error.found}"

            def run() -> None:
                for members, phase in zip(meetings, _AGREE, strict=False):
                    refuse(call.parties(rows.device, members), phase, reason)

            run_beside(call.operation, [], call.in_turn(run, rows.device), rows.device)
        raise


def wrong_sizes(call: Call, setting: str, expected: str, found: object) -> InputError:
    return InputError(
        f"{call.operation.what}: {setting} cannot be used", expected=expected, found=str(found), fix=f"set {setting}"
    )


def checked_sizes(call: Call, sizes: Sizes, setting: str) -> IntArray:
    """As an array of shape (ranks,) or (ranks, buckets)."""
    array = np.asarray(sizes)
    num_ranks = call.messenger.size
    if array.shape[:1] != (num_ranks,) or array.ndim > 2 or 0 in array.shape or array.dtype.kind not in "iu":
        expected = f"whole numbers of shape ({num_ranks},) or ({num_ranks}, buckets), for {num_ranks} ranks"
        raise wrong_sizes(call, setting, expected, f"{array.dtype} of shape {array.shape}")
    if array.size and array.min() < 0:
        raise wrong_sizes(call, setting, "no size below 0", array.tolist())
    return array.astype(np.int64)


def take_rows(rows: torch.Tensor, order: IntArray) -> torch.Tensor:
    return rows.index_select(0, torch.from_numpy(order).to(rows.device))


class RowExchange:
    """Rows that have been checked and are ready to be sent. ``sizes`` has shape (ranks, buckets)."""

    def __init__(self, call: Call, rows: torch.Tensor, send_sizes: Sizes) -> None:
        sizes = checked_sizes(call, send_sizes, "send_sizes")
        if rows.ndim == 0 or sizes.sum() != len(rows):
            found = f"sizes {sizes.tolist()} (sum {sizes.sum()}) for rows of shape {tuple(rows.shape)}"
            raise wrong_sizes(call, "send_sizes", "sizes whose sum is the number of rows", found)
        backend = dist.get_backend_config(call.messenger.group)
        if f"{rows.device.type}:" not in backend or (rows.is_cuda and "cuda:nccl" not in backend):
            raise InputError(
                f"{call.operation.what}: the group cannot move rows on {rows.device.type}",
                expected="CPU rows and a group with gloo, or CUDA rows and one with nccl",
                found=f"rows on {rows.device}, group with {backend}",
                fix="initialise the group with backend='cpu:gloo,cuda:nccl', or move the rows",
            )
        self._call = call
        self._outgoing = Outgoing(rows)
        self._rows = self._outgoing.data
        self._caller_stream = torch.cuda.current_stream(rows.device) if rows.is_cuda else None
        self.given_shape = sizes.shape
        self.sizes = sizes.reshape(len(sizes), -1)
        self.terms = Terms(
            kind=call.kind,
            name=call.name,
            dtype=rows.dtype,
            row_shape=tuple(rows.shape[1:]),
            num_buckets=self.sizes.shape[1],
        )

    def start(
        self, terms: Terms, *, receive_sizes: IntArray | None = None, verify: bool = True
    ) -> list[Handle[Received]]:
        """Start the exchange of ``terms``, and return the handles of its chunks. Sizes not given are asked for."""
        call, bounds = self._call, part_bounds(self.sizes, terms.num_chunks, terms.capacity)
        send = np.diff(bounds, axis=0)
        starts = offsets(self.sizes) + bounds[:-1]
        handles: list[Handle[Received]] = [Handle(call.operation) for _ in send]
        parties = call.parties(self._rows.device)

        def run() -> None:
            if receive_sizes is None:
                asked = agree(parties, _AGREE[0], terms, list(send.swapaxes(0, 1).reshape(call.messenger.size, -1)))
                receive = np.stack(asked).reshape(call.messenger.size, *send.shape[::2]).swapaxes(0, 1)
            else:
                receive = receive_sizes[None]
                if verify:
                    self._verify(parties, terms, receive_sizes)
            transfer = _Transfer(parties, _ROWS[0], self._rows, send, starts, receive)
            call.turn.posted.set()
            for chunk, handle in enumerate(handles):
                rows = transfer.wait(chunk)
                self._outgoing.check(call.operation)
                handle._finish(self._received(rows, receive[chunk].reshape(self.given_shape)))

        run_beside(call.operation, handles, call.in_turn(run, self._rows.device), self._rows.device)
        return handles

    def start_hierarchical(self, within: Sequence[int], across: Sequence[int]) -> Handle[Received]:
        """Start the exchange in two steps, among the ranks of this node and those of this place in all nodes."""
        call, device = self._call, self._rows.device
        handle: Handle[Received] = Handle(call.operation)
        meetings = call.parties(device, within), call.parties(device, across)
        terms = replace(self.terms, kind=f"{call.kind} with {len(within)} ranks a node")

        def run() -> None:
            by_node = self.sizes.reshape(len(across), len(within), -1)
            try:
                order = transposed_rows(by_node)  # from (node, place, bucket) to (place, node, bucket)
                rows, sizes = _two_phase(meetings, 0, terms, take_rows(self._rows, order), by_node.swapaxes(0, 1))
                self._outgoing.check(call.operation)
            except InputError as error:
                refuse(meetings[1], _AGREE[1], f"{error.summary}: {error.found}")
                raise
            order = transposed_rows(sizes)  # from (source's place, node, bucket) to (node, source's place, bucket)
            rows, sizes = _two_phase(meetings, 1, terms, take_rows(rows, order), sizes.swapaxes(0, 1))
            handle._finish(self._received(rows, sizes.reshape(self.given_shape)))

        run_beside(call.operation, [handle], call.in_turn(run, device), device)
        return handle

    def _received(self, rows: torch.Tensor, sizes: IntArray) -> Received:
        if self._caller_stream is not None:
            rows.record_stream(self._caller_stream)  # made on the thread's stream, used on the caller's
        return Received(rows=rows, sizes=sizes)

    def _verify(self, parties: Parties, terms: Terms, receive_sizes: IntArray) -> None:
        """Every rank sees what all send and expect, so all come to the same conclusion."""
        mine = np.concatenate([self.sizes.ravel(), receive_sizes.ravel()])
        table = np.stack(agree(parties, _AGREE[0], terms, [mine] * len(parties.members)))
        sent, expected = table.reshape(len(table), 2, len(table), -1).swapaxes(0, 1)
        wrong = np.argwhere((sent != expected.swapaxes(0, 1)).any(axis=-1))
        if len(wrong) == 0:
            return
        source, target = wrong[0]
        names = [parties.messenger.ranks_text([int(rank)]) for rank in (source, target)]
        raise InputError(
            f"{parties.operation.what}: sizes do not match",
            expected=f"{names[1]} expects what {names[0]} sends to it, and so for all pairs",
            found=f"{names[0]} sends {sent[source, target].tolist()} rows, "
            f"{names[1]} expects {expected[target, source].tolist()}",
            fix="make receive_sizes the transpose of all ranks' send_sizes, or use all_to_all_uneven",
        )


def _two_phase(
    meetings: Sequence[Parties], step: int, terms: Terms, rows: torch.Tensor, sizes: IntArray
) -> tuple[torch.Tensor, IntArray]:
    """Exchange ``rows`` of ``sizes``, shape (members, ...), and wait; what came, and its sizes in the same shape."""
    parties = meetings[step]
    flat = sizes.reshape(len(sizes), -1)
    receive = np.stack(agree(parties, _AGREE[step], terms, list(flat)))
    transfer = _Transfer(parties, _ROWS[step], rows, flat[None], offsets(flat)[None], receive[None])
    return transfer.wait(0), receive.reshape(sizes.shape)


class _Transfer:
    """Messages of rows under way. Sizes and first rows have shape (chunks, members, buckets)."""

    def __init__(
        self, parties: Parties, phase: int, rows: torch.Tensor, send: IntArray, starts: IntArray, receive: IntArray
    ) -> None:
        self._parties = parties
        self._num_chunks = len(send)
        self._arriving: list[torch.Tensor] = []
        self._posted: list[list[Posted]] = []
        self._sending: list[list[tuple[int, torch.Tensor]]] = []  # keeps packed rows until they are sent
        data = as_bytes(rows)
        tag = parties.turn.tag(phase)
        for chunk in range(self._num_chunks):
            buffer = rows.new_empty((int(receive[chunk].sum()), *rows.shape[1:]))
            totals = receive[chunk].sum(axis=-1).tolist()
            arriving = list(zip(parties.members, torch.split(as_bytes(buffer), totals), strict=True))
            sending = [
                (member, _packed(data, starts[chunk, index], send[chunk, index]))
                for index, member in enumerate(parties.members)
            ]
            self._arriving.append(buffer)
            self._sending.append(sending)
            self._posted.append(self._post(tag, arriving, sending))

    def _post(
        self, tag: int, arriving: list[tuple[int, torch.Tensor]], sending: list[tuple[int, torch.Tensor]]
    ) -> list[Posted]:
        """Begin with the next member and go round, so that not all ranks turn to the same one first."""
        me = self._parties.members.index(self._parties.messenger.rank)
        arriving[me][1].copy_(sending[me][1])
        return self._parties.messenger.post(
            self._parties.operation,
            tag,
            receives=[*arriving[:me][::-1], *arriving[me + 1 :][::-1]],
            sends=[*sending[me + 1 :], *sending[:me]],
        )

    def wait(self, chunk: int) -> torch.Tensor:
        what = "rows" if self._num_chunks == 1 else f"rows of chunk {chunk + 1} of {self._num_chunks}"
        self._parties.messenger.wait(self._parties.operation, what, self._posted[chunk])
        self._sending[chunk].clear()
        return self._arriving[chunk]


def _packed(data: torch.Tensor, starts: IntArray, sizes: IntArray) -> torch.Tensor:
    """The segments as one piece: a view where they follow one another, as those of all unchunked exchanges do."""
    filled = sizes > 0
    pieces = list(zip(starts[filled].tolist(), sizes[filled].tolist(), strict=True))
    if not pieces:
        return data[:0]
    if all(start + size == later for (start, size), (later, _) in pairwise(pieces)):
        return data[pieces[0][0] : pieces[-1][0] + pieces[-1][1]]
    return torch.cat([data[start : start + size] for start, size in pieces])
