"""The side of the gloo transport that is asked: it sends what a peer reads, and takes what it writes."""

from __future__ import annotations

import queue
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch._C._distributed_c10d import Work

from llmsys.comm.transports.base import Offsets, Region
from llmsys.comm.transports.batch_parts import Bytes, bytes_at
from llmsys.comm.transports.gloo_pair import Blocks, GlooPair
from llmsys.core.errors import TransportError

_PART = struct.Struct("<QBB")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRequest:
    """What a peer asks for. number: counts the parts of a connection.

    region_ids, offsets, lengths: the blocks, in this process's regions. write: they are to be received, not sent.
    packed: as one message.
    """

    number: int
    write: bool
    packed: bool
    region_ids: Offsets
    offsets: Offsets
    lengths: Offsets

    def pack(self) -> bytes:
        rows = np.stack([self.region_ids, self.offsets, self.lengths])
        return _PART.pack(self.number, self.write, self.packed) + rows.astype("<i8").tobytes()

    @classmethod
    def unpack(cls, body: bytes) -> PartRequest:
        number, write, packed = _PART.unpack_from(body)
        rows = np.frombuffer(body, dtype="<i8", offset=_PART.size).reshape(3, -1).astype(np.int64)
        return cls(
            number=number,
            write=bool(write),
            packed=bool(packed),
            region_ids=rows[0],
            offsets=rows[1],
            lengths=rows[2],
        )


class Staging:
    """Two buffers for packed parts, since two parts are under way at a time."""

    def __init__(self) -> None:
        self._buffers: dict[int, Bytes] = {}

    def buffer(self, number: int, size_bytes: int) -> Bytes:
        found = self._buffers.get(number % 2)
        if found is None or found.size < size_bytes:
            found = self._buffers[number % 2] = np.empty(size_bytes, dtype=np.uint8)
        return found[:size_bytes]


class UsedRegions:
    """Counts who uses a region for a peer, so that its memory stays until they have ended. Thread safe."""

    def __init__(self, find: Callable[[int], Region | None]) -> None:
        self._find = find
        self._changed = threading.Condition()
        self._num_users: Counter[int] = Counter()

    def begin(self, region_ids: list[int]) -> list[Region]:
        """TransportError if one is not registered."""
        with self._changed:
            found = [(region_id, self._find(region_id)) for region_id in region_ids]
            regions = [region for _, region in found if region is not None]
            if len(regions) < len(found):
                missing = [region_id for region_id, region in found if region is None]
                raise TransportError(
                    "memory that a peer asks for is not registered",
                    expected="regions that are registered here",
                    found=f"region {missing[0]}, which is not, or not any more",
                    fix="keep regions until peers have been told that all reads and writes have ended",
                )
            self._num_users.update(region_ids)
            return regions

    def end(self, region_ids: list[int]) -> None:
        with self._changed:
            self._num_users.subtract(region_ids)
            self._changed.notify_all()

    def wait_unused(self, region_id: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._num_users[region_id])
            del self._num_users[region_id]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    request: PartRequest
    region_ids: list[int]
    blocks: Blocks
    works: list[Work]
    buffer: Bytes | None


