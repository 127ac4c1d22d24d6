"""Byte messages between the ranks of a process group, and handles of operations that run beside the caller.

Messages are tagged point-to-point sends and receives, not torch's collectives. On gloo ``all_to_all_single`` is the
faster one for small messages (4 ranks on two busy cores, medians: 2.6 ms against 5.3 ms up to 64 KiB a peer, 11 against
13 ms at 1 MiB; at 16 MiB, messages took 63 ms against 74 ms). But it cannot tell which peer is late, refuses int16 and
float8, and numbers its calls behind our back, so that an exchange in the background would be mixed up with the
caller's own collectives on the group. Tagged messages do none of this, need no order to be free of deadlock, and ranks
that exchange nothing send nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist

from llmsys.core.errors import DeadlineError, InputError, LlmsysError, PeerLostError

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 300.0
_TAG_BASE = 1 << 30  # above the tags of other users of the group
_TAGS_PER_OPERATION = 8
_NUM_TAGS = 1 << 29
_AT_ONCE_S = 0.001
_EXIT_GRACE_S = 2.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """The end of an allowance of ``timeout_s``, on the monotonic clock."""

    timeout_s: float
    end_s: float

    @classmethod
    def after(cls, timeout_s: float) -> Deadline:
        if not 0 < timeout_s < math.inf:
            raise InputError(
                "a wait needs a deadline",
                expected="a finite timeout_s above 0",
                found=str(timeout_s),
                fix="set timeout_s",
            )
        return cls(timeout_s=timeout_s, end_s=time.monotonic() + timeout_s)

    @property
    def remaining_s(self) -> float:
        return max(0.0, self.end_s - time.monotonic())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Posted:
    """A message under way: to (``sending``) or from the rank ``peer`` of the group; None is several at once."""

    peer: int | None
    sending: bool
    work: Any


class Operation:
    """What the handles of one operation share: its name for errors, its deadline, and what it waits for now."""

    def __init__(self, what: str, deadline: Deadline) -> None:
        self.what = what
        self.deadline = deadline
        self.waits_for = "its turn"


class Outgoing:
    """A tensor to be sent: ``data`` is contiguous, and a copy only where it must be. Must stay as it is meanwhile."""

    def __init__(self, given: torch.Tensor) -> None:
        # Bytes are sent, so lazy conjugates must become real.
        self.data = given.detach().resolve_conj().resolve_neg().contiguous()
        self._given = given
        self._version = _version(given)

    def check(self, operation: Operation) -> None:
        """Raises InputError if the tensor has been written to since, in place, through torch."""
        changes = _version(self._given) - self._version
        if changes and self._given.numel() and self.data.data_ptr() == self._given.data_ptr():
            raise InputError(
                f"{operation.what}: the tensor was written to while it was sent",
                expected="a tensor that stays as it is until the handle is done",
                found=f"{changes} changes in place since the start",
                fix="wait for the handle before reusing the tensor, or send a clone",
            )


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else int(tensor._version)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of at least one dimension as bytes, shape (len(tensor), bytes of each)."""
    row_size = math.prod(tensor.shape[1:])
    if tensor.numel() == 0:  # its strides may be anything
        return tensor.new_empty((len(tensor), row_size * tensor.itemsize), dtype=torch.uint8)
    return tensor.reshape(len(tensor), row_size).view(torch.uint8)


class Handle(Generic[T]):
    """The result to come of an operation that has been started. Any thread may wait, also several times."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation
        self._finished = threading.Event()
        self._value: T | None = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once. Never blocks."""
        return self._finished.is_set()

    def succeeded(self) -> bool:
        """Whether the result is there, so that `wait` would return it at once."""
        return self._finished.is_set() and self._error is None

    def wait(self, timeout_s: float | None = None) -> T:
        """Block until the result is there, and return it.

        Raises DeadlineError after ``timeout_s`` (default: what is left of the operation's own limit), naming what is
        missing; the operation goes on, and can be waited for again. What the operation itself raised is raised here.
        """
        deadline = self._operation.deadline if timeout_s is None else Deadline.after(timeout_s)
        # The operation ends itself at its own deadline, with an error that knows more than ours.
        grace_s = 1.0 if timeout_s is None else 0.0
        if not self._finished.wait(deadline.remaining_s + grace_s):
            raise DeadlineError(
                f"{self._operation.what} did not end within {deadline.timeout_s:g} s",
                expected="all peers take part in time",
                found=f"waiting for {self._operation.waits_for}",
                fix="look at what those ranks do, or raise timeout_s",
            )
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # set before the event

    def _finish(self, value: T) -> None:
        self._value = value
        self._finished.set()

    def _fail(self, error: BaseException) -> None:
        if not self._finished.is_set():
            self._error = error
            self._finished.set()


