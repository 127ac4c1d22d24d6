"""Endpoints in one process that copy with memmove: the oracle of the contract, with faults on demand.

Addresses are "loopback:NAME". Nothing is sent, so leases are modelled: an endpoint is heard of all the time unless it
is paused, and its peers' rights to its memory end one lease of its own after that. A thread for each endpoint moves its
batches in slices, delivers messages to it, and ends its requests.
"""

from __future__ import annotations

import ctypes
import heapq
import hmac
import itertools
import random
import struct
import threading
import time
from collections import Counter

from llmsys.comm.bootstrap import job_secret, new_identity
from llmsys.comm.transports.base import (
    Capabilities,
    EventQueue,
    Notification,
    Peer,
    PeerEvents,
    Region,
    RemoteRegion,
    TransportConfig,
)
from llmsys.comm.transports.loopback_faults import Faults
from llmsys.comm.transports.loopback_link import Link, Network, Operation, Slice, slices_of
from llmsys.comm.transports.memory import Batch, unpack_key
from llmsys.comm.transports.peer_table import lost_error
from llmsys.comm.transports.region_transport import RegionTransport, failed_error
from llmsys.comm.transports.requests import PostedRequest
from llmsys.core.errors import (
    AuthenticationError,
    DeadlineError,
    DescriptorError,
    InputError,
    LeaseExpiredError,
    TransportError,
)

_NETWORK = Network()
_PREFIX = "loopback:"
_NUM_REORDERED = 4
# The generation of the endpoint, and its region.
_KEY = struct.Struct("<QQ")


