"""Peers that die, stop, leave or break the protocol: what ends, with which words, and what goes on."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from llmsys import _C
from tests.comm.engines import (
    PATHS,
    TRANSPORTS,
    WAIT_S,
    Link,
    Memory,
    PlayedPeer,
    child_of,
    connect,
    ended,
    linked,
    new_engine,
    new_memory,
    pattern,
    post,
    succeeded,
    tcp_pair,
    wait_event,
)

pytestmark = pytest.mark.native

BLOCK = 1 << 16
NUM_BLOCKS = 256
SIZE = BLOCK * NUM_BLOCKS
BLOCKS = [(i * BLOCK, i * BLOCK, BLOCK) for i in range(NUM_BLOCKS)]
# A batch then takes seconds, and things can be done in the middle of it.
SLOW: dict[str, Any] = {"slice_bytes": BLOCK, "test_slice_delay_us": 20_000, "window": 1}


@pytest.fixture
def engine() -> Iterator[_C.Engine]:
    made = new_engine()
    try:
        yield made
    finally:
        made.close()


def wait_dropped(engine: _C.Engine) -> None:
    """Until it has got a message that it has no peer for."""
    deadline_s = time.monotonic() + WAIT_S
    while engine.stats()["num_dropped_messages"] == 0:
        assert time.monotonic() < deadline_s, "no message has come"
        time.sleep(0.01)


def wait_started(request: _C.Request) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while request.started_ns == 0:
        assert time.monotonic() < deadline_s, "the batch did not start"
        assert not request.wait(0.001)


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
@pytest.mark.parametrize("path", PATHS)
def test_killed_in_the_middle_of_a_batch(path: str, write: bool) -> None:
    engine = new_engine(path, **SLOW)
    other = new_engine(path)
    try:
        healthy, _ = connect(engine, other)
        there, near = new_memory(other, BLOCK), new_memory(engine, BLOCK)
        far = there.imported_by(engine, healthy)
        there.array[:] = 9
        with child_of(engine, path, SIZE) as child:
            local = new_memory(engine, SIZE)
            batch = post(engine, write, child.peer, local, child.remote, BLOCKS, False)
            queued = post(engine, False, child.peer, local, child.remote, BLOCKS, False)
            message = engine.notify(child.peer, b"never sent")
            wait_started(batch)
            child.signal(signal.SIGKILL)
            for request, name in ((batch, "write" if write else "read"), (queued, "read"), (message, "notification")):
                assert ended(request).error_kind() == "lost"
                assert name in str(request.error()) and "peer 'child' failed, the peer is lost: " in str(
                    request.error()
                )
            # Nothing is under way any more that could write here.
            local.array[:] = 0x5A
            _, peer, reason, left = wait_event(engine, "lost")
            assert (peer, left) == (child.peer, False) and reason in str(batch.error())
            state = engine.peer_state(child.peer)
            assert (state["state"], state["reason"], state["num_queued"]) == ("lost", reason, 0)
            assert state["num_outstanding"] == 0
            late = ended(post(engine, False, child.peer, local, child.remote, BLOCKS))
            assert late.error_kind() == "lost" and reason in str(late.error())
            with pytest.raises(RuntimeError, match="peer 'child' is lost: "):
                engine.import_remote(child.peer, other.remote_key(there.region), there.address, 1)
        succeeded(post(engine, False, healthy, near, far, [(0, 0, BLOCK)]))
        assert (near.array == 9).all() and (local.array == 0x5A).all()
        engine.remove_peer(child.peer)
        engine.release(local.region)
    finally:
        engine.close()
        other.close()


@pytest.mark.parametrize("what", ["kill", "remove", "close"])
def test_operations_in_flight_are_drained(what: str) -> None:
    """UCX's reads of a process that does not answer: they end, and none of them writes here afterwards."""
    engine = new_engine("ucx")
    try:
        with child_of(engine, "ucx", SIZE) as child:
            child.signal(signal.SIGSTOP)
            local = np.zeros(SIZE, np.uint8)
            region = engine.register_memory(local.ctypes.data, SIZE)
            memory = Memory(engine, region, local)
            batch = post(engine, False, child.peer, memory, child.remote, BLOCKS, False)
            wait_started(batch)
            assert engine.peer_state(child.peer)["num_outstanding"] > 0
            if what == "kill":
                child.signal(signal.SIGKILL)
            elif what == "remove":
                engine.remove_peer(child.peer)
            else:
                engine.close()
            assert ended(batch).error_kind() == {"kill": "lost", "remove": "cancelled", "close": "closed"}[what]
            local[:] = 0x5A
            if what != "close":
                engine.release(region)
            child.signal(signal.SIGCONT)
            assert not (what == "kill" and wait_event(engine, "lost")[3])
            assert child.process.wait(WAIT_S) < 0 if what == "kill" else child.call("crc32")
            assert (local == 0x5A).all()
    finally:
        engine.close()


