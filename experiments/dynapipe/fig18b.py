"""Figure 18b: the planner's estimate of peak memory against what its plan takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm

from experiments import style
from experiments.dynapipe._setup import batches, cost_model, paper_model, simulated_device
from experiments.record import Comparison, Row, RunContext, finite, require_positive
from llmsys.core.errors import InfeasibleError
from llmsys.dynapipe.config import Parallelism, PlannerConfig
from llmsys.dynapipe.planner import plan_iteration
from llmsys.dynapipe.simulator import simulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Figure 18b: estimated and simulated peak memory"
CLAIM = """The figure shows estimated against measured peak memory of real training, 17.5 to 40 GB; its values are not
known to us. Ours is simulation against simulation: the planner's estimate and the simulator, separate code with the
same profile, must agree and no device may pass its limit. It says nothing about real memory. What the choice of rules
does is shown by the second series: planned as the public planner does, without the workspace that a backward pass
needs on top of the stored activations, and simulated with it."""

COUNTED, LEFT_OUT = "backward workspace counted", "left out of the plan (public planner's rule)"
SETUPS = {
    "gpt_6.7b": Parallelism(data=2, pipeline=4, tensor=1, zero_stage=1),
    "t5_11b": Parallelism(data=1, pipeline=2, tensor=4, zero_stage=1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    memory_limits_mb: tuple[float, ...] = (24_000.0, 28_000.0, 32_000.0, 36_000.0)
    tokens_per_batch: int = 65_536
    max_len: int = 2048
    num_iterations: int = 4

    def __post_init__(self) -> None:
        require_positive(self, "memory_limits_mb", "tokens_per_batch", "max_len", "num_iterations")


def run(cfg: Config, context: RunContext) -> list[Row]:
    rows: list[Row] = []
    points = [
        (model, limit, rule) for model in SETUPS for limit in cfg.memory_limits_mb for rule in (COUNTED, LEFT_OUT)
    ]
    for model, limit_mb, rule in context.progress(points, "planning"):
        rows += _rows(model, limit_mb, rule, cfg, context)
    return rows


def _rows(model: str, limit_mb: float, rule: str, cfg: Config, context: RunContext) -> list[Row]:
    """One row for each iteration, replica and pipeline device; one for an iteration that does not fit."""
    spec = paper_model(model).spec
    planned = cost_model(model, SETUPS[model], context.data_root, count_backward_extra=rule == COUNTED)
    actual = cost_model(model, SETUPS[model], context.data_root)
    config = PlannerConfig(memory_limit_mb=limit_mb, seed=context.seed)
    rows: list[Row] = []
    chosen = batches(
        context.data_root, spec.architecture, cfg.tokens_per_batch, cfg.max_len, cfg.num_iterations, context.seed
    )
    for iteration, samples in enumerate(chosen):
        shared: Row = {
            "model": spec.name,
            "parallelism": SETUPS[model].label(),
            "method": rule,
            "limit_mb": limit_mb,
            "iteration": iteration,
            "source": "simulated",
            "device": simulated_device(actual),
            "seed": context.seed,
        }
        try:
            plan = plan_iteration(samples, planned, config)
        except InfeasibleError:
            rows.append(shared | {"out_of_memory": True, "estimated_mb": None, "simulated_mb": None})
            continue
        result = simulate(plan, actual)
        for replica, (expected, simulated) in enumerate(zip(plan.replicas, result.replicas, strict=True)):
            for device, peaks in enumerate(zip(expected.estimate.peak_mb, simulated.peak_mb, strict=True)):
                where: Row = {"replica": replica, "pipeline_device": device, "out_of_memory": False}
                rows.append(shared | where | {"estimated_mb": peaks[0], "simulated_mb": peaks[1]})
    return rows


def plot(rows: pd.DataFrame) -> Figure:
    figure, axes = style.subplots(1, 2, panel_width_in=5.0, panel_height_in=4.0)
    left, right = axes[0]
    fitting = rows.dropna(subset=["estimated_mb"])
    counted = fitting[fitting["method"] == COUNTED]
    if len(counted):
        _draw_peaks(figure, left, counted)
    else:
        left.text(0.5, 0.5, "nothing fits", transform=left.transAxes, ha="center", va="center")
    left.set(title=COUNTED[0].upper() + COUNTED[1:], xlabel="estimated peak (GB)", ylabel="simulated peak (GB)")
    left.set_aspect("equal")

    highest = _highest(fitting)
    limits = sorted(set(rows["limit_mb"]))
    labelled = highest.assign(limit=highest["limit_mb"] / 1e3, percent=100 * highest["part"])
    style.boxes(right, labelled, category="limit", value="percent", categories=[limit / 1e3 for limit in limits])
    right.set_xticks(range(len(limits)), [f"{limit / 1e3:g}" for limit in limits])
    right.axhline(100, color="#C1121F", linewidth=1)
    right.annotate("limit", (0.01, 100), xycoords=("axes fraction", "data"), color="#C1121F", va="bottom")
    right.set(title="Highest device of an iteration", xlabel="memory limit (GB)", ylabel="simulated peak (% of limit)")
    style.legend(figure, rows, methods=[COUNTED, LEFT_OUT], out_of_memory="", num_columns=2)
    return figure


def _draw_peaks(figure: Figure, ax: Axes, rows: pd.DataFrame) -> None:
    peaks_gb = rows[["estimated_mb", "simulated_mb"]].to_numpy(dtype=float) / 1e3
    edges = np.linspace(np.floor(peaks_gb.min()), np.ceil(peaks_gb.max()), 41)
    ax.axline((edges[0], edges[0]), slope=1, color=style.GREY, linewidth=0.8)
    *_, image = ax.hist2d(
        peaks_gb[:, 0], peaks_gb[:, 1], bins=[edges, edges], cmap="Blues", norm=LogNorm(vmin=0.5), cmin=1
    )
    figure.colorbar(image, ax=ax, label="devices and iterations", shrink=0.85)


def _highest(rows: pd.DataFrame) -> pd.DataFrame:
    """The part of the limit that the highest device of each iteration takes."""
    part = rows["simulated_mb"].astype(float) / rows["limit_mb"]
    keys = ["model", "method", "limit_mb", "iteration", "source", "device"]
    return rows.assign(part=part).groupby(keys, sort=False)["part"].max().reset_index()


def compare(rows: pd.DataFrame) -> list[Comparison]:
    fitting = rows.dropna(subset=["estimated_mb"])
    result = []
    for method in (COUNTED, LEFT_OUT):
        mine = fitting[fitting["method"] == method]
        deviation_mb = finite((mine["simulated_mb"] - mine["estimated_mb"]).abs().max())
        highest = _highest(mine)
        above = int((highest["part"] > 1 + 1e-9).sum())
        fails = int(rows[rows["method"] == method]["out_of_memory"].sum())
        note = f"{len(highest)} iterations planned, {fails} reported as not fitting"
        result += [
            Comparison(name=f"{method}: largest deviation", paper=None, ours=deviation_mb, unit="MB", note=note),
            Comparison(name=f"{method}: iterations above the limit", paper=None, ours=float(above), unit="", note=note),
            Comparison(
                name=f"{method}: highest peak", paper=None, ours=finite(100 * highest["part"].max()), unit="% of limit"
            ),
        ]
    return result
