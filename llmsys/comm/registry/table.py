"""The table of an endpoint's tensors and regions, as bytes for its peers.

    magic (4) | version (2) | length of the body (8) | checksum (8) | body

Numbers are little-endian. The body is msgpack: [owner, generation, regions, layouts, tensors], where

    regions: [[region_id, address, size_bytes, device, remote_key], ...]
    layouts: [[dtype, device, dims, shape, strides_bytes or nil if contiguous], ...]
    tensors: [[name, index of region or nil, offset_bytes of index 0 in the region, index of layout], ...]

Tensors share layouts, since the layers of a KV cache are alike: a tensor takes its name and about 12 bytes, and its
region, unless shared too, its key and about 25 bytes. The checksum is BLAKE2b of 8 bytes over the body and all before
the checksum: it finds damage, with a chance of 2**-64 to miss some (CRC-32: 2**-32, and tables are exchanged often). It
does not keep strangers out; the transport's authentication does.
"""

from __future__ import annotations

import hashlib
import reprlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from llmsys.comm.registry.descriptor import (
    ADDRESS_END,
    MAX_DIMS,
    NO_REGION,
    TensorDescriptor,
    contiguous_strides,
    itemsize_of,
)
from llmsys.comm.transports.base import Region
from llmsys.core.errors import DescriptorError

MAGIC = b"LRTT"
VERSION = 1
"""Of the header and the body. Endpoints with different versions refuse each other's tables."""

_PREFIX = struct.Struct("<4sHQ")
_CHECKSUM_BYTES = 8
HEADER_BYTES = _PREFIX.size + _CHECKSUM_BYTES
_EXPORT_AGAIN = "let its owner export it again and send all of it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table that has been checked: every tensor lies inside its region, and names are unique."""

    owner: str
    generation: int
    regions: dict[int, Region]
    tensors: dict[str, TensorDescriptor]


def encode(*, owner: str, generation: int, regions: Mapping[int, Region], tensors: Iterable[TensorDescriptor]) -> bytes:
    """The bytes of a table. `regions`: by region_id; those that no tensor uses are left out."""
    region_rows: dict[int, list[object]] = {}
    places: dict[int, int] = {}
    layouts: dict[tuple[object, ...], int] = {}
    tensor_rows = []
    for tensor in tensors:
        place = None
        if tensor.region_id != NO_REGION:
            place = places.setdefault(tensor.region_id, len(places))
            region = regions[tensor.region_id]
            region_rows[place] = [region.region_id, region.address, region.size_bytes, region.device, region.remote_key]
        contiguous = tensor.strides_bytes == contiguous_strides(tensor.shape, tensor.itemsize)
        strides = None if contiguous else tensor.strides_bytes
        layout = (tensor.dtype, tensor.device, tensor.dims, tensor.shape, strides)
        offset = tensor.address - tensor.region_address
        tensor_rows.append([tensor.name, place, offset, layouts.setdefault(layout, len(layouts))])
    body: bytes = msgpack.packb([owner, generation, list(region_rows.values()), list(layouts), tensor_rows])
    prefix = _PREFIX.pack(MAGIC, VERSION, len(body))
    return prefix + _checksum(prefix, body) + body


def decode(data: bytes | bytearray | memoryview) -> Table:
    """The table in `data`, everything in it checked.

    Raises:
        DescriptorError: not a table, another version, truncated, longer than it says, damaged, a field of the wrong
            type or value, a tensor outside its region, a name or region twice, or regions that contradict each other.
    """
    owner, generation, regions, layouts, tensors = _fields(_body(bytes(data)), "table", (str, int, list, list, list))
    if not owner or generation < 0:
        raise _wrong("table", "an owner and generation >= 0", (owner, generation))
    rows = [_region(row, f"regions[{i}]") for i, row in enumerate(regions)]
    _check_regions(rows)
    known = [_layout(row, f"layouts[{i}]") for i, row in enumerate(layouts)]
    found: dict[str, TensorDescriptor] = {}
    for i, row in enumerate(tensors):
        tensor = _tensor(row, f"tensors[{i}]", rows, known, owner, generation)
        if tensor.name in found:
            raise _wrong(f"tensors[{i}]", "every name once", tensor.name)
        found[tensor.name] = tensor
    return Table(owner=owner, generation=generation, regions={r.region_id: r for r in rows}, tensors=found)


def _body(data: bytes) -> Any:
    if len(data) < HEADER_BYTES:
        raise _damaged("truncated", f"at least {HEADER_BYTES} bytes", f"{len(data)}")
    magic, version, length = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise _damaged("not a tensor table", f"bytes that begin with {MAGIC!r}", f"{magic!r}")
    if version != VERSION:
        raise DescriptorError(
            f"a tensor table has version {version}, and this endpoint reads version {VERSION}",
            expected=f"version {VERSION}",
            found=f"version {version}",
            fix="run the same version of llmsys on both ends",
        )
    body = data[HEADER_BYTES:]
    if len(body) != length:
        kind = "truncated" if len(body) < length else "followed by other bytes"
        raise _damaged(kind, f"a body of {length} bytes", f"{len(body)} bytes")
    expected = _checksum(data[: _PREFIX.size], body)
    found = data[_PREFIX.size : HEADER_BYTES]
    if found != expected:
        raise _damaged("damaged", f"checksum {expected.hex()}", found.hex())
    try:
        # The lengths of what is inside are limited by the length of the body, so that none can claim more memory.
        return msgpack.unpackb(body)
    except (ValueError, msgpack.UnpackException) as error:
        raise _damaged("damaged", "a msgpack body", f"{type(error).__name__}: {str(error)[:100]}") from error