class Serving:
    """What is done for one peer. `open`, `start` and `finish` are called by one thread, `close` and `join` by any."""

    def __init__(self, used: UsedRegions) -> None:
        self._used = used
        self._lock = threading.Lock()
        # Held by calls, so that `join` can wait for the one that runs.
        self._calls = threading.Lock()
        self._joiner: threading.Thread | None = None
        self._joined = threading.Event()
        self._pair: GlooPair | None = None
        self._problem = "it has not asked to join"
        self._running: dict[int, _Running] = {}
        self._staging = Staging()
        self._closed = False

    def open(self, theirs: bytes, join: Callable[[Callable[[bytes], bytes]], GlooPair]) -> bytes:
        """Joins, with what the peer offers. Returns what it needs of us, and goes on on a thread of its own."""
        self.join()
        self._drop()
        self._joined.clear()
        offered: queue.SimpleQueue[bytes] = queue.SimpleQueue()

        def offer(ours: bytes) -> bytes:
            offered.put(ours)
            return theirs

        def run() -> None:
            try:
                pair = join(offer)
                with self._lock:
                    if not self._closed:
                        self._pair = pair
                        return
                pair.close()
            except Exception as error:
                self._problem = f"{type(error).__name__}: {error}"
            finally:
                self._joined.set()
                offered.put(b"")

        joiner = threading.Thread(target=run, name="llmsys-gloo-join", daemon=True)
        joiner.start()
        self._joiner = joiner
        ours = offered.get()
        if not ours:
            raise _not_joined(self._problem)
        return ours

    def start(self, request: PartRequest, timeout_s: float) -> None:
        """Checks a part and posts its messages."""
        with self._calls:
            self._start(request, timeout_s)

    def _start(self, request: PartRequest, timeout_s: float) -> None:
        pair = self._pair if self._joined.wait(timeout_s) else None
        if pair is None:
            raise _not_joined(self._problem)
        unique, which = np.unique(request.region_ids, return_inverse=True)
        region_ids = unique.tolist()
        regions = self._used.begin(region_ids)
        try:
            _check_inside(request, regions, which)
            memories = [bytes_at(region.address, region.size_bytes) for region in regions]
            blocks = Blocks(memories=memories, which=which, offsets=request.offsets, lengths=request.lengths)
            size_bytes = int(request.lengths.sum())
            buffer = self._staging.buffer(request.number, size_bytes) if request.packed else None
            works = pair.post(blocks, sends=not request.write, packed=buffer)
            running = _Running(request=request, region_ids=region_ids, blocks=blocks, works=works, buffer=buffer)
            with self._lock:
                if self._pair is not pair:
                    raise _not_under_way(request.number)
                self._running[request.number] = running
        except BaseException:
            self._used.end(region_ids)
            raise

    def finish(self, number: int) -> None:
        """Waits for a part's messages. RuntimeError or TransportError if they did not all come or go."""
        with self._calls:
            self._finish(number)

    def _finish(self, number: int) -> None:
        with self._lock:
            running, pair = self._running.get(number), self._pair
        if running is None or pair is None:
            raise _not_under_way(number)
        pair.wait(running.works)
        if running.request.write and running.buffer is not None:
            pair.unpack(running.blocks, running.buffer)
        with self._lock:
            running = self._running.pop(number, None)
        if running is not None:
            self._used.end(running.region_ids)

    def _drop(self) -> None:
        with self._lock:
            pair, self._pair = self._pair, None
        if pair is not None:
            pair.close()
        # Only now is the memory not touched any more.
        with self._lock:
            left, self._running = list(self._running.values()), {}
        for running in left:
            self._used.end(running.region_ids)

    def close(self) -> None:
        """When this returns, no memory is touched for the peer any more."""
        with self._lock:
            self._closed = True
        self._drop()

    def join(self) -> None:
        """After `close`: waits until no thread is in gloo's code for the peer, so that the process may end."""
        with self._calls:
            joiner = self._joiner
        if joiner is not None:
            joiner.join()


def _not_joined(problem: str) -> TransportError:
    return TransportError(
        "the peer could not be joined by gloo",
        expected="a process group of two",
        found=problem,
        fix="let gloo reach the address that the endpoints listen at (TransportConfig.host)",
    )


def _not_under_way(number: int) -> TransportError:
    return TransportError(
        f"part {number} of a peer is not under way",
        expected="one that has been started, on a connection that stands",
        found="none",
        fix="post the batch again if the peer is still connected",
    )


def _check_inside(request: PartRequest, regions: list[Region], which: Offsets) -> None:
    sizes = np.array([region.size_bytes for region in regions])[which]
    wrong = (request.lengths <= 0) | (request.lengths > sizes) | (request.offsets < 0)
    wrong |= request.offsets > sizes - request.lengths
    if wrong.any():
        index = int(np.flatnonzero(wrong)[0])
        raise TransportError(
            "a peer asks for memory outside of a region",
            expected=f"0 <= offset, 0 < length, offset + length <= {sizes[index]}",
            found=f"offset {request.offsets[index]}, length {request.lengths[index]}",
            fix="run the same release of llmsys everywhere",
        )
