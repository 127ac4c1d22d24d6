"""The planner: from the lengths of a global batch to a plan for every device (paper sections 3 to 6).

Samples are ordered, cut into micro-batches, balanced over replicas, scheduled, and given a communication plan. Every
choice is made by the best objective: partitions are ranked by their objective, the best few are scheduled, and the
fastest schedule wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmsys.core.errors import ConfigError, InfeasibleError, InputError
from llmsys.dynapipe.balance import karmarkar_karp
from llmsys.dynapipe.communication import plan_instructions
from llmsys.dynapipe.config import PlannerConfig, Recompute
from llmsys.dynapipe.costs import CostModel, MicroBatchCosts
from llmsys.dynapipe.microbatch import (
    PaddedLengths,
    Partition,
    explain_infeasible,
    fits_share,
    group_shapes,
    partition,
)
from llmsys.dynapipe.ordering import order_samples
from llmsys.dynapipe.plan import Estimate, MicroBatch, Plan, ReplicaPlan, check_plan
from llmsys.dynapipe.schedule import Schedule, find_schedule, pass_times
from llmsys.dynapipe.workload import Samples

# How many partitions are scheduled quickly, and how many of those thoroughly. More finds little: the objective
# already ranks well, and scheduling is most of the planning time.
_NUM_QUICK = 4
_NUM_THOROUGH = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scheduled:
    """A replica with its schedule. ``costs`` has one row for each of ``micro_batches``."""

    micro_batches: tuple[MicroBatch, ...]
    costs: MicroBatchCosts
    recompute: Recompute
    schedule: Schedule


def plan_iteration(samples: Samples, cost_model: CostModel, config: PlannerConfig) -> Plan:
    """Plan one training iteration of a global batch. Same arguments, same plan.

    Raises InputError for an empty batch or fewer samples than replicas, InfeasibleError naming the sample that fits
    nowhere or saying how much memory is missing.
    """
    check_batch(samples, cost_model)
    padded = PaddedLengths.of(samples, encoder_decoder=cost_model.encoder_decoder, config=config)
    partitions = _best_partitions(samples, padded, cost_model, config)
    quick = [(p, schedule_groups(p.groups, padded, cost_model, config, max_moves=0)) for p in partitions]
    quick = [(p, replicas) for p, replicas in quick if replicas is not None]
    if not quick:
        raise no_schedule_error(cost_model, config)
    quick.sort(key=lambda entry: slowest_ms(entry[1]))
    best = quick[0][1]
    if config.reorder == "search" and config.max_moves > 0:
        thorough = [improve(replicas, cost_model, config) for _, replicas in quick[:_NUM_THOROUGH] if replicas]
        best = min(thorough, key=slowest_ms)
    assert best is not None
    return assemble("dynapipe", len(samples), best, cost_model, config)


def check_batch(samples: Samples, cost_model: CostModel) -> None:
    """Refuse batches that no planner can serve."""
    if len(samples) == 0:
        raise InputError(
            "the global batch is empty",
            expected="at least one sample a replica",
            found="0 samples",
            fix="raise tokens_per_batch or check the workload",
        )
    if len(samples) < cost_model.parallelism.data:
        raise InputError(
            "there are fewer samples than replicas",
            expected=f"at least {cost_model.parallelism.data} samples, one for each replica",
            found=f"{len(samples)} samples",
            fix="lower parallelism.data or raise tokens_per_batch",
        )
    if cost_model.encoder_decoder != bool(samples.encoder_len.any()):
        raise ConfigError(
            "the samples are of another kind than the model",
            expected=f"samples for a {cost_model.model.architecture} model",
            found=f"encoder lengths up to {samples.encoder_len.max()}",
            fix="build the samples for the model's architecture",
        )


def _best_partitions(
    samples: Samples, padded: PaddedLengths, cost_model: CostModel, config: PlannerConfig
) -> list[Partition]:
    """Partitions over all recompute kinds and memory shares; distinct, best objective first."""
    depth = cost_model.parallelism.pipeline
    order = order_samples(padded.encoder_len, padded.decoder_len, config)
    found: dict[tuple[tuple[int, ...], ...], Partition] = {}
    for recompute in config.recompute:
        # One share a device lets 1F1B keep as many micro-batches in flight as it wants; the whole memory allows
        # larger micro-batches and leaves it to the schedule how many it can hold.
        made = partition(padded, order, cost_model, config, recompute, 1.0)
        share = 1.0 / depth
        if made is not None and not fits_share(made, padded, cost_model, config, share):
            _keep_better(found, made)
            made = partition(padded, order, cost_model, config, recompute, share)
        if made is not None:
            _keep_better(found, made)
    if not found:
        raise explain_infeasible(samples, padded, cost_model, config)
    return sorted(found.values(), key=lambda p: p.objective_ms)[:_NUM_QUICK]


def _keep_better(found: dict[tuple[tuple[int, ...], ...], Partition], made: Partition) -> None:
    known = found.get(made.groups)
    if known is None or made.objective_ms < known.objective_ms:
        found[made.groups] = made


def with_enough_groups(groups: Sequence[tuple[int, ...]], num_replicas: int) -> tuple[tuple[int, ...], ...]:
    """Halve the largest groups until every replica can get one. Smaller micro-batches need no more memory."""
    result = list(groups)
    while len(result) < num_replicas:
        largest = max(range(len(result)), key=lambda i: len(result[i]))
        group = result[largest]
        half = len(group) // 2
        result[largest : largest + 1] = [group[:half], group[half:]]
    return tuple(result)


def schedule_groups(
    groups: Sequence[tuple[int, ...]],
    padded: PaddedLengths,
    cost_model: CostModel,
    config: PlannerConfig,
    *,
    max_moves: int,
) -> list[Scheduled] | None:
    """Balance groups over the replicas and schedule each; None when some replica has no feasible schedule."""
    parallelism = cost_model.parallelism
    groups = with_enough_groups(groups, parallelism.data)
    shapes = group_shapes(tuple(groups), padded)
    costs = {recompute: cost_model.micro_batch_costs(shapes, recompute) for recompute in config.recompute}
    # Replicas may end up with different recompute kinds; the cheapest feasible one is what a micro-batch will cost.
    per_stage = np.stack([(c.forward_ms + c.backward_ms).max(axis=1) for c in costs.values()])
    parts = karmarkar_karp(per_stage.min(axis=0).tolist(), parallelism.data)
    replicas = []
    for part in parts:
        micro_batches = tuple(
            MicroBatch(
                rows=tuple((sample,) for sample in groups[i]),
                encoder_len=int(shapes[i, 1]),
                decoder_len=int(shapes[i, 2]),
            )
            for i in part
        )
        choices = {recompute: costs[recompute].select(part) for recompute in config.recompute}
        best = schedule_replica(micro_batches, choices, cost_model, config, max_moves=max_moves)
        if best is None:
            return None
        replicas.append(best)
    return replicas


def schedule_replica(
    micro_batches: tuple[MicroBatch, ...],
    costs: dict[Recompute, MicroBatchCosts],
    cost_model: CostModel,
    config: PlannerConfig,
    *,
    max_moves: int,
) -> Scheduled | None:
    """The fastest feasible schedule of one replica over its recompute kinds."""
    best: Scheduled | None = None
    for recompute, chosen in costs.items():
        free_mb = free_memory_mb(cost_model, config, recompute)
        if not chosen.feasible.all() or (free_mb <= 0).any():
            continue
        found = find_schedule(chosen, cost_model.parallelism.pipeline, free_mb, config, max_moves=max_moves)
        if found is None or not found.feasible:
            continue
        if best is None or found.makespan_ms < best.schedule.makespan_ms:
            best = Scheduled(micro_batches=micro_batches, costs=chosen, recompute=recompute, schedule=found)
    return best


def improve(replicas: Sequence[Scheduled], cost_model: CostModel, config: PlannerConfig) -> list[Scheduled]:
    """Search on from each replica's schedule, with its recompute kind."""
    result = []
    for replica in replicas:
        free_mb = free_memory_mb(cost_model, config, replica.recompute)
        found = find_schedule(
            replica.costs,
            cost_model.parallelism.pipeline,
            free_mb,
            config,
            max_moves=config.max_moves,
            starts=np.array([replica.schedule.permutation], dtype=np.int64),
        )
        better = found if found is not None and found.feasible else replica.schedule
        result.append(
            Scheduled(
                micro_batches=replica.micro_batches,
                costs=replica.costs,
                recompute=replica.recompute,
                schedule=better,
            )
        )
    return result


