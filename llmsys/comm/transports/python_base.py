"""What transports written in Python share, so that each is little more than the calls of its library.

A transport derives from `PythonTransport` and moves the bytes of one batch in `_execute`, which may block: every peer
has a thread that runs its batches in order. Peers, leases, notifications and questions are those of `ControlPlane`.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable

from llmsys.comm.bootstrap import Hello, new_identity
from llmsys.comm.transports.base import Peer, PeerEvents, RemoteRegion, TransportConfig
from llmsys.comm.transports.control import ControlPlane
from llmsys.comm.transports.memory import Batch, unpack_key
from llmsys.comm.transports.peer_table import lost_error
from llmsys.comm.transports.region_transport import RegionTransport, failed_error
from llmsys.comm.transports.requests import PostedRequest
from llmsys.core.errors import TransportError


class PythonTransport(RegionTransport):
    """A transport without the moving of bytes.

    Besides the methods below, a subclass fills in `_register` and `_unregister` of `RegionTransport`.

    A subclass's constructor calls this one, then prepares its library, then `_start`, from when on peers may come.
    `self._control` is the control plane: `ask` and the adapter's `_answer` talk to the other side's transport.
    """

    def __init__(self, config: TransportConfig | None = None) -> None:
        super().__init__(config)
        self._identity = new_identity(self._config)
        self._queues: dict[int, PeerQueue] = {}
        self._queues_lock = threading.Lock()
        self._control: ControlPlane

    def _start(self) -> None:
        """Begins to listen. Ends what the constructor began if it cannot."""
        try:
            self._control = ControlPlane(
                config=self._config,
                protocol=self.name,
                adapter=_Adapter(self),
                events=self._event_thread,
                identity=self._identity,
                max_message_bytes=self.max_message_bytes,
            )
        except BaseException:
            self._event_thread.close()
            self._close_library()
            raise

    # -- what a subclass fills in --------------------------------------------------------------------------------------

    @abstractmethod
    def _execute(self, peer: Peer, batch: Batch, check: Callable[[], None]) -> None:
        """Moves the bytes of a batch and returns when all have arrived, and nothing can touch local memory any more.

        Runs on the peer's thread; batches of one peer come in order and one at a time, of several at the same time.
        Offsets in `batch.groups` are from the beginnings of the groups' regions; no entry is empty.
        check: raises when the batch must stop, because the peer has gone or our lease on it has expired. To be called
            before the first byte of each part and while waiting, every few milliseconds. Before passing its error on,
            the library must have stopped.
        """

    def _import(self, peer: Peer, remote: RemoteRegion, inner: bytes) -> None:
        """Prepares a peer's region; `inner` is what `_register` returned there. DescriptorError if it is no use."""

    def _forget(self, remote: RemoteRegion) -> None:
        """The region is not used any more. Its peer may have gone."""

    def _hello_details(self) -> dict[str, bytes | int | str]:
        """What a peer's `_add_peer` needs."""
        return {}

    def _add_peer(self, peer: Peer, hello: Hello) -> None:
        """A connection is ready; an error refuses it. Must not block for long."""

    def _remove_peer(self, peer: Peer) -> None:
        """It has gone, and no batch of it runs any more. On the peer's thread; may block."""

    def _answer(self, peer: Peer, topic: int, body: bytes) -> bytes:
        """Answers `self._control.ask` of the peer's transport. On a thread of the peer's own; may block."""
        raise TransportError(
            f"transport {self.name} answers no questions",
            expected="no question",
            found=f"one of {peer} on topic {topic}",
            fix="run the same release of llmsys everywhere",
        )

    def _path(self, peer: Peer) -> str:
        """How bytes travel to and from a peer, for `RemoteRegion.path`."""
        return self.name

    def _close_library(self) -> None:
        """Frees what the constructor made. All peers have been removed."""

    # -- the contract --------------------------------------------------------------------------------------------------

    @property
    def local(self) -> Peer:
        return self._control.local

    def set_events(self, events: PeerEvents) -> None:
        self._control.set_events(events)

    def connect(self, address: str, *, timeout_s: float | None = None) -> Peer:
        self._check_open()
        return self._control.connect(address, timeout_s=timeout_s)

    def disconnect(self, peer: Peer) -> None:
        self._control.disconnect(peer)

    def peers(self) -> tuple[Peer, ...]:
        return self._control.peers()

    def import_region(
        self, peer: Peer, *, address: int, size_bytes: int, device: str, remote_key: bytes
    ) -> RemoteRegion:
        self._check_connected(peer)
        inner = unpack_key(self.name, remote_key, address=address, size_bytes=size_bytes, device=device)
        remote = RemoteRegion(
            remote_id=self._memory.new_id(),
            peer_id=peer.peer_id,
            address=address,
            size_bytes=size_bytes,
            device=device,
            path=self._path(peer),
        )
        self._import(peer, remote, inner)
        self._memory.add_remote(remote)
        return remote

    def forget_region(self, remote: RemoteRegion) -> None:
        if self._memory.remove_remote(remote):
            self._forget(remote)

    def _enqueue_batch(self, peer: Peer, batch: Batch, request: PostedRequest) -> None:
        def run() -> None:
            request.start()
            if batch.num_segments:
                self._control.wait_alive(peer)
                self._execute(peer, batch, lambda: self._control.check_alive(peer))
                self._control.check_alive(peer)

        self._put(peer, run, lambda error: self._end_batch(batch, request, error))

    def _enqueue_message(self, peer: Peer, payload: bytes, request: PostedRequest) -> None:
        def finish(error: Exception | None) -> None:
            request.finish(None if error is None else failed_error(request.description, error))

        def run() -> None:
            request.start()
            self._control.notify(peer, payload, finish)

        # When it has been sent, its end is that the peer has acknowledged it.
        self._put(peer, run, lambda error: finish(error) if error is not None else None)

    def _put(self, peer: Peer, run: Callable[[], None], end: Callable[[Exception | None], None]) -> None:
        with self._queues_lock:
            queue = self._queues.get(peer.peer_id)
        if queue is not None:
            queue.put(run, end)
        else:
            end(lost_error(peer, "it is not connected any more"))

    def close(self) -> None:
        with self._queues_lock:
            first, self._closed = not self._closed, True
        self._control.close()
        with self._queues_lock:
            queues = list(self._queues.values())
        for queue in queues:
            queue.join()
        if first:
            self._close_library()
        self._event_thread.close()

    # -- peers ---------------------------------------------------------------------------------------------------------

    def _check_connected(self, peer: Peer) -> None:
        self._check_open()
        with self._queues_lock:
            queue = self._queues.get(peer.peer_id)
        if queue is None or queue.error is not None:
            raise lost_error(peer, queue.error.found if queue and queue.error else "it is not connected")

    def _begin_peer(self, peer: Peer, hello: Hello) -> None:
        self._add_peer(peer, hello)
        queue = PeerQueue(f"llmsys-{self.name}-peer", lambda: self._end_peer(peer))
        with self._queues_lock:
            self._queues[peer.peer_id] = queue

    def _end_peer(self, peer: Peer) -> None:
        for remote in self._memory.remove_remotes_of(peer):
            self._forget(remote)
        self._remove_peer(peer)
        with self._queues_lock:
            self._queues.pop(peer.peer_id, None)

    def _lose_peer(self, peer: Peer, error: TransportError) -> None:
        with self._queues_lock:
            queue = self._queues.get(peer.peer_id)
        if queue is not None:
            queue.stop(error)


