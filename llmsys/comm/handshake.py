"""The authenticated handshake on a connected socket: both ends prove that they know the job's secret.

    dialler -> listener    nonce, protocol
    listener -> dialler    nonce
    dialler -> listener    hello, HMAC-SHA256(secret, "dialler" + nonces + hello)
    listener -> dialler    hello, HMAC-SHA256(secret, "listener" + nonces + both hellos)

A listener says nothing of itself before the dialler has proved the secret, and the secret is never sent. Roles are
part of what is signed, so that an answer cannot be sent back as a proof. A frame is a fixed header (magic, version,
length of at most `MAX_FRAME_BYTES`) and a msgpack map. A side that refuses says why in a last frame. Nothing after the
handshake is encrypted or signed: it keeps strangers and other jobs out, not somebody who controls the network.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import msgpack

from llmsys.core.errors import AuthenticationError, DeadlineError, LlmsysError, TransportError

VERSION = 1
MAX_FRAME_BYTES = 64 * 1024

_HEADER = struct.Struct("!4sHI")
_MAGIC = b"LLMS"
_NONCE_BYTES = 32
_SAME_SECRET = "give every process of the job the same secret (TransportConfig.secret or LLMSYS_JOB_SECRET)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What an endpoint says of itself when it connects or is connected to.

    protocol: the transport's name; both ends must have the same.
    name, generation: who this is, and a number that is new for each start of it (63 bits).
    address: "host:port" where it listens; empty if it does not.
    host_id: equal for endpoints that share process ids and shared memory (see `bootstrap.host_id`).
    pid: its process id. lease_s: how long it believes in a silent peer.
    details: what the transport needs, such as a worker's address. All in all under `MAX_FRAME_BYTES`.
    """

    protocol: str
    name: str
    generation: int
    address: str
    host_id: str
    pid: int
    lease_s: float
    details: dict[str, bytes | int | str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """Two numbers of 64 bits that both ends derive: each side's `token_out` is the other's `token_in`."""

    token_in: int = field(repr=False)
    token_out: int = field(repr=False)


class RefusedError(TransportError):
    """The listener knows the secret but does not want this connection now; `reason` is its word for why."""

    def __init__(self, summary: str, *, reason: str, expected: str = "", found: str = "", fix: str = "") -> None:
        super().__init__(summary, expected=expected, found=found, fix=fix)
        self.reason = reason

    def _fields(self) -> dict[str, Any]:
        return {**super()._fields(), "reason": self.reason}


def dialler_handshake(channel: Channel, *, secret: bytes, hello: Hello) -> tuple[Hello, Session]:
    """The side that connected. Returns the listener's hello.

    Raises:
        AuthenticationError: secrets differ. RefusedError: it does not want us.
        TransportError: it does not speak this protocol, version or transport. DeadlineError: the channel's deadline.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    channel.send({"nonce": nonce, "protocol": hello.protocol})
    answer = channel.receive({"nonce": bytes}, "a challenge")
    nonces = nonce + _checked_nonce(channel, answer["nonce"])
    packed = pack_hello(hello)
    channel.send({"hello": packed, "proof": _digest(secret, "dialler", nonces, packed)})
    answer = channel.receive({"hello": bytes, "proof": bytes}, "its proof of the secret")
    if not hmac.compare_digest(answer["proof"], _digest(secret, "listener", nonces, packed, answer["hello"])):
        raise _wrong_secret(channel, "a proof made with another secret")
    peer = _unpack_hello(channel, answer["hello"])
    to_listener, to_dialler = _tokens(secret, nonces, packed, answer["hello"])
    return peer, Session(token_in=to_dialler, token_out=to_listener)


def listener_handshake(
    channel: Channel, *, secret: bytes, hello: Hello, admit: Callable[[Hello], None]
) -> tuple[Hello, Session]:
    """The side that was connected to. `admit` may raise RefusedError once the peer has proved the secret.

    Raises:
        The same as `dialler_handshake`; the peer has been told why as far as it can understand.
    """
    try:
        return _listener_handshake(channel, secret, hello, admit)
    except AuthenticationError:
        channel.send_refusal("secret")
        raise
    except RefusedError as error:
        channel.send_refusal("refused", error.reason)
        raise
    except _OtherTransportError:
        channel.send_refusal("transport", hello.protocol)
        raise
    except TransportError:
        channel.send_refusal("protocol")
        raise


def _listener_handshake(
    channel: Channel, secret: bytes, own: Hello, admit: Callable[[Hello], None]
) -> tuple[Hello, Session]:
    first = channel.receive({"nonce": bytes, "protocol": str}, "its greeting")
    if first["protocol"] != own.protocol:
        raise _other_transport(channel, own.protocol, first["protocol"])
    nonce = secrets.token_bytes(_NONCE_BYTES)
    nonces = _checked_nonce(channel, first["nonce"]) + nonce
    channel.send({"nonce": nonce})
    proof = channel.receive({"hello": bytes, "proof": bytes}, "its proof of the secret")
    if not hmac.compare_digest(proof["proof"], _digest(secret, "dialler", nonces, proof["hello"])):
        raise _wrong_secret(channel, "a proof made with another secret")
    peer = _unpack_hello(channel, proof["hello"])
    if peer.protocol != own.protocol:
        raise _other_transport(channel, own.protocol, peer.protocol)
    admit(peer)
    packed = pack_hello(own)
    channel.send({"hello": packed, "proof": _digest(secret, "listener", nonces, proof["hello"], packed)})
    to_listener, to_dialler = _tokens(secret, nonces, proof["hello"], packed)
    return peer, Session(token_in=to_listener, token_out=to_dialler)


class _OtherTransportError(TransportError):
    """The peer's transport is not ours."""


class Channel:
    """Frames on a connected socket until a deadline. It neither owns the socket nor reads beyond a frame.

    address: whom messages name. own_protocol: the transport's name here. timeout_s: what messages say about the
    deadline, which is on the monotonic clock.
    """

    def __init__(
        self, sock: socket.socket, *, address: str, own_protocol: str, timeout_s: float, deadline_s: float
    ) -> None:
        self.address = address
        self._sock = sock
        self._own_protocol = own_protocol
        self._timeout_s = timeout_s
        self._deadline_s = deadline_s

    def send(self, message: dict[str, object]) -> None:
        payload: bytes = msgpack.packb(message)
        if len(payload) > MAX_FRAME_BYTES:
            raise TransportError(
                f"the hello for {self.address} is too large",
                expected=f"at most {MAX_FRAME_BYTES} bytes",
                found=f"{len(payload)} bytes",
                fix="put less into Hello.details",
            )
        try:
            self._sock.settimeout(self._remaining("the handshake to be taken"))
            self._sock.sendall(_HEADER.pack(_MAGIC, VERSION, len(payload)) + payload)
        except TimeoutError as error:
            raise self._too_late("the handshake to be taken") from error
        except OSError as error:
            raise self._not_ours(f"closed the connection ({error})") from error

    def send_refusal(self, kind: str, word: str = "") -> None:
        """Tries to tell the peer why, then ends our direction so that it reads this and not a reset."""
        # Should that fail, it sees a closed connection instead.
        with contextlib.suppress(LlmsysError, OSError):
            self.send({"refusal": kind, "word": word})
            self._sock.shutdown(socket.SHUT_WR)

    def receive(self, shape: dict[str, type], what: str) -> dict[str, Any]:
        """A frame that is a map with just these keys and types. A refusal becomes an error."""
        header = self._read(_HEADER.size, what)
        magic, version, size = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise self._not_ours(f"sent {header!r} first")
        if version != VERSION:
            raise TransportError(
                f"{self.address} speaks another version of the handshake",
                expected=f"version {VERSION}",
                found=f"version {version}",
                fix="run the same release of llmsys everywhere",
            )
        if size > MAX_FRAME_BYTES:
            raise self._not_ours(f"announced a frame of {size} bytes, more than {MAX_FRAME_BYTES}")
        payload = self._read(size, what)
        try:
            message = msgpack.unpackb(payload, strict_map_key=True)
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise self._not_ours(f"sent {size} bytes that are no message ({type(error).__name__})") from error
        if not isinstance(message, dict):
            raise self._not_ours(f"sent a {type(message).__name__} where a message belongs")
        if isinstance(message.get("refusal"), str):
            raise self._refusal(message["refusal"], str(message.get("word", ""))[:200])
        if message.keys() != shape.keys() or any(type(message[key]) is not shape[key] for key in shape):
            raise self._not_ours(f"sent a message with {sorted(message)[:8]} instead of {sorted(shape)}")
        return message

    def _read(self, size: int, what: str) -> bytes:
        data = b""
        while len(data) < size:
            try:
                self._sock.settimeout(self._remaining(what))
                part = self._sock.recv(size - len(data))
            except TimeoutError as error:
                raise self._too_late(what) from error
            except OSError as error:
                raise self._not_ours(f"closed the connection before {what} ({error})") from error
            if not part:
                raise self._not_ours(f"closed the connection before {what}")
            data += part
        return data

    def _remaining(self, what: str) -> float:
        remaining = self._deadline_s - time.monotonic()
        if remaining <= 0:
            raise self._too_late(what)
        return remaining

    def _too_late(self, what: str) -> DeadlineError:
        return DeadlineError(
            f"the handshake with {self.address} did not end in time",
            expected=f"{what} within {self._timeout_s:.3g} s",
            found="silence",
            fix="check that an llmsys endpoint runs there and is not stopped, or raise connect_timeout_s",
        )

    def _not_ours(self, what: str) -> TransportError:
        return TransportError(
            f"{self.address} does not keep to the handshake",
            expected=f"an llmsys endpoint of transport {self._own_protocol!r}",
            found=f"a peer that {what}",
            fix="check the address: another program may listen there",
        )

    def _refusal(self, kind: str, word: str) -> TransportError:
        if kind == "secret":
            return _wrong_secret(self, "its answer that ours is another secret")
        if kind == "transport":
            return _other_transport(self, self._own_protocol, word)
        if kind == "refused":
            return RefusedError(
                f"{self.address} refused the connection",
                reason=word,
                expected="to be let in",
                found=f"the answer {word!r}",
                fix="connect again later, or look at the log of the process there",
            )
        return self._not_ours("could not understand our messages")


def pack_hello(hello: Hello) -> bytes:
    packed: bytes = msgpack.packb({item.name: getattr(hello, item.name) for item in fields(Hello)})
    return packed


def _unpack_hello(channel: Channel, packed: bytes) -> Hello:
    try:
        values: dict[str, Any] = msgpack.unpackb(packed, strict_map_key=True)
        hello = Hello(**values)
        numbers = [values["generation"], values["pid"]]
        well_formed = (
            all(isinstance(values[name], str) for name in ("protocol", "name", "address", "host_id"))
            and all(isinstance(number, int) and 0 < number < 1 << 63 for number in numbers)
            and isinstance(values["lease_s"], int | float)
            and 0 < hello.lease_s < float("inf")
            and isinstance(values["details"], dict)
            and all(isinstance(value, bytes | int | str) for value in hello.details.values())
        )
        if not well_formed:
            raise ValueError("a field of another type or out of range")
        return hello
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise TransportError(
            f"{channel.address} sent a hello that cannot be read",
            expected="the fields " + ", ".join(item.name for item in fields(Hello)),
            found=f"{len(packed)} bytes: {error}",
            fix="run the same release of llmsys everywhere",
        ) from error


def _checked_nonce(channel: Channel, nonce: bytes) -> bytes:
    # A fixed length keeps the two nonces apart in what is signed.
    if len(nonce) != _NONCE_BYTES:
        raise channel._not_ours(f"sent a nonce of {len(nonce)} bytes")
    return nonce


def _digest(secret: bytes, role: str, *parts: bytes) -> bytes:
    signed = b"".join(len(part).to_bytes(8, "big") + part for part in (_MAGIC, bytes([VERSION]), role.encode(), *parts))
    return hmac.digest(secret, signed, "sha256")


def _tokens(secret: bytes, *parts: bytes) -> tuple[int, int]:
    """The numbers for what goes to the listener and to the dialler."""
    digest = _digest(secret, "tokens", *parts)
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


def _wrong_secret(channel: Channel, found: str) -> AuthenticationError:
    return AuthenticationError(
        f"{channel.address} does not have our job's secret",
        expected="a proof made with the same secret as ours",
        found=found,
        fix=_SAME_SECRET,
    )


def _other_transport(channel: Channel, own: str, other: str) -> _OtherTransportError:
    return _OtherTransportError(
        f"{channel.address} uses another transport",
        expected=f"transport {own!r}, as here",
        found=f"transport {other[:80]!r}",
        fix=f"set the same transport on both sides ({own!r} or {other[:80]!r})",
    )
