"""The frames of the Python control plane, and what it knows of one connection."""

from __future__ import annotations

import enum
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from llmsys.comm.transports.base import Peer
from llmsys.comm.transports.requests import EventThread
from llmsys.core.errors import TransportError

_HEADER = struct.Struct("<4sB3xIQQ")
_MAGIC = b"LCTL"


class FrameKind(enum.IntEnum):
    """What a frame is. `number` counts heartbeats, notifications and questions, each from 1."""

    HEARTBEAT = 1
    HEARTBEAT_ACK = 2
    BYE = 3
    NOTIFY = 4
    NOTIFY_ACK = 5
    ASK = 6
    ANSWER = 7
    FAILURE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """topic: what an ASK is about; the adapter's own numbers."""

    kind: FrameKind
    number: int = 0
    topic: int = 0
    body: bytes = b""

    def pack(self) -> bytes:
        return _HEADER.pack(_MAGIC, self.kind, self.topic, self.number, len(self.body)) + self.body


class FrameReader:
    """Cuts a byte stream into frames. A body longer than `max_body_bytes` is refused before it is stored."""

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Frames that are whole now.

        Raises:
            ValueError: the stream is no stream of frames; nothing after that makes sense.
        """
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            magic, kind, topic, number, size = _HEADER.unpack_from(self._buffer)
            if magic != _MAGIC:
                raise ValueError(f"a frame that begins with {magic!r}")
            if size > self._max_body_bytes:
                raise ValueError(f"a frame of {size} bytes, more than {self._max_body_bytes}")
            end = _HEADER.size + size
            if len(self._buffer) < end:
                return
            with memoryview(self._buffer) as view:
                body = bytes(view[_HEADER.size : end])
            del self._buffer[:end]
            yield Frame(kind=FrameKind(kind), number=number, topic=topic, body=body)


@dataclass(slots=True)
class Question:
    answered: threading.Event = field(default_factory=threading.Event)
    body: bytes = b""
    error: TransportError | None = None


@dataclass(slots=True, eq=False)
class Connection:
    """One peer's socket. Only the control thread reads, writes and closes it; the rest is under the plane's lock."""

    peer: Peer
    sock: socket.socket
    lease_s: float
    reader: FrameReader
    heard_s: float
    out: bytearray = field(default_factory=bytearray)
    events: int = 0
    error: TransportError | None = None
    close_by_s: float = 0.0
    num_heartbeats: int = 0
    next_heartbeat_s: float = 0.0
    sent_s: dict[int, float] = field(default_factory=dict)
    right_until_s: float = 0.0
    num_sent: int = 0
    num_received: int = 0
    unacknowledged: dict[int, Callable[[TransportError | None], None]] = field(default_factory=dict)
    questions: dict[int, Question] = field(default_factory=dict)
    num_questions: int = 0
    answers: EventThread | None = None


def has_ended(sock: socket.socket) -> bool:
    """Whether the other side has closed, as far as it is known here. Data that waits to be read hides it."""
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
