"""How long planning takes, by model, cluster and number of GPUs (paper Fig. 15)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments import style
from experiments.lancet._setup import LANCET, Assumptions, Point, costs_of, graph_of, points, system
from experiments.record import Comparison, Row, RunContext, require_positive
from llmsys.lancet.config import PlannerConfig
from llmsys.lancet.partition import choose_regions
from llmsys.lancet.workload import moe_model

TITLE = "Fig. 15: planning time"
CLAIM = """The paper plans most models within 20 minutes on one GPU; the time depends on the number of layers, not of
GPUs, and the partition pass dominates. Ours is measured on this machine's CPU, from the graph to the checked plan. It
is no like for like: the paper's time includes measuring each op and part on the GPU, ours asks formulas. What is
alike: more layers take longer, more GPUs hardly, and most of it is the partition pass."""
PAPER_MOST_S = 20 * 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """``models`` are keys of ``llmsys.lancet.workload.MODELS``, ``clusters`` those of ``_setup``.

    Of ``num_repeats`` runs the median counts.
    """

    models: tuple[str, ...] = ("gpt2_s_moe", "gpt2_l_moe")
    clusters: tuple[str, ...] = ("A100", "V100")
    num_gpus: tuple[int, ...] = (8, 16, 32, 64)
    num_repeats: int = 3
    assumed: Assumptions = field(default_factory=Assumptions)

    def __post_init__(self) -> None:
        require_positive(self, "num_gpus", "num_repeats")


def run(cfg: Config, context: RunContext) -> list[Row]:
    chosen = points(cfg.models, cfg.clusters, cfg.num_gpus, "switch", cfg.assumed)
    return [_row(point, cfg.num_repeats, context) for point in context.progress(chosen, "planning")]


def _row(point: Point, num_repeats: int, context: RunContext) -> Row:
    assumed = point.assumed
    config = PlannerConfig(max_parts=assumed.max_parts, axis_solver=assumed.axis_solver, seed=context.seed)
    costs, planner = costs_of(point), system(LANCET).planner
    whole_s, partition_s = [], []
    for _ in range(num_repeats):
        graph_of.cache_clear()  # a graph keeps what was derived from it; each run begins with a new one
        graph = graph_of(point)
        start_s = time.perf_counter()
        plan = planner.make(graph, costs, config)
        whole_s.append(time.perf_counter() - start_s)
        start_s = time.perf_counter()
        choose_regions(graph, costs, config)
        partition_s.append(time.perf_counter() - start_s)
    model = moe_model(point.model)
    return {
        "method": f"{model.name}, {point.cluster}",
        "model": model.name,
        "num_layers": model.num_layers,
        "cluster": point.cluster,
        "num_gpus": point.num_gpus,
        "num_ops": len(graph.ops),
        "planning_s": float(np.median(whole_s)),
        "partition_s": float(np.median(partition_s)),
        "planned_iteration_ms": plan.estimate.step_ms,
        "source": "measured",
        "device": context.device,
        "seed": context.seed,
    }


def plot(rows: pd.DataFrame) -> Figure:
    figure, axes = style.subplots(panel_width_in=6.4)
    ax = axes[0, 0]
    style.grouped_bars(ax, rows, category="num_gpus", value="planning_s")
    ax.set(xlabel="GPUs of the planned step", ylabel="planning time (s)")
    style.legend(figure, rows)
    return figure


def compare(rows: pd.DataFrame) -> list[Comparison]:
    longest = rows.loc[rows["planning_s"].idxmax()]
    share = 100 * rows["partition_s"] / rows["planning_s"]
    result = [
        Comparison(
            name="longest planning time",
            paper=PAPER_MOST_S,
            ours=float(longest["planning_s"]),
            unit="s",
            note=f"{longest['method']} on {longest['num_gpus']}; the paper: most below 20 minutes, with measuring ops",
        ),
        Comparison(
            name="partition pass alone, part of planning",
            paper=None,
            ours=float(share.median()),
            unit="%",
            note="median; timed by itself; the paper: it dominates",
        ),
    ]
    by_model = rows.groupby(["num_layers"])["planning_s"].median()
    if len(by_model) > 1:
        most, least = by_model.index.max(), by_model.index.min()
        ratio = float(by_model[most] / by_model[least])
        name, note = f"{most} layers over {least}", "the paper: it depends on the number of layers"
        result.append(Comparison(name=name, paper=None, ours=ratio, unit="x", note=note))
    by_gpus = rows.groupby("num_gpus")["planning_s"].median()
    several = by_gpus[by_gpus.index > 8]
    if len(several) > 1:
        ratio = float(several.iloc[-1] / several.iloc[0])
        name, note = f"{several.index[-1]} GPUs over {several.index[0]}", "the paper: not on the number of GPUs"
        result.append(Comparison(name=name, paper=None, ours=ratio, unit="x", note=note))
    return result
