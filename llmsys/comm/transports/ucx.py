"""The default transport: the native engine on UCX (`csrc/comm`).

Three paths, chosen for each pair of regions. `shm`: memory that the peer's engine allocated is mapped here, a read is
a copy by our progress thread. `cma`: any memory of a process on this host, by process_vm_readv in large batches.
`ucx`: everything else, by UCX's one-sided operations over what the library has (TCP, verbs, CUDA). The first two need
nothing of the peer's process; UCX over TCP needs its progress thread, which never takes Python's lock.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llmsys import _C
from llmsys.core.errors import DeadlineError, DescriptorError, InputError, PeerLostError, TransportError

from ..bootstrap import Hello, Listener, Session, dial, host_id, job_secret, new_identity
from .base import (
    Capabilities,
    Copies,
    EventQueue,
    Notification,
    Peer,
    PeerEvents,
    Region,
    RemoteRegion,
    Request,
    Transport,
    TransportConfig,
    check_copies,
)
from .peer_table import PeerTable
from .ucx_library import UcxLibrary, find_ucx_library
from .ucx_request import UcxRequest, input_errors, pack_copies


@dataclass(frozen=True, slots=True, kw_only=True)
class UcxOptions:
    """Settings of this transport alone.

    library: see `find_ucx_library`. tls, net_devices: UCX's own settings UCX_TLS and UCX_NET_DEVICES; empty leaves
    them to the environment and UCX. shm, cma: whether the two paths within a host may be used.
    spin: the progress thread polls instead of sleeping; saves microseconds a message, costs a core.
    slice_bytes: what is moved for one peer before others have their turn. window: UCX operations in flight per peer.
    max_message_bytes: the longest notification.
    num_copy_threads: share the copies of the paths within a host, the progress thread included; the others sleep
    while there is nothing to copy. 0 means two, or one where the process may use only one core.
    huge_pages: ask the kernel to put registered memory that is in use into huge pages. Reading them from another
    process is faster, since each page costs it a look-up; registering takes 0.4 s a GiB or more longer.
    test_slice_delay_us: a sleep after each slice, by which tests act in the middle of a batch.
    """

    library: str = "auto"
    tls: str = ""
    net_devices: str = ""
    shm: bool = True
    cma: bool = True
    spin: bool = False
    slice_bytes: int = 4 << 20
    window: int = 256
    max_message_bytes: int = 1 << 20
    num_copy_threads: int = 0
    huge_pages: bool = True
    test_slice_delay_us: int = 0


class UcxTransport(Transport):
    """One endpoint with its native engine and a Python thread that delivers events. See `base.Transport`."""

    name = "ucx"

    def __init__(self, config: TransportConfig | None = None, options: UcxOptions | None = None) -> None:
        self._config = config or TransportConfig()
        self._options = options or UcxOptions()
        self._secret = job_secret(self._config)
        self._library = find_ucx_library(self._options.library)
        self._engine = _make_engine(self._config, self._options, self._library)
        self._lock = threading.Condition()
        self._peers: dict[int, Peer] = {}
        self._established: set[int] = set()
        self._gone: dict[int, str] = {}
        self._regions: dict[int, tuple[Region, object]] = {}
        self._table = PeerTable(lambda: self._local)
        self._watched: dict[int, UcxRequest] = {}
        self._queue = EventQueue()
        self._own_events: deque[Callable[[PeerEvents], None]] = deque()
        self._closed = False
        name, generation = new_identity(self._config)
        self._host_id = host_id()
        self._listener = Listener(
            host=self._config.host,
            port=self._config.port,
            secret=self._secret,
            hello=self._hello,
            accepted=self._accepted,
            admit=self._table.admit,
            failed=self._table.failed,
            start_now=False,
        )
        self._local = Peer(peer_id=0, name=name, generation=generation, address=self._listener.address)
        self._events = threading.Thread(target=self._deliver, name="llmsys-ucx-events", daemon=True)
        self._events.start()
        self._listener.start()
        # The event thread waits in native code, and Python cannot end such a thread: it must have ended before.
        atexit.register(self.close)

    @classmethod
    def available(cls) -> str | None:
        if not _C.engine_built():
            return "llmsys._C was built without UCX's headers: pip install libucx-cu12, then build again"
        try:
            find_ucx_library()
        except Exception as error:
            return str(error)
        return None

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(one_sided=True, passive=True, allocates=True, shares_process=True, devices=("cpu", "cuda"))

    @property
    def config(self) -> TransportConfig:
        return self._config

    @property
    def local(self) -> Peer:
        return self._local

    @property
    def max_message_bytes(self) -> int:
        return self._options.max_message_bytes

    def describe(self) -> dict[str, str]:
        info = self._engine.info()
        return {
            "library": f"UCX {info['version']} ({self._library.origin}: {info['library']})",
            "transports": ", ".join(info["transports"]),
            "ucx_tls": info["tls"],
            "paths": ", ".join(["shm"] * self._options.shm + ["cma"] * self._options.cma + ["ucx"]),
            "progress": "spinning" if self._options.spin else "sleeping",
        }

    def stats(self) -> _C.EngineStats:
        """Counters of the native engine, and the processor time of its thread."""
        return self._engine.stats()

    def set_events(self, events: PeerEvents) -> None:
        self._queue.set_listener(events)

    # -- memory ------------------------------------------------------------------------------------------------------

    def register(self, address: int, size_bytes: int, *, device: str = "cpu", owner: object = None) -> Region:
        with input_errors("memory cannot be registered"):
            region_id = self._engine.register_memory(address, size_bytes, device.partition(":")[0])
        return self._add_region(region_id, address, size_bytes, device, owner)

    def allocate(self, size_bytes: int) -> Region:
        with input_errors("memory cannot be allocated"):
            region_id, address = self._engine.allocate(size_bytes)
        return self._add_region(region_id, address, size_bytes, "cpu", None)

    def _add_region(self, region_id: int, address: int, size_bytes: int, device: str, owner: object) -> Region:
        region = Region(
            region_id=region_id,
            address=address,
            size_bytes=size_bytes,
            device=device,
            remote_key=self._engine.remote_key(region_id),
        )
        with self._lock:
            self._regions[region_id] = (region, owner)
        return region

    def release(self, region: Region) -> None:
        with input_errors("a region cannot be released"):
            self._engine.release(region.region_id)
        with self._lock:
            self._regions.pop(region.region_id, None)

    def import_region(
        self, peer: Peer, *, address: int, size_bytes: int, device: str, remote_key: bytes
    ) -> RemoteRegion:
        kind = device.partition(":")[0]
        try:
            with self._alive(peer, "import a region"):
                remote_id = self._engine.import_remote(peer.peer_id, remote_key, address, size_bytes, kind)
                path = self._engine.remote_path(remote_id)
        except RuntimeError as error:  # lost, and its event is still on the way
            raise PeerLostError(
                f"a region of {peer} cannot be imported",
                expected="a peer that is connected",
                found=str(error),
                fix="connect to its address again; that gives a new Peer",
            ) from error
        except (ValueError, TypeError) as error:
            raise DescriptorError(
                f"a region of {peer} cannot be imported",
                expected="address, size, device and key as the peer's Region has them",
                found=str(error),
                fix="get the descriptor from the peer again, unchanged",
            ) from error
        return RemoteRegion(
            remote_id=remote_id,
            peer_id=peer.peer_id,
            address=address,
            size_bytes=size_bytes,
            device=device,
            path=path,
        )

    def forget_region(self, remote: RemoteRegion) -> None:
        try:
            self._engine.drop_remote(remote.remote_id)
        except ValueError as error:
            with self._lock:
                if remote.peer_id not in self._peers:
                    return  # it went with its peer
            raise InputError(
                "an imported region cannot be dropped",
                expected="one that no request uses",
                found=str(error),
                fix="wait for the requests that use it",
            ) from error

    # -- peers -------------------------------------------------------------------------------------------------------

    def connect(self, address: str, *, timeout_s: float | None = None) -> Peer:
        timeout_s = self._config.connect_timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + timeout_s
        peer = self._table.connect(address, timeout_s=timeout_s, dial=lambda left_s: self._dial(address, left_s))
        self._wait_established(peer, deadline_s, timeout_s)
        return peer

    def _dial(self, address: str, timeout_s: float) -> Peer:
        sock, hello, session = dial(address, secret=self._secret, hello=self._hello(), timeout_s=timeout_s)
        return self._add_peer(sock, hello, session)

    def _wait_established(self, peer: Peer, deadline_s: float, timeout_s: float) -> None:
        with self._lock:
            here = self._lock.wait_for(
                lambda: peer.peer_id in self._established or peer.peer_id not in self._peers or self._closed,
                timeout=max(deadline_s - time.monotonic(), 0.0),
            )
            if peer.peer_id in self._established:
                return
            reason = self._gone.get(peer.peer_id, "this endpoint was closed")
        if not here:
            self.disconnect(peer)
            raise _no_answer(peer.address, timeout_s, "its handshake, but no heartbeat of its engine")
        raise PeerLostError(
            f"{peer} was lost while connecting",
            expected="a heartbeat of its engine",
            found=reason,
            fix="look at that process, then connect again",
        )

    def _hello(self) -> Hello:
        pid, address, nonce = self._engine.probe()
        return Hello(
            protocol=self.name,
            name=self._local.name,
            generation=self._local.generation,
            address=self._local.address,
            host_id=self._host_id,
            pid=pid,
            lease_s=self._config.lease_s,
            details={"worker": self._engine.worker_address(), "probe_address": address, "probe_nonce": nonce},
        )

    def _accepted(self, sock: socket.socket, hello: Hello, session: Session) -> None:
        self._add_peer(sock, hello, session)

    def _add_peer(self, sock: socket.socket, hello: Hello, session: Session) -> Peer:
        details = hello.details
        worker, address, nonce = (details.get(key) for key in ("worker", "probe_address", "probe_nonce"))
        if not (isinstance(worker, bytes) and isinstance(address, int) and isinstance(nonce, bytes)):
            sock.close()
            raise TransportError(
                f"{hello.name} at {hello.address} does not say how its engine is reached",
                expected="worker, probe_address and probe_nonce in its hello",
                found=", ".join(sorted(details)) or "nothing",
                fix="run the same version of llmsys on both sides",
            )
        # A process id and a name in /dev/shm of another host or container mean something else here.
        probe = (hello.pid, address, nonce) if hello.host_id == self._host_id else None
        # With the lock held, so that the event thread finds the peer when its first event arrives.
        with self._lock:
            if self._closed:
                sock.close()
                raise _closed_error()
            try:
                peer_id = self._engine.add_peer(
                    hello.name, sock.detach(), worker, session.token_in, session.token_out, hello.lease_s, probe
                )
            except (RuntimeError, ValueError) as error:
                raise TransportError(
                    f"no connection to {hello.name} at {hello.address}",
                    expected="a UCX worker that this side can reach",
                    found=str(error),
                    fix="give both sides the same UCX_TLS, and UCX_NET_DEVICES that reach each other",
                ) from error
            peer = Peer(peer_id=peer_id, name=hello.name, generation=hello.generation, address=hello.address)
            self._peers[peer_id] = peer
            self._table.add(peer)
            return peer

    def disconnect(self, peer: Peer) -> None:
        with self._lock:
            if peer.peer_id not in self._peers:
                return
            announced = self._forget(peer.peer_id, "disconnected here")
        with contextlib.suppress(ValueError, RuntimeError):  # it was lost meanwhile, or all was closed
            self._engine.remove_peer(peer.peer_id)
        if announced:
            self._own_events.append(lambda events: events.peer_lost(peer, "disconnected here", True))
            self._engine.wake()

    def _forget(self, peer_id: int, reason: str) -> bool:
        """Takes a peer off the lists; whether it had been announced. With the lock held."""
        announced = peer_id in self._established
        peer = self._peers.pop(peer_id, None)
        if peer is not None:
            self._table.remove(peer)
        self._established.discard(peer_id)
        self._gone[peer_id] = reason
        self._lock.notify_all()
        return announced

    def peers(self) -> tuple[Peer, ...]:
        with self._lock:
            return tuple(peer for peer_id, peer in sorted(self._peers.items()) if peer_id in self._established)

    @contextlib.contextmanager
    def _alive(self, peer: Peer, operation: str) -> Iterator[None]:
        """Around a call of the engine for a peer, which may be lost, and its ids forgotten, at any moment."""
        self._check_alive(peer, operation)
        try:
            yield
        except (ValueError, RuntimeError):
            self._check_alive(peer, operation)
            raise

    def _check_alive(self, peer: Peer, operation: str) -> None:
        with self._lock:
            if self._closed:
                raise _closed_error()
            reason = None if peer.peer_id in self._peers else self._gone.get(peer.peer_id, "it was never connected")
        if reason is not None:
            raise PeerLostError(
                f"cannot {operation}: {peer} is not connected",
                expected="a peer of Transport.peers()",
                found=reason,
                fix="connect to its address again; that gives a new Peer",
            )

    # -- operations --------------------------------------------------------------------------------------------------

    def read(self, peer: Peer, copies: Sequence[Copies], *, coalesce: bool = True) -> Request:
        return self._post(False, peer, copies, coalesce)

    def write(self, peer: Peer, copies: Sequence[Copies], *, coalesce: bool = True) -> Request:
        return self._post(True, peer, copies, coalesce)

    def _post(self, write: bool, peer: Peer, copies: Sequence[Copies], coalesce: bool) -> Request:
        operation = "write" if write else "read"
        self._check_alive(peer, operation)
        check_copies(copies, peer)
        groups, local_offsets, remote_offsets, lengths = pack_copies(copies)
        with input_errors(f"a {operation} was refused before any byte moved"), self._alive(peer, operation):
            native = self._engine.post(write, peer.peer_id, groups, local_offsets, remote_offsets, lengths, coalesce)
        return UcxRequest(self._watch, native, f"{operation} {'to' if write else 'from'} {peer}")

    def notify(self, peer: Peer, payload: bytes) -> Request:
        with input_errors("a notification was refused"), self._alive(peer, "notify"):
            native = self._engine.notify(peer.peer_id, payload)
        return UcxRequest(self._watch, native, f"notification of {peer}")

    def _watch(self, request: UcxRequest, native: _C.Request) -> None:
        with self._lock:
            if not self._closed:
                self._watched[native.id] = request
                native.watch()
                return
        request.ended()

    # -- events ------------------------------------------------------------------------------------------------------

    def _deliver(self) -> None:
        while True:
            event = self._engine.next_event(1.0)
            if event is not None:
                self._dispatch(event)
            while self._own_events:
                self._queue.put(self._own_events.popleft())
            if event is None and self._closed:
                return

    def _dispatch(self, event: _C.Event) -> None:
        if event[0] == "done":
            with self._lock:
                request = self._watched.pop(event[1], None)
            if request is not None:
                request.ended()
            return
        peer_id = event[1]
        with self._lock:
            peer = self._peers.get(peer_id)
            if peer is None:
                return
            if event[0] == "established":
                self._established.add(peer_id)
                self._lock.notify_all()
            announced = event[0] != "lost" or self._forget(peer_id, event[2])
        if event[0] == "lost":
            with contextlib.suppress(ValueError, RuntimeError):  # disconnected meanwhile, or all is closed
                self._engine.remove_peer(peer_id)
        if not announced:
            return
        if event[0] == "established":
            self._queue.put(lambda events: events.peer_joined(peer))
        elif event[0] == "lost":
            _, _, reason, left = event
            self._queue.put(lambda events: events.peer_lost(peer, reason, left))
        else:
            notification = Notification(peer=peer, message_id=event[2], payload=event[3])
            self._queue.put(lambda events: events.notified(notification))

    def close(self) -> None:
        with self._lock:
            first, self._closed = not self._closed, True
            self._lock.notify_all()
        if not first:
            return
        self._table.close()
        self._listener.close()
        self._engine.close()
        self._engine.wake()
        if threading.current_thread() is not self._events:
            self._events.join()
        with self._lock:
            left = list(self._watched.values())
            self._watched.clear()
            self._regions.clear()
            self._peers.clear()
            self._established.clear()
        for request in left:
            request.ended()


def _make_engine(config: TransportConfig, options: UcxOptions, library: UcxLibrary) -> _C.Engine:
    settings = {"TLS": options.tls, "NET_DEVICES": options.net_devices}
    with input_errors("the UCX engine cannot start"):
        return _C.Engine(
            library.path,
            ucx_config={key: value for key, value in settings.items() if value},
            spin=options.spin,
            heartbeat_s=config.heartbeat_s or config.lease_s / 4,
            lease_s=config.lease_s,
            shm=options.shm,
            cma=options.cma,
            max_message_bytes=options.max_message_bytes,
            slice_bytes=options.slice_bytes,
            window=options.window,
            num_copy_threads=options.num_copy_threads or min(2, len(os.sched_getaffinity(0))),
            huge_pages=options.huge_pages,
            test_slice_delay_us=options.test_slice_delay_us,
        )


def _closed_error() -> TransportError:
    return TransportError(
        "this endpoint is closed",
        expected="an open transport",
        found="close() was called",
        fix="make another transport",
    )


def _no_answer(address: str, timeout_s: float, found: str) -> DeadlineError:
    return DeadlineError(
        f"no connection to {address} in time",
        expected=f"an established connection within {timeout_s} s",
        found=found,
        fix="raise timeout_s or TransportConfig.connect_timeout_s",
    )
