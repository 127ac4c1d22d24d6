"""Messages on their way to peers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from concurrent.futures import Future

from llmsys.comm.transports.base import Peer, Request, Transport
from llmsys.core.errors import TransportError

from .. import messages
from ..holds import Outcome
from .completion import fail


class Outbox:
    """Sends messages of an endpoint. Thread safe; only `flush` blocks."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lock = threading.Lock()
        self._sent: deque[Request] = deque()

    def send(self, peer: Peer, message: messages.Message) -> None:
        """Sends what needs no answer. Nothing happens if the peer is lost: that is, or will be, reported by itself."""
        with contextlib.suppress(TransportError):
            sent = self._transport.notify(peer, messages.encode(message))
            with self._lock:
                self._sent.append(sent)
                while self._sent and self._sent[0].done():
                    self._sent.popleft()

    def ask(self, peer: Peer, message: messages.Message, answer: Future[Outcome]) -> None:
        """Sends a question; `answer` fails if it does not arrive."""
        try:
            sent = self._transport.notify(peer, messages.encode(message))
        except Exception as error:
            fail(answer, error)
            return
        sent.add_done_callback(lambda request: fail(answer, request.exception()))

    def flush(self, timeout_s: float) -> None:
        """Waits until peers have got what was sent, but not longer than that."""
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            sent = list(self._sent)
        for request in sent:
            request._wait(max(deadline_s - time.monotonic(), 0.0))
