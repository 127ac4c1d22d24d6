"""A worker of `dynamic_membership`: it serves requests for blocks, or pulls from a holder until that ends.

A request is a whole one of KVDirect: the puller asks with a message, the holder takes blocks from its pool and holds
them, the ticket goes back in a message, the puller transfers and completes, and counts the bytes at the holder's
acknowledgement.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import llmsys.comm.registry.tensors  # noqa: F401 - imports torch, once, before workers are forked
from experiments.kvdirect._contents import WORD_BYTES, BlockMemory
from experiments.kvdirect._nursery import Channel, Progress
from experiments.kvdirect._worker_settings import StreamSettings
from llmsys.comm.transports.base import Peer, TransportConfig
from llmsys.comm.transports.ucx import UcxOptions, UcxTransport
from llmsys.core.errors import DeadlineError, LlmsysError, PeerLostError
from llmsys.kvdirect.blocks import BlockPool, Blocks
from llmsys.kvdirect.runtime import Connection, KvEndpoint, Listener
from llmsys.kvdirect.tickets import Ticket

TENSOR = "kv"
ANSWER_TIMEOUT_S = 30.0


class StreamWorker(Listener):
    """See the module's text."""

    def __init__(self, channel: Channel) -> None:
        self._changed = threading.Condition()
        self._tickets: dict[str, Ticket] = {}
        self._lost: set[int] = set()
        self._stopping = False
        self._num_asked = 0
        self._local_lock = threading.Lock()

    def commands(self) -> Mapping[str, Callable[..., Any]]:
        return {"start": self.start, "pull": self.pull, "leave": self.leave, "stop_pulling": self.stop_pulling}

    # -- Listener ----------------------------------------------------------------------------------------------------

    def lost(self, peer: Peer, reason: str) -> None:
        with self._changed:
            self._lost.add(peer.peer_id)
            self._changed.notify_all()

    def received(self, peer: Peer, payload: bytes) -> None:
        """A request at a holder, a ticket at a puller."""
        if payload.startswith(b"ask "):
            request_id = payload[4:].decode()
            blocks = self._pool.allocate(self._settings.request_blocks)
            ticket = self._endpoint.hold(request_id, self._pool, blocks, peer_name=peer.name, tensors=[TENSOR])
            self._endpoint.send(peer, ticket.to_bytes())
            return
        ticket = Ticket.from_bytes(payload)
        with self._changed:
            self._tickets[ticket.request_id] = ticket
            self._changed.notify_all()

    # -- commands ----------------------------------------------------------------------------------------------------

    def start(self, progress: Progress, **settings: Any) -> dict[str, Any]:
        self._settings = config = StreamSettings(**settings)
        is_local = not config.net_device
        transport = UcxTransport(
            TransportConfig(name=config.name, host=config.host, port=config.port, lease_s=config.lease_s),
            UcxOptions(
                library=config.library,
                tls="" if is_local else "tcp,self",
                net_devices=config.net_device,
                shm=is_local,
                cma=is_local,
            ),
        )
        self._endpoint = KvEndpoint(transport, listener=self)
        self._pool = BlockPool(config.num_blocks)
        shape = (config.num_blocks, config.block_bytes)
        words = self._endpoint.tensors.allocate(TENSOR, shape, "uint8").numpy().view(np.uint64)
        self._memory = BlockMemory(words.reshape(config.num_blocks, config.block_bytes // WORD_BYTES))
        # Contents stay: a block's key is its number and the holder's name.
        every = np.arange(config.num_blocks)
        self._memory.fill(every, _keys(config.name, every))
        local = transport.local
        return {"address": local.address}

    def pull(self, progress: Progress, *, address: str, timeout_s: float) -> dict[str, Any]:
        """Requests from one holder, one after the other, until it ends or `stop_pulling`.

        Returns when each was acknowledged, its bytes, what ended it and when, and the paths in use.
        """
        times_s: list[float] = []
        paths: set[str] = set()
        error, error_s, num_wrong = "", 0.0, 0
        with self._local_lock:
            local = self._pool.allocate(self._settings.request_blocks)
        try:
            connection = self._endpoint.connect(address, timeout_s=timeout_s)
            while not self._stopping:
                ticket = self._ask(connection)
                pairs = np.stack([local.ids, ticket.blocks.ids], axis=1)
                transfer = self._endpoint.transfer(connection, [TENSOR], ticket, pairs)
                self._endpoint.complete(connection, ticket).wait(ANSWER_TIMEOUT_S)
                times_s.append(time.monotonic())
                if len(times_s) == 1:
                    progress.reached("first")
                    paths.update(getattr(transfer, "paths", ()))
                    num_wrong += self._memory.num_wrong(local.ids, _keys(ticket.holder, ticket.blocks.ids))[0]
                num_wrong += self._spot_check(local, ticket)
        except LlmsysError as failure:
            error_s = time.monotonic()
            error = f"{type(failure).__name__}: {failure.summary}"
        size_bytes = self._settings.request_blocks * self._settings.block_bytes
        return {
            "times_s": times_s,
            "size_bytes": size_bytes,
            "error": error,
            "error_s": error_s,
            "num_wrong": num_wrong,
            "paths": sorted(paths),
        }

    def stop_pulling(self, progress: Progress) -> None:
        self._stopping = True

    def leave(self, progress: Progress) -> float:
        """Closes in good order; when it began to."""
        at_s = time.monotonic()
        self._endpoint.close()
        return at_s

    # -- inside -------------------------------------------------------------------------------------------------------

    def _ask(self, connection: Connection) -> Ticket:
        with self._changed:
            self._num_asked += 1
            request_id = f"{self._settings.name}.{self._num_asked}"
        self._endpoint.send(connection.peer, b"ask " + request_id.encode())
        with self._changed:
            peer_id = connection.peer.peer_id
            self._changed.wait_for(lambda: request_id in self._tickets or peer_id in self._lost, ANSWER_TIMEOUT_S)
            if request_id in self._tickets:
                return self._tickets.pop(request_id)
            kind = PeerLostError if peer_id in self._lost else DeadlineError
        raise kind(
            f"{connection.peer} did not answer request {request_id!r}",
            expected=f"a ticket within {ANSWER_TIMEOUT_S} s",
            found="that it was lost" if kind is PeerLostError else "no answer",
            fix="ask another holder",
        )

    def _spot_check(self, local: Blocks, ticket: Ticket) -> int:
        """The last word of each block: cheap enough for every request."""
        return self._memory.num_wrong_words(local.ids, _keys(ticket.holder, ticket.blocks.ids))


def _keys(holder: str, block_ids: Any) -> Any:
    """Keys of contents that stay: the holder's name in the upper half, the block's number in the lower."""
    name = np.uint64(int.from_bytes(holder.encode()[:4].ljust(4, b"_"), "big")) << np.uint64(32)
    return name | block_ids.astype(np.uint64)


def make_service(channel: Channel) -> StreamWorker:
    return StreamWorker(channel)
