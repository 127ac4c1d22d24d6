"""Connect: one connection for each address, made when it is first asked for."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, Future

from llmsys.comm.transports.base import Peer, Transport
from llmsys.core.errors import DeadlineError, InputError, PeerLostError

from .completion import fail, succeed
from .connection import Connection
from .exchange import TensorExchange


class Dialler:
    """The connections of an endpoint that are alive, by address. Thread safe.

    Threads that ask for one address at once share one attempt; other addresses do not wait for it.
    """

    def __init__(self, transport: Transport, exchange: TensorExchange) -> None:
        self._transport = transport
        self._exchange = exchange
        self._lock = threading.Lock()
        self._alive: dict[str, Connection] = {}
        self._dialling: dict[str, Future[Connection]] = {}
        self._closed = False

    def connect(self, address: str, timeout_s: float) -> Connection:
        """See `KvEndpoint.connect`."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            with self._lock:
                self._check()
                connection = self._alive.get(address)
                dial = self._dialling.get(address)
                if connection is None and dial is None:
                    mine = self._dialling[address] = Future()
            if connection is not None:
                if connection.peer in self._transport.peers():
                    return connection
                self.drop(connection.peer, "its end is known to the transport, and about to be reported")
                continue
            if dial is None:
                return self._dial(address, deadline_s, mine)
            try:
                return dial.result(max(deadline_s - time.monotonic(), 0.0))
            except (TimeoutError, CancelledError) as error:
                # Whoever dialled had less time than we have, or was interrupted.
                if time.monotonic() >= deadline_s:
                    raise DeadlineError(
                        f"no connection to {address} in time",
                        expected=f"an answer within {timeout_s:.3g} s",
                        found="another thread's attempt that has not succeeded",
                        fix="look at the process there, or raise timeout_s",
                    ) from error

    def drop(self, peer: Peer, reason: str) -> None:
        """The peer is lost, and its connections with it."""
        with self._lock:
            lost = [(a, connection) for a, connection in self._alive.items() if connection.peer.peer_id == peer.peer_id]
            for address, connection in lost:
                connection.mark_lost(reason)
                del self._alive[address]

    def close(self) -> None:
        """No connections any more."""
        with self._lock:
            self._closed = True
            for connection in self._alive.values():
                connection.mark_lost("this endpoint was closed")
            self._alive.clear()

    def check_open(self) -> None:
        """Raises InputError after `close`."""
        with self._lock:
            self._check()

    def _check(self) -> None:
        if self._closed:
            raise InputError(
                "this endpoint is closed",
                expected="an open KvEndpoint",
                found="close() was called",
                fix="make another endpoint, with another transport",
            )

    def _dial(self, address: str, deadline_s: float, result: Future[Connection]) -> Connection:
        try:
            try:
                connection = self._dial_once(address, deadline_s)
            except PeerLostError:
                # What was connected before may have been an earlier start of the process there, whose end was not
                # known so far; now it is.
                connection = self._dial_once(address, deadline_s)
        except BaseException as error:
            self._end_dial(address)
            if isinstance(error, Exception):
                fail(result, error)
            else:
                result.cancel()
            raise
        self._end_dial(address)
        succeed(result, connection)
        return connection

    def _dial_once(self, address: str, deadline_s: float) -> Connection:
        peer = self._transport.connect(address, timeout_s=max(deadline_s - time.monotonic(), 0.001))
        tensors = self._exchange.fetch(peer, timeout_s=max(deadline_s - time.monotonic(), 0.001))
        connection = Connection(peer, address, tensors)
        with self._lock:
            self._check()
            self._alive[address] = connection
        if peer not in self._transport.peers():  # its loss may have been reported before it was in the list
            self.drop(peer, "lost while connecting")
        connection.check_alive()
        return connection

    def _end_dial(self, address: str) -> None:
        with self._lock:
            del self._dialling[address]
