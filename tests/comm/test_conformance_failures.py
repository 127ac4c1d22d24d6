"""The contract of `transports/base.py` where peers die, stop, leave, come back, or are not who they should be."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llmsys.comm.transports.base import Peer, RemoteRegion, Request
from llmsys.core.errors import (
    AuthenticationError,
    DeadlineError,
    InputError,
    LeaseExpiredError,
    PeerLostError,
    TransportError,
)
from tests.comm.conftest import copies, import_exported, pattern
from tests.comm.endpoint import WAIT_S, Endpoint, Recorder, Target, make_transport, outcome, running_target

LEASE_S = 1.5
BIG_BYTES = 16 << 20


@pytest.fixture
def here(transport_name: str) -> Iterator[Endpoint]:
    endpoint = Endpoint(transport_name, {"name": "here", "lease_s": LEASE_S})
    yield endpoint
    endpoint.close()


@pytest.fixture
def target(transport_name: str) -> Iterator[Target]:
    """For tests that end it."""
    with running_target(transport_name, name="target", lease_s=LEASE_S) as running:
        yield running


@pytest.fixture(scope="module")
def lasting(transport_name: str) -> Iterator[Target]:
    """A target for all tests that leave it alive; endpoints come and go."""
    with running_target(transport_name, name="lasting", lease_s=LEASE_S) as running:
        yield running


def back_of(here: Endpoint, target: Target) -> int:
    """The target's number for us."""
    number: int = target.call("peer_of", generation=here.transport.local.generation)
    return number


def connected(here: Endpoint, target: Target, size_bytes: int = 1 << 20) -> tuple[Peer, RemoteRegion]:
    peer = here.transport.connect(target.call("address"), timeout_s=WAIT_S)
    exported = target.call("new_region", size_bytes=size_bytes, seed=1)
    return peer, import_exported(here.transport, peer, exported)


def post_reads(here: Endpoint, peer: Peer, remote: RemoteRegion, times: int) -> list[Request]:
    region, _ = here.regions[here.new_region(size_bytes=remote.size_bytes)["region_id"]]
    batch = [copies(region, remote, (0, 0, remote.size_bytes))]
    return [here.transport.read(peer, batch) for _ in range(times)]


def check_works(here: Endpoint, peer: Peer, remote: RemoteRegion) -> None:
    region, memory = here.regions[here.new_region(size_bytes=remote.size_bytes)["region_id"]]
    here.transport.read(peer, [copies(region, remote, (0, 0, remote.size_bytes))]).wait(WAIT_S)
    np.testing.assert_array_equal(memory, pattern(remote.size_bytes, 1))


def check_gone(here: Endpoint, peer: Peer, remote: RemoteRegion) -> None:
    """Nothing can be asked of a lost peer, and the error says who it was."""
    assert peer not in here.transport.peers()
    region, _ = here.regions[here.new_region(size_bytes=remote.size_bytes)["region_id"]]
    for operation in (
        lambda: here.transport.read(peer, [copies(region, remote, (0, 0, 1))]),
        lambda: here.transport.write(peer, [copies(region, remote, (0, 0, 1))]),
        lambda: here.transport.notify(peer, b"x"),
    ):
        with pytest.raises(PeerLostError, match=peer.name):
            operation().wait(WAIT_S)
    here.transport.forget_region(remote)
    here.transport.disconnect(peer)


# -- connecting --------------------------------------------------------------------------------------------------------


def test_another_secret(transport_name: str, here: Endpoint) -> None:
    with contextlib.ExitStack() as stack:
        if here.transport.capabilities.shares_process:
            stranger = stack.enter_context(make_transport(transport_name, secret="of another job"))
            address = stranger.local.address
        else:
            address = stack.enter_context(running_target(transport_name, secret="of another job")).call("address")
        with pytest.raises(AuthenticationError) as caught:
            here.transport.connect(address, timeout_s=WAIT_S)
        assert "of another job" not in str(caught.value) and "LLMSYS_JOB_SECRET" in str(caught.value)
        assert not here.transport.peers()


def test_itself(here: Endpoint) -> None:
    with pytest.raises((InputError, TransportError)):
        here.transport.connect(here.address(), timeout_s=5)
    assert not here.transport.peers()


def only_sockets(transport_name: str) -> None:
    if transport_name == "loopback":
        pytest.skip("loopback has no sockets")


