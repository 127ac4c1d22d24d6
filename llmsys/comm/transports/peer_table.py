"""Who an endpoint is connected to: one connection for each pair of endpoints, whoever dials and how often.

Two endpoints that dial each other at the same moment keep one connection: that of the one with the smaller
(name, generation). The other's is refused, and its `connect` waits for the one that comes in.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

from llmsys.comm.bootstrap import Hello, RefusedError
from llmsys.comm.transports.base import Peer
from llmsys.core.errors import DeadlineError, InputError, PeerLostError, TransportError

# What a refusal's reason begins with; the refusing endpoint's address follows.
_CONNECTED, _CONNECTING = "connected", "connecting"
_RETRY_S = 0.2


class PeerTable:
    """The peers of an endpoint that are alive. Thread safe.

    `admit` and `failed` fit `bootstrap.Listener`. The transport calls `add` when a connection is ready, whoever made
    it, and `remove` when it has gone.
    """

    def __init__(self, own: Callable[[], Peer]) -> None:
        self._own = own
        self._changed = threading.Condition()
        self._ids = itertools.count(1)
        self._alive: dict[int, Peer] = {}
        self._dialled_as: dict[int, str] = {}
        self._dialling: set[str] = set()
        self._arriving: dict[tuple[str, int], str] = {}
        self._closed = False

    def connect(self, address: str, *, timeout_s: float, dial: Callable[[float], Peer]) -> Peer:
        """The peer that is or will be at `address`, by `dial(remaining_s)`, which ends with `add`, if need be."""
        if address == self._own().address:
            raise InputError(
                "an endpoint cannot connect to itself",
                expected="another endpoint's address",
                found=address,
                fix="copy within a process without a transport",
            )
        deadline = time.monotonic() + timeout_s
        wanted = address
        while True:
            with self._changed:
                peer = self._wait_turn(wanted, deadline, timeout_s)
                if peer is not None:
                    return peer
                self._dialling.add(wanted)
            try:
                peer = dial(max(deadline - time.monotonic(), 0.001))
                with self._changed:
                    self._dialled_as[peer.peer_id] = address
                return peer
            except RefusedError as error:
                word, _, own_address = error.reason.partition(" ")
                if word not in (_CONNECTED, _CONNECTING) or time.monotonic() >= deadline:
                    raise
                with self._changed:
                    self._dialling.discard(wanted)
                    # The address that it gives itself may be another name for the one we dialled.
                    wanted = own_address
                    self._changed.notify_all()
                    self._changed.wait_for(lambda at=wanted: self._at(at) or self._closed, _RETRY_S)  # type: ignore[misc]
            finally:
                with self._changed:
                    self._dialling.discard(wanted)
                    self._changed.notify_all()

    def admit(self, hello: Hello) -> None:
        """Raises RefusedError for a second connection of one pair. Else `add` or `failed` must follow."""
        own = self._own()
        theirs, ours = (hello.name, hello.generation), (own.name, own.generation)
        with self._changed:
            if self._closed:
                raise _refused(hello, "closed", own.address)
            if theirs == ours:
                raise _refused(hello, "itself", own.address)
            if theirs in self._arriving or any((p.name, p.generation) == theirs for p in self._alive.values()):
                raise _refused(hello, _CONNECTED, own.address)
            if hello.address in self._dialling and ours < theirs:
                raise _refused(hello, _CONNECTING, own.address)
            self._arriving[theirs] = hello.address

    def failed(self, error: Exception, hello: Hello | None) -> None:
        """The peer that was admitted did not arrive after all."""
        if hello is not None:
            with self._changed:
                self._arriving.pop((hello.name, hello.generation), None)
                self._changed.notify_all()

    def new_peer(self, hello: Hello) -> Peer:
        """What to `add` when the connection is ready."""
        with self._changed:
            peer_id = next(self._ids)
        return Peer(peer_id=peer_id, name=hello.name, generation=hello.generation, address=hello.address)

    def add(self, peer: Peer) -> tuple[Peer, ...]:
        """From now on it is connected. Returns earlier starts of the same endpoint that are still taken for alive."""
        with self._changed:
            self._arriving.pop((peer.name, peer.generation), None)
            stale = tuple(
                p
                for p in self._alive.values()
                if peer.address and (p.name, p.address) == (peer.name, peer.address) and p.generation != peer.generation
            )
            self._alive[peer.peer_id] = peer
            self._changed.notify_all()
            return stale

    def remove(self, peer: Peer) -> bool:
        """Whether it was there."""
        with self._changed:
            self._dialled_as.pop(peer.peer_id, None)
            return self._alive.pop(peer.peer_id, None) is not None

    def __contains__(self, peer: Peer) -> bool:
        with self._changed:
            return peer.peer_id in self._alive

    def alive(self) -> tuple[Peer, ...]:
        """Oldest first."""
        with self._changed:
            return tuple(self._alive.values())

    def close(self) -> None:
        """Ends waits of `connect` and lets nobody in any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _wait_turn(self, address: str, deadline: float, timeout_s: float) -> Peer | None:
        """The peer at the address; None if it is the caller's turn to dial. With the lock held."""
        while True:
            if self._closed:
                raise closed_error()
            peer = self._at(address)
            if peer is not None:
                return peer
            if address not in self._dialling and address not in self._arriving.values():
                return None
            if not self._changed.wait(max(deadline - time.monotonic(), 0.0)):
                raise DeadlineError(
                    f"no connection to {address} in time",
                    expected=f"the connection that is being made by another thread or from there, in {timeout_s:.3g} s",
                    found="it is still being made",
                    fix="look at the process there, or raise connect_timeout_s",
                )

    def _at(self, address: str) -> Peer | None:
        # The newest first: an older one may be a process that has ended, and we were not told so far.
        for peer in reversed(self._alive.values()):
            if address in (peer.address, self._dialled_as.get(peer.peer_id)):
                return peer
        return None


def closed_error() -> TransportError:
    """For calls on an endpoint that has been closed."""
    return TransportError(
        "this endpoint is closed",
        expected="a call before close()",
        found="close() has been called",
        fix="make another transport",
    )


def lost_error(peer: Peer, reason: str) -> PeerLostError:
    """For operations on a peer that has gone."""
    return PeerLostError(
        f"{peer} is lost",
        expected="a peer of Transport.peers()",
        found=reason,
        fix="connect to its address again; that gives a new Peer",
    )


def _refused(hello: Hello, word: str, address: str) -> RefusedError:
    return RefusedError(
        f"{hello.name} at {hello.address or 'an unknown address'} was refused",
        reason=f"{word} {address}",
        expected="one connection for each pair of endpoints, while this one is open",
        found=word,
        fix="use the connection that there is",
    )
