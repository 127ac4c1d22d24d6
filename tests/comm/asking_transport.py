"""The smallest transport on `PythonTransport`: it asks the other side's transport for bytes, or to store them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import msgpack

from llmsys.comm.transports.base import Capabilities, Copies, Peer, Region, RemoteRegion, TransportConfig
from llmsys.comm.transports.memory import Batch
from llmsys.comm.transports.python_base import PythonTransport
from llmsys.core.errors import DescriptorError, TransportError

_READ, _WRITE = 1, 2
_MAX_ENTRIES = 1024
_MAX_BYTES = 1 << 20


class AskingTransport(PythonTransport):
    """Two-sided. Every question is a list of (region, offset, bytes) of the other side."""

    name = "asking"

    def __init__(self, config: TransportConfig | None = None) -> None:
        super().__init__(config)
        self._targets: dict[int, int] = {}
        self._start()

    @classmethod
    def available(cls) -> str | None:
        return None

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(one_sided=False, passive=False, allocates=True, shares_process=True)

    def describe(self) -> dict[str, str]:
        return {"library": "none", "transports": "the control plane's socket"}

    def _register(self, region_id: int, address: int, size_bytes: int, device: str) -> bytes:
        return region_id.to_bytes(8, "little")

    def _unregister(self, region: Region) -> None:
        pass

    def _import(self, peer: Peer, remote: RemoteRegion, inner: bytes) -> None:
        if len(inner) != 8:
            raise DescriptorError("not a region", expected="8 bytes", found=f"{len(inner)}", fix="send the key whole")
        self._targets[remote.remote_id] = int.from_bytes(inner, "little")

    def _execute(self, peer: Peer, batch: Batch, check: Callable[[], None]) -> None:
        for part in self._parts(batch):
            check()
            ranges = [(target, remote, size) for target, _, remote, size in part]
            if batch.write:
                data = b"".join(ctypes.string_at(local, size) for _, local, _, size in part)
                self._control.ask(peer, _WRITE, msgpack.packb([ranges, data]), timeout_s=60)
                continue
            data = self._control.ask(peer, _READ, msgpack.packb([ranges, b""]), timeout_s=60)
            begin = 0
            for _, local, _, size in part:
                ctypes.memmove(local, data[begin : begin + size], size)
                begin += size

    def _parts(self, batch: Batch) -> Iterator[list[tuple[int, int, int, int]]]:
        """Entries as (target region, local address, remote offset, bytes), cut so that a part has few bytes."""
        part: list[tuple[int, int, int, int]] = []
        num_bytes = 0
        for group in batch.groups:
            target = self._targets[group.remote.remote_id]
            for local, remote, length in _entries(group):
                for begin in range(0, length, _MAX_BYTES):
                    size = min(_MAX_BYTES, length - begin)
                    part.append((target, local + begin, remote + begin, size))
                    num_bytes += size
                    if len(part) == _MAX_ENTRIES or num_bytes >= _MAX_BYTES:
                        yield part
                        part, num_bytes = [], 0
        if part:
            yield part

    def _answer(self, peer: Peer, topic: int, body: bytes) -> bytes:
        ranges, data = msgpack.unpackb(body)
        begin, parts = 0, []
        for region_id, offset, size in ranges:
            region = self._memory.find(region_id)
            if region is None or offset < 0 or size < 0 or offset + size > region.size_bytes:
                raise TransportError("no such memory", expected="a region", found=f"{region_id}", fix="keep it")
            if topic == _READ:
                parts.append(ctypes.string_at(region.address + offset, size))
            else:
                ctypes.memmove(region.address + offset, data[begin : begin + size], size)
                begin += size
        return b"".join(parts)


def _entries(group: Copies) -> Iterator[tuple[int, int, int]]:
    """(local address, remote offset, bytes)."""
    addresses = group.local_offsets + group.local.address
    return zip(addresses.tolist(), group.remote_offsets.tolist(), group.lengths.tolist(), strict=True)
