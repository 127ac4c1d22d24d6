"""Holds: blocks that stay as they are until a peer has finished with them.

The side whose memory is touched opens a hold. It ends in exactly one way: the peer completes the request, the peer is
lost (its lease ran out or its connection closed), the peer or the owner gives the request up, or the peer never came.
Then the blocks go back to their pool, at once or, after a lost writer, after a quarantine.

The peer learns which way it was from the answer to its completion. Only "completed" means that the blocks were held
during the whole transfer. So a reader that was stopped beyond its lease and went on finds out that what it read is
worthless, and a completion that arrives twice does no harm.

A hold is for a name, and bound to a process: the newest of that name when both are there. Blocks may be in several
holds for readers, or in several for writers, say one for each rank of a peer. They are freed with the last one, unless
a writer has completed: then they stay the owner's.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from llmsys.core.errors import InputError

from .blocks import BlockPool, Blocks
from .config import KvConfig

MAX_REQUEST_ID_BYTES = 1024


class Access(StrEnum):
    """What the peer does to held blocks: it reads them (pull) or writes them (push)."""

    READ = "read"
    WRITE = "write"


class Outcome(StrEnum):
    """How a request ended at the side that held the blocks.

    COMPLETED: the peer has finished; the blocks were held all the time. PEER_LOST: its last connection ended before.
    ABORTED: given up by either side. UNCLAIMED: the peer was not connected in time.

    The others are answers to a completion that ends nothing. STALE: it names other blocks than are, or were, held.
    FOREIGN: it comes from another process than the one the request is for. UNKNOWN: there is no such request, or it
    is forgotten.
    """

    COMPLETED = "completed"
    PEER_LOST = "peer_lost"
    ABORTED = "aborted"
    UNCLAIMED = "unclaimed"
    STALE = "stale"
    FOREIGN = "foreign"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Blocks of `pool` held for `peer_name`.

    expires_s: when it ends if that peer is not connected by then; infinite if it was from the beginning.
    """

    request_id: str
    pool: BlockPool
    blocks: Blocks
    peer_name: str
    access: Access
    expires_s: float