def free_memory_mb(cost_model: CostModel, config: PlannerConfig, recompute: Recompute) -> NDArray[np.float64]:
    """Memory left for activations on each pipeline device."""
    limits = np.array(config.device_limits_mb(cost_model.parallelism.pipeline))
    return limits - cost_model.state_mb(recompute)


def slowest_ms(replicas: Sequence[Scheduled] | None) -> float:
    return max(replica.schedule.makespan_ms for replica in replicas) if replicas else float("inf")


def assemble(
    planner: str, num_samples: int, replicas: Sequence[Scheduled], cost_model: CostModel, config: PlannerConfig
) -> Plan:
    """The plan of scheduled replicas, checked."""
    stages = cost_model.stages
    first_decoder = next(v for v, stage in enumerate(stages) if stage.num_decoder > 0)
    input_stages = frozenset({0, first_decoder})
    plans = []
    for replica in replicas:
        state = cost_model.state_mb(replica.recompute)
        schedule = replica.schedule
        plans.append(
            ReplicaPlan(
                micro_batches=replica.micro_batches,
                recompute=replica.recompute,
                schedule=schedule.kind,
                estimate=Estimate(
                    makespan_ms=schedule.makespan_ms,
                    peak_mb=tuple(float(s + p) for s, p in zip(state, schedule.peak_mb, strict=True)),
                ),
                instructions=plan_instructions(
                    schedule.orders, pass_times(schedule, replica.costs), replica.costs, input_stages
                ),
            )
        )
    plan = Plan(
        planner=planner,
        num_samples=num_samples,
        parallelism=cost_model.parallelism,
        stages=stages,
        memory_limit_mb=tuple(float(x) for x in config.device_limits_mb(cost_model.parallelism.pipeline)),
        replicas=tuple(plans),
    )
    check_plan(plan)
    return plan


def no_schedule_error(cost_model: CostModel, config: PlannerConfig) -> InfeasibleError:
    limits = config.device_limits_mb(cost_model.parallelism.pipeline)
    return InfeasibleError(
        "no schedule keeps the activations within memory",
        expected=f"at most {min(limits):.0f} MB a device",
        found=f"{cost_model.parallelism.label()}, schedules {', '.join(config.schedules)}, recompute "
        f"{', '.join(config.recompute)}",
        fix="raise memory_limit_mb, pipeline or tensor, or allow the adaptive schedule and recompute 'full'",
    )
