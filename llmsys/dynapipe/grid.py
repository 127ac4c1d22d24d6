"""Grid search over parallelism, planner settings and recomputation: every system is compared at its best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from llmsys.core.errors import ConfigError, InfeasibleError, InputError
from llmsys.dynapipe.config import Parallelism, PlannerConfig, Recompute
from llmsys.dynapipe.costs import CostModel
from llmsys.dynapipe.planner import Planner, check_batch, slowest_ms
from llmsys.dynapipe.workload import Samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One point of a grid. ``recompute`` holds the kinds the planner may choose from in every iteration."""

    parallelism: Parallelism
    planner: Planner
    recompute: tuple[Recompute, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The best option: mean expected iteration time over the batches, gradient all-reduce included."""

    option: Option
    iteration_ms: float
    num_feasible: int
    num_tried: int


def search_grid(
    options: Iterable[Option],
    batches: Sequence[Samples],
    cost_model_of: Callable[[Parallelism], CostModel],
    config: PlannerConfig,
) -> Choice | None:
    """The fastest option that can run every batch; None when none can (out of memory).

    Times are the planner's own estimates, which equal the simulator's. A ``cost_model_of`` that raises ConfigError or
    InfeasibleError (too few layers, not profiled) rules its options out, as fewer samples than replicas do. InputError
    for no batches or a batch that no option can serve, such as one with a sample longer than a packed row.
    """
    if not batches:
        raise InputError(
            "a grid search without batches", expected="at least one global batch", found="none", fix="raise num_batches"
        )
    best: tuple[float, Option] | None = None
    models: dict[Parallelism, CostModel | None] = {}
    num_tried = num_feasible = 0
    for option in options:
        num_tried += 1
        if option.parallelism not in models:
            try:
                models[option.parallelism] = cost_model_of(option.parallelism)
            except (ConfigError, InfeasibleError):
                models[option.parallelism] = None
        model = models[option.parallelism]
        time_ms = None if model is None else _mean_ms(option, batches, model, config)
        if time_ms is None:
            continue
        num_feasible += 1
        if best is None or time_ms < best[0]:
            best = (time_ms, option)
    if best is None:
        return None
    return Choice(option=best[1], iteration_ms=best[0], num_feasible=num_feasible, num_tried=num_tried)


def _mean_ms(option: Option, batches: Sequence[Samples], model: CostModel, config: PlannerConfig) -> float | None:
    chosen = replace(config, recompute=option.recompute)
    total = 0.0
    for samples in batches:
        if len(samples) < model.parallelism.data:
            return None
        check_batch(samples, model)
        try:
            replicas = option.planner.schedule(samples, model, chosen)
        except InfeasibleError:
            return None
        total += slowest_ms(replicas) + max(model.grad_sync_ms(replica.recompute) for replica in replicas)
    return total / len(batches)
