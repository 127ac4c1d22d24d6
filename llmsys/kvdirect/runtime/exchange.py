"""Connect's second half: the table of the peer's tensors, asked for and answered in chunks."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import Future

from llmsys.comm.registry import Assembler, RemoteRegistry, TensorRegistry
from llmsys.comm.transports.base import Peer, Request, Transport
from llmsys.core.errors import DeadlineError, LlmsysError, PeerLostError, TransportError

from .. import messages
from .completion import fail, succeed

# Room for the message around a chunk.
_OVERHEAD_BYTES = 256
# Of one peer, beside the one that is answered. What a peer asks beyond that is not answered.
_MAX_WAITING = 64


class TensorExchange:
    """Fetches the tables of peers and answers with ours. Its `on_` methods run on the transport's event thread."""

    def __init__(self, transport: Transport, tensors: TensorRegistry) -> None:
        self._transport = transport
        self._tensors = tensors
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._open: dict[tuple[int, int], tuple[Assembler, Future[bytes]]] = {}
        self._answering: dict[int, list[int]] = {}

    def fetch(self, peer: Peer, *, timeout_s: float) -> RemoteRegistry:
        """The peer's table as it is now. Blocks; not for the transport's event thread, which brings the answer.

        Raises:
            DeadlineError: no complete answer in time. PeerLostError: the peer was lost meanwhile.
            DescriptorError: the table is not usable.
        """
        key = (peer.peer_id, next(self._ids))
        future: Future[bytes] = Future()
        with self._lock:
            self._open[key] = (Assembler(), future)
        try:
            asked = self._transport.notify(peer, messages.encode(messages.TensorsAsked(exchange_id=key[1])))
            asked.add_done_callback(lambda request: fail(future, request.exception()))
            if peer not in self._transport.peers():  # lost before the future was there to be failed
                fail(future, _lost(peer, "it is not connected any more"))
            data = future.result(timeout_s)
        except TimeoutError as error:
            raise DeadlineError(
                f"{peer} did not send its table of tensors",
                expected=f"the whole table within {timeout_s:.3g} s",
                found="no answer, or a part",
                fix="check that a KvEndpoint serves that address, or allow more time",
            ) from error
        finally:
            with self._lock:
                self._open.pop(key, None)
        return RemoteRegistry.import_(peer, data, self._transport)

    def on_asked(self, peer: Peer, message: messages.TensorsAsked) -> None:
        """Answers, one question of a peer after the other, so that questions cannot pile up large answers."""
        with self._lock:
            waiting = self._answering.get(peer.peer_id)
            if waiting is not None:
                if len(waiting) < _MAX_WAITING:
                    waiting.append(message.exchange_id)
                return
            self._answering[peer.peer_id] = []
        self._answer(peer, message.exchange_id)

    def _answer(self, peer: Peer, exchange_id: int) -> None:
        sent: Request | None = None
        try:
            for chunk in self._tensors.export_chunks(self._transport.max_message_bytes - _OVERHEAD_BYTES):
                answer = messages.TensorsChunk(exchange_id=exchange_id, chunk=chunk)
                sent = self._transport.notify(peer, messages.encode(answer))
        except TransportError:  # the peer is lost, or all is closed: nobody waits for it
            sent = None
        if sent is None:
            with self._lock:
                self._answering.pop(peer.peer_id, None)
            return
        sent.add_done_callback(lambda _: self._answered(peer))

    def _answered(self, peer: Peer) -> None:
        with self._lock:
            waiting = self._answering.get(peer.peer_id)
            if not waiting:
                self._answering.pop(peer.peer_id, None)
                return
            exchange_id = waiting.pop(0)
        self._answer(peer, exchange_id)

    def on_chunk(self, peer: Peer, message: messages.TensorsChunk) -> None:
        with self._lock:
            assembler, future = self._open.get((peer.peer_id, message.exchange_id), (None, None))
        if assembler is None or future is None or future.done():
            return
        try:
            data = assembler.add(message.chunk)
        except LlmsysError as error:
            fail(future, error)
            return
        if data is not None:
            succeed(future, data)

    def on_lost(self, peer: Peer, reason: str) -> None:
        with self._lock:
            self._answering.pop(peer.peer_id, None)
            futures = [future for (peer_id, _), (_, future) in self._open.items() if peer_id == peer.peer_id]
        for future in futures:
            fail(future, _lost(peer, reason))

    def close(self) -> None:
        """Ends what waits for answers."""
        with self._lock:
            futures = [future for _, future in self._open.values()]
        for future in futures:
            fail(future, _lost("the peer", "this endpoint was closed"))


def _lost(peer: Peer | str, reason: str) -> PeerLostError:
    return PeerLostError(
        f"{peer} was lost before it sent its table of tensors",
        expected="the table",
        found=reason,
        fix="connect again when it is back",
    )
