"""What transports in Python share, beyond what the conformance suite sees of it."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable

import numpy as np
import pytest

from llmsys.comm.transports.base import Peer, TransportConfig
from llmsys.comm.transports.memory import Batch, pack_key, unpack_key
from llmsys.comm.transports.requests import EventThread
from llmsys.core.errors import DescriptorError, PeerLostError, TransportError
from tests.comm.asking_transport import AskingTransport
from tests.comm.conftest import copies, import_exported
from tests.comm.endpoint import SECRET, WAIT_S, Endpoint


class HookedTransport(AskingTransport):
    """Calls `hook` when the bytes of a batch have been moved."""

    hook: Callable[[], None] = staticmethod(lambda: None)

    def _execute(self, peer: Peer, batch: Batch, check: Callable[[], None]) -> None:
        super()._execute(peer, batch, check)
        self.hook()


def test_a_read_whose_peer_goes_before_completion_fails() -> None:
    """The bytes are there, but nobody knows whether the peer was still there when they were taken."""
    target = Endpoint("asking", {"name": "target"})
    with HookedTransport(TransportConfig(secret=SECRET, name="here")) as here:
        peer = here.connect(target.address(), timeout_s=WAIT_S)
        remote = import_exported(here, peer, target.new_region(size_bytes=100, seed=1))
        memory = np.zeros(100, dtype=np.uint8)
        region = here.register(memory.ctypes.data, 100, owner=memory)
        here.read(peer, [copies(region, remote, (0, 0, 50))]).wait(WAIT_S)

        def target_goes() -> None:
            target.close()
            deadline = time.monotonic() + WAIT_S
            while here.peers():
                assert time.monotonic() < deadline
                time.sleep(0.005)

        here.hook = target_goes
        request = here.read(peer, [copies(region, remote, (50, 50, 50))])
        with pytest.raises(PeerLostError, match="read of 1 blocks from target"):
            request.wait(WAIT_S)
        assert memory[50:].any()


def test_an_error_of_the_library_ends_that_request_only() -> None:
    target = Endpoint("asking", {"name": "target"})
    with HookedTransport(TransportConfig(secret=SECRET, name="here")) as here:
        peer = here.connect(target.address(), timeout_s=WAIT_S)
        exported = target.new_region(size_bytes=100, seed=1)
        remote = import_exported(here, peer, exported)
        memory = np.zeros(100, dtype=np.uint8)
        region = here.register(memory.ctypes.data, 100, owner=memory)

        def fail() -> None:
            raise RuntimeError("out of something")

        here.hook = fail
        request = here.read(peer, [copies(region, remote, (0, 0, 50))])
        with pytest.raises(TransportError, match="read of 1 blocks from target") as caught:
            request.wait(WAIT_S)
        assert "RuntimeError: out of something" in caught.value.found
        assert pickle.loads(pickle.dumps(caught.value)).found == caught.value.found
        here.hook = lambda: None
        here.read(peer, [copies(region, remote, (0, 0, 50))]).wait(WAIT_S)
        # What the peer's side refuses comes back as an error too.
        target.release(region_id=exported["region_id"])
        with pytest.raises(TransportError) as caught:
            here.read(peer, [copies(region, remote, (0, 0, 50))]).wait(WAIT_S)
        assert "no such memory" in str(caught.value)
        here.release(region)
    target.close()


def test_keys() -> None:
    key = pack_key("asking", address=1 << 47, size_bytes=1 << 40, device="cuda:1", inner=b"inner")
    said = {"address": 1 << 47, "size_bytes": 1 << 40, "device": "cuda:1"}
    assert unpack_key("asking", key, **said) == b"inner"  # type: ignore[arg-type]
    for changes in ({"address": 0}, {"size_bytes": 5}, {"device": "cpu"}):
        with pytest.raises(DescriptorError, match="another region"):
            unpack_key("asking", key, **(said | changes))  # type: ignore[arg-type]
    with pytest.raises(DescriptorError, match="another region") as caught:
        unpack_key("nixl", key, **said)  # type: ignore[arg-type]
    assert "nixl" in caught.value.expected and "asking" in caught.value.found


def test_the_event_thread_survives_errors_and_runs_all_before_it_ends() -> None:
    events, ran = EventThread("events"), []
    events.post(lambda: 1 / 0)
    for number in range(100):
        events.post(lambda number=number: ran.append(number))  # type: ignore[misc]
    events.post(events.close)
    events.close()
    assert ran == list(range(100))
    events.post(lambda: ran.append(100))
    assert ran[-1] == 100
