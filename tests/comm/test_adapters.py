"""Transports on other people's libraries: what they say without them, their settings, and what is theirs alone."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llmsys.comm.transports import available_transports
from llmsys.comm.transports.base import Copies, Peer, Region, RemoteRegion, Transport, TransportConfig
from llmsys.comm.transports.batch_parts import parts_of
from llmsys.comm.transports.gloo import GlooOptions, GlooTransport
from llmsys.comm.transports.gloo_pair import Blocks, pack_blocks, unpack_blocks
from llmsys.comm.transports.memory import MemoryTable
from llmsys.comm.transports.nixl import NixlOptions, NixlTransport
from llmsys.comm.transports.nixl_link import PACKAGES, Segments, _Segment
from llmsys.comm.transports.ucx_py import UcxPyTransport
from llmsys.core.errors import ConfigError, DescriptorError
from tests.comm.conftest import copies
from tests.comm.endpoint import SECRET, WAIT_S, pattern

NIXL_PROBLEM = NixlTransport.available()
needs_nixl = pytest.mark.skipif(NIXL_PROBLEM is not None, reason=f"nixl: {NIXL_PROBLEM}")


# -- without their libraries -------------------------------------------------------------------------------------------


def test_gloo_is_always_there() -> None:
    assert available_transports()["gloo"] is None


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """No optional package can be found."""
    found = importlib.util.find_spec
    names = (*PACKAGES, "ucp")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in names else found(name, *rest))


@pytest.mark.usefixtures("hidden")
def test_what_to_install() -> None:
    found = available_transports()
    assert "pip install --no-deps nixl-cu12" in str(found["nixl"])
    assert "not installed" in str(found["ucx_py"]) and "libucx-cu12" in str(found["ucx_py"])


def test_nixl_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in PACKAGES)
    monkeypatch.setitem(sys.modules, f"{PACKAGES[0]}._bindings", None)
    assert "ModuleNotFoundError" in str(NixlTransport.available())


def fake_ucp(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in ("ucp", "ucp._libs", "ucp._libs.ucx_api"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    spec = importlib.util.spec_from_loader("ucp", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    for name in names:
        setattr(sys.modules["ucp._libs.ucx_api"], name, object)


def test_ucx_py_is_asked_for_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only which names are looked for: nothing here stands for ucx-py's behaviour."""
    names = ["UCXContext", "UCXWorker", "UCXEndpoint", "UCXAddress", "UCXMemoryHandle", "PackedRemoteKey"]
    fake_ucp(monkeypatch, *names)
    assert "RemoteMemory" in str(UcxPyTransport.available()) and "0.45" in str(UcxPyTransport.available())
    fake_ucp(monkeypatch, *names, "RemoteMemory")
    assert UcxPyTransport.available() is None


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"progress": "sometimes"}, {"num_threads": -1}, {"slice_bytes": 0}])
def test_nixl_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        NixlOptions(**settings)
    assert next(str(value) for value in settings.values()) in caught.value.found


def test_a_comma_in_a_ucx_setting_of_nixl() -> None:
    assert NixlOptions(ucx_config="TLS=tcp,NET_DEVICES=lo").ucx_config
    with pytest.raises(ConfigError) as caught:
        NixlOptions(ucx_config="TLS=tcp,self")
    assert "'self'" in caught.value.found and "environment" in caught.value.fix


@pytest.mark.parametrize("settings", [{"max_messages": 0}, {"slice_bytes": 0}])
def test_gloo_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GlooOptions(**settings)


# -- parts and packing -------------------------------------------------------------------------------------------------


