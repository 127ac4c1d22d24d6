"""What the registry's tests share: a transport that only keeps books, and oracles on plain memory."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from llmsys.comm.registry import RemoteRegistry, TensorRegistry
from llmsys.comm.registry.batches import Side
from llmsys.comm.transports.base import Capabilities, Copies, Peer, Region, RemoteRegion, Transport
from llmsys.core.errors import InputError


class BookTransport:
    """Counts registrations and imports, and hands out host memory; it has no peers and moves nothing."""

    name = "book"

    def __init__(self, *, allocates: bool = True, devices: tuple[str, ...] = ("cpu",)) -> None:
        self.capabilities = Capabilities(
            one_sided=True, passive=True, allocates=allocates, shares_process=True, devices=devices
        )
        self.local = Peer(peer_id=0, name="prefill-0", generation=17, address="")
        self.registered: dict[int, tuple[Region, object]] = {}
        self.imported: list[RemoteRegion] = []
        self.forgotten: list[RemoteRegion] = []
        self.busy: set[int] = set()
        self.crowd: threading.Barrier | None = None
        self._ids = itertools.count(1)

    def register(self, address: int, size_bytes: int, *, device: str = "cpu", owner: object = None) -> Region:
        self._meet()
        region_id = next(self._ids)
        key = f"key {region_id}".encode()
        region = Region(region_id=region_id, address=address, size_bytes=size_bytes, device=device, remote_key=key)
        self.registered[region_id] = (region, owner)
        return region

    def allocate(self, size_bytes: int) -> Region:
        memory = (ctypes.c_uint8 * size_bytes)()
        return self.register(ctypes.addressof(memory), size_bytes, owner=memory)

    def release(self, region: Region) -> None:
        if region.region_id in self.busy:
            raise InputError("the region is in use", expected="an idle region", found="a request", fix="wait for it")
        del self.registered[region.region_id]

    def import_region(
        self, peer: Peer, *, address: int, size_bytes: int, device: str, remote_key: bytes
    ) -> RemoteRegion:
        self._meet()
        assert any(
            (r.address, r.size_bytes, r.device, r.remote_key) == (address, size_bytes, device, remote_key)
            for r, _ in self.registered.values()
        )
        remote = RemoteRegion(
            remote_id=next(self._ids),
            peer_id=peer.peer_id,
            address=address,
            size_bytes=size_bytes,
            device=device,
            path="memory",
        )
        self.imported.append(remote)
        return remote

    def _meet(self) -> None:
        """Lets threads that are here at once all go on from here, and one that is alone after a while."""
        if self.crowd is not None:
            with contextlib.suppress(threading.BrokenBarrierError):
                self.crowd.wait(timeout=0.3)

    def forget_region(self, remote: RemoteRegion) -> None:
        self.forgotten.append(remote)


PEER = Peer(peer_id=3, name="prefill-0", generation=17, address="127.0.0.1:9")


def as_transport(book: BookTransport) -> Transport:
    return cast(Transport, book)


def make_registry(**settings: Any) -> tuple[BookTransport, TensorRegistry]:
    book = BookTransport(**settings)
    return book, TensorRegistry(as_transport(book))


def seen_by_peer(registry: TensorRegistry, book: BookTransport) -> RemoteRegistry:
    return RemoteRegistry.import_(PEER, registry.export(), as_transport(book))


def move(batch: Sequence[Copies], into: Side) -> None:
    """Does what a transport does with a batch, one entry after the other."""
    for group in batch:
        entries = zip(group.local_offsets.tolist(), group.remote_offsets.tolist(), group.lengths.tolist(), strict=True)
        for local, remote, length in entries:
            assert 0 <= local <= local + length <= group.local.size_bytes
            assert 0 <= remote <= remote + length <= group.remote.size_bytes
            here, there = group.local.address + local, group.remote.address + remote
            ctypes.memmove(*((here, there) if into == "local" else (there, here)), length)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The elements in C order."""
    flat = tensor.contiguous()
    return ctypes.string_at(flat.data_ptr(), flat.numel() * flat.element_size()) if flat.numel() else b""


def storage_bytes(tensor: torch.Tensor) -> bytes:
    storage = tensor.untyped_storage()
    return ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""


def random_tensor(rng: np.random.Generator, dtype: torch.dtype, *, shape: Sequence[int] | None = None) -> torch.Tensor:
    """Random bytes as a tensor that is a random strided view of a larger storage: permuted, stepped, cut, offset.

    Of the given shape; without one, of up to four dimensions, now and then with no elements, 0-d or expanded.
    """
    free = shape is None
    sizes = list(rng.integers(0 if rng.random() < 0.1 else 1, 6, size=rng.integers(0, 5))) if shape is None else shape
    order = rng.permutation(len(sizes)).tolist()
    steps = rng.choice([1, 1, 1, 2, 3], size=len(sizes)).tolist()
    margins = rng.choice([0, 0, 1], size=len(sizes)).tolist()
    full = [int(sizes[dim]) * steps[dim] + margins[dim] for dim in order]
    count = int(np.prod(full, dtype=np.int64))
    lead = int(rng.integers(1, 4))
    raw = torch.from_numpy(rng.integers(0, 2, size=(count + lead) * dtype.itemsize, dtype=np.uint8))
    if dtype != torch.bool:
        raw = torch.from_numpy(rng.integers(0, 256, size=raw.numel(), dtype=np.uint8))
    tensor = raw.view(dtype)[lead:].view(full).permute(np.argsort(order).tolist())
    for dim, size in enumerate(sizes):
        tensor = tensor[
            (slice(None),) * dim + (slice(margins[dim], margins[dim] + int(size) * steps[dim], steps[dim]),)
        ]
    if free and rng.random() < 0.2:
        tensor = tensor.unsqueeze(0).expand(int(rng.integers(1, 4)), *tensor.shape)
    return tensor


def element_offsets(tensor: torch.Tensor) -> torch.Tensor:
    """For each element, its number in the storage: an oracle that follows any torch indexing."""
    numbers = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
    return numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def bytes_at(offsets: torch.Tensor, itemsize: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The number of every byte of the elements, in order."""
    starts = offsets.reshape(-1).numpy() * itemsize
    return np.add.outer(starts, np.arange(itemsize)).reshape(-1)
