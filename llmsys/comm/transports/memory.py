"""Regions, keys and batches of transports that are written in Python."""

from __future__ import annotations

import itertools
import struct
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from llmsys.comm.transports.base import Copies, Peer, Region, RemoteRegion, check_copies
from llmsys.core.errors import DescriptorError, InputError

_MAGIC = b"LKEY"
_VERSION = 1
# magic, version, address, size, lengths of transport, device and the transport's own part
_KEY = struct.Struct("<4sHQQHHI")
_CHECKSUM_BYTES = 4


def pack_key(transport: str, *, address: int, size_bytes: int, device: str, inner: bytes) -> bytes:
    """A remote key: what it is for, the transport's own part `inner`, and a checksum (CRC-32) of all."""
    names = transport.encode(), device.encode()
    head = _KEY.pack(_MAGIC, _VERSION, address, size_bytes, len(names[0]), len(names[1]), len(inner))
    packed = head + names[0] + names[1] + inner
    return packed + zlib.crc32(packed).to_bytes(_CHECKSUM_BYTES, "little")


def unpack_key(transport: str, key: bytes, *, address: int, size_bytes: int, device: str) -> bytes:
    """The `inner` of a key that `pack_key` made for just these values; DescriptorError for any other."""
    packed, checksum = key[:-_CHECKSUM_BYTES], key[-_CHECKSUM_BYTES:]
    if len(packed) < _KEY.size or zlib.crc32(packed).to_bytes(_CHECKSUM_BYTES, "little") != checksum:
        raise _bad_key("is damaged", "a whole key with the right checksum", f"{len(key)} bytes")
    magic, version, key_address, key_size, *lengths = _KEY.unpack_from(packed)
    if (magic, version) != (_MAGIC, _VERSION) or len(packed) != _KEY.size + sum(lengths):
        raise _bad_key("is of another kind", f"a key of version {_VERSION}", f"{magic!r}, version {version}")
    ends = list(itertools.accumulate(lengths, initial=_KEY.size))
    key_transport, key_device, inner = (packed[begin:end] for begin, end in itertools.pairwise(ends))
    said = (key_transport.decode("utf-8", "replace"), key_address, key_size, key_device.decode("utf-8", "replace"))
    if said != (transport, address, size_bytes, device):
        raise _bad_key(
            "is of another region",
            f"{transport}, {size_bytes} bytes at {address:#x}, device {device}",
            f"{said[0]}, {said[2]} bytes at {said[1]:#x}, device {said[3]}",
        )
    return inner


def _bad_key(problem: str, expected: str, found: str) -> DescriptorError:
    return DescriptorError(
        f"the remote key {problem}",
        expected=expected,
        found=found,
        fix="send address, size_bytes, device and remote_key of the peer's Region unchanged, and of one transport",
    )


@dataclass(slots=True)
class _Held:
    region: Region
    owner: object
    num_users: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A checked batch: groups without empty entries, coalesced if that was asked for."""

    write: bool
    groups: tuple[Copies, ...]
    num_entries: int
    num_segments: int
    size_bytes: int
    region_ids: tuple[int, ...] = field(repr=False)

    def describe(self, peer: Peer) -> str:
        """For messages: what it is."""
        word = f"write of {self.num_entries} blocks to" if self.write else f"read of {self.num_entries} blocks from"
        return f"{word} {peer}"


class MemoryTable:
    """The regions registered here and those imported from peers. Thread safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._held: dict[int, _Held] = {}
        self._remote: dict[int, RemoteRegion] = {}

    def new_id(self) -> int:
        return next(self._ids)

    def add(self, region: Region, owner: object) -> None:
        with self._lock:
            self._held[region.region_id] = _Held(region, owner)

    def remove(self, region: Region) -> object:
        """Its owner, which must stay alive as long as the library may touch the memory.

        Raises:
            InputError: it is not registered, or a request uses it.
        """
        with self._lock:
            held = self._held.get(region.region_id)
            if held is None or held.region != region:
                raise _unknown_region(region)
            if held.num_users:
                raise InputError(
                    f"region {region.region_id} is in use",
                    expected="no request that reads or writes it",
                    found=f"{held.num_users} of them",
                    fix="wait for the requests before releasing their memory",
                )
            del self._held[region.region_id]
            return held.owner

    def find(self, region_id: int) -> Region | None:
        with self._lock:
            held = self._held.get(region_id)
            return held.region if held else None

    def add_remote(self, remote: RemoteRegion) -> None:
        with self._lock:
            self._remote[remote.remote_id] = remote

    def remove_remote(self, remote: RemoteRegion) -> bool:
        """Whether it was there."""
        with self._lock:
            return self._remote.pop(remote.remote_id, None) is not None

    def remove_remotes_of(self, peer: Peer) -> tuple[RemoteRegion, ...]:
        with self._lock:
            gone = tuple(remote for remote in self._remote.values() if remote.peer_id == peer.peer_id)
            for remote in gone:
                del self._remote[remote.remote_id]
            return gone

    def begin_batch(self, peer: Peer, copies: Sequence[Copies], *, write: bool, coalesce: bool) -> Batch:
        """Checks everything and marks the local regions as used until `end_batch`.

        Raises:
            InputError: a region of another peer, unknown, or left by an entry; or destinations that overlap.
        """
        check_copies(copies, peer)
        for index, group in enumerate(copies):
            _check_bounds(group, index)
        _check_overlap(copies, write)
        groups = tuple(coalesce_copies(group, write=write) if coalesce else drop_empty(group) for group in copies)
        region_ids = tuple({group.local.region_id for group in copies})
        with self._lock:
            for group in copies:
                held = self._held.get(group.local.region_id)
                if held is None or held.region != group.local:
                    raise _unknown_region(group.local)
                if self._remote.get(group.remote.remote_id) != group.remote:
                    raise InputError(
                        f"remote region {group.remote.remote_id} is not imported",
                        expected="what import_region returned, before forget_region",
                        found=f"{group.remote}",
                        fix="import the region again",
                    )
            for region_id in region_ids:
                self._held[region_id].num_users += 1
        return Batch(
            write=write,
            groups=groups,
            num_entries=sum(group.lengths.size for group in copies),
            num_segments=sum(group.lengths.size for group in groups),
            size_bytes=sum(int(group.lengths.sum()) for group in groups),
            region_ids=region_ids,
        )

    def end_batch(self, batch: Batch) -> None:
        with self._lock:
            for region_id in batch.region_ids:
                self._held[region_id].num_users -= 1


