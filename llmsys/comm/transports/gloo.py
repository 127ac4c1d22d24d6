"""Message passing over gloo: the two-sided baseline. A read is a request to the peer, which sends the blocks.

Each direction between two endpoints has a gloo process group of its own, made with the first batch. The initiator asks
the peer for a part by the control plane, with a list of its blocks; both sides post the part's messages; then it asks
whether the peer has done the part. Two parts are under way at a time. A block is a message; with `pack` the blocks of
a part are gathered into one message, and scattered at the other end.

Gloo's addresses go through the control plane, but gloo has no authentication of its own: somebody who connects to its
socket in the moment in which two endpoints join could take one's part.
"""

from __future__ import annotations

import itertools
import struct
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch._C._distributed_c10d import Work

from llmsys.comm.bootstrap import Hello, parse_address
from llmsys.comm.transports.base import Capabilities, Peer, Region, RemoteRegion, TransportConfig
from llmsys.comm.transports.batch_parts import Bytes, Part, bytes_at, parts_of, wait_for_verdict
from llmsys.comm.transports.gloo_pair import Blocks, GlooPair
from llmsys.comm.transports.gloo_serving import PartRequest, Serving, Staging, UsedRegions
from llmsys.comm.transports.memory import Batch
from llmsys.comm.transports.peer_table import lost_error
from llmsys.comm.transports.python_base import PythonTransport
from llmsys.core.errors import ConfigError, DescriptorError, LeaseExpiredError, PeerLostError, TransportError

_OPEN, _START, _FINISH = 1, 2, 3
_NUMBER = struct.Struct("<Q")
_ANSWER_S = 600.0
_NUM_UNDER_WAY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class GlooOptions:
    """Settings of this transport alone.

    pack: a part is one message of gathered blocks, else each block is a message.
    slice_bytes, max_messages: the size of a part; longer blocks are cut to `slice_bytes`.
    """

    pack: bool = False
    slice_bytes: int = 32 << 20
    max_messages: int = 1024

    def __post_init__(self) -> None:
        if self.slice_bytes < 1 or self.max_messages < 1:
            raise ConfigError(
                "gloo cannot be used like this",
                expected="slice_bytes >= 1 and max_messages >= 1",
                found=f"slice_bytes={self.slice_bytes}, max_messages={self.max_messages}",
                fix="leave out what need not be changed",
            )


class GlooTransport(PythonTransport):
    """See the module's text and `base.Transport`."""

    name = "gloo"

    def __init__(self, config: TransportConfig | None = None, options: GlooOptions | None = None) -> None:
        super().__init__(config)
        self._options = options or GlooOptions()
        self._targets: dict[int, int] = {}
        self._used = UsedRegions(self._memory.find)
        self._peers_lock = threading.Lock()
        self._serving: dict[int, Serving] = {}
        self._requesters: dict[int, _Requester] = {}
        self._start()

    @classmethod
    def available(cls) -> str | None:
        if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
            return "this torch was built without gloo: install one from PyPI, such as torch==2.13.0"
        return None

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(one_sided=False, passive=False, allocates=True, shares_process=True)

    def describe(self) -> dict[str, str]:
        options = self._options
        return {
            "library": f"gloo of torch {torch.__version__}",
            "transports": "tcp",
            "messages": "packed" if options.pack else "one per block",
            "slice_bytes": str(options.slice_bytes),
            "max_messages": str(options.max_messages),
        }

    # -- memory --------------------------------------------------------------------------------------------------------

    def _register(self, region_id: int, address: int, size_bytes: int, device: str) -> bytes:
        return _NUMBER.pack(region_id)

    def _unregister(self, region: Region) -> None:
        self._used.wait_unused(region.region_id)

    def _import(self, peer: Peer, remote: RemoteRegion, inner: bytes) -> None:
        if len(inner) != _NUMBER.size:
            raise DescriptorError(
                f"a region of {peer} cannot be imported",
                expected=f"a key of {_NUMBER.size} bytes",
                found=f"{len(inner)} bytes",
                fix="get the descriptor from the peer again",
            )
        (self._targets[remote.remote_id],) = _NUMBER.unpack(inner)

    def _forget(self, remote: RemoteRegion) -> None:
        self._targets.pop(remote.remote_id, None)

    def _target(self, remote: RemoteRegion) -> int:
        found = self._targets.get(remote.remote_id)
        if found is None:
            raise TransportError(
                "a remote region was forgotten before the requests that use it had ended",
                expected="forget_region after them",
                found=f"{remote}",
                fix="wait for the requests first",
            )
        return found

    # -- peers ---------------------------------------------------------------------------------------------------------

    def _add_peer(self, peer: Peer, hello: Hello) -> None:
        with self._peers_lock:
            self._serving[peer.peer_id] = Serving(self._used)
            self._requesters[peer.peer_id] = _Requester(self, peer)

    def _lose_peer(self, peer: Peer, error: TransportError) -> None:
        # Here and not later: once the loss is announced, what the peer was writing to must not change any more.
        with self._peers_lock:
            serving = self._serving.get(peer.peer_id)
        if serving is not None:
            serving.close()
        super()._lose_peer(peer, error)

    def _remove_peer(self, peer: Peer) -> None:
        with self._peers_lock:
            requester, serving = self._requesters.pop(peer.peer_id), self._serving.pop(peer.peer_id)
        requester.close()
        serving.close()
        serving.join()

    def _join(self, rank: int, offer: Callable[[bytes], bytes]) -> GlooPair:
        # A silence as long as a lease would have ended the connection too.
        host = parse_address(self.local.address)[0]
        return GlooPair(rank, offer, host=host, stall_s=self._config.lease_s)

    def _answer(self, peer: Peer, topic: int, body: bytes) -> bytes:
        with self._peers_lock:
            serving = self._serving.get(peer.peer_id)
        if serving is None:
            raise lost_error(peer, "it is not connected any more")
        if topic == _OPEN:
            return serving.open(body, lambda offer: self._join(1, offer))
        if topic == _START:
            serving.start(PartRequest.unpack(body), self._config.connect_timeout_s)
        else:
            serving.finish(*_NUMBER.unpack(body))
        return b""

    def _ask(self, peer: Peer, topic: int, body: bytes) -> bytes:
        return self._control.ask(peer, topic, body, timeout_s=_ANSWER_S)

    # -- transfers -----------------------------------------------------------------------------------------------------

    def _execute(self, peer: Peer, batch: Batch, check: Callable[[], None]) -> None:
        with self._peers_lock:
            requester = self._requesters[peer.peer_id]
        requester.run(batch, check)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Posted:
    number: int
    blocks: Blocks
    works: list[Work]
    buffer: Bytes | None