def test_strangers_that_are_dialled(transport_name: str, here: Endpoint) -> None:
    only_sockets(transport_name)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        address = f"127.0.0.1:{stranger.getsockname()[1]}"
        with pytest.raises(DeadlineError, match=address):
            here.transport.connect(address, timeout_s=0.3)

        def talk() -> None:
            for _ in range(2):  # The first is the one above, still waiting to be taken.
                sock, _ = stranger.accept()
                with sock, contextlib.suppress(OSError):
                    sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)

        thread = threading.Thread(target=talk)
        thread.start()
        with pytest.raises(TransportError, match=address):
            here.transport.connect(address, timeout_s=WAIT_S)
        thread.join(WAIT_S)


def test_another_transport(transport_name: str, here: Endpoint) -> None:
    only_sockets(transport_name)
    other = "asking" if transport_name != "asking" else "ucx"
    try:
        stranger = make_transport(other)
    except Exception as error:
        pytest.skip(f"needs a second transport, and {other} cannot be used: {error}")
    with stranger, pytest.raises(TransportError) as caught:
        here.transport.connect(stranger.local.address, timeout_s=WAIT_S)
    assert repr(other) in str(caught.value) and repr(transport_name) in str(caught.value)


def test_strangers_that_dial(transport_name: str, here: Endpoint, lasting: Target) -> None:
    only_sockets(transport_name)
    host, _, port = here.address().rpartition(":")
    with contextlib.ExitStack() as stack:
        for data in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(100_000), b"LLMS" + b"\xff" * 100):
            sock = stack.enter_context(socket.create_connection((host, int(port)), timeout=WAIT_S))
            with contextlib.suppress(OSError):
                sock.sendall(data)
        lasting.call("connect", address=here.address())
        here.events.wait(lambda: here.events.joined, "joined peer")
    assert [peer.name for peer in here.transport.peers()] == ["lasting"]


def test_both_sides_connect_at_once(here: Endpoint, lasting: Target) -> None:
    address = lasting.call("address")
    for _attempt in range(5):
        other = threading.Thread(target=lambda: lasting.call("connect", address=here.address()))
        other.start()
        peer = here.transport.connect(address, timeout_s=WAIT_S)
        other.join(WAIT_S)
        assert not other.is_alive()
        back = back_of(here, lasting)
        assert here.transport.peers() == (peer,)
        here.transport.notify(peer, b"there").wait(WAIT_S)
        assert [tuple(n) for n in lasting.call("notifications", peer_id=back, count=1)] == [(1, b"there")]
        here.transport.disconnect(peer)
        assert lasting.call("lost", peer_id=back)[1] is True
        assert lasting.call("peers_of", generation=here.transport.local.generation) == []


# -- dying -------------------------------------------------------------------------------------------------------------


def test_killed_in_the_middle_of_batches(here: Endpoint, target: Target, lasting: Target) -> None:
    peer, remote = connected(here, target, BIG_BYTES)
    safe_peer, safe_remote = connected(here, lasting)
    requests = post_reads(here, peer, remote, 400)
    requests.append(here.transport.notify(peer, b"read"))
    requests[0].wait(WAIT_S)
    target.kill()
    during = post_reads(here, safe_peer, safe_remote, 20)
    outcomes = [outcome(request) for request in requests]
    # Each that ended well had all its bytes; the first that did not is followed by none that did.
    assert outcomes == sorted(outcomes) and set(outcomes) == {"", "PeerLostError"}
    error = requests[-1].exception()
    assert error is not None and "target" in str(error)
    # Not that of the other peer, which is being written to.
    memory = next(iter(here.regions.values()))[1]
    found = memory.copy()
    assert [outcome(request) for request in during] == [""] * 20
    reason, left = here.events.wait_lost(peer)
    assert reason and not left
    check_gone(here, peer, remote)
    check_works(here, safe_peer, safe_remote)
    np.testing.assert_array_equal(found, memory)
    assert here.transport.peers() == (safe_peer,)
    for region_id in list(here.regions):
        here.release(region_id=region_id)


def test_killed_between_requests(here: Endpoint, target: Target) -> None:
    peer, remote = connected(here, target)
    check_works(here, peer, remote)
    target.kill()
    here.events.wait_lost(peer)
    check_gone(here, peer, remote)
    started = time.monotonic()
    with pytest.raises(TransportError, match=peer.address):
        here.transport.connect(peer.address, timeout_s=WAIT_S)
    assert time.monotonic() - started < WAIT_S / 2
    assert not here.transport.peers() and here.events.joined == [peer]