def random_blocks(rng: np.random.Generator, kind: str) -> Blocks:
    """Blocks of one size where NumPy can take them as items ("grid"), of one size elsewhere, or of any size."""
    memories = [rng.integers(0, 256, 5000, dtype=np.uint8) for _ in range(3)]
    which = np.sort(rng.integers(0, 3, 40))
    lengths = rng.integers(1, 120, 40) if kind == "any" else np.full(40, 100)
    places = rng.permutation(5000 // 120)[:40]
    offsets = places * (100 if kind == "grid" else 120)
    return Blocks(memories=memories, which=which, offsets=offsets, lengths=lengths)


@pytest.mark.parametrize("kind", ["grid", "one size", "any"])
def test_packing_is_what_a_loop_does(kind: str) -> None:
    blocks = random_blocks(np.random.default_rng(3), kind)
    rows = list(zip(blocks.which, blocks.offsets, blocks.lengths, strict=True))
    expected = np.concatenate([blocks.memories[w][o : o + n] for w, o, n in rows])
    packed = np.zeros(expected.size, dtype=np.uint8)
    pack_blocks(blocks, packed)
    np.testing.assert_array_equal(packed, expected)
    wanted = [memory.copy() for memory in blocks.memories]
    packed ^= 0xFF
    begin = 0
    for w, o, n in rows:
        wanted[w][o : o + n] = packed[begin : begin + n]
        begin += n
    unpack_blocks(blocks, packed)
    for memory, want in zip(blocks.memories, wanted, strict=True):
        np.testing.assert_array_equal(memory, want)


def test_parts_keep_every_byte_and_the_limits() -> None:
    table, rng = MemoryTable(), np.random.default_rng(0)
    peer = Peer(peer_id=1, name="peer", generation=1, address="")
    groups = []
    for number in range(3):
        local = Region(region_id=number, address=1 << (20 + number), size_bytes=10_000, device="cpu", remote_key=b"")
        remote = RemoteRegion(
            remote_id=number, peer_id=1, address=7 << (24 + number), size_bytes=10_000, device="cpu", path=""
        )
        table.add(local, None)
        table.add_remote(remote)
        lengths = rng.integers(0, 400, 20)
        begins = np.cumsum(lengths) - lengths
        order = rng.permutation(20)
        groups.append(
            Copies(
                local=local,
                remote=remote,
                local_offsets=begins[order],
                remote_offsets=begins[order] + 5,
                lengths=lengths[order],
            )
        )
    batch = table.begin_batch(peer, groups, write=False, coalesce=False)
    for max_bytes, max_entries in [(100, 3), (150, 1000), (1, 7), (1 << 30, 1 << 30)]:
        parts = list(parts_of(batch, max_bytes=max_bytes, max_entries=max_entries))
        assert all(part.lengths.sum() <= max_bytes and part.lengths.size <= max_entries for part in parts)
        found = [
            (group, local + byte, remote + byte)
            for part in parts
            for group, local, remote, length in zip(
                part.groups, part.local_addresses, part.remote_addresses, part.lengths, strict=True
            )
            for byte in range(length)
        ]
        wanted = [
            (index, group.local.address + local + byte, group.remote.address + remote + byte)
            for index, group in enumerate(batch.groups)
            for local, remote, length in zip(group.local_offsets, group.remote_offsets, group.lengths, strict=True)
            for byte in range(length)
        ]
        assert found == wanted
    assert not list(parts_of(table.begin_batch(peer, [], write=False, coalesce=True), max_bytes=1, max_entries=1))


# -- two endpoints in one process --------------------------------------------------------------------------------------


class Ends:
    """Two connected endpoints of a transport, and memory of the second one that the first can reach."""

    def __init__(self, cls: Any, options: Any) -> None:
        self.ends: list[Transport] = [
            cls(TransportConfig(secret=SECRET, name=name, lease_s=WAIT_S), options) for name in ("near", "far")
        ]
        self.near, self.far = self.ends
        self.peer = self.near.connect(self.far.local.address, timeout_s=WAIT_S)

    def share(self, memory: Any) -> tuple[Region, RemoteRegion]:
        region = self.far.register(memory.ctypes.data, memory.size, owner=memory)
        return region, self.reach(region)

    def reach(self, region: Region) -> RemoteRegion:
        return self.near.import_region(
            self.peer,
            address=region.address,
            size_bytes=region.size_bytes,
            device=region.device,
            remote_key=region.remote_key,
        )

    def check_both_ways(self) -> None:
        """Reads and writes blocks of several sizes, over several parts."""
        size = 1 << 20
        source, memory = pattern(size, 1), pattern(size, 2)
        _, remote = self.share(source)
        local = self.near.register(memory.ctypes.data, size, owner=memory)
        for block in (4096, 10_007):
            begins = np.arange(size // block) * block
            order = np.random.default_rng(block).permutation(begins.size)
            entries = [(int(to), int(begin), block) for to, begin in zip(begins, begins[order], strict=True)]
            self.near.read(self.peer, [copies(local, remote, *entries)]).wait(WAIT_S)
            for to, begin, _ in entries:
                np.testing.assert_array_equal(memory[to : to + block], source[begin : begin + block])
            memory[:] = pattern(size, block)
            self.near.write(self.peer, [copies(local, remote, *entries)]).wait(WAIT_S)
            for to, begin, _ in entries:
                np.testing.assert_array_equal(source[begin : begin + block], memory[to : to + block])
        self.near.release(local)

    def close(self) -> None:
        for end in self.ends:
            end.close()


@pytest.fixture
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    made = Ends(*request.param)
    yield made
    made.close()


def setting_id(value: Any) -> str:
    return f"{value[0].name}-{value[1]}"


GLOO = [GlooOptions(slice_bytes=100_000), GlooOptions(max_messages=7), GlooOptions(pack=True, slice_bytes=100_000)]
NIXL = [
    NixlOptions(slice_bytes=100_000),
    NixlOptions(progress="poll", ucx_config="TLS=tcp"),
    NixlOptions(progress="spin"),
    NixlOptions(num_threads=1, ucx_config="TLS=tcp,TCP_TX_SEG_SIZE=64k"),
]


@pytest.mark.parametrize(
    "ends",
    [(GlooTransport, options) for options in GLOO]
    + [pytest.param((NixlTransport, options), marks=needs_nixl) for options in NIXL],
    indirect=True,
    ids=setting_id,
)
def test_every_setting_moves_the_bytes(ends: Ends) -> None:
    ends.check_both_ways()


@pytest.mark.parametrize("pack", [True, False])
def test_gloo_describes_its_messages(pack: bool) -> None:
    with GlooTransport(TransportConfig(secret=SECRET), GlooOptions(pack=pack)) as transport:
        assert transport.describe()["messages"] == ("packed" if pack else "one per block")
        assert not transport.capabilities.one_sided and not transport.capabilities.passive


@needs_nixl
def test_nixl_describes_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCX_TLS", raising=False)
    options = NixlOptions(progress="poll", num_threads=2, ucx_config="TLS=tcp")
    with NixlTransport(TransportConfig(secret=SECRET), options) as transport:
        described = transport.describe()
        assert described["library"].startswith("NIXL ") and "UCX 1." in described["library"]
        assert (described["progress"], described["num_threads"], described["transports"]) == (
            "poll",
            "2",
            "UCX_TLS=tcp",
        )
        assert not transport.capabilities.passive
        monkeypatch.setenv("UCX_TLS", "tcp,cma")
        assert transport.capabilities.passive


@needs_nixl
@pytest.mark.parametrize("ends", [(NixlTransport, NixlOptions())], indirect=True, ids=["nixl"])
def test_nixl_sleeps_when_there_is_nothing_to_do(ends: Ends) -> None:
    """As NIXL's own Python API makes it, its thread takes a whole core."""
    ends.check_both_ways()
    used_s, began_s = time.process_time(), time.monotonic()
    time.sleep(2.0)
    assert time.process_time() - used_s < 0.05 * (time.monotonic() - began_s)


@needs_nixl
@pytest.mark.parametrize("ends", [(NixlTransport, NixlOptions())], indirect=True, ids=["nixl"])
def test_nixl_and_memory_that_is_registered_again(ends: Ends) -> None:
    """Another region where one was, larger or smaller: NIXL alone would find the old one and fail."""
    source, memory = pattern(1 << 20, 3), np.zeros(1 << 20, dtype=np.uint8)
    for begin, size in [(0, 1000), (0, 1 << 20), (5000, 10_000), (4096, 1 << 19), (0, 1 << 20)]:
        far = ends.far.register(source.ctypes.data + begin, size, owner=source)
        near = ends.near.register(memory.ctypes.data + begin, size, owner=memory)
        remote = ends.reach(far)
        memory[:] = 0
        entries = [(size - 400, 10, 400), (0, size // 2, 300)]
        ends.near.read(ends.peer, [copies(near, remote, *entries)]).wait(WAIT_S)
        for to, of, length in entries:
            np.testing.assert_array_equal(
                memory[begin + to : begin + to + length], source[begin + of : begin + of + length]
            )
        ends.near.forget_region(remote)
        ends.near.release(near)
        ends.far.release(far)


@needs_nixl
@pytest.mark.parametrize("ends", [(NixlTransport, NixlOptions())], indirect=True, ids=["nixl"])
def test_nixl_and_regions_that_overlap(ends: Ends) -> None:
    """One within another is reached through the larger; local ones are joined; a partial overlap is refused."""
    source, memory = pattern(10_000, 4), np.zeros(10_000, dtype=np.uint8)

    def far(begin: int, size: int) -> RemoteRegion:
        return ends.reach(ends.far.register(source.ctypes.data + begin, size, owner=source))

    inner, outer = far(1000, 500), far(0, 4000)
    again = far(2000, 100)
    with pytest.raises(DescriptorError, match="overlap"):
        far(3900, 200)
    left, right = (ends.near.register(memory.ctypes.data + begin, 6000, owner=memory) for begin in (0, 4000))
    batch = [
        copies(left, inner, (0, 0, 500)),
        copies(right, outer, (5000, 3500, 500), (1000, 1200, 700)),
        copies(left, again, (1000, 20, 80), (3000, 0, 20)),
    ]
    expected = memory.copy()
    for group, base, to_base in zip(batch, (1000, 0, 2000), (0, 4000, 0), strict=True):
        for to, of, length in zip(group.local_offsets, group.remote_offsets, group.lengths, strict=True):
            expected[to_base + to : to_base + to + length] = source[base + of : base + of + length]
    ends.near.read(ends.peer, batch).wait(WAIT_S)
    np.testing.assert_array_equal(memory, expected)
    ends.near.release(left)
    ends.near.read(ends.peer, [copies(right, outer, (0, 0, 4000))]).wait(WAIT_S)
    np.testing.assert_array_equal(memory[4000:8000], source[:4000])


def test_segments_find_what_overlaps() -> None:
    rng = np.random.default_rng(5)
    segments, known = Segments(), {}
    for begin in rng.permutation(50).tolist():
        end = 100 * begin + int(rng.integers(1, 100))
        segments.add(100 * begin, _Segment(end))
        known[100 * begin] = end
    for _ in range(500):
        begin = int(rng.integers(0, 5000))
        end = begin + int(rng.integers(1, 400))
        wanted = sorted(other for other, stop in known.items() if other < end and stop > begin)
        assert [other for other, _ in segments.overlapping(begin, end)] == wanted
        around = segments.containing(begin, end)
        holding = [stop for other, stop in known.items() if other <= begin and end <= stop]
        assert (around.end if around else None) == (holding[0] if holding else None)
        if rng.random() < 0.05 and wanted:
            segments.remove(wanted[0])
            del known[wanted[0]]
