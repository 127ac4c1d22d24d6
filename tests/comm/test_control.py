"""The Python control plane against a peer that speaks its frames by hand: leases, order, and broken streams."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from llmsys.comm.bootstrap import Hello, RefusedError, dial
from llmsys.comm.transports.base import Peer, TransportConfig
from llmsys.comm.transports.control import ControlPlane
from llmsys.comm.transports.control_connection import Frame, FrameKind, FrameReader
from llmsys.comm.transports.peer_table import PeerTable
from llmsys.comm.transports.requests import EventThread
from llmsys.core.errors import DeadlineError, LeaseExpiredError, PeerLostError, TransportError
from tests.comm.endpoint import SECRET, WAIT_S, Recorder


class Adapter:
    def __init__(self) -> None:
        self.lost: list[tuple[Peer, TransportError]] = []
        self.go_on = threading.Event()

    def hello_details(self) -> dict[str, bytes | int | str]:
        return {"number": 7}

    def peer_added(self, peer: Peer, hello: Hello) -> None:
        if hello.details.get("refuse"):
            raise ValueError("not this one")

    def peer_lost(self, peer: Peer, error: TransportError) -> None:
        self.lost.append((peer, error))

    def answer(self, peer: Peer, topic: int, body: bytes) -> bytes:
        if topic == 1:
            return body[::-1]
        if topic == 2:
            self.go_on.wait(WAIT_S)
        raise ValueError("no such topic")


class Plane:
    def __init__(self, name: str = "plane", lease_s: float = 30.0) -> None:
        self.adapter, self.events, self.thread = Adapter(), Recorder(), EventThread("events")
        self.control = ControlPlane(
            config=TransportConfig(secret=SECRET, name=name, lease_s=lease_s, heartbeat_s=0.05),
            protocol="test",
            adapter=self.adapter,
            events=self.thread,
        )
        self.control.set_events(self.events)

    def close(self) -> None:
        self.adapter.go_on.set()
        self.control.close()
        self.thread.close()


class Hand:
    """A peer whose frames the test writes; heartbeats are answered unless `mute`."""

    def __init__(self, plane: Plane, **hello: object) -> None:
        values: dict[str, object] = {
            "protocol": "test",
            "name": "hand",
            "generation": 1,
            "address": "",
            "host_id": "h",
            "pid": 1,
            "lease_s": 30.0,
        }
        self.sock, self.hello, _ = dial(
            plane.control.local.address,
            secret=SECRET.encode(),
            hello=Hello(**(values | hello)),  # type: ignore[arg-type]
            timeout_s=WAIT_S,
        )
        who = (values | hello)["generation"]
        plane.events.wait(lambda: any(p.generation == who for p in plane.events.joined), "joined peer")
        self.peer = next(p for p in plane.events.joined if p.generation == who)
        self.writing = threading.Lock()
        self.mute = False
        self.frames: list[Frame] = []
        self.changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def send(self, *frames: Frame | bytes) -> None:
        with self.writing:
            self.sock.sendall(b"".join(frame if isinstance(frame, bytes) else frame.pack() for frame in frames))

    def _read(self) -> None:
        reader = FrameReader(1 << 30)
        while True:
            try:
                data = self.sock.recv(1 << 16)
            except OSError:
                return
            if not data:
                return
            for frame in reader.feed(data):
                if frame.kind is FrameKind.HEARTBEAT and not self.mute:
                    with contextlib.suppress(OSError):  # It may have had enough of us.
                        self.send(Frame(kind=FrameKind.HEARTBEAT_ACK, number=frame.number))
                with self.changed:
                    self.frames.append(frame)
                    self.changed.notify_all()

    def wait(self, kind: FrameKind, number: int) -> Frame:
        def found() -> list[Frame]:
            return [frame for frame in self.frames if (frame.kind, frame.number) == (kind, number)]

        with self.changed:
            assert self.changed.wait_for(found, WAIT_S), f"no {kind.name} {number}"
            return found()[0]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(WAIT_S)
        self.sock.close()


@pytest.fixture
def plane() -> Iterator[Plane]:
    made = Plane()
    yield made
    made.close()


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_heartbeats_are_sent_and_answered(plane: Plane) -> None:
    hand = Hand(plane)
    assert hand.hello.details == {"number": 7}
    hand.send(Frame(kind=FrameKind.HEARTBEAT, number=5))
    hand.wait(FrameKind.HEARTBEAT_ACK, 5)
    for number in (1, 2, 3):
        hand.wait(FrameKind.HEARTBEAT, number)
    hand.close()


def test_our_right_needs_answers_and_counts_from_when_the_answered_one_was_sent(plane: Plane) -> None:
    """The peer goes on sending, so it is not lost; but it has stopped to answer, so it may take us for lost."""
    hand = Hand(plane, lease_s=0.4)
    plane.control.wait_alive(hand.peer)
    plane.control.check_alive(hand.peer)
    hand.mute = True
    answered_s = time.monotonic()

    def expired() -> bool:
        hand.send(Frame(kind=FrameKind.HEARTBEAT, number=1))
        try:
            plane.control.check_alive(hand.peer)
        except LeaseExpiredError as error:
            assert "hand" in str(error) and "0.4 s" in error.expected
            return True
        return False

    wait_until(expired)
    # At most the lease after the last answer, since that was to a heartbeat sent before.
    assert time.monotonic() - answered_s < 0.4 + 5 and plane.control.peers() == (hand.peer,)
    hand.mute = False
    plane.control.wait_alive(hand.peer)
    plane.control.check_alive(hand.peer)
    hand.close()


def test_waiting_for_a_right_ends_when_the_peer_goes() -> None:
    plane = Plane()
    hand = Hand(plane, lease_s=0.01)
    hand.mute = True
    ended: list[Exception] = []

    def wait() -> None:
        try:
            while True:
                plane.control.wait_alive(hand.peer)
                time.sleep(0.01)
        except PeerLostError as error:
            ended.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    hand.close()
    thread.join(WAIT_S)
    assert len(ended) == 1 and "hand" in str(ended[0])
    plane.close()


def test_silence_beyond_the_lease_is_loss() -> None:
    plane = Plane(lease_s=0.3)
    hand = Hand(plane)
    hand.mute = True
    reason, left = plane.events.wait_lost(hand.peer)
    assert "0.3 s" in reason and not left
    assert [peer for peer, _ in plane.adapter.lost] == [hand.peer]
    hand.close()
    plane.close()


BROKEN: list[list[Frame | bytes]] = [
    [b"\0" * 100],
    [b"LCTL" + b"\xff" * 40],
    [Frame(kind=FrameKind.HEARTBEAT_ACK, number=1 << 40)],
    [Frame(kind=FrameKind.NOTIFY_ACK, number=1)],
    [Frame(kind=FrameKind.NOTIFY, number=2, body=b"the first is missing")],
    [Frame(kind=FrameKind.NOTIFY, number=1, body=bytes((1 << 20) + 1))],
    [Frame(kind=FrameKind.NOTIFY, number=1), Frame(kind=FrameKind.NOTIFY, number=1)],
]


@pytest.mark.parametrize("frames", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_stream_loses_that_peer_only(frames: list[Frame | bytes], plane: Plane) -> None:
    good, bad = Hand(plane), Hand(plane, name="bad", generation=2)
    bad.send(*frames)
    reason, left = plane.events.wait_lost(bad.peer)
    assert "protocol" in reason and not left
    assert len(plane.events.notifications) <= 1
    good.send(Frame(kind=FrameKind.HEARTBEAT, number=1))
    good.wait(FrameKind.HEARTBEAT_ACK, 1)
    assert [peer.name for peer in plane.control.peers()] == ["hand"]
    good.close()
    bad.close()


def test_notifications_in_pieces_and_both_ways(plane: Plane) -> None:
    hand = Hand(plane)
    hand.mute = True  # An answer to a heartbeat would come between the pieces.
    data = b"".join(Frame(kind=FrameKind.NOTIFY, number=n, body=b"%d" % n * n).pack() for n in range(1, 40))
    for begin in range(0, len(data), 7):
        hand.send(data[begin : begin + 7])
    plane.events.wait(lambda: len(plane.events.notifications) == 39, "39 notifications")
    assert [n.payload for n in plane.events.notifications] == [b"%d" % n * n for n in range(1, 40)]
    hand.wait(FrameKind.NOTIFY_ACK, 39)
    done: list[object] = []
    plane.control.notify(hand.peer, b"hello", done.append)
    assert hand.wait(FrameKind.NOTIFY, 1).body == b"hello" and not done
    hand.send(Frame(kind=FrameKind.NOTIFY_ACK, number=1))
    wait_until(lambda: done == [None])
    plane.control.notify(hand.peer, b"unanswered", done.append)
    hand.close()
    wait_until(lambda: len(done) == 2)
    assert isinstance(done[1], PeerLostError)


def test_questions(plane: Plane) -> None:
    other = Plane("other")
    peer = plane.control.connect(other.control.local.address, timeout_s=WAIT_S)
    body = bytes(range(256)) * 20_000
    assert plane.control.ask(peer, 1, body, timeout_s=WAIT_S) == body[::-1]
    with pytest.raises(TransportError, match="other") as caught:
        plane.control.ask(peer, 3, b"", timeout_s=WAIT_S)
    assert "no such topic" in caught.value.found
    with pytest.raises(DeadlineError, match="other"):
        plane.control.ask(peer, 2, b"", timeout_s=0.1)
    failed: list[Exception] = []

    def ask() -> None:
        try:
            plane.control.ask(peer, 2, b"", timeout_s=WAIT_S)
        except PeerLostError as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    other.control.close()
    thread.join(WAIT_S)
    assert len(failed) == 1
    other.close()
    with pytest.raises(PeerLostError):
        plane.control.ask(peer, 1, b"", timeout_s=WAIT_S)


def test_a_peer_that_the_adapter_refuses_is_no_peer(plane: Plane) -> None:
    sock, _, _ = dial(
        plane.control.local.address,
        secret=SECRET.encode(),
        hello=replace(make_hello("hand"), details={"refuse": 1}),
        timeout_s=WAIT_S,
    )
    with sock:
        assert sock.recv(1) == b""
    assert plane.control.peers() == () and not plane.events.joined and not plane.adapter.lost
    # The place it had is free again.
    Hand(plane, address="127.0.0.1:9").close()


def test_a_new_start_replaces_the_old_one_at_once(plane: Plane) -> None:
    old = Hand(plane, address="127.0.0.1:1")
    new = Hand(plane, address="127.0.0.1:1", generation=2)
    assert "started again" in plane.events.wait_lost(old.peer)[0]
    plane.events.wait(lambda: len(plane.events.joined) == 2, "second peer")
    assert [peer.generation for peer in plane.control.peers()] == [2]
    old.close()
    new.close()


def make_hello(name: str, generation: int = 1, address: str = "127.0.0.1:9") -> Hello:
    return Hello(protocol="test", name=name, generation=generation, address=address, host_id="h", pid=1, lease_s=1.0)


def test_who_is_let_in() -> None:
    own = Peer(peer_id=0, name="b", generation=5, address="127.0.0.1:5")
    table = PeerTable(lambda: own)
    table.admit(make_hello("a"))
    with pytest.raises(RefusedError) as caught:
        table.admit(make_hello("a"))
    assert caught.value.reason == "connected 127.0.0.1:5"
    table.failed(ValueError(), make_hello("a"))
    table.admit(make_hello("a"))
    peer = table.new_peer(make_hello("a"))
    assert table.add(peer) == () and table.alive() == (peer,) and peer in table
    assert table.connect("127.0.0.1:9", timeout_s=1, dial=lambda left_s: pytest.fail("dialled")) == peer
    with pytest.raises(RefusedError):
        table.admit(make_hello("a"))
    assert table.remove(peer) and not table.remove(peer)
    with pytest.raises(RefusedError, match="refused"):
        table.admit(make_hello("b", 5))


@pytest.mark.parametrize(("name", "is_let_in"), [("a", True), ("c", False)])
def test_of_two_that_dial_each_other_the_smaller_name_wins(name: str, is_let_in: bool) -> None:
    table = PeerTable(lambda: Peer(peer_id=0, name="b", generation=5, address="127.0.0.1:5"))

    def dial_and_be_dialled(left_s: float) -> Peer:
        try:
            table.admit(make_hello(name))
            assert is_let_in
        except RefusedError as error:
            assert error.reason.startswith("connecting") and not is_let_in
        peer = table.new_peer(make_hello(name))
        table.add(peer)
        return peer

    assert table.connect("127.0.0.1:9", timeout_s=WAIT_S, dial=dial_and_be_dialled).name == name


def test_a_refused_dial_waits_for_the_connection_of_the_other_side() -> None:
    table = PeerTable(lambda: Peer(peer_id=0, name="b", generation=5, address="127.0.0.1:5"))
    arrived = table.new_peer(make_hello("a"))

    def refused(left_s: float) -> Peer:
        threading.Timer(0.05, lambda: table.add(arrived)).start()
        raise RefusedError("r", reason="connecting 127.0.0.1:9", expected="e", found="f", fix="x")

    assert table.connect("localhost:9", timeout_s=WAIT_S, dial=refused) == arrived


def test_waiting_for_a_connection_has_a_deadline_and_ends_with_close() -> None:
    table = PeerTable(lambda: Peer(peer_id=0, name="b", generation=5, address="127.0.0.1:5"))
    table.admit(make_hello("a"))
    with pytest.raises(DeadlineError, match=r"127\.0\.0\.1:9"):
        table.connect("127.0.0.1:9", timeout_s=0.1, dial=lambda left_s: pytest.fail("dialled"))
    threading.Timer(0.05, table.close).start()
    with pytest.raises(TransportError, match="closed"):
        table.connect("127.0.0.1:9", timeout_s=WAIT_S, dial=lambda left_s: pytest.fail("dialled"))