@pytest.mark.parametrize("path", ["shm", "cma"])
def test_stopped_process_is_still_read(path: str) -> None:
    """Mapped and CMA memory needs nothing of its owner, as RDMA."""
    engine = new_engine(path)
    try:
        with child_of(engine, path, SIZE, seed=3) as child:
            child.signal(signal.SIGSTOP)
            local = new_memory(engine, SIZE)
            succeeded(post(engine, False, child.peer, local, child.remote, BLOCKS))
            assert np.array_equal(local.array, pattern(SIZE, 3))
            child.signal(signal.SIGCONT)
    finally:
        engine.close()


@pytest.mark.parametrize("path", PATHS)
def test_stopped_beyond_the_lease_both_sides_give_up(path: str) -> None:
    lease_s = 2.0
    engine = new_engine(path, lease_s=lease_s)
    try:
        with child_of(engine, path, SIZE, lease_s=lease_s, **SLOW) as child:
            memory = new_memory(engine, SIZE)
            child.send(
                "read", remote_key=engine.remote_key(memory.region).hex(), address=memory.address, size_bytes=SIZE
            )
            assert child.receive() == {"posted": True}
            child.signal(signal.SIGSTOP)
            stopped_s = time.monotonic()
            _, peer, reason, left = wait_event(engine, "lost")
            assert (peer, left) == (child.peer, False)
            # By this side's lease, or because no heartbeat was answered, whichever came first; both take a lease.
            assert "nothing was heard of it for" in reason or "answered no heartbeat within its lease" in reason
            assert time.monotonic() - stopped_s > lease_s / 2
            # From here on this side may use the memory for something else.
            child.signal(signal.SIGCONT)
            result = child.receive()
            assert result["kind"] == "lost" and result["state"] == "lost", result
            assert "read of 256 entries" in result["error"] and "peer 'parent'" in result["error"]
    finally:
        engine.close()


@pytest.mark.parametrize("path", ["shm", "cma"])
def test_read_that_outlived_its_lease_has_failed(path: str) -> None:
    """All bytes are here, but the peer had given this side up before the last of them: they may be anything."""
    here = new_engine(path, test_slice_delay_us=4_000_000)
    there = new_engine(path, lease_s=2.0)
    try:
        peer, back = connect(here, there, lease_s=2.0)
        local, target = new_memory(here, 4096), new_memory(there, 4096, allocate=path == "shm")
        request = ended(post(here, False, peer, local, target.imported_by(here, peer), [(0, 0, 4096)]))
        assert request.error_kind() == "lost" and "read of 1 entries" in str(request.error())
        assert wait_event(there, "lost")[:2] == ("lost", back)
    finally:
        here.close()
        there.close()


def test_peer_that_closes_has_left(engine: _C.Engine) -> None:
    with child_of(engine, "cma", SIZE) as child:
        assert child.call("close") == {}
        assert wait_event(engine, "lost") == ("lost", child.peer, "it left in good order", True)
        assert engine.peer_state(child.peer)["state"] == "left"
        request = ended(engine.notify(child.peer, b""))
        assert request.error_kind() == "lost" and "it left in good order" in str(request.error())


def test_last_acknowledgement_gets_through_before_the_end(engine: _C.Engine) -> None:
    """The receiver closes as soon as it has the notification; the sender must not take it for undelivered."""
    for _ in range(10):
        other = new_engine()
        try:
            peer, _ = connect(engine, other)
            request = engine.notify(peer, b"last")
            wait_event(other, "notification")
        finally:
            other.close()
        succeeded(request)
        assert wait_event(engine, "lost")[3] is True


def test_notifications_to_another_process_arrive_in_order(engine: _C.Engine) -> None:
    with child_of(engine, "ucx", 4096) as child:
        child.send("notifications", count=5000)
        requests = [engine.notify(child.peer, b"x" * (i % 300)) for i in range(5000)]
        assert child.receive() == {"in_order": True}
        succeeded(requests[-1])
        assert all(r.done() and r.error() is None for r in requests)


def test_removed_peer_ends_its_requests_as_cancelled() -> None:
    with linked("ucx", **SLOW) as link:
        local, target = new_memory(link.here, SIZE), new_memory(link.there, SIZE)
        remote = target.imported_by(link.here, link.peer)
        requests = [link.read(local, remote, BLOCKS, coalesce=False), link.here.notify(link.peer, b"")]
        wait_started(requests[0])
        link.here.remove_peer(link.peer)
        assert [ended(r).error_kind() for r in requests] == ["cancelled", "cancelled"]
        assert "was given up: it was removed" in str(requests[0].error())
        link.here.release(local.region)
        with pytest.raises(ValueError, match="no peer 1"):
            link.here.peer_state(link.peer)
        assert wait_event(link.there, "lost")[3] is True


