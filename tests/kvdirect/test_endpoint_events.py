"""What endpoints hear: messages of peers and of programs, good and bad; listeners with mistakes; connecting at once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest

from llmsys.comm.transports.base import Peer, Request, RequestStats
from llmsys.core.errors import InputError, TransportError
from llmsys.kvdirect import messages
from llmsys.kvdirect.config import KvConfig
from llmsys.kvdirect.holds import Access, Outcome
from llmsys.kvdirect.runtime import Listener
from tests.kvdirect.endpoints import WAIT_S, Heard, Job, Worker, run_threads, transfer


def test_bytes_of_the_program(job: Job) -> None:
    prefill, decode, connection = job.pair()
    prefill.heard.wait("joined", "decode")
    for index in range(20):
        decode.endpoint.send(connection.peer, b"%d" % index)
    decode.endpoint.send(connection.peer, b"").wait(WAIT_S)
    prefill.heard.wait("received", "decode", b"")
    assert [payload for _, payload in prefill.heard.of("received")] == [*(b"%d" % i for i in range(20)), b""]
    (peer,) = prefill.endpoint.members()
    assert peer.name == "decode"
    with pytest.raises(InputError):
        decode.endpoint.send(connection.peer, bytes(decode.transport.max_message_bytes))


def test_what_cannot_be_read_is_counted_and_ignored(job: Job) -> None:
    prefill, decode, connection = job.pair()
    garbage = [b"", b"\x00", bytes(1000), messages.encode(messages.Abort(request_id="r"))[:-1]] * 50
    sent = [decode.transport.notify(connection.peer, data) for data in garbage]
    # Messages of this version that nobody expects do nothing either.
    unexpected: list[messages.Message] = [
        messages.TensorsChunk(exchange_id=99, chunk=b"x"),
        messages.Ended(request_id="r", outcome="completed"),
        messages.Complete(request_id="r", digest=b"x"),
        messages.Cancelled(request_id="r"),
        messages.Application(payload=b"end"),
    ]
    sent += [decode.transport.notify(connection.peer, messages.encode(message)) for message in unexpected]
    for request in sent:
        request.wait(WAIT_S)
    prefill.heard.wait("received", "decode", b"end")
    assert prefill.endpoint.num_bad_messages == len(garbage)
    transfer(prefill, decode, "fine", 2, Access.READ, 1)


class Undelivered(Request):
    """A message that its receiver does not take yet."""

    description, stats = "message", RequestStats()

    def __init__(self) -> None:
        self._callbacks: list[Callable[[Request], None]] = []
        self._is_taken = False

    def done(self) -> bool:
        return self._is_taken

    def exception(self) -> Exception | None:
        return None

    def _wait(self, timeout_s: float) -> bool:
        return self._is_taken

    def add_done_callback(self, callback: Callable[[Request], None]) -> None:
        self._callbacks.append(callback)

    def take(self) -> None:
        self._is_taken = True
        for callback in self._callbacks:
            callback(self)


def test_questions_do_not_pile_up_answers(loopback: Job) -> None:
    """A peer that asks for the table again and again, and does not take the answers."""
    prefill, decode, connection = loopback.pair()
    answers: list[Undelivered] = []

    def notify(peer: Peer, payload: bytes) -> Request:
        answers.append(Undelivered())
        return answers[-1]

    prefill.transport.notify = notify
    for index in range(300):
        question = messages.TensorsAsked(exchange_id=1000 + index)
        decode.transport.notify(connection.peer, messages.encode(question))
    decode.endpoint.send(connection.peer, b"end").wait(WAIT_S)
    prefill.heard.wait("received", "decode", b"end")
    assert len(answers) == 1
    # One after the other, as it takes them; what it asked in excess is not answered.
    for answer in answers:
        answer.take()
    assert 1 < len(answers) < 100 and not prefill.endpoint._exchange._answering


class Careless(Heard):
    """Makes every mistake that a listener can."""

    def __init__(self) -> None:
        super().__init__()
        self.worker: Worker | None = None
        self.refused: list[str] = []

    def _add(self, *event: Any) -> None:
        super()._add(*event)
        if self.worker is not None:
            for call in (
                lambda: self.worker.endpoint.connect("loopback:decode"),  # type: ignore[union-attr]
                lambda: self.worker.endpoint.wait_held("r", 60.0),  # type: ignore[union-attr]
            ):
                try:
                    call()
                except InputError as error:
                    self.refused.append(error.summary)
        raise RuntimeError("a mistake of the program")


def test_mistakes_of_a_listener_hurt_nobody(job: Job) -> None:
    careless = Careless()
    prefill = job.worker("prefill", listener=careless, kv=KvConfig(unclaimed_timeout_s=0.1))
    careless.worker = prefill
    decode = job.worker("decode")
    connection = decode.connect(prefill)
    ticket, _, _ = prefill.hold("r", decode, 2)
    decode.endpoint.complete(connection, ticket).wait(WAIT_S)
    assert prefill.endpoint.wait_held("r", WAIT_S) is Outcome.COMPLETED
    # The thread that frees what is not claimed goes on as well.
    for name in ("u", "v"):
        prefill.hold(name, "nobody", 2)
        assert prefill.endpoint.wait_held(name, WAIT_S) is Outcome.UNCLAIMED
    decode.endpoint.close()
    careless.wait("lost", "decode")
    assert prefill.pool.num_free == 32
    assert any("connect was called by a listener" in text for text in careless.refused)
    assert any("wait_held was called by a listener" in text for text in careless.refused)


def test_a_listener_defines_what_it_needs(loopback: Job) -> None:
    class OnlyEnds(Listener):
        def __init__(self) -> None:
            self.ends: queue.Queue[str] = queue.Queue()

        def ended(self, request_id: str, outcome: Outcome) -> None:
            self.ends.put(request_id)

    listener = OnlyEnds()
    prefill, decode = loopback.worker("prefill", listener=listener), loopback.worker("decode")
    transfer(prefill, decode, "r", 1, Access.READ, 1)
    assert listener.ends.get(timeout=WAIT_S) == "r"


def test_threads_that_connect_share_one_connection(job: Job) -> None:
    decode = job.worker("decode")
    prefills = [job.worker(f"prefill {i}") for i in range(3)]
    found: list[tuple[int, Any]] = []
    start = threading.Barrier(12)

    def connect(index: int) -> None:
        start.wait(WAIT_S)
        found.append((index % 3, decode.connect(prefills[index % 3])))

    run_threads([lambda index=index: connect(index) for index in range(12)])  # type: ignore[misc]
    assert len(found) == 12 and len({connection for _, connection in found}) == 3
    assert all(connection.peer.name == f"prefill {index}" for index, connection in found)
    assert all(len(prefill.endpoint.members()) == 1 for prefill in prefills)


def test_two_that_connect_to_each_other(job: Job) -> None:
    workers = [job.worker("a"), job.worker("b")]
    run_threads([lambda: workers[0].connect(workers[1]), lambda: workers[1].connect(workers[0])] * 3)  # type: ignore[list-item]
    for holder, initiator in (workers, workers[::-1]):
        transfer(holder, initiator, "r", 2, Access.READ, 1)


def test_connecting_where_nobody_listens_fails_for_all_who_ask(loopback: Job) -> None:
    gone = loopback.worker("gone")
    address = gone.transport.local.address
    gone.endpoint.close()
    decode = loopback.worker("decode")
    errors: list[TransportError] = []

    def connect() -> None:
        with pytest.raises(TransportError) as caught:
            decode.endpoint.connect(address, timeout_s=WAIT_S)
        errors.append(caught.value)

    run_threads([connect] * 6)
    assert len(errors) == 6
