"""The control plane of transports that have no native one: liveness, leases, notifications, questions.

One thread serves all authenticated sockets, one other delivers events, so that a slow listener stops no heartbeat.

Leases: we send a heartbeat every `heartbeat_s`, and the peer acknowledges it. Our right to touch its memory ends at
(when we sent the last one that it acknowledged) + (its lease), by our clock. It takes us for lost at (when it last
received something of ours) + (its lease), which is later. So memory of a peer that has given us up is never touched.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

from llmsys.comm.bootstrap import Hello, Listener, Session, dial, host_id, job_secret, new_identity
from llmsys.comm.transports.base import EventQueue, Notification, Peer, PeerEvents, TransportConfig
from llmsys.comm.transports.control_connection import (
    Connection,
    Frame,
    FrameKind,
    FrameReader,
    Question,
    has_ended,
)
from llmsys.comm.transports.peer_table import PeerTable, closed_error, lost_error
from llmsys.comm.transports.requests import EventThread
from llmsys.core.errors import (
    DeadlineError,
    LeaseExpiredError,
    LlmsysError,
    TransportError,
)

_RECEIVE_BYTES = 1 << 18
_GOODBYE_S = 1.0
_MAX_BODY_BYTES = 64 << 20


class ControlAdapter(Protocol):
    """What a transport adds to its control plane. None of these may block, except `answer`."""

    def hello_details(self) -> dict[str, bytes | int | str]:
        """What peers need to reach this side's data plane."""

    def peer_added(self, peer: Peer, hello: Hello) -> None:
        """A connection is ready; comes before all else of this peer. An error refuses it."""

    def peer_lost(self, peer: Peer, error: TransportError) -> None:
        """It has gone: requests must end, with this error. Comes once, on any thread."""

    def answer(self, peer: Peer, topic: int, body: bytes) -> bytes:
        """Answers `ask` of the peer. On a thread of the peer's own; an error goes back as text."""


