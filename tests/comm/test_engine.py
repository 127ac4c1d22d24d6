"""The native engine between two engines of one process: data, order, checks, memory, cost of being idle."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from llmsys import _C
from tests.comm.engines import (
    PATHS,
    WAIT_S,
    Integers,
    Link,
    Memory,
    child_of,
    connect,
    ended,
    linked,
    memories,
    new_engine,
    new_memory,
    pattern,
    post,
    succeeded,
    wait_event,
)

pytestmark = pytest.mark.native

SIZE = 1 << 20


@pytest.fixture(scope="module", params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def link(path: str) -> Iterator[Link]:
    with linked(path, num_copy_threads=3) as made:
        yield made


@pytest.fixture
def any_link() -> Iterator[Link]:
    with linked() as made:
        yield made


def drop(link: Link, local: Memory, target: Memory, remote: int) -> None:
    link.here.drop_remote(remote)
    link.here.release(local.region)
    link.there.release(target.region)


def shuffled(rng: np.random.Generator, size_bytes: int, count: int) -> Integers:
    """Rows (local, remote, length): ragged pieces that do not overlap on either side, some adjacent, some empty."""
    cuts = np.sort(rng.integers(0, size_bytes, count - 1))
    begins = np.concatenate([[0], cuts])
    lengths = np.diff(np.concatenate([begins, [size_bytes]]))
    order = rng.permutation(count)
    remote = np.empty(count, np.int64)
    remote[order] = np.cumsum(lengths[order]) - lengths[order]
    return np.stack([begins, remote, lengths], axis=1)[rng.permutation(count)]


@pytest.mark.parametrize("coalesce", [True, False], ids=["coalesced", "as_given"])
@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_shuffled_ragged_pieces_arrive(link: Link, path: str, write: bool, coalesce: bool) -> None:
    rng = np.random.default_rng(3)
    local, target, remote = memories(link, SIZE, path)
    assert link.here.remote_path(remote) == path
    for count in (1, 2, 3000):
        entries = shuffled(rng, SIZE, count)
        local.array[:], target.array[:] = pattern(SIZE, count), pattern(SIZE, count + 1)
        here, there = local.array.copy(), target.array.copy()
        for begin, far, length in entries.tolist():
            if write:
                there[far : far + length] = here[begin : begin + length]
            else:
                here[begin : begin + length] = there[far : far + length]
        request = succeeded(post(link.here, write, link.peer, local, remote, entries, coalesce))
        assert np.array_equal(local.array, here) and np.array_equal(target.array, there)
        assert (request.num_entries, request.size_bytes, request.paths) == (count, SIZE, [path])
        assert request.num_segments == (entries[:, 2] > 0).sum() or coalesce
        assert 0 < request.posted_ns <= request.started_ns <= request.finished_ns <= time.monotonic_ns()
    drop(link, local, target, remote)


def test_another_process_is_reached_by_the_same_path(path: str) -> None:
    engine = new_engine(path)
    try:
        with child_of(engine, path, SIZE, seed=5) as child:
            assert engine.remote_path(child.remote) == path
            local = new_memory(engine, SIZE)
            entries = shuffled(np.random.default_rng(0), SIZE, 500)
            succeeded(post(engine, False, child.peer, local, child.remote, entries))
            expected = np.zeros(SIZE, np.uint8)
            for begin, far, length in entries.tolist():
                expected[begin : begin + length] = pattern(SIZE, 5)[far : far + length]
            assert np.array_equal(local.array, expected)
            succeeded(post(engine, True, child.peer, local, child.remote, [(0, 0, SIZE)]))
            local.array[:] = 0
            succeeded(post(engine, False, child.peer, local, child.remote, [(0, 0, SIZE)]))
            assert np.array_equal(local.array, expected)
    finally:
        engine.close()


def test_sanitized_run_uses_the_sanitized_module() -> None:
    """Here and in child processes; see `make sanitize` and `make tsan`."""
    sanitize = _C.build_info()["sanitize"]
    assert bool(sanitize) == ("LLMSYS_NATIVE_DIR" in os.environ)
    engine = new_engine()
    try:
        with child_of(engine, "cma", 4096) as child:
            assert child.call("sanitize") == {"sanitize": sanitize}
    finally:
        engine.close()


def test_groups_share_entries(link: Link, path: str) -> None:
    """Many tensors with one list of blocks, as the layers of a cache: one batch."""
    block, num_blocks, num_layers = 512, 8, 40
    made = [memories(link, block * num_blocks, path) for _ in range(num_layers)]
    for i, (_, target, _) in enumerate(made):
        target.array[:] = pattern(block * num_blocks, i)
    groups = np.array([(local.region, remote, 0, 3) for local, _, remote in made])
    mine, theirs = np.array([0, 1, 5]) * block, np.array([6, 7, 2]) * block
    request = succeeded(link.here.post(False, link.peer, groups, mine, theirs, np.full(3, block)))
    assert (request.num_entries, request.num_segments) == (3 * num_layers, 2 * num_layers)
    for local, target, remote in made:
        expected = np.zeros_like(local.array)
        expected[: 2 * block], expected[5 * block : 6 * block] = (
            target.array[6 * block :],
            target.array[2 * block :][:block],
        )
        assert np.array_equal(local.array, expected)
        drop(link, local, target, remote)


def test_empty_batches_end_in_order(link: Link, path: str) -> None:
    local, target, remote = memories(link, 4096, path)
    requests = [link.read(local, remote, entries) for entries in ([(0, 0, 4096)], [], [(5, 6, 0)])]
    succeeded(requests[-1])
    assert all(r.done() for r in requests)
    assert [r.size_bytes for r in requests] == [4096, 0, 0] and requests[1].paths == []
    drop(link, local, target, remote)


def test_notification_never_overtakes_the_data(link: Link, path: str) -> None:
    slot, rounds = 1 << 15, 100
    local, target, remote = memories(link, slot * rounds, path)
    local.array[:] = pattern(slot * rounds, 8)
    for i in range(rounds):
        link.write(local, remote, [(i * slot, i * slot, slot)])
        link.here.notify(link.peer, str(i).encode())
    for i in range(rounds):
        assert wait_event(link.there, "notification")[3] == str(i).encode()
        assert np.array_equal(target.array[i * slot : (i + 1) * slot], local.array[i * slot : (i + 1) * slot])
    succeeded(link.here.notify(link.peer, b"last"))
    wait_event(link.there, "notification")
    drop(link, local, target, remote)


def test_notifications_arrive_exactly_once_in_order() -> None:
    count = 100_000
    with linked() as link:
        senders = [(link.here, link.peer, link.there, link.back), (link.there, link.back, link.here, link.peer)]
        lasts = {}

        def send(engine: _C.Engine, peer: int) -> None:
            for i in range(count // 2):
                request = engine.notify(peer, b"%d" % i)
            lasts[engine] = request

        threads = [threading.Thread(target=send, args=sender[:2]) for sender in senders]
        for thread in threads:
            thread.start()
        for _, _, engine, peer in senders:
            for i in range(count // 2):
                assert engine.next_event(WAIT_S) == ("notification", peer, i + 1, b"%d" % i)
                assert i % 1000 or engine.stats()["num_dropped_messages"] == 0
        for thread in threads:
            thread.join(WAIT_S)
        for engine, request in lasts.items():
            succeeded(request)
            assert engine.next_event(0.0) is None
            stats = engine.stats()
            assert (stats["num_notifications_sent"], stats["num_notifications_received"]) == (count // 2, count // 2)
            assert stats["num_dropped_messages"] == 0


def test_largest_notification_arrives_and_a_larger_one_is_refused(any_link: Link) -> None:
    payload = pattern(1 << 20, 0).tobytes()
    succeeded(any_link.here.notify(any_link.peer, payload))
    assert any_link.there.next_event(WAIT_S) == ("notification", any_link.back, 1, payload)
    succeeded(any_link.here.notify(any_link.peer, b""))
    assert any_link.there.next_event(WAIT_S) == ("notification", any_link.back, 2, b"")
    with pytest.raises(ValueError, match="max_message_bytes=1048576 bytes, got 1048577"):
        any_link.here.notify(any_link.peer, payload + b"x")


def test_thousands_of_regions(any_link: Link) -> None:
    count, size = 3000, 256
    target, local = np.zeros(count * size, np.uint8), np.zeros(count * size, np.uint8)
    target[:] = pattern(target.size, 1)
    groups = []
    for i in range(count):
        there = any_link.there.register_memory(target.ctypes.data + i * size, size)
        key = any_link.there.remote_key(there)
        remote = any_link.here.import_remote(any_link.peer, key, target.ctypes.data + i * size, size)
        groups.append((any_link.here.register_memory(local.ctypes.data + (count - 1 - i) * size, size), remote, 0, 1))
    zero, length = np.array([0]), np.array([size])
    succeeded(any_link.here.post(False, any_link.peer, np.array(groups), zero, zero, length))
    assert np.array_equal(local.reshape(count, size)[::-1], target.reshape(count, size))
    assert any_link.here.stats()["num_remotes"] == any_link.here.stats()["num_regions"] == count


def _available_bytes() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def test_one_entry_of_more_than_4_gib() -> None:
    size = (1 << 32) + (1 << 20)
    needed = size + (2 << 30)
    if _C.build_info()["sanitize"] == "thread":
        pytest.skip("the thread sanitizer keeps notes of several times this memory")
    if _available_bytes() < needed:
        pytest.skip(f"needs {needed >> 30} GiB of memory, {_available_bytes() >> 30} are available")
    # Private and untouched, the source takes no memory: it is one page of zeros many times.
    there = np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE), np.uint8)
    here = np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE), np.uint8)
    there[:100], there[-100:] = 1, 2
    with linked("cma") as link:
        target = Memory(link.there, link.there.register_memory(there.ctypes.data, size), there)
        local = Memory(link.here, link.here.register_memory(here.ctypes.data, size), here)
        request = succeeded(link.read(local, target.imported_by(link.here, link.peer), [(0, 0, size)]))
        assert request.size_bytes == size
    assert here[:100].tolist() == [1] * 100 and here[-100:].tolist() == [2] * 100 and not here[100:-100:997].any()


def test_long_batch_does_not_hold_up_another_peer() -> None:
    with linked("shm", slice_bytes=4096, test_slice_delay_us=2000) as link:
        other = new_engine("shm")
        try:
            peer, _ = connect(link.here, other)
            local, _, remote = memories(link, 2000 * 4096)
            target = new_memory(other, 4096)
            near = new_memory(link.here, 4096)
            far = target.imported_by(link.here, peer)
            long = link.read(local, remote, [(0, 0, 2000 * 4096)])
            short = succeeded(post(link.here, False, peer, near, far, [(0, 0, 4096)]))
            assert not long.done() and short.finished_ns - short.posted_ns < 2e9
        finally:
            other.close()


def test_peer_comes_back_after_it_was_removed(any_link: Link) -> None:
    _, _, remote = memories(any_link, 4096)
    any_link.here.remove_peer(any_link.peer)
    assert wait_event(any_link.there, "lost") == ("lost", any_link.back, "it left in good order", True)
    with pytest.raises(ValueError, match=f"no remote {remote}"):
        any_link.here.remote_path(remote)
    with pytest.raises(ValueError, match=f"no peer {any_link.peer}"):
        any_link.here.notify(any_link.peer, b"")
    again, back = connect(any_link.here, any_link.there)
    assert again > any_link.peer and back > any_link.back
    succeeded(any_link.here.notify(again, b"x"))
    assert any_link.there.next_event(WAIT_S) == ("notification", back, 1, b"x")


def test_many_threads_share_an_engine(any_link: Link) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for i in range(30):
                local, target, remote = memories(any_link, 8192, "cma" if i % 2 else "shm")
                target.array[:] = pattern(8192, seed + i)
                batch = any_link.read(local, remote, [(0, 4096, 4096), (4096, 0, 4096)])
                any_link.here.notify(any_link.peer, b"%d" % seed)
                any_link.here.peer_state(any_link.peer)
                succeeded(batch)
                assert np.array_equal(np.roll(local.array, 4096), target.array)
                drop(any_link, local, target, remote)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    ids = [wait_event(any_link.there, "notification")[2] for _ in range(120)]
    for thread in threads:
        thread.join(WAIT_S)
    assert not failures and ids == list(range(1, 121))
    assert (any_link.here.stats()["num_regions"], any_link.here.stats()["num_remotes"]) == (0, 0)


def test_watched_requests_give_one_event_each(any_link: Link) -> None:
    before, after = any_link.here.notify(any_link.peer, b""), any_link.here.notify(any_link.peer, b"")
    before.watch()
    succeeded(after)
    assert any_link.here.next_event(WAIT_S) == ("done", before.id)
    after.watch()
    after.watch()
    assert any_link.here.next_event(WAIT_S) == ("done", after.id) and any_link.here.next_event(0.0) is None


def test_wake_ends_a_wait_for_events(any_link: Link) -> None:
    found: list[_C.Event | None] = []
    thread = threading.Thread(target=lambda: found.append(any_link.here.next_event(WAIT_S)))
    thread.start()
    any_link.here.wake()
    thread.join(WAIT_S / 2)
    assert found == [None] and not thread.is_alive()


def test_idle_engines_cost_little(any_link: Link) -> None:
    others = [new_engine() for _ in range(3)]
    try:
        for other in others:
            connect(any_link.here, other)
        began_s, used_s = time.monotonic(), any_link.here.stats()["progress_cpu_s"]
        assert any_link.here.next_event(3.0) is None
        used_s = any_link.here.stats()["progress_cpu_s"] - used_s
        assert used_s < 0.02 * (time.monotonic() - began_s), any_link.here.stats()
    finally:
        for other in others:
            other.close()


def test_close_ends_requests_and_gives_everything_back() -> None:
    def held() -> tuple[int, list[str], int]:
        with open("/proc/self/maps") as lines:
            segments = sum("ucx_shm" in line for line in lines)
        return len(os.listdir("/proc/self/fd")), sorted(os.listdir("/dev/shm")), segments

    def cycle() -> None:
        with linked("shm", slice_bytes=4096, test_slice_delay_us=50_000) as link:
            local, _, remote = memories(link, 1 << 20)
            assert held()[2] >= 3  # memory here, memory there, and the latter mapped here
            requests = [link.read(local, remote, [(0, 0, 1 << 20)]), link.here.notify(link.peer, b"")]
            link.here.close()
            assert [ended(r).error_kind() for r in requests] == ["closed", "closed"]
            assert "read of 1 entries" in str(requests[0].error()) and "peer 'there'" in str(requests[0].error())
            link.here.close()
            with pytest.raises(RuntimeError, match="the engine is closed"):
                link.here.notify(link.peer, b"")
            with pytest.raises(RuntimeError, match="the engine is closed"):
                link.here.allocate(10)
            assert link.here.next_event(0.0) is None
            assert wait_event(link.there, "lost")[3] is True

    cycle()
    before = held()
    for _ in range(3):
        cycle()
    assert held() == before


def test_info_names_library_and_transports(any_link: Link) -> None:
    info = any_link.here.info()
    assert info["tls"] == "posix,tcp,self" and info["version"].count(".") == 2
    assert {name.partition("/")[0] for name in info["transports"]} == {"posix", "tcp", "self"}
    succeeded(any_link.here.notify(any_link.peer, b""))
    state = any_link.here.peer_state(any_link.peer)
    assert (state["name"], state["state"], state["reason"]) == ("there", "established", "")
    assert state["transports"] and state["transports"][0].startswith("tcp/") and 0 < state["lease_left_s"] <= 20
