"""Padding efficiency of packing and of DynaPipe (paper Fig. 15)."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from experiments import style
from experiments.dynapipe._throughput import run_points
from experiments.record import Comparison, Row, RunContext, require_positive

TITLE = "Fig. 15: padding efficiency"
CLAIM = """The paper plots real over padded tokens for packing (MLM+DS) and DynaPipe on 8 GPUs, T5 split into encoder
and decoder; its values are not public as numbers. Ours are exact counts of simulated plans (costs enter only through
the choice of micro-batches). GPT: packing wastes least by construction, DynaPipe is a few percent below. T5: one tour
through two lengths cannot keep both equal, and decoder lengths are a few tokens in our tasks, so rounding alone costs
much of the decoder's efficiency; packing's decoder rows are emptier still unless the sequence length is long."""

_PARTS = {"efficiency_encoder": "encoder", "efficiency_decoder": "decoder"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Two sweeps: ``max_lens`` at ``tokens_per_batch``, and ``batch_sizes`` (tokens) at ``max_len``."""

    models: tuple[str, ...] = ("gpt_6.7b", "t5_11b")
    max_lens: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    tokens_per_batch: int = 65_536
    batch_sizes: tuple[int, ...] = (16_384, 32_768, 65_536, 131_072)
    max_len: int = 2048
    num_batches: int = 3

    def __post_init__(self) -> None:
        require_positive(self, "max_lens", "tokens_per_batch", "batch_sizes", "max_len", "num_batches")


def run(cfg: Config, context: RunContext) -> list[Row]:
    rows: list[Row] = []
    sweeps = (
        ("sequence length", cfg.max_lens, (cfg.tokens_per_batch,)),
        ("global batch", (cfg.max_len,), cfg.batch_sizes),
    )
    for sweep, max_lens, tokens in sweeps:
        made = run_points(context, cfg.models, max_lens, tokens, cfg.num_batches, ("DynaPipe", "MLM+DS"))
        rows += [_split(row, sweep, column, part) for row in made for column, part in _PARTS.items()]
    return [row for row in rows if row["efficiency"] is not None or row["out_of_memory"]]


def _split(row: Row, sweep: str, column: str, part: str) -> Row:
    """The row of one part of a model; a decoder-only model has the decoder alone."""
    architecture_part = part if not str(row["model"]).startswith("GPT") else "tokens"
    value = row.get(column)
    kept = {name: value for name, value in row.items() if not name.startswith("efficiency_")}
    return kept | {
        "sweep": sweep,
        "part": architecture_part,
        "series": f"{row['method']} {architecture_part}",
        "x": row["max_len"] if sweep == "sequence length" else row["tokens_per_batch"],
        "efficiency": value,
    }


def plot(rows: pd.DataFrame) -> Figure:
    models = list(dict.fromkeys(rows["model"]))
    sweeps = list(dict.fromkeys(rows["sweep"]))
    figure, axes = style.subplots(len(models), len(sweeps))
    for i, model in enumerate(models):
        for j, sweep in enumerate(sweeps):
            mine = rows[(rows["model"] == model) & (rows["sweep"] == sweep)]
            style.grouped_bars(axes[i, j], mine, category="x", value="efficiency", method="series")
            axes[i, j].set_ylim(0, 1.02)
            axes[i, j].set_title(model)
            axes[i, j].set_ylabel("real / padded tokens")
            unit = "maximum sequence length" if sweep == "sequence length" else "global batch"
            axes[i, j].set_xlabel(f"{unit} (tokens)")
    style.legend(figure, rows, method="series", num_columns=3)
    return figure


def compare(rows: pd.DataFrame) -> list[Comparison]:
    comparisons = []
    for (model, series), mine in rows.groupby(["model", "series"], sort=False):
        values = mine["efficiency"].dropna().astype(float)
        if len(values):
            comparisons.append(
                Comparison(
                    name=f"{model}: {series}, mean efficiency",
                    paper=None,
                    ours=float(values.mean()),
                    unit="",
                    note=f"from {values.min():.2f} to {values.max():.2f}",
                )
            )
    return comparisons
