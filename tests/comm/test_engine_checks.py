"""What the native engine refuses: bad batches, ids, keys, options and libraries, and memory that is in use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from llmsys import _C
from tests.comm.engines import Link, linked, memories, new_engine, new_memory, succeeded, tcp_pair

pytestmark = pytest.mark.native


@pytest.fixture
def any_link() -> Iterator[Link]:
    with linked() as made:
        yield made


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([(0, 0, 4096), (1, 0, 4096)], "entry 1 of group 0 is out of bounds: local offset 1 of 4096"),
        ([(0, 1, 4096)], "remote offset 1 of 4096 bytes, length 4096"),
        ([(0, 0, 1), (4097, 0, 0)], "entry 1 .*local offset 4097"),
        ([(-1, 0, 1)], "local offset -1"),
        ([(0, 0, -1)], "length -1"),
        ([(0, 0, (1 << 63) - 1)], "length 9223372036854775807"),
        ([((1 << 63) - 1, 0, 2)], "local offset 9223372036854775807"),
        ([(0, 0, 100), (99, 200, 100)], "entries 0 and 1 of a batch have local bytes in common"),
    ],
)
def test_bad_entries_are_refused_before_anything_moves(any_link: Link, entries: Any, expected: str) -> None:
    local, target, remote = memories(any_link, 4096)
    target.array[:] = 1
    with pytest.raises(ValueError, match=expected):
        any_link.read(local, remote, entries)
    succeeded(any_link.here.notify(any_link.peer, b""))
    assert not local.array.any()


def test_bad_groups_and_ids_are_refused(any_link: Link) -> None:
    local, target, remote = memories(any_link, 4096)
    other = target.imported_by(any_link.here, any_link.peer)
    here, one = any_link.here, np.array([64])

    def read(*groups: tuple[int, int, int, int], peer: int = any_link.peer) -> _C.Request:
        return here.post(False, peer, np.array(groups, np.int64).reshape(-1, 4), one, one, one)

    for group, expected in (
        ((99, remote, 0, 1), "no region 99"),
        ((local.region, 99, 0, 1), "no remote 99"),
        ((local.region, remote, 0, 2), "group 0 has entries 0 to 2, out of 1"),
        ((local.region, remote, 1, 0), "entries 1 to 0"),
        ((local.region, remote, -1, 1), "entries -1 to 1"),
    ):
        with pytest.raises(ValueError, match=expected):
            read(group)
    with pytest.raises(ValueError, match="there is no peer 7"):
        read(peer=7)
    # Two remotes, one destination.
    with pytest.raises(ValueError, match="two groups of a batch have the same destination"):
        read((local.region, remote, 0, 1), (local.region, other, 0, 1))
    with pytest.raises(ValueError, match="two groups of a batch have the same destination"):
        here.post(
            True, any_link.peer, np.array([(local.region, remote, 0, 1), (local.region, other, 0, 1)]), one, one, one
        )
    with pytest.raises(ValueError, match="a group has 4 values"):
        here.post(False, any_link.peer, np.zeros((1, 3), np.int64), one, one, one)
    with pytest.raises(ValueError, match="size_bytes must be positive"):
        here.allocate(0)
    with pytest.raises(ValueError, match="size_bytes must be positive"):
        here.register_memory(local.address, 0)
    with pytest.raises(ValueError, match="device must be cpu or cuda, got tpu"):
        here.register_memory(local.address, 1, "tpu")


def test_damaged_and_foreign_keys_are_refused(any_link: Link) -> None:
    _, target, _ = memories(any_link, 4096)
    key = any_link.there.remote_key(target.region)
    stranger = new_engine()

    def imported(key: bytes, address: int = target.address, size: int = 4096, device: str = "cpu") -> None:
        any_link.here.import_remote(any_link.peer, key, address, size, device)

    try:
        memory = new_memory(stranger, 4096)
        foreign = stranger.remote_key(memory.region)
        for i in range(len(key)):
            with pytest.raises(ValueError, match="remote key"):
                imported(key[:i] + bytes([key[i] ^ 1]) + key[i + 1 :])
        for wrong in (b"", key[:-1], key + b"x", os.urandom(len(key)), any_link.there.worker_address()):
            with pytest.raises(ValueError, match="remote key"):
                imported(wrong)
        with pytest.raises(ValueError, match="made by another engine than that of peer 'there'"):
            imported(foreign, memory.address)
        for address, size in ((target.address - 1, 2), (target.address, 4097), (target.address + 4096, 1), (0, 1)):
            with pytest.raises(ValueError, match="not inside the region of the key"):
                imported(key, address, size)
        with pytest.raises(ValueError, match="device is cuda, the key is of memory on cpu"):
            imported(key, device="cuda")
        imported(key, target.address + 4095, 1)
        for address in (b"", key, os.urandom(300)):
            with pytest.raises(ValueError, match="worker address"):
                any_link.here.add_peer("x", tcp_pair()[0].detach(), address, 1 << 63, 1, 20.0)
    finally:
        stranger.close()


def test_memory_in_use_cannot_be_released() -> None:
    with linked("shm", slice_bytes=4096, test_slice_delay_us=20_000) as link:
        local, _, remote = memories(link, 8 * 4096)
        request = link.read(local, remote, [(0, 0, 8 * 4096)])
        with pytest.raises(ValueError, match=f"region {local.region} is used 1 times by requests"):
            link.here.release(local.region)
        with pytest.raises(ValueError, match=f"remote {remote} is used 1 times by requests"):
            link.here.drop_remote(remote)
        succeeded(request)
        link.here.drop_remote(remote)
        link.here.release(local.region)
        with pytest.raises(ValueError, match="no region"):
            link.here.release(local.region)


def test_wrong_options_and_libraries_are_refused(tmp_path: Any) -> None:
    for options, expected in (
        ({"ucx_config": {"NO_SUCH": "1"}}, "UCX setting NO_SUCH=1 is refused"),
        ({"heartbeat_s": 0.0}, "heartbeat_s must be at least"),
        ({"heartbeat_s": 1.0, "lease_s": 1.5}, "lease_s must be at least twice heartbeat_s, got 1.5 and 1"),
        ({"slice_bytes": 0}, "slice_bytes must be between"),
        ({"window": 0}, "window must be positive"),
    ):
        with pytest.raises(ValueError, match=expected):
            new_engine(**options)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="cannot load UCX from"):
        _C.Engine(str(tmp_path / "nothing"))
    with pytest.raises(RuntimeError, match="not a usable libucp"):
        _C.Engine("libc.so.6")
