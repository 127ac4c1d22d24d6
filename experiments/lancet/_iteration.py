"""What Figures 11 and 12 share: iteration time of the systems by model, cluster and number of GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
from matplotlib.figure import Figure

from experiments import style
from experiments.lancet._setup import (
    AS_CAPTURED,
    COMPARED,
    LANCET,
    PAPER_BASELINES,
    RAISE_SINK,
    Assumptions,
    Point,
    simulated_row,
)
from experiments.record import Comparison, Row, RunContext, require_positive

GPUS_PER_NODE = 8
WITHOUT_ONE_NODE = "inside one node all-to-alls take nearly no time; which points the paper's mean is over is not known"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """``models`` are keys of ``llmsys.lancet.workload.MODELS``, ``clusters`` and ``systems`` those of ``_setup``."""

    models: tuple[str, ...] = ("gpt2_s_moe", "gpt2_l_moe")
    clusters: tuple[str, ...] = ("A100", "V100")
    num_gpus: tuple[int, ...] = (8, 16, 32, 64)
    systems: tuple[str, ...] = COMPARED
    assumed: Assumptions = field(default_factory=Assumptions)

    def __post_init__(self) -> None:
        require_positive(self, "num_gpus")


def run_points(context: RunContext, chosen: Sequence[Point], systems: Sequence[str]) -> list[Row]:
    grid = [(point, system) for point in chosen for system in systems]
    return [simulated_row(point, system, context) for point, system in context.progress(grid, "points")]


def panels(rows: pd.DataFrame) -> Figure:
    """A row of panels for each cluster, in it one for each model: bars by number of GPUs."""
    clusters, models = (list(dict.fromkeys(rows[column])) for column in ("cluster", "model"))
    figure, axes = style.subplots(len(clusters), len(models), panel_width_in=4.8, panel_height_in=2.8)
    methods = list(dict.fromkeys(rows["method"]))
    for i, cluster in enumerate(clusters):
        for j, model in enumerate(models):
            mine = rows[(rows["cluster"] == cluster) & (rows["model"] == model)]
            ax = axes[i, j]
            style.grouped_bars(ax, mine, category="num_gpus", value="iteration_ms", methods=methods)
            batches = ", ".join(str(batch) for batch in dict.fromkeys(mine["batch_per_gpu"]))
            ax.set(title=f"{model}, {cluster}, {batches} sequences a GPU", xlabel="GPUs", ylabel="iteration time (ms)")
    style.legend(figure, rows, methods=methods, num_columns=2 if figure.get_figwidth() < 7 else None)
    return figure


def speedups(rows: pd.DataFrame, paper: Mapping[str, tuple[float, float]]) -> list[Comparison]:
    """By cluster the mean and the largest speed-up over the fastest baseline; ``paper``: cluster -> (mean, largest)."""
    result = []
    for cluster in dict.fromkeys(rows["cluster"]):
        times = _times(rows[rows["cluster"] == cluster])
        if LANCET not in times:
            continue
        kinds = [name for name in PAPER_BASELINES if name in times]
        mean, largest = paper.get(cluster, (None, None))
        if kinds:
            ratios = times[kinds].min(axis=1) / times[LANCET]
            note = "; ".join(f"{ratio:.2f} {model} on {gpus}" for (model, gpus), ratio in ratios.items())
            between = ratios[ratios.index.get_level_values("num_gpus") > GPUS_PER_NODE]
            best = f"{cluster}: over the faster of {' and '.join(kinds)}"
            result.append(_ratio(f"{best}, mean", mean, ratios.mean(), note))
            if len(between) < len(ratios) and len(between):
                result.append(_ratio(f"{best}, mean of 2 nodes and more", mean, between.mean(), WITHOUT_ONE_NODE))
            result.append(_ratio(f"{best}, largest", largest, ratios.max(), note))
        for name in times.columns:
            if name in (AS_CAPTURED, RAISE_SINK):
                ratios = times[name] / times[LANCET]
                note = "mean; no baseline of the paper" if name == RAISE_SINK else "mean"
                result.append(_ratio(f"{cluster}: over {name}", None, ratios.mean(), note))
    return result


def _ratio(name: str, paper: float | None, ours: float, note: str) -> Comparison:
    return Comparison(name=name, paper=paper, ours=float(ours), unit="x", note=note)


def _times(rows: pd.DataFrame) -> pd.DataFrame:
    """Iteration times: a line for each (model, number of GPUs), a column for each method."""
    table = rows.pivot_table(index=["model", "num_gpus"], columns="method", values="iteration_ms", sort=False)
    return table[list(dict.fromkeys(rows["method"]))]