class LoopbackTransport(RegionTransport):
    """See the module's text and `base.Transport`. faults: what goes wrong with what this endpoint sends."""

    name = "loopback"

    def __init__(self, config: TransportConfig | None = None, *, faults: Faults | None = None) -> None:
        super().__init__(config)
        self._faults = faults or Faults()
        self._secret = job_secret(self._config)
        self._random = random.Random(self._faults.seed)
        name, generation = new_identity(self._config)
        self._local = Peer(peer_id=0, name=name, generation=generation, address=_PREFIX + name)
        self._queue = EventQueue()
        self._changed = threading.Condition(_NETWORK.lock)
        self._links: dict[int, Link] = {}
        self._ids = itertools.count(1)
        self._targets: dict[int, int] = {}
        self._touched: Counter[int] = Counter()
        self._turn = 0
        self._num_connects = 0
        self._paused_s: float | None = None
        with _NETWORK.lock:
            is_new = _NETWORK.endpoints.setdefault(name, self) is self
        if not is_new:
            self._event_thread.close()
            raise InputError(
                f"there is an endpoint {name!r} already",
                expected="a name for each endpoint of the process",
                found=f"{name!r} twice",
                fix="close the other one first, or set another TransportConfig.name",
            )
        self._worker = threading.Thread(target=self._run, name="llmsys-loopback", daemon=True)
        self._worker.start()

    @classmethod
    def available(cls) -> str | None:
        return None

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(one_sided=True, passive=True, allocates=True, shares_process=True)

    @property
    def local(self) -> Peer:
        return self._local

    def describe(self) -> dict[str, str]:
        return {"library": "none", "transports": "memmove within the process", "faults": str(self._faults)}

    def set_events(self, events: PeerEvents) -> None:
        self._queue.set_listener(events)

    # -- memory --------------------------------------------------------------------------------------------------------

    def _register(self, region_id: int, address: int, size_bytes: int, device: str) -> bytes:
        return _KEY.pack(self._local.generation, region_id)

    def _unregister(self, region: Region) -> None:
        # A peer's copy may be half done: the memory stays until it is.
        with _NETWORK.lock:
            self._changed.wait_for(lambda: not self._touched[region.region_id])

    def import_region(
        self, peer: Peer, *, address: int, size_bytes: int, device: str, remote_key: bytes
    ) -> RemoteRegion:
        inner = unpack_key(self.name, remote_key, address=address, size_bytes=size_bytes, device=device)
        with _NETWORK.lock:
            link = self._link(peer)
            generation, region_id = _KEY.unpack(inner) if len(inner) == _KEY.size else (0, 0)
            region = link.far.endpoint._memory.find(region_id)
            if generation != peer.generation or region is None or region.remote_key != remote_key:
                raise DescriptorError(
                    f"a region of {peer} cannot be imported",
                    expected=f"the key of a region that is registered there, in generation {peer.generation}",
                    found=f"region {region_id} of generation {generation}",
                    fix="get the descriptor from the peer again",
                )
            remote = RemoteRegion(
                remote_id=self._memory.new_id(),
                peer_id=peer.peer_id,
                address=address,
                size_bytes=size_bytes,
                device=device,
                path="memmove",
            )
            self._memory.add_remote(remote)
            self._targets[remote.remote_id] = region_id
            return remote

    def forget_region(self, remote: RemoteRegion) -> None:
        with _NETWORK.lock:
            self._memory.remove_remote(remote)

    # -- peers ---------------------------------------------------------------------------------------------------------

    def connect(self, address: str, *, timeout_s: float | None = None) -> Peer:
        timeout_s = self._config.connect_timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        with _NETWORK.lock:
            self._num_connects += 1
            is_lost = self._faults.loses("connect", 0, self._num_connects)
            while True:
                self._check_open()
                far = _NETWORK.endpoints.get(address.removeprefix(_PREFIX)) if address.startswith(_PREFIX) else None
                if far is None or far is self or is_lost:
                    raise TransportError(
                        f"no connection to {address}",
                        expected='another endpoint of this process, "loopback:NAME"',
                        found="an injected fault" if is_lost else "none of that name",
                        fix=f"there are: {', '.join(_PREFIX + name for name in sorted(_NETWORK.endpoints))}",
                    )
                for link in self._links.values():
                    if link.far.endpoint is far and link.error is None:
                        return link.peer
                if far._paused_s is None:
                    return self._join(far)
                if not self._changed.wait(max(deadline - time.monotonic(), 0.0)):
                    raise DeadlineError(
                        f"no connection to {address} in time",
                        expected=f"its answer within {timeout_s:.3g} s",
                        found="silence: it is paused",
                        fix="resume it, or raise timeout_s",
                    )

    def _join(self, far: LoopbackTransport) -> Peer:
        """Makes both sides of a connection. With the lock held."""
        if not hmac.compare_digest(self._secret, far._secret):
            raise AuthenticationError(
                f"{far._local.address} does not have our job's secret",
                expected="the same secret as ours",
                found="another",
                fix="give every process of the job the same secret (TransportConfig.secret or LLMSYS_JOB_SECRET)",
            )
        near_link, far_link = self._new_link(far), far._new_link(self)
        near_link.far, far_link.far = far_link, near_link
        return near_link.peer

    def _new_link(self, far: LoopbackTransport) -> Link:
        name, generation, address = far._local.name, far._local.generation, far._local.address
        peer = Peer(peer_id=next(self._ids), name=name, generation=generation, address=address)
        link = self._links[peer.peer_id] = Link(self, peer)
        self._event_thread.post(lambda: self._queue.put(lambda events: events.peer_joined(peer)))
        return link

    def disconnect(self, peer: Peer) -> None:
        with _NETWORK.lock:
            link = self._links.get(peer.peer_id)
            if link is not None:
                _lose(link, "disconnected here", "it said goodbye", left=True)
                self._wait_copied([link])

    def peers(self) -> tuple[Peer, ...]:
        with _NETWORK.lock:
            return tuple(link.peer for link in self._links.values() if link.error is None)

    def pause(self) -> None:
        """Stops as a stopped process does: nothing is sent, delivered or ended until `resume`. Leases run on."""
        with _NETWORK.lock:
            if self._paused_s is None:
                self._paused_s = time.monotonic()
                self._changed.wait_for(lambda: not any(link.is_copying for link in self._links.values()))
                self._wake_all()

    def resume(self) -> None:
        with _NETWORK.lock:
            self._paused_s = None
            self._wake_all()

    def close(self) -> None:
        self._shut_down("it said goodbye", left=True)

    def crash(self) -> None:
        """Ends as a killed process does, without a goodbye."""
        self._shut_down("its connection ended", left=False)

    def _shut_down(self, reason: str, *, left: bool) -> None:
        with _NETWORK.lock:
            first, self._closed = not self._closed, True
            self._paused_s = None
            if first:
                del _NETWORK.endpoints[self._local.name]
                links = list(self._links.values())
                for link in links:
                    _lose(link, "this endpoint was closed", reason, left=left)
                self._wait_copied(links)
                self._wake_all()
        if threading.current_thread() is not self._worker:
            self._worker.join()
        self._event_thread.close()

    def _wait_copied(self, links: list[Link]) -> None:
        # What the other side copies to or from here ends too: after this the program may free its memory.
        self._changed.wait_for(lambda: not any(link.is_copying or link.far.is_copying for link in links))

    def _wake_all(self) -> None:
        # Also those that wait in `connect`.
        for endpoint in {self, *_NETWORK.endpoints.values(), *(link.far.endpoint for link in self._links.values())}:
            endpoint._changed.notify_all()

    def _check_connected(self, peer: Peer) -> None:
        with _NETWORK.lock:
            self._link(peer)

    def _link(self, peer: Peer) -> Link:
        """The connection, if it is alive. With the lock held."""
        self._check_open()
        link = self._links.get(peer.peer_id)
        if link is None or link.peer != peer or link.error is not None:
            raise lost_error(peer, link.reason if link is not None else "it is not connected")
        return link

    # -- operations ----------------------------------------------------------------------------------------------------

    def _enqueue_batch(self, peer: Peer, batch: Batch, request: PostedRequest) -> None:
        self._enqueue(peer, Operation(request, batch))

    def _enqueue_message(self, peer: Peer, payload: bytes, request: PostedRequest) -> None:
        self._enqueue(peer, Operation(request, payload=payload))

    def _enqueue(self, peer: Peer, operation: Operation) -> None:
        with _NETWORK.lock:
            link = self._links.get(peer.peer_id)
            if link is not None and link.error is None:
                link.num_posted += 1
                operation.number = link.num_posted
                link.queue.append(operation)
                self._changed.notify_all()
                return
        self._end(operation, lost_error(peer, "it is not connected any more"))

    # -- the endpoint's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with _NETWORK.lock:
                work = self._next_work()
                if work is None:
                    return
                link, operation, part, region_id = work
            for destination, source, size_bytes in part:
                ctypes.memmove(destination, source, size_bytes)
            with _NETWORK.lock:
                link.is_copying = False
                link.far.endpoint._touched[region_id] -= 1
                operation.copied_bytes += sum(size_bytes for _, _, size_bytes in part)
                for endpoint in (self, link.far.endpoint):
                    endpoint._changed.notify_all()

    def _next_work(self) -> tuple[Link, Operation, Slice, int] | None:
        """Does all that needs no copying, and waits, until there is a slice to copy; None when it is closed."""
        while True:
            now_s = time.monotonic()
            if self._paused_s is not None:
                self._changed.wait()
                continue
            self._expire_leases(now_s)
            for link in list(self._links.values()):
                self._advance(link, now_s)
                if link.error is not None:
                    self._end_link(link)
            if self._closed:
                return None
            ready = [(link, op) for link in self._links.values() for op in link.running if not op.is_copied]
            if ready:
                self._turn += 1
                link, operation = ready[self._turn % len(ready)]
                if self._faults.reorder:
                    link, operation = self._random.choice(ready)
                if work := self._next_slice(link, operation, now_s):
                    return work
            else:
                self._changed.wait(self._idle_s(now_s))

    def _idle_s(self, now_s: float) -> float | None:
        times: list[float] = []
        for link in self._links.values():
            times += [operation.finish_s for operation in link.running]
            times += [link.inbox[0][0]] if link.inbox else []
            paused_s = link.far.endpoint._paused_s
            times += [paused_s + self._config.lease_s] if paused_s is not None else []
        return max(min(times) - now_s, 0.0) if times else None

    def _expire_leases(self, now_s: float) -> None:
        for link in self._links.values():
            paused_s = link.far.endpoint._paused_s
            if paused_s is not None and now_s >= paused_s + self._config.lease_s:
                reason = f"nothing was heard of it for {self._config.lease_s:.3g} s"
                _lose(link, reason, "it closed its connection, having heard nothing of us", left=False)

    def _advance(self, link: Link, now_s: float) -> None:
        """Takes messages that have come, ends what is copied, starts what may start."""
        if link.error is not None:
            return
        for number, payload in link.arrive(now_s):
            notification = Notification(peer=link.peer, message_id=number, payload=payload)
            self._event_thread.post(lambda n=notification: self._queue.put(lambda events: events.notified(n)))  # type: ignore[misc]
            link.far.unacknowledged.pop(number).finish()
        for operation in list(link.running):
            if operation.is_copied and now_s >= operation.finish_s:
                self._finish(link, operation, now_s)
        while link.queue and self._may_start(link, link.queue[0], now_s):
            operation = link.queue.popleft()
            operation.request.start()
            if operation.batch is None:
                self._send(link, operation, now_s)
            else:
                self._start(link, operation)

    def _may_start(self, link: Link, operation: Operation, now_s: float) -> bool:
        if link.error is not None:
            return False
        if operation.batch is None:
            return not link.running
        limit = _NUM_REORDERED if self._faults.reorder else 1
        return len(link.running) < limit and _right_ends_s(link) > now_s

    def _start(self, link: Link, operation: Operation) -> None:
        assert operation.batch is not None
        size_bytes, peer_id, number = operation.batch.size_bytes, link.peer.peer_id, operation.number
        if self._faults.loses("mid_batch", peer_id, number) and size_bytes:
            operation.lose_after_bytes = int(size_bytes * self._faults.draw("how far", peer_id, number))
            operation.slices = slices_of(operation.batch, max_entries=1)
        else:
            operation.slices = slices_of(operation.batch)
        link.running.append(operation)

    def _next_slice(self, link: Link, operation: Operation, now_s: float) -> tuple[Link, Operation, Slice, int] | None:
        if operation.lose_after_bytes is not None and operation.copied_bytes >= operation.lose_after_bytes:
            _lose(link, "an injected fault ended it", "an injected fault ended it", left=False)
            return None
        part, remote_id = next(operation.slices, ([], 0))
        if not part or _right_ends_s(link) <= now_s:
            operation.is_copied = True
            operation.finish_s = now_s + self._faults.delay_s("a batch", link.peer.peer_id, operation.number)
            return None
        region_id = self._targets[remote_id]
        if link.far.endpoint._memory.find(region_id) is None:
            operation.is_copied = True
            operation.error = TransportError(
                f"{link.peer} has released the memory",
                expected="a region that is registered there",
                found=f"its region {region_id}, which is not",
                fix="let the peer keep its regions until it is told that all reads and writes have ended",
            )
            return None
        link.is_copying = True
        link.far.endpoint._touched[region_id] += 1
        return link, operation, part, region_id

    def _finish(self, link: Link, operation: Operation, now_s: float) -> None:
        peer_id, number = link.peer.peer_id, operation.number
        if link.error is not None:
            return  # A fault of the one before.
        if self._faults.loses("completion", peer_id, number):
            _lose(link, "an injected fault ended it", "an injected fault ended it", left=False)
            return
        if operation.error is None and _right_ends_s(link) <= now_s:
            operation.error = LeaseExpiredError(
                f"our lease on {link.peer} has expired",
                expected=f"a sign of life in the last {link.far.endpoint._config.lease_s:.3g} s",
                found="silence",
                fix="raise lease_s there if that process may pause for so long",
            )
        link.running.remove(operation)
        self._end(operation, operation.error)
        if self._faults.loses("after", peer_id, number):
            _lose(link, "an injected fault ended it", "an injected fault ended it", left=False)

    def _end(self, operation: Operation, error: TransportError | None) -> None:
        if operation.batch is not None:
            self._end_batch(operation.batch, operation.request, error)
        else:
            operation.request.finish(failed_error(operation.request.description, error) if error else None)

    def _send(self, link: Link, operation: Operation, now_s: float) -> None:
        peer_id, number = link.peer.peer_id, operation.number
        link.num_sent += 1
        link.unacknowledged[link.num_sent] = operation.request
        for copy in range(2 if self._faults.duplicates(peer_id, number) else 1):
            arrival_s = now_s + self._faults.delay_s(f"message {copy}", peer_id, number)
            heapq.heappush(link.far.inbox, (arrival_s, link.num_sent, operation.payload))
        link.far.endpoint._changed.notify_all()

    def _end_link(self, link: Link) -> None:
        """Ends all requests of a lost peer. Nothing copies for it any more, since that is what this thread does."""
        error, peer, reason, left = link.error, link.peer, link.reason, link.left
        assert error is not None
        del self._links[peer.peer_id]
        for operation in (*link.running, *link.queue):
            self._end(operation, error)
        for request in link.unacknowledged.values():
            request.finish(failed_error(request.description, error))
        for remote in self._memory.remove_remotes_of(peer):
            del self._targets[remote.remote_id]
        if not self._closed:
            self._event_thread.post(lambda: self._queue.put(lambda events: events.peer_lost(peer, reason, left)))


def _right_ends_s(link: Link) -> float:
    """When our right to touch the peer's memory ends, as far as it is known now."""
    far = link.far.endpoint
    return float("inf") if far._paused_s is None else far._paused_s + far._config.lease_s


def _lose(link: Link, reason: str, far_reason: str, *, left: bool) -> None:
    """Ends both sides of a connection; each endpoint's thread ends its requests. With the lock held."""
    for side, why in ((link, reason), (link.far, far_reason)):
        if side.error is None:
            side.error, side.reason, side.left = lost_error(side.peer, why), why, left
            side.endpoint._changed.notify_all()
