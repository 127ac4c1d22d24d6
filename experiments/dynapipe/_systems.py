"""The systems that figures 13 to 16a compare, each with its own grid search, and one measured point of each."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from experiments.dynapipe._setup import (
    MEMORY_LIMIT_MB,
    cost_model,
    paper_model,
    parallelisms,
    simulated_device,
)
from experiments.record import Row
from llmsys.core.errors import ConfigError
from llmsys.core.specs import ModelSpec
from llmsys.dynapipe.baselines import FixedSize, Packing, TokenBased, static
from llmsys.dynapipe.config import Parallelism, PlannerConfig, Recompute
from llmsys.dynapipe.costs import CostModel
from llmsys.dynapipe.grid import Choice, Option, search_grid
from llmsys.dynapipe.plan import Plan
from llmsys.dynapipe.planner import DynaPipe, Planner, make_plan
from llmsys.dynapipe.profile import LayerProfile, fused_profile
from llmsys.dynapipe.simulator import simulate
from llmsys.dynapipe.workload import Samples

SYSTEMS = ("DynaPipe", "MLM+DS", "MLM+DS (C)", "varlen packing", "fixed size", "token-based", "DynaPipe varlen")
"""MLM+DS is the paper's packing baseline at its best; (C) is the same with DynaPipe's parallelism."""

# These choose recomputation anew in every iteration, and schedule adaptively.
_PER_ITERATION = ("DynaPipe", "DynaPipe varlen", "token-based")
_KINDS: tuple[Recompute, ...] = ("none", "selective", "full")
_SIZES = (1, 2, 4, 8, 16, 32)
_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
_TARGET_PARTS = (1, 2, 4, 8)
_ZERO_STAGES = (1, 2)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Point:
    """One bar of a figure: a model, a longest sequence and a global batch size, on real batches.

    ``fused_speedup``: price all attention as fused and so many times as fast as profiled (None: padded micro-batches
    as profiled, variable-length ones at the profiled speed).
    """

    model: str
    max_len: int
    tokens_per_batch: int
    batches: tuple[Samples, ...]
    seed: int
    data_root: Path | None
    fused_speedup: float | None = None

    @property
    def spec(self) -> ModelSpec:
        return paper_model(self.model).spec

    def cost_model(self, parallelism: Parallelism) -> CostModel:
        costs = cost_model(self.model, parallelism, self.data_root)
        if self.fused_speedup is None:
            return costs
        # Variable-length costs are derived from the measured tables in either case.
        return dataclasses.replace(
            costs, padded_profile=_fused(costs.profile, self.fused_speedup), attention_speedup=self.fused_speedup
        )

    @property
    def num_tokens(self) -> int:
        return sum(samples.num_tokens for samples in self.batches)


@cache
def _fused(profile: LayerProfile, speedup: float) -> LayerProfile:
    return fused_profile(profile, attention_speedup=speedup)


def run_point(
    point: Point,
    systems: Sequence[str],
    config: PlannerConfig | None = None,
    among: tuple[Parallelism, ...] | None = None,
) -> list[Row]:
    """One row for each system: its best setting by grid search, then every batch planned and simulated.

    ``among``: the parallelisms to choose from (default: all).
    """
    config = config or PlannerConfig(memory_limit_mb=MEMORY_LIMIT_MB, seed=point.seed)
    rows = []
    for system in systems:
        splits = among
        if system == "MLM+DS (C)":
            dynapipe = choose("DynaPipe", point, config, among)
            splits = (dynapipe.option.parallelism,) if dynapipe else ()
        rows.append(_row(system, choose(system, point, config, splits), point, config))
    return rows


# "MLM+DS (C)" asks for DynaPipe's choice again. Points are compared by identity.
@cache
def choose(system: str, point: Point, config: PlannerConfig, among: tuple[Parallelism, ...] | None) -> Choice | None:
    """The best option of a system over all batches; None when nothing runs them all (out of memory).

    The baselines' recomputation is fixed for a whole run, so a setting must carry every batch.
    """
    quick = dataclasses.replace(config, reorder="none")
    return search_grid(options(system, point, among), point.batches, point.cost_model, quick)


def options(system: str, point: Point, among: tuple[Parallelism, ...] | None = None) -> list[Option]:
    """The grid of a system; ``among`` restricts the parallelism."""
    num_devices = paper_model(point.model).num_devices
    stages = _ZERO_STAGES if system.startswith("MLM+DS") else (1,)
    splits = [
        dataclasses.replace(split, zero_stage=stage)
        for split in (parallelisms(num_devices, point.model) if among is None else among)
        for stage in (stages if split.data > 1 else (1,))
    ]
    per_iteration = system in _PER_ITERATION
    kinds: list[tuple[Recompute, ...]] = [_KINDS] if per_iteration else [(kind,) for kind in _KINDS]
    return [
        Option(parallelism=split, planner=planner, recompute=recompute)
        for split, planner, recompute in itertools.product(splits, planners(system, point), kinds)
    ]


def planners(system: str, point: Point) -> list[Planner]:
    """The settings of a system apart from parallelism and recomputation."""
    if system == "DynaPipe":
        return [DynaPipe()]
    if system == "DynaPipe varlen":
        return [DynaPipe(attention="varlen")]
    if system == "fixed size":
        return [FixedSize(micro_batch_size=size) for size in _SIZES]
    if system == "token-based":
        return [TokenBased(tokens_per_micro_batch=tokens) for tokens in _TOKENS]
    attention = {"MLM+DS": "padded", "MLM+DS (C)": "padded", "varlen packing": "varlen"}.get(system)
    if attention is None:
        raise ConfigError(
            f"there is no system {system!r}", expected="one of " + ", ".join(SYSTEMS), found=repr(system), fix="systems"
        )
    return [
        Packing(
            max_len=point.max_len,
            micro_batch_size=size,
            max_target_len=target_len,
            attention="varlen" if attention == "varlen" else "padded",
        )
        for size in _SIZES
        for target_len in _target_lengths(point)
    ]


def _target_lengths(point: Point) -> list[int | None]:
    """Decoder lengths of a packed row: the paper's are not public, so they are part of the baseline's grid."""
    if point.spec.architecture == "decoder_only":
        return [None]
    longest = max(int(samples.decoder_len.max()) for samples in point.batches) + PlannerConfig().decoder_extra_tokens
    lengths = {max(point.max_len // part, -(-longest // 8) * 8) for part in _TARGET_PARTS}
    return sorted(lengths)


def _row(system: str, choice: Choice | None, point: Point, config: PlannerConfig) -> Row:
    model = paper_model(point.model)
    row: Row = {
        "model": model.spec.name,
        "num_devices": model.num_devices,
        "max_len": point.max_len,
        "tokens_per_batch": point.tokens_per_batch,
        "method": system,
        "num_batches": len(point.batches),
        "source": "simulated",
        "seed": point.seed,
        "out_of_memory": choice is None,
    }
    if choice is None:
        any_split = parallelisms(model.num_devices, point.model)[0]
        return row | {"device": simulated_device(point.cost_model(any_split)), "tokens_per_s": None}
    option = choice.option
    costs = point.cost_model(option.parallelism)
    chosen = dataclasses.replace(config, recompute=option.recompute)
    if system not in _PER_ITERATION:
        chosen = static(chosen)
    times, peaks, plans = [], [], []
    for samples in point.batches:
        plan = make_plan(option.planner, samples, costs, chosen)
        result = simulate(plan, costs, samples=samples, grad_sync=True)
        times.append(result.iteration_ms)
        peaks.append(result.peak_mb)
        plans.append(plan)
    encoder, decoder = padding_efficiency(plans, point.batches)
    return row | {
        "device": simulated_device(costs),
        "tokens_per_s": 1e3 * point.num_tokens / sum(times),
        "iteration_ms": float(np.mean(times)),
        "parallelism": option.parallelism.label(),
        "setting": _setting(option),
        "recompute": "/".join(sorted({replica.recompute for plan in plans for replica in plan.replicas})),
        "micro_batches": float(np.mean([plan.num_micro_batches for plan in plans])),
        "efficiency_encoder": encoder,
        "efficiency_decoder": decoder,
        "peak_mb": max(peaks),
        "grid_tried": choice.num_tried,
        "grid_feasible": choice.num_feasible,
    }


def padding_efficiency(plans: Sequence[Plan], batches: Sequence[Samples]) -> tuple[float | None, float]:
    """Real over padded tokens of all batches, (encoder, decoder); encoder None for a decoder-only model."""
    if plans[0].attention == "varlen":
        return (1.0 if batches[0].encoder_len.any() else None), 1.0
    padded = np.array([plan.padded_tokens() for plan in plans]).sum(axis=0)
    encoder = sum(int(samples.encoder_len.sum()) for samples in batches)
    decoder = sum(int(samples.decoder_len.sum()) for samples in batches)
    return (encoder / padded[0] if padded[0] else None), decoder / padded[1]


def _setting(option: Option) -> str:
    planner = option.planner
    if isinstance(planner, Packing):
        target = f", targets {planner.max_target_len}" if planner.max_target_len else ""
        return f"{planner.micro_batch_size} rows{target}, ZeRO-{option.parallelism.zero_stage}"
    if isinstance(planner, FixedSize):
        return f"{planner.micro_batch_size} samples"
    if isinstance(planner, TokenBased):
        return f"{planner.tokens_per_micro_batch} tokens"
    return ""
