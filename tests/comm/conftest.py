"""Fixtures of the conformance suite: every transport that can be used here, and one with a peer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from llmsys.comm.transports import TRANSPORTS, transport_class
from llmsys.comm.transports.base import Copies, Peer, Region, RemoteRegion, Transport
from llmsys.core.errors import ConfigError
from tests.comm.endpoint import (
    CLASSES,
    WAIT_S,
    Bytes,
    Endpoint,
    Recorder,
    Target,
    array_at,
    pattern,
    running_target,
)

# Sanitizers run what is native.
_NAMES = [pytest.param(name, marks=pytest.mark.native) if name == "ucx" else name for name in CLASSES]


@pytest.fixture(scope="module", params=_NAMES)
def transport_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name in TRANSPORTS:
        try:
            transport_class(name)
        except ConfigError as error:
            pytest.skip(f"{name}: {error.found}")
    return name


@dataclass
class Pair:
    """An endpoint here, connected to a target. The target is a child process where the transport can leave this one."""

    endpoint: Endpoint
    target: Target
    peer: Peer
    exported: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def transport(self) -> Transport:
        return self.endpoint.transport

    @property
    def events(self) -> Recorder:
        return self.endpoint.events

    def remote(self, size_bytes: int, seed: int | None = None, **options: Any) -> RemoteRegion:
        """Memory at the target, with `pattern(size_bytes, seed)` or zeros in it, imported here."""
        exported = self.target.call("new_region", size_bytes=size_bytes, seed=seed, **options)
        remote = import_exported(self.transport, self.peer, exported)
        self.exported[remote.remote_id] = exported
        return remote

    def local(self, size_bytes: int, seed: int | None = None, **options: Any) -> tuple[Region, Bytes]:
        region_id = self.endpoint.new_region(size_bytes=size_bytes, seed=seed, **options)["region_id"]
        return self.endpoint.regions[region_id]

    def content(self, remote: RemoteRegion) -> Bytes:
        """What the target itself sees in its memory."""
        region_id = self.exported[remote.remote_id]["region_id"]
        data = self.target.call("content", region_id=region_id, begin=0, size_bytes=remote.size_bytes)
        return np.frombuffer(data, dtype=np.uint8)

    def drop(self, *regions: Region | RemoteRegion) -> None:
        for region in regions:
            if isinstance(region, RemoteRegion):
                self.transport.forget_region(region)
                self.target.call("release", region_id=self.exported.pop(region.remote_id)["region_id"])
            else:
                self.endpoint.release(region_id=region.region_id)


def import_exported(transport: Transport, peer: Peer, exported: dict[str, Any], **changes: Any) -> RemoteRegion:
    values = {key: value for key, value in exported.items() if key != "region_id"} | changes
    return transport.import_region(peer, **values)


def copies(local: Region, remote: RemoteRegion, *entries: tuple[int, int, int]) -> Copies:
    """Entries as (local offset, remote offset, length)."""
    columns = np.array(entries, dtype=np.int64).reshape(-1, 3)
    return Copies(
        local=local,
        remote=remote,
        local_offsets=columns[:, 0],
        remote_offsets=columns[:, 1],
        lengths=columns[:, 2],
    )


@pytest.fixture(scope="module")
def pair(transport_name: str) -> Iterator[Pair]:
    """Shared by the tests of a module: they leave it connected."""
    with running_target(transport_name, name="target") as target:
        endpoint = Endpoint(transport_name, {"name": "here"})
        try:
            peer = endpoint.transport.connect(target.call("address"), timeout_s=WAIT_S)
            yield Pair(endpoint, target, peer)
        finally:
            endpoint.close()


__all__ = ["Pair", "array_at", "copies", "import_exported", "pattern"]
