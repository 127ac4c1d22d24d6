"""Figure 17a: how long planning an iteration takes, by global batch size."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments import style
from experiments.dynapipe._setup import (
    MEMORY_LIMIT_MB,
    batches,
    cost_model,
    paper_model,
    paper_parallelism,
    timed_plans,
)
from experiments.record import Comparison, Row, RunContext, require_positive
from llmsys.core.errors import ConfigError
from llmsys.dynapipe.config import PlannerConfig
from llmsys.dynapipe.costs import CostModel
from llmsys.dynapipe.microbatch import PaddedLengths
from llmsys.dynapipe.planner import DynaPipe
from llmsys.dynapipe.workload import Samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Figure 17a: planning time of an iteration against the global batch size"
CLAIM = """The figure shows box plots of the planner's time for one iteration, micro-batch generation plus schedule
generation, for GPT and T5 by global batch size, over all runs with the best configuration of each point. Its values are
not public, so there is nothing to match; the batch sizes here are those of Fig. 14. The artifact plans ahead on 64
workers. Ours is CPU time of one thread on this machine, for the best parallelism of the artifact at 8 devices (and T5
on 32), and includes communication planning and all checks of the plan. Micro-batch generation is the planner's own call
for it, ordering included, timed a second time by itself; the rest is everything after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """``models``: names of ``_setup.MODELS`` whose best parallelism is known."""

    models: tuple[str, ...] = ("gpt_6.7b", "t5_11b", "t5_45b")
    tokens_per_batch: tuple[int, ...] = (16_384, 32_768, 65_536, 131_072)
    max_len: int = 2048
    num_iterations: int = 5

    def __post_init__(self) -> None:
        require_positive(self, "tokens_per_batch", "max_len", "num_iterations")


def run(cfg: Config, context: RunContext) -> list[Row]:
    rows: list[Row] = []
    points = [(model, tokens) for model in cfg.models for tokens in cfg.tokens_per_batch]
    for model, tokens in context.progress(points, "planning"):
        rows += _rows(model, tokens, cfg, context)
    return rows


def _rows(model: str, tokens: int, cfg: Config, context: RunContext) -> list[Row]:
    spec = paper_model(model).spec
    parallelism = paper_parallelism(model, cfg.max_len)
    if parallelism is None:
        raise ConfigError(
            f"the best parallelism of {model} is not known",
            expected="a model whose best parallelism in the artifact is recorded in _setup",
            found=model,
            fix="take another model in settings.models",
        )
    costs = cost_model(model, parallelism, context.data_root)
    config = PlannerConfig(memory_limit_mb=MEMORY_LIMIT_MB, seed=context.seed)
    chosen = batches(context.data_root, spec.architecture, tokens, cfg.max_len, cfg.num_iterations, context.seed)
    rows: list[Row] = []
    for iteration, samples in enumerate(chosen):
        plans, (planning_s,) = timed_plans(samples, costs, config, 1)
        generation_s = _generation_cpu_s(samples, costs, config)
        rows.append(
            {
                "method": spec.name,
                "parallelism": parallelism.label(),
                "tokens_per_batch": tokens,
                "iteration": iteration,
                "num_samples": len(samples),
                "num_micro_batches": plans[0].num_micro_batches,
                "planning_cpu_s": planning_s,
                "generation_cpu_s": generation_s,
                "schedule_cpu_s": max(planning_s - generation_s, 0.0),
                "planned_iteration_s": plans[0].estimated_ms / 1e3,
                "source": "measured",
                "device": context.device,
                "seed": context.seed,
            }
        )
    return rows


def _generation_cpu_s(samples: Samples, costs: CostModel, config: PlannerConfig) -> float:
    """CPU time of ordering and partitioning alone, by the same call that the planner makes."""
    start_s = time.process_time()
    padded = PaddedLengths.of(samples, encoder_decoder=costs.encoder_decoder, config=config)
    DynaPipe().partitions(samples, padded, costs, config)
    return time.process_time() - start_s


def plot(rows: pd.DataFrame) -> Figure:
    figure, axes = style.subplots(1, 2, panel_height_in=3.6)
    left, right = axes[0]
    sizes = sorted(set(rows["tokens_per_batch"]))
    style.boxes(left, rows, category="tokens_per_batch", value="planning_cpu_s", categories=sizes)
    left.set(title="Time of planning", ylabel="CPU time of planning (s)")
    medians = rows.groupby(["method", "tokens_per_batch"], sort=False).median(numeric_only=True).reset_index()
    medians = medians.assign(source="measured", percent=100 * medians["generation_cpu_s"] / medians["planning_cpu_s"])
    style.grouped_bars(right, medians, category="tokens_per_batch", value="percent", categories=sizes)
    right.set(title="Part of micro-batch generation", ylabel="part of planning time, medians (%)")
    for ax in (left, right):
        ax.set_xlabel("global batch size (tokens)")
        ax.set_ylim(bottom=0)
    style.legend(figure, rows, num_columns=2)
    return figure


def compare(rows: pd.DataFrame) -> list[Comparison]:
    result = []
    for (method, tokens), mine in rows.groupby(["method", "tokens_per_batch"], sort=False):
        planning_s = float(np.median(mine["planning_cpu_s"]))
        part = float(np.median(mine["planning_cpu_s"] / mine["planned_iteration_s"]))
        note = f"of {len(mine)} iterations; {part:.1%} of the planned iteration's simulated time"
        result.append(
            Comparison(
                name=f"{method}, {tokens} tokens: median planning time",
                paper=None,
                ours=planning_s,
                unit="s",
                note=note,
            )
        )
    return result
