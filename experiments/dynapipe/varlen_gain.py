"""Our own figure: what DynaPipe gains over variable-length packing, with the paper's kernels and with today's."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments import style
from experiments.dynapipe._setup import batches, paper_model
from experiments.dynapipe._systems import Point, run_point
from experiments.record import Comparison, Row, RunContext, require_positive
from llmsys.core.errors import ConfigError

TITLE = "Gain over variable-length packing (our own figure)"
CLAIM = """The paper compares with packing that attends over the whole packed row. Today's packing uses variable-length
attention, which neither pads nor attends across samples; a later system's numbers put DynaPipe at only about 1.08x of
it (computed from FlexPipe's, a crude estimate). Here both run under one cost model, derived from the authors' profile:
attention as profiled (padded micro-batches as measured, packs at the profiled kernels' speed), and fused, without score
matrices, at one and three times the profiled speed. "DynaPipe varlen" is our extension: its partition, balance,
recomputation and schedule, with micro-batches that concatenate their samples instead of padding them. The paper's
padded micro-batches gain little over variable-length packing for GPT, most at long limits, and lose for T5, whose two
lengths cannot both be kept equal; what they lose is padding, not planning."""

_BASELINE = "varlen packing"
_OURS = ("DynaPipe", "DynaPipe varlen")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """``fused_speedups``: attention kernels' speed over the profiled ones; 0 stands for "as profiled"."""

    models: tuple[str, ...] = ("gpt_6.7b", "t5_11b")
    max_lens: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    fused_speedups: tuple[float, ...] = (0.0, 1.0, 3.0)
    tokens_per_batch: int = 65_536
    num_batches: int = 3

    def __post_init__(self) -> None:
        require_positive(self, "max_lens", "tokens_per_batch", "num_batches")
        if not self.fused_speedups or not all(s == 0 or 1 <= s < np.inf for s in self.fused_speedups):
            raise ConfigError(
                "fused_speedups is out of range",
                expected="at least one number, each 0 (as profiled) or at least 1",
                found=repr(self.fused_speedups),
                fix="set settings.fused_speedups",
            )


def run(cfg: Config, context: RunContext) -> list[Row]:
    rows: list[Row] = []
    grid = list(itertools.product(cfg.models, cfg.fused_speedups, cfg.max_lens))
    for model, speedup, max_len in context.progress(grid, "points"):
        architecture = paper_model(model).spec.architecture
        chosen = batches(context.data_root, architecture, cfg.tokens_per_batch, max_len, cfg.num_batches, context.seed)
        point = Point(
            model=model,
            max_len=max_len,
            tokens_per_batch=cfg.tokens_per_batch,
            batches=tuple(chosen),
            seed=context.seed,
            data_root=context.data_root,
            fused_speedup=speedup or None,
        )
        kernels = f"fused attention, {speedup:g}x" if speedup else "attention as profiled"
        made = run_point(point, (*_OURS, _BASELINE))
        base = next(row["tokens_per_s"] for row in made if row["method"] == _BASELINE)
        rows += [row | {"kernels": kernels, "gain": _ratio(row["tokens_per_s"], base)} for row in made]
    return rows


def _ratio(ours: object, base: object) -> float | None:
    return ours / base if isinstance(ours, float) and isinstance(base, float) else None


def plot(rows: pd.DataFrame) -> Figure:
    models, kernels = list(dict.fromkeys(rows["model"])), list(dict.fromkeys(rows["kernels"]))
    figure, axes = style.subplots(len(models), len(kernels), panel_width_in=3.6, panel_height_in=2.7, sharey="row")
    ours = rows[rows["method"] != _BASELINE]
    for i, j in np.ndindex(len(models), len(kernels)):
        mine = ours[(ours["model"] == models[i]) & (ours["kernels"] == kernels[j])]
        style.grouped_bars(axes[i, j], mine, category="max_len", value="gain", methods=list(_OURS))
        axes[i, j].axhline(1.0, color=style.GREY, linewidth=1)
        axes[i, j].set_title(f"{models[i]}, {kernels[j]}", fontsize=9)
        axes[i, j].set_xlabel("maximum sequence length (tokens)")
    for i in range(len(models)):
        axes[i, 0].set_ylabel(f"throughput / {_BASELINE}")
    style.legend(figure, ours, methods=list(_OURS))
    return figure


def compare(rows: pd.DataFrame) -> list[Comparison]:
    comparisons = []
    for (model, kernels, method), mine in rows.groupby(["model", "kernels", "method"], sort=False):
        gains = mine["gain"].astype(float)
        if method == _BASELINE or gains.isna().all():
            continue
        comparisons.append(
            Comparison(
                name=f"{model}, {kernels}: {method} / {_BASELINE}, geometric mean",
                paper=None,
                ours=float(np.exp(np.log(gains.dropna()).mean())),
                unit="x",
                note=", ".join(f"{gain:.2f} at {length}" for gain, length in zip(gains, mine["max_len"], strict=True)),
            )
        )
    return comparisons
