"""NIXL's agents: how they are made, and the one that reads and writes the memory of one peer."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmsys.comm.transports.base import Offsets, Peer, Region, RemoteRegion
from llmsys.comm.transports.batch_parts import Part, wait_for_verdict
from llmsys.core.errors import DescriptorError, TransportError

PACKAGES = ("nixl_cu12", "nixl_cu13")
_POLL_S = 50e-6
_POLLS_WITHOUT_SLEEP = 20
_POLLS_PER_CHECK = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class NixlLibrary:
    """bindings: NIXL's Python module. version: of it and the UCX it brings, for result rows."""

    bindings: Any
    version: str


def find_nixl() -> NixlLibrary:
    """The installed NIXL.

    Raises:
        ImportError: there is none, or it cannot be loaded.
    """
    for package in PACKAGES:
        if importlib.util.find_spec(package) is not None:
            bindings = importlib.import_module(f"{package}._bindings")
            version = importlib.metadata.version(package.replace("_", "-"))
            return NixlLibrary(bindings=bindings, version=f"NIXL {version} ({package}), UCX {_ucx_version(bindings)}")
    raise ModuleNotFoundError(f"none of {', '.join(PACKAGES)} is installed")


def _ucx_version(bindings: Any) -> str:
    folder = Path(bindings.__file__).parent
    for path in folder.parent.glob(f"{folder.name}.libs/libucp-*.so*"):
        text = ctypes.CDLL(str(path)).ucp_get_version_string
        text.restype = ctypes.c_char_p
        found: bytes = text()
        return found.decode()
    return "of the system"


@dataclass(slots=True)
class _Segment:
    end: int
    metadata: bytes = b""
    num_users: int = 0
    descriptors: Any = None


