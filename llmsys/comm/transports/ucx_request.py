"""Requests of the native UCX engine, and what goes into its calls."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from llmsys import _C
from llmsys.core.errors import InputError, PeerLostError, TransportError

from .base import Copies, Request, RequestStats

_log = logging.getLogger(__name__)

Watch = Callable[["UcxRequest", _C.Request], None]
"""Makes the transport call `UcxRequest.ended` on its event thread when the native request has ended."""


class UcxRequest(Request):
    """A request of the native engine. See `base.Request`."""

    def __init__(self, watch: Watch, native: _C.Request, description: str) -> None:
        self._watch = watch
        self._native = native
        self._description = description
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[Request], None]] | None = []
        self._is_watched = False

    @property
    def description(self) -> str:
        return self._description

    @property
    def paths(self) -> tuple[str, ...]:
        """How the bytes travel: "shm", "cma", "ucx"."""
        return tuple(self._native.paths)

    @property
    def stats(self) -> RequestStats:
        native = self._native
        return RequestStats(
            num_entries=native.num_entries,
            num_segments=native.num_segments,
            size_bytes=native.size_bytes,
            posted_ns=native.posted_ns,
            started_ns=native.started_ns,
            finished_ns=native.finished_ns,
        )

    def done(self) -> bool:
        return self._native.done()

    def exception(self) -> Exception | None:
        text = self._native.error()
        if text is None:
            return None
        kind = self._native.error_kind()
        cls = PeerLostError if kind == "lost" else TransportError
        return cls(
            f"the {self._description} failed",
            expected="completion while the peer was alive and its lease valid",
            found=text,
            fix="discard what was read; connect again, or use another peer",
        )

    def _wait(self, timeout_s: float) -> bool:
        return self._native.wait(timeout_s)

    def add_done_callback(self, callback: Callable[[Request], None]) -> None:
        with self._lock:
            if self._callbacks is None or (self._native.done() and not self._callbacks):
                now = True
            else:
                now = False
                self._callbacks.append(callback)
                first, self._is_watched = not self._is_watched, True
        if now:
            callback(self)
        elif first:
            self._watch(self, self._native)

    def ended(self) -> None:
        """Calls the callbacks; for the transport's event thread."""
        with self._lock:
            callbacks, self._callbacks = self._callbacks or [], None
        for callback in callbacks:
            # An error in a callback is the program's own; the event thread goes on.
            try:
                callback(self)
            except Exception:
                _log.exception("a callback of the %s failed", self._description)


def pack_copies(
    copies: Sequence[Copies],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Groups as rows (region, remote, begin, end), and the three arrays they point into.

    Groups that share arrays, such as all layers of a cache, share the entries too.
    """
    begins: dict[tuple[int, int, int], int] = {}
    rows, parts, size = [], [], 0
    for group in copies:
        key = (id(group.local_offsets), id(group.remote_offsets), id(group.lengths))
        if key not in begins:
            begins[key] = size
            parts.append(group)
            size += len(group.lengths)
        begin = begins[key]
        rows.append((group.local.region_id, group.remote.remote_id, begin, begin + len(group.lengths)))
    groups = np.array(rows, dtype=np.int64).reshape(-1, 4)
    if len(parts) == 1:
        return groups, parts[0].local_offsets, parts[0].remote_offsets, parts[0].lengths
    empty = [np.empty(0, dtype=np.int64)]
    local, remote, lengths = (
        np.concatenate([getattr(part, name) for part in parts] or empty)
        for name in ("local_offsets", "remote_offsets", "lengths")
    )
    return groups, local, remote, lengths


@contextlib.contextmanager
def input_errors(summary: str) -> Iterator[None]:
    """Turns the engine's refusals into errors of the toolkit."""
    try:
        yield
    except (ValueError, TypeError) as error:  # A number that is out of range for C++ is a TypeError.
        raise InputError(
            summary,
            expected="values that the engine can use",
            found=str(error),
            fix="correct the value it names",
        ) from error
    except RuntimeError as error:
        raise TransportError(
            summary,
            expected="an open engine",
            found=str(error),
            fix="see what UCX says above, and `UcxTransport.describe()` for which library it is",
        ) from error
