"""Whether to move many small segments themselves, or to stage them and re-lay them out with a kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmsys.kvdirect.layout.cache import VLLM_ORDER, HeadRange, KvLayout, out_of_range
from llmsys.kvdirect.layout.segments import BlockIds, IntArray, Segments, layer_ranges, tiled_over_layers

Method = Literal["direct", "fetch", "gather"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayoutCosts:
    """What ``plan_relayout`` is told; rates count GB of 10^9 bytes.

    ``segment_overhead_us``: of the initiator for each one-sided operation. ``link_gb_per_s``: between the workers.
    ``copy_gb_per_s``: of a re-layout kernel, each byte counted once. ``kernel_launch_us``: for each layer.
    ``source_gathers``: whether the source takes part; in KVDirect's pull it does not.
    """

    segment_overhead_us: float
    link_gb_per_s: float
    copy_gb_per_s: float
    kernel_launch_us: float
    source_gathers: bool = False

    def __post_init__(self) -> None:
        for name in ("link_gb_per_s", "copy_gb_per_s"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise out_of_range(name, getattr(self, name), "a finite number above 0")
        for name in ("segment_overhead_us", "kernel_launch_us"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise out_of_range(name, getattr(self, name), "a finite number of at least 0")

    def time_ms(self, num_operations: int, wire_bytes: int, num_launches: int, copied_bytes: int) -> float:
        """Nothing overlaps: the sum of overheads, wire time and kernel time."""
        overhead_ms = (num_operations * self.segment_overhead_us + num_launches * self.kernel_launch_us) / 1e3
        return overhead_ms + wire_bytes / (self.link_gb_per_s * 1e6) + copied_bytes / (self.copy_gb_per_s * 1e6)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RelayoutPlan:
    """How one sequence gets from one layout to another, and the estimated time of each method.

    ``method``
        "direct": ``segments`` go from the source's cache to the destination's; there is no staging.
        "fetch": ``segments`` go from the source's cache to a staging buffer at the destination, laid out as the source
        is, and a kernel re-lays them out. All heads of the source move, in long runs.
        "gather": a kernel packs the common heads into a staging buffer at the source, ``segments`` (one a layer) go to
        an equal buffer at the destination, and a kernel re-lays them out.
    ``staging``: layout of the buffer, ``staging.layer_bytes`` bytes for each layer; its block table is 0, 1, 2, ...
    ``staging_first_token``, ``staging_first_head``: where the first moved token stands in that table's tokens, and the
    first moved head among the buffer's heads. ``heads``: those that move, in the model's numbering.
    ``fetch_ms`` and ``gather_ms`` are infinite where the method is not allowed or nothing moves.
    """

    method: Method
    segments: Segments
    heads: HeadRange
    staging: KvLayout | None
    staging_first_token: int
    staging_first_head: int
    direct_ms: float
    fetch_ms: float
    gather_ms: float


def plan_relayout(
    source: KvLayout,
    destination: KvLayout,
    source_blocks: BlockIds,
    destination_blocks: BlockIds,
    num_tokens: int,
    *,
    first_token: int = 0,
    costs: RelayoutCosts,
) -> RelayoutPlan:
    """Whether to move the segments themselves or to stage; the fastest by ``costs``, "direct" before the others.

    Arguments and errors are those of ``transfer_segments``. Estimates assume that nothing overlaps.
    """
    ranges = layer_ranges(source, destination, source_blocks, destination_blocks, num_tokens, first_token)
    layers, layer_bytes, heads = source.num_layers, int(ranges[2].sum()), source.heads.common(destination.heads)
    moved = layers * layer_bytes
    direct = _Way(method="direct", ranges=ranges, time_ms=costs.time_ms(layers * len(ranges[0]), moved, 0, 0))
    if not moved:
        return _plan([direct], direct, heads, layers)
    fetch = _fetch(source, np.asarray(source_blocks), num_tokens, first_token, heads)
    wire = layers * int(fetch.ranges[2].sum())
    fetch = replace(fetch, time_ms=costs.time_ms(layers * len(fetch.ranges[0]), wire, layers, moved))
    ways = [direct, fetch]
    if costs.source_gathers:
        gather = _gather(source, num_tokens - first_token, heads, layer_bytes)
        ways.append(replace(gather, time_ms=costs.time_ms(layers, moved, 2 * layers, 2 * moved)))
    return _plan(ways, min(ways, key=lambda way: way.time_ms), heads, layers)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Way:
    """A method with the ranges of one layer; the other fields are those of RelayoutPlan."""

    method: Method
    ranges: tuple[IntArray, IntArray, IntArray]
    staging: KvLayout | None = None
    first_token: int = 0
    first_head: int = 0
    time_ms: float = math.inf


def _fetch(source: KvLayout, table: NDArray[np.integer], num_tokens: int, first_token: int, heads: HeadRange) -> _Way:
    begin, end = first_token // source.block_tokens, -(-num_tokens // source.block_tokens)
    skipped = begin * source.block_tokens
    staging = replace(source, num_blocks=end - begin)
    blocks = np.arange(end - begin)
    return _Way(
        method="fetch",
        ranges=layer_ranges(source, staging, table[begin:end], blocks, num_tokens - skipped, first_token - skipped),
        staging=staging,
        first_token=first_token - skipped,
        first_head=heads.begin - source.heads.begin,
    )


def _gather(source: KvLayout, num_tokens: int, heads: HeadRange, layer_bytes: int) -> _Way:
    # Heads are numbered from 0 here: those that two ranks have in common need not be the heads of any rank.
    whole = {"num_blocks": 1, "block_tokens": num_tokens, "num_kv_heads": len(heads), "tp_size": 1, "tp_rank": 0}
    zero, size = np.zeros(1, dtype=np.int64), np.array([layer_bytes], dtype=np.int64)
    return _Way(method="gather", ranges=(zero, zero, size), staging=replace(source, **whole, order=VLLM_ORDER))


def _plan(ways: Sequence[_Way], chosen: _Way, heads: HeadRange, num_layers: int) -> RelayoutPlan:
    times_ms = {way.method: way.time_ms for way in ways}
    return RelayoutPlan(
        method=chosen.method,
        segments=tiled_over_layers(*chosen.ranges, num_layers=num_layers),
        heads=heads,
        staging=chosen.staging,
        staging_first_token=chosen.first_token,
        staging_first_head=chosen.first_head,
        direct_ms=times_ms["direct"],
        fetch_ms=times_ms.get("fetch", math.inf),
        gather_ms=times_ms.get("gather", math.inf),
    )
