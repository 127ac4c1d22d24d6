"""What each of Lancet's two passes brings by itself (paper Fig. 16)."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd
from matplotlib.figure import Figure

from experiments import style
from experiments.lancet._iteration import run_points
from experiments.lancet._setup import (
    AS_CAPTURED,
    LANCET,
    PARTITION_ONLY,
    WEIGHT_GRADIENTS_ONLY,
    Assumptions,
    points,
)
from experiments.record import Comparison, Row, RunContext, require_positive

TITLE = "Fig. 16: weight gradients, partition, and both"
CLAIM = """The paper: on 32 GPUs either pass alone gains less than both; the larger model loses more without
weight-gradient scheduling, the smaller one about equally without either. Bar heights are not public. Ours confirms the
first everywhere: the passes hide different all-to-alls, those of the backward and of the forward pass, so their gains
nearly add up. The second holds for the larger model on V100 only, and by a small margin; on A100 both models lose a
little more without partition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """``models`` are keys of ``llmsys.lancet.workload.MODELS``, ``clusters`` those of ``_setup``."""

    models: tuple[str, ...] = ("gpt2_s_moe", "gpt2_l_moe")
    clusters: tuple[str, ...] = ("A100", "V100")
    num_gpus: int = 32
    assumed: Assumptions = field(default_factory=Assumptions)

    def __post_init__(self) -> None:
        require_positive(self, "num_gpus")


def run(cfg: Config, context: RunContext) -> list[Row]:
    systems = (AS_CAPTURED, WEIGHT_GRADIENTS_ONLY, PARTITION_ONLY, LANCET)
    rows = run_points(context, points(cfg.models, cfg.clusters, (cfg.num_gpus,), "switch", cfg.assumed), systems)
    plain = {(row["model"], row["cluster"]): row["iteration_ms"] for row in rows if row["method"] == AS_CAPTURED}
    return [
        {**row, "case": f"{row['model']}\n{row['cluster']}", "speedup": plain[row["model"], row["cluster"]] / ms}
        for row in rows
        if isinstance(ms := row["iteration_ms"], float)
    ]


def plot(rows: pd.DataFrame) -> Figure:
    figure, axes = style.subplots(panel_width_in=7.0)
    ax = axes[0, 0]
    shown = rows[rows["method"] != AS_CAPTURED]
    style.grouped_bars(ax, shown, category="case", value="speedup")
    ax.axhline(1.0, color=style.GREY, linewidth=1)
    ax.set_ylabel(f"speed-up over {AS_CAPTURED}")
    style.legend(figure, shown)
    return figure


def compare(rows: pd.DataFrame) -> list[Comparison]:
    result = []
    for case, mine in rows.groupby("case", sort=False):
        speedups = mine.set_index("method")["speedup"]
        where = str(case).replace("\n", ", ")
        for name in (WEIGHT_GRADIENTS_ONLY, PARTITION_ONLY, LANCET):
            lost = 100 * (1 - speedups[name] / speedups[LANCET])
            note = "" if name == LANCET else f"{lost:.1f}% less than both; the paper has less than both as well"
            result.append(
                Comparison(name=f"{where}: {name}", paper=None, ours=float(speedups[name]), unit="x", note=note)
            )
    return result
