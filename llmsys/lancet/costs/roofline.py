"""Costs of a step on GPUs that are not here: kernels by fitted formulas, collectives by size tables.

A stand-in for the paper's caching profiler. What it gets right by construction: splitting never saves
computation, because every part launches its kernels and reads the replicated tensors again, and small messages pay
latency. What it cannot know: tile sizes, clocks, and contention between kernels and collectives on one device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llmsys.core.errors import ConfigError
from llmsys.core.specs import DeviceSpec, NodeSpec
from llmsys.lancet.costs.messages import ClusterMessages, Direction, deepep_messages, node_messages
from llmsys.lancet.costs.skew import LoadSkew
from llmsys.lancet.data import read_shipped
from llmsys.lancet.graph import LAST, PARTIAL, Graph, Op, Split, Tensor, is_irregular

Arithmetic = Literal["fp32", "tf32", "16bit"]

# Dense peaks in TFLOP/s of the SXM modules, NVIDIA data sheets of V100, A100 and H100. The 16-bit peak is the spec's.
_PEAK_TFLOPS: dict[tuple[str, Arithmetic], float] = {
    ("V100-32GB", "fp32"): 15.7,
    ("A100-80GB", "fp32"): 19.5,
    ("A100-80GB", "tf32"): 156.0,
    ("H100-SXM", "fp32"): 67.0,
    ("H100-SXM", "tf32"): 494.5,
}
_MATMULS = frozenset({"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "attention", "attention_grad"})
_NORMS = frozenset({"layer_norm", "layer_norm_grad", "layer_norm_weight_grad", "softmax", "softmax_grad"})
_ACTIVATIONS = frozenset({"gelu", "gelu_grad", "silu_mul", "silu_mul_grad", "cross_entropy", "cross_entropy_grad"})
# They touch as many rows of their table as they have tokens, and not the table.
_LOOKUPS = frozenset({"embedding"})


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFit:
    """Coefficients of one device's kernels, see ``device_fit.json``: matmul, and traffic of three kinds of op."""

    device: str
    launch_ms: float
    compute: float
    read: float
    write: float
    traffic: tuple[tuple[str, float], ...]

    @classmethod
    def shipped(cls, device: str) -> KernelFit:
        """The fit to ``device``, or to the A100 for one that was not measured (V100: an assumption)."""
        devices = read_shipped("device_fit.json")["devices"]
        fit = devices.get(device, devices["A100-80GB"])
        matmul = fit["matmul"]
        return cls(
            device=device if device in devices else "A100-80GB",
            launch_ms=matmul["launch_ms"],
            compute=matmul["compute"],
            read=matmul["read"],
            write=matmul["write"],
            traffic=tuple((kind, fit[kind]["traffic"]) for kind in ("add", "activation", "norm")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineCosts:
    """Keeps ``CostModel``.

    A matmul takes launch + compute * flops / peak + (read * bytes in + write * bytes out) / bandwidth, anything else
    launch + traffic * bytes / bandwidth. Targets are matched without torch's prefix and overload ("aten.mm.default" is
    "mm"); a matmul whose ``flops`` are 0 is counted from its shapes.

    An all-to-all is read from ``messages`` at the bytes of one part: the static rule C / n of the paper, which counts
    padding. ``skew`` replaces it for irregular parts: sent are the rows of the busiest link, computed on are buffers as
    full as the fullest expert, and a dispatch is preceded by the exchange of counts, an all-to-all of the least size.
    Which way an all-to-all goes its ``cost_key`` says: "combine" at its start, or else dispatch.

    ``free_joins``: parts write into the place of the whole tensor, so that joins along dimension 0 cost nothing.
    """

    name: str
    device: DeviceSpec
    peak_tflops: float
    kernels: KernelFit
    messages: ClusterMessages
    skew: LoadSkew | None = None
    free_joins: bool = False

    def op_ms(self, graph: Graph, op: Op, num_parts: int = 1, split: Split | None = None) -> float:
        if op.is_view:
            return 0.0
        if op.is_comm:
            return self._message_ms(graph, op, num_parts, split)
        read = sum(
            self._part_bytes(graph.tensors[name], axis, num_parts)
            for name, axis in zip(op.inputs, split.inputs if split else (0,) * len(op.inputs), strict=True)
        )
        write = sum(
            self._part_bytes(tensor, axis, num_parts)
            for tensor, axis in zip(op.outputs, split.outputs if split else (0,) * len(op.outputs), strict=True)
        )
        target = base_name(op.target)
        if target in _MATMULS:
            return self._matmul_ms(_flops(graph, op) * self._share(split, num_parts), read, write)
        if target in _LOOKUPS:
            read = write
        return self.kernels.launch_ms + self._traffic_ms(_kind(target), read + write)

    def slice_ms(self, tensor: Tensor, axis: int, num_parts: int) -> float:
        if axis == 0 or axis in (PARTIAL, LAST) or num_parts == 1:
            return 0.0
        return num_parts * self.kernels.launch_ms + self._traffic_ms("add", 2 * tensor.size_bytes)

    def join_ms(self, tensor: Tensor, axis: int, num_parts: int) -> float:
        if axis == LAST or num_parts == 1 or (self.free_joins and axis == 0):
            return 0.0
        if axis == PARTIAL:
            sums = num_parts - 1
            return sums * (self.kernels.launch_ms + self._traffic_ms("add", 3 * tensor.size_bytes))
        passes = 3 if is_irregular(axis) else 2  # rows go to their global slots in a buffer that is cleared before
        return self.kernels.launch_ms + self._traffic_ms("add", passes * tensor.size_bytes)

    def _message_ms(self, graph: Graph, op: Op, num_parts: int, split: Split | None) -> float:
        size = float(graph.tensors[op.inputs[0]].size_bytes)
        if op.kind != "all_to_all":
            return self.messages.all_reduce.time_ms(size / num_parts)
        direction: Direction = "combine" if op.cost_key.startswith("combine") else "dispatch"
        table = self.messages.all_to_all(direction)
        if self.skew is None or split is None or not is_irregular(split.inputs[0]):
            return table.time_ms(size / num_parts)
        counts_ms = table.time_ms(0.0) if direction == "dispatch" else 0.0
        return counts_ms + table.time_ms(size * self.skew.sent_share(num_parts))

    def _matmul_ms(self, flops: float, read: float, write: float) -> float:
        fit, bandwidth = self.kernels, self.device.memory_bandwidth_gb_per_s * 1e6
        compute_ms = fit.compute * flops / (self.peak_tflops * 1e9)
        return fit.launch_ms + compute_ms + (fit.read * read + fit.write * write) / bandwidth

    def _traffic_ms(self, kind: str, size_bytes: float) -> float:
        return dict(self.kernels.traffic)[kind] * size_bytes / (self.device.memory_bandwidth_gb_per_s * 1e6)

    def _part_bytes(self, tensor: Tensor, axis: int, num_parts: int) -> float:
        if num_parts == 1 or (axis < 0 and not is_irregular(axis)):
            return float(tensor.size_bytes)
        if is_irregular(axis) and self.skew is not None:
            return tensor.size_bytes * self.skew.buffer_share(num_parts)
        return tensor.size_bytes / num_parts

    def _share(self, split: Split | None, num_parts: int) -> float:
        irregular = split is not None and any(is_irregular(axis) for axis in (*split.inputs, *split.outputs))
        return self.skew.buffer_share(num_parts) if irregular and self.skew is not None else 1 / num_parts


def cluster_costs(
    node: NodeSpec,
    num_gpus: int,
    *,
    arithmetic: Arithmetic,
    network_efficiency: float = 0.9,
    deepep: bool = False,
    skew: LoadSkew | None = None,
    free_joins: bool = False,
) -> RooflineCosts:
    """Costs on ``num_gpus`` devices of nodes like p4de, p3dn or h100 (``llmsys.core.specs.NODES``).

    ``arithmetic``: what matrix units compute in; V100 has none for "fp32", A100 computes fp32 matmuls on them only as
    "tf32". ``network_efficiency``: reachable part of the network's rate, an assumption. ``deepep``: all-to-alls as
    DeepEP measured them on H100 nodes. ConfigError where a combination has no peak or no measurements.
    """
    peak = node.device.peak_16bit_tflops if arithmetic == "16bit" else _PEAK_TFLOPS.get((node.device.name, arithmetic))
    if peak is None:
        known = [kind for name, kind in _PEAK_TFLOPS if name == node.device.name]
        raise ConfigError(
            f"no peak of {node.device.name} in {arithmetic} is known",
            expected="one of " + ", ".join([*known, "16bit"]),
            found=arithmetic,
            fix="set arithmetic",
        )
    messages = (
        deepep_messages(num_gpus) if deepep else node_messages(node, num_gpus, network_efficiency=network_efficiency)
    )
    kernels = KernelFit.shipped(node.device.name)
    return RooflineCosts(
        name=f"{node.device.name} {arithmetic}, kernels as fitted to {kernels.device}; {messages.origin}",
        device=node.device,
        peak_tflops=peak,
        kernels=kernels,
        messages=messages,
        skew=skew,
        free_joins=free_joins,
    )


def base_name(target: str) -> str:
    """The name of an operator without its namespace and overload: "mm" for "aten.mm.default" and for "mm"."""
    words = target.replace("::", ".").split(".")
    return words[1] if len(words) >= 3 else words[-1] if words[-1] != "default" else words[0]


def _kind(target: str) -> str:
    return "norm" if target in _NORMS else "activation" if target in _ACTIVATIONS else "add"


def _flops(graph: Graph, op: Op) -> float:
    if op.flops:
        return op.flops
    first = max((graph.tensors[name] for name in op.inputs), key=lambda tensor: len(tensor.shape))
    inner = first.shape[-1] if first.shape else 1
    return 2.0 * math.prod(op.outputs[0].shape) * inner
