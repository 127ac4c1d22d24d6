"""What Lancet's plans gain in training steps that were run, on two processes joined by a link of limited rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from experiments import style
from experiments.lancet._measured_job import Job, Model
from experiments.lancet._measured_run import Measured, measure
from experiments.lancet._measured_systems import MEASURED_SYSTEMS, TORCH
from experiments.lancet._setup import AS_CAPTURED, LANCET, TUTEL_STYLE
from experiments.record import Comparison, Row, RunContext, require_positive
from llmsys.core.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Lancet: training steps over a link of limited rate"
CLAIM = """No figure of the paper. Two ranks with expert parallelism, each one thread on a core of its own, in two
network namespaces of one machine, joined by a virtual Ethernet link that a token bucket limits in each direction;
all-to-alls are gloo's, or our irregular ones. The rate is chosen such that all-to-alls take a given share of a step
that overlaps nothing, whatever the speed of the machine. All systems run in the same processes, in turn, from the same
captured graph, and their gradients are compared with those of eager execution. Targets: Lancet's plan cuts the time in
waits for communication by at least 50% and the step by at least 1.15x against the captured order, and is not slower
than torch's OverlapScheduler."""

TARGET_CUT, TARGET_SPEEDUP, TARGET_AGAINST_TORCH = 50.0, 1.15, 1.0
MAX_GRADIENT_ERROR = 1e-4
"""Of the greatest element of a gradient: sums over parts are rounded in another order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """comm_share: of all-to-alls in a step without overlap. part_counts: for which operators are measured.

    bench_ms: at least, for each operator. cache_file: of their times; empty measures them anew in each run.
    trace_directory: for Chrome traces of one step of each system; empty for none.
    """

    models: tuple[Model, ...] = (Model(name="h256 4 layers"),)
    systems: tuple[str, ...] = MEASURED_SYSTEMS
    comm_share: float = 0.4
    num_repeats: int = 9
    part_counts: tuple[int, ...] = (2, 4, 8)
    bench_ms: float = 20.0
    timeout_s: float = 1200.0
    cache_file: str = ""
    trace_directory: str = ""

    def __post_init__(self) -> None:
        require_positive(self, "num_repeats", "part_counts", "bench_ms", "timeout_s", "comm_share")
        unknown = [name for name in self.systems if name not in MEASURED_SYSTEMS]
        if unknown or not self.systems or not self.models or self.comm_share >= 1 or min(self.part_counts) < 2:
            raise ConfigError(
                "the measured steps are not well defined",
                expected=f"models, systems of {', '.join(MEASURED_SYSTEMS)}, comm_share below 1, part_counts above 1",
                found=f"{len(self.models)} models, systems {self.systems}, comm_share {self.comm_share}",
                fix="set settings.models, settings.systems, settings.comm_share or settings.part_counts",
            )

    def job(self, seed: int) -> Job:
        return Job(
            models=self.models,
            systems=self.systems,
            num_repeats=self.num_repeats,
            part_counts=self.part_counts,
            seed=seed,
            timeout_s=self.timeout_s,
            bench_ms=self.bench_ms,
            cache_file=self.cache_file,
            trace_directory=self.trace_directory,
        )


def run(cfg: Config, context: RunContext) -> list[Row]:
    rows: list[Row] = []
    for measured in context.progress(measure(cfg.job(context.seed), cfg.comm_share), "models", len(cfg.models)):
        rows += [row_of(m, context) for m in measured]
    return rows


def row_of(measured: Measured, context: RunContext) -> Row:
    """One measured step of one system, with what the planner's simulator expected of it."""
    sample = measured.sample
    return {
        "method": sample.system,
        "model": sample.model,
        "repeat": sample.repeat,
        "step_ms": sample.step_ms,
        "waited_ms": sample.waited_ms,
        "predicted_ms": sample.predicted_ms,
        "predicted_exposed_ms": sample.predicted_exposed_ms,
        "replay_error": sample.replay_error,
        "gradient_error": sample.gradient_error,
        "loss_error": sample.loss_error,
        "rate_gbit_per_s": measured.rate_gbit_per_s,
        "compute_ms": measured.compute_ms,
        "num_regions": sample.num_regions,
        "max_parts": sample.max_parts,
        "num_moved": sample.num_moved,
        "planning_s": sample.planning_s,
        "note": sample.notes,
        "source": "measured",
        "device": f"2 x 1 thread of {context.device}, {measured.rate_gbit_per_s:.3g} Gbit/s link",
        "seed": context.seed,
    }


def medians(rows: pd.DataFrame, value: str) -> pd.DataFrame:
    """Of each model (index) and method (column)."""
    return rows.pivot_table(index="model", columns="method", values=value, aggfunc="median", sort=False)


def plot(rows: pd.DataFrame) -> Figure:
    figure, axes = style.subplots(1, 2, panel_width_in=5.2, panel_height_in=3.6)
    panels = (("step_ms", "step (ms, median)"), ("waited_ms", "waits for messages (ms, median)"))
    for ax, (value, label) in zip(axes[0], panels, strict=True):
        shown = rows.groupby(["model", "method", "source"], sort=False)[value].median().reset_index()
        style.grouped_bars(ax, shown, category="model", value=value)
        ax.set_ylabel(label)
    style.legend(figure, rows, num_columns=4)
    return figure


def compare(rows: pd.DataFrame) -> list[Comparison]:
    steps, waits = medians(rows, "step_ms"), medians(rows, "waited_ms")
    result = []
    for model in steps.index:
        step, wait = steps.loc[model], waits.loc[model]
        mine = rows[rows["model"] == model]
        share = 100 * float(wait[AS_CAPTURED] / step[AS_CAPTURED]) if AS_CAPTURED in step else None
        result.append(_comparison(f"{model}: waits in the captured order, of its step", share, "%", ""))
        if LANCET in step:
            result += _of_lancet(model, step, wait)
        worst = float(mine["gradient_error"].max())
        note = _verdict(worst <= MAX_GRADIENT_ERROR, f"at most {MAX_GRADIENT_ERROR:g} of a gradient's greatest element")
        result.append(_comparison(f"{model}: gradients against eager execution, worst of all systems", worst, "", note))
    return result


def _of_lancet(model: str, step: pd.Series, wait: pd.Series) -> list[Comparison]:
    result = []
    targets = {AS_CAPTURED: TARGET_SPEEDUP, TORCH: TARGET_AGAINST_TORCH, TUTEL_STYLE: 1.0}
    for baseline, target in targets.items():
        if baseline in step:
            ratio = float(step[baseline] / step[LANCET])
            note = _verdict(ratio >= target, f"at least {target:g}") if baseline != TUTEL_STYLE else ""
            result.append(_comparison(f"{model}: step of {baseline} / step of {LANCET}", ratio, "x", note))
    if AS_CAPTURED in wait:
        cut = 100 * (1 - float(wait[LANCET] / wait[AS_CAPTURED]))
        note = _verdict(cut >= TARGET_CUT, f"at least {TARGET_CUT:g}%")
        result.append(_comparison(f"{model}: time in waits, cut against {AS_CAPTURED}", cut, "%", note))
    return result


def _verdict(holds: bool, target: str) -> str:
    return f"{'holds' if holds else 'DOES NOT HOLD'}: {target}"


def _comparison(name: str, ours: float | None, unit: str, note: str) -> Comparison:
    return Comparison(name=name, paper=None, ours=ours, unit=unit, note=note)
