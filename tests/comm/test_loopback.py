"""The loopback transport's faults: each does what it says, within the contract, and the same for the same seed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from llmsys.comm.transports.base import Peer, RemoteRegion, TransportConfig
from llmsys.comm.transports.loopback import LoopbackTransport
from llmsys.comm.transports.loopback_faults import Faults, LossPoint
from llmsys.core.errors import InputError, LeaseExpiredError, PeerLostError, TransportError
from tests.comm.conftest import copies, pattern
from tests.comm.endpoint import SECRET, WAIT_S, Bytes, Recorder, outcome


def make(name: str, lease_s: float = 30.0, **faults: object) -> LoopbackTransport:
    config = TransportConfig(secret=SECRET, name=name, lease_s=lease_s)
    return LoopbackTransport(config, faults=Faults(**faults))  # type: ignore[arg-type]


class Side:
    """A loopback endpoint that listens to its events."""

    def __init__(self, transport: LoopbackTransport) -> None:
        self.transport = transport
        self.events = Recorder()
        transport.set_events(self.events)

    def memory(self, size_bytes: int, seed: int | None = None) -> tuple[object, Bytes]:
        memory = np.zeros(size_bytes, dtype=np.uint8) if seed is None else pattern(size_bytes, seed)
        return self.transport.register(memory.ctypes.data, size_bytes, owner=memory), memory

    def imported(self, other: Side, peer: Peer, size_bytes: int, seed: int) -> RemoteRegion:
        region, _ = other.memory(size_bytes, seed)
        return self.transport.import_region(
            peer,
            address=region.address,  # type: ignore[attr-defined]
            size_bytes=size_bytes,
            device="cpu",
            remote_key=region.remote_key,  # type: ignore[attr-defined]
        )


@pytest.fixture
def sides() -> Iterator[list[Side]]:
    made: list[Side] = []
    yield made
    for side in made:
        side.transport.close()


def test_draws_depend_on_the_seed_only() -> None:
    first, again, other = (Faults(seed=seed, loss_chance=0.5, lose_at="after") for seed in (1, 1, 2))
    drawn = [[faults.loses("after", 1, number) for number in range(100)] for faults in (first, again, other)]
    assert drawn[0] == drawn[1] != drawn[2] and 30 < sum(drawn[0]) < 70
    for wrong in ({"max_delay_s": -1.0}, {"loss_chance": 1.5}, {"duplicate_chance": -0.1}):
        with pytest.raises(InputError):
            Faults(**wrong)  # type: ignore[arg-type]


def test_delays_reordering_and_duplicates_stay_within_the_contract(sides: list[Side]) -> None:
    """Three peers at once: right bytes, messages once and in order, none before what came before it."""
    here = Side(make("here", seed=3, max_delay_s=0.01, reorder=True, duplicate_chance=0.5))
    sides += [here, *(Side(make(f"far{number}")) for number in range(3))]
    size_bytes, num_rounds = 64 << 10, 30
    peers = [here.transport.connect(far.transport.local.address) for far in sides[1:]]
    remotes = [
        here.imported(far, peer, size_bytes, seed)
        for seed, (far, peer) in enumerate(zip(sides[1:], peers, strict=True))
    ]
    rng = np.random.default_rng(0)
    requests, checks = [], []
    for number in range(num_rounds):
        for peer, remote, seed in zip(peers, remotes, range(3), strict=True):
            region, memory = here.memory(size_bytes)
            begins = rng.permutation(64) * 1024
            batch = copies(region, remote, *((int(b), int(b), 1000) for b in begins))  # type: ignore[arg-type]
            requests.append(here.transport.read(peer, [batch]))
            checks.append((memory, seed))
            if number % 3 == 2:
                requests.append(here.transport.notify(peer, b"%d" % number))
    for request in requests:
        request.wait(WAIT_S)
    for memory, seed in checks:
        blocks, source = memory.reshape(64, 1024), pattern(size_bytes, seed).reshape(64, 1024)
        assert (blocks[:, :1000] == source[:, :1000]).all() and not blocks[:, 1000:].any()
    for far in sides[1:]:
        far.events.wait(lambda far=far: len(far.events.notifications) >= 10, "10 notifications")
        assert [n.payload for n in far.events.notifications] == [b"%d" % n for n in range(2, num_rounds, 3)]
        assert [n.message_id for n in far.events.notifications] == list(range(1, 11))
    per_peer = [[r.stats for r in requests if str(peer) in r.description] for peer in peers]
    for stats in per_peer:
        assert [s.started_ns for s in stats] == sorted(s.started_ns for s in stats)
        for index, message in enumerate(stats):
            if not message.num_entries:
                assert all(s.finished_ns <= message.started_ns for s in stats[:index] if s.num_entries)
    # The faults did happen: some batch ended before one of the same peer that was posted earlier.
    batches = [[s.finished_ns for s in stats if s.num_entries] for stats in per_peer]
    assert any(ends != sorted(ends) for ends in batches)


@pytest.mark.parametrize("lose_at", ["mid_batch", "completion", "after"])
def test_loss_of_a_peer(lose_at: LossPoint, sides: list[Side]) -> None:
    here, far, other = Side(make("here", seed=1, lose_at=lose_at)), Side(make("far")), Side(make("other"))
    sides += [here, far, other]
    size_bytes = 1 << 20
    peer = here.transport.connect(far.transport.local.address)
    remote = here.imported(far, peer, size_bytes, seed=1)
    region, memory = here.memory(size_bytes)
    batch = copies(region, remote, *((b, b, 1 << 10) for b in range(0, size_bytes, 2 << 10)))  # type: ignore[arg-type]
    first, second = here.transport.read(peer, [batch]), here.transport.notify(peer, b"behind")
    assert outcome(first) == ("" if lose_at == "after" else PeerLostError.__name__)
    assert outcome(second) == PeerLostError.__name__
    copied = int(np.count_nonzero(memory.reshape(-1, 2 << 10)[:, : 1 << 10].any(axis=1)))
    assert 0 < copied < 512 if lose_at == "mid_batch" else copied == 512
    assert here.events.wait_lost(peer)[1] is False
    assert "fault" in here.events.wait_lost(peer)[0]
    far.events.wait(lambda: far.events.lost, "loss")
    assert not far.events.notifications and here.transport.peers() == far.transport.peers() == ()
    # A new connection works until the next fault.
    again = here.transport.connect(far.transport.local.address)
    here.transport.notify(again, b"again").wait(WAIT_S)


def test_loss_before_connecting(sides: list[Side]) -> None:
    here, far = Side(make("here", lose_at="connect", loss_chance=0.5, seed=1)), Side(make("far"))
    sides += [here, far]
    results = []
    for _ in range(20):
        try:
            here.transport.disconnect(here.transport.connect(far.transport.local.address))
            results.append(True)
        except TransportError as error:
            assert "fault" in error.found
            results.append(False)
    drawn = Faults(lose_at="connect", loss_chance=0.5, seed=1)
    assert results == [not drawn.loses("connect", 0, number) for number in range(1, 21)] and 0 < sum(results) < 20


def test_our_right_ends_with_the_lease_of_the_peer(sides: list[Side]) -> None:
    """The target has the shorter lease: we must stop before we lose it ourselves, and may go on when it is back."""
    seeds = (seed for seed in range(100) if Faults(max_delay_s=1.0, seed=seed).delay_s("a batch", 1, 1) > 0.6)
    here, far = Side(make("here", max_delay_s=1.0, seed=next(seeds))), Side(make("far", lease_s=0.2))
    sides += [here, far]
    peer = here.transport.connect(far.transport.local.address)
    remote = here.imported(far, peer, 4096, seed=1)
    region, memory = here.memory(4096)
    batch = [copies(region, remote, (0, 0, 4096))]  # type: ignore[arg-type]
    request = here.transport.read(peer, batch)
    far.transport.pause()
    with pytest.raises(LeaseExpiredError, match="far"):
        request.wait(WAIT_S)
    assert here.transport.peers() == (peer,)
    waiting = here.transport.read(peer, batch)
    assert not waiting._wait(0.3) and waiting.stats.started_ns == 0
    far.transport.resume()
    waiting.wait(WAIT_S)
    np.testing.assert_array_equal(memory, pattern(4096, 1))


def test_memory_that_the_peer_has_released(sides: list[Side]) -> None:
    here, far = Side(make("here")), Side(make("far"))
    sides += [here, far]
    peer = here.transport.connect(far.transport.local.address)
    remote = here.imported(far, peer, 4096, seed=1)
    far.transport.release(far.transport._memory.find(1))  # type: ignore[arg-type]
    region, memory = here.memory(4096)
    with pytest.raises(TransportError, match="read of 1 blocks from far") as caught:
        here.transport.read(peer, [copies(region, remote, (0, 0, 4096))]).wait(WAIT_S)  # type: ignore[arg-type]
    assert "released" in caught.value.found and not memory.any()
    here.transport.notify(peer, b"still there").wait(WAIT_S)


def test_a_key_of_an_earlier_start_is_refused(sides: list[Side]) -> None:
    here, far = Side(make("here")), Side(make("far"))
    sides += [here, far]
    region, _ = far.memory(4096, 1)
    far.transport.close()
    restarted = Side(make("far"))
    sides.append(restarted)
    peer = here.transport.connect(restarted.transport.local.address)
    with pytest.raises(ValueError, match="cannot be imported") as caught:
        here.transport.import_region(
            peer,
            address=region.address,  # type: ignore[attr-defined]
            size_bytes=4096,
            device="cpu",
            remote_key=region.remote_key,  # type: ignore[attr-defined]
        )
    assert str(peer.generation) in caught.value.expected  # type: ignore[attr-defined]


def test_names_are_unique_and_free_again(sides: list[Side]) -> None:
    with make("one"), pytest.raises(InputError, match="already"):
        make("one")
    make("one").close()


def test_closing_a_paused_endpoint(sides: list[Side]) -> None:
    here, far = Side(make("here")), Side(make("far"))
    sides += [here, far]
    peer = here.transport.connect(far.transport.local.address)
    here.transport.pause()
    request = here.transport.notify(peer, b"never")
    started = time.monotonic()
    here.transport.close()
    assert outcome(request) == PeerLostError.__name__ and time.monotonic() - started < WAIT_S / 2
    far.events.wait(lambda: far.events.lost, "loss")
    assert not far.events.notifications