def _region(row: object, where: str) -> Region:
    region_id, address, size_bytes, device, remote_key = _fields(row, where, (int, int, int, str, bytes))
    if region_id < 0 or not device or address < 0 or not 0 < size_bytes < 1 << 63:
        raise _wrong(where, "region_id and address >= 0, 0 < size_bytes < 2**63, a device", row)
    if address + size_bytes > ADDRESS_END:
        raise _wrong(where, f"an end of at most {ADDRESS_END:#x}", f"{size_bytes} bytes at {address:#x}")
    return Region(region_id=region_id, address=address, size_bytes=size_bytes, device=device, remote_key=remote_key)


def _check_regions(regions: list[Region]) -> None:
    """One id is one region, and one address belongs to one kind of device."""
    if len({region.region_id for region in regions}) != len(regions):
        raise _wrong("regions", "every region_id once", [region.region_id for region in regions])
    if len({(region.address, region.size_bytes) for region in regions}) != len(regions):
        raise _wrong("regions", "one region for each range of memory", [(r.address, r.size_bytes) for r in regions])
    end, device = 0, ""
    for region in sorted(regions, key=lambda r: r.address):
        if region.address < end and region.device != device:
            raise _wrong("regions", "overlapping regions on one device", f"{region}, and one on {device}")
        if region.address + region.size_bytes > end:
            end, device = region.address + region.size_bytes, region.device


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    dtype: str
    itemsize: int
    device: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    strides_bytes: tuple[int, ...]


def _layout(row: object, where: str) -> _Layout:
    dtype, device, dims, shape, strides = _fields(row, where, (str, str, list, list, (list, type(None))))
    # Before anything is multiplied: a long list of large sizes would make a number of millions of digits.
    if len(shape) > MAX_DIMS or any(type(size) is not int for size in shape):
        raise _wrong(where, f"a shape of at most {MAX_DIMS} whole numbers", shape)
    itemsize = itemsize_of(dtype)
    if strides is None:
        strides = contiguous_strides(shape, itemsize)
    return _Layout(
        dtype=dtype,
        itemsize=itemsize,
        device=device,
        dims=tuple(dims),
        shape=tuple(shape),
        strides_bytes=tuple(strides),
    )


def _tensor(
    row: object, where: str, regions: list[Region], layouts: list[_Layout], owner: str, generation: int
) -> TensorDescriptor:
    name, place, offset_bytes, layout_index = _fields(row, where, (str, (int, type(None)), int, int))
    if not 0 <= layout_index < len(layouts) or (place is not None and not 0 <= place < len(regions)):
        raise _wrong(where, f"one of {len(regions)} regions and of {len(layouts)} layouts", row)
    layout = layouts[layout_index]
    region = None if place is None else regions[place]
    if region is not None and region.device.partition(":")[0] != layout.device.partition(":")[0]:
        raise _wrong(where, f"a tensor on {layout.device} in a region there", region.device)
    return TensorDescriptor(
        name=name,
        address=offset_bytes if region is None else region.address + offset_bytes,
        shape=layout.shape,
        strides_bytes=layout.strides_bytes,
        dtype=layout.dtype,
        itemsize=layout.itemsize,
        device=layout.device,
        owner=owner,
        generation=generation,
        region_id=NO_REGION if region is None else region.region_id,
        region_address=0 if region is None else region.address,
        region_bytes=0 if region is None else region.size_bytes,
        dims=layout.dims,
    )


def _fields(row: object, where: str, types: tuple[type | tuple[type, ...], ...]) -> list[Any]:
    if type(row) is not list or len(row) != len(types):
        raise _wrong(where, f"a list of {len(types)} fields", row)
    for value, kinds in zip(row, types, strict=True):
        # Not isinstance: True is no number here.
        if type(value) not in (kinds if isinstance(kinds, tuple) else (kinds,)):
            raise _wrong(where, f"fields of types {', '.join(_names(types))}", row)
    return row


def _names(types: tuple[type | tuple[type, ...], ...]) -> Iterator[str]:
    for kinds in types:
        yield " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))


def _checksum(prefix: bytes, body: bytes) -> bytes:
    digest = hashlib.blake2b(prefix, digest_size=_CHECKSUM_BYTES)
    digest.update(body)
    return digest.digest()


def _damaged(kind: str, expected: str, found: str) -> DescriptorError:
    return DescriptorError(f"a tensor table is {kind}", expected=expected, found=found, fix=_EXPORT_AGAIN)


def _wrong(where: str, expected: str, found: object) -> DescriptorError:
    text = found if isinstance(found, str) else reprlib.repr(found)
    return DescriptorError(
        f"a tensor table is wrong at {where}", expected=expected, found=text[:200], fix=_EXPORT_AGAIN
    )