# -- stopping ----------------------------------------------------------------------------------------------------------


def test_stopped_beyond_its_lease(here: Endpoint, target: Target, lasting: Target) -> None:
    peer, remote = connected(here, target)
    safe_peer, safe_remote = connected(here, lasting)
    here.transport.notify(peer, b"first").wait(WAIT_S)
    back = back_of(here, target)
    target.stop()
    started = time.monotonic()
    waiting = here.transport.notify(peer, b"second")
    behind = post_reads(here, peer, remote, 1)[0]
    reason, left = here.events.wait_lost(peer)
    took_s = time.monotonic() - started
    # Heartbeats come four times in a lease, so silence may have begun a quarter before.
    assert 0.5 * LEASE_S < took_s < LEASE_S + 20 and reason and not left
    with pytest.raises(PeerLostError, match="target"):
        waiting.wait(WAIT_S)
    assert outcome(behind) in ("PeerLostError", "LeaseExpiredError", "")
    check_works(here, safe_peer, safe_remote)
    assert here.transport.peers() == (safe_peer,)
    target.resume()
    assert target.call("lost", peer_id=back)[1] is False
    again, remote = connected(here, target)
    assert again.peer_id != peer.peer_id and again.generation == peer.generation
    check_works(here, again, remote)


def test_stopped_for_less_than_its_lease(here: Endpoint, lasting: Target) -> None:
    peer, remote = connected(here, lasting)
    for _ in range(3):
        lasting.stop()
        waiting = here.transport.notify(peer, b"x")
        assert not waiting._wait(LEASE_S / 5)
        lasting.resume()
        waiting.wait(WAIT_S)
    check_works(here, peer, remote)
    assert not here.events.lost


def test_who_was_given_up_touches_nothing_any_more(here: Endpoint, lasting: Target) -> None:
    """A peer that was stopped while it wrote to us, and goes on after its lease, must not write to reused memory."""
    if not here.transport.capabilities.fenced:
        pytest.skip("its capabilities say that operations under way cannot be stopped")
    peer, _ = connected(here, lasting)
    back = back_of(here, lasting)
    exported = here.new_region(size_bytes=BIG_BYTES)
    region, memory = here.regions[exported["region_id"]]
    theirs = lasting.call("new_region", size_bytes=BIG_BYTES, seed=3)
    values = {key: value for key, value in exported.items() if key != "region_id"}
    remote = lasting.call("import_region", peer_id=back, **values)
    requests = lasting.call("post", peer_id=back, write=True, region_id=theirs["region_id"], remote=remote, times=400)
    deadline = time.monotonic() + WAIT_S
    while not memory[-1]:  # Until the first write has come through.
        assert time.monotonic() < deadline
        time.sleep(0.002)
    lasting.stop()
    here.events.wait_lost(peer)
    memory[:] = 0
    lasting.resume()
    outcomes = lasting.call("outcomes", requests=requests)
    assert not memory.any(), f"{np.count_nonzero(memory)} bytes were written after the loss"
    assert outcomes == sorted(outcomes) and outcomes[-1] in (PeerLostError.__name__, LeaseExpiredError.__name__)
    here.transport.release(region)


# -- leaving and coming back -------------------------------------------------------------------------------------------


def test_saying_goodbye(here: Endpoint, target: Target) -> None:
    peer, remote = connected(here, target)
    target.call("close")
    assert here.events.wait_lost(peer)[1] is True
    check_gone(here, peer, remote)


def test_disconnecting_with_requests_under_way(here: Endpoint, lasting: Target) -> None:
    peer, remote = connected(here, lasting, BIG_BYTES)
    back = back_of(here, lasting)
    requests = post_reads(here, peer, remote, 200)
    here.transport.disconnect(peer)
    outcomes = [outcome(request) for request in requests]
    assert outcomes == sorted(outcomes) and outcomes[-1] in ("PeerLostError", "TransportError")
    memory = next(reversed(here.regions.values()))[1]
    memory[:] = 0
    assert here.events.wait_lost(peer)[1] is True and lasting.call("lost", peer_id=back)[1] is True
    assert not memory.any()
    check_gone(here, peer, remote)
    again, remote = connected(here, lasting)
    assert again.peer_id != peer.peer_id
    check_works(here, again, remote)


