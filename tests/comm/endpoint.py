"""One endpoint under command, in this process or in a child (`target_process.py`), for the conformance suite.

Commands are methods of `Endpoint` whose arguments and results msgpack can carry, so that both work the same way.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from llmsys.comm.transports import TRANSPORTS
from llmsys.comm.transports.base import (
    Copies,
    Notification,
    Peer,
    Region,
    RemoteRegion,
    Request,
    Transport,
    TransportConfig,
)

SECRET = "the secret of the conformance tests"
WAIT_S = 60.0
ROOT = Path(__file__).resolve().parents[2]
# Beside the shipped ones, a transport made of questions to the other side: it tests what Python transports share.
CLASSES = TRANSPORTS | {"asking": "tests.comm.asking_transport:AskingTransport"}

Bytes = NDArray[np.uint8]


def make_transport(name: str, /, **settings: Any) -> Transport:
    module, _, attribute = CLASSES[name].partition(":")
    cls: Callable[[TransportConfig], Transport] = getattr(importlib.import_module(module), attribute)
    return cls(TransportConfig(**({"secret": SECRET} | settings)))


def pattern(size_bytes: int, seed: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size_bytes, dtype=np.uint8)


def vast_memory(size_bytes: int, marks: Sequence[int]) -> Bytes:
    """Address space without as much memory: pieces with one of `marks` in them have their own, all others share one."""
    piece_bytes = 16 << 20
    own = sorted({mark // piece_bytes for mark in marks})
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    file, map_fixed, populate = os.memfd_create("vast"), 0x10, 0x8000
    try:
        os.ftruncate(file, (len(own) + 1) * piece_bytes)
        read_write = mmap.PROT_READ | mmap.PROT_WRITE
        address = libc.mmap(None, size_bytes, read_write, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        for number in range(-(-size_bytes // piece_bytes)):
            begin = number * piece_bytes
            length = min(piece_bytes, size_bytes - begin)
            offset = (own.index(number) + 1) * piece_bytes if number in own else 0
            placed = libc.mmap(
                address + begin, length, read_write, mmap.MAP_SHARED | map_fixed | populate, file, offset
            )
            assert placed == address + begin, os.strerror(ctypes.get_errno())
    finally:
        os.close(file)
    memory = array_at(address, size_bytes)
    weakref.finalize(memory, libc.munmap, address, size_bytes)
    return memory


def array_at(address: int, size_bytes: int) -> Bytes:
    return np.frombuffer((ctypes.c_uint8 * size_bytes).from_address(address), dtype=np.uint8)


class Recorder:
    """Keeps the events of a transport; `wait` blocks until they are as wanted."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.joined: list[Peer] = []
        self.lost: list[tuple[Peer, str, bool]] = []
        self.notifications: list[Notification] = []

    def peer_joined(self, peer: Peer) -> None:
        with self.changed:
            self.joined.append(peer)
            self.changed.notify_all()

    def peer_lost(self, peer: Peer, reason: str, left: bool) -> None:
        with self.changed:
            self.lost.append((peer, reason, left))
            self.changed.notify_all()

    def notified(self, notification: Notification) -> None:
        with self.changed:
            self.notifications.append(notification)
            self.changed.notify_all()

    def wait(self, wanted: Callable[[], object], what: str) -> None:
        with self.changed:
            assert self.changed.wait_for(wanted, WAIT_S), f"no {what} within {WAIT_S} s"

    def wait_lost(self, peer: Peer) -> tuple[str, bool]:
        self.wait(lambda: any(lost == peer for lost, _, _ in self.lost), f"loss of {peer}")
        ((reason, left),) = [(reason, left) for lost, reason, left in self.lost if lost == peer]
        return reason, left


