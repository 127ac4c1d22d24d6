"""Tables that are larger than a message, in chunks.

magic (4) | version (2) | checksum of the table (8) | number of this chunk (4) | number of chunks (4) |
checksum of the chunk (8) | part of the table
"""

from __future__ import annotations

import hashlib
import struct

from llmsys.core.errors import DescriptorError, InputError

CHUNK_MAGIC = b"LRTC"
CHUNK_VERSION = 1

_PREFIX = struct.Struct("<4sH8sII")
_CHECKSUM_BYTES = 8
CHUNK_HEADER_BYTES = _PREFIX.size + _CHECKSUM_BYTES
_MAX_CHUNKS = (1 << 32) - 1


def split(table: bytes, max_bytes: int) -> list[bytes]:
    """`table` in as few chunks as fit into messages of at most `max_bytes`, at least one.

    Raises:
        InputError: `max_bytes` leaves no room for data, or so little that chunks cannot be counted.
    """
    room = max_bytes - CHUNK_HEADER_BYTES
    count = max(1, -(-len(table) // room)) if room > 0 else 0
    if not 0 < count <= _MAX_CHUNKS:
        raise InputError(
            "chunks of a tensor table are too small",
            expected=f"max_bytes > {CHUNK_HEADER_BYTES}, the size of a chunk's header",
            found=f"{max_bytes}",
            fix="set max_bytes to the transport's max_message_bytes",
        )
    identity = _digest(table)
    chunks = []
    for number in range(count):
        prefix = _PREFIX.pack(CHUNK_MAGIC, CHUNK_VERSION, identity, number, count)
        part = table[number * room : (number + 1) * room]
        chunks.append(prefix + _digest(prefix + part) + part)
    return chunks


class Assembler:
    """Puts the chunks of one table together. They may come in any order, and again. Not thread safe.

    max_table_bytes: what is kept at most, so that a peer cannot fill our memory.
    """

    def __init__(self, *, max_table_bytes: int = 256 << 20) -> None:
        self._max_table_bytes = max_table_bytes
        self._parts: dict[int, bytes] = {}
        self._identity = b""
        self._count = 0
        self._size_bytes = 0

    @property
    def num_missing(self) -> int:
        """Chunks that have not come; 0 before the first, which says how many there are."""
        return self._count - len(self._parts)

    def add(self, chunk: bytes | bytearray | memoryview) -> bytes | None:
        """The whole table once every chunk has been added, else None. A refused chunk changes nothing.

        Raises:
            DescriptorError: not a chunk, another version, truncated, damaged, or of another table.
        """
        data = bytes(chunk)
        identity, number, count = _read_header(data)
        if self._parts and (identity, count) != (self._identity, self._count):
            raise _wrong("of another table", f"table {self._identity.hex()} in {self._count} chunks", identity.hex())
        part = data[CHUNK_HEADER_BYTES:]
        if number not in self._parts:
            if self._size_bytes + len(part) > self._max_table_bytes:
                raise _wrong("too much", f"a table of at most {self._max_table_bytes} bytes", "more")
            self._identity, self._count = identity, count
            self._parts[number] = part
            self._size_bytes += len(part)
        if self.num_missing:
            return None
        table = b"".join(self._parts[i] for i in range(self._count))
        if _digest(table) != self._identity:
            raise _wrong("not of one table", f"checksum {self._identity.hex()}", _digest(table).hex())
        return table


def _read_header(data: bytes) -> tuple[bytes, int, int]:
    if len(data) < CHUNK_HEADER_BYTES:
        raise _wrong("truncated", f"at least {CHUNK_HEADER_BYTES} bytes", f"{len(data)}")
    magic, version, identity, number, count = _PREFIX.unpack_from(data)
    if magic != CHUNK_MAGIC:
        raise _wrong("not one", f"bytes that begin with {CHUNK_MAGIC!r}", f"{magic!r}")
    if version != CHUNK_VERSION:
        raise DescriptorError(
            f"a chunk of a tensor table has version {version}, and this endpoint reads version {CHUNK_VERSION}",
            expected=f"version {CHUNK_VERSION}",
            found=f"version {version}",
            fix="run the same version of llmsys on both ends",
        )
    expected = _digest(data[: _PREFIX.size] + data[CHUNK_HEADER_BYTES:])
    found = data[_PREFIX.size : CHUNK_HEADER_BYTES]
    if found != expected:
        raise _wrong("truncated or damaged", f"checksum {expected.hex()}", found.hex())
    if not 0 <= number < count:
        raise _wrong("out of range", f"0 <= number < {count}", f"{number}")
    return identity, number, count


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_CHECKSUM_BYTES).digest()


def _wrong(kind: str, expected: str, found: str) -> DescriptorError:
    return DescriptorError(
        f"a chunk of a tensor table is {kind}",
        expected=expected,
        found=found,
        fix="let the owner send the table again, to a new Assembler",
    )
