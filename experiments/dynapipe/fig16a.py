"""Ablation of micro-batch construction (paper Fig. 16a): token-based and dynamic programming, sorted and by tour."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pandas as pd
from matplotlib.figure import Figure

from experiments import style
from experiments.dynapipe._setup import MEMORY_LIMIT_MB, batches, paper_model
from experiments.dynapipe._systems import Point, run_point
from experiments.record import Comparison, Row, RunContext, finite, require_positive
from llmsys.dynapipe.config import Order, Parallelism, PlannerConfig

TITLE = "Fig. 16a: ablation of micro-batch construction"
CLAIM = """The paper compares, for T5-11B on 8 GPUs (tensor parallelism 8, no pipeline) at sequence length 4096 and
65,536 tokens: packing (MLM+DS), token-based micro-batches at their best token count, sorted TB(S) or in tour order
TB(T), and dynamic programming likewise, DP(S) and DP(T). Its values are not public, so there is nothing to match. Ours
is a simulation on the authors' profile with the same split for all: dynamic programming in tour order is fastest, and
the tour helps token-based micro-batches as well."""

_VARIANTS: tuple[tuple[str, str, Order], ...] = (
    ("MLM+DS", "MLM+DS", "tour"),
    ("TB(S)", "token-based", "sort"),
    ("TB(T)", "token-based", "tour"),
    ("DP(S)", "DynaPipe", "sort"),
    ("DP(T)", "DynaPipe", "tour"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    model: str = "t5_11b"
    parallelism: Parallelism = field(default_factory=lambda: Parallelism(tensor=8, zero_stage=1))
    max_len: int = 4096
    tokens_per_batch: int = 65_536
    num_batches: int = 5

    def __post_init__(self) -> None:
        require_positive(self, "max_len", "tokens_per_batch", "num_batches")


def run(cfg: Config, context: RunContext) -> list[Row]:
    architecture = paper_model(cfg.model).spec.architecture
    chosen = batches(context.data_root, architecture, cfg.tokens_per_batch, cfg.max_len, cfg.num_batches, context.seed)
    point = Point(
        model=cfg.model,
        max_len=cfg.max_len,
        tokens_per_batch=cfg.tokens_per_batch,
        batches=tuple(chosen),
        seed=context.seed,
        data_root=context.data_root,
    )
    base = PlannerConfig(memory_limit_mb=MEMORY_LIMIT_MB, seed=context.seed)
    rows: list[Row] = []
    for label, system, order in context.progress(_VARIANTS, "variants"):
        made = run_point(point, (system,), dataclasses.replace(base, order=order), (cfg.parallelism,))
        rows += [row | {"method": label} for row in made]
    return rows


def plot(rows: pd.DataFrame) -> Figure:
    figure, axes = style.subplots(1, 2)
    methods = list(rows["method"])
    style.grouped_bars(axes[0, 0], rows, category="model", value="tokens_per_s", methods=methods)
    axes[0, 0].set_ylabel("real tokens per second")
    style.grouped_bars(axes[0, 1], rows, category="model", value="efficiency_encoder", methods=methods)
    axes[0, 1].set_ylabel("encoder: real / padded tokens")
    axes[0, 1].set_ylim(0, 1.02)
    style.legend(figure, rows, methods=methods)
    return figure


def compare(rows: pd.DataFrame) -> list[Comparison]:
    speed = rows.set_index("method")["tokens_per_s"].astype(float)  # NaN where out of memory
    pairs = (("DP(T)", "MLM+DS"), ("DP(T)", "DP(S)"), ("DP(T)", "TB(T)"), ("TB(T)", "TB(S)"))
    return [Comparison(name=f"{a} / {b}", paper=None, ours=finite(speed[a] / speed[b]), unit="x") for a, b in pairs]