class Endpoint:
    """A transport, its events, and memory of its own. Regions, peers and requests are known by numbers."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.transport = make_transport(name, **settings)
        self.events = Recorder()
        self.transport.set_events(self.events)
        self.regions: dict[int, tuple[Region, Bytes]] = {}
        self.requests: list[Request] = []
        self.remotes: list[RemoteRegion] = []

    def address(self) -> str:
        return self.transport.local.address

    def new_region(
        self, *, size_bytes: int, seed: int | None = None, allocate: bool = False, marks: Sequence[int] = ()
    ) -> dict[str, Any]:
        """Memory with a pattern, or zeros. marks: makes it `vast_memory`."""
        if allocate:
            region = self.transport.allocate(size_bytes)
            memory = array_at(region.address, size_bytes)
        else:
            memory = vast_memory(size_bytes, marks) if marks else np.zeros(size_bytes, dtype=np.uint8)
            region = self.transport.register(memory.ctypes.data, size_bytes, owner=memory)
        if seed is not None:
            memory[:] = pattern(size_bytes, seed)
        self.regions[region.region_id] = (region, memory)
        fields = ("region_id", "address", "size_bytes", "device", "remote_key")
        return {field: getattr(region, field) for field in fields}

    def release(self, *, region_id: int) -> None:
        self.transport.release(self.regions[region_id][0])
        del self.regions[region_id]

    def digest(self, *, region_id: int) -> bytes:
        return hashlib.sha256(self.regions[region_id][1]).digest()

    def fill(self, *, region_id: int, begin: int, data: bytes) -> None:
        self.regions[region_id][1][begin : begin + len(data)] = np.frombuffer(data, dtype=np.uint8)

    def content(self, *, region_id: int, begin: int, size_bytes: int) -> bytes:
        return self.regions[region_id][1][begin : begin + size_bytes].tobytes()

    def connect(self, *, address: str) -> int:
        return self.transport.connect(address, timeout_s=WAIT_S).peer_id

    def disconnect(self, *, peer_id: int) -> None:
        self.transport.disconnect(self._peer(peer_id))

    def peers(self) -> list[int]:
        return [peer.peer_id for peer in self.transport.peers()]

    def peer_of(self, *, generation: int) -> int:
        """The number of the peer with this generation, when it has joined."""
        self.events.wait(lambda: any(peer.generation == generation for peer in self.events.joined), "joined peer")
        return next(peer.peer_id for peer in reversed(self.events.joined) if peer.generation == generation)

    def peers_of(self, *, generation: int) -> list[int]:
        return [peer.peer_id for peer in self.transport.peers() if peer.generation == generation]

    def _peer(self, peer_id: int) -> Peer:
        def found() -> list[Peer]:
            return [peer for peer in self.events.joined if peer.peer_id == peer_id]

        self.events.wait(found, f"peer {peer_id}")
        return found()[0]

    def import_region(self, *, peer_id: int, address: int, size_bytes: int, device: str, remote_key: bytes) -> int:
        remote = self.transport.import_region(
            self._peer(peer_id), address=address, size_bytes=size_bytes, device=device, remote_key=remote_key
        )
        self.remotes.append(remote)
        return len(self.remotes) - 1

    def post(self, *, peer_id: int, write: bool, region_id: int, remote: int, times: int) -> list[int]:
        """Posts the whole region, `times` over. Returns numbers for `outcome`."""
        local, far = self.regions[region_id][0], self.remotes[remote]
        whole = Copies(local=local, remote=far, local_offsets=[0], remote_offsets=[0], lengths=[local.size_bytes])  # type: ignore[arg-type]
        operation = self.transport.write if write else self.transport.read
        first = len(self.requests)
        self.requests += [operation(self._peer(peer_id), [whole]) for _ in range(times)]
        return list(range(first, len(self.requests)))

    def outcomes(self, *, requests: list[int]) -> list[str]:
        """The error's class of each, or nothing; waits for their ends."""
        return [outcome(self.requests[number]) for number in requests]

    def notify(self, *, peer_id: int, payloads: list[bytes]) -> None:
        for request in [self.transport.notify(self._peer(peer_id), payload) for payload in payloads]:
            request.wait(WAIT_S)

    def notifications(self, *, peer_id: int, count: int) -> list[tuple[int, bytes]]:
        """All of a peer so far, at least `count`, as (id, payload)."""

        def found() -> list[tuple[int, bytes]]:
            return [(n.message_id, n.payload) for n in self.events.notifications if n.peer.peer_id == peer_id]

        self.events.wait(lambda: len(found()) >= count, f"{count} notifications")
        return found()

    def lost(self, *, peer_id: int) -> tuple[str, bool]:
        return self.events.wait_lost(self._peer(peer_id))

    def close(self) -> None:
        self.transport.close()


def outcome(request: Request) -> str:
    try:
        request.wait(WAIT_S)
    except Exception as error:
        return type(error).__name__
    return ""


class LocalTarget:
    """An endpoint in this process; for transports that cannot leave it, dying and stopping are played."""

    def __init__(self, name: str, /, **settings: Any) -> None:
        self.endpoint = Endpoint(name, settings)

    def call(self, command: str, **arguments: Any) -> Any:
        return getattr(self.endpoint, command)(**arguments)

    def kill(self) -> None:
        self.endpoint.transport.crash()  # type: ignore[attr-defined]

    def stop(self) -> None:
        self.endpoint.transport.pause()  # type: ignore[attr-defined]

    def resume(self) -> None:
        self.endpoint.transport.resume()  # type: ignore[attr-defined]

    def end(self) -> None:
        self.endpoint.transport.close()


class ProcessTarget:
    """An endpoint in a child process, which gets commands by its standard input."""

    def __init__(self, name: str, /, **settings: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("target_process.py")), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        try:
            self._send(settings)
            self._receive()
        except BaseException:
            self.end()
            raise

    def call(self, command: str, **arguments: Any) -> Any:
        self._send([command, arguments])
        return self._receive()

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        write_message(self._process.stdin, message)

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        ok, value = read_message(self._process.stdout)
        assert ok, f"the target failed: {value}"
        return value

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(WAIT_S)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)
        # The signal takes effect when the kernel gets to it.
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process.stdout.close()  # type: ignore[union-attr]


Target = LocalTarget | ProcessTarget


@contextlib.contextmanager
def running_target(name: str, /, **settings: Any) -> Iterator[Target]:
    target: Target = LocalTarget(name, **settings) if name == "loopback" else ProcessTarget(name, **settings)
    try:
        yield target
    finally:
        target.end()


def write_message(file: Any, message: object) -> None:
    packed: bytes = msgpack.packb(message)
    file.write(struct.pack("<Q", len(packed)) + packed)
    file.flush()


def read_message(file: Any) -> Any:
    header = file.read(8)
    if len(header) < 8:
        raise EOFError("the other end has closed")
    return msgpack.unpackb(file.read(struct.unpack("<Q", header)[0]), strict_map_key=False)
