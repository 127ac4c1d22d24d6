"""Two processes joined by gloo, and the messages of a part of a batch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed.distributed_c10d as c10d
from numpy.typing import NDArray
from torch._C._distributed_c10d import Store, Work

from llmsys.comm.transports.base import Offsets
from llmsys.comm.transports.batch_parts import Bytes
from llmsys.core.errors import TransportError

_TAG, _CLOSING_TAG = 1, 2
_WORLD_SIZE = 2
# Addresses are known by then, so this is for slow machines.
_JOIN_S = 10.0
# torch's stubs leave out most of what a process group of one's own needs.
_GROUP_CLASS: Any = c10d.ProcessGroupGloo


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Block i is `lengths[i]` bytes from `offsets[i]` of `memories[which[i]]`. Blocks are inside and not empty."""

    memories: list[Bytes] = field(repr=False)
    which: Offsets
    offsets: Offsets
    lengths: Offsets


class _Meeting(Store):
    """Gives gloo the other side's address. It asks for it under "epoch/rank", after it has set its own.

    offer: gets what the other side needs, and returns what it offers.
    """

    def __init__(self, rank: int, offer: Callable[[bytes], bytes]) -> None:
        super().__init__()
        self._rank, self._offer = rank, offer
        self._own = self._others = b""

    def set(self, key: str, value: Any) -> None:
        self._own, self._others = value, self._offer(value)

    def get(self, key: str) -> bytes:
        return self._own if key.endswith(f"/{self._rank}") else self._others

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        pass


class GlooPair:
    """A process group of two, apart from torch's default one. Thread safe.

    Messages of each direction arrive in the order they were posted. rank: 0 or 1, another on each side. offer: see
    `_Meeting`. host: which address to use here. stall_s: a message that has been waited for so long ends the pair.
    """

    def __init__(self, rank: int, offer: Callable[[bytes], bytes], *, host: str, stall_s: float) -> None:
        options = _GROUP_CLASS._Options()
        options._devices, options._threads = [_GROUP_CLASS.create_device(hostname=host)], 1
        options._timeout = timedelta(seconds=_JOIN_S)
        self._stall = timedelta(seconds=stall_s)
        self._peer = 1 - rank
        # Held while this side's memory is touched or handed to gloo, so that `close` comes before or after that.
        self._lock = threading.Lock()
        self._posted: dict[int, list[Work]] = {}
        self._group: Any = _GROUP_CLASS(_Meeting(rank, offer), rank, _WORLD_SIZE, options)

    def post(self, blocks: Blocks, *, sends: bool, packed: Bytes | None = None) -> list[Work]:
        """Posts a message for each block; or a single one if there is a buffer `packed` as long as all blocks."""
        with self._lock:
            group = self._open_group()
            if packed is None:
                tensors = _tensors(blocks)
            else:
                tensors = [torch.from_numpy(packed)]
                if sends:
                    pack_blocks(blocks, packed)
            operation = group.send if sends else group.recv
            works = [operation([tensor], self._peer, _TAG) for tensor in tensors]
            self._posted[id(works)] = works
            return works

    def wait(self, works: list[Work]) -> None:
        """Empties the list. RuntimeError if the other side is gone or silent."""
        while works:
            works.pop().wait(self._stall)
        self._posted.pop(id(works), None)

    def unpack(self, blocks: Blocks, packed: Bytes) -> None:
        """Spreads a message that has come over the blocks."""
        with self._lock:
            self._open_group()
            unpack_blocks(blocks, packed)

    def _open_group(self) -> Any:
        if self._group is None:
            raise TransportError(
                "a gloo connection has been closed",
                expected="an open one",
                found="its peer is gone, or a message failed",
                fix="post the batch again if the peer is still connected",
            )
        return self._group

    def close(self) -> None:
        """When this returns, gloo touches no memory for this pair any more. Can be called again."""
        with self._lock:
            group, self._group = self._group, None
            # A work keeps the sockets, and an error's traceback the list of works.
            for works in self._posted.values():
                works.clear()
            self._posted.clear()
        if group is not None:
            # Nothing but a wait that comes to its end makes gloo close its sockets at once.
            with suppress(RuntimeError):
                closing = torch.empty(1, dtype=torch.uint8)
                group.recv([closing], self._peer, _CLOSING_TAG).wait(timedelta(milliseconds=1))


def _tensors(blocks: Blocks) -> list[torch.Tensor]:
    memories = [torch.from_numpy(memory) for memory in blocks.memories]
    rows = zip(blocks.which.tolist(), blocks.offsets.tolist(), blocks.lengths.tolist(), strict=True)
    return [memories[index].narrow(0, offset, length) for index, offset, length in rows]


def pack_blocks(blocks: Blocks, packed: Bytes) -> None:
    """Copies blocks, one behind the other, into `packed`."""
    for memory, begins, sizes, part in _runs(blocks, packed):
        size = _grid_size(begins, sizes)
        if size:
            np.take(_items(memory, size), begins // size, out=part.view(f"V{size}"), mode="clip")
        else:
            _copy(part, np.cumsum(sizes) - sizes, memory, begins, sizes)


def unpack_blocks(blocks: Blocks, packed: Bytes) -> None:
    """The inverse of `pack_blocks`."""
    for memory, begins, sizes, part in _runs(blocks, packed):
        size = _grid_size(begins, sizes)
        if size:
            _items(memory, size)[begins // size] = part.view(f"V{size}")
        else:
            _copy(memory, begins, part, np.cumsum(sizes) - sizes, sizes)


def _runs(blocks: Blocks, packed: Bytes) -> Iterator[tuple[Bytes, Offsets, Offsets, Bytes]]:
    """Blocks of one memory that follow each other, with their place in `packed`."""
    edges = [0, *(np.flatnonzero(np.diff(blocks.which)) + 1).tolist(), blocks.which.size]
    ends = np.concatenate([[0], np.cumsum(blocks.lengths)])
    for first, last in itertools.pairwise(edges):
        part = packed[int(ends[first]) : int(ends[last])]
        yield blocks.memories[int(blocks.which[first])], blocks.offsets[first:last], blocks.lengths[first:last], part


def _grid_size(begins: Offsets, sizes: Offsets) -> int:
    """The size of all blocks if NumPy can take them as items of an array, which is faster, else 0."""
    size = int(sizes[0])
    return 0 if (sizes != size).any() or (begins % size).any() else size


def _items(memory: Bytes, size: int) -> NDArray[np.void]:
    return memory[: memory.size // size * size].view(f"V{size}")


def _copy(to: Bytes, to_begins: Offsets, source: Bytes, source_begins: Offsets, sizes: Offsets) -> None:
    rows = zip(to_begins.tolist(), source_begins.tolist(), sizes.tolist(), strict=True)
    for to_begin, begin, size in rows:
        to[to_begin : to_begin + size] = source[begin : begin + size]
