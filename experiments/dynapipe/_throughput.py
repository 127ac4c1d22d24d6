"""What the throughput figures share: running points, drawing panels, and comparing with each baseline."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import style
from experiments.dynapipe._setup import batches, paper_model
from experiments.dynapipe._systems import Point, run_point
from experiments.record import Comparison, Row, RunContext

_PAPER_BEST = {"GPT": 3.25, "T5": 4.39}
"""The paper's abstract: throughput over packing baselines, up to."""

_PAPER_OUT_OF_MEMORY = {("T5 11B", 8192)}
"""Where the paper's packing baseline did not run (artifact): no ratio of the paper's can come from there."""


def run_points(
    context: RunContext,
    models: Sequence[str],
    max_lens: Sequence[int],
    tokens_per_batch: Sequence[int],
    num_batches: int,
    systems: Sequence[str],
) -> list[Row]:
    """Rows of every system at every combination of model, longest sequence and batch size."""
    grid = list(itertools.product(models, max_lens, tokens_per_batch, systems))
    rows: list[Row] = []
    for model, max_len, tokens, system in context.progress(grid, "points"):
        rows += _rows(model, max_len, tokens, system, num_batches, context.seed, context.data_root)
    return rows


@cache
def _point(model: str, max_len: int, tokens: int, num_batches: int, seed: int, data_root: Path | None) -> Point:
    chosen = batches(data_root, paper_model(model).spec.architecture, tokens, max_len, num_batches, seed)
    return Point(
        model=model, max_len=max_len, tokens_per_batch=tokens, batches=tuple(chosen), seed=seed, data_root=data_root
    )


# Figures 13 to 15 share points; a report that runs them in one process computes each once.
@cache
def _rows(
    model: str, max_len: int, tokens: int, system: str, num_batches: int, seed: int, data_root: Path | None
) -> tuple[Row, ...]:
    return tuple(run_point(_point(model, max_len, tokens, num_batches, seed, data_root), (system,)))


def panels(rows: pd.DataFrame, x: str, x_label: str) -> Figure:
    """A column for each model: throughput bars above, DynaPipe's speed-up over each baseline below."""
    models = list(dict.fromkeys(rows["model"]))
    figure, axes = style.subplots(2, len(models), panel_width_in=5.0, panel_height_in=2.9)
    methods = list(dict.fromkeys(rows["method"]))
    for column, model in enumerate(models):
        mine = rows[rows["model"] == model]
        top, bottom = axes[0, column], axes[1, column]
        style.grouped_bars(top, mine, category=x, value="tokens_per_s", methods=methods)
        num_devices = int(mine["num_devices"].iloc[0])
        top.set_title(f"{model}, {num_devices} GPUs")
        top.set_xlabel(x_label)
        top.set_ylabel("real tokens per second")
        _draw_speedups(bottom, mine, x, x_label)
    style.legend(figure, rows, methods=methods)
    return figure


def _draw_speedups(ax: Axes, rows: pd.DataFrame, x: str, x_label: str) -> None:
    ours = rows[rows["method"] == "DynaPipe"].set_index(x)["tokens_per_s"]
    others = rows[rows["method"] != "DynaPipe"].copy()
    others["speedup"] = ours.reindex(others[x]).to_numpy(dtype=float) / others["tokens_per_s"].to_numpy(dtype=float)
    style.lines(ax, others, x=x, y="speedup")
    ax.axhline(1.0, color=style.GREY, linewidth=1)
    ax.set_xscale("log", base=2)
    ax.minorticks_off()
    ticks = sorted(rows[x].unique())
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set_xlabel(x_label)
    ax.set_ylabel("DynaPipe over baseline")


def speedups(rows: pd.DataFrame, x: str, *, paper_best: bool = True) -> list[Comparison]:
    """For each model and baseline DynaPipe's best speed-up; the note lists it at every x."""
    comparisons = []
    for model in dict.fromkeys(rows["model"]):
        mine = rows[rows["model"] == model]
        ours = mine[mine["method"] == "DynaPipe"].set_index(x)["tokens_per_s"].astype(float)
        for method in dict.fromkeys(mine["method"]):
            if method == "DynaPipe":
                continue
            theirs = mine[mine["method"] == method].set_index(x)["tokens_per_s"].astype(float)
            ratios = ours / theirs.reindex(ours.index)
            like_the_paper = [at for at in ratios.index if x != "max_len" or (model, at) not in _PAPER_OUT_OF_MEMORY]
            compared = ratios[like_the_paper] if method == "MLM+DS" else ratios
            finite = compared[np.isfinite(compared)]
            listed = ", ".join(
                f"{ratios[at]:.2f} at {at}" if np.isfinite(ratios[at]) else f"out of memory at {at}"
                for at in ratios.index
            )
            has_paper = paper_best and method == "MLM+DS"
            paper = _PAPER_BEST["GPT" if model.startswith("GPT") else "T5"] if has_paper else None
            comparisons.append(
                Comparison(
                    name=f"{model}: DynaPipe / {method}, best",
                    paper=paper,
                    ours=float(finite.max()) if len(finite) else None,
                    unit="x",
                    note=listed,
                )
            )
            comparisons += [
                Comparison(
                    name=f"{model}: DynaPipe / {method} at {at}",
                    paper=None,
                    ours=float(ratios[at]),
                    unit="x",
                    note="not in the best above: the paper's baseline was out of memory here, ours recomputes and runs",
                )
                for at in ratios.index
                if method == "MLM+DS" and at not in like_the_paper and np.isfinite(ratios[at])
            ]
    return comparisons
