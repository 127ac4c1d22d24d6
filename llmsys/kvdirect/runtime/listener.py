"""What a program hears from its endpoint."""

from __future__ import annotations

from typing import Protocol

from llmsys.comm.transports.base import Peer

from ..holds import Outcome


class Listener(Protocol):
    """What a program hears from its endpoint; derive from it and define what you need, the rest does nothing.

    Calls come on the transport's event thread (`ended` on any thread). They must not block, since all peers wait
    meanwhile, and must not wait for the endpoint's answers, which the same thread brings. What they raise is logged.
    """

    def joined(self, peer: Peer) -> None:
        """A peer is connected, whoever began."""

    def lost(self, peer: Peer, reason: str) -> None:
        """Its connection has ended, and its requests with it."""

    def received(self, peer: Peer, payload: bytes) -> None:
        """`KvEndpoint.send` of a peer."""

    def cancelled(self, peer: Peer, request_id: str) -> None:
        """The holder takes a request back. The endpoint has seen to it: no transfer of it can be posted any more."""

    def ended(self, request_id: str, outcome: Outcome) -> None:
        """A request held here has ended; comes once for each."""
