"""What the planners are told about hardware and models: devices, links, clusters, transformer shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llmsys.core.errors import ConfigError, InputError

Architecture = Literal["decoder_only", "encoder_decoder"]


def _require_name(owner: str, name: str) -> None:
    if not name:
        raise ConfigError(
            f"{owner}: empty name", expected="a name that errors can use", found=f"name = {name!r}", fix="set name"
        )


def _require_positive(owner: str, field: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise _out_of_range(owner, field, value, "a finite number above 0")


def _require_count(owner: str, field: str, value: int) -> None:
    if value < 1:
        raise _out_of_range(owner, field, value, "a whole number of at least 1")


def _out_of_range(owner: str, field: str, value: object, expected: str) -> ConfigError:
    return ConfigError(
        f"{owner}: {field} is out of range",
        expected=f"{field}: {expected}",
        found=f"{field} = {value!r}",
        fix=f"set {field}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One accelerator. ``memory_mb`` counts MB of 2^20 bytes; bandwidth counts GB of 10^9 bytes.

    ``peak_16bit_tflops`` is the dense (no structured sparsity) peak of 16-bit matrix units, in 10^12 FLOP/s.
    """

    name: str
    memory_mb: float
    peak_16bit_tflops: float
    memory_bandwidth_gb_per_s: float

    def __post_init__(self) -> None:
        _require_name("DeviceSpec", self.name)
        _require_positive(self.name, "memory_mb", self.memory_mb)
        _require_positive(self.name, "peak_16bit_tflops", self.peak_16bit_tflops)
        _require_positive(self.name, "memory_bandwidth_gb_per_s", self.memory_bandwidth_gb_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """A connection of two devices: ``bandwidth_gbps`` in 10^9 bits per second, ``latency_us`` per message."""

    name: str
    bandwidth_gbps: float
    latency_us: float = 0.0

    def __post_init__(self) -> None:
        _require_name("LinkSpec", self.name)
        _require_positive(self.name, "bandwidth_gbps", self.bandwidth_gbps)
        if not (math.isfinite(self.latency_us) and self.latency_us >= 0):
            raise _out_of_range(self.name, "latency_us", self.latency_us, "a finite number of at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """Equal nodes of equal devices. Ranks are numbered node by node: rank r is on node r // devices_per_node.

    ``intra_link`` joins two devices of one node, ``inter_link`` two devices of different nodes.
    """

    name: str
    device: DeviceSpec
    num_nodes: int
    devices_per_node: int
    intra_link: LinkSpec
    inter_link: LinkSpec

    def __post_init__(self) -> None:
        _require_name("ClusterSpec", self.name)
        _require_count(self.name, "num_nodes", self.num_nodes)
        _require_count(self.name, "devices_per_node", self.devices_per_node)

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.devices_per_node

    def link_between(self, rank_a: int, rank_b: int) -> LinkSpec | None:
        """The link two ranks talk over; None for a rank with itself. InputError for an unknown rank."""
        for rank in (rank_a, rank_b):
            if not 0 <= rank < self.num_devices:
                raise InputError(
                    f"cluster {self.name} has no rank {rank}",
                    expected=f"0 to {self.num_devices - 1}, {self.devices_per_node} a node",
                    found=str(rank),
                    fix="raise num_nodes or devices_per_node, or use fewer ranks",
                )
        if rank_a == rank_b:
            return None
        same_node = rank_a // self.devices_per_node == rank_b // self.devices_per_node
        return self.intra_link if same_node else self.inter_link


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A transformer. ``kv_channels`` is the width of one head; it need not be ``hidden / num_heads``
    (T5-11B).

    A decoder-only model has ``num_encoder_layers = 0``; an encoder-decoder model has layers of both kinds.
    """

    name: str
    architecture: Architecture
    hidden: int
    num_heads: int
    kv_channels: int
    ffn_hidden: int
    num_encoder_layers: int
    num_decoder_layers: int
    vocab_size: int

    def __post_init__(self) -> None:
        _require_name("ModelSpec", self.name)
        if self.architecture not in ("decoder_only", "encoder_decoder"):
            raise _out_of_range(self.name, "architecture", self.architecture, "'decoder_only' or 'encoder_decoder'")
        for field in ("hidden", "num_heads", "kv_channels", "ffn_hidden", "num_decoder_layers", "vocab_size"):
            _require_count(self.name, field, getattr(self, field))
        if self.architecture == "encoder_decoder":
            _require_count(self.name, "num_encoder_layers", self.num_encoder_layers)
        elif self.num_encoder_layers != 0:
            raise _out_of_range(self.name, "num_encoder_layers", self.num_encoder_layers, "0 for a decoder_only model")

    @property
    def layer_shape(self) -> tuple[int, int, int, int]:
        """(hidden, num_heads, kv_channels, ffn_hidden): what the costs of one layer depend on."""
        return self.hidden, self.num_heads, self.kv_channels, self.ffn_hidden

    @property
    def num_layers(self) -> int:
        return self.num_encoder_layers + self.num_decoder_layers

    def num_parameters(self) -> int:
        """Estimated parameter count: the weight matrices only.

        Counted: query, key, value and output projections (once more in each layer of an encoder-decoder
        model's decoder, for cross-attention), the two matrices of an ungated feed-forward block, and one
        embedding table shared by input and output. Not counted: biases, norms and position embeddings
        (under 1% together).
        """
        attention = 4 * self.hidden * self.num_heads * self.kv_channels
        feed_forward = 2 * self.hidden * self.ffn_hidden
        num_attentions = self.num_layers
        if self.architecture == "encoder_decoder":
            num_attentions += self.num_decoder_layers
        return num_attentions * attention + self.num_layers * feed_forward + self.vocab_size * self.hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """One kind of machine that can be bought or rented; ``cluster(n)`` makes a cluster of n of them."""

    name: str
    device: DeviceSpec
    devices_per_node: int
    intra_link: LinkSpec
    inter_link: LinkSpec

    def cluster(self, num_nodes: int) -> ClusterSpec:
        return ClusterSpec(
            name=f"{num_nodes}x{self.name}",
            device=self.device,
            num_nodes=num_nodes,
            devices_per_node=self.devices_per_node,
            intra_link=self.intra_link,
            inter_link=self.inter_link,
        )


# Sources: NVIDIA data sheets of the SXM modules "V100" (2020), "A100" (2021), "H100" (2023), "H200" (2024).
# FLOP/s are the dense 16-bit tensor-core figures; the H100 and H200 sheets print them doubled, with sparsity.
# Memory is the sheet's size with 1 GB read as 1024 MB, which is how memory sizes are sold.
_DEVICES = (
    DeviceSpec(name="V100-32GB", memory_mb=32 * 1024, peak_16bit_tflops=125.0, memory_bandwidth_gb_per_s=900.0),
    DeviceSpec(name="A100-40GB", memory_mb=40 * 1024, peak_16bit_tflops=312.0, memory_bandwidth_gb_per_s=1555.0),
    DeviceSpec(name="A100-80GB", memory_mb=80 * 1024, peak_16bit_tflops=312.0, memory_bandwidth_gb_per_s=2039.0),
    DeviceSpec(name="H100-SXM", memory_mb=80 * 1024, peak_16bit_tflops=989.0, memory_bandwidth_gb_per_s=3350.0),
    DeviceSpec(name="H200-SXM", memory_mb=141 * 1024, peak_16bit_tflops=989.0, memory_bandwidth_gb_per_s=4800.0),
)
DEVICES: dict[str, DeviceSpec] = {device.name: device for device in _DEVICES}


def _node(name: str, device: str, intra: tuple[str, float], inter: tuple[str, float]) -> NodeSpec:
    return NodeSpec(
        name=name,
        device=DEVICES[device],
        devices_per_node=8,
        intra_link=LinkSpec(name=intra[0], bandwidth_gbps=intra[1]),
        inter_link=LinkSpec(name=inter[0], bandwidth_gbps=inter[1]),
    )


# Intra-node: the data sheets' NVLink figure of one GPU, both directions added (300, 600, 900 GB/s), times 8
# bits: the convention of the public DynaPipe planner (4800 Gbps on A100). One direction alone has half of
# it. Inter-node: the network of a whole node, shared by its 8 devices; one pair of devices that uses one
# adapter gets that adapter's part. p3dn, p4d, p4de: AWS EC2 instance pages (100, 400, 400 Gbps). H100,
# H200: eight 400 Gbps adapters, NVIDIA DGX H100 and H200 data sheets. No sheet states a latency, so it is
# 0: set it from a measurement.
_NODES = (
    _node("p3dn", "V100-32GB", ("NVLink2", 8 * 300.0), ("100G network", 100.0)),
    _node("p4d", "A100-40GB", ("NVSwitch A100", 8 * 600.0), ("4x100G network", 400.0)),
    _node("p4de", "A100-80GB", ("NVSwitch A100", 8 * 600.0), ("4x100G network", 400.0)),
    _node("h100", "H100-SXM", ("NVLink4", 8 * 900.0), ("8x400G network", 3200.0)),
    _node("h200", "H200-SXM", ("NVLink4", 8 * 900.0), ("8x400G network", 3200.0)),
)
NODES: dict[str, NodeSpec] = {node.name: node for node in _NODES}
