"""NIXL with its UCX backend, as a transport to compare with. Optional: needs one of its packages.

Each endpoint has one agent that serves its memory, and one for every peer that it reads from or writes to. NIXL's
metadata goes through the authenticated handshake and remote keys. Notifications are the control plane's: NIXL's own are
neither acknowledged nor numbered.

Where this side of the contract is weaker than that of `ucx`: a process that is stopped while it moves a part of
`slice_bytes` goes on with it when it is continued, even if its lease has ended meanwhile; and over TCP, UCX may abort a
process that is continued after its peers gave it up in the middle of a transfer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llmsys.comm.bootstrap import Hello
from llmsys.comm.transports.base import Capabilities, Peer, Region, RemoteRegion, TransportConfig
from llmsys.comm.transports.batch_parts import parts_of, wait_for_verdict
from llmsys.comm.transports.memory import Batch
from llmsys.comm.transports.nixl_link import PACKAGES, NixlLink, NixlTarget, find_nixl
from llmsys.comm.transports.peer_table import lost_error
from llmsys.comm.transports.python_base import PythonTransport
from llmsys.core.errors import ConfigError, DescriptorError, TransportError

_PROBE_BYTES = 32
_MAX_ENTRIES = 16_384
_WAKE_US = 100_000
_POLL_S = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class NixlOptions:
    """Settings of this transport alone. The defaults were the fastest of those tried on two cores.

    progress: who serves peers that come over TCP or verbs. "events": NIXL's thread, asleep until something comes.
        "spin": the same thread polling, as in NIXL's own Python API; it takes a core. "poll": no thread of NIXL's, one
        of ours looks every millisecond.
    num_threads: NIXL's threads that share a large part; 0 is none, the peer's thread does it all.
    slice_bytes: what is moved between two looks at the lease.
    ucx_config: UCX's settings without "UCX_", as "TLS=tcp,NET_DEVICES=eth0"; the environment's come first. A value with
        a comma in it can only be set in the environment.
    """

    progress: Literal["events", "spin", "poll"] = "events"
    num_threads: int = 0
    slice_bytes: int = 16 << 20
    ucx_config: str = ""

    def __post_init__(self) -> None:
        if self.progress not in ("events", "spin", "poll") or self.num_threads < 0 or self.slice_bytes < 1:
            raise ConfigError(
                "NIXL cannot be used like this",
                expected='progress "events", "spin" or "poll", num_threads >= 0, slice_bytes >= 1',
                found=f"progress={self.progress!r}, num_threads={self.num_threads}, slice_bytes={self.slice_bytes}",
                fix="leave out what need not be changed",
            )
        if bad := [part for part in self.ucx_config.split(",") if part and "=" not in part]:
            raise ConfigError(
                "a UCX setting for NIXL has no name",
                expected="NAME=value, NAME=value, where values have no comma",
                found=", ".join(map(repr, bad)),
                fix=f"set it in the environment before the process starts, such as UCX_TLS=tcp,{bad[0]}",
            )


class NixlTransport(PythonTransport):
    """See the module's text and `base.Transport`."""

    name = "nixl"

    def __init__(self, config: TransportConfig | None = None, options: NixlOptions | None = None) -> None:
        super().__init__(config)
        self._options = options or NixlOptions()
        self._library = find_nixl()
        self._links: dict[int, NixlLink] = {}
        self._links_lock = threading.Lock()
        name, generation = self._identity
        self._agent_name = f"{name}-{generation:x}"
        self._agent = self._make_agent(self._agent_name, serves=True)
        self._probe = np.frombuffer(secrets.token_bytes(_PROBE_BYTES), dtype=np.uint8).copy()
        descriptors = self._descriptors(self._probe.ctypes.data, _PROBE_BYTES)
        self._agent.registerMem(descriptors, [])
        self._metadata: bytes = self._agent.getLocalPartialMD(descriptors, True, [])
        self._stop = threading.Event()
        self._poller = threading.Thread(target=self._poll, name="llmsys-nixl-progress", daemon=True)
        if self._options.progress == "poll":
            self._poller.start()
        self._start()

    @classmethod
    def available(cls) -> str | None:
        if not any(importlib.util.find_spec(package) for package in PACKAGES):
            return (
                f"none of {', '.join(PACKAGES)} is installed: pip install --no-deps nixl-cu12 "
                "(without --no-deps it may replace torch)"
            )
        try:
            find_nixl()
        except Exception as error:  # A shared library is missing, or is for another CPU.
            return f"NIXL cannot be loaded: {type(error).__name__}: {error}"
        return None

    @property
    def capabilities(self) -> Capabilities:
        tls = self._ucx_tls()
        passive = not tls or tls.startswith("^") or any(name in tls.split(",") for name in ("all", "cma", "sm", "shm"))
        # A posted transfer cannot be called back, and goes on when a stopped process does.
        return Capabilities(one_sided=True, passive=passive, allocates=True, shares_process=True, fenced=False)

    def describe(self) -> dict[str, str]:
        options = self._options
        return {
            "library": self._library.version,
            "transports": f"UCX_TLS={self._ucx_tls() or 'all'}",
            "ucx_config": options.ucx_config,
            "progress": options.progress,
            "num_threads": str(options.num_threads),
            "slice_bytes": str(options.slice_bytes),
            "notifications": "control plane",
        }

    def _ucx_tls(self) -> str:
        settings = dict(part.split("=", 1) for part in self._options.ucx_config.split(",") if part)
        return os.environ.get("UCX_TLS") or settings.get("TLS", "")

    # -- agents --------------------------------------------------------------------------------------------------------

    def _make_agent(self, name: str, *, serves: bool) -> Any:
        nixl, options = self._library.bindings, self._options
        config = nixl.nixlAgentConfig()
        config.useProgThread = serves and options.progress != "poll"
        # NIXL's thread sleeps in poll() for so long; 0, as its Python API has it, makes it spin.
        config.pthrDelay = 0 if options.progress == "spin" else _WAKE_US
        config.syncMode = nixl.NIXL_THREAD_SYNC_RW
        settings = {"num_workers": "1"}
        if options.ucx_config:
            settings["engine_config"] = options.ucx_config
        if options.num_threads and not serves:
            settings |= {"num_threads": str(options.num_threads), "split_batch_size": "2"}
        try:
            agent = nixl.nixlAgent(name, config)
            agent.createBackend("UCX", settings)
        except Exception as error:
            raise TransportError(
                "NIXL cannot start",
                expected="an agent with the UCX backend",
                found=f"{type(error).__name__}: {error}",
                fix="see what NIXL says above; NIXL_LOG_LEVEL=debug makes it say more",
            ) from error
        return agent

    def _poll(self) -> None:
        while not self._stop.wait(_POLL_S):
            self._agent.getNotifs({}, [])

    def _descriptors(self, address: int, size_bytes: int) -> Any:
        nixl = self._library.bindings
        return nixl.nixlRegDList(nixl.DRAM_SEG, [(address, size_bytes, 0, b"")])

    def _close_library(self) -> None:
        self._stop.set()
        if self._poller.is_alive():
            self._poller.join()
        self._agent = None

    # -- peers ---------------------------------------------------------------------------------------------------------

    def _hello_details(self) -> dict[str, bytes | int | str]:
        return {
            "agent": self._agent_name,
            "metadata": self._metadata,
            "probe_address": self._probe.ctypes.data,
            "probe": self._probe.tobytes(),
        }

    def _add_peer(self, peer: Peer, hello: Hello) -> None:
        agent, metadata, address, probe = (
            hello.details.get(key) for key in ("agent", "metadata", "probe_address", "probe")
        )
        if not (isinstance(agent, str) and isinstance(metadata, bytes) and isinstance(address, int)) or not (
            isinstance(probe, bytes) and len(probe) == _PROBE_BYTES
        ):
            raise TransportError(
                f"{peer} does not say how its NIXL agent is reached",
                expected="agent, metadata, probe_address and probe in its hello",
                found=", ".join(sorted(hello.details)) or "nothing",
                fix="run the same release of llmsys on both sides",
            )
        target = NixlTarget(agent=agent, metadata=metadata, probe_address=address, probe=probe)

        def make(number: str) -> Any:
            return self._make_agent(f"{self._agent_name}>{peer.peer_id}.{number}", serves=False)

        link = NixlLink(self._library, peer, target, make)
        try:
            link.connect(self._config.connect_timeout_s)
        except BaseException:
            link.close()
            raise
        with self._links_lock:
            self._links[peer.peer_id] = link

    def _remove_peer(self, peer: Peer) -> None:
        with self._links_lock:
            link = self._links.pop(peer.peer_id)
        link.close()

    def connect(self, address: str, *, timeout_s: float | None = None) -> Peer:
        peer = super().connect(address, timeout_s=timeout_s)
        # The peer takes us for connected only when it has read our probe too; heartbeats come after that.
        self._control.wait_alive(peer)
        return peer

    def _link(self, peer: Peer) -> NixlLink:
        with self._links_lock:
            link = self._links.get(peer.peer_id)
        if link is None:
            raise lost_error(peer, "it is not connected any more")
        return link

    # -- memory --------------------------------------------------------------------------------------------------------

    def _register(self, region_id: int, address: int, size_bytes: int, device: str) -> bytes:
        descriptors = self._descriptors(address, size_bytes)
        self._agent.registerMem(descriptors, [])
        metadata: bytes = self._agent.getLocalPartialMD(descriptors, False, [])
        return self._agent_name.encode() + b"\0" + metadata

    def _unregister(self, region: Region) -> None:
        with self._links_lock:
            links = list(self._links.values())
        for link in links:
            link.unregister(region)
        self._agent.deregisterMem(self._descriptors(region.address, region.size_bytes), [])

    def _import(self, peer: Peer, remote: RemoteRegion, inner: bytes) -> None:
        agent, _, metadata = inner.partition(b"\0")
        expected = f"{peer.name}-{peer.generation:x}"
        if agent != expected.encode():
            raise DescriptorError(
                f"the remote key is not one of {peer}",
                expected=f"the key of a region of agent {expected}",
                found=f"one of agent {agent.decode('utf-8', 'replace')[:200]}",
                fix="import a region from the peer that registered it",
            )
        self._link(peer).import_region(remote, metadata)

    def _forget(self, remote: RemoteRegion) -> None:
        with self._links_lock:
            link = self._links.get(remote.peer_id)
        if link is not None:
            link.forget_region(remote)

    # -- transfers -----------------------------------------------------------------------------------------------------

    def _execute(self, peer: Peer, batch: Batch, check: Callable[[], None]) -> None:
        link = self._link(peer)
        regions = tuple({group.local.region_id: group.local for group in batch.groups}.values())
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(link.using(regions))
            except TransportError:
                wait_for_verdict(check)  # an agent that was made anew finds nobody where the peer has died
                raise
            for part in parts_of(batch, max_bytes=self._options.slice_bytes, max_entries=_MAX_ENTRIES):
                check()
                link.transfer(part, write=batch.write, check=check)
