"""Requests and the event thread of transports that are written in Python."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from llmsys.comm.transports.base import Request, RequestStats

_log = logging.getLogger(__name__)


class EventThread:
    """Runs calls one after the other on a thread of its own, so that a slow one holds up nothing but later ones."""

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def post(self, call: Callable[[], None]) -> None:
        """Runs it after what was posted before; here and now once the thread has been closed."""
        with self._changed:
            if not self._closing:
                self._calls.append(call)
                self._changed.notify()
                return
        _run_logged(call)

    def close(self, *, wait: bool = True) -> None:
        """Ends the thread after what has been posted. Can be called again, also by a posted call."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if wait and threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._closing)
                if not self._calls:
                    return
                call = self._calls.popleft()
            _run_logged(call)


def _run_logged(call: Callable[[], None]) -> None:
    try:
        call()
    except Exception:
        # A listener's mistake must not silence the transport.
        _log.exception("a listener or callback of a transport failed")


class PostedRequest(Request):
    """A request whose transport calls `start` and, once, `finish`.

    events: runs the callbacks.
    """

    def __init__(
        self, description: str, events: EventThread, *, num_entries: int = 0, num_segments: int = 0, size_bytes: int = 0
    ) -> None:
        self._description = description
        self._events = events
        self._sizes = (num_entries, num_segments, size_bytes)
        self._posted_ns = time.monotonic_ns()
        self._started_ns = 0
        self._finished_ns = 0
        self._error: Exception | None = None
        self._callbacks: list[Callable[[Request], None]] = []
        self._ended = threading.Condition()

    @property
    def description(self) -> str:
        return self._description

    @property
    def stats(self) -> RequestStats:
        num_entries, num_segments, size_bytes = self._sizes
        return RequestStats(
            num_entries=num_entries,
            num_segments=num_segments,
            size_bytes=size_bytes,
            posted_ns=self._posted_ns,
            started_ns=self._started_ns,
            finished_ns=self._finished_ns,
        )

    def done(self) -> bool:
        return self._finished_ns > 0

    def exception(self) -> Exception | None:
        return self._error

    def _wait(self, timeout_s: float) -> bool:
        with self._ended:
            return self._ended.wait_for(self.done, timeout_s)

    def add_done_callback(self, callback: Callable[[Request], None]) -> None:
        with self._ended:
            if not self.done():
                self._callbacks.append(callback)
                return
        callback(self)

    def start(self) -> None:
        if not self._started_ns:
            self._started_ns = time.monotonic_ns()

    def finish(self, error: Exception | None = None) -> None:
        """Ends it; does nothing if it has ended already."""
        with self._ended:
            if self.done():
                return
            self._error = error
            self._finished_ns = time.monotonic_ns()
            callbacks, self._callbacks = self._callbacks, []
            self._ended.notify_all()
        for callback in callbacks:
            self._events.post(lambda callback=callback: callback(self))  # type: ignore[misc]
