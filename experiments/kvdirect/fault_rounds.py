"""Workers are killed, stopped and restarted at every moment of a request; nothing may be lost, wrong or leaked."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments import style
from experiments.kvdirect._fault_rounds import (
    CASES,
    HOLDER,
    INITIATOR,
    KILL,
    MOMENTS,
    STOP,
    Limits,
    Outcome,
    Round,
    make_plan,
)
from experiments.kvdirect._fleet import MODULE, Fleet, worker_settings
from experiments.kvdirect._workers import Nursery
from experiments.record import Comparison, Row, RunContext, require_positive

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Fault rounds: workers die, stop and come back at every moment of a request"
CLAIM = """No figure of the paper, which says of faults only that workers come and go at any time: a check of our own.
In every round one side of a request is killed (SIGKILL) or stopped beyond its lease (SIGSTOP, then SIGCONT), before or
while it connects, in the middle of a batch, before, during or after the completion, by pull and by push, over shared
memory, CMA and UCX on TCP. Acknowledged requests must have exactly the right bytes, failed ones must name the peer
within the lease, survivors must free what they held and serve others meanwhile, tickets of a former life must be
refused, and nothing may leak. Any breach ends the run with an error that tells how to play the round again. A killed
process is noticed by its closed connection, a stopped one by its lease."""

# A stopped peer finishes its copy when it goes on; in a round it stays stopped for at most twice the lease.
QUARANTINE_LEASES = 10.0
UNCLAIMED_LEASES = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """``lease_s``: of every worker; blocks of peers that never come are freed after 1.5 times that.

    ``slack_s``: what a slow machine may add to a deadline. ``first_round``: with ``num_rounds=1``, plays one again.
    ``num_blocks`` of ``block_bytes`` are in each of a worker's two pools; a request takes at most
    ``max_request_blocks``.
    """

    num_rounds: int = 60
    first_round: int = 0
    num_holders: int = 2
    num_initiators: int = 2
    lease_s: float = 1.0
    slack_s: float = 5.0
    num_blocks: int = 320
    block_bytes: int = 32768
    max_request_blocks: int = 48

    def __post_init__(self) -> None:
        require_positive(self, "num_rounds", "lease_s", "slack_s", "num_blocks", "block_bytes", "max_request_blocks")
        require_positive(self, "first_round", or_zero=True)
        require_positive(self, "num_holders", "num_initiators")


def run(cfg: Config, context: RunContext) -> list[Row]:
    indices = range(cfg.first_round, cfg.first_round + cfg.num_rounds)
    outcomes = list(rounds(cfg, context.seed, context.progress(indices, "rounds", total=cfg.num_rounds)))
    rows = [_row(case, mine, cfg) for case in CASES if (mine := _of_case(outcomes, case))]
    return [row | {"source": "measured", "device": context.device, "seed": context.seed} for row in rows]


def limits_of(cfg: Config) -> Limits:
    return Limits(
        lease_s=cfg.lease_s,
        slack_s=cfg.slack_s,
        unclaimed_timeout_s=UNCLAIMED_LEASES * cfg.lease_s,
        max_request_blocks=cfg.max_request_blocks,
    )


def rounds(
    cfg: Config, seed: int, indices: Iterable[int], *, sabotage: str = "", nursery: Nursery | None = None
) -> Iterator[Outcome]:
    """Plays rounds on one fleet of workers, which ends with the last of them, or with the first breach.

    sabotage: see `_worker_settings.SABOTAGES`; for tests. nursery: forks the workers; without one a new one does.

    Raises:
        TransportError: a rule was broken; says which, and how to play the round again.
    """
    limits = limits_of(cfg)
    settings = worker_settings(
        lease_s=cfg.lease_s,
        unclaimed_timeout_s=limits.unclaimed_timeout_s,
        quarantine_s=QUARANTINE_LEASES * cfg.lease_s,
        num_blocks=cfg.num_blocks,
        block_bytes=cfg.block_bytes,
        sabotage=sabotage,
    )
    with contextlib.ExitStack() as stack:
        nursery = nursery or stack.enter_context(Nursery(MODULE))
        fleet = Fleet(nursery, settings, num_holders=cfg.num_holders, num_initiators=cfg.num_initiators)
        stack.enter_context(fleet)
        for index in indices:
            plan = make_plan(seed, index, limits, holders=fleet.holders, initiators=fleet.initiators)
            yield Round(plan, fleet, limits).run()
        fleet.close()


def _of_case(outcomes: list[Outcome], case: tuple[str, str, str]) -> list[Outcome]:
    return [outcome for outcome in outcomes if (outcome.plan.fault, outcome.plan.moment, outcome.plan.side) == case]


def _row(case: tuple[str, str, str], outcomes: list[Outcome], cfg: Config) -> Row:
    fault, moment, side = case
    detection_s = [outcome.detection_s for outcome in outcomes]
    recovery_s = [outcome.recovery_s for outcome in outcomes]
    paths = Counter(f"{outcome.path} {outcome.plan.access}" for outcome in outcomes)
    return {
        "fault": fault,
        "moment": moment,
        "victim": side,
        "num_rounds": len(outcomes),
        "num_in_time": sum(outcome.in_time for outcome in outcomes),
        "num_acknowledged": sum(outcome.acknowledged is True for outcome in outcomes),
        "num_failed": sum(outcome.acknowledged is False for outcome in outcomes),
        "num_unknown": sum(outcome.acknowledged is None for outcome in outcomes),
        "num_checked": sum(outcome.num_checked for outcome in outcomes),
        "num_corrupted": sum(outcome.num_corrupted for outcome in outcomes),
        "num_lost": sum(outcome.num_lost for outcome in outcomes),
        "num_served_meanwhile": sum(outcome.num_served for outcome in outcomes),
        "num_retries_meanwhile": sum(outcome.num_retries for outcome in outcomes),
        "detection_median_s": median(detection_s),
        "detection_max_s": max(detection_s),
        "recovery_median_s": median(recovery_s),
        "recovery_max_s": max(recovery_s),
        "max_attempts": max(outcome.num_attempts for outcome in outcomes),
        "duration_median_s": median(outcome.duration_s for outcome in outcomes),
        "lease_s": cfg.lease_s,
        "paths": ", ".join(f"{path} {count}" for path, count in sorted(paths.items())),
    }


def plot(rows: pd.DataFrame) -> Figure:
    figure, axes = style.subplots(1, 2, panel_width_in=5.4, panel_height_in=3.6, sharey=True)
    colors = style.method_colors([KILL, STOP])
    lease_s = float(rows["lease_s"].iloc[0])
    for ax, victim in zip(axes[0], (HOLDER, INITIATOR), strict=True):
        for fault, shift in ((KILL, -0.12), (STOP, 0.12)):
            mine = rows[(rows["victim"] == victim) & (rows["fault"] == fault)]
            places = np.array([MOMENTS.index(moment) for moment in mine["moment"]]) + shift
            middle, top = mine["detection_median_s"].to_numpy(float), mine["detection_max_s"].to_numpy(float)
            ax.errorbar(
                places,
                middle,
                yerr=[np.zeros_like(middle), top - middle],
                linestyle="none",
                marker="o",
                capsize=4,
                color=colors[fault],
            )
        ax.axhline(lease_s, color=style.GREY, linestyle="--", linewidth=1)
        ax.set_title(f"the {victim} is the victim", fontsize=11)
        ax.set_xticks(range(len(MOMENTS)), [moment.replace(" ", "\n") for moment in MOMENTS], fontsize=8)
        ax.set(yscale="log", ylim=(None, 2.6 * lease_s), xlim=(-0.5, len(MOMENTS) - 0.5))
    axes[0, 0].set_ylabel("time until the survivor knew (s)\nmedian, and up to the maximum")
    axes[0, 0].text(-0.45, lease_s * 1.05, "lease", fontsize=8, color=style.GREY)
    axes[0, 1].axhline(UNCLAIMED_LEASES * lease_s, color=style.GREY, linestyle=":", linewidth=1)
    text = "blocks of a peer that never connects are freed"
    axes[0, 1].text(5.45, UNCLAIMED_LEASES * lease_s * 1.05, text, fontsize=8, color=style.GREY, ha="right")
    style.legend(figure, rows, method="fault", methods=[KILL, STOP])
    return figure


def compare(rows: pd.DataFrame) -> list[Comparison]:
    """Counts of rounds, and the slowest detection and recovery of each kind of fault."""
    total = int(rows["num_rounds"].sum())
    wrong = int((rows["num_lost"] + rows["num_corrupted"]).sum())
    checked = int(rows["num_checked"].sum())
    result = [
        Comparison(name="rounds played", paper=None, ours=total, unit="", note=f"{len(rows)} of {len(CASES)} cases"),
        Comparison(
            name="requests lost or corrupted",
            paper=None,
            ours=wrong,
            unit="",
            note=f"target: none; {checked} acknowledged ones were checked byte by byte",
        ),
    ]
    served, retries = (int(rows[f"num_{what}_meanwhile"].sum()) for what in ("served", "retries"))
    note = f"{retries} further tries, where the machine kept a process waiting for a whole lease"
    result.append(Comparison(name="requests others completed meanwhile", paper=None, ours=served, unit="", note=note))
    for fault in (KILL, STOP):
        mine = rows[rows["fault"] == fault]
        if len(mine):
            note = f"lease {mine['lease_s'].iloc[0]:g} s"
            result += [
                Comparison(
                    name=f"{fault}: slowest {what}",
                    paper=None,
                    ours=float(mine[f"{what}_max_s"].max()),
                    unit="s",
                    note=note,
                )
                for what in ("detection", "recovery")
            ]
    return result
