"""Tickets: what the holder of blocks tells the peer that will transfer them, over whatever channel brought the request.

In the paper prefill answers a request with the sequence, the remote blocks and its address; this is that answer.

magic (4) | version (2) | BLAKE2b of the body (8) | body, a MessagePack list of the fields in order
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import asdict, dataclass
from typing import Any

import msgpack
import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmsys.core.errors import DescriptorError, InputError, LlmsysError

from .blocks import Blocks
from .holds import Access
from .layout import KvLayout

_MAGIC = b"LKVT"
_VERSION = 1
_HEAD = struct.Struct("<4sH8s")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ticket:
    """The right of `peer_name` to transfer some blocks of a request, once, from or to the endpoint that made it.

    address, holder, generation: which endpoint, and which start of it. tensors: names of its registered tensors, in
    the order of layers. blocks: ids and tags along dimension `block_dim` of each of these tensors.
    layout: how the tensors lie in memory, for a peer with another block size or tensor-parallel size.
    """

    request_id: str
    address: str
    holder: str
    generation: int
    peer_name: str
    access: Access
    tensors: tuple[str, ...]
    blocks: Blocks
    block_dim: int = 0
    layout: KvLayout | None = None

    def to_bytes(self) -> bytes:
        values: list[Any] = [self.request_id, self.address, self.holder, self.generation, self.peer_name]
        values += [self.access.value, list(self.tensors), self.blocks.ids.tolist(), self.blocks.tags.tolist()]
        values += [self.block_dim, None if self.layout is None else asdict(self.layout)]
        body: bytes = msgpack.packb(values)
        return _HEAD.pack(_MAGIC, _VERSION, _checksum(body)) + body

    def pairs_with(self, blocks: Blocks | ArrayLike) -> NDArray[np.int64]:
        """Which local block belongs to which of the ticket's: shape (n, 2), rows (local id, remote id).

        blocks: as many local blocks as the ticket has, for all of it in order; or such rows, of some of its blocks.

        Raises:
            InputError: anything else, or a remote block that is not the ticket's.
        """
        ids = self.blocks.ids
        if isinstance(blocks, Blocks):
            if len(blocks) != len(ids):
                raise self._not_pairs(f"{len(ids)} local blocks, or pairs of some", f"{len(blocks)} blocks")
            return np.stack([blocks.ids, ids], axis=1)
        pairs = np.asarray(blocks)
        if pairs.size == 0:
            return np.empty((0, 2), dtype=np.int64)
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
            raise self._not_pairs("whole numbers of shape (n, 2)", f"{pairs.dtype} of shape {pairs.shape}")
        strangers = pairs[~np.isin(pairs[:, 1], ids), 1]
        if strangers.size:
            raise self._not_pairs(f"remote ids of its {len(ids)} blocks", f"blocks {strangers[:5].tolist()}")
        return pairs.astype(np.int64)

    def _not_pairs(self, expected: str, found: str) -> InputError:
        return InputError(
            f"these blocks cannot be transferred for request {self.request_id!r}",
            expected=expected,
            found=found,
            fix="give BlockPool.allocate(len(ticket.blocks)), or np.stack([local_ids, remote_ids], axis=1)",
        )

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Ticket:
        """Reads a ticket.

        Raises:
            DescriptorError: it is damaged or of another version.
        """
        try:
            return cls(**_fields(_body(bytes(data))))
        except (ValueError, TypeError, KeyError, OverflowError, LlmsysError, msgpack.UnpackException) as error:
            raise DescriptorError(
                "a ticket cannot be read",
                expected=f"bytes of Ticket.to_bytes, version {_VERSION}",
                found=f"{len(data)} bytes: {error}" if isinstance(data, bytes) else f"{type(data).__name__}: {error}",
                fix="pass tickets on unchanged, and run the same version of llmsys on both sides",
            ) from error


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=8).digest()


def _body(data: bytes) -> bytes:
    if len(data) < _HEAD.size:
        raise ValueError("too short")
    magic, version, checksum = _HEAD.unpack_from(data)
    body = data[_HEAD.size :]
    if magic != _MAGIC or version != _VERSION:
        raise ValueError(f"begins with {magic!r}, version {version}")
    if checksum != _checksum(body):
        raise ValueError("damaged, its checksum is another")
    return body


def _fields(body: bytes) -> dict[str, Any]:
    request_id, address, holder, generation, peer_name, access, tensors, ids, tags, block_dim, layout = msgpack.unpackb(
        body
    )
    texts = (request_id, address, holder, peer_name, *tensors)
    numbers = (generation, block_dim, *ids, *tags)
    if not all(type(text) is str for text in texts) or not all(type(number) is int for number in numbers):
        raise ValueError("a field of another type")
    return {
        "request_id": request_id,
        "address": address,
        "holder": holder,
        "generation": generation,
        "peer_name": peer_name,
        "access": Access(access),
        "tensors": tuple(tensors),
        "blocks": Blocks(ids=np.array(ids, dtype=np.int64), tags=np.array(tags, dtype=np.int64)),
        "block_dim": block_dim,
        "layout": None if layout is None else _layout(layout),
    }


def _layout(values: dict[str, Any]) -> KvLayout:
    values = dict(values)
    order = tuple(values.pop("order"))
    if not all(type(value) is int for value in values.values()):
        raise ValueError("a layout with a field of another type")
    return KvLayout(**values, order=order)
