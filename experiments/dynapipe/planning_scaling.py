"""How planning time grows with the number of samples in a global batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments import style
from experiments.dynapipe._setup import MEMORY_LIMIT_MB, cost_model, fixed_size_batch, paper_model, timed_plans
from experiments.record import Comparison, Row, RunContext, require_positive
from llmsys.dynapipe.config import Parallelism, PlannerConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Planning time against the number of samples in a global batch"
CLAIM = """No figure of the paper. Its search over micro-batches takes a quadratic number of steps in the number of
samples for each candidate of the longest micro-batch, and its planners run on many CPU workers ahead of time.
Ours is to grow no faster than n to the power of 1.6 and to plan 4,096 samples within 2 s on one core."""

MODELS = {
    "GPT": ("gpt_6.7b", Parallelism(data=2, pipeline=4, tensor=1, zero_stage=1)),
    "T5": ("t5_11b", Parallelism(data=1, pipeline=4, tensor=8, zero_stage=1)),
}
MAX_EXPONENT = 1.6
MAX_PLANNING_S = 2.0
FIT_FROM_SAMPLES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    num_samples: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    num_repeats: int = 3
    max_len: int = 2048

    def __post_init__(self) -> None:
        require_positive(self, "num_samples", "num_repeats", "max_len")


def run(cfg: Config, context: RunContext) -> list[Row]:
    rows: list[Row] = []
    points = [(name, count) for name in MODELS for count in cfg.num_samples]
    for name, count in context.progress(points, "planning"):
        model, parallelism = MODELS[name]
        architecture = paper_model(model).spec.architecture
        samples = fixed_size_batch(context.data_root, architecture, count, cfg.max_len, context.seed)
        costs = cost_model(model, parallelism, context.data_root)
        config = PlannerConfig(memory_limit_mb=MEMORY_LIMIT_MB, seed=context.seed)
        plans, cpu_s = timed_plans(samples, costs, config, cfg.num_repeats)
        rows.append(
            {
                "method": name,
                "parallelism": parallelism.label(),
                "num_samples": count,
                "num_micro_batches": plans[0].num_micro_batches,
                "planning_cpu_s": float(np.median(cpu_s)),
                "fastest_cpu_s": min(cpu_s),
                "slowest_cpu_s": max(cpu_s),
                "iteration_s": plans[0].estimated_ms / 1e3,
                "source": "measured",
                "device": context.device,
                "seed": context.seed,
            }
        )
    frame = pd.DataFrame(rows)
    for name in MODELS:
        print(f"{name}: planning time grows as n^{exponent(frame, name):.2f}")
    return rows


def exponent(rows: pd.DataFrame, method: str, from_samples: int = 0) -> float:
    """Slope of the least-squares line through the logarithms of time and number; NaN below two points."""
    mine = rows[(rows["method"] == method) & (rows["num_samples"] >= from_samples)]
    if len(mine) < 2:
        return float("nan")
    slope, _ = np.polyfit(np.log(mine["num_samples"]), np.log(mine["planning_cpu_s"]), 1)
    return float(slope)


def plot(rows: pd.DataFrame) -> Figure:
    figure, axes = style.subplots(panel_width_in=5.2, panel_height_in=3.8)
    ax = axes[0, 0]
    style.lines(ax, rows, x="num_samples", y="planning_cpu_s")
    counts = np.array(sorted(set(rows["num_samples"])), dtype=float)
    smallest = rows[rows["num_samples"] == counts[0]]["planning_cpu_s"].max()
    guide = smallest * (counts / counts[0]) ** MAX_EXPONENT
    ax.plot(counts, guide, color=style.GREY, linestyle=":", linewidth=1)
    ax.annotate(
        f"∝ n^{MAX_EXPONENT:g}", (counts[-1], guide[-1]), xytext=(-16, -2), textcoords="offset points", ha="right"
    )
    ax.set(xscale="log", yscale="log", xlabel="samples in the global batch, n", ylabel="CPU time of planning (s)")
    ax.set_xticks(counts, [f"{count:.0f}" for count in counts])
    ax.minorticks_off()
    style.legend(figure, rows, num_columns=3)
    return figure


def compare(rows: pd.DataFrame) -> list[Comparison]:
    result = []
    for name in dict.fromkeys(rows["method"]):
        mine = rows[rows["method"] == name]
        largest = mine.loc[mine["num_samples"].idxmax()]
        target = f"target: at most {MAX_EXPONENT:g}"
        for from_samples, which in ((0, "all sizes"), (FIT_FROM_SAMPLES, f"from {FIT_FROM_SAMPLES} samples")):
            slope = exponent(rows, name, from_samples)
            result.append(
                Comparison(name=f"{name}: exponent of n, {which}", paper=None, ours=slope, unit="", note=target)
            )
        result.append(
            Comparison(
                name=f"{name}: planning {largest['num_samples']} samples",
                paper=None,
                ours=float(largest["planning_cpu_s"]),
                unit="s",
                note=f"target for 4,096 samples: below {MAX_PLANNING_S:g} s; the planned iteration takes "
                f"{largest['iteration_s']:.1f} s",
            )
        )
    return result