def _unknown_region(region: Region) -> InputError:
    return InputError(
        f"region {region.region_id} is not registered",
        expected="what register or allocate of this transport returned, before release",
        found=f"{region}",
        fix="register the memory with the transport that the request is posted on",
    )


def _check_bounds(group: Copies, index: int) -> None:
    sides = (
        ("local", group.local_offsets, group.local.size_bytes),
        ("remote", group.remote_offsets, group.remote.size_bytes),
    )
    for side, offsets, size_bytes in sides:
        # size_bytes - lengths cannot overflow once lengths are in range, offsets + lengths could.
        wrong = (group.lengths < 0) | (group.lengths > size_bytes) | (offsets < 0)
        wrong |= offsets > size_bytes - np.where(wrong, 0, group.lengths)
        if wrong.any():
            entry = int(np.flatnonzero(wrong)[0])
            raise InputError(
                f"entry {entry} of group {index} leaves its {side} region",
                expected=f"0 <= offset, 0 <= length, offset + length <= {size_bytes}",
                found=f"offset {int(offsets[entry])}, length {int(group.lengths[entry])}",
                fix="correct the entry, or register the whole memory that it means",
            )


def _check_overlap(copies: Sequence[Copies], write: bool) -> None:
    if not copies:
        return
    begins, lengths = (
        np.concatenate(parts)
        for parts in zip(*((_destination(group, write), group.lengths) for group in copies), strict=True)
    )
    kept = np.flatnonzero(lengths)
    order = kept[np.argsort(begins[kept], kind="stable")]
    begins, ends = begins[order], (begins + lengths)[order]
    wrong = np.flatnonzero(ends[:-1] > begins[1:])
    if wrong.size:
        first, second = int(order[wrong[0]]), int(order[wrong[0] + 1])
        raise InputError(
            f"entries {first} and {second} of the batch write to the same bytes",
            expected="destinations that do not overlap (entries are counted over all groups)",
            found=f"[{begins[wrong[0]]:#x}, {ends[wrong[0]]:#x}) and a range from {begins[wrong[0] + 1]:#x}",
            fix="remove the entry that is there twice, or post two batches",
        )


def _destination(group: Copies, write: bool) -> NDArray[np.int64]:
    if write:
        return group.remote_offsets + group.remote.address
    return group.local_offsets + group.local.address


def drop_empty(group: Copies) -> Copies:
    """The entries with at least one byte, in the same order; never the caller's arrays."""
    return _select(group, np.flatnonzero(group.lengths))


def coalesce_copies(group: Copies, *, write: bool) -> Copies:
    """The fewest entries that copy the same bytes: sorted by destination, adjacent ones joined, empty ones dropped.

    Entries are joined where one begins at the end of the other on both sides.
    """
    group = drop_empty(group)
    destinations = group.remote_offsets if write else group.local_offsets
    group = _select(group, np.argsort(destinations, kind="stable"))
    if group.lengths.size < 2:
        return group
    joins = np.ones(group.lengths.size, dtype=bool)
    joins[0] = False
    for offsets in (group.local_offsets, group.remote_offsets):
        joins[1:] &= offsets[:-1] + group.lengths[:-1] == offsets[1:]
    heads = np.flatnonzero(~joins)
    lengths = np.add.reduceat(group.lengths, heads)
    return replace(_select(group, heads), lengths=lengths) if heads.size < joins.size else group


def _select(group: Copies, indices: NDArray[np.intp]) -> Copies:
    return replace(
        group,
        local_offsets=group.local_offsets[indices],
        remote_offsets=group.remote_offsets[indices],
        lengths=group.lengths[indices],
    )
