"""The one-sided operations of ucx-py, which was KVDirect's first transport. Optional, and within one host only.

ucx-py has no way to give up an operation, so this adapter uses it where none is left over: on one host, where UCX reads
and writes another process's memory within the call (CMA). Each endpoint has a worker that a thread of its own drives,
for peers to join, and one for each peer that it reads from or writes to. Notifications are the control plane's.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import secrets
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmsys.comm.bootstrap import Hello, host_id
from llmsys.comm.transports.base import Capabilities, Peer, Region, RemoteRegion, TransportConfig
from llmsys.comm.transports.batch_parts import Part, bytes_at, parts_of, wait_for_verdict
from llmsys.comm.transports.memory import Batch
from llmsys.comm.transports.peer_table import lost_error
from llmsys.comm.transports.python_base import PythonTransport
from llmsys.core.errors import TransportError

_PROBE_BYTES = 32
_MAX_ENTRIES = 1024
_POLL_S = 50e-6
_GIVE_UP_S = 30.0
_NEEDED = ("UCXContext", "UCXWorker", "UCXEndpoint", "UCXAddress", "UCXMemoryHandle", "PackedRemoteKey", "RemoteMemory")
_HOW_TO_GET = (
    "the packages of that name on PyPI are placeholders: install ucx-py-cu12 from NVIDIA's index, or build ucx-py 0.45 "
    "from its source against libucx-cu12==1.18.1"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class UcxPyOptions:
    """Settings of this transport alone. tls: UCX_TLS; empty leaves it to the environment and UCX.

    slice_bytes: what is moved between two looks at the lease.
    """

    tls: str = ""
    slice_bytes: int = 16 << 20


def _load() -> Any:
    """ucx-py's module of UCX objects; ImportError or AttributeError if it is not there or not the right one."""
    api = importlib.import_module("ucp._libs.ucx_api")
    for name in _NEEDED:
        getattr(api, name)
    return api


