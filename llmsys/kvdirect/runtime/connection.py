"""One connection of an endpoint: the peer, and its table of tensors."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from llmsys.comm.registry import RemoteRegistry
from llmsys.comm.transports.base import Peer, Request
from llmsys.core.errors import LlmsysError, PeerLostError

from .completion import when_all

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Table:
    """A table of tensors, and how many are looking something up in it."""

    tensors: RemoteRegistry
    num_users: int = 0


class Connection:
    """A peer and what was exchanged with it. Made by `KvEndpoint.connect`; a lost one is never revived. Thread safe."""

    def __init__(self, peer: Peer, address: str, tensors: RemoteRegistry) -> None:
        self.peer = peer
        self.address = address
        self._lock = threading.Lock()
        self._table = _Table(tensors)
        self._posted: list[Request] = []
        self._num_kept = 0
        self._lost: str | None = None

    def __str__(self) -> str:
        return str(self.peer)

    @property
    def tensors(self) -> RemoteRegistry:
        """The peer's tensors, as of the last `KvEndpoint.connect` or `refresh`."""
        return self._table.tensors

    @property
    def alive(self) -> bool:
        return self._lost is None

    def check_alive(self) -> None:
        """Raises PeerLostError."""
        if self._lost is not None:
            raise PeerLostError(
                f"the connection to {self.peer} is lost",
                expected="a connection that is alive",
                found=self._lost,
                fix="connect to its address again; if the process is another one, ask for the request again",
            )

    @contextlib.contextmanager
    def using_tensors(self) -> Iterator[RemoteRegistry]:
        """The peer's tensors, which stay usable inside the block even if the table is refreshed meanwhile.

        Transfers that use them must be posted before the block ends.
        """
        with self._lock:
            table = self._table
            table.num_users += 1
        try:
            yield table.tensors
        finally:
            with self._lock:
                table.num_users -= 1
                is_last = table.num_users == 0 and table is not self._table
            if is_last:
                self._close(table)

    def replace_tensors(self, tensors: RemoteRegistry) -> None:
        """A newer table takes over. The older one is closed when no transfer can use it any more."""
        with self._lock:
            older, self._table = self._table, _Table(tensors)
            is_unused = older.num_users == 0
        if is_unused:
            self._close(older)

    def posted(self, request: Request) -> None:
        with self._lock:
            self._posted.append(request)
            if len(self._posted) > 2 * self._num_kept + 16:
                self._posted = [request for request in self._posted if not request.done()]
                self._num_kept = len(self._posted)

    def mark_lost(self, reason: str) -> None:
        self._lost = self._lost or reason

    def _close(self, table: _Table) -> None:
        with self._lock:
            under_way = [request for request in self._posted if not request.done()]

        def close(_: Exception | None) -> None:
            try:
                table.tensors.close()
            except LlmsysError:
                # The transport drops the rest with the connection.
                _log.exception("regions of an older table of %s stay imported", self.peer)

        when_all(under_way, close)
