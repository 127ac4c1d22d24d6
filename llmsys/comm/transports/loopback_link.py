"""The parts of the loopback transport: the network of a process, its links, and operations under way."""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmsys.comm.transports.base import Copies, Peer
from llmsys.comm.transports.memory import Batch
from llmsys.comm.transports.requests import PostedRequest
from llmsys.core.errors import TransportError

if TYPE_CHECKING:
    from llmsys.comm.transports.loopback import LoopbackTransport

MAX_SLICE_BYTES = 4 << 20
MAX_SLICE_ENTRIES = 256

Slice = list[tuple[int, int, int]]
"""Copies as (to address, from address, bytes)."""


class Network:
    """The endpoints of this process by name, and the one lock that all of them and their links share."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.endpoints: dict[str, LoopbackTransport] = {}


@dataclass(slots=True, eq=False)
class Operation:
    """A posted batch or message. number: of the peer's requests, from 1. finish_s: when a copied batch may end."""

    request: PostedRequest
    batch: Batch | None = None
    number: int = 0
    payload: bytes = b""
    slices: Iterator[tuple[Slice, int]] = field(default_factory=lambda: iter(()))
    copied_bytes: int = 0
    lose_after_bytes: int | None = None
    is_copied: bool = False
    finish_s: float = 0.0
    error: TransportError | None = None


@dataclass(slots=True, eq=False)
class Link:
    """One endpoint's side of a connection; `far` is the other side. Under the network's lock.

    queue: posted, not started. running: batches between start and end. inbox: messages on their way here, as a heap
    of (when they arrive, number, payload). early: those that arrived before the one that is next.
    """

    endpoint: LoopbackTransport
    peer: Peer
    far: Link = field(init=False, repr=False)
    queue: deque[Operation] = field(default_factory=deque)
    running: list[Operation] = field(default_factory=list)
    num_posted: int = 0
    is_copying: bool = False
    error: TransportError | None = None
    reason: str = ""
    left: bool = False
    num_sent: int = 0
    num_received: int = 0
    unacknowledged: dict[int, PostedRequest] = field(default_factory=dict)
    inbox: list[tuple[float, int, bytes]] = field(default_factory=list)
    early: dict[int, bytes] = field(default_factory=dict)

    def arrive(self, now_s: float) -> list[tuple[int, bytes]]:
        """Messages that can be delivered now: in order, each once, whatever order and number they came in."""
        while self.inbox and self.inbox[0][0] <= now_s:
            _, number, payload = heapq.heappop(self.inbox)
            if number > self.num_received:
                self.early[number] = payload
        ready = []
        while self.num_received + 1 in self.early:
            self.num_received += 1
            ready.append((self.num_received, self.early.pop(self.num_received)))
        return ready


def slices_of(batch: Batch, max_entries: int = MAX_SLICE_ENTRIES) -> Iterator[tuple[Slice, int]]:
    """A batch in parts of bounded size, each with the id of the remote region that it touches."""
    for group in batch.groups:
        part: Slice = []
        size_bytes = 0
        for entry in _pieces(group, batch.write):
            part.append(entry)
            size_bytes += entry[2]
            if len(part) == max_entries or size_bytes >= MAX_SLICE_BYTES:
                yield part, group.remote.remote_id
                part, size_bytes = [], 0
        if part:
            yield part, group.remote.remote_id


def _pieces(group: Copies, write: bool) -> Iterator[tuple[int, int, int]]:
    columns = (group.local_offsets.tolist(), group.remote_offsets.tolist(), group.lengths.tolist())
    for local_offset, remote_offset, length in zip(*columns, strict=True):
        for begin in range(0, length, MAX_SLICE_BYTES):
            size_bytes = min(MAX_SLICE_BYTES, length - begin)
            local = group.local.address + local_offset + begin
            remote = group.remote.address + remote_offset + begin
            yield (remote, local, size_bytes) if write else (local, remote, size_bytes)
