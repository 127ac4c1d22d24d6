"""Throughput against the longest sequence at a fixed global batch (paper Fig. 13)."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from experiments.dynapipe._systems import SYSTEMS
from experiments.dynapipe._throughput import panels, run_points, speedups
from experiments.record import Comparison, Row, RunContext, require_positive

TITLE = "Fig. 13: throughput against maximum sequence length"
CLAIM = """The paper reports up to 3.25x (GPT) and 4.39x (T5) the throughput of packing (MLM+DS) on A100 machines, at a
global batch of 65,536 tokens. Ours is a simulation on the authors' per-layer A100 profile with real multi-task lengths.
The shape agrees: packing pays for attention across unrelated samples, quadratic in the sequence length, so the gain
grows from nothing at 512 to its maximum at 8192, and more for T5, whose packed rows waste decoder tokens as well. At
8192 the paper's T5 baseline was out of memory, so our largest T5 ratio has no counterpart and is listed apart. The best
ratios stay below the paper's. What differs, as far as we know: (1) the baseline: ours is searched over all splits,
micro-batch sizes, kinds of recomputation, ZeRO 1 and 2, and for T5 over the decoder length of a packed row, whose value
in the paper we do not know; it gets the same memory limit as DynaPipe, 36,000 MB; (2) the workload: FLAN v2 itself is
not public on a code host, and our lengths are part of its family in another mixture (99% of inputs under about 1,100
tokens); (3) the machine: only layers, transfers and the gradients' all-reduce are modelled, no data loading, launch
gaps or jitter, for any system. Which of these matters most only a run on GPUs can tell. Against fixed-size
micro-batches (padding) the gain is larger, against token-based ones smaller. Against variable-length packing, today's
practice without useless attention, padded micro-batches gain little for GPT and lose for T5: see "Gain over
variable-length packing"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """``models`` are keys of MODELS in _setup; ``systems`` of SYSTEMS in _systems."""

    models: tuple[str, ...] = ("gpt_6.7b", "t5_11b")
    max_lens: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    tokens_per_batch: int = 65_536
    num_batches: int = 3
    systems: tuple[str, ...] = SYSTEMS[:6]

    def __post_init__(self) -> None:
        require_positive(self, "max_lens", "tokens_per_batch", "num_batches")


def run(cfg: Config, context: RunContext) -> list[Row]:
    return run_points(context, cfg.models, cfg.max_lens, (cfg.tokens_per_batch,), cfg.num_batches, cfg.systems)


def plot(rows: pd.DataFrame) -> Figure:
    return panels(rows, "max_len", "maximum sequence length (tokens)")


def compare(rows: pd.DataFrame) -> list[Comparison]:
    return speedups(rows, "max_len")