Ended = Callable[[Hold, Outcome], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Session:
    name: str
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """What is remembered of a request. session: whom it was bound to; digest: of its blocks."""

    outcome: Outcome
    peer_name: str
    session: _Session | None
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Untold:
    hold: Hold
    outcome: Outcome
    needs_answer: bool


class HoldTable:
    """All holds of an endpoint. Thread safe; no call blocks. Times are the caller's monotonic clock, in seconds.

    ended: called by `tell`, once for each hold, without locks held. What the peer ended by `complete` or `abort` is
        told only when the caller says that it has answered: who hears of it may close the endpoint, and with it the
        answer.
    """

    def __init__(self, config: KvConfig, ended: Ended) -> None:
        self._config = config
        self._ended = ended
        self._lock = threading.Lock()
        self._holds: dict[str, Hold] = {}
        self._sessions: dict[int, _Session] = {}
        self._bound: dict[str, _Session] = {}
        self._cancelled: set[str] = set()
        self._ends: OrderedDict[str, _End] = OrderedDict()
        self._untold: dict[str, _Untold] = {}
        # Both in the order of their times, since all holds wait equally long, and all quarantines last equally long.
        self._unclaimed: deque[Hold] = deque()
        self._quarantine: deque[tuple[float, Hold]] = deque()
        # Requests to write that ended without their peer's doing: it may still believe that it may write.
        self._revoked: dict[str, dict[str, None]] = {}
        self._closed = False

    def open(
        self, request_id: str, pool: BlockPool, blocks: Blocks, *, peer_name: str, access: Access, now_s: float
    ) -> Hold:
        """Holds blocks, which stay the pool's but cannot be given out, until the request ends.

        Raises:
            InputError: the request exists or existed, the blocks are not current, or one peer would write what another
                reads; or the table is closed.
        """
        blocks = Blocks(ids=blocks.ids, tags=blocks.tags)  # the caller may change its arrays
        with self._lock:
            self._require_new(request_id)
            pool.pin(blocks, writes=access is Access.WRITE)
            # The newest one: an older process of that name has ended, and we were not told so far.
            newest = next((s for s in reversed(self._sessions.values()) if s.name == peer_name), None)
            hold = self._holds[request_id] = Hold(
                request_id=request_id,
                pool=pool,
                blocks=blocks,
                peer_name=peer_name,
                access=access,
                expires_s=now_s + self._config.unclaimed_timeout_s if newest is None else math.inf,
            )
            if newest is None:
                self._unclaimed.append(hold)
            else:
                self._bound[request_id] = newest
        return hold

    def peer_joined(self, peer_id: int, name: str, generation: int) -> tuple[str, ...]:
        """Binds what is held for that name to this process: from now on its lease decides.

        Returns requests to write that ended meanwhile. It must hear of them before it can start: a write into blocks
        that were freed cannot be undone, while a read of such blocks is found out by its completion.
        """
        session = _Session(name=name, generation=generation)
        with self._lock:
            self._sessions[peer_id] = session
            for request_id, hold in self._holds.items():
                if hold.peer_name == name and request_id not in self._bound:
                    self._bound[request_id] = session
            return tuple(self._revoked.get(name, ()))

    def peer_lost(self, peer_id: int, *, now_s: float) -> None:
        """Ends what was bound to that process, if this was its last connection.

        What it was allowed to write goes into quarantine, even when it, or we, said goodbye: the last bytes may be on
        their way.
        """
        with self._lock:
            session = self._sessions.pop(peer_id, None)
            if session is None or session in self._sessions.values():
                return
            for request_id in [r for r, bound in self._bound.items() if bound == session]:
                self._end(request_id, Outcome.PEER_LOST, now_s=now_s)

    def complete(self, request_id: str, peer_id: int, digest: bytes) -> Outcome:
        """The peer has finished with the request; says how it ended, the same on every call.

        digest: of the blocks that the peer believes it used, compared with those held.
        """
        with self._lock:
            end = self._ends.get(request_id)
            if end is not None:
                if end.outcome is not Outcome.COMPLETED:
                    return end.outcome
                # What another process, or one with other blocks, transferred was not covered by this hold.
                refusal = Outcome.STALE if end.digest != digest else Outcome.FOREIGN
                is_same = end.digest == digest and end.session == self._sessions.get(peer_id)
                return end.outcome if is_same else refusal
            hold = self._holds.get(request_id)
            if hold is None:
                return Outcome.UNKNOWN
            if not self._is_bound_to(request_id, peer_id):
                return Outcome.FOREIGN
            if hold.blocks.digest() != digest:
                return Outcome.STALE
            outcome = Outcome.ABORTED if request_id in self._cancelled else Outcome.COMPLETED
            self._end(request_id, outcome, by_peer=True)
            return outcome

    def cancel(self, request_id: str) -> Outcome | None:
        """The owner gives a request up: None if its peer is connected and must agree first.

        Until that peer completes, aborts or is lost, it may be in the middle of a transfer, so the blocks stay held.
        Whatever it answers, the request ends as aborted.
        """
        with self._lock:
            if request_id not in self._holds:
                return self._outcome(request_id)
            if request_id in self._bound:
                self._cancelled.add(request_id)
                return None
            self._end(request_id, Outcome.ABORTED)
            return Outcome.ABORTED

    def abort(self, request_id: str, peer_id: int) -> Outcome:
        """The peer gives a request up and says that none of its transfers is under way."""
        with self._lock:
            if request_id not in self._holds:
                return self._outcome(request_id)
            if not self._is_bound_to(request_id, peer_id):
                return Outcome.FOREIGN
            self._end(request_id, Outcome.ABORTED, by_peer=True)
            return Outcome.ABORTED

    def expire(self, now_s: float) -> float | None:
        """Ends holds whose peer never came and quarantines that are over; the time at which to call again."""
        with self._lock:
            while self._unclaimed:
                hold = self._unclaimed[0]
                if self._holds.get(hold.request_id) is hold and hold.request_id not in self._bound:
                    if hold.expires_s > now_s:
                        break
                    self._end(hold.request_id, Outcome.UNCLAIMED)
                self._unclaimed.popleft()
            while self._quarantine and self._quarantine[0][0] <= now_s:
                _, hold = self._quarantine.popleft()
                hold.pool.unpin(hold.blocks, release=True)
            times = [self._unclaimed[0].expires_s] if self._unclaimed else []
            times += [self._quarantine[0][0]] if self._quarantine else []
            return min(times, default=None)

    def close(self) -> None:
        """Ends all holds as aborted and refuses new ones.

        Blocks that a peer may still write, and those in quarantine, stay out of their pools for good: nobody is left to
        say when that is over.
        """
        with self._lock:
            self._closed = True
            for request_id in list(self._holds):
                self._end(request_id, Outcome.ABORTED, closing=True)
            self._quarantine.clear()

    def tell(self, answered: str | None = None) -> None:
        """Calls `ended` for holds that have ended since. To be called after whatever may end one.

        answered: a request that its peer ended, and that was answered.
        """
        with self._lock:
            ready = [r for r, untold in self._untold.items() if r == answered or not untold.needs_answer]
            told = [self._untold.pop(request_id) for request_id in ready]
        for untold in told:
            self._ended(untold.hold, untold.outcome)

    @property
    def num_held(self) -> int:
        with self._lock:
            return len(self._holds)

    @property
    def num_quarantined_blocks(self) -> int:
        with self._lock:
            return sum(len(hold.blocks) for _, hold in self._quarantine)

    def outcome(self, request_id: str) -> Outcome | None:
        """How a request ended; None while it is held, and until `tell` has said so."""
        with self._lock:
            is_open = request_id in self._holds or request_id in self._untold
            return None if is_open else self._outcome(request_id)

    def is_peer_of(self, request_id: str, peer_id: int) -> bool:
        """Whether this connection is one of the process that a held request is for."""
        with self._lock:
            return self._is_bound_to(request_id, peer_id)

    # -- with the lock held --------------------------------------------------------------------------------------------

    def _require_new(self, request_id: str) -> None:
        if self._closed:
            raise InputError(
                f"request {request_id!r} cannot be held",
                expected="an open endpoint",
                found="it was closed",
                fix="make another endpoint",
            )
        if not 0 < _num_bytes(request_id) <= MAX_REQUEST_ID_BYTES:
            raise InputError(
                "a request has no usable id",
                expected=f"text of 1 to {MAX_REQUEST_ID_BYTES} bytes",
                found=f"{len(request_id)} characters",
                fix="choose a short unique id",
            )
        if request_id in self._holds or request_id in self._ends:
            end = self._ends.get(request_id)
            raise InputError(
                f"request {request_id!r} exists already",
                expected="an id that no other request of this endpoint has or had",
                found=f"state {'held' if end is None else end.outcome.value}",
                fix="make request ids unique, also over retries",
            )

    def _is_bound_to(self, request_id: str, peer_id: int) -> bool:
        session = self._sessions.get(peer_id)
        return session is not None and self._bound.get(request_id) == session

    def _outcome(self, request_id: str) -> Outcome:
        end = self._ends.get(request_id)
        return Outcome.UNKNOWN if end is None else end.outcome

    def _end(
        self, request_id: str, outcome: Outcome, *, now_s: float = 0.0, by_peer: bool = False, closing: bool = False
    ) -> None:
        hold = self._holds.pop(request_id)
        session = self._bound.pop(request_id, None)
        self._cancelled.discard(request_id)
        self._ends[request_id] = _End(
            outcome=outcome, peer_name=hold.peer_name, session=session, digest=hold.blocks.digest()
        )
        if hold.access is Access.WRITE and outcome is not Outcome.COMPLETED and not by_peer:
            self._revoked.setdefault(hold.peer_name, {})[request_id] = None
        while len(self._ends) > self._config.remembered_requests:
            self._forget(*self._ends.popitem(last=False))
        is_lost_writer = hold.access is Access.WRITE and session is not None and outcome is Outcome.PEER_LOST
        if not (closing and hold.access is Access.WRITE and session is not None):
            self._free(hold, outcome, until_s=now_s + self._config.quarantine_s if is_lost_writer else None)
        self._untold[request_id] = _Untold(hold=hold, outcome=outcome, needs_answer=by_peer)

    def _forget(self, request_id: str, end: _End) -> None:
        revoked = self._revoked.get(end.peer_name)
        if revoked is not None:
            revoked.pop(request_id, None)
            if not revoked:
                del self._revoked[end.peer_name]

    def _free(self, hold: Hold, outcome: Outcome, *, until_s: float | None) -> None:
        if until_s is not None and self._config.quarantine_s > 0:
            self._quarantine.append((until_s, hold))
            return
        # Completed writes stay with the owner: it asked for them in order to use them.
        is_written = hold.access is Access.WRITE and outcome is Outcome.COMPLETED
        hold.pool.unpin(hold.blocks, release=not is_written)


def _num_bytes(text: str) -> int:
    """0 for text that cannot be sent."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return 0
