"""Times of all-to-alls and all-reduces by size: tables, and where each cluster's come from.

Section 5 of the paper: an all-to-all is profiled at some sizes and interpolated linearly between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llmsys.core.errors import ConfigError, InputError
from llmsys.core.specs import NodeSpec
from llmsys.lancet.data import read_shipped

Direction = Literal["dispatch", "combine"]

_TABLE_SIZES = tuple(1 << power for power in range(10, 32, 2))  # 1 KB to 1 GB
_LATENCY_PER_NODE_MS = 0.027
"""The smallest message between two A100 nodes takes 27 us in vidur's network profile (microsoft/vidur, MIT)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageTable:
    """Time of one collective by the bytes of one rank's buffer: linear between the points.

    ``sizes_bytes`` increases strictly, ``ms`` never falls; at least two points. Below the first size the first time
    holds, since what is left is latency; above the last, the last piece goes on.
    """

    sizes_bytes: tuple[float, ...]
    ms: tuple[float, ...]

    def __post_init__(self) -> None:
        sizes, ms = np.asarray(self.sizes_bytes, dtype=float), np.asarray(self.ms, dtype=float)
        shaped = sizes.shape == ms.shape and len(sizes) >= 2
        if not shaped or (np.diff(sizes) <= 0).any() or (np.diff(ms) < 0).any() or sizes[0] < 0 or not ms[0] >= 0:
            raise InputError(
                "a table of message times is not in order",
                expected="two or more increasing sizes, and as many times of at least 0 that never fall",
                found=f"sizes_bytes {self.sizes_bytes}, ms {self.ms}",
                fix="sort the points, and take medians so that noise does not make a larger message faster",
            )

    def time_ms(self, size_bytes: float) -> float:
        last, before = self.sizes_bytes[-1], self.sizes_bytes[-2]
        if size_bytes <= last:
            return float(np.interp(size_bytes, self.sizes_bytes, self.ms))
        slope = (self.ms[-1] - self.ms[-2]) / (last - before)
        return self.ms[-1] + slope * (size_bytes - last)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterMessages:
    """What collectives take on one cluster; ``origin`` says where the numbers are from."""

    origin: str
    num_gpus: int
    dispatch: MessageTable
    combine: MessageTable
    all_reduce: MessageTable

    def all_to_all(self, direction: Direction) -> MessageTable:
        return self.dispatch if direction == "dispatch" else self.combine


def node_messages(node: NodeSpec, num_gpus: int, *, network_efficiency: float) -> ClusterMessages:
    """Collectives of ``num_gpus`` devices of nodes like p3dn and p4de whose devices share one network.

    Inside a node: the NCCL times fitted to A100 or H100 nodes, in proportion to the node's links for any other device
    (V100: an assumption). Between nodes: the bytes that leave a node, over ``network_efficiency`` of its rate, plus
    27 us for each other node; an all-to-all takes the longer of the two. An all-reduce is hierarchical: each byte
    crosses the network twice, and the links inside a node twice.
    """
    per_node = min(num_gpus, node.devices_per_node)
    if num_gpus < 2 or num_gpus % per_node or per_node not in (2, 4, 8):
        raise ConfigError(
            f"{num_gpus} devices do not make whole nodes of {node.name}",
            expected=f"2, 4 or 8, or a multiple of {node.devices_per_node}",
            found=str(num_gpus),
            fix="set num_gpus",
        )
    num_nodes = num_gpus // per_node
    inside = _nccl_table(node, per_node)
    network = node.inter_link.bandwidth_gbps / 8 * 1e6 * network_efficiency  # bytes in one ms
    latency_ms = _LATENCY_PER_NODE_MS * (num_nodes - 1)
    sizes = np.array(_TABLE_SIZES, dtype=float)
    all_to_all, all_reduce = [], []
    for size in sizes:
        local_ms = inside.time_ms(size * per_node / num_gpus)
        leaving_ms = latency_ms + size * per_node * (num_nodes - 1) / num_nodes / network
        all_to_all.append(max(local_ms, leaving_ms) if num_nodes > 1 else local_ms)
        reduced_ms = latency_ms + 2 * size * (num_nodes - 1) / num_nodes / network
        all_reduce.append(2 * inside.time_ms(size) + (reduced_ms if num_nodes > 1 else 0.0))
    table = MessageTable(sizes_bytes=tuple(sizes), ms=tuple(all_to_all))
    return ClusterMessages(
        origin=f"NCCL fit inside a node, {network_efficiency:.0%} of {node.inter_link.bandwidth_gbps:g} Gbps between",
        num_gpus=num_gpus,
        dispatch=table,
        combine=table,
        all_reduce=MessageTable(sizes_bytes=tuple(sizes), ms=tuple(all_reduce)),
    )


def deepep_messages(num_gpus: int) -> ClusterMessages:
    """DeepEP's dispatch and combine, and an assumed all-reduce, on 1, 2, 4 or 8 H100 nodes of 8 devices.

    By the bytes of a 16-bit buffer. As measured, a dispatch sends its values in 8 bits and a combine in 16.
    """
    fits = read_shipped("all_to_all_fit.json")["deepep"]
    nodes = str(num_gpus // 8)
    if num_gpus % 8 or nodes not in fits["dispatch"]:
        raise ConfigError(
            "DeepEP was not measured on that many devices",
            expected=", ".join(str(8 * int(measured)) for measured in fits["dispatch"]),
            found=str(num_gpus),
            fix="set num_gpus",
        )
    return ClusterMessages(
        origin="DeepEP measurements, fitted",
        num_gpus=num_gpus,
        dispatch=_deepep_table(fits["dispatch"][nodes], 0.5),
        combine=_deepep_table(fits["combine"][nodes]),
        # Twice the bytes of a combine, as a ring has: no measurement across nodes is at hand.
        all_reduce=_scaled(_deepep_table(fits["combine"][nodes]), 2.0),
    )


def _nccl_table(node: NodeSpec, num_gpus: int) -> MessageTable:
    content = read_shipped("all_to_all_fit.json")
    measured = {"A100-80GB": "A100-80GB", "A100-40GB": "A100-80GB", "H100-SXM": "H100-SXM", "H200-SXM": "H100-SXM"}
    name = measured.get(node.device.name, "A100-80GB")
    table = MessageTable(
        sizes_bytes=tuple(content["sizes_bytes"]), ms=tuple(content["nccl"][name][str(num_gpus)]["ms"])
    )
    if node.device.name in measured:
        return table
    return _scaled(table, _A100_LINK_GBPS / node.intra_link.bandwidth_gbps)


_A100_LINK_GBPS = 4800.0


def _scaled(table: MessageTable, factor: float) -> MessageTable:
    return MessageTable(sizes_bytes=table.sizes_bytes, ms=tuple(factor * ms for ms in table.ms))


def _deepep_table(fit: dict[str, Any], sent_share: float = 1.0) -> MessageTable:
    per_byte_ms = sent_share / (fit["bandwidth_gb_per_s"] * 1e6)
    sizes = (0.0, float(_TABLE_SIZES[-1]))
    return MessageTable(sizes_bytes=sizes, ms=tuple(fit["latency_ms"] + size * per_byte_ms for size in sizes))
