"""What Lancet's planning would gain over DeepEP's all-to-alls on H100 nodes: no figure of the paper."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd
from matplotlib.figure import Figure

from experiments import style
from experiments.lancet._iteration import run_points
from experiments.lancet._setup import AS_CAPTURED, COMPARED, LANCET, TUTEL_STYLE, Assumptions, Point
from experiments.lancet._stack import part_legend, stacked_bars
from experiments.lancet.fig13 import COLORS, PARTS
from experiments.record import Comparison, Row, RunContext, require_positive

TITLE = "H100 with DeepEP: a DeepSeek-V3-like stage by number of GPUs"
CLAIM = """No figure of the paper. Four layers of DeepSeek-V3's shape (256 experts, top-8, a shared expert, latent
attention), 4,096 tokens a GPU, bf16, as a pipeline stage would hold them. All-to-alls take what DeepEP's dispatch and
combine were measured to take on 1 to 8 nodes of 8 H100, kernels what a fit to H100 measurements says. It asks whether
whole-graph overlap still pays where the all-to-all is that fast. On two and four nodes nearly all communication can be
hidden, and the gain is what communication took. From eight nodes on the measured all-to-all takes three times as long
as on four, more than the rest of the step, and no order can hide it. One thing flatters Lancet: DeepEP's kernels
occupy some of the GPU's multiprocessors (of 4 to 24 that were measured, the fastest number is taken), which slows the
computation beside them and is not modelled for any system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """``model`` is a key of ``llmsys.lancet.workload.MODELS``; DeepEP was measured on 8, 16, 32 and 64 GPUs."""

    model: str = "deepseek_stage"
    num_gpus: tuple[int, ...] = (8, 16, 32, 64)
    batch_per_gpu: int = 8
    systems: tuple[str, ...] = COMPARED
    assumed: Assumptions = field(default_factory=Assumptions)

    def __post_init__(self) -> None:
        require_positive(self, "num_gpus", "batch_per_gpu")


def run(cfg: Config, context: RunContext) -> list[Row]:
    chosen = [
        Point(
            model=cfg.model,
            cluster="H100",
            num_gpus=gpus,
            gate="top_k",
            batch_per_gpu=cfg.batch_per_gpu,
            assumed=cfg.assumed,
        )
        for gpus in cfg.num_gpus
    ]
    return run_points(context, chosen, cfg.systems)


def plot(rows: pd.DataFrame) -> Figure:
    figure, axes = style.subplots(panel_width_in=8.0, panel_height_in=3.6)
    stacked_bars(axes[0, 0], rows, PARTS, COLORS, group="num_gpus", group_label="GPUs")
    axes[0, 0].set_ylabel("time (ms)")
    part_legend(figure, rows, COLORS, list(PARTS.values()))
    return figure


def compare(rows: pd.DataFrame) -> list[Comparison]:
    times, exposed, comm = (
        rows.pivot_table(index="num_gpus", columns="method", values=column, sort=False)
        for column in ("iteration_ms", "exposed_comm_ms", "comm_ms")
    )
    result = []
    for gpus in times.index:
        for baseline in (AS_CAPTURED, TUTEL_STYLE):
            if baseline not in times or LANCET not in times:
                continue
            left = exposed.loc[gpus, LANCET] / exposed.loc[gpus, baseline]
            share = comm.loc[gpus, baseline] / times.loc[gpus, baseline]
            result.append(
                Comparison(
                    name=f"{gpus} GPUs: Lancet over {baseline}",
                    paper=None,
                    ours=float(times.loc[gpus, baseline] / times.loc[gpus, LANCET]),
                    unit="x",
                    note=f"communication is {share:.0%} of the baseline's step; {left:.0%} of what it exposes is left",
                )
            )
    return result
