"""The contract of a transport: registered memory, peers, one-sided reads and writes, acknowledged notifications.

Every transport keeps it, and `tests/comm/test_conformance.py` checks every one that is present:

- **Memory.** Only registered or allocated regions are read, written, or the target of either. A region keeps its
  owner alive until it is released; a region that a request uses cannot be released.
- **Batches.** A batch is many (local, remote, length) entries in one call. It is checked whole before any byte moves:
  an entry outside its region or destinations that overlap are an `InputError`. No entries is a valid batch.
- **Order.** Requests of one peer start in the order they were posted. A notification starts after every earlier
  request of that peer has ended, so it never overtakes the data it announces. Peers do not wait for each other.
- **Completion.** A read is done when its bytes are in local memory and the peer was alive, and our lease on it valid,
  after the last byte. A write is done when its bytes are visible at the peer. A notification is done when the peer
  has queued it; each is delivered exactly once, in order.
- **Connections.** Two endpoints have at most one, also when both dial at once; either of them may use it.
- **Failure.** When a peer is lost, its requests end with an error that names it, after the last moment at which the
  transport could touch their local memory. Requests of other peers go on.
- **Leases.** A peer that is not heard of for `lease_s` is lost. The peer stops touching our memory before that, since
  it counts its lease from when it sent what we last heard.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from abc import ABC, abstractmethod
from asyncio import Future, get_running_loop
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from llmsys.core.errors import DeadlineError, InputError

_log = logging.getLogger(__name__)

Offsets = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a transport can do, so that callers and tests need not know its name.

    one_sided: reads and writes need no call by the target's program.
    passive: they need no progress of the target's process at all (it may be stopped) where memory allows.
    allocates: `allocate` gives memory that peers on the host can map.
    shares_process: both ends can live in one process.
    fenced: once a peer is lost, none of its operations that were under way touches our memory any more. The exception
        is a process that was stopped within one copy: nobody else can keep it from finishing that copy.
    devices: device types whose memory can be registered.
    """

    one_sided: bool
    passive: bool
    allocates: bool
    shares_process: bool
    fenced: bool = True
    devices: tuple[str, ...] = ("cpu",)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportConfig:
    """Settings that all transports share.

    host, port: where to listen; port 0 takes a free one. Loopback by default.
    secret: the job's secret, which every peer must present; empty reads the environment variable LLMSYS_JOB_SECRET.
    name: this endpoint's name in the job, unique; empty makes one from host, process id and a counter.
    lease_s: a peer that is not heard of for this long is lost. heartbeat_s: 0 means a quarter of the lease.
    connect_timeout_s: the default deadline of `connect`.
    """

    host: str = "127.0.0.1"
    port: int = 0
    secret: str = field(default="", repr=False)
    name: str = ""
    lease_s: float = 10.0
    heartbeat_s: float = 0.0
    connect_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.lease_s <= 0 or self.heartbeat_s < 0 or self.heartbeat_s >= self.lease_s:
            raise InputError(
                "a lease must be longer than the time between heartbeats",
                expected="lease_s > heartbeat_s >= 0",
                found=f"lease_s={self.lease_s}, heartbeat_s={self.heartbeat_s}",
                fix="set heartbeat_s to a quarter of lease_s, or to 0",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Registered local memory: `size_bytes` from `address`. `remote_key` is what a peer needs to reach it."""

    region_id: int
    address: int
    size_bytes: int
    device: str
    remote_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One authenticated connection. A peer that comes back is another `Peer`: `peer_id` is never used again.

    name, generation: who is there; a restarted process has another generation.
    address: where it can be connected to; empty if it does not listen.
    """

    peer_id: int
    name: str
    generation: int
    address: str

    def __str__(self) -> str:
        return f"{self.name} at {self.address or 'an unknown address'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteRegion:
    """A peer's region, imported: it can be the remote side of a batch. `path` is how its bytes travel."""

    remote_id: int
    peer_id: int
    address: int
    size_bytes: int
    device: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Entries of a batch between one local and one remote region.

    local_offsets, remote_offsets, lengths: int64 arrays of equal shape (n,), in bytes from the regions' beginnings.
    """

    local: Region
    remote: RemoteRegion
    local_offsets: Offsets
    remote_offsets: Offsets
    lengths: Offsets

    def __post_init__(self) -> None:
        for name in ("local_offsets", "remote_offsets", "lengths"):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=np.int64))
        shapes = {self.local_offsets.shape, self.remote_offsets.shape, self.lengths.shape}
        if len(shapes) != 1 or self.lengths.ndim != 1:
            raise InputError(
                "offsets and lengths of a batch must be 1-d arrays of one length",
                expected="three arrays of shape (n,)",
                found=f"{self.local_offsets.shape}, {self.remote_offsets.shape}, {self.lengths.shape}",
                fix="give one local offset, one remote offset and one length for each entry",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Notification:
    """A message from a peer; `message_id` counts 1, 2, 3, ... per peer."""

    peer: Peer
    message_id: int
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStats:
    """What a request did. Times are of the monotonic clock; 0 where it has not come so far.

    num_entries, num_segments: entries posted, and operations left after coalescing.
    """

    num_entries: int = 0
    num_segments: int = 0
    size_bytes: int = 0
    posted_ns: int = 0
    started_ns: int = 0
    finished_ns: int = 0


class Request(ABC):
    """A posted operation. It can be polled, waited for, awaited, or called back; all from any thread."""

    @property
    @abstractmethod
    def description(self) -> str:
        """What it is, for messages: "read of 12 blocks from NAME"."""

    @property
    @abstractmethod
    def stats(self) -> RequestStats: ...

    @abstractmethod
    def done(self) -> bool:
        """Whether it has ended, well or not. Never blocks."""

    @abstractmethod
    def exception(self) -> Exception | None:
        """Why it failed; None if it has not (yet)."""

    @abstractmethod
    def _wait(self, timeout_s: float) -> bool:
        """Blocks without Python's lock until it ends; False after `timeout_s`."""

    @abstractmethod
    def add_done_callback(self, callback: Callable[[Request], None]) -> None:
        """Calls `callback(request)` once, on the transport's event thread, or here if it has ended already."""

    def wait(self, timeout_s: float) -> None:
        """Blocks until it ends.

        Raises:
            DeadlineError: it has not ended within `timeout_s`. It goes on: its memory stays in use.
            TransportError: it failed.
        """
        if not self._wait(timeout_s):
            raise DeadlineError(
                f"the {self.description} did not end in time",
                expected=f"completion within {timeout_s} s",
                found="still under way",
                fix="wait again with a longer timeout_s; until it ends, its local memory must not be reused",
            )
        if error := self.exception():
            raise error

    def __await__(self) -> Generator[Any, None, None]:
        loop = get_running_loop()
        future: Future[None] = loop.create_future()

        def resolve(request: Request) -> None:
            if not future.done():
                error = request.exception()
                future.set_exception(error) if error else future.set_result(None)

        def hand_over(request: Request) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody awaits any more
                loop.call_soon_threadsafe(resolve, request)

        self.add_done_callback(hand_over)
        return future.__await__()


class PeerEvents(Protocol):
    """Who hears of peers and their messages. Calls come on the transport's event thread, in order for each peer.

    They must not block for long and must not wait for a request of the same transport: nothing else is delivered
    meanwhile. Heartbeats do not depend on them.
    """

    def peer_joined(self, peer: Peer) -> None:
        """A connection is established, whoever began."""

    def peer_lost(self, peer: Peer, reason: str, left: bool) -> None:
        """A peer that had joined is gone, also by our own `disconnect`; comes once, and nothing from it afterwards.

        left: it, or we, said goodbye; else it ended, closed its connection, or was silent for its lease.
        """

    def notified(self, notification: Notification) -> None: ...


class Transport(ABC):
    """One endpoint of a transport. Thread safe. A context manager: leaving it closes."""

    name: ClassVar[str]
    """What configurations call it."""

    @classmethod
    @abstractmethod
    def available(cls) -> str | None:
        """None if it can be used here, else why not and what to do about it."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities: ...

    @property
    @abstractmethod
    def config(self) -> TransportConfig: ...

    @property
    @abstractmethod
    def local(self) -> Peer:
        """This endpoint as its peers see it (peer_id 0)."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Library, version, transports and devices in use: what a result row must say."""

    @abstractmethod
    def set_events(self, events: PeerEvents) -> None:
        """Sets who hears of peers and messages; what came before is delivered first. Once per transport."""

    @abstractmethod
    def register(self, address: int, size_bytes: int, *, device: str = "cpu", owner: object = None) -> Region:
        """Makes memory reachable for peers. `owner` (a tensor, say) is kept alive until `release`."""

    @abstractmethod
    def allocate(self, size_bytes: int) -> Region:
        """Zeroed memory in the form that peers on this host reach fastest; freed by `release`.

        Raises:
            InputError: the transport cannot (`capabilities.allocates`), or the size is not positive.
        """

    @abstractmethod
    def release(self, region: Region) -> None:
        """Ends the registration.

        Raises:
            InputError: a request still uses it, or it is not registered.
        """

    @abstractmethod
    def connect(self, address: str, *, timeout_s: float | None = None) -> Peer:
        """The peer that listens at `address`; the one there is if it is connected already and alive.

        Raises:
            DeadlineError: nothing answered in time. AuthenticationError: secrets differ.
            TransportError: refused, not this protocol, or another transport.
        """

    @abstractmethod
    def disconnect(self, peer: Peer) -> None:
        """Says goodbye. Requests under way end with an error. Does nothing if the peer is gone."""

    @abstractmethod
    def peers(self) -> tuple[Peer, ...]:
        """Peers that are connected and not lost, oldest first, whoever began."""

    @abstractmethod
    def import_region(
        self, peer: Peer, *, address: int, size_bytes: int, device: str, remote_key: bytes
    ) -> RemoteRegion:
        """Makes a peer's region usable. The four values are those of its `Region`.

        Raises:
            DescriptorError: the key is damaged, or says something else than the values.
        """

    @abstractmethod
    def forget_region(self, remote: RemoteRegion) -> None:
        """Drops an import; does nothing if its peer is gone."""

    @abstractmethod
    def read(self, peer: Peer, copies: Sequence[Copies], *, coalesce: bool = True) -> Request:
        """Copies from remote to local memory (pull). Returns at once. See the module's text for the rules.

        coalesce: entries that are adjacent on both sides become one operation.
        """

    @abstractmethod
    def write(self, peer: Peer, copies: Sequence[Copies], *, coalesce: bool = True) -> Request:
        """Copies from local to remote memory (push). Returns at once. See the module's text for the rules."""

    @abstractmethod
    def notify(self, peer: Peer, payload: bytes) -> Request:
        """Sends a message of at most `max_message_bytes`. Returns at once."""

    @property
    @abstractmethod
    def max_message_bytes(self) -> int: ...

    @abstractmethod
    def close(self) -> None:
        """Says goodbye to all peers, ends all requests with an error, frees everything. Can be called again.

        No `peer_lost` is delivered for what ends by this.
        """

    def __enter__(self) -> Transport:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class EventQueue:
    """Holds events until somebody listens, then passes them on in order. For transports to build on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listener: PeerEvents | None = None
        self._held: list[Callable[[PeerEvents], None]] = []

    def set_listener(self, listener: PeerEvents) -> None:
        with self._lock:
            if self._listener is not None:
                raise InputError(
                    "this transport has a listener already",
                    expected="one call of set_events for each transport",
                    found=f"a second one, with {type(listener).__name__}",
                    fix="make another transport, or let one listener pass events on",
                )
            # Under the lock, so that what arrives meanwhile stays behind what was held.
            for event in self._held:
                _call(event, listener)
            self._held.clear()
            self._listener = listener

    def put(self, event: Callable[[PeerEvents], None]) -> None:
        with self._lock:
            if self._listener is None:
                self._held.append(event)
                return
            listener = self._listener
        _call(event, listener)


def _call(event: Callable[[PeerEvents], None], listener: PeerEvents) -> None:
    # An error in a listener is the program's own; the thread that brings events to all its other parts goes on.
    try:
        event(listener)
    except Exception:
        _log.exception("%s failed on an event of its transport", type(listener).__name__)


def check_copies(copies: Iterable[Copies], peer: Peer) -> None:
    """Refuses remote regions of another peer: their addresses mean nothing at this one."""
    for group in copies:
        if group.remote.peer_id != peer.peer_id:
            raise InputError(
                f"a batch for {peer} has a region of another peer",
                expected=f"remote regions imported from peer {peer.peer_id}",
                found=f"one from peer {group.remote.peer_id}",
                fix="import the region from the connection that the batch is posted on",
            )