def test_requests_wait_until_the_peer_answers(engine: _C.Engine) -> None:
    other, friend = new_engine(), new_engine()
    try:
        connect(other, friend)
        played = PlayedPeer(engine, other.worker_address())
        request = engine.notify(played.peer, b"x")
        assert not request.wait(0.3) and engine.peer_state(played.peer)["state"] == "connecting"
        played.answer_heartbeat()
        assert wait_event(engine, "established") == ("established", played.peer)
        # It is sent now. The other engine knows another token than this one, so it is never acknowledged.
        wait_dropped(other)
        assert not request.wait(0.01)
        assert other.stats()["num_dropped_messages"] == 1 and other.next_event(0.0) is None
        played.socket.close()
        assert ended(request).error_kind() == "lost" and "it closed its connection" in str(request.error())
    finally:
        other.close()
        friend.close()


def test_heartbeats_are_answered(engine: _C.Engine) -> None:
    played = PlayedPeer(engine, engine.worker_address())
    kind, sequence = played.receive()
    assert (kind, sequence) == (played.HEARTBEAT, 1)
    played.send(played.HEARTBEAT, 77)
    while (frame := played.receive())[0] != played.ACK:
        assert frame[0] == played.HEARTBEAT
    assert frame == (played.ACK, 77)


def test_silent_peer_is_lost_after_the_lease() -> None:
    engine = new_engine(lease_s=1.0)
    try:
        began_s = time.monotonic()
        played = PlayedPeer(engine, engine.worker_address())
        played.answer_heartbeat()
        wait_event(engine, "established")
        _, peer, reason, left = wait_event(engine, "lost")
        assert (peer, left) == (played.peer, False) and "nothing was heard of it for 1." in reason
        assert time.monotonic() - began_s >= 1.0
    finally:
        engine.close()


def test_lease_is_counted_from_the_heartbeat_that_was_answered() -> None:
    """A peer that talks and does not answer may have taken this side for dead: its memory must not be touched.

    It may itself touch memory here until the lease of this side has passed, and the loss is not told before.
    """
    engine = new_engine(lease_s=3.0)
    try:
        played = PlayedPeer(engine, engine.worker_address(), lease_s=1.0)
        played.answer_heartbeat()
        wait_event(engine, "established")
        last_heard_s = time.monotonic()
        while (event := engine.next_event(0.1)) is None:
            if engine.peer_state(played.peer)["lease_left_s"] > 0.0:
                last_heard_s = time.monotonic()
                with contextlib.suppress(OSError):
                    played.send(played.HEARTBEAT, 1)
        assert event[0] == "lost" and "answered no heartbeat within its lease of 1.000 s" in event[2]
        assert time.monotonic() - last_heard_s >= 2.5
    finally:
        engine.close()


def test_peer_that_ucx_does_not_reach_is_lost_although_it_is_heard_of() -> None:
    engine, other = new_engine("ucx", lease_s=2.0, heartbeat_s=0.1), new_engine("ucx")
    try:
        played = PlayedPeer(engine, other.worker_address())
        played.answer_heartbeat()
        wait_event(engine, "established")
        # The other engine does not know this token and drops it, so UCX gets no acknowledgement.
        request = engine.notify(played.peer, b"x")
        began_s = time.monotonic()
        while (frame := played.receive())[0] == played.HEARTBEAT:
            played.send(played.ACK, frame[1])
        assert "UCX moved nothing for " in wait_event(engine, "lost")[2]
        assert ended(request).error_kind() == "lost" and time.monotonic() - began_s >= 4.0
    finally:
        engine.close()
        other.close()


@pytest.mark.parametrize("more", ["here", "there"])
def test_endpoints_that_only_one_side_has_made_are_made_up_for(more: str) -> None:
    """UCX pairs endpoints of two workers by their number: without it this connection would use the played peer's."""
    here, there = new_engine("ucx"), new_engine("ucx")
    try:
        ahead, behind = (here, there) if more == "here" else (there, here)
        played = PlayedPeer(ahead, behind.worker_address())
        played.answer_heartbeat()
        wait_event(ahead, "established")
        ahead.notify(played.peer, b"unknown")  # so that UCX makes the connection
        wait_dropped(behind)
        link = Link(here, there, *connect(here, there))
        local, target = new_memory(here, SIZE), new_memory(there, SIZE)
        target.array[:] = pattern(SIZE, 1)
        remote = target.imported_by(here, link.peer)
        succeeded(link.read(local, remote, BLOCKS))
        ahead.remove_peer(played.peer)
        local.array[:] = 0
        succeeded(link.read(local, remote, BLOCKS))
        np.testing.assert_array_equal(local.array, target.array)
        succeeded(here.notify(link.peer, b"there"))
        succeeded(there.notify(link.back, b"here"))
        assert here.peer_state(link.peer)["state"] == there.peer_state(link.back)["state"] == "established"
        late = PlayedPeer(ahead, behind.worker_address())
        late.receive()
        assert late.num_endpoints_made == 2
    finally:
        here.close()
        there.close()