class Segments:
    """Ranges of addresses that do not overlap, since NIXL finds the wrong one among ranges that do."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._segments: dict[int, _Segment] = {}

    def overlapping(self, begin: int, end: int) -> list[tuple[int, _Segment]]:
        first = max(bisect.bisect_right(self._begins, begin) - 1, 0)
        last = bisect.bisect_left(self._begins, end)
        found = [(other, self._segments[other]) for other in self._begins[first:last]]
        return [(other, segment) for other, segment in found if segment.end > begin]

    def containing(self, begin: int, end: int) -> _Segment | None:
        found = self.overlapping(begin, end)
        return found[0][1] if len(found) == 1 and found[0][0] <= begin and end <= found[0][1].end else None

    def add(self, begin: int, segment: _Segment) -> None:
        bisect.insort(self._begins, begin)
        self._segments[begin] = segment

    def remove(self, begin: int) -> _Segment:
        del self._begins[bisect.bisect_left(self._begins, begin)]
        return self._segments.pop(begin)

    def items(self) -> Iterator[tuple[int, _Segment]]:
        return iter([(begin, self._segments[begin]) for begin in self._begins])


@dataclass(slots=True)
class NixlTarget:
    """What a peer says of the agent that serves its memory. The probe is a word to read when connecting."""

    agent: str
    metadata: bytes = field(repr=False)
    probe_address: int
    probe: bytes = field(repr=False)


class NixlLink:
    """An agent that only this side uses, to reach one peer. Any thread may call, one at a time transfers.

    It is destroyed and made anew to end what NIXL cannot cancel, and to forget what NIXL cannot unload. Memory is told
    to it when it is first used.
    """

    def __init__(self, library: NixlLibrary, peer: Peer, target: NixlTarget, make: Callable[[str], Any]) -> None:
        self._nixl, self._peer, self._target, self._make = library.bindings, peer, target, make
        self._lock = threading.RLock()
        self._agent: Any = None
        self._numbers = itertools.count(1)
        self._local = Segments()
        self._remote = Segments()
        self._not_loaded: list[bytes] = []
        self._dropped: list[Region] = []
        self._is_stale = False
        self._transferring = False
        self._closed = False

    def connect(self, timeout_s: float) -> None:
        """Reads the peer's probe, so that from now on neither side has to make a connection."""
        size = len(self._target.probe)
        found = np.zeros(size, dtype=np.uint8)
        local = Region(region_id=0, address=found.ctypes.data, size_bytes=size, device="cpu", remote_key=b"")
        column = np.array([size])
        part = Part(
            local_addresses=np.array([local.address]),
            remote_addresses=np.array([self._target.probe_address]),
            lengths=column,
            groups=column * 0,
        )
        deadline = time.monotonic() + timeout_s

        def check() -> None:
            if time.monotonic() >= deadline:
                raise self._failure(f"no answer of its agent within {timeout_s:.3g} s")

        with self.using((local,)):
            self.transfer(part, write=False, check=check)
        self.unregister(local)
        if found.tobytes() != self._target.probe:
            self.destroy()
            raise self._failure("other bytes than its probe: its address leads to another process")

    # -- memory --------------------------------------------------------------------------------------------------------

    def import_region(self, remote: RemoteRegion, metadata: bytes) -> None:
        """DescriptorError if it overlaps another and neither holds the other."""
        begin, end = remote.address, remote.address + remote.size_bytes
        with self._lock:
            overlapping = self._remote.overlapping(begin, end)
            around = self._remote.containing(begin, end)
            if around is not None and (around.num_users or around.metadata == metadata):
                around.num_users += 1
                return
            alive = [(other, segment) for other, segment in overlapping if segment.num_users]
            if any(other < begin or segment.end > end for other, segment in alive):
                raise _overlap_error(remote, alive)
            for other, _ in overlapping:
                self._remote.remove(other)
            num_users = 1 + sum(segment.num_users for _, segment in alive)
            self._remote.add(begin, _Segment(end, metadata, num_users))
            self._not_loaded.append(metadata)
            self._is_stale = self._is_stale or bool(overlapping)

    def forget_region(self, remote: RemoteRegion) -> None:
        with self._lock:
            segment = self._remote.containing(remote.address, remote.address + remote.size_bytes)
            if segment is not None:
                segment.num_users -= 1

    @contextlib.contextmanager
    def using(self, regions: tuple[Region, ...]) -> Iterator[None]:
        """Around the transfers of a batch: tells the agent of what they use."""
        with self._lock:
            self._make_ready()
            for region in regions:
                self._register(region.address, region.address + region.size_bytes)
            self._transferring = True
        try:
            yield
        finally:
            with self._lock:
                self._transferring = False
                for region in self._dropped:
                    self.unregister(region)
                self._dropped.clear()

    def _make_ready(self) -> None:
        if self._closed:
            raise self._failure("the connection is closed here")
        if self._is_stale:
            self.destroy()
        with self._naming_errors("its metadata was refused"):
            if self._agent is None:
                self._agent = self._make(f"{next(self._numbers)}")
                dead = [begin for begin, segment in self._remote.items() if not segment.num_users]
                for begin in dead:
                    self._remote.remove(begin)
                self._not_loaded = [self._target.metadata, *(segment.metadata for _, segment in self._remote.items())]
            for metadata in self._not_loaded:
                self._agent.loadRemoteMD(metadata)
        self._not_loaded.clear()

    def _register(self, begin: int, end: int) -> None:
        if self._local.containing(begin, end) is not None:
            return
        for other, segment in self._local.overlapping(begin, end):
            begin, end = min(begin, other), max(end, segment.end)
            self._agent.deregisterMem(self._local.remove(other).descriptors, [])
        descriptors = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, [(begin, end - begin, 0, b"")])
        with self._naming_errors("memory of this side was refused"):
            self._agent.registerMem(descriptors, [])
        self._local.add(begin, _Segment(end, descriptors=descriptors))

    def unregister(self, region: Region) -> None:
        """After this the agent knows the region no more; if a transfer of an overlapping one runs, after that."""
        with self._lock:
            if self._transferring:
                self._dropped.append(region)
                return
            for begin, _ in self._local.overlapping(region.address, region.address + region.size_bytes):
                descriptors = self._local.remove(begin).descriptors
                if self._agent is not None:
                    self._agent.deregisterMem(descriptors, [])

    # -- transfers -----------------------------------------------------------------------------------------------------

    def transfer(self, part: Part, *, write: bool, check: Callable[[], None]) -> None:
        """Moves a part, within `using`; when it returns or raises, nothing of it is under way any more."""
        try:
            with self._lock:
                handle, is_done = self._post(part, write)
            num_polls = 0
            while not is_done:
                num_polls += 1
                if num_polls % _POLLS_PER_CHECK == 0:
                    check()
                if num_polls > _POLLS_WITHOUT_SLEEP:
                    time.sleep(_POLL_S)
                with self._lock:
                    is_done = self._is_done(self._agent.getXferStatus(handle))
            with self._lock:
                self._agent.releaseXferReq(handle)
        except TransportError:
            self.destroy()
            raise
        except Exception as error:
            self.destroy()
            wait_for_verdict(check)
            raise self._failure(f"{type(error).__name__}: {error}") from error

    def _post(self, part: Part, write: bool) -> tuple[Any, bool]:
        nixl = self._nixl
        sides = (_rows(part.local_addresses, part.lengths), _rows(part.remote_addresses, part.lengths))
        local, remote = (nixl.nixlXferDList(nixl.DRAM_SEG, side) for side in sides)
        operation = nixl.NIXL_WRITE if write else nixl.NIXL_READ
        handle = self._agent.createXferReq(operation, local, remote, self._target.agent, "", [])
        return handle, self._is_done(self._agent.postXferReq(handle, ""))

    def _is_done(self, status: Any) -> bool:
        if status not in (self._nixl.NIXL_SUCCESS, self._nixl.NIXL_IN_PROG):
            raise RuntimeError(str(status))
        return bool(status == self._nixl.NIXL_SUCCESS)

    def destroy(self) -> None:
        """Ends all that is under way; the next use makes another agent."""
        with self._lock:
            # Nobody else has a reference: its destructor runs here, and closes its UCX workers.
            self._agent = None
            self._local = Segments()
            self._dropped.clear()
            self._not_loaded.clear()
            self._is_stale = False

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self.destroy()

    @contextlib.contextmanager
    def _naming_errors(self, problem: str) -> Iterator[None]:
        try:
            yield
        except TransportError:
            raise
        except Exception as error:
            self.destroy()
            raise self._failure(f"{problem}: {type(error).__name__}: {error}") from error

    def _failure(self, found: str) -> TransportError:
        return TransportError(
            f"NIXL cannot reach {self._peer}",
            expected="its agent to answer",
            found=found,
            fix="give both sides the same UCX_TLS, and UCX_NET_DEVICES that reach each other; NIXL_LOG_LEVEL=debug "
            "and UCX_LOG_LEVEL=info say more",
        )


def _rows(addresses: Offsets, lengths: Offsets) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """NIXL's descriptors: address, bytes, device."""
    rows = np.zeros((addresses.size, 3), dtype=np.uint64)
    rows[:, 0], rows[:, 1] = addresses, lengths
    return rows


def _overlap_error(remote: RemoteRegion, others: list[tuple[int, _Segment]]) -> DescriptorError:
    ranges = ", ".join(f"[{begin:#x}, {segment.end:#x})" for begin, segment in others)
    return DescriptorError(
        "regions of a peer overlap, which NIXL cannot have",
        expected="regions that are apart, or one within the other",
        found=f"[{remote.address:#x}, {remote.address + remote.size_bytes:#x}) beside {ranges}",
        fix="let the peer register memory that belongs together as one region",
    )
