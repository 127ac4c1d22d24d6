"""Pipeline scheduling of one replica: which schedule, and in which order its micro-batches run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmsys import _C
from llmsys.dynapipe.communication import PassTimes
from llmsys.dynapipe.config import PlannerConfig, ScheduleKind
from llmsys.dynapipe.costs import MicroBatchCosts

IntArray = NDArray[np.int64]

_MANY_MICRO_BATCHES = 20  # above this the paper's search uses one cluster less, since orders grow as a factorial
_KMEANS_ROUNDS = 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Schedule:
    """A schedule of one replica and what it is expected to take.

    ``orders``: rows (micro-batch, stage, backward) for each device. ``peak_mb``: activations only, for each device.
    ``overflow_mb``: by how much it passes the limit; 0 when feasible.
    """

    kind: ScheduleKind
    permutation: tuple[int, ...]
    orders: tuple[NDArray[np.int32], ...]
    makespan_ms: float
    peak_mb: tuple[float, ...]
    overflow_mb: float

    @property
    def feasible(self) -> bool:
        return self.overflow_mb == 0.0


def find_schedule(
    costs: MicroBatchCosts,
    num_devices: int,
    free_mb: NDArray[np.float64],
    config: PlannerConfig,
    *,
    max_moves: int,
    starts: IntArray | None = None,
) -> Schedule | None:
    """The fastest schedule found that keeps activations within ``free_mb``, shape (devices,).

    An infeasible one when none fits, with its overflow; None when no schedule completes at all. ``starts``: orders to
    begin from instead of those that ``config.reorder`` asks for, shape (orders, micro-batches).
    """
    if starts is None:
        starts = starting_orders(costs, config)
    result = _C.search_schedule(
        costs.columns(),
        num_devices,
        config.schedules,
        starts,
        np.ascontiguousarray(free_mb, dtype=np.float64),
        config.max_in_flight,
        max_moves if config.reorder == "search" else 0,
        config.seed,
    )
    if not np.isfinite(result["overflow_mb"]):
        return None
    return Schedule(
        kind="1f1b" if result["kind"] == "1f1b" else "adaptive",
        permutation=tuple(result["permutation"].tolist()),
        orders=tuple(result["orders"]),
        makespan_ms=result["makespan_ms"],
        peak_mb=tuple(result["peak_mb"].tolist()),
        overflow_mb=result["overflow_mb"],
    )


def pass_times(schedule: Schedule, costs: MicroBatchCosts) -> PassTimes:
    """When each pass and each transfer of a schedule starts."""
    result = _C.replay(costs.columns(), len(schedule.orders), schedule.orders)
    return PassTimes(start_ms=result["start_ms"], send_start_ms=result["send_start_ms"])


def starting_orders(costs: MicroBatchCosts, config: PlannerConfig) -> IntArray:
    """Orders of the micro-batches to begin from, shape (orders, M); the given order is the first.

    The paper's: micro-batches are clustered by their times on the first and last stage, and every order of the
    clusters is tried, with their members shuffled. Few micro-batches are permuted one by one.
    """
    num_micro_batches = len(costs.forward_ms)
    identity = np.arange(num_micro_batches, dtype=np.int64)
    if config.reorder == "none" or num_micro_batches < 2:
        return identity[None, :]
    num_clusters = 3 if num_micro_batches > _MANY_MICRO_BATCHES else 4
    rng = np.random.default_rng(config.seed)
    if num_micro_batches <= num_clusters:
        groups = [identity[i : i + 1] for i in range(num_micro_batches)]
    else:
        labels = _cluster(costs, num_clusters)
        groups = [rng.permutation(identity[labels == label]) for label in np.unique(labels)]
    orders = [identity]
    orders += [np.concatenate(chosen) for chosen in itertools.permutations(groups)]
    return np.stack(orders)


def _cluster(costs: MicroBatchCosts, num_clusters: int) -> IntArray:
    """Lloyd's k-means on (forward first, forward last, backward first, backward last) times, from fixed quantiles."""
    features = np.stack(
        [costs.forward_ms[:, 0], costs.forward_ms[:, -1], costs.backward_ms[:, 0], costs.backward_ms[:, -1]], axis=1
    )
    by_total = np.argsort(features.sum(axis=1), kind="stable")
    picks = by_total[np.linspace(0, len(by_total) - 1, num_clusters).round().astype(int)]
    centres = features[picks]
    labels = np.zeros(len(features), dtype=np.int64)
    for _ in range(_KMEANS_ROUNDS):
        distances = ((features[:, None, :] - centres[None, :, :]) ** 2).sum(axis=2)
        new_labels = distances.argmin(axis=1)
        if (new_labels == labels).all():
            break
        labels = new_labels
        for k in np.unique(labels):
            centres[k] = features[labels == k].mean(axis=0)
    return labels
