"""The half of a Python transport that has to do with local memory, and errors that all of them raise."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from llmsys.comm.transports.base import Copies, Peer, Region, Request, Transport, TransportConfig
from llmsys.comm.transports.memory import Batch, MemoryTable, pack_key
from llmsys.comm.transports.peer_table import closed_error
from llmsys.comm.transports.requests import EventThread, PostedRequest
from llmsys.core.errors import InputError, LeaseExpiredError, LlmsysError, PeerLostError, TransportError

MAX_MESSAGE_BYTES = 1 << 20


class RegionTransport(Transport):
    """Registers memory, and checks batches and messages before `_enqueue_batch` and `_enqueue_message` get them."""

    def __init__(self, config: TransportConfig | None) -> None:
        self._config = config or TransportConfig()
        self._memory = MemoryTable()
        self._event_thread = EventThread(f"llmsys-{self.name}-events")
        self._closed = False

    @abstractmethod
    def _register(self, region_id: int, address: int, size_bytes: int, device: str) -> bytes:
        """Tells the library of memory. Returns what a peer needs to import it."""

    @abstractmethod
    def _unregister(self, region: Region) -> None:
        """The memory may go when this returns."""

    @abstractmethod
    def _check_connected(self, peer: Peer) -> None:
        """PeerLostError if it is not, TransportError if this endpoint is closed."""

    @abstractmethod
    def _enqueue_batch(self, peer: Peer, batch: Batch, request: PostedRequest) -> None:
        """Takes over a batch, of a peer that may be gone by now. Its end calls `_end_batch`."""

    @abstractmethod
    def _enqueue_message(self, peer: Peer, payload: bytes, request: PostedRequest) -> None:
        """Takes over a message, of a peer that may be gone by now."""

    @property
    def config(self) -> TransportConfig:
        return self._config

    @property
    def max_message_bytes(self) -> int:
        return MAX_MESSAGE_BYTES

    def register(self, address: int, size_bytes: int, *, device: str = "cpu", owner: object = None) -> Region:
        self._check_open()
        devices = self.capabilities.devices
        if device.partition(":")[0] not in devices or address <= 0 or not 0 < size_bytes < 1 << 63:
            raise InputError(
                "memory cannot be registered",
                expected=f"a positive address and size, on one of {', '.join(devices)}",
                found=f"{size_bytes} bytes at {address:#x} on {device!r}",
                fix="register memory that exists, or use a transport that can do this device",
            )
        region_id = self._memory.new_id()
        inner = self._register(region_id, address, size_bytes, device)
        key = pack_key(self.name, address=address, size_bytes=size_bytes, device=device, inner=inner)
        region = Region(region_id=region_id, address=address, size_bytes=size_bytes, device=device, remote_key=key)
        self._memory.add(region, owner)
        return region

    def allocate(self, size_bytes: int) -> Region:
        if not self.capabilities.allocates or size_bytes <= 0:
            raise InputError(
                "memory cannot be allocated",
                expected="a positive size, and a transport with capabilities.allocates",
                found=f"{size_bytes} bytes, transport {self.name}",
                fix="register memory of your own",
            )
        memory = np.zeros(size_bytes, dtype=np.uint8)
        return self.register(memory.ctypes.data, size_bytes, owner=memory)

    def release(self, region: Region) -> None:
        owner = self._memory.remove(region)
        self._unregister(region)
        del owner  # Only now may its memory go.

    def read(self, peer: Peer, copies: Sequence[Copies], *, coalesce: bool = True) -> Request:
        return self._post(peer, copies, write=False, coalesce=coalesce)

    def write(self, peer: Peer, copies: Sequence[Copies], *, coalesce: bool = True) -> Request:
        return self._post(peer, copies, write=True, coalesce=coalesce)

    def _post(self, peer: Peer, copies: Sequence[Copies], *, write: bool, coalesce: bool) -> Request:
        self._check_connected(peer)
        batch = self._memory.begin_batch(peer, copies, write=write, coalesce=coalesce)
        request = PostedRequest(
            batch.describe(peer),
            self._event_thread,
            num_entries=batch.num_entries,
            num_segments=batch.num_segments,
            size_bytes=batch.size_bytes,
        )
        self._enqueue_batch(peer, batch, request)
        return request

    def _end_batch(self, batch: Batch, request: PostedRequest, error: Exception | None) -> None:
        self._memory.end_batch(batch)
        request.finish(None if error is None else failed_error(request.description, error))

    def notify(self, peer: Peer, payload: bytes) -> Request:
        self._check_connected(peer)
        if len(payload) > MAX_MESSAGE_BYTES:
            raise InputError(
                "the message is too long",
                expected=f"at most {MAX_MESSAGE_BYTES} bytes (Transport.max_message_bytes)",
                found=f"{len(payload)} bytes",
                fix="send it in parts, or write it to a region and announce that",
            )
        description = f"notification of {len(payload)} bytes to {peer}"
        request = PostedRequest(description, self._event_thread, size_bytes=len(payload))
        self._enqueue_message(peer, bytes(payload), request)
        return request

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error()


def failed_error(description: str, cause: Exception) -> TransportError:
    """The error of a request: what it was, and why it failed.

    PeerLostError and LeaseExpiredError stay what they are; all else is a TransportError.
    """
    cls = next((kind for kind in (PeerLostError, LeaseExpiredError) if isinstance(cause, kind)), TransportError)
    if isinstance(cause, LlmsysError):
        expected, found, fix = cause.expected, f"{cause.summary}: {cause.found}", cause.fix
    else:
        expected, found = "the transport's library to move the bytes", f"{type(cause).__name__}: {cause}"
        fix = "see what the library says"
    error = cls(f"the {description} failed", expected=expected, found=found, fix=fix)
    error.__cause__ = cause
    return error
