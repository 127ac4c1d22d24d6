"""The contract of `transports/base.py`, checked on every transport that can be used here: what works.

`test_conformance_failures.py` has what happens when peers die, stop, leave, or are not who they should be.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref

import numpy as np
import pytest

from llmsys.comm.transports.base import Request
from llmsys.core.errors import DeadlineError, DescriptorError, InputError
from tests.comm.conftest import Pair, copies, import_exported, pattern
from tests.comm.endpoint import WAIT_S, Endpoint
from tests.comm.scattered import copied, layout, num_runs

BLOCK_BYTES = [1, 3, 64, 4095, 16_384, 100_003, 1 << 20]
KEEP_BYTES = 16


def test_description_and_identity(pair: Pair, transport_name: str) -> None:
    transport = pair.transport
    described = transport.describe()
    assert transport.name == transport_name and {"library", "transports"} <= described.keys()
    assert all(isinstance(text, str) for text in described.values())
    assert transport.local.name == "here" and transport.local.generation > 0 and transport.local.peer_id == 0
    assert pair.peer.name == "target" and pair.peer.address == pair.target.call("address")
    assert "target" in str(pair.peer) and pair.peer.address in str(pair.peer)
    assert "cpu" in transport.capabilities.devices
    assert type(transport).available() is None


def test_connect_again_gives_the_same_peer(pair: Pair) -> None:
    assert pair.transport.connect(pair.peer.address) == pair.peer
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(pair.transport.connect(pair.peer.address)))] * 1
    threads += [threading.Thread(target=lambda: found.append(pair.transport.connect(pair.peer.address)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert found == [pair.peer] * 2
    assert pair.transport.peers() == (pair.peer,)
    pair.events.wait(lambda: pair.events.joined, "joined peer")
    assert pair.events.joined == [pair.peer]
    assert len(pair.target.call("peers")) == 1


@pytest.mark.parametrize("block_bytes", BLOCK_BYTES)
def test_reads_are_what_numpy_copies(block_bytes: int, pair: Pair) -> None:
    rng = np.random.default_rng(block_bytes)
    num_blocks = min(2000, (4 << 20) // block_bytes)
    size_bytes = (block_bytes + 2) * num_blocks + KEEP_BYTES
    remote = pair.remote(size_bytes, seed=1)
    source = pattern(size_bytes, 1)
    for coalesce in (True, False):
        region, memory = pair.local(size_bytes, seed=2)
        entries = layout(rng, block_bytes, num_blocks, size_bytes, size_bytes)
        expected = copied(memory, source, entries)
        batch = copies(region, remote, *zip(*entries, strict=True))
        request = pair.transport.read(pair.peer, [batch], coalesce=coalesce)
        request.wait(WAIT_S)
        np.testing.assert_array_equal(memory, expected)
        stats = request.stats
        assert (stats.num_entries, stats.size_bytes) == (num_blocks, entries[2].sum())
        assert stats.num_segments == (num_runs(entries) if coalesce else np.count_nonzero(entries[2]))
        assert 0 < stats.posted_ns <= stats.started_ns <= stats.finished_ns
        pair.drop(region)
    np.testing.assert_array_equal(pair.content(remote), source)
    pair.drop(remote)


@pytest.mark.parametrize("block_bytes", BLOCK_BYTES)
def test_writes_are_what_numpy_copies(block_bytes: int, pair: Pair) -> None:
    rng = np.random.default_rng(block_bytes)
    num_blocks = min(2000, (4 << 20) // block_bytes)
    size_bytes = (block_bytes + 2) * num_blocks + KEEP_BYTES
    region, memory = pair.local(size_bytes, seed=3)
    for coalesce in (True, False):
        remote = pair.remote(size_bytes, seed=4)
        entries = layout(rng, block_bytes, num_blocks, size_bytes, size_bytes)
        expected = copied(pattern(size_bytes, 4), memory, entries)
        batch = copies(region, remote, *zip(entries[1], entries[0], entries[2], strict=True))
        pair.transport.write(pair.peer, [batch], coalesce=coalesce).wait(WAIT_S)
        np.testing.assert_array_equal(pair.content(remote), expected)
        pair.drop(remote)
    np.testing.assert_array_equal(memory, pattern(size_bytes, 3))
    pair.drop(region)


def test_allocated_memory(pair: Pair) -> None:
    if not pair.transport.capabilities.allocates:
        with pytest.raises(InputError, match="allocate"):
            pair.transport.allocate(4096)
        return
    size_bytes = 3 << 20
    region, memory = pair.local(size_bytes, allocate=True)
    assert not memory.any() and region.device == "cpu" and region.size_bytes == size_bytes
    remote = pair.remote(size_bytes, seed=5, allocate=True)
    pair.transport.read(pair.peer, [copies(region, remote, (1, 0, size_bytes - 1))]).wait(WAIT_S)
    np.testing.assert_array_equal(memory[1:], pattern(size_bytes, 5)[:-1])
    memory[:] = pattern(size_bytes, 6)
    pair.transport.write(pair.peer, [copies(region, remote, (0, 0, size_bytes))]).wait(WAIT_S)
    np.testing.assert_array_equal(pair.content(remote), memory)
    pair.drop(region, remote)
    for size in (0, -1):
        with pytest.raises(InputError):
            pair.transport.allocate(size)


def test_a_batch_over_several_regions(pair: Pair) -> None:
    locals_, remotes = (
        [pair.local(10_000, seed=i) for i in range(3)],
        [pair.remote(10_000, seed=9 + i) for i in range(3)],
    )
    batch = [copies(locals_[i][0], remotes[2 - i], (100 * i, 50, 1000), (5000, 7, 77)) for i in range(3)]
    request = pair.transport.read(pair.peer, batch)
    request.wait(WAIT_S)
    assert (request.stats.num_entries, request.stats.num_segments, request.stats.size_bytes) == (6, 6, 3 * 1077)
    for i in range(3):
        source = pattern(10_000, 9 + 2 - i)
        entries = ((100 * i, 5000), (50, 7), (1000, 77))
        np.testing.assert_array_equal(locals_[i][1], copied(pattern(10_000, i), source, entries))
    pair.drop(*(region for region, _ in locals_), *remotes)


def test_nothing_to_copy(pair: Pair) -> None:
    region, memory = pair.local(100, seed=1)
    remote = pair.remote(100, seed=2)
    for batch in ([], [copies(region, remote)], [copies(region, remote, (0, 0, 0), (100, 100, 0), (0, 0, 0))]):
        for operation in (pair.transport.read, pair.transport.write):
            request = operation(pair.peer, batch)
            request.wait(WAIT_S)
            assert request.stats.num_segments == request.stats.size_bytes == 0
    np.testing.assert_array_equal(memory, pattern(100, 1))
    pair.drop(region, remote)


BEYOND = [(0, 0, 101), (100, 0, 1), (0, 100, 1), (-1, 0, 1), (0, -1, 1), (0, 0, -1), (1, 0, (1 << 63) - 1)]
BEYOND += [((1 << 63) - 1, 0, 2), (0, (1 << 63) - 1, 2), (101, 0, 0), (0, 50, 51)]


@pytest.mark.parametrize("entry", BEYOND)
def test_entries_outside_are_refused_before_any_byte_moves(entry: tuple[int, int, int], pair: Pair) -> None:
    region, memory = pair.local(100, seed=1)
    remote = pair.remote(100, seed=2)
    for operation in (pair.transport.read, pair.transport.write):
        for coalesce in (True, False):
            with pytest.raises(InputError) as caught:
                operation(pair.peer, [copies(region, remote, (0, 0, 10), (20, 20, 10), entry)], coalesce=coalesce)
            assert "2" in str(caught.value) and any(str(value) in str(caught.value) for value in entry if value)
    np.testing.assert_array_equal(memory, pattern(100, 1))
    np.testing.assert_array_equal(pair.content(remote), pattern(100, 2))
    pair.drop(region, remote)


def test_destinations_that_overlap_are_refused(pair: Pair) -> None:
    region, memory = pair.local(100, seed=1)
    again = pair.transport.register(region.address + 40, 30)
    remote = pair.remote(100, seed=2)
    read, write = pair.transport.read, pair.transport.write
    refused = [
        (read, [copies(region, remote, (0, 50, 10), (9, 80, 5))]),
        (read, [copies(region, remote, (5, 0, 1), (0, 0, 10))]),
        (read, [copies(region, remote, (0, 0, 10)), copies(region, remote, (0, 0, 10))]),
        (read, [copies(region, remote, (40, 0, 5)), copies(again, remote, (4, 0, 5))]),
        (write, [copies(region, remote, (50, 0, 10), (80, 9, 5))]),
    ]
    for operation, batch in refused:
        for coalesce in (True, False):
            with pytest.raises(InputError, match=r"overlap|same|common"):
                operation(pair.peer, batch, coalesce=coalesce)
    np.testing.assert_array_equal(memory, pattern(100, 1))
    # Sources may overlap, and an empty entry overlaps nothing.
    read(pair.peer, [copies(region, remote, (0, 0, 10), (10, 5, 10), (5, 0, 0))]).wait(WAIT_S)
    assert memory[:20].tobytes() == pattern(100, 2)[:10].tobytes() + pattern(100, 2)[5:15].tobytes()
    pair.transport.release(again)
    pair.drop(region, remote)


def test_unknown_regions_are_refused(pair: Pair) -> None:
    region, memory = pair.local(100, seed=1)
    remote = pair.remote(100, seed=2)
    pair.drop(region)
    with pytest.raises(InputError):
        pair.transport.read(pair.peer, [copies(region, remote, (0, 0, 10))])
    with pytest.raises(InputError):
        pair.transport.release(region)
    region = pair.transport.register(memory.ctypes.data, 100, owner=memory)
    pair.transport.forget_region(remote)
    with pytest.raises(InputError):
        pair.transport.read(pair.peer, [copies(region, remote, (0, 0, 10))])
    pair.transport.release(region)


@pytest.mark.parametrize(("address", "size_bytes", "device"), [(4096, 0, "cpu"), (4096, -1, "cpu"), (4096, 1, "tpu")])
def test_memory_that_cannot_be(address: int, size_bytes: int, device: str, pair: Pair) -> None:
    with pytest.raises(InputError):
        pair.transport.register(address, size_bytes, device=device)


def test_keys_that_are_not_those_of_the_region(pair: Pair) -> None:
    exported = pair.target.call("new_region", size_bytes=5000, seed=1)
    other = pair.target.call("new_region", size_bytes=6000, seed=1)
    key: bytes = exported["remote_key"]
    wrong = [b"", b"x", key[:-1], key[: len(key) // 2], key + b"\0", bytes(len(key)), other["remote_key"]]
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(key), 20):
        wrong.append(key[:position] + bytes([key[position] ^ (1 << int(rng.integers(8)))]) + key[position + 1 :])
    wrong += [rng.bytes(size) for size in (10, 100, 1000)]
    for bad in wrong:
        with pytest.raises(DescriptorError) as caught:
            import_exported(pair.transport, pair.peer, exported, remote_key=bad)
        assert all((caught.value.expected, caught.value.found, caught.value.fix))
    for changes in ({"size_bytes": 5001}, {"address": exported["address"] + 5001}, {"size_bytes": 1 << 62}):
        with pytest.raises(DescriptorError):
            import_exported(pair.transport, pair.peer, exported, **changes)
    pair.transport.forget_region(import_exported(pair.transport, pair.peer, exported))
    for region in (exported, other):
        pair.target.call("release", region_id=region["region_id"])


def test_thousands_of_regions(pair: Pair) -> None:
    num, size_bytes = 2000, 256
    memory = pattern(num * size_bytes, 3)
    regions = [
        pair.transport.register(memory.ctypes.data + i * size_bytes, size_bytes, owner=memory) for i in range(num)
    ]
    remote = pair.remote(num * size_bytes, seed=4)
    order = np.random.default_rng(5).permutation(num)
    batch = [copies(regions[i], remote, (0, int(order[i]) * size_bytes, size_bytes)) for i in range(num)]
    pair.transport.read(pair.peer, batch).wait(WAIT_S)
    source = pattern(num * size_bytes, 4).reshape(num, size_bytes)
    np.testing.assert_array_equal(memory.reshape(num, size_bytes), source[order])
    for region in regions:
        pair.transport.release(region)
    pair.drop(remote)


def test_more_than_four_gib(pair: Pair) -> None:
    """Sizes and offsets beyond 32 bits, in one entry and in the sum."""
    if not pair.transport.capabilities.one_sided:
        pytest.skip("a two-sided transport cuts entries before they travel, and is slow with so many bytes")
    size_bytes = (4 << 30) + (8 << 20) + 5
    marks = [0, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 32) + 9000, size_bytes - 1]
    remote = pair.remote(size_bytes, marks=marks)
    for number, mark in enumerate(marks, start=1):
        region_id = pair.exported[remote.remote_id]["region_id"]
        pair.target.call("fill", region_id=region_id, begin=mark, data=bytes([number]))
    region, memory = pair.local(size_bytes, marks=marks)
    # The second entry lies beyond 4 GiB; the first is longer than that.
    head = (4 << 30) + 8192
    request = pair.transport.read(
        pair.peer, [copies(region, remote, (0, 0, head), (head, head, size_bytes - head))], coalesce=False
    )
    request.wait(4 * WAIT_S)
    assert request.stats.size_bytes == size_bytes
    assert memory[marks].tolist() == list(range(1, len(marks) + 1))
    assert np.count_nonzero(memory[: 1 << 20]) == 1 and np.count_nonzero(memory[-(1 << 20) :]) == 1
    pair.drop(region, remote)


def test_a_region_in_use_is_not_released(pair: Pair) -> None:
    """Behind 64 MiB of other batches, the last one surely has not ended when `release` is called right after."""
    region, _ = pair.local(8 << 20)
    remote = pair.remote(8 << 20, seed=1)
    for _attempt in range(20):
        requests = [pair.transport.read(pair.peer, [copies(region, remote, (0, 0, 8 << 20))]) for _ in range(8)]
        refused = None
        try:
            pair.transport.release(region)
        except InputError as error:
            refused = error
        was_done = requests[-1].done()
        for request in requests:
            request.wait(WAIT_S)
        assert refused is not None or was_done
        if refused is not None:
            break
        region, _ = pair.local(8 << 20)
    assert refused is not None, "the batches always ended first"
    pair.drop(region, remote)


def test_the_owner_lives_as_long_as_its_region(pair: Pair) -> None:
    class Owner:
        pass

    owner, memory = Owner(), pattern(100, 1)
    region = pair.transport.register(memory.ctypes.data, 100, owner=owner)
    gone = weakref.ref(owner)
    del owner
    assert gone() is not None
    pair.transport.release(region)
    assert gone() is None


def received(pair: Pair, count: int) -> list[tuple[int, bytes]]:
    """What the target has heard of us, as (id, payload), when it is at least so much."""
    (back,) = pair.target.call("peers")
    return [tuple(n) for n in pair.target.call("notifications", peer_id=back, count=count)]


def test_notifications_come_once_in_order_also_when_empty_or_long(pair: Pair) -> None:
    start = len(received(pair, 0))
    payloads = [b"", b"a", bytes(range(256)) * 16, bytes(pair.transport.max_message_bytes), b""]
    payloads += [number.to_bytes(4, "little") for number in range(10_000)]
    requests = [pair.transport.notify(pair.peer, payload) for payload in payloads]
    for request in requests:
        request.wait(WAIT_S)
    found = received(pair, start + len(payloads))
    assert [payload for _, payload in found[start:]] == payloads
    assert [number for number, _ in found] == list(range(1, len(found) + 1))
    with pytest.raises(InputError) as caught:
        pair.transport.notify(pair.peer, bytes(pair.transport.max_message_bytes + 1))
    assert str(pair.transport.max_message_bytes) in str(caught.value)
    assert len(received(pair, 0)) == len(found)


def test_notifications_of_the_other_side(pair: Pair) -> None:
    (back,) = pair.target.call("peers")
    payloads = [b"%d" % number for number in range(100)]
    pair.target.call("notify", peer_id=back, payloads=payloads)
    # Acknowledged means queued here; the listener may hear a moment later.
    pair.events.wait(lambda: len(pair.events.notifications) >= 100, "100 notifications")
    assert [n.payload for n in pair.events.notifications] == payloads
    assert [n.message_id for n in pair.events.notifications] == list(range(1, 101))
    assert {n.peer for n in pair.events.notifications} == {pair.peer}


def test_a_notification_does_not_overtake_the_data(pair: Pair) -> None:
    """The peer looks at its memory when the message comes, without waiting for anything else."""
    size_bytes = 4 << 20
    region, memory = pair.local(size_bytes, seed=7)
    remote = pair.remote(size_bytes)
    for number in range(5):
        memory[:] = number + 1
        start = len(received(pair, 0))
        request = pair.transport.write(pair.peer, [copies(region, remote, (0, 0, size_bytes))])
        announced = pair.transport.notify(pair.peer, b"written")
        received(pair, start + 1)
        assert (pair.content(remote) == number + 1).all()
        announced.wait(WAIT_S)
        assert request.done() and request.stats.finished_ns <= announced.stats.started_ns
    pair.drop(region, remote)


def test_requests_of_a_peer_start_in_order(pair: Pair) -> None:
    region, _ = pair.local(1 << 20)
    remote = pair.remote(1 << 20, seed=1)
    batch = [copies(region, remote, (0, 0, 1 << 20))]
    requests: list[Request] = []
    for _ in range(20):
        requests += [pair.transport.read(pair.peer, batch), pair.transport.notify(pair.peer, b"x")]
    for request in requests:
        request.wait(WAIT_S)
    started = [request.stats.started_ns for request in requests]
    assert started == sorted(started) and started[0] > 0
    pair.drop(region, remote)


def test_waiting_polling_and_calling_back(pair: Pair) -> None:
    region, _ = pair.local(32 << 20)
    remote = pair.remote(32 << 20, seed=1)
    batch = [copies(region, remote, (0, 0, 32 << 20))]
    requests = [pair.transport.read(pair.peer, batch) for _ in range(4)]
    last = requests[-1]
    assert "read" in last.description and "target" in last.description
    called: list[tuple[Request, bool, threading.Thread]] = []
    changed = threading.Event()

    def callback(request: Request) -> None:
        called.append((request, request.done(), threading.current_thread()))
        changed.set()

    with pytest.raises(DeadlineError, match="read") as caught:
        last.wait(0.0)
    assert "0.0 s" in caught.value.expected
    last.add_done_callback(callback)
    deadline = time.monotonic() + WAIT_S
    while not last.done():
        assert time.monotonic() < deadline
        last._wait(0.001)
    assert last.exception() is None
    assert changed.wait(WAIT_S) and called[0][:2] == (last, True) and called[0][2] is not threading.main_thread()
    last.add_done_callback(callback)
    assert called[1:] == [(last, True, threading.main_thread())]
    last.wait(0.0)
    for request in requests:
        request.wait(WAIT_S)
    pair.drop(region, remote)


def test_a_callback_that_fails_harms_nobody(pair: Pair) -> None:
    def fail(request: Request) -> None:
        raise ValueError("the program's mistake")

    called = threading.Event()
    request = pair.transport.notify(pair.peer, b"x")
    try:
        request.add_done_callback(fail)
    except ValueError as error:
        assert "the program's mistake" in str(error)  # It had ended already and was called here.
    after = pair.transport.notify(pair.peer, b"y")
    after.add_done_callback(lambda request: called.set())
    after.wait(WAIT_S)
    assert called.wait(WAIT_S)


def test_many_are_awaited_at_once(pair: Pair) -> None:
    region, memory = pair.local(256 << 10)
    remote = pair.remote(256 << 10, seed=1)

    async def one(index: int) -> int:
        begin = index << 10
        await pair.transport.read(pair.peer, [copies(region, remote, (begin, begin, 1 << 10))])
        await pair.transport.notify(pair.peer, b"%d" % index)
        return index

    async def everything() -> list[int]:
        return await asyncio.wait_for(asyncio.gather(*(one(index) for index in range(256))), WAIT_S)

    assert asyncio.run(everything()) == list(range(256))
    np.testing.assert_array_equal(memory, pattern(256 << 10, 1))
    pair.drop(region, remote)


def test_posting_from_many_threads(pair: Pair) -> None:
    size_bytes = 64 << 10
    regions = [pair.local(size_bytes) for _ in range(8)]
    remote = pair.remote(8 * size_bytes, seed=1)
    source = pattern(8 * size_bytes, 1).reshape(8, size_bytes)
    errors: list[Exception] = []

    def run(index: int) -> None:
        try:
            region, memory = regions[index]
            for _ in range(20):
                memory[:] = 0
                batch = [copies(region, remote, (0, index * size_bytes, size_bytes))]
                pair.transport.read(pair.peer, batch).wait(WAIT_S)
                np.testing.assert_array_equal(memory, source[index])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not errors
    pair.drop(*(region for region, _ in regions), remote)


def test_both_ends_in_one_process(transport_name: str) -> None:
    ends = [Endpoint(transport_name, {"name": f"end{number}"}) for number in range(2)]
    try:
        if not ends[0].transport.capabilities.shares_process:
            pytest.skip(f"{transport_name} cannot have both ends in one process")
        peer = ends[0].transport.connect(ends[1].address(), timeout_s=WAIT_S)
        exported = ends[1].new_region(size_bytes=1 << 20, seed=1)
        remote = import_exported(ends[0].transport, peer, exported)
        region, memory = ends[0].regions[ends[0].new_region(size_bytes=1 << 20)["region_id"]]
        ends[0].transport.read(peer, [copies(region, remote, (0, 0, 1 << 20))]).wait(WAIT_S)
        np.testing.assert_array_equal(memory, pattern(1 << 20, 1))
        ends[0].transport.notify(peer, b"hello").wait(WAIT_S)
        back = ends[1].peer_of(generation=ends[0].transport.local.generation)
        assert ends[1].notifications(peer_id=back, count=1) == [(1, b"hello")]
    finally:
        for end in ends:
            end.close()
