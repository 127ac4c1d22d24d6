"""Native engines for tests: two in this process, one in a child, or one whose peer is played by the test."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmsys import _C
from llmsys.comm.transports.ucx_library import find_ucx_library
from llmsys.core.errors import ConfigError

WAIT_S = 60.0
ROOT = Path(__file__).resolve().parents[2]
PATHS = ("shm", "cma", "ucx")
TRANSPORTS = {"TLS": "posix,tcp,self"}

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]


def library_path() -> str:
    if not _C.engine_built():
        pytest.skip("llmsys._C was built without the headers of UCX")
    try:
        return find_ucx_library().path
    except ConfigError as error:
        pytest.skip(str(error))


def new_engine(path: str = "", **options: Any) -> _C.Engine:
    """An engine in which memory goes by `path`, where that can be had; any path if empty."""
    library = library_path()
    allowed = {"shm": path in ("", "shm"), "cma": path in ("", "cma"), "ucx_config": TRANSPORTS}
    return _C.Engine(library, **(allowed | {"heartbeat_s": 0.25, "lease_s": 20.0} | options))


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        dialled = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    return dialled, accepted


def wait_event(engine: _C.Engine, kind: str) -> tuple[Any, ...]:
    """The next event, which must be of that kind."""
    event = engine.next_event(WAIT_S)
    assert event is not None and event[0] == kind, f"waited for {kind}, got {event}, {engine.stats()}"
    return event


def ended(request: _C.Request) -> _C.Request:
    assert request.wait(WAIT_S), f"request {request.id} ({request.kind}) did not end"
    return request


def succeeded(request: _C.Request) -> _C.Request:
    assert ended(request).error() is None, request.error()
    return request


@dataclass
class Memory:
    """Registered memory of an engine, as an array that must not outlive the engine."""

    engine: _C.Engine
    region: int
    array: Bytes

    @property
    def address(self) -> int:
        return int(self.array.ctypes.data)

    def imported_by(self, engine: _C.Engine, peer: int) -> int:
        return engine.import_remote(peer, self.engine.remote_key(self.region), self.address, self.array.size)


def new_memory(engine: _C.Engine, size_bytes: int, *, allocate: bool = True) -> Memory:
    if allocate:
        region, address = engine.allocate(size_bytes)
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))
    else:
        array = np.zeros(size_bytes, np.uint8)
        region = engine.register_memory(array.ctypes.data, size_bytes)
    return Memory(engine, region, array)


def pattern(size_bytes: int, seed: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size_bytes, dtype=np.uint8)


@dataclass
class Link:
    """Two engines of this process that are each other's peer."""

    here: _C.Engine
    there: _C.Engine
    peer: int  # `there`, as `here` calls it
    back: int  # `here`, as `there` calls it

    def read(self, local: Memory, remote: int, entries: Any, **options: Any) -> _C.Request:
        return post(self.here, False, self.peer, local, remote, entries, **options)

    def write(self, local: Memory, remote: int, entries: Any, **options: Any) -> _C.Request:
        return post(self.here, True, self.peer, local, remote, entries, **options)


def post(
    engine: _C.Engine, write: bool, peer: int, local: Memory, remote: int, entries: Any, coalesce: bool = True
) -> _C.Request:
    """A batch of one group, from rows (local offset, remote offset, length)."""
    table = np.asarray(entries, dtype=np.int64).reshape(-1, 3)
    columns = [np.ascontiguousarray(table[:, i]) for i in range(3)]
    return engine.post(write, peer, np.array([[local.region, remote, 0, len(table)]]), *columns, coalesce)


_tokens = iter(range(1, 1 << 62))


def connect(here: _C.Engine, there: _C.Engine, *, lease_s: float = 20.0) -> tuple[int, int]:
    """Connects two engines of this process; the peer ids at `here` and at `there`."""
    token_here, token_there = next(_tokens), next(_tokens)
    sockets = tcp_pair()
    peer = here.add_peer(
        "there", sockets[0].detach(), there.worker_address(), token_here, token_there, lease_s, there.probe()
    )
    back = there.add_peer(
        "here", sockets[1].detach(), here.worker_address(), token_there, token_here, lease_s, here.probe()
    )
    assert wait_event(here, "established") == ("established", peer)
    assert wait_event(there, "established") == ("established", back)
    return peer, back


@contextlib.contextmanager
def linked(path: str = "", **options: Any) -> Iterator[Link]:
    here, there = new_engine(path, **options), new_engine(path)
    try:
        yield Link(here, there, *connect(here, there))
    finally:
        here.close()
        there.close()


