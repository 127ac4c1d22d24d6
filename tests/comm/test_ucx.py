"""The UCX transport itself: a peer that is lost in the middle of a call, what is kept of it, and huge pages."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsys.comm.transports import available_transports
from llmsys.comm.transports.base import Copies, Peer, Region, RemoteRegion, TransportConfig
from llmsys.comm.transports.ucx import UcxTransport
from llmsys.core.errors import PeerLostError

SIZE_BYTES = 4096
WAIT_S = 20.0

pytestmark = pytest.mark.native


class Interrupted:
    """An engine that loses its peer before or after one of its calls."""

    def __init__(self, engine: Any, call: str, lose: Callable[[], None], *, before: bool) -> None:
        self._engine, self._call, self._lose, self._before = engine, call, lose, before

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._engine, name)
        if name != self._call:
            return real

        def interrupted(*arguments: Any, **options: Any) -> Any:
            if self._before:
                self._lose()
                return real(*arguments, **options)
            result = real(*arguments, **options)
            self._lose()
            return result

        return interrupted


class Two:
    """Two endpoints of this process: `here`, connected to `there`, which `lose` closes for good."""

    def __init__(self, here: UcxTransport, there: UcxTransport) -> None:
        self.here, self.there = here, there
        self.exported = there.allocate(SIZE_BYTES)
        self.peer: Peer = here.connect(there.local.address, timeout_s=WAIT_S)

    def lose(self) -> None:
        self.there.close()
        deadline = time.monotonic() + WAIT_S
        while self.here.peers() or self.here.stats()["num_peers"]:
            assert time.monotonic() < deadline, "the peer was not forgotten"
            time.sleep(0.005)

    def import_region(self) -> RemoteRegion:
        region: Region = self.exported
        return self.here.import_region(
            self.peer,
            address=region.address,
            size_bytes=region.size_bytes,
            device=region.device,
            remote_key=region.remote_key,
        )

    def interrupt(self, monkeypatch: pytest.MonkeyPatch, call: str, *, before: bool) -> None:
        engine = Interrupted(self.here._engine, call, self.lose, before=before)
        monkeypatch.setattr(self.here, "_engine", engine)


@pytest.fixture
def two() -> Iterator[Two]:
    if reason := available_transports()["ucx"]:
        pytest.skip(reason)
    config = {"secret": "test", "lease_s": 30.0}
    here = UcxTransport(TransportConfig(name="here", **config))
    with here, UcxTransport(TransportConfig(name="there", **config)) as there:
        yield Two(here, there)


def read(two: Two, local: Region, remote: RemoteRegion) -> None:
    zero = np.zeros(1, dtype=np.int64)
    entries = Copies(local=local, remote=remote, local_offsets=zero, remote_offsets=zero, lengths=zero + SIZE_BYTES)
    two.here.read(two.peer, [entries])


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_peer_that_is_lost_while_its_region_is_imported(
    two: Two, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.interrupt(monkeypatch, "import_remote", before=before)
    with pytest.raises(PeerLostError, match="there"):
        two.import_region()


def test_a_peer_that_is_lost_while_a_batch_is_posted(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    remote, local = two.import_region(), two.here.allocate(SIZE_BYTES)
    two.interrupt(monkeypatch, "post", before=True)
    with pytest.raises(PeerLostError, match="there"):
        read(two, local, remote)


def test_a_peer_that_is_lost_while_it_is_notified(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    two.interrupt(monkeypatch, "notify", before=True)
    with pytest.raises(PeerLostError, match="there"):
        two.here.notify(two.peer, b"x")


def test_a_region_is_forgotten_while_its_peer_is_lost(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = two.import_region()
    two.interrupt(monkeypatch, "drop_remote", before=True)
    two.here.forget_region(remote)


def test_nothing_is_kept_of_a_peer_that_is_lost(two: Two) -> None:
    two.import_region()
    assert two.here.stats()["num_remotes"] == 1
    two.lose()
    assert two.here.stats()["num_peers"] == two.here.stats()["num_remotes"] == 0


MEMORY_BYTES, HUGE_PAGE_BYTES = 32 << 20, 2 << 20
MADV_COLLAPSE = 25  # Linux 6.1; not in the mmap module of this Python


def smaps(address: int, field: str) -> int:
    """Bytes of the kernel's account of the mapping that holds an address: "Rss", or "AnonHugePages"."""
    mappings = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    for mapping in filter(None, mappings):
        begin, end = (int(part, 16) for part in mapping.split(" ", 1)[0].split("-"))
        if begin <= address < end:
            (kilobytes,) = re.findall(rf"(?m)^{field}: +(\d+) kB", mapping)
            return int(kilobytes) << 10
    raise AssertionError(f"nothing is mapped at {address:#x}")


def private_memory() -> np.ndarray[Any, np.dtype[np.uint8]]:
    memory = mmap.mmap(-1, MEMORY_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)


def cannot_collapse() -> str:
    """Why this kernel does not move memory into huge pages when it is asked directly, or nothing."""
    memory = private_memory()
    memory[:] = 1
    begin = -(-memory.ctypes.data // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    libc = ctypes.CDLL(None, use_errno=True)
    for advice in (mmap.MADV_HUGEPAGE, MADV_COLLAPSE):
        if libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(HUGE_PAGE_BYTES), advice):
            return f"madvise({advice}): {os.strerror(ctypes.get_errno())}"
    return ""


def test_registered_memory_in_use_gets_huge_pages_and_keeps_its_content(two: Two) -> None:
    if reason := cannot_collapse():
        pytest.skip(reason)
    memory = private_memory()
    memory[:] = expected = np.random.default_rng(0).integers(0, 256, MEMORY_BYTES, dtype=np.uint8)
    assert smaps(memory.ctypes.data, "AnonHugePages") == 0
    region = two.here.register(memory.ctypes.data, MEMORY_BYTES, owner=memory)
    assert smaps(memory.ctypes.data, "AnonHugePages") >= MEMORY_BYTES // 2
    assert np.array_equal(memory, expected)
    two.here.release(region)


def test_registering_takes_no_memory_that_was_not_touched(two: Two) -> None:
    memory = private_memory()
    region = two.here.register(memory.ctypes.data, MEMORY_BYTES, owner=memory)
    assert smaps(memory.ctypes.data, "Rss") == 0
    two.here.release(region)