class UcxPyTransport(PythonTransport):
    """See the module's text and `base.Transport`."""

    name = "ucx_py"

    def __init__(self, config: TransportConfig | None = None, options: UcxPyOptions | None = None) -> None:
        super().__init__(config)
        self._options = options or UcxPyOptions()
        self._api = _load()
        settings = {"TLS": self._options.tls} if self._options.tls else {}
        self._context = self._api.UCXContext(settings)
        self._handles: dict[int, Any] = {}
        self._links: dict[int, _Link] = {}
        self._lock = threading.Lock()
        self._probe = np.frombuffer(secrets.token_bytes(_PROBE_BYTES), dtype=np.uint8).copy()
        self._probe_key = self._map(0, self._probe)
        self._host_id = host_id()
        self._server = _Server(self._api.UCXWorker(self._context))
        self._start()

    @classmethod
    def available(cls) -> str | None:
        try:
            if importlib.util.find_spec("ucp") is None:
                return f"ucx-py is not installed; {_HOW_TO_GET}"
            _load()
        except Exception as error:
            return f"what is installed as ucp is not ucx-py 0.45 ({type(error).__name__}: {error}); {_HOW_TO_GET}"
        return None

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(one_sided=True, passive=True, allocates=True, shares_process=True, fenced=False)

    def describe(self) -> dict[str, str]:
        ucx = ".".join(str(number) for number in self._api.get_ucx_version())
        return {
            "library": f"ucx-py {_installed_version()}, UCX {ucx}",
            "transports": f"UCX_TLS={self._context.get_config().get('TLS', '')}",
            "slice_bytes": str(self._options.slice_bytes),
            "notifications": "control plane",
        }

    # -- memory --------------------------------------------------------------------------------------------------------

    def _map(self, region_id: int, memory: Any) -> bytes:
        handle = self._api.UCXMemoryHandle.map(self._context, memory)
        with self._lock:
            self._handles[region_id] = handle
        return bytes(handle.pack_rkey())

    def _register(self, region_id: int, address: int, size_bytes: int, device: str) -> bytes:
        return self._map(region_id, bytes_at(address, size_bytes))

    def _unregister(self, region: Region) -> None:
        with self._lock:
            handle = self._handles.pop(region.region_id)
        handle.close()

    def _import(self, peer: Peer, remote: RemoteRegion, inner: bytes) -> None:
        self._link(peer).add(remote.remote_id, inner, remote.address, remote.size_bytes)

    def _forget(self, remote: RemoteRegion) -> None:
        with self._lock:
            link = self._links.get(remote.peer_id)
        if link is not None:
            link.regions.pop(remote.remote_id, None)

    # -- peers ---------------------------------------------------------------------------------------------------------

    def _hello_details(self) -> dict[str, bytes | int | str]:
        return {
            "worker": self._server.address,
            "probe_address": self._probe.ctypes.data,
            "probe_key": self._probe_key,
            "probe": self._probe.tobytes(),
        }

    def _add_peer(self, peer: Peer, hello: Hello) -> None:
        details = [hello.details.get(name) for name in ("worker", "probe_address", "probe_key", "probe")]
        kinds = (bytes, int, bytes, bytes)
        fits = all(isinstance(value, kind) for value, kind in zip(details, kinds, strict=True))
        if hello.host_id != self._host_id or not fits:
            raise TransportError(
                f"{peer} cannot be reached by ucx-py",
                expected="an endpoint of this release, on this host",
                found="another host or container" if fits else f"a hello with {sorted(hello.details)}",
                fix="use transport 'ucx', which also reaches other hosts",
            )
        address, probe_address, probe_key, probe = details
        assert isinstance(probe_address, int)
        link = _Link(self._api, self._api.UCXWorker(self._context), peer, address)
        deadline = time.monotonic() + self._config.connect_timeout_s

        def check() -> None:
            if time.monotonic() >= deadline:
                raise link.failure(f"no answer within {self._config.connect_timeout_s:.3g} s")

        link.add(0, probe_key, probe_address, _PROBE_BYTES)
        found = np.zeros(_PROBE_BYTES, dtype=np.uint8)
        zero, size = np.array([0]), np.array([_PROBE_BYTES])
        part = Part(
            local_addresses=zero + found.ctypes.data, remote_addresses=zero + probe_address, lengths=size, groups=zero
        )
        link.move(part, [0], [probe_address], write=False, check=check)
        if found.tobytes() != probe:
            raise link.failure("other bytes than its probe: its address leads to another process")
        with self._lock:
            self._links[peer.peer_id] = link

    def connect(self, address: str, *, timeout_s: float | None = None) -> Peer:
        peer = super().connect(address, timeout_s=timeout_s)
        # The peer takes us for connected only when it has read our probe too; heartbeats come after that.
        self._control.wait_alive(peer)
        return peer

    def _link(self, peer: Peer) -> _Link:
        with self._lock:
            link = self._links.get(peer.peer_id)
        if link is None:
            raise lost_error(peer, "it is not connected any more")
        return link

    def _remove_peer(self, peer: Peer) -> None:
        with self._lock:
            link = self._links.pop(peer.peer_id)
        link.close()

    def _close_library(self) -> None:
        self._server.close()
        for handle in self._handles.values():
            handle.close()
        self._context.close()

    # -- transfers -----------------------------------------------------------------------------------------------------

    def _execute(self, peer: Peer, batch: Batch, check: Callable[[], None]) -> None:
        link = self._link(peer)
        remote_ids = [group.remote.remote_id for group in batch.groups]
        begins = [group.remote.address for group in batch.groups]
        for part in parts_of(batch, max_bytes=self._options.slice_bytes, max_entries=_MAX_ENTRIES):
            check()
            link.move(part, remote_ids, begins, write=batch.write, check=check)