def run_beside(
    operation: Operation, handles: Sequence[Handle[Any]], run: Callable[[], None], device: torch.device
) -> None:
    """Call ``run`` in a thread of its own; it finishes the handles, and what it raises ends those that are open.

    A thread for each operation costs about 0.1 ms. The threads do not keep the process alive: wait for every handle
    before the end of the program, which otherwise may end by a signal. On CUDA the thread works on a stream of its
    own, after what the caller's stream holds now.
    """
    ready = None
    if device.type == "cuda":
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(torch.cuda.current_stream(device))

    def body() -> None:
        try:
            with _stream_after(ready, device):
                run()
        except BaseException as error:
            for handle in handles:
                handle._fail(error)

    thread = threading.Thread(target=body, name=operation.what, daemon=True)
    _threads.add(thread)
    thread.start()


_threads: WeakSet[threading.Thread] = WeakSet()


@atexit.register
def _leave() -> None:
    """An operation that wakes up while the interpreter is taken down would end the process with a signal."""
    end_s = time.monotonic() + _EXIT_GRACE_S
    for thread in list(_threads):
        thread.join(max(0.0, end_s - time.monotonic()))
        if thread.is_alive():
            _log.warning("%s is still under way at exit: wait for its handle", thread.name)


@contextlib.contextmanager
def _stream_after(ready: torch.cuda.Event | None, device: torch.device) -> Iterator[None]:
    if ready is None:
        yield
        return
    torch.cuda.set_device(device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        yield


@dataclass(slots=True)
class _GroupState:
    """Lives as long as the group: the number of the next operation, and the end of the last one's posting."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    next_number: int = 0
    last_turn: threading.Event | None = None


_states: WeakKeyDictionary[dist.ProcessGroup, _GroupState] = WeakKeyDictionary()
_states_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Turn:
    """An operation's place among those of its group. ``number`` is the same on all ranks."""

    number: int
    before: threading.Event | None
    posted: threading.Event

    def tag(self, phase: int) -> int:
        """A tag for messages of this operation only; ``phase`` is below 8."""
        return _TAG_BASE + (self.number * _TAGS_PER_OPERATION + phase) % _NUM_TAGS


class Messenger:
    """Sends and receives byte messages in ``group`` (None: the default group). Peers are ranks of the group.

    All ranks of a group start the same operations in the same order. CPU tensors go by tags (gloo), which other
    traffic on the group does not disturb. nccl has no tags: there operations post one after another, and the group
    must not be used for anything else while one is under way.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise InputError(
                "there is no process group",
                expected="torch.distributed is initialised",
                found="it is not",
                fix="call llmsys.comm.launch.init_from_env first, under torchrun or launch",
            )
        found = group if group is not None else dist.group.WORLD
        self.rank = dist.get_rank(found)
        if self.rank < 0 or not isinstance(found, dist.ProcessGroup):
            raise InputError(
                "this rank is not in the process group",
                expected="a group that has this rank",
                found=f"rank {dist.get_rank()} outside the group",
                fix="call with a group that this rank is a member of, or do not call on this rank",
            )
        self.group: dist.ProcessGroup = found
        self.global_ranks: tuple[int, ...] = tuple(dist.get_process_group_ranks(found))
        self.size = len(self.global_ranks)

    def take_turn(self) -> Turn:
        """The next place in the group's row of operations; to be called in the same order on all ranks."""
        with _states_lock:
            state = _states.setdefault(self.group, _GroupState())
        with state.lock:
            turn = Turn(number=state.next_number, before=state.last_turn, posted=threading.Event())
            state.next_number += 1
            state.last_turn = turn.posted
        return turn

    def ranks_text(self, peers: Sequence[int]) -> str:
        """The peers by their global ranks, for errors."""
        ranks = [self.global_ranks[peer] for peer in peers]
        return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks}"

    def post(
        self,
        operation: Operation,
        tag: int,
        *,
        receives: Sequence[tuple[int, torch.Tensor]] = (),
        sends: Sequence[tuple[int, torch.Tensor]] = (),
        grouped: bool = True,
    ) -> list[Posted]:
        """Post messages of contiguous bytes; returns at once. Empty ones are left out, on both sides.

        With nccl, ``grouped`` messages are one call and wait for each other; without, every pair of ranks has a
        connection and an order of its own.
        Two messages to one peer with one tag arrive in the order they were posted. The tensors are the operation's
        until its messages have been waited for.
        """
        receives = [(peer, data) for peer, data in receives if data.numel()]
        sends = [(peer, data) for peer, data in sends if data.numel()]
        both = [*receives, *sends]
        if grouped and both and both[0][1].is_cuda:
            calls = [dist.P2POp(dist.irecv, data, group=self.group, group_peer=peer) for peer, data in receives]
            calls += [dist.P2POp(dist.isend, data, group=self.group, group_peer=peer) for peer, data in sends]
            return [Posted(peer=None, sending=False, work=work) for work in dist.batch_isend_irecv(calls)]
        posted = []
        for number, (peer, data) in enumerate(both):
            sending = number >= len(receives)
            try:
                if sending:
                    work = dist.isend(data, group=self.group, tag=tag, group_dst=peer)
                else:
                    work = dist.irecv(data, group=self.group, tag=tag, group_src=peer)
            except RuntimeError as error:
                raise self._lost(operation, [peer], error) from error
            posted.append(Posted(peer=peer, sending=sending, work=work))
        return posted

    def wait(self, operation: Operation, what: str, posted: Sequence[Posted]) -> None:
        """Block until the messages have been sent and received. ``what`` names them in errors.

        Raises DeadlineError with the peers that did not answer by the operation's deadline, and PeerLostError. gloo
        closes all connections of the group at a deadline, so the group is of no more use after it.
        """
        failed: list[Posted] = []
        first: RuntimeError | None = None
        late = False
        for number, message in enumerate(posted):
            operation.waits_for = f"{what} of {self._peers_text(posted[number:])}"
            remaining_s = _AT_ONCE_S if first else max(_AT_ONCE_S, operation.deadline.remaining_s)
            try:
                message.work.wait(timedelta(seconds=remaining_s))
            except RuntimeError as error:
                late = late or (first is None and operation.deadline.remaining_s <= _AT_ONCE_S)
                first = first or error
                failed.append(message)
        if first is None:
            return
        if late:
            raise DeadlineError(
                f"{operation.what} did not end within {operation.deadline.timeout_s:g} s: "
                f"no {what} of {self._peers_text(failed)}",
                expected=f"all {self.size} ranks of the group start the operation in time",
                found=str(first).partition("\n")[0],
                fix="look at what those ranks do, or raise timeout_s; the process group cannot be used any more",
            ) from first
        raise self._lost(operation, _peers_of(failed), first) from first

    def _peers_text(self, messages: Sequence[Posted]) -> str:
        return self.ranks_text(_peers_of(messages) or [peer for peer in range(self.size) if peer != self.rank])

    def _lost(self, operation: Operation, peers: Sequence[int], error: RuntimeError) -> LlmsysError:
        return PeerLostError(
            f"{operation.what} lost {self.ranks_text(peers) if peers else 'a peer'}",
            expected="every peer lives until the operation has ended",
            found=str(error).partition("\n")[0],
            fix="see the output of that rank: it ended, or gave up at a deadline of its own",
        )


def _peers_of(messages: Sequence[Posted]) -> list[int]:
    return sorted({message.peer for message in messages if message.peer is not None})