class ControlPlane:
    """One endpoint's peers. Thread safe; nothing here waits for a listener.

    events: runs whatever calls back into the program, and is closed by its owner after this.
    """

    def __init__(
        self,
        *,
        config: TransportConfig,
        protocol: str,
        adapter: ControlAdapter,
        events: EventThread,
        identity: tuple[str, int] | None = None,
        max_message_bytes: int = 1 << 20,
    ) -> None:
        self._config, self._protocol, self._adapter, self._events = config, protocol, adapter, events
        self.max_message_bytes = max_message_bytes
        self._heartbeat_s = config.heartbeat_s or config.lease_s / 4
        self._secret = job_secret(config)
        self._queue = EventQueue()
        self._changed = threading.Condition()
        self._connections: dict[int, Connection] = {}
        self._arrived: list[Connection] = []
        self._closing = False
        self._host_id = host_id()
        self._table = PeerTable(lambda: self.local)
        name, generation = identity or new_identity(config)
        self._listener = Listener(
            host=config.host,
            port=config.port,
            secret=self._secret,
            hello=self._hello,
            accepted=self._accepted,
            admit=self._table.admit,
            failed=self._table.failed,
            start_now=False,
        )
        self.local = Peer(peer_id=0, name=name, generation=generation, address=self._listener.address)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_fd, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name=f"llmsys-{protocol}-control", daemon=True)
        self._thread.start()
        self._listener.start()

    # -- for the program's threads -------------------------------------------------------------------------------------

    def set_events(self, events: PeerEvents) -> None:
        self._queue.set_listener(events)

    def peers(self) -> tuple[Peer, ...]:
        return self._table.alive()

    def connect(self, address: str, *, timeout_s: float | None = None) -> Peer:
        """See `Transport.connect`."""
        timeout_s = self._config.connect_timeout_s if timeout_s is None else timeout_s
        return self._table.connect(address, timeout_s=timeout_s, dial=lambda left_s: self._dial(address, left_s))

    def disconnect(self, peer: Peer) -> None:
        """Says goodbye; does nothing if the peer has gone."""
        with self._changed:
            connection = self._connections.get(peer.peer_id)
        if connection is not None:
            error = lost_error(peer, "it was disconnected here")
            self._lose(connection, error, "disconnected here", left=True, goodbye=True)

    def notify(self, peer: Peer, payload: bytes, done: Callable[[TransportError | None], None]) -> None:
        """Sends a message now; `done` hears, once, that the peer has queued it, or why not. It must not block."""
        with self._changed:
            connection = self._connections.get(peer.peer_id)
            if connection is not None and connection.error is None:
                connection.num_sent += 1
                connection.unacknowledged[connection.num_sent] = done
                self._send(connection, Frame(kind=FrameKind.NOTIFY, number=connection.num_sent, body=payload))
                return
        done(self._gone(peer))

    def ask(self, peer: Peer, topic: int, body: bytes, *, timeout_s: float) -> bytes:
        """What the peer's adapter answers. Blocks; not for the event thread.

        Raises:
            PeerLostError: it went away first. DeadlineError: no answer in time. TransportError: its adapter failed.
        """
        question = Question()
        with self._changed:
            connection = self._connections.get(peer.peer_id)
            if connection is None or connection.error is not None:
                raise self._gone(peer)
            connection.num_questions += 1
            number = connection.num_questions
            connection.questions[number] = question
            self._send(connection, Frame(kind=FrameKind.ASK, number=number, topic=topic, body=body))
        if not question.answered.wait(timeout_s):
            with self._changed:
                connection.questions.pop(number, None)
            raise DeadlineError(
                f"{peer} did not answer in time",
                expected=f"an answer to question {number} (topic {topic}) within {timeout_s:.3g} s",
                found="none, though it is alive",
                fix="raise the timeout, or look at what the process there does",
            )
        if question.error is not None:
            raise question.error
        return question.body

    def check_alive(self, peer: Peer) -> None:
        """Returns if the peer is there and our right to touch its memory holds now.

        Raises:
            PeerLostError: it has gone. LeaseExpiredError: our right has ended, or not begun.
        """
        with self._changed:
            connection = self._connections.get(peer.peer_id)
            if connection is None or connection.error is not None:
                raise self._gone(peer)
            now = time.monotonic()
            if now >= connection.right_until_s:
                raise LeaseExpiredError(
                    f"our lease on {peer} has expired",
                    expected=f"an answer to a heartbeat sent in the last {connection.lease_s:.3g} s",
                    found=f"the last such heartbeat is {now - connection.right_until_s + connection.lease_s:.3g} s old",
                    fix="raise lease_s there if this process or the network may pause for so long",
                )
            ended = has_ended(connection.sock)
        if ended:
            raise lost_error(peer, "it closed its connection")

    def wait_alive(self, peer: Peer) -> None:
        """Blocks until `check_alive` holds; PeerLostError once the peer has gone, which is after its lease at most."""
        with self._changed:
            while True:
                connection = self._connections.get(peer.peer_id)
                if connection is None or connection.error is not None:
                    raise self._gone(peer)
                if time.monotonic() < connection.right_until_s:
                    return
                self._changed.wait(self._config.lease_s)

    def close(self) -> None:
        """Says goodbye to all and ends the thread. Can be called again."""
        with self._changed:
            first, self._closing = not self._closing, True
            connections = list(self._connections.values())
        if not first:
            self._join()
            return
        self._table.close()
        self._listener.close()
        for connection in connections:
            self._lose(connection, closed_error(), "", left=True, goodbye=True, announce=False)
        self._wake()
        self._join()

    def _join(self) -> None:
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _gone(self, peer: Peer) -> TransportError:
        if self._closing:
            return closed_error()
        return lost_error(peer, "it is not connected any more")

    # -- connections ---------------------------------------------------------------------------------------------------

    def _hello(self) -> Hello:
        return Hello(
            protocol=self._protocol,
            name=self.local.name,
            generation=self.local.generation,
            address=self.local.address,
            host_id=self._host_id,
            pid=os.getpid(),
            lease_s=self._config.lease_s,
            details=self._adapter.hello_details(),
        )

    def _dial(self, address: str, timeout_s: float) -> Peer:
        sock, hello, _ = dial(address, secret=self._secret, hello=self._hello(), timeout_s=timeout_s)
        try:
            return self._add(sock, hello)
        except BaseException:
            sock.close()
            raise

    def _accepted(self, sock: socket.socket, hello: Hello, session: Session) -> None:
        self._add(sock, hello)

    def _add(self, sock: socket.socket, hello: Hello) -> Peer:
        """Takes the socket over, unless it raises."""
        peer = self._table.new_peer(hello)
        sock.setblocking(False)
        reader = FrameReader(max(_MAX_BODY_BYTES, self.max_message_bytes))
        connection = Connection(peer, sock, hello.lease_s, reader, time.monotonic())
        self._adapter.peer_added(peer, hello)
        with self._changed:
            is_open = not self._closing
            if is_open:
                self._connections[peer.peer_id] = connection
                self._arrived.append(connection)
                self._events.post(lambda: self._queue.put(lambda events: events.peer_joined(peer)))
                stale = [self._connections.get(other.peer_id) for other in self._table.add(peer)]
        if not is_open:
            self._adapter.peer_lost(peer, closed_error())
            raise closed_error()
        self._wake()
        for other in filter(None, stale):
            reason = "the same endpoint has started again"
            self._lose(other, lost_error(other.peer, reason), reason, left=False)
        return peer

    def _lose(
        self,
        connection: Connection,
        error: TransportError,
        reason: str,
        *,
        left: bool,
        goodbye: bool = False,
        announce: bool = True,
    ) -> None:
        """Ends a connection, once. The control thread closes the socket, after a goodbye if there is to be one."""
        peer = connection.peer
        with self._changed:
            if connection.error is not None:
                return
            connection.close_by_s = time.monotonic() + (_GOODBYE_S if goodbye else 0.0)
            if goodbye:
                connection.out += Frame(kind=FrameKind.BYE).pack()
            # Last, since the control thread closes what has an error and nothing to send.
            connection.error = error
            del self._connections[peer.peer_id]
            self._table.remove(peer)
            waiting = list(connection.unacknowledged.values())
            questions = list(connection.questions.values())
            self._changed.notify_all()
        self._adapter.peer_lost(peer, error)
        for done in waiting:
            done(error)
        for question in questions:
            question.error = error
            question.answered.set()
        if connection.answers is not None:
            connection.answers.close(wait=False)
        if announce:
            self._events.post(lambda: self._queue.put(lambda events: events.peer_lost(peer, reason, left)))
        self._wake()

    # -- the control thread --------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        # Under the lock, since the number may be another file's once the thread has closed it.
        with self._changed:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def _send(self, connection: Connection, frame: Frame) -> None:
        """Queues a frame. With the lock held."""
        connection.out += frame.pack()
        if threading.current_thread() is not self._thread:
            os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        served: list[Connection] = []
        while True:
            before_s = time.monotonic()
            for key, _ in self._selector.select(self._idle_s(served, before_s)):
                if key.data is None:
                    os.eventfd_read(self._wake_fd)
                else:
                    self._receive(key.data)
            with self._changed:
                served += self._arrived
                self._arrived.clear()
            for connection in served:
                self._check_times(connection, before_s)
                self._flush(connection)
            served = [connection for connection in served if not self._is_over(connection)]
            with self._changed:
                if self._closing and not served and not self._connections and not self._arrived:
                    os.close(self._wake_fd)
                    self._wake_fd = -1
                    break
        self._selector.close()

    def _idle_s(self, served: list[Connection], now_s: float) -> float | None:
        times = [
            min(c.next_heartbeat_s, c.heard_s + self._config.lease_s) if c.error is None else c.close_by_s
            for c in served
        ]
        return max(min(times) - now_s, 0.0) + 0.001 if times else None

    def _check_times(self, connection: Connection, before_s: float) -> None:
        """Heartbeats that are due, and silence. What came before `before_s` has been read: a process that was stopped
        for long hears first what its peers had to say meanwhile."""
        if connection.error is not None:
            return
        lease_s = self._config.lease_s
        if before_s >= connection.heard_s + lease_s:
            reason = f"nothing was heard of it for {lease_s:.3g} s"
            self._lose(connection, lost_error(connection.peer, reason), reason, left=False)
            return
        now_s = time.monotonic()
        if now_s >= connection.next_heartbeat_s:
            with self._changed:
                connection.num_heartbeats += 1
                connection.next_heartbeat_s = now_s + self._heartbeat_s
                connection.sent_s[connection.num_heartbeats] = now_s
                self._send(connection, Frame(kind=FrameKind.HEARTBEAT, number=connection.num_heartbeats))

    def _receive(self, connection: Connection) -> None:
        if connection.error is not None:
            return
        try:
            data = connection.sock.recv(_RECEIVE_BYTES)
            connection.heard_s = time.monotonic()
            frames = list(connection.reader.feed(data))
            if not data:
                raise ConnectionError("it closed its connection")
            for frame in frames:
                self._handle(connection, frame)
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            broken = isinstance(error, ValueError) and not isinstance(error, LlmsysError)
            reason = f"it broke the protocol: {error}" if broken else f"its connection ended: {error}"
            self._lose(connection, lost_error(connection.peer, reason), reason, left=False)

    def _handle(self, connection: Connection, frame: Frame) -> None:
        peer, number = connection.peer, frame.number
        if frame.kind is FrameKind.HEARTBEAT:
            with self._changed:
                self._send(connection, Frame(kind=FrameKind.HEARTBEAT_ACK, number=number))
        elif frame.kind is FrameKind.HEARTBEAT_ACK:
            with self._changed:
                sent_s = connection.sent_s.get(number)
                if sent_s is None:
                    raise ValueError(f"an answer to heartbeat {number}, which waits for none")
                connection.right_until_s = sent_s + connection.lease_s
                for old in [n for n in connection.sent_s if n <= number]:
                    del connection.sent_s[old]
                self._changed.notify_all()
        elif frame.kind is FrameKind.BYE:
            self._lose(connection, lost_error(peer, "it said goodbye"), "it said goodbye", left=True)
        elif frame.kind is FrameKind.NOTIFY:
            self._take_notification(connection, frame)
        elif frame.kind is FrameKind.NOTIFY_ACK:
            with self._changed:
                done = connection.unacknowledged.pop(number, None)
            if done is None:
                raise ValueError(f"an answer to notification {number}, which waits for none")
            done(None)
        elif frame.kind is FrameKind.ASK:
            if connection.answers is None:
                connection.answers = EventThread(f"llmsys-{self._protocol}-answers")
            connection.answers.post(lambda: self._answer(connection, frame))
        else:
            self._take_answer(connection, frame)

    def _take_notification(self, connection: Connection, frame: Frame) -> None:
        connection.num_received += 1
        if frame.number != connection.num_received or len(frame.body) > self.max_message_bytes:
            raise ValueError(
                f"notification {frame.number} of {len(frame.body)} bytes, "
                f"where {connection.num_received} of at most {self.max_message_bytes} was next"
            )
        notification = Notification(peer=connection.peer, message_id=frame.number, payload=frame.body)
        self._events.post(lambda: self._queue.put(lambda events: events.notified(notification)))
        with self._changed:
            self._send(connection, Frame(kind=FrameKind.NOTIFY_ACK, number=frame.number))

    def _take_answer(self, connection: Connection, frame: Frame) -> None:
        with self._changed:
            question = connection.questions.pop(frame.number, None)
        if question is None:
            return  # Nobody waited for so long.
        question.body = frame.body
        if frame.kind is FrameKind.FAILURE:
            question.error = TransportError(
                f"{connection.peer} could not answer",
                expected="the answer of its transport",
                found=frame.body.decode("utf-8", "replace"),
                fix="look at the log of the process there",
            )
        question.answered.set()

    def _answer(self, connection: Connection, frame: Frame) -> None:
        try:
            body, kind = self._adapter.answer(connection.peer, frame.topic, frame.body), FrameKind.ANSWER
        except Exception as error:
            body, kind = f"{type(error).__name__}: {error}".encode(), FrameKind.FAILURE
        with self._changed:
            if connection.error is None:
                self._send(connection, Frame(kind=kind, number=frame.number, body=body))

    def _flush(self, connection: Connection) -> None:
        """Sends what the socket takes; asks to be told when it takes more."""
        wanted = selectors.EVENT_READ
        with self._changed:
            try:
                while connection.out:
                    with memoryview(connection.out) as view:
                        num_sent = connection.sock.send(view[:_RECEIVE_BYTES])
                    del connection.out[:num_sent]
            except BlockingIOError:
                # What a lost peer says is not read any more.
                wanted = selectors.EVENT_WRITE | (wanted if connection.error is None else 0)
            except OSError:
                connection.out.clear()  # Reading will tell, after what the peer had sent before.
        if not connection.events:
            self._selector.register(connection.sock, wanted, connection)
        elif connection.events != wanted:
            self._selector.modify(connection.sock, wanted, connection)
        connection.events = wanted

    def _is_over(self, connection: Connection) -> bool:
        """Closes the socket of a lost peer once its goodbye is out, or late."""
        if connection.error is None or (connection.out and time.monotonic() < connection.close_by_s):
            return False
        with self._changed:
            self._selector.unregister(connection.sock)
            connection.sock.close()
        if connection.answers is not None:
            connection.answers.close(wait=False)
        return True
