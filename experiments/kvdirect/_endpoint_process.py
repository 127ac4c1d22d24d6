"""One endpoint of a measured transfer, in a process of its own. `_pairs` starts it and asks it to act.

It reads (name of a method of `Endpoint`, arguments) from a connection and answers each; it ends when that is closed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from experiments.kvdirect._scatter import WORD_BYTES, Pattern, Words, fill, num_wrong_bytes
from experiments.kvdirect._systems import Kind, OptionValue
from llmsys import _C
from llmsys.comm.transports.base import (
    Copies,
    Notification,
    Peer,
    Region,
    RemoteRegion,
    Transport,
    TransportConfig,
)
from llmsys.core.errors import InputError, TransportError

_PR_SET_PDEATHSIG = 1
_REQUEST_TIMEOUT_S = 60.0
# Processes are stopped while others are measured, and must not lose each other for that.
_LEASE_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSpec:
    """What a process is to be.

    size_bytes: of its memory. target: it is read from, so its memory is filled. allocated: by the transport, at the
    target. huge_pages: asked for all other memory.
    """

    name: str
    kind: Kind
    options: dict[str, OptionValue]
    host: str
    size_bytes: int
    target: bool
    allocated: bool
    huge_pages: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What the other side needs to reach an endpoint, and what the rows say about it.

    missing: why the transport cannot be used here; then all else is empty.
    """

    missing: str = ""
    address: str = ""
    region: Region | None = None
    description: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One transfer.

    seconds: from the call to the end of the wait for it. posting_s: of the call alone. moving_s: from when the
    transport began with it to its end, so without our checks of the batch.
    num_wrong_bytes: None where the contents were not looked at.
    """

    seconds: float
    posting_s: float
    moving_s: float
    num_segments: int
    path: str
    num_wrong_bytes: int | None = None


class _Listener:
    """At the target it sends every message back; at the initiator it keeps them."""

    def __init__(self, transport: Transport, target: bool) -> None:
        self._transport, self._target = transport, target
        self.messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def peer_joined(self, peer: Peer) -> None: ...

    def peer_lost(self, peer: Peer, reason: str, left: bool) -> None: ...

    def notified(self, notification: Notification) -> None:
        if self._target:
            self._transport.notify(notification.peer, notification.payload)
        else:
            self.messages.put(notification.payload)


class Endpoint:
    """The process's state. Every public method is a command."""

    def __init__(self) -> None:
        self._transport: Transport | None = None

    def open(self, spec: EndpointSpec) -> Opened:
        if spec.kind == "memcpy":
            self._source, self._memory = (_private_memory(spec.size_bytes, spec.huge_pages) for _ in range(2))
            fill(self._source)
            self._memory.fill(0)
            return Opened(description={"library": "memcpy of the C library", "paths": "within one process"})
        transport_class, options_class = _classes(spec.kind)
        if missing := transport_class.available():
            return Opened(missing=missing)
        config = TransportConfig(host=spec.host, name=spec.name, lease_s=_LEASE_S)
        self._transport = transport = transport_class(config, options_class(**spec.options))
        if spec.allocated and spec.target:
            region = transport.allocate(spec.size_bytes)
            self._memory = _words_at(region.address, region.size_bytes)
        else:
            self._memory = _private_memory(spec.size_bytes, spec.huge_pages)
            region = transport.register(self._memory.ctypes.data, spec.size_bytes, owner=self._memory)
        # Every page is touched here: measurements must not pay for the system's first sight of memory.
        fill(self._memory) if spec.target else self._memory.fill(0)
        self._region = region
        self._listener = _Listener(transport, spec.target)
        transport.set_events(self._listener)
        return Opened(address=transport.local.address, region=region, description=transport.describe())

    def connect(self, target: Opened) -> None:
        assert self._transport is not None and target.region is not None
        self._peer = self._transport.connect(target.address)
        self._remote: RemoteRegion = self._transport.import_region(
            self._peer,
            address=target.region.address,
            size_bytes=target.region.size_bytes,
            device=target.region.device,
            remote_key=target.region.remote_key,
        )

    def measure(self, pattern: Pattern, coalesce: bool, verify: bool) -> Measured:
        if verify:
            self._memory.fill(0)
        if self._transport is None:
            measured = self._copy(pattern, coalesce)
        else:
            measured = self._read(self._transport, pattern, coalesce)
        return replace(measured, num_wrong_bytes=num_wrong_bytes(self._memory, pattern)) if verify else measured

    def _copy(self, pattern: Pattern, coalesce: bool) -> Measured:
        local, remote = pattern.blocks()
        lengths = np.full(pattern.num_blocks, pattern.block_bytes, dtype=np.int64)
        ranges = (local * pattern.block_bytes, remote * pattern.block_bytes, lengths)
        if coalesce:
            # The same copies as ours make; it is also the order in which memcpy is fastest.
            ranges = _C.coalesce(*ranges, False)
        seconds = _C.copy_ranges(self._memory.ctypes.data, self._source.ctypes.data, *ranges)
        return Measured(seconds=seconds, posting_s=0.0, moving_s=seconds, num_segments=len(ranges[0]), path="memcpy")

    def _read(self, transport: Transport, pattern: Pattern, coalesce: bool) -> Measured:
        local, remote = pattern.blocks()
        copies = Copies(
            local=self._region,
            remote=self._remote,
            local_offsets=local * pattern.block_bytes,
            remote_offsets=remote * pattern.block_bytes,
            lengths=np.full(pattern.num_blocks, pattern.block_bytes, dtype=np.int64),
        )
        started = time.perf_counter()
        request = transport.read(self._peer, [copies], coalesce=coalesce)
        posted = time.perf_counter()
        request.wait(_REQUEST_TIMEOUT_S)
        ended = time.perf_counter()
        stats = request.stats
        return Measured(
            seconds=ended - started,
            posting_s=posted - started,
            moving_s=(stats.finished_ns - stats.started_ns) / 1e9,
            num_segments=stats.num_segments,
            path="+".join(getattr(request, "paths", (self._remote.path,))),
        )

    def round_trips(self, count: int, payload_bytes: int) -> list[float]:
        """Seconds from sending a message to having it back, for each of `count`, one after the other."""
        assert self._transport is not None
        payload, times = bytes(payload_bytes), []
        for _ in range(count):
            started = time.perf_counter()
            self._transport.notify(self._peer, payload)
            try:
                self._listener.messages.get(timeout=_REQUEST_TIMEOUT_S)
            except queue.Empty:
                raise TransportError(
                    f"{self._peer} did not send a message back",
                    expected=f"an echo within {_REQUEST_TIMEOUT_S:g} s",
                    found="none",
                    fix="look at the target's process",
                ) from None
            times.append(time.perf_counter() - started)
        return times

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def _classes(kind: Kind) -> tuple[type[Any], type[Any]]:
    if kind == "ucx":
        from llmsys.comm.transports.ucx import UcxOptions, UcxTransport

        return UcxTransport, UcxOptions
    if kind == "nixl":
        from llmsys.comm.transports.nixl import NixlOptions, NixlTransport

        return NixlTransport, NixlOptions
    if kind == "gloo":
        from llmsys.comm.transports.gloo import GlooOptions, GlooTransport

        return GlooTransport, GlooOptions
    raise InputError(
        f"there is no transport {kind!r}", expected="ucx, nixl or gloo", found=kind, fix="correct System.kind"
    )


def _private_memory(size_bytes: int, huge_pages: bool) -> Words:
    """Ordinary memory, as PyTorch's allocator gets it: without asking for huge pages, which NumPy's own does."""
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge_pages:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint64)


def _words_at(address: int, size_bytes: int) -> Words:
    return np.ctypeslib.as_array((ctypes.c_uint64 * (size_bytes // WORD_BYTES)).from_address(address))


def main() -> None:
    """Arguments: the number of the connection's file, and of the process to end with."""
    fd, parent = map(int, sys.argv[1:])
    # Also ends this process while it is stopped, when it would not see its connection close.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return
    endpoint = Endpoint()
    with Connection(fd) as connection:
        try:
            while True:
                command, arguments = connection.recv()
                connection.send(_answer(endpoint, command, arguments))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass
    endpoint.close()


def _answer(endpoint: Endpoint, command: str, arguments: tuple[Any, ...]) -> tuple[bool, object]:
    try:
        return True, getattr(endpoint, command)(*arguments)
    except Exception:
        return False, traceback.format_exc()


if __name__ == "__main__":
    # By its module name, under which the other process knows these classes.
    from experiments.kvdirect._endpoint_process import main as _main

    _main()
