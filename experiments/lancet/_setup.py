"""What Lancet's simulated figures share: clusters, batches, systems, and one simulated step."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pandas as pd

from experiments.record import Row, RunContext, require_positive
from llmsys.core.errors import ConfigError, DataNotFoundError
from llmsys.core.specs import NODES
from llmsys.lancet.baselines import AsCaptured, CapacityPipelining, RaiseSink
from llmsys.lancet.config import AxisSolver, Partition, PlannerConfig, WeightGradients
from llmsys.lancet.costs import LoadSkew, RooflineCosts, cluster_costs, shipped_skew
from llmsys.lancet.costs.roofline import Arithmetic
from llmsys.lancet.graph import Graph
from llmsys.lancet.plan import Plan
from llmsys.lancet.planner import Lancet, Planner
from llmsys.lancet.simulator import simulate
from llmsys.lancet.workload import Gate, StepConfig, build_step, moe_model

T = TypeVar("T")
Batches = Literal["text", "artifact"]

EVEN = "even"
_LOAD_FILE = "moe_expert_load_dense.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Machines: ``node`` of ``llmsys.core.specs.NODES``, training in ``dtype``.

    ``deepep``: all-to-alls as DeepEP was measured, not by a model of the network.
    """

    node: str
    dtype: str = "float32"
    deepep: bool = False


# The artifact trains in fp32, for which V100 has no matrix units. H100 is no cluster of the paper.
CLUSTERS: dict[str, Cluster] = {
    "A100": Cluster(node="p4de"),
    "V100": Cluster(node="p3dn"),
    "H100": Cluster(node="h100", dtype="bfloat16", deepep=True),
}