class _Requester:
    """The side that begins. Used by the peer's thread alone."""

    def __init__(self, transport: GlooTransport, peer: Peer) -> None:
        self._transport, self._peer, self._options = transport, peer, transport._options
        self._pair: GlooPair | None = None
        self._numbers = itertools.count()
        self._staging = Staging()

    def run(self, batch: Batch, check: Callable[[], None]) -> None:
        options = self._options
        max_entries = options.slice_bytes if options.pack else options.max_messages
        memories = [bytes_at(group.local.address, group.local.size_bytes) for group in batch.groups]
        under_way: deque[_Posted] = deque()
        try:
            for part in parts_of(batch, max_bytes=options.slice_bytes, max_entries=max_entries):
                check()
                under_way.append(self._start(batch, part, memories))
                if len(under_way) == _NUM_UNDER_WAY:
                    self._finish(batch, under_way.popleft())
            while under_way:
                check()
                self._finish(batch, under_way.popleft())
        except Exception as error:
            self.close()
            # Tracebacks of errors that are kept would keep sockets and threads.
            traceback.clear_frames(error.__traceback__)
            if isinstance(error, PeerLostError | LeaseExpiredError):
                raise
            wait_for_verdict(check)
            if not isinstance(error, RuntimeError):  # Gloo's are.
                raise
            raise TransportError(
                f"gloo cannot reach {self._peer}",
                expected="messages to come and go",
                found=str(error),
                fix="let gloo reach the address that the endpoints listen at (TransportConfig.host); "
                "raise lease_s if messages are slow",
            ) from error

    def _start(self, batch: Batch, part: Part, memories: list[Bytes]) -> _Posted:
        pair = self._open()
        groups = batch.groups
        locals_, remotes = (np.array([getattr(g, side).address for g in groups]) for side in ("local", "remote"))
        targets = np.array([self._transport._target(group.remote) for group in groups])
        request = PartRequest(
            number=next(self._numbers),
            write=batch.write,
            packed=self._options.pack,
            region_ids=targets[part.groups],
            offsets=part.remote_addresses - remotes[part.groups],
            lengths=part.lengths,
        )
        blocks = Blocks(
            memories=memories,
            which=part.groups,
            offsets=part.local_addresses - locals_[part.groups],
            lengths=part.lengths,
        )
        buffer = self._staging.buffer(request.number, int(part.lengths.sum())) if request.packed else None
        self._transport._ask(self._peer, _START, request.pack())
        works = pair.post(blocks, sends=batch.write, packed=buffer)
        return _Posted(number=request.number, blocks=blocks, works=works, buffer=buffer)

    def _finish(self, batch: Batch, posted: _Posted) -> None:
        # The peer's answer comes first: waiting for it ends when the peer is lost, waiting for gloo may not.
        self._transport._ask(self._peer, _FINISH, _NUMBER.pack(posted.number))
        pair = self._open()
        pair.wait(posted.works)
        if not batch.write and posted.buffer is not None:
            pair.unpack(posted.blocks, posted.buffer)

    def _open(self) -> GlooPair:
        if self._pair is None:
            self._pair = self._transport._join(0, lambda ours: self._transport._ask(self._peer, _OPEN, ours))
        return self._pair

    def close(self) -> None:
        pair, self._pair = self._pair, None
        if pair is not None:
            pair.close()
