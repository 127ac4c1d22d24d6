"""1F1B and the adaptive schedule when micro-batches take unequal time: an idealised pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments import style
from experiments.record import Comparison, Row, RunContext, require_positive
from llmsys.dynapipe.config import PlannerConfig
from llmsys.dynapipe.costs import MicroBatchCosts
from llmsys.dynapipe.schedule import find_schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Schedules of micro-batches that take unequal time"
CLAIM = """The artifact has a simulation script (schedule_under_dynamic_mb; which figure it belongs to, and its results,
are not known to us) that compares 1F1B with the cyclic, here adaptive, schedule: 16 micro-batches, time factors drawn
from N(1, std), clipped to 0.1 to 10 and scaled to mean 1; forward 4,000 us, backward twice that; std 0.1 to 6.4,
communication factor 0.2 to 3.2, 2 to 16 stages. Our reading: a micro-batch has one factor on all stages; a transfer
takes the communication factor times the forward time of its micro-batch; sends overlap with computation; memory is not
limited. One of std and communication factor varies, the other stays at its base. Our search over the order of
micro-batches is a series of its own."""

DEVICE = "idealised equal devices, forward 4 ms and backward 8 ms on average"
FORWARD_MS, BACKWARD_MS = 4.0, 8.0
FACTOR_RANGE = (0.1, 10.0)
_BASE = PlannerConfig(recompute=("none",))
ONE_F_ONE_B, ADAPTIVE, SEARCH = "1F1B", "Adaptive (no reorder)", "search"
METHODS = {
    ONE_F_ONE_B: replace(_BASE, schedules=("1f1b",), reorder="none"),
    ADAPTIVE: replace(_BASE, schedules=("adaptive",), reorder="none"),
    SEARCH: _BASE,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """``base_std`` and ``base_comm_factor`` hold while the other varies. ``num_draws``: of time factors a point."""

    stds: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
    comm_factors: tuple[float, ...] = (0.2, 0.4, 0.8, 1.6, 3.2)
    num_stages: tuple[int, ...] = (2, 4, 8, 16)
    base_std: float = 0.4
    base_comm_factor: float = 0.2
    num_micro_batches: int = 16
    num_draws: int = 10

    def __post_init__(self) -> None:
        # Both swept settings are drawn on a logarithmic axis.
        require_positive(self, "stds", "comm_factors", "num_stages", "num_micro_batches", "num_draws")
        require_positive(self, "base_std", "base_comm_factor", or_zero=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    sweep: str
    num_stages: int
    std: float
    comm_factor: float


def run(cfg: Config, context: RunContext) -> list[Row]:
    rows: list[Row] = []
    for point in context.progress(list(_points(cfg)), "points"):
        for draw in range(cfg.num_draws):
            costs = _costs(point, _time_factors(point.std, cfg.num_micro_batches, context.seed, draw))
            rows += [row | {"draw": draw} for row in _rows(point, costs, context.seed)]
    return rows


def _points(cfg: Config) -> Iterator[Point]:
    for stages in cfg.num_stages:
        for std in cfg.stds:
            yield Point(sweep="std", num_stages=stages, std=std, comm_factor=cfg.base_comm_factor)
        for factor in cfg.comm_factors:
            yield Point(sweep="comm_factor", num_stages=stages, std=cfg.base_std, comm_factor=factor)


def _time_factors(std: float, count: int, seed: int, draw: int) -> NDArray[np.float64]:
    # Both numbers seed the generator: seed + draw would give neighbouring seeds nearly the same draws.
    drawn = np.clip(np.random.default_rng([seed, draw]).normal(1.0, std, count), *FACTOR_RANGE)
    factors: NDArray[np.float64] = drawn / drawn.mean()
    return factors


def _costs(point: Point, factors: NDArray[np.float64]) -> MicroBatchCosts:
    """Every micro-batch stores 1 unit, so that a peak counts micro-batches in flight."""
    each = np.repeat(factors[:, None], point.num_stages, axis=1)
    send = point.comm_factor * FORWARD_MS * each
    send_forward, send_backward = send.copy(), send.copy()
    send_forward[:, -1] = 0.0
    send_backward[:, 0] = 0.0
    return MicroBatchCosts(
        forward_ms=FORWARD_MS * each,
        backward_ms=BACKWARD_MS * each,
        stored_mb=np.ones_like(each),
        forward_peak_mb=np.ones_like(each),
        backward_extra_mb=np.zeros_like(each),
        send_forward_ms=send_forward,
        send_backward_ms=send_backward,
    )


def _rows(point: Point, costs: MicroBatchCosts, seed: int) -> list[Row]:
    count, stages = costs.forward_ms.shape
    unlimited = np.full(stages, count + 1.0)
    # Equal micro-batches under 1F1B without transfers.
    ideal_ms = (count + stages - 1) * (FORWARD_MS + BACKWARD_MS)
    rows: list[Row] = []
    for method, config in METHODS.items():
        config = replace(config, seed=seed)
        found = find_schedule(costs, stages, unlimited, config, max_moves=config.max_moves)
        assert found is not None  # without a memory limit every schedule completes
        rows.append(
            {
                "sweep": point.sweep,
                "num_stages": stages,
                "std": point.std,
                "comm_factor": point.comm_factor,
                "method": method,
                "makespan_ms": found.makespan_ms,
                "relative_makespan": found.makespan_ms / ideal_ms,
                "most_in_flight": max(found.peak_mb),
                "source": "simulated",
                "device": DEVICE,
                "seed": seed,
            }
        )
    return rows


def plot(rows: pd.DataFrame) -> Figure:
    stages = sorted(set(rows["num_stages"]))
    figure, axes = style.subplots(2, len(stages), panel_width_in=2.7, panel_height_in=2.6, sharey="row")
    labels = {"std": "std of time factors", "comm_factor": "communication factor"}
    for (sweep, label), line in zip(labels.items(), axes, strict=True):
        mine = rows[rows["sweep"] == sweep]
        means = mine.groupby(["num_stages", sweep, "method", "source"], sort=False)["relative_makespan"].mean()
        table = means.reset_index()
        for ax, count in zip(line, stages, strict=True):
            style.lines(ax, table[table["num_stages"] == count], x=sweep, y="relative_makespan", methods=list(METHODS))
            ticks = sorted(set(mine[sweep]))
            ax.set(xscale="log", xlabel=label)
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
            ax.minorticks_off()
        line[0].set_ylabel("makespan / equal micro-\nbatches without transfers")
    for ax, count in zip(axes[0], stages, strict=True):
        ax.set_title(f"{count} stages", fontsize=11)
    style.legend(figure, rows, methods=list(METHODS), num_columns=4)
    return figure


def compare(rows: pd.DataFrame) -> list[Comparison]:
    """Mean makespan of 1F1B over that of the adaptive schedule, and of that over the search's, at the sweeps' ends."""
    result = []
    for sweep in ("std", "comm_factor"):
        for count in sorted(set(rows["num_stages"])):
            mine = rows[(rows["sweep"] == sweep) & (rows["num_stages"] == count)]
            for end in (mine[sweep].min(), mine[sweep].max()):
                at_end = mine[mine[sweep] == end]
                means = at_end.groupby("method")[["makespan_ms", "most_in_flight"]].mean()
                ms, held = means["makespan_ms"], means["most_in_flight"]
                note = (
                    f"speed-up; at most {held[ONE_F_ONE_B]:.1f} and {held[ADAPTIVE]:.1f} micro-batches in flight; "
                    f"search: another {ms[ADAPTIVE] / ms[SEARCH]:.3f}x"
                )
                result.append(
                    Comparison(
                        name=f"{count} stages, {sweep} {end:g}: adaptive over 1F1B",
                        paper=None,
                        ours=float(ms[ONE_F_ONE_B] / ms[ADAPTIVE]),
                        unit="x",
                        note=note,
                    )
                )
    return result