# Sequences a GPU by (cluster, model). On A100 the paper's text and the artifact's configurations swap the two models.
_BATCHES: dict[Batches, dict[tuple[str, str], int]] = {
    "text": {
        ("A100", "gpt2_s_moe"): 24,
        ("A100", "gpt2_l_moe"): 48,
        ("V100", "gpt2_s_moe"): 16,
        ("V100", "gpt2_l_moe"): 8,
    },
    "artifact": {
        ("A100", "gpt2_s_moe"): 48,
        ("A100", "gpt2_l_moe"): 24,
        ("V100", "gpt2_s_moe"): 16,
        ("V100", "gpt2_l_moe"): 8,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A planner, and what of Lancet it may do."""

    planner: Planner
    weight_gradients: WeightGradients = "greedy"
    partition: Partition = "dp"


AS_CAPTURED, RAISE_SINK, TUTEL_STYLE, LANCET = "as captured", "raise/sink", "Tutel-style", "Lancet"
WEIGHT_GRADIENTS_ONLY, PARTITION_ONLY = "Lancet, dW only", "Lancet, partition only"
SYSTEMS: dict[str, System] = {
    AS_CAPTURED: System(planner=AsCaptured()),
    RAISE_SINK: System(planner=RaiseSink()),
    TUTEL_STYLE: System(planner=CapacityPipelining()),
    LANCET: System(planner=Lancet()),
    WEIGHT_GRADIENTS_ONLY: System(planner=Lancet(), partition="none"),
    PARTITION_ONLY: System(planner=Lancet(), weight_gradients="none"),
}
COMPARED = (AS_CAPTURED, RAISE_SINK, TUTEL_STYLE, LANCET)
PAPER_BASELINES = (AS_CAPTURED, TUTEL_STYLE)
"""Stand-ins for systems of the paper: RAF, which overlaps nothing here, and Tutel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What the paper does not say, or says twice, and what its machines are taken to do.

    ``batches``: whether the A100 batch sizes are those of the paper's text or of its artifact. ``a100_arithmetic``:
    TF32 was PyTorch's default for fp32 matmuls; what RAF did is not known. ``capacity_factor``: the paper names none.
    ``network_efficiency``: reachable part of the network's rate between nodes. ``expert_load``: "even" executes every
    plan by the static rule C / n; the name of a trained model's routing (see ``load_quantiles.json``) executes it with
    such loads. Plans are always made by the static rule, as in the paper. ``free_joins``: parts of a tensor are written
    into the place of the whole, so that joining them costs nothing.
    """

    batches: Batches = "text"
    a100_arithmetic: Literal["tf32", "fp32"] = "tf32"
    capacity_factor: float = 1.0
    seq_len: int = 512
    network_efficiency: float = 0.9
    expert_load: str = EVEN
    free_joins: bool = False
    max_parts: int = 8
    axis_solver: AxisSolver = "cp_sat"

    def __post_init__(self) -> None:
        require_positive(self, "capacity_factor", "seq_len", "network_efficiency", "max_parts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One model on one cluster; ``batch_per_gpu`` 0 means the paper's."""

    model: str
    cluster: str
    num_gpus: int
    gate: Gate = "switch"
    batch_per_gpu: int = 0
    assumed: Assumptions = Assumptions()

    @property
    def arithmetic(self) -> Arithmetic:
        if cluster(self.cluster).dtype != "float32":
            return "16bit"
        return self.assumed.a100_arithmetic if self.cluster == "A100" else "fp32"

    @property
    def batch(self) -> int:
        return self.batch_per_gpu or _BATCHES[self.assumed.batches][self.cluster, self.model]


def cluster(name: str) -> Cluster:
    """The cluster called ``name``; ConfigError with the nearest name for any other."""
    return _named("cluster", name, CLUSTERS)


def system(name: str) -> System:
    """The system called ``name``; ConfigError with the nearest name for any other."""
    return _named("system", name, SYSTEMS)


def _named(kind: str, name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"there is no {kind} {name!r}",
            expected="one of " + ", ".join(known),
            found=repr(name),
            fix=f"did you mean {near[0]!r}?" if near else "choose one of these",
        )
    return known[name]


@cache
def graph_of(point: Point) -> Graph:
    config = StepConfig(
        model=moe_model(point.model),
        num_gpus=point.num_gpus,
        batch_per_gpu=point.batch,
        seq_len=point.assumed.seq_len,
        gate=point.gate,
        capacity_factor=point.assumed.capacity_factor,
        dtype=cluster(point.cluster).dtype,
    )
    return build_step(config)


@cache
def costs_of(point: Point) -> RooflineCosts:
    """What planners are told: the static rule."""
    place = cluster(point.cluster)
    return cluster_costs(
        NODES[place.node],
        point.num_gpus,
        arithmetic=point.arithmetic,
        network_efficiency=point.assumed.network_efficiency,
        deepep=place.deepep,
        free_joins=point.assumed.free_joins,
    )


@cache
def executed_costs_of(point: Point, data_root: Path | None, seed: int) -> RooflineCosts:
    """What a plan is simulated with: the same, or with uneven experts."""
    costs = costs_of(planned(point))
    if point.assumed.expert_load == EVEN:
        return costs
    model = moe_model(point.model)
    num_experts = model.num_experts or model.experts_per_gpu * point.num_gpus
    per_node = NODES[cluster(point.cluster).node].devices_per_node
    links = point.num_gpus // per_node if point.num_gpus > per_node else point.num_gpus
    skew = expert_skew(point.assumed, num_experts, num_experts // links, data_root, seed)
    return dataclasses.replace(costs, skew=skew)


def expert_skew(
    assumed: Assumptions, num_experts: int, experts_per_link: int, data_root: Path | None, seed: int
) -> LoadSkew:
    """Loads like those of ``assumed.expert_load``: from the real file in ``data_root``, else from the shipped table."""
    if data_root is None:
        return shipped_skew(
            assumed.expert_load,
            num_experts,
            capacity_factor=assumed.capacity_factor,
            experts_per_link=experts_per_link,
            seed=seed,
        )
    loads = _real_loads(data_root, assumed.expert_load)
    levels = (np.arange(num_experts) + 0.5) / num_experts
    return LoadSkew.of(
        np.quantile(loads, levels),
        capacity_factor=assumed.capacity_factor,
        experts_per_link=experts_per_link,
        seed=seed,
    )


def _real_loads(data_root: Path, name: str) -> np.ndarray:
    """Loads over their mean of all corpora and layers together."""
    file = data_root / _LOAD_FILE
    if not file.is_file():
        raise DataNotFoundError(
            "the real expert loads are missing",
            expected=f"a file {_LOAD_FILE} in data.root",
            found=f"none in {data_root}",
            fix="set data.root=null to use the shipped table, or expert_load=even",
        )
    rows = pd.read_parquet(file)
    model, _, ranks = name.partition(" ")
    mine = rows[(rows["model"] == model) & (rows["ranks"] == ranks)]
    if mine.empty:
        known = sorted({f"{m} {r}" for m, r in zip(rows["model"], rows["ranks"], strict=True)})
        raise ConfigError(
            "there are no loads of that name",
            expected=", ".join([EVEN, *known]),
            found=repr(name),
            fix="set expert_load to one of these",
        )
    means = mine.groupby(["corpus", "layer_slot"])["selections"].transform("mean")
    return (mine["selections"] / means).to_numpy(dtype=float)


def planned(point: Point) -> Point:
    """The point as planners see it: with even experts."""
    return dataclasses.replace(point, assumed=dataclasses.replace(point.assumed, expert_load=EVEN))


@cache
def plan_of(point: Point, system_name: str, seed: int) -> Plan:
    """The plan of a point of ``planned``."""
    chosen = system(system_name)
    config = PlannerConfig(
        max_parts=point.assumed.max_parts,
        axis_solver=point.assumed.axis_solver,
        weight_gradients=chosen.weight_gradients,
        partition=chosen.partition,
        seed=seed,
    )
    return chosen.planner.make(graph_of(point), costs_of(point), config)


@cache
def _simulated(point: Point, system_name: str, seed: int, data_root: Path | None) -> tuple[tuple[str, float], ...]:
    plan = plan_of(planned(point), system_name, seed)
    result = simulate(graph_of(planned(point)), plan, executed_costs_of(point, data_root, seed))
    counts = [region.num_parts for region in plan.regions]
    return (
        ("iteration_ms", result.step_ms),
        ("exposed_comm_ms", result.exposed_comm_ms),
        ("overlapped_ms", result.overlapped_ms),
        ("exposed_compute_ms", result.exposed_compute_ms),
        ("compute_ms", result.compute_ms),
        ("comm_ms", result.comm_ms),
        ("estimated_ms", plan.estimate.step_ms),
        ("num_regions", len(counts)),
        ("most_parts", max(counts, default=1)),
    )


def simulated_row(point: Point, system_name: str, context: RunContext) -> Row:
    """One simulated step of a system. Points that figures share are computed once in a process."""
    device = NODES[cluster(point.cluster).node].device.name
    return {
        "model": moe_model(point.model).name,
        "cluster": point.cluster,
        "num_gpus": point.num_gpus,
        "batch_per_gpu": point.batch,
        "gate": point.gate,
        "method": system_name,
        **dict(_simulated(point, system_name, context.seed, context.data_root)),
        "source": "simulated",
        "device": f"{device} nodes (fitted kernel and all-to-all times)",
        "seed": context.seed,
    }


def points(
    models: Sequence[str], clusters: Sequence[str], num_gpus: Sequence[int], gate: Gate, assumed: Assumptions
) -> list[Point]:
    return [
        Point(model=model, cluster=place, num_gpus=count, gate=gate, assumed=assumed)
        for place in clusters
        for model in models
        for count in num_gpus
    ]