class _Server:
    """A worker that lets peers join, driven by a thread that sleeps until there is something to do."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self.address = bytes(worker.get_address())
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._events_fd = worker.init_blocking_progress_mode()
        self._thread = threading.Thread(target=self._run, name="llmsys-ucx-py-progress", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._worker.progress()
            # What came in between makes arming fail.
            if self._worker.arm() and self._wake_fd in select.select([self._events_fd, self._wake_fd], [], [])[0]:
                return

    def close(self) -> None:
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join()
        self._worker.close()
        os.close(self._events_fd)
        os.close(self._wake_fd)


@dataclass(slots=True)
class _Under:
    """Operations that UCX has not ended so far."""

    num: int = 0
    errors: list[Exception] = field(default_factory=list)

    def ended(self, request: object, exception: Exception | None) -> None:
        self.num -= 1
        if exception is not None:
            self.errors.append(exception)


class _Link:
    """The way to one peer's memory; used by the peer's thread alone, but for `add`."""

    def __init__(self, api: Any, worker: Any, peer: Peer, address: Any) -> None:
        self._api, self._worker, self._peer = api, worker, peer
        # With ucx-py's error handling UCX would use TCP, also on one host.
        self._endpoint = api.UCXEndpoint.create_from_worker_address(
            worker, api.UCXAddress.from_buffer(address), endpoint_error_handling=False
        )
        self.regions: dict[int, Any] = {}

    def add(self, remote_id: int, key: Any, address: Any, size_bytes: int) -> None:
        try:
            rkey = self._endpoint.unpack_rkey(self._api.PackedRemoteKey.from_buffer(key))
        except Exception as error:
            raise self.failure(f"a key that UCX refuses: {error}") from error
        self.regions[remote_id] = self._api.RemoteMemory(rkey, address, size_bytes)

    def move(
        self, part: Part, remote_ids: list[int], begins: list[int], *, write: bool, check: Callable[[], None]
    ) -> None:
        """Moves a part whose groups are of these remote regions; nothing of it is left when this returns or raises."""
        under = _Under()
        rows = zip(
            part.groups.tolist(),
            part.local_addresses.tolist(),
            part.remote_addresses.tolist(),
            part.lengths.tolist(),
            strict=True,
        )
        try:
            for group, local, remote, length in rows:
                region = self.regions[remote_ids[group]]
                operation = region.put_nb if write else region.get_nb
                offset = remote - begins[group]
                self._count(under, operation(bytes_at(local, length), under.ended, size=length, offset=offset))
            if write:
                self._count(under, self._endpoint.flush(under.ended))
        except Exception as error:  # UCX's, when the peer's process has ended.
            under.errors.append(error)
        self._settle(under, check)
        if under.errors:
            wait_for_verdict(check)
            raise self.failure(str(under.errors[0])) from under.errors[0]

    def _count(self, under: _Under, request: object) -> None:
        under.num += request is not None

    def _settle(self, under: _Under, check: Callable[[], None]) -> None:
        """Waits for what is under way, which is nothing on one host once the endpoint has joined."""
        lost: Exception | None = None
        give_up_s = 0.0
        while under.num:
            self._worker.progress()
            if lost is None:
                try:
                    check()
                except Exception as error:
                    lost, give_up_s = error, time.monotonic() + _GIVE_UP_S
            elif time.monotonic() >= give_up_s:
                raise self.failure(
                    f"{under.num} operations that UCX neither ends nor gives up: do not reuse the memory they are for"
                ) from lost
            time.sleep(_POLL_S)
        if lost is not None:
            raise lost

    def failure(self, found: str) -> TransportError:
        return TransportError(
            f"ucx-py cannot reach {self._peer}",
            expected="UCX to read and write its memory",
            found=found,
            fix="give both sides the same UCX_TLS; UCX_LOG_LEVEL=info says more",
        )

    def close(self) -> None:
        self.regions.clear()
        self._endpoint.close()
        self._worker.close()


def _installed_version() -> str:
    for name in ("ucx-py", "ucx-py-cu12", "ucx-py-cu13"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"