def test_peer_that_claims_too_many_endpoints_is_refused(engine: _C.Engine) -> None:
    played = PlayedPeer(engine, engine.worker_address(), num_endpoints=1 << 40)
    _, peer, reason, _ = wait_event(engine, "lost")
    assert peer == played.peer and "says it has made 1099511627776 endpoints" in reason


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET / HTTP/1.1\r\nHost: example\r\n\r\n", "carries something else"),
        (struct.pack("<IHHQQQ", 0x4D4C4C43, 1, PlayedPeer.VERSION, 0, 1, 0), "carries something else"),
        (b"", "it closed its connection"),
    ],
    ids=["text", "another_token", "end"],
)
def test_broken_control_connection_ends_the_peer(engine: _C.Engine, data: bytes, expected: str) -> None:
    played = PlayedPeer(engine, engine.worker_address())
    played.socket.sendall(data)
    if not data:
        played.socket.close()
    _, peer, reason, left = wait_event(engine, "lost")
    assert (peer, left) == (played.peer, False) and expected in reason


def test_engine_says_goodbye(engine: _C.Engine) -> None:
    played = PlayedPeer(engine, engine.worker_address())
    engine.remove_peer(played.peer)
    frames = []
    while (kind := played.receive()[0]) != 0:
        frames.append(kind)
    assert frames[-1] == played.BYE


def test_half_a_frame_is_waited_for(engine: _C.Engine) -> None:
    played = PlayedPeer(engine, engine.worker_address())
    _, sequence = played.receive()
    frame = struct.pack("<IHHQQQ", 0x4D4C4C43, played.ACK, played.VERSION, played.token_in, sequence, 0)
    played.socket.sendall(frame[:7])
    assert engine.next_event(0.2) is None
    played.socket.sendall(frame[7:] + frame[:3])
    assert wait_event(engine, "established") == ("established", played.peer)


@pytest.mark.parametrize("what", ["pid", "nonce", "address"])
def test_probe_of_another_process_is_not_believed(engine: _C.Engine, what: str) -> None:
    """The pid may mean another process here: a container's, or one that was given the number later."""
    with linked("cma") as link:
        pid, address, nonce = link.there.probe()
        probe = {
            "pid": (os.getppid(), address, nonce),
            "nonce": (pid, address, bytes(16)),
            "address": (pid, address + 1, nonce),
        }[what]
        link.here.remove_peer(link.peer)
        wait_event(link.there, "lost")
        mine, theirs = tcp_pair()
        peer = link.here.add_peer("there", mine.detach(), link.there.worker_address(), 1 << 62, 1 << 61, 20.0, probe)
        assert link.here.peer_state(peer)["cma"] is False
        theirs.close()


def test_memory_that_is_gone_fails_the_batch_and_not_the_peer() -> None:
    """A peer that unmaps half of what it has registered: its fault, and no more than an error here."""
    size = 8 * mmap.PAGESIZE
    with linked("cma") as link:
        local = new_memory(link.here, size)
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE)
        address = int(np.frombuffer(pages, np.uint8).ctypes.data)
        region = link.there.register_memory(address, size)
        remote = link.here.import_remote(link.peer, link.there.remote_key(region), address, size)
        succeeded(link.read(local, remote, [(0, 0, size)]))
        pages.resize(size // 2)
        request = ended(link.read(local, remote, [(0, 0, size)]))
        assert request.error_kind() == "transport"
        assert "process_vm_readv of 32768 bytes: Bad address" in str(request.error())
        succeeded(link.read(local, remote, [(0, 0, size // 2)]))
        succeeded(link.here.notify(link.peer, b"still there"))


def test_fast_paths_can_be_forbidden() -> None:
    here = _C.Engine(new_engine().info()["library"], shm=False, cma=False, ucx_config=TRANSPORTS)
    with linked("shm") as link:
        peer, _ = connect(here, link.there)
        memory = new_memory(link.there, 4096)
        assert here.remote_path(memory.imported_by(here, peer)) == "ucx"
    here.close()