def memories(link: Link, size_bytes: int, path: str = "") -> tuple[Memory, Memory, int]:
    """Memory here, memory there, and the latter as imported here."""
    local = new_memory(link.here, size_bytes)
    target = new_memory(link.there, size_bytes, allocate=path != "cma")
    return local, target, target.imported_by(link.here, link.peer)


class PlayedPeer:
    """The other end of a control connection, by hand: frames are (kind, token, sequence, delivered)."""

    HEARTBEAT, ACK, BYE, ENDPOINTS = 1, 2, 3, 4
    VERSION = 2
    _FRAME = struct.Struct("<IHHQQQ")
    _MAGIC = 0x4D4C4C43

    def __init__(
        self, engine: _C.Engine, worker_address: bytes, *, lease_s: float = 20.0, num_endpoints: int = 0
    ) -> None:
        self.token_in, self.token_out = next(_tokens), next(_tokens)
        self.socket, theirs = tcp_pair()
        self.socket.settimeout(WAIT_S)
        self.num_endpoints_made: int | None = None  # what the engine has told
        self.peer = engine.add_peer("played", theirs.detach(), worker_address, self.token_in, self.token_out, lease_s)
        self.send(self.ENDPOINTS, num_endpoints)

    def send(self, kind: int, sequence: int = 0) -> None:
        self.socket.sendall(self._FRAME.pack(self._MAGIC, kind, self.VERSION, self.token_in, sequence, 0))

    def receive(self) -> tuple[int, int]:
        """(kind, sequence) of the next frame but ENDPOINTS, or (0, 0) at the end."""
        while (frame := self._receive_any())[0] == self.ENDPOINTS:
            self.num_endpoints_made = frame[1]
        return frame

    def _receive_any(self) -> tuple[int, int]:
        data = b""
        while len(data) < self._FRAME.size:
            try:
                more = self.socket.recv(self._FRAME.size - len(data))
            except ConnectionResetError:
                more = b""
            if not more:
                return 0, 0
            data += more
        magic, kind, version, token, sequence, _ = self._FRAME.unpack(data)
        assert (magic, version, token) == (self._MAGIC, self.VERSION, self.token_out)
        return kind, sequence

    def answer_heartbeat(self) -> None:
        kind, sequence = self.receive()
        assert kind == self.HEARTBEAT
        self.send(self.ACK, sequence)


class Child:
    """A process with one engine that is connected to one here. See `engine_process.py` for its commands."""

    def __init__(
        self, engine: _C.Engine, path: str, size_bytes: int, *, seed: int = 0, lease_s: float = 20.0, **options: Any
    ) -> None:
        token_here, token_there = next(_tokens), next(_tokens)
        ours, theirs = tcp_pair()
        settings = {
            "fd": theirs.fileno(),
            "path": path,
            "size_bytes": size_bytes,
            "seed": seed,
            "worker_address": engine.worker_address().hex(),
            "probe": [engine.probe()[0], engine.probe()[1], engine.probe()[2].hex()],
            "token_in": token_there,
            "token_out": token_here,
            "lease_s": lease_s,
            "options": options,
        }
        script = Path(__file__).with_name("engine_process.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
        )
        theirs.close()
        self._selector = selectors.DefaultSelector()
        assert self.process.stdout is not None
        self._selector.register(self.process.stdout, selectors.EVENT_READ)
        try:
            made = self.receive()
            probe = (made["probe"][0], made["probe"][1], bytes.fromhex(made["probe"][2]))
            address = bytes.fromhex(made["worker_address"])
            self.peer = engine.add_peer("child", ours.detach(), address, token_here, token_there, lease_s, probe)
            assert wait_event(engine, "established") == ("established", self.peer)
            self.remote = engine.import_remote(
                self.peer, bytes.fromhex(made["remote_key"]), made["address"], size_bytes
            )
        except BaseException:
            self.stop()
            raise

    def send(self, command: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, arguments]).encode() + b"\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        deadline_s = time.monotonic() + WAIT_S
        # The pipe is unbuffered only through its descriptor; one answer is one line, and one is under way at a time.
        line = b""
        while not line.endswith(b"\n"):
            assert self._selector.select(max(deadline_s - time.monotonic(), 0.0)), "the child process does not answer"
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            assert more, f"the child process ended with {self.process.wait(WAIT_S)}"
            line += more
        answer: dict[str, Any] = json.loads(line)
        return answer

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        self.send(command, **arguments)
        return self.receive()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._selector.close()


@contextlib.contextmanager
def child_of(engine: _C.Engine, path: str, size_bytes: int, **options: Any) -> Iterator[Child]:
    child = Child(engine, path, size_bytes, **options)
    try:
        yield child
    finally:
        child.stop()
