"""A peer's tensors: what it exported, checked, and its regions imported as they are used."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from llmsys.comm.registry.descriptor import NO_REGION, TensorDescriptor
from llmsys.comm.registry.table import Table, decode
from llmsys.comm.registry.view import Addressable, View
from llmsys.comm.transports.base import Peer, RemoteRegion, Transport
from llmsys.core.errors import DescriptorError, InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteTensor(Addressable[RemoteRegion | None]):
    """A peer's tensor that can be read and written. region: None if it has no elements."""

    descriptor: TensorDescriptor
    region: RemoteRegion | None

    def view(self) -> View[RemoteRegion | None]:
        return self.descriptor.view_in(self.region)


class RemoteRegistry:
    """The tensors of one peer, by name. Thread safe. A context manager: leaving it forgets the imported regions.

    Afterwards any of their blocks can be read or written without asking the peer (KVDirect's CONNECT). What the peer
    registers later is in its next export; what it unregistered must not be used, and only its transport can tell.
    """

    def __init__(self, peer: Peer, table: Table, transport: Transport) -> None:
        """`import_` is the way in: this expects a table that has been compared with `peer`."""
        self._peer = peer
        self._table = table
        self._transport = transport
        self._lock = threading.Lock()
        self._imported: dict[int, RemoteRegion] = {}
        self._closed = False

    @classmethod
    def import_(cls, peer: Peer, data: bytes | bytearray | memoryview, transport: Transport) -> RemoteRegistry:
        """The tensors that `peer` exported as `data`. No region is imported before one of its tensors is used.

        Raises:
            DescriptorError: see `table.decode`; the table is another endpoint's, or of another generation of `peer`.
        """
        table = decode(data)
        if table.owner != peer.name:
            raise DescriptorError(
                f"the tensor table that came from {peer} is another endpoint's",
                expected=f"owner {peer.name!r}",
                found=f"owner {table.owner[:80]!r}",
                fix="import each table with the peer that exported it",
            )
        if table.generation != peer.generation:
            raise DescriptorError(
                f"the tensor table of {peer} is stale: its process is not the one that is connected",
                expected=f"generation {peer.generation}",
                found=f"generation {table.generation}",
                fix="let the connected process export its table again",
            )
        return cls(peer, table, transport)

    @property
    def peer(self) -> Peer:
        return self._peer

    def __contains__(self, name: object) -> bool:
        return name in self._table.tensors

    def __iter__(self) -> Iterator[str]:
        """Names, in the order of the export."""
        return iter(self._table.tensors)

    def __len__(self) -> int:
        return len(self._table.tensors)

    def descriptor(self, name: str) -> TensorDescriptor:
        """Without importing its region. Raises InputError: no such tensor."""
        try:
            return self._table.tensors[name]
        except KeyError:
            raise unknown_tensor(name, self._table.tensors, f"the table of {self._peer}") from None

    def __getitem__(self, name: str) -> RemoteTensor:
        """The tensor, its region imported. Raises InputError: no such tensor, or closed; and `import_region`'s."""
        descriptor = self.descriptor(name)
        region = None if descriptor.region_id == NO_REGION else self._region(descriptor.region_id)
        return RemoteTensor(descriptor=descriptor, region=region)

    def _region(self, region_id: int) -> RemoteRegion:
        # Under the lock, so that two threads do not import the same region.
        with self._lock:
            if self._closed:
                raise InputError(
                    f"the tensors of {self._peer} were closed",
                    expected="an open remote registry",
                    found="a closed one",
                    fix="import the peer's table again",
                )
            if region_id not in self._imported:
                region = self._table.regions[region_id]
                self._imported[region_id] = self._transport.import_region(
                    self._peer,
                    address=region.address,
                    size_bytes=region.size_bytes,
                    device=region.device,
                    remote_key=region.remote_key,
                )
            return self._imported[region_id]

    def close(self) -> None:
        """Forgets the imported regions; no request may be using them. Can be called again."""
        with self._lock:
            self._closed = True
            while self._imported:
                _, region = self._imported.popitem()
                self._transport.forget_region(region)

    def __enter__(self) -> RemoteRegistry:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def unknown_tensor(name: object, known: dict[str, TensorDescriptor], where: str) -> InputError:
    near = difflib.get_close_matches(str(name), known, n=1)
    return InputError(
        f"{where} has no tensor {name!r}",
        expected=f"one of its {len(known)} tensors",
        found=f"{name!r}",
        fix=f"use {near[0]!r}" if near else "list the registry to see its names",
    )
