"""The end of a request as the side that transfers sees it, and the futures and callbacks behind it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any, TypeVar

from llmsys.comm.transports.base import Peer, Request
from llmsys.core.errors import DeadlineError, LeaseExpiredError, TransportError

from ..holds import Outcome
from ..tickets import Ticket

T = TypeVar("T")
_OVER = (Outcome.PEER_LOST, Outcome.UNCLAIMED, Outcome.ABORTED, Outcome.UNKNOWN)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion:
    """The end of a request: done when the holder has answered. Poll, wait for, or await it; from any thread.

    aborts: it was given up, so that any end is a good one.
    """

    ticket: Ticket
    peer: Peer
    transfers: tuple[Request, ...]
    answer: Future[Outcome]
    aborts: bool = False

    def done(self) -> bool:
        return self.answer.done()

    def wait(self, timeout_s: float) -> None:
        """Blocks until the holder has acknowledged: then the data were held during the whole transfer.

        Not for the transport's event thread, which brings the answer.

        Raises:
            DeadlineError: no answer yet. PeerLostError: the holder is lost.
            LeaseExpiredError: the holder had given the blocks up; what was read must not be used.
            TransportError: a transfer failed, or the holder refused.
        """
        with contextlib.suppress(TimeoutError):
            self._check(self.answer.result(timeout_s))
            return
        if self.answer.done():  # by an error that is a deadline itself, or just now
            self._check(self.answer.result())
            return
        raise DeadlineError(
            f"{self.peer} did not acknowledge that request {self.ticket.request_id!r} is over",
            expected=f"an answer within {timeout_s} s",
            found=f"{sum(t.done() for t in self.transfers)} of {len(self.transfers)} transfers done, no answer",
            fix="wait again with a longer timeout_s, or look at the holder",
        )

    def __await__(self) -> Generator[Any, None, None]:
        # Not asyncio.wrap_future: cancelling one task that waits would cancel the answer for all others.
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[None] = loop.create_future()

        def resolve() -> None:
            if not answered.done():
                answered.set_result(None)

        def hand_over(_: Future[Outcome]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(resolve)

        self.answer.add_done_callback(hand_over)
        yield from answered.__await__()
        self._check(self.answer.result())

    def _check(self, outcome: Outcome) -> None:
        if self.aborts:
            if outcome in (*_OVER, Outcome.COMPLETED):
                return
        else:
            for transfer in self.transfers:
                if error := transfer.exception():
                    raise error
            if outcome is Outcome.COMPLETED:
                return
        text = {
            "expected": "blocks held until the completion",
            "found": f"outcome {outcome.value!r} at the holder",
        }
        if outcome in _OVER:
            raise LeaseExpiredError(
                f"{self.peer} no longer held the blocks of request {self.ticket.request_id!r}",
                fix="discard what was transferred and ask for the request again; longer leases make this rarer",
                **text,
            )
        raise TransportError(
            f"{self.peer} refused the completion of request {self.ticket.request_id!r}",
            fix="complete a request with the ticket its holder made, over the connection of the peer it is for",
            **text,
        )


def fail(future: Future[T], error: Exception | None) -> None:
    """Ends a future with an error, unless there is none or it has ended already."""
    if error is not None:
        with contextlib.suppress(InvalidStateError):
            future.set_exception(error)


def succeed(future: Future[T], result: T) -> None:
    """Ends a future, unless it has ended already."""
    with contextlib.suppress(InvalidStateError):
        future.set_result(result)


def when_all(requests: Sequence[Request], callback: Callable[[Exception | None], None]) -> None:
    """Calls `callback` once, when all requests have ended, with the first error among them; here if there are none."""
    lock = threading.Lock()
    left = len(requests)

    def one_ended(_: Request) -> None:
        nonlocal left
        with lock:
            left -= 1
            if left:
                return
        callback(next((error for request in requests if (error := request.exception())), None))

    if not requests:
        callback(None)
    for request in requests:
        request.add_done_callback(one_ended)