class _Adapter:
    """What the control plane sees of a transport."""

    def __init__(self, transport: PythonTransport) -> None:
        self._transport = transport
        self.hello_details = transport._hello_details
        self.peer_added = transport._begin_peer
        self.peer_lost = transport._lose_peer
        self.answer = transport._answer


class PeerQueue:
    """Runs a peer's operations one after the other on a thread, until it is stopped.

    ended: called last, on the thread.
    """

    def __init__(self, name: str, ended: Callable[[], None]) -> None:
        self.error: TransportError | None = None
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Callable[[], None], Callable[[Exception | None], None]]] = deque()
        self._ended = ended
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, run: Callable[[], None], end: Callable[[Exception | None], None]) -> None:
        """`end` gets what `run` raised, or why it was never called."""
        with self._changed:
            error = self.error
            if error is None:
                self._waiting.append((run, end))
                self._changed.notify()
                return
        end(error)

    def stop(self, error: TransportError) -> None:
        """Operations that have not begun end with this error, after the one that runs."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify()

    def join(self) -> None:
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self.error)
                if not self._waiting:
                    break
                run, end = self._waiting.popleft()
                error: Exception | None = self.error
            if error is None:
                try:
                    run()
                except Exception as raised:
                    error = raised
            end(error)
        self._ended()
