"""What drivers tell workers and both must know; without torch, so that figures are imported quickly."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("shm", "cma")
"""Memory that the transport allocated, and memory of a worker's own that it only registered."""

IDLE, PYTHON, MODEL = "idle", "a Python loop beside", "model steps, messages between"
STATES = (IDLE, PYTHON, MODEL)
PER_BLOCK, PACKED = "per block", "packed"
TARGET, INITIATOR = 0, 1
"""What the target of `sync_overhead` does meanwhile, how messages carry blocks, and the two ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultSettings:
    """Of a worker of `fault_rounds`.

    fast_paths: use shared memory and CMA to peers on this host; else UCX over TCP.

    slice_bytes, slice_delay_us: transfers are slowed to one such slice per delay, so that faults land inside them.
    sabotage: one of SABOTAGES; breaks a rule on purpose, so that a test sees whether the rounds notice.
    """

    name: str
    port: int
    library: str
    lease_s: float
    unclaimed_timeout_s: float
    quarantine_s: float
    fast_paths: bool
    num_blocks: int
    block_bytes: int
    slice_bytes: int
    slice_delay_us: int
    sabotage: str = ""


SABOTAGES = ("frees_early", "never_frees", "forgets_loss", "takes_stale_tickets", "leaks")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSettings:
    """Of a worker of `dynamic_membership`.

    net_device: empty for all paths of this host; else UCX over TCP on that device alone."""

    name: str
    host: str
    port: int
    library: str
    net_device: str
    lease_s: float
    num_blocks: int
    block_bytes: int
    request_blocks: int
