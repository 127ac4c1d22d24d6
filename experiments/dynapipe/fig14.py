"""Throughput against the global batch size at a fixed longest sequence (paper Fig. 14)."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from experiments.dynapipe._systems import SYSTEMS
from experiments.dynapipe._throughput import panels, run_points, speedups
from experiments.record import Comparison, Row, RunContext, require_positive

TITLE = "Fig. 14: throughput against global batch size"
CLAIM = """The paper shows throughput at a maximum sequence length of 2048 for global batches of 16,384 to 131,072
tokens; its values are not public as numbers. In our simulation
larger batches help every system: pipelines are idle for a smaller part of the iteration and gradients are synchronised
less often. DynaPipe's lead over packing grows with the batch, since more samples give it more neighbours of similar
lengths; for T5, where two lengths must agree, packing is ahead at the smallest batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """``models`` are keys of MODELS in _setup; ``systems`` of SYSTEMS in _systems."""

    models: tuple[str, ...] = ("gpt_6.7b", "t5_11b")
    max_len: int = 2048
    tokens_per_batch: tuple[int, ...] = (16_384, 32_768, 65_536, 131_072)
    num_batches: int = 3
    systems: tuple[str, ...] = SYSTEMS[:6]

    def __post_init__(self) -> None:
        require_positive(self, "max_len", "tokens_per_batch", "num_batches")


def run(cfg: Config, context: RunContext) -> list[Row]:
    return run_points(context, cfg.models, (cfg.max_len,), cfg.tokens_per_batch, cfg.num_batches, cfg.systems)


def plot(rows: pd.DataFrame) -> Figure:
    return panels(rows, "tokens_per_batch", "global batch (tokens)")


def compare(rows: pd.DataFrame) -> list[Comparison]:
    # The abstract's ratios are over all sequence lengths, so Fig. 13 is where they belong.
    return speedups(rows, "tokens_per_batch", paper_best=False)
