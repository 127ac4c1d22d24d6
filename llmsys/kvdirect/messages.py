"""What endpoints say to each other beside the blocks: small messages, carried by the transport's notifications.

A message is a MessagePack list: version, kind, then the fields of its class in order. Messages of one peer arrive in
order and exactly once (the transport's contract), so none of them carries a sequence number.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import msgpack

from llmsys.core.errors import InputError

from .holds import MAX_REQUEST_ID_BYTES, Outcome

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorsAsked:
    """Asks for the table of registered tensors (the paper's Connect sends it unasked, on every connection)."""

    exchange_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorsChunk:
    """A part of that table; `registry.Assembler` puts them together."""

    exchange_id: int
    chunk: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Complete:
    """The sender has finished with the blocks held for it. digest: `Blocks.digest` of those that it believes it used.

    The blocks themselves would not fit into a message for the longest requests.
    """

    request_id: str
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """The sender gives the request up and has no transfer of it under way."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Answers `Complete` and `Abort`: how the request ended at the holder (an `Outcome`)."""

    request_id: str
    outcome: str

    def __post_init__(self) -> None:
        if self.outcome not in list(Outcome):
            raise _refused(f"one of {', '.join(Outcome)}", repr(self.outcome))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """The holder gave the request up: the receiver starts no more transfers and answers `Abort` when all have ended."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """Bytes of the program that uses the endpoint, passed on as they are."""

    payload: bytes


Message = TensorsAsked | TensorsChunk | Complete | Abort | Ended | Cancelled | Application
_KINDS: dict[str, type[Message]] = {
    cls.__name__: cls for cls in (TensorsAsked, TensorsChunk, Complete, Abort, Ended, Cancelled, Application)
}
_TYPES = {"int": int, "str": str, "bytes": bytes}


def encode(message: Message) -> bytes:
    values = [getattr(message, field.name) for field in fields(message)]
    packed: bytes = msgpack.packb([VERSION, type(message).__name__, *values])
    return packed


def decode(payload: bytes) -> Message:
    """Reads a message.

    Raises:
        InputError: it is not one of this version; what the peer sent is then to be ignored, not trusted.
    """
    try:
        version, kind, *values = msgpack.unpackb(payload, max_str_len=MAX_REQUEST_ID_BYTES)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise _refused("a MessagePack list", repr(payload[:40])) from error
    if type(version) is not int or version != VERSION:
        raise _refused(f"version {VERSION}", f"version {version!r}")
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise _refused(f"one of {', '.join(_KINDS)}", f"kind {kind!r}")
    names = {field.name: _TYPES[str(field.type)] for field in fields(cls)}
    if [type(v) for v in values] != list(names.values()):
        raise _refused(f"{kind} with fields {', '.join(names)}", f"{len(values)} values {[*map(type, values)]}")
    return cls(**dict[str, Any](zip(names, values, strict=True)))


def _refused(expected: str, found: str) -> InputError:
    return InputError(
        "a peer sent a message that cannot be read",
        expected=expected,
        found=found,
        fix="run the same version of llmsys on both sides",
    )