def test_a_restarted_peer_is_another_peer(transport_name: str, here: Endpoint, target: Target) -> None:
    peer, remote = connected(here, target)
    port = int(target.call("address").rpartition(":")[2]) if transport_name != "loopback" else 0
    target.kill()
    here.events.wait_lost(peer)
    with running_target(transport_name, name="target", lease_s=LEASE_S, port=port) as restarted:
        again, new_remote = connected(here, restarted)
        assert again.address == peer.address and again.name == peer.name
        assert again.generation != peer.generation and again.peer_id != peer.peer_id
        region, _ = here.regions[here.new_region(size_bytes=1 << 20)["region_id"]]
        with pytest.raises(InputError):
            here.transport.read(again, [copies(region, remote, (0, 0, 1))])
        check_gone(here, peer, remote)
        check_works(here, again, new_remote)


# -- closing and events ------------------------------------------------------------------------------------------------


def resources() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def own_shared_files() -> set[Path]:
    """Files of /dev/shm that this process maps; other programs have theirs there too."""
    maps = Path("/proc/self/maps").read_text()
    return {path for path in Path("/dev/shm").iterdir() if str(path) in maps}


def test_closing_leaves_nothing_behind(transport_name: str, lasting: Target) -> None:
    mapped: set[Path] = set()

    def use_and_close() -> list[Request]:
        here = Endpoint(transport_name, {"name": "here", "lease_s": LEASE_S})
        peer, remote = connected(here, lasting, BIG_BYTES)
        if here.transport.capabilities.allocates:
            here.new_region(size_bytes=BIG_BYTES, allocate=True)
        requests = post_reads(here, peer, remote, 30)
        requests.append(here.transport.notify(peer, b"x"))
        mapped.update(own_shared_files())
        here.close()
        here.close()
        for call in (
            lambda: here.transport.connect(peer.address, timeout_s=1),
            lambda: here.transport.register(4096, 1),
            lambda: here.transport.notify(peer, b""),
            lambda: here.transport.read(peer, []),
        ):
            with pytest.raises(TransportError):
                call()
        assert here.transport.peers() == ()
        return requests

    use_and_close()  # Libraries keep some things from their first use on.
    before = resources()
    requests = use_and_close()
    assert all(request.done() for request in requests)
    outcomes = [outcome(request) for request in requests]
    assert outcomes == sorted(outcomes) and outcomes[-1] in ("TransportError", "PeerLostError")
    num_fds, num_threads = resources()
    deadline = time.monotonic() + WAIT_S / 4
    while num_threads > before[1] and time.monotonic() < deadline:
        time.sleep(0.01)  # The kernel takes a joined thread off the list a moment later.
        num_threads = resources()[1]
    assert num_fds <= before[0] and num_threads <= before[1]
    assert not own_shared_files() and not [path for path in mapped if path.exists()]


def test_one_listener(here: Endpoint) -> None:
    with pytest.raises(InputError, match="listener"):
        here.transport.set_events(Recorder())


def test_events_before_there_is_a_listener(transport_name: str, lasting: Target) -> None:
    with make_transport(transport_name, name="late", lease_s=LEASE_S) as transport:
        back = lasting.call("connect", address=transport.local.address)
        lasting.call("notify", peer_id=back, payloads=[b"1", b"2", b"3"])
        events = Recorder()
        transport.set_events(events)
        lasting.call("notify", peer_id=back, payloads=[b"4"])
        events.wait(lambda: len(events.notifications) == 4, "4 notifications")
        assert [n.payload for n in events.notifications] == [b"1", b"2", b"3", b"4"]
        assert [peer.name for peer in events.joined] == ["lasting"]


def test_a_listener_that_is_slow_or_fails_stops_no_heartbeat(transport_name: str, lasting: Target) -> None:
    class Slow(Recorder):
        def notified(self, notification: object) -> None:
            time.sleep(1.3 * LEASE_S)
            raise ValueError("the program's mistake")

    with make_transport(transport_name, name="slow", lease_s=LEASE_S) as transport:
        events = Slow()
        transport.set_events(events)
        back = lasting.call("connect", address=transport.local.address)
        lasting.call("notify", peer_id=back, payloads=[b"1"])
        events.wait(lambda: events.joined, "joined peer")
        time.sleep(1.3 * LEASE_S)
        assert back in lasting.call("peers") and len(transport.peers()) == 1
        lasting.call("disconnect", peer_id=back)
        assert events.wait_lost(events.joined[0])[1] is True
