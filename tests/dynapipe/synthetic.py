"""Small made-up profiles, models, workloads and plans, so that these tests need no data files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from llmsys.core.costs import GridTable, Hole
from llmsys.core.specs import DEVICES, Architecture, ClusterSpec, LinkSpec, ModelSpec
from llmsys.dynapipe.config import Parallelism, PlannerConfig, Recompute
from llmsys.dynapipe.costs import CostModel
from llmsys.dynapipe.plan import Plan
from llmsys.dynapipe.planner import plan_iteration
from llmsys.dynapipe.profile import LayerProfile, LayerTables
from llmsys.dynapipe.workload import Samples

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Columns = dict[str, FloatArray]
Rng = np.random.Generator

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)
MEMORY = ("stored_mb", "peak_mb")
LENGTHS = (16, 32, 64, 128, 256, 512)
SIZES = (1, 2, 4, 8, 16, 32)
PARAMS_MB = {"embedding": 30.0, "encoder": 20.0, "decoder": 25.0}
# Recomputing trades stored activations for time.
_TIME_FACTOR: dict[Recompute, float] = {"none": 1.0, "selective": 1.1, "full": 1.35}
_STORED_FACTOR: dict[Recompute, float] = {"none": 1.0, "selective": 0.6, "full": 0.1}


def toy_profile(
    architecture: Architecture,
    *,
    time_scale: float = 1.0,
    capacity_mb: float = 3000.0,
    hole: Hole = "infeasible",
    sizes: dict[Recompute, Sequence[int]] | None = None,
) -> LayerProfile:
    """A smooth profile: launch-bound, then linear in tokens plus attention; too large micro-batches are holes."""

    def columns(recompute: Recompute, own: FloatArray, cross: FloatArray | None, size: FloatArray) -> Columns:
        tokens, pairs = own * size, own**2 * size
        if cross is not None:
            tokens, pairs = tokens + 0.3 * cross * size, pairs + own * cross * size
        forward = _TIME_FACTOR[recompute] * np.maximum(0.4, 2e-3 * tokens + 6e-7 * pairs) * time_scale
        stored = _STORED_FACTOR[recompute] * (0.14 * tokens + 1.6e-4 * pairs)
        peak = np.maximum(0.3 * tokens, 0.2 * tokens + 2e-4 * pairs) + stored
        too_large = peak > capacity_mb
        values = {"fw_ms": forward, "bw_ms": 2 * forward, "stored_mb": stored, "peak_mb": peak}
        return {name: np.where(too_large, np.nan, column) for name, column in values.items()}

    def tables(recompute: Recompute) -> LayerTables:
        batch = np.array((sizes or {}).get(recompute, SIZES), dtype=np.float64)
        lengths = np.array(LENGTHS, dtype=np.float64)
        own, size = np.meshgrid(lengths, batch, indexing="ij")
        head = {"fw_ms": time_scale * (0.3 + 1e-3 * own * size), "bw_ms": time_scale * (0.3 + 2e-3 * own * size)}
        encoder = None
        if architecture == "encoder_decoder":
            encoder = _grid((lengths, batch), columns(recompute, own, None, size), hole)
            cross, own, size = np.meshgrid(lengths, lengths, batch, indexing="ij")
            decoder = _grid((lengths, lengths, batch), columns(recompute, own, cross, size), hole)
        else:
            decoder = _grid((lengths, batch), columns(recompute, own, None, size), hole)
        return LayerTables(encoder=encoder, decoder=decoder, head=_grid((lengths, batch), head, hole))

    return profile_of(architecture, tables)


@cache
def shared_toy_profile(architecture: Architecture) -> LayerProfile:
    """One object for all, so that the formulas of variable-length costs are fitted to it only once."""
    return toy_profile(architecture)


def random_profile(
    rng: Rng,
    architecture: Architecture,
    *,
    lengths: Sequence[int] = (8, 16, 32, 64),
    sizes: Sequence[int] = (1, 2, 4, 8),
    hole_rate: float = 0.1,
) -> LayerProfile:
    """Rough costs: noisy, with peaks that may fall as a micro-batch grows, and holes anywhere but at the first size."""

    def grid(num_lengths: int, names: Sequence[str]) -> GridTable:
        axes = [np.array(lengths, dtype=np.float64)] * num_lengths + [np.array(sizes, dtype=np.float64)]
        mesh = np.meshgrid(*axes, indexing="ij")
        work = sum(mesh[:-1]) * mesh[-1]
        holes = rng.random(work.shape) < hole_rate
        holes[..., 0] = False
        stored = (work * rng.uniform(0.9, 1.1, work.shape)) ** rng.uniform(0.8, 1.2)
        values = {
            "fw_ms": (work + 20) * rng.uniform(0.5, 1.5, work.shape),
            "bw_ms": (work + 20) * rng.uniform(1.0, 3.0, work.shape),
            "stored_mb": stored,
            "peak_mb": stored * rng.uniform(1.0, 3.0, work.shape),
        }
        return _grid(axes, {name: np.where(holes, np.nan, values[name]) for name in names}, "infeasible")

    def tables(recompute: Recompute) -> LayerTables:
        names = ("fw_ms", "bw_ms", *MEMORY)
        pair = architecture == "encoder_decoder"
        return LayerTables(
            encoder=grid(1, names) if pair else None,
            decoder=grid(2 if pair else 1, names),
            head=grid(1, names[:2]),
        )

    return profile_of(architecture, tables)


def profile_of(architecture: Architecture, tables: Callable[[Recompute], LayerTables]) -> LayerProfile:
    parts = ("embedding", "decoder") if architecture == "decoder_only" else tuple(PARAMS_MB)
    return LayerProfile(
        name="toy",
        architecture=architecture,
        device="toy",
        origin="made up",
        tables={(1, recompute): tables(recompute) for recompute in RECOMPUTES},
        params_mb={(1, recompute, part): PARAMS_MB[part] for recompute in RECOMPUTES for part in parts},
    )


def toy_cluster(num_devices: int = 64, *, latency_us: float = 5.0) -> ClusterSpec:
    """Nodes of four devices, so that some links are slow."""
    return ClusterSpec(
        name="toy",
        device=DEVICES["A100-40GB"],
        num_nodes=-(-num_devices // 4),
        devices_per_node=4,
        intra_link=LinkSpec(name="intra", bandwidth_gbps=100.0, latency_us=latency_us),
        inter_link=LinkSpec(name="inter", bandwidth_gbps=20.0, latency_us=2 * latency_us),
    )


def toy_model(architecture: Architecture, num_layers: int = 8) -> ModelSpec:
    """``num_layers`` in all; of an encoder-decoder model the larger half is the encoder."""
    num_encoder = 0 if architecture == "decoder_only" else (num_layers + 1) // 2
    return ModelSpec(
        name=f"toy {architecture}",
        architecture=architecture,
        hidden=256,
        num_heads=4,
        kv_channels=64,
        ffn_hidden=1024,
        num_encoder_layers=num_encoder,
        num_decoder_layers=num_layers - num_encoder,
        vocab_size=1000,
    )


def toy_cost_model(
    architecture: Architecture,
    *,
    profile: LayerProfile | None = None,
    num_layers: int = 8,
    count_backward_extra: bool = True,
    **parallelism: int,
) -> CostModel:
    """``parallelism``: arguments of Parallelism."""
    return CostModel(
        profile=profile or shared_toy_profile(architecture),
        model=toy_model(architecture, num_layers),
        cluster=toy_cluster(),
        parallelism=Parallelism(**parallelism),
        count_backward_extra=count_backward_extra,
    )


def toy_samples(rng: Rng, architecture: Architecture, num_samples: int, max_len: int = 400) -> Samples:
    """Lengths with a long tail; targets are shorter than inputs."""
    inputs = np.clip(rng.lognormal(3.5, 1.0, num_samples).astype(np.int64), 2, max_len)
    targets = np.clip(rng.lognormal(2.0, 1.0, num_samples).astype(np.int64), 1, max_len // 2)
    return Samples.of(architecture, inputs, targets)


@cache
def toy_plan(architecture: Architecture, num_samples: int = 40, **parallelism: int) -> Plan:
    """A plan of ``num_samples`` samples; by default for two replicas of three devices."""
    model = toy_cost_model(architecture, **(parallelism or {"data": 2, "pipeline": 3}))
    samples = toy_samples(np.random.default_rng(num_samples), architecture, num_samples)
    return plan_iteration(samples, model, PlannerConfig(memory_limit_mb=6000.0, max_moves=20))


def random_costs(rng: Rng, num_micro_batches: int, num_stages: int, *, send: float = 1.0) -> list[FloatArray]:
    """The seven columns of the native scheduling solvers, shape (micro-batches, stages) each."""
    shape = (num_micro_batches, num_stages)
    forward = rng.uniform(1, 4, shape)
    stored = rng.uniform(10, 40, shape)
    columns = [
        forward,
        forward * rng.uniform(1.5, 2.5, shape),
        stored,
        stored * rng.uniform(1.0, 1.5, shape),
        rng.uniform(0, 10, shape),
        send * rng.uniform(0.05, 1.5, shape),
        send * rng.uniform(0.05, 1.5, shape),
    ]
    return [np.ascontiguousarray(column) for column in columns]


def grids() -> list[dict[str, Any]]:
    """Parallelisms worth trying with eight layers."""
    keys = ("data", "pipeline", "num_chunks")
    every = itertools.product((1, 2, 3), (1, 2, 3, 4), (1, 2))
    return [dict(zip(keys, values, strict=True)) for values in every]


def _grid(axes: Sequence[FloatArray], columns: Columns, hole: Hole) -> GridTable:
    return GridTable(axes, columns, hole=hole, memory=[name for name in columns if name in MEMORY])
