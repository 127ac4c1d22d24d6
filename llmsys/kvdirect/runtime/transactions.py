"""What this side knows of the requests it transfers (the paper's transaction queue is the transport's, one per peer).

A ticket is good for one use. Its transaction says what was posted, and why nothing more may be: because the request was
completed or given up here, or taken back by its holder.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from llmsys.comm.transports.base import Peer, Request
from llmsys.core.errors import InputError, LeaseExpiredError, PeerLostError

from ..holds import Outcome
from ..tickets import Ticket
from .completion import fail, succeed

Key = tuple[str, int, str]
"""Holder, its generation, request."""

COMPLETED, ABORTED, TAKEN_BACK = "it was completed", "it was aborted", "its holder has taken it back"


@dataclass(slots=True, eq=False)
class Transaction:
    """One request of one holder. `lock` is held while transfers are posted, so that an end comes after all of them.

    transfers: all that were posted, until the holder has acknowledged. ended: why no more may be; empty while they may.
    answer: the holder's, awaited or failed. outcome: what it said.
    """

    key: Key
    lock: threading.Lock = field(default_factory=threading.Lock)
    transfers: list[Request] = field(default_factory=list)
    ended: str = ""
    answer: Future[Outcome] | None = None
    outcome: Outcome | None = None

    def post(self, move: Callable[[], Request]) -> Request:
        """Posts a transfer.

        Raises:
            LeaseExpiredError: the holder took the request back. InputError: it was completed or aborted.
        """
        with self.lock:
            if self.ended:
                raise self._is_over()
            request = move()
            self.transfers.append(request)
            return request

    def end(self, reason: str) -> tuple[Request, ...]:
        """No more transfers from now on; those that were posted."""
        with self.lock:
            self.ended = self.ended or reason
            return tuple(self.transfers)

    def answered(self, outcome: Outcome) -> None:
        """Only what failed needs to be remembered."""
        with self.lock:
            self.outcome, self.answer = outcome, None
            self.transfers = [request for request in self.transfers if request.exception() is not None]

    def _is_over(self) -> InputError | LeaseExpiredError:
        holder, _, request_id = self.key
        if self.ended == TAKEN_BACK:
            return LeaseExpiredError(
                f"{holder} no longer holds the blocks of request {request_id!r}",
                expected="a request that its holder has not cancelled or given up",
                found=self.ended,
                fix="discard what was transferred and ask for the request again",
            )
        return InputError(
            f"request {request_id!r} of {holder} is over",
            expected="transfers before the ticket's one completion",
            found=self.ended,
            fix="ask the holder for a new request",
        )


class TransactionTable:
    """The transactions of an endpoint. Thread safe. Of those that are over it remembers the last `num_remembered`."""

    def __init__(self, num_remembered: int) -> None:
        self._num_remembered = num_remembered
        self._lock = threading.Lock()
        self._open: dict[Key, Transaction] = {}
        self._over: OrderedDict[Key, Transaction] = OrderedDict()
        self._expected: dict[tuple[int, str], Future[Outcome]] = {}
        self._closed = False

    def of(self, ticket: Ticket) -> Transaction:
        key = (ticket.holder, ticket.generation, ticket.request_id)
        with self._lock:
            return self._over.get(key) or self._open.setdefault(key, Transaction(key))

    def take_back(self, peer: Peer, request_id: str) -> tuple[Request, ...]:
        """The holder takes a request back, also one that is not known here so far. Its transfers under way."""
        key = (peer.name, peer.generation, request_id)
        with self._lock:
            transaction = self._over.get(key) or self._open.get(key) or Transaction(key)
        transfers = transaction.end(TAKEN_BACK)
        self._retire(transaction)
        return transfers

    def expect(self, transaction: Transaction, peer: Peer, reason: str) -> tuple[Future[Outcome], bool]:
        """Ends a transaction. The holder's answer, which will come over this connection, and whether it is to be asked.

        It is not when it has been asked already and has not failed to answer.
        """
        transaction.end(reason)
        with transaction.lock:
            answer = transaction.answer
            if transaction.outcome is not None:
                answer = Future()
                answer.set_result(transaction.outcome)
            if answer is not None and not (answer.done() and answer.exception()):
                return answer, False
            answer = transaction.answer = Future()
            answer.set_running_or_notify_cancel()  # from now on nobody can cancel it for others who wait
        key = (peer.peer_id, transaction.key[2])
        with self._lock:
            self._expected[key] = answer
            is_closed = self._closed
        answer.add_done_callback(lambda ended: self._settled(key, transaction, ended))
        if is_closed:
            fail(answer, _no_answer(key[1], "this endpoint was closed"))
        return answer, True

    def answered(self, peer: Peer, request_id: str, outcome: Outcome) -> None:
        with self._lock:
            answer = self._expected.get((peer.peer_id, request_id))
        if answer is not None:
            succeed(answer, outcome)

    def lost(self, peer: Peer, reason: str) -> None:
        """No answer will come over this connection, and no transfer is under way on it any more."""
        process = (peer.name, peer.generation)
        with self._lock:
            expected = [(key, answer) for key, answer in self._expected.items() if key[0] == peer.peer_id]
            of_process = [transaction for key, transaction in self._open.items() if key[:2] == process]
        for (_, request_id), answer in expected:
            fail(answer, _no_answer(request_id, f"{peer} was lost: {reason}"))
        for transaction in of_process:
            self._retire(transaction)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            expected = list(self._expected.items())
        for (_, request_id), answer in expected:
            fail(answer, _no_answer(request_id, "this endpoint was closed"))

    def _settled(self, key: tuple[int, str], transaction: Transaction, ended: Future[Outcome]) -> None:
        with self._lock:
            if self._expected.get(key) is ended:
                del self._expected[key]
        if ended.exception() is None:
            transaction.answered(ended.result())
        self._retire(transaction)

    def _retire(self, transaction: Transaction) -> None:
        with self._lock:
            self._open.pop(transaction.key, None)
            self._over[transaction.key] = transaction
            while len(self._over) > self._num_remembered:
                self._over.popitem(last=False)


def _no_answer(request_id: str, reason: str) -> PeerLostError:
    return PeerLostError(
        f"no answer will come for request {request_id!r}",
        expected="the holder's acknowledgement",
        found=reason,
        fix="discard what was transferred; or connect again and repeat the completion, which tells how it ended",
    )
