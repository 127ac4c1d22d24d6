"""The side of an endpoint that holds blocks: who waits for the end of a hold, and the thread that ends late ones."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from llmsys.core.errors import DeadlineError

from ..blocks import BlockPool, Blocks
from ..config import KvConfig
from ..holds import Access, Hold, HoldTable, Outcome
from .completion import succeed


class HoldKeeper:
    """Keeps a `HoldTable` going. Thread safe.

    ended: called once for each hold that has ended, after all who wait for it were told; on any thread.
    """

    def __init__(self, config: KvConfig, ended: Callable[[str, Outcome], None]) -> None:
        self._ended = ended
        self.table = HoldTable(config, self._hold_ended)
        self._lock = threading.Lock()
        self._waiters: dict[str, Future[Outcome]] = {}
        self._wake = threading.Event()
        self._next_s = math.inf
        self._closed = False
        self._thread = threading.Thread(target=self._expire, name="llmsys-holds", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def hold(self, request_id: str, pool: BlockPool, blocks: Blocks, *, peer_name: str, access: Access) -> Hold:
        """See `HoldTable.open`."""
        now_s = time.monotonic()
        hold = self.table.open(request_id, pool, blocks, peer_name=peer_name, access=access, now_s=now_s)
        if hold.expires_s < self._next_s:
            self._wake.set()
        return hold

    def wait(self, request_id: str, timeout_s: float) -> Outcome:
        """See `KvEndpoint.wait_held`."""
        with self._lock:
            waiter = self._waiters.setdefault(request_id, Future())
        outcome = self.table.outcome(request_id)
        if outcome is not None:
            self._end_wait(request_id, outcome)
            return outcome
        try:
            return waiter.result(timeout_s)
        except TimeoutError as error:
            raise DeadlineError(
                f"request {request_id!r} is still held",
                expected=f"a completion from its peer within {timeout_s} s",
                found="neither a completion nor the loss of the peer",
                fix="wait again with a longer timeout_s, or cancel the request",
            ) from error

    def peer_lost(self, peer_id: int) -> None:
        self.table.peer_lost(peer_id, now_s=time.monotonic())
        self._wake.set()
        self.table.tell()

    def close(self) -> None:
        """Ends all holds, and the thread. Can be called again."""
        self.table.close()
        self.table.tell()
        self._closed = True
        self._wake.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)

    def _hold_ended(self, hold: Hold, outcome: Outcome) -> None:
        self._end_wait(hold.request_id, outcome)
        self._ended(hold.request_id, outcome)

    def _end_wait(self, request_id: str, outcome: Outcome) -> None:
        with self._lock:
            waiter = self._waiters.pop(request_id, None)
        if waiter is not None:
            succeed(waiter, outcome)

    def _expire(self) -> None:
        while not self._closed:
            self._wake.clear()
            # A hold that is opened between here and the wait wakes us whenever it is due.
            self._next_s = math.inf
            next_s = self.table.expire(time.monotonic())
            self._next_s = math.inf if next_s is None else next_s
            self.table.tell()
            if not self._closed:
                self._wake.wait(None if next_s is None else max(next_s - time.monotonic(), 0.0))
