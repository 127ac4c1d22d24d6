"""An endpoint of KVDirect: Connect, Transfer, Complete (paper section on the tensor-centric protocol).

Who holds blocks calls `hold` and hands the ticket to the peer. The peer calls `connect`, `transfer` and `complete`
and uses the data when the completion is acknowledged. Which side computes prefill does not matter here: in pull mode
prefill holds and decode reads, in push mode decode holds and prefill writes. Peers come and go at any time.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

from numpy.typing import ArrayLike

from llmsys.comm.registry import TensorRegistry, block_copies
from llmsys.comm.transports.base import Copies, Notification, Peer, Request, Transport
from llmsys.core.errors import DescriptorError, InputError, LlmsysError

from .. import messages
from ..blocks import BlockPool, Blocks
from ..config import KvConfig
from ..holds import Access, Outcome
from ..layout import KvLayout
from ..tickets import Ticket
from .completion import Completion, fail, when_all
from .connection import Connection
from .dialler import Dialler
from .exchange import TensorExchange
from .hold_keeper import HoldKeeper
from .listener import Listener
from .outbox import Outbox
from .transactions import ABORTED, COMPLETED, TransactionTable

_log = logging.getLogger(__name__)

# How long `close` waits until peers have got the answers that are on their way to them.
_GOODBYE_S = 2.0


class KvEndpoint:
    """One worker's end of KVDirect. Thread safe. A context manager: leaving it closes, also the transport.

    transport: owned by the endpoint from now on. tensors: the registry of this side's key-value tensors; register
    them before peers connect, or let peers call `refresh`.

    Methods that wait (`connect`, `refresh`, `wait_held`) refuse to be called by a `Listener`, whose thread brings what
    they wait for.
    """

    def __init__(
        self, transport: Transport, config: KvConfig | None = None, *, listener: Listener | None = None
    ) -> None:
        self.transport = transport
        self.config = config or KvConfig()
        self.tensors = TensorRegistry(transport)
        self._listener = listener
        self._keeper = HoldKeeper(self.config, lambda *end: self._tell(lambda listener: listener.ended(*end)))
        self._holds = self._keeper.table
        self._transactions = TransactionTable(self.config.remembered_requests)
        self._exchange = TensorExchange(transport, self.tensors)
        self._dialler = Dialler(transport, self._exchange)
        self._outbox = Outbox(transport)
        self._lock = threading.Lock()
        self._closed = False
        self._num_bad_messages = 0
        self._thread = threading.local()
        transport.set_events(self)
        self._keeper.start()

    # -- the side that holds ------------------------------------------------------------------------------------------

    def hold(
        self,
        request_id: str,
        pool: BlockPool,
        blocks: Blocks,
        *,
        peer_name: str,
        tensors: Sequence[str],
        access: Access = Access.READ,
        block_dim: int | None = None,
        layout: KvLayout | None = None,
    ) -> Ticket:
        """Keeps blocks as they are until `peer_name` has completed the request, is lost, or never came.

        Afterwards they are back in the pool; only blocks that were written and completed stay the caller's, who asked
        for them to use them. `wait_held` tells when and how it ended. For several readers or several writers, such as
        the ranks of a peer of another tensor-parallel size, hold the same blocks once for each, all before the first
        ends. They are freed with the last one, unless one of the writers completed.

        layout: how each of the tensors lies in memory, for `sequence.transfer_sequence` at the peer.
        block_dim: the dimension of the tensors whose indices are blocks; as the layout says, or 0 without one.

        Raises:
            InputError: the id was used before, the blocks are not current or not of these tensors, or a tensor is not
                registered or not of that layout.
        """
        self._dialler.check_open()
        names = _names(tensors)
        if block_dim is None:
            block_dim = 0 if layout is None else layout.order.index("block")
        if layout is not None:
            self._check_layout(names, layout)
        for name in names:
            self._check_has_blocks(name, block_dim, blocks)
        hold = self._keeper.hold(request_id, pool, blocks, peer_name=peer_name, access=access)
        local = self.transport.local
        return Ticket(
            request_id=request_id,
            address=local.address,
            holder=local.name,
            generation=local.generation,
            peer_name=peer_name,
            access=access,
            tensors=names,
            blocks=hold.blocks,
            block_dim=block_dim,
            layout=layout,
        )

    def wait_held(self, request_id: str, timeout_s: float) -> Outcome:
        """Blocks until a held request has ended; says how. UNKNOWN, at once, for a request that never was held here.

        Raises:
            DeadlineError: it is still held after `timeout_s`.
        """
        self._refuse_in_listener("wait_held")
        return self._keeper.wait(request_id, timeout_s)

    def cancel(self, request_id: str) -> Outcome | None:
        """Gives a held request up. None if its peer is connected: it is told, and the blocks stay until it has stopped.

        Then, or when it is lost, the request ends as aborted or lost; `wait_held` tells when.
        """
        outcome = self._holds.cancel(request_id)
        self._holds.tell()
        if outcome is None:
            for peer in self.transport.peers():
                if self._holds.is_peer_of(request_id, peer.peer_id):
                    self._outbox.send(peer, messages.Cancelled(request_id=request_id))
        return outcome

    @property
    def num_held(self) -> int:
        """Requests whose blocks are held now."""
        return self._holds.num_held

    @property
    def num_quarantined_blocks(self) -> int:
        return self._holds.num_quarantined_blocks

    # -- the side that transfers --------------------------------------------------------------------------------------

    def connect(self, address: str, *, timeout_s: float | None = None) -> Connection:
        """The connection to the endpoint at `address`; made at the first call, from then on the same while it lives.

        Threads that connect to one address at once share one attempt; others do not wait for it.

        Raises:
            DeadlineError, AuthenticationError, TransportError: see `Transport.connect`.
            PeerLostError: it was lost while it was being connected.
        """
        self._refuse_in_listener("connect")
        return self._dialler.connect(
            address, self.transport.config.connect_timeout_s if timeout_s is None else timeout_s
        )

    def refresh(self, connection: Connection, *, timeout_s: float | None = None) -> None:
        """Fetches the peer's table of tensors again, after it registered more. Transfers under way are not disturbed.

        Raises:
            DeadlineError: no complete answer in time. PeerLostError: the peer was lost meanwhile.
        """
        self._refuse_in_listener("refresh")
        timeout_s = self.config.exchange_timeout_s if timeout_s is None else timeout_s
        connection.replace_tensors(self._exchange.fetch(connection.peer, timeout_s=timeout_s))

    def transfer(
        self, connection: Connection, local: Sequence[str], remote: Ticket, blocks: Blocks | ArrayLike
    ) -> Request:
        """Moves blocks between local and remote tensors, pairwise in order; reads or writes as the ticket says.

        local: names of registered tensors, one for each of `remote.tensors`.
        blocks: as many local blocks as the ticket has, for all of it in order; or integers of shape (n, 2), rows
            (local block id, remote block id), see `Ticket.pairs_with`.

        Returns at once. The data may be used when `complete` was acknowledged, not when this request is done.

        Raises:
            InputError: names or blocks do not fit, or the request is over; no byte has moved.
            DescriptorError: the ticket is not of this connection's process, or not for this endpoint.
            PeerLostError: the connection is lost. LeaseExpiredError: the holder took the request back.
        """
        self._check_ticket(connection, remote)
        connection.check_alive()
        names = _names(local)
        if len(names) != len(remote.tensors):
            raise InputError(
                f"request {remote.request_id!r} needs one local tensor for each remote one",
                expected=f"{len(remote.tensors)} names",
                found=f"{len(names)}",
                fix="give as many local tensors as the ticket has, in the order of layers",
            )
        pairs = remote.pairs_with(blocks)
        with connection.using_tensors() as tensors:
            copies = block_copies(
                [self.tensors[name] for name in names],
                [tensors[name] for name in remote.tensors],
                pairs[:, 0],
                pairs[:, 1],
                dim=remote.block_dim,
                into="local" if remote.access is Access.READ else "remote",
            )
            return self.post(connection, remote, copies)

    def post(self, connection: Connection, remote: Ticket, copies: Sequence[Copies]) -> Request:
        """Posts any copies as a transfer of a request; `transfer` and re-layouts end here. Errors as there.

        Call it in the `connection.using_tensors()` in which the remote sides of the copies were looked up.
        """
        self._check_ticket(connection, remote)
        connection.check_alive()
        move = self.transport.read if remote.access is Access.READ else self.transport.write
        transaction = self._transactions.of(remote)
        request = transaction.post(lambda: move(connection.peer, copies, coalesce=self.config.coalesce))
        connection.posted(request)
        return request

    def complete(self, connection: Connection, request: Ticket) -> Completion:
        """Tells the holder that the request's transfers are over. Returns at once; the answer decides.

        Can be called right after `transfer`: the message follows the data. No more can be transferred with this ticket.
        Calling it again gives the same end; after the connection was lost, over a new one, it asks the holder.
        After a write that failed the holder hears that the request is aborted.

        Raises:
            DescriptorError: the ticket is not of this connection's process, or not for this endpoint.
        """
        self._check_ticket(connection, request)
        transaction = self._transactions.of(request)
        answer, is_new = self._transactions.expect(transaction, connection.peer, COMPLETED)
        transfers = tuple(transaction.transfers)
        if is_new:
            message = messages.Complete(request_id=request.request_id, digest=request.blocks.digest())
            if request.access is Access.READ:
                # The transport starts it after the reads have ended, well or not: either way we no longer read.
                self._outbox.ask(connection.peer, message, answer)
            else:
                # A write that failed must not be announced, so the message waits here until all have succeeded.
                when_all(transfers, lambda error: self._after_writes(connection.peer, message, answer, error))
        return Completion(ticket=request, peer=connection.peer, transfers=transfers, answer=answer)

    def abort(self, connection: Connection, request: Ticket) -> Completion:
        """Gives a request up: once transfers under way have ended, the holder frees its blocks.

        Any end of the request is good for the returned completion, also that it had been completed before.

        Raises:
            DescriptorError: as `complete`.
        """
        self._check_ticket(connection, request)
        transaction = self._transactions.of(request)
        answer, _ = self._transactions.expect(transaction, connection.peer, ABORTED)
        transfers = tuple(transaction.transfers)
        if not answer.done():
            message = messages.Abort(request_id=request.request_id)
            when_all(transfers, lambda _: self._outbox.ask(connection.peer, message, answer))
        return Completion(ticket=request, peer=connection.peer, transfers=transfers, answer=answer, aborts=True)

    def send(self, peer: Peer, payload: bytes) -> Request:
        """Sends bytes of the program itself to a peer's `Listener.received`."""
        return self.transport.notify(peer, messages.encode(messages.Application(payload=payload)))

    def members(self) -> tuple[Peer, ...]:
        """Peers that are connected now, whoever began."""
        return self.transport.peers()

    @property
    def num_bad_messages(self) -> int:
        """Messages of peers that could not be read and were ignored."""
        return self._num_bad_messages

    def close(self) -> None:
        """Says goodbye to all peers and ends everything, the transport too. Can be called again.

        Held requests end as aborted. Their blocks go back to the pool, except those that a peer may still write.
        Tensors that the registry allocated are empty afterwards.
        """
        with self._lock:
            first, self._closed = not self._closed, True
        self._dialler.close()
        if first:
            # Who heard of a completion may close at once, but the peer must hear of it too.
            self._outbox.flush(_GOODBYE_S)
            self._keeper.close()
            for peer in self.transport.peers():
                self.transport.disconnect(peer)
            with contextlib.suppress(LlmsysError):  # a transfer that has not ended yet: the transport frees the rest
                self.tensors.close()
        self.transport.close()
        self._exchange.close()
        self._transactions.close()

    def __enter__(self) -> KvEndpoint:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _refuse_in_listener(self, what: str) -> None:
        if getattr(self._thread, "handles_event", False):
            raise InputError(
                f"{what} was called by a listener",
                expected="another thread than the one that brings what is waited for",
                found="the transport's event thread",
                fix=f"let the listener wake a thread of the program, and call {what} there",
            )

    def _check_layout(self, names: Sequence[str], layout: KvLayout) -> None:
        shapes = {self.tensors[name].view().shape for name in names}
        if len(names) != layout.num_layers or shapes != {layout.shape}:
            raise InputError(
                "the tensors are not laid out as said",
                expected=f"{layout.num_layers} tensors of shape {layout.shape}",
                found=f"{len(names)} tensors of shapes {', '.join(map(str, sorted(shapes)))}",
                fix="name one tensor for each layer, in order, or correct the layout",
            )

    def _check_has_blocks(self, name: str, dim: int, blocks: Blocks) -> None:
        view = self.tensors[name].view()
        size = view.shape[view.axis(dim)]
        if len(blocks) and int(blocks.ids.max()) >= size:
            raise InputError(
                f"tensor {name!r} does not have all blocks that are to be held",
                expected=f"block ids below {size}, its size along dimension {dim}",
                found=f"block {int(blocks.ids.max())}",
                fix="give block_dim, or a pool of as many blocks as the tensor has",
            )

    def _check_ticket(self, connection: Connection, ticket: Ticket) -> None:
        peer, own = connection.peer, self.transport.local.name
        if (ticket.holder, ticket.generation) != (peer.name, peer.generation):
            raise DescriptorError(
                f"the ticket of request {ticket.request_id!r} is not from {peer}",
                expected=f"holder {peer.name!r} of generation {peer.generation}",
                found=f"holder {ticket.holder!r} of generation {ticket.generation}",
                fix="connect to the ticket's address; if the holder was restarted, ask for the request again",
            )
        if ticket.peer_name != own:
            raise DescriptorError(
                f"the ticket of request {ticket.request_id!r} is for another endpoint",
                expected=f"a ticket for {own!r}, this endpoint",
                found=f"one for {ticket.peer_name!r}",
                fix="let the holder call hold with peer_name as this endpoint's TransportConfig.name",
            )

    def _after_writes(
        self, peer: Peer, message: messages.Complete, answer: Future[Outcome], error: Exception | None
    ) -> None:
        if error is None:
            self._outbox.ask(peer, message, answer)
        else:
            self._outbox.send(peer, messages.Abort(request_id=message.request_id))
            fail(answer, error)

    def _tell(self, call: Callable[[Listener], None]) -> None:
        # A mistake of the program's must not keep blocks from being freed, peers from being answered, or this thread
        # from going on.
        if self._listener is not None:
            try:
                call(self._listener)
            except Exception:
                _log.exception("the listener of endpoint %s failed", self.transport.local.name)

    # -- PeerEvents, called by the transport -------------------------------------------------------------------------

    @contextlib.contextmanager
    def _event(self) -> Iterator[None]:
        before, self._thread.handles_event = getattr(self._thread, "handles_event", False), True
        try:
            yield
        finally:
            self._thread.handles_event = before

    def peer_joined(self, peer: Peer) -> None:
        with self._event():
            for request_id in self._holds.peer_joined(peer.peer_id, peer.name, peer.generation):
                # Before the answer to its Connect, so that it knows before it can write.
                self._outbox.send(peer, messages.Cancelled(request_id=request_id))
            self._tell(lambda listener: listener.joined(peer))

    def peer_lost(self, peer: Peer, reason: str, left: bool) -> None:
        with self._event():
            self._dialler.drop(peer, reason)
            self._exchange.on_lost(peer, reason)
            self._transactions.lost(peer, reason)
            self._keeper.peer_lost(peer.peer_id)
            self._tell(lambda listener: listener.lost(peer, reason))

    def notified(self, notification: Notification) -> None:
        with self._event():
            peer = notification.peer
            try:
                message = messages.decode(notification.payload)
            except InputError as error:
                self._num_bad_messages += 1
                _log.debug("a message of %s is ignored: %s", peer, error)
                return
            self._on_message(peer, message)

    def _on_message(self, peer: Peer, message: messages.Message) -> None:
        match message:
            case messages.TensorsAsked():
                self._exchange.on_asked(peer, message)
            case messages.TensorsChunk():
                self._exchange.on_chunk(peer, message)
            case messages.Complete():
                outcome = self._holds.complete(message.request_id, peer.peer_id, message.digest)
                self._answer(peer, message.request_id, outcome)
            case messages.Abort():
                self._answer(peer, message.request_id, self._holds.abort(message.request_id, peer.peer_id))
            case messages.Ended():
                self._transactions.answered(peer, message.request_id, Outcome(message.outcome))
            case messages.Cancelled():
                self._on_cancelled(peer, message.request_id)
            case messages.Application():
                self._tell(lambda listener: listener.received(peer, message.payload))

    def _answer(self, peer: Peer, request_id: str, outcome: Outcome) -> None:
        try:
            self._outbox.send(peer, messages.Ended(request_id=request_id, outcome=outcome.value))
        finally:
            self._holds.tell(answered=request_id)

    def _on_cancelled(self, peer: Peer, request_id: str) -> None:
        # The transfers may run on another connection to that process, so order alone is not enough.
        transfers = self._transactions.take_back(peer, request_id)
        when_all(transfers, lambda _: self._outbox.send(peer, messages.Abort(request_id=request_id)))
        self._tell(lambda listener: listener.cancelled(peer, request_id))


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
