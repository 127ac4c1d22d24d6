"""The planner: from the lengths of a global batch to a plan for every device.

Samples are ordered, cut into micro-batches, balanced over replicas, scheduled, and given a communication plan. Every
choice is made by the best objective: partitions are ranked by their objective, the best few are scheduled, and the
fastest schedule wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmsys.core.errors import ConfigError, InfeasibleError, InputError
from llmsys.dynapipe.balance import karmarkar_karp
from llmsys.dynapipe.communication import plan_instructions
from llmsys.dynapipe.config import Attention, PlannerConfig, Recompute, first_decoder_stage, require_choices
from llmsys.dynapipe.costs import CostModel, MicroBatchCosts
from llmsys.dynapipe.microbatch import (
    PaddedLengths,
    Partition,
    explain_infeasible,
    fits_in_flight,
    group_shapes,
    partitions,
    varlen_partitions,
)
from llmsys.dynapipe.ordering import order_samples
from llmsys.dynapipe.plan import Estimate, MicroBatch, Plan, ReplicaPlan, check_plan
from llmsys.dynapipe.schedule import Schedule, find_schedule, pass_times, starting_orders
from llmsys.dynapipe.workload import Samples

# How many partitions are scheduled quickly, and how many of those thoroughly. More finds little: the objective
# already ranks well, and scheduling is most of the planning time.
_NUM_QUICK = 4
_NUM_THOROUGH = 2
# How much more the longest micro-batch counts in the cuts tried beside the plain objective's, when there are replicas
# to balance; 1 stands for the worst that greedy balancing can do.
_BALANCE_WEIGHTS = (0.3, 1.0)
# They are tried for recompute kinds whose plain objective is within this factor of the best.
_COMPETITIVE = 1.1
# A recompute kind is searched too when a starting order brings it within this factor of the best.
_WITHIN_REACH = 1.05


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Work:
    """Micro-batches and their costs under every recompute kind that may be chosen, one row for each micro-batch."""

    micro_batches: tuple[MicroBatch, ...]
    costs: Mapping[Recompute, MicroBatchCosts]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scheduled:
    """A replica with its schedule. ``choices``: costs under each recompute kind, one row for each micro-batch."""

    micro_batches: tuple[MicroBatch, ...]
    choices: Mapping[Recompute, MicroBatchCosts]
    recompute: Recompute
    schedule: Schedule

    @property
    def costs(self) -> MicroBatchCosts:
        """Costs under the kind that is used."""
        return self.choices[self.recompute]


class Planner(Protocol):
    """A way to schedule a global batch. DynaPipe and every baseline are one; ``make_plan`` makes its plans."""

    @property
    def name(self) -> str: ...

    @property
    def attention(self) -> Attention: ...

    def schedule(self, samples: Samples, cost_model: CostModel, config: PlannerConfig) -> list[Scheduled]:
        """The work of each replica. InfeasibleError when nothing fits, InputError for an unusable batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DynaPipe:
    """The paper's planner, with exact partitions and a choice of recomputation by the best outcome.

    ``attention``: "padded" micro-batches are the paper's. "varlen" ones concatenate their samples for kernels with
    variable-length attention, which the paper leaves to packing; partition, balance and schedule stay the same.
    """

    attention: Attention = "padded"

    def __post_init__(self) -> None:
        require_choices("attention", (self.attention,), Attention)

    @property
    def name(self) -> str:
        return "dynapipe" if self.attention == "padded" else "dynapipe_varlen"

    def schedule(self, samples: Samples, cost_model: CostModel, config: PlannerConfig) -> list[Scheduled]:
        padded = PaddedLengths.of(samples, encoder_decoder=cost_model.encoder_decoder, config=config)
        candidates = self.partitions(samples, padded, cost_model, config)
        quick = self._quick(candidates[:_NUM_QUICK], samples, padded, cost_model, config)
        # Where memory is tight the best cuts may need more of it at once than any allowed schedule leaves.
        for candidate in candidates[_NUM_QUICK:]:
            quick = quick or self._quick([candidate], samples, padded, cost_model, config)
        if not quick:
            priced = self._price([candidates[0].groups], samples, padded, cost_model, config)
            raise no_schedule_error(priced[0], cost_model, config)
        quick.sort(key=slowest_ms)
        if config.reorder == "none":
            return quick[0]
        # A quarter of the moves tells the best few apart, the rest goes to the winner.
        trial = config.max_moves // 4
        best = min((improve(r, cost_model, config, trial) for r in quick[:_NUM_THOROUGH]), key=slowest_ms)
        return improve(best, cost_model, config, config.max_moves - trial, go_on=True)

    def _quick(
        self,
        candidates: Sequence[Partition],
        samples: Samples,
        padded: PaddedLengths,
        cost_model: CostModel,
        config: PlannerConfig,
    ) -> list[list[Scheduled]]:
        """A schedule of each candidate that has one, in the given order of micro-batches.

        That order tells partitions apart well enough; sometimes only another one fits.
        """
        plain = replace(config, reorder="none")
        quick: list[list[Scheduled]] = []
        priced = self._price([c.groups for c in candidates], samples, padded, cost_model, config)
        for rank, (candidate, work) in enumerate(zip(candidates, priced, strict=True)):
            parts = balance(work.costs, cost_model.parallelism.data, candidate.recompute)
            replicas = schedule_parts(work, parts, cost_model, plain)
            as_meant = replicas and all(replica.recompute == candidate.recompute for replica in replicas)
            if config.reorder != "none" and (replicas is None or (rank == 0 and not as_meant)):
                # Without its own kind the best partition lost what made it the best.
                kinds = work.costs if replicas is None else {candidate.recompute: work.costs[candidate.recompute]}
                again = schedule_parts(replace(work, costs=kinds), parts, cost_model, config)
                if again and (replicas is None or slowest_ms(again) < slowest_ms(replicas)):
                    replicas = again
            if replicas is not None:
                quick.append(replicas)
        return quick

    def partitions(
        self, samples: Samples, padded: PaddedLengths, cost_model: CostModel, config: PlannerConfig
    ) -> list[Partition]:
        """Partitions over all recompute kinds, numbers in flight and weights; distinct, best first."""
        parallelism = cost_model.parallelism
        order = order_samples(padded.encoder_len, padded.decoder_len, config)
        uneven = (parallelism.data - 1) / parallelism.data  # of the longest micro-batch, the most that cannot be shared
        extra = tuple(weight * uneven for weight in _BALANCE_WEIGHTS) if uneven else ()
        found: dict[tuple[tuple[int, ...], ...], Partition] = {}
        for recompute in config.recompute:
            cutoff_ms = _COMPETITIVE * min((p.objective_ms for p in found.values()), default=np.inf)
            for candidate in self._cut(samples, padded, order, cost_model, config, recompute, extra, cutoff_ms):
                known = found.get(candidate.groups)
                if known is None or candidate.objective_ms < known.objective_ms:
                    found[candidate.groups] = candidate
        if not found:
            raise explain_infeasible(samples, padded, cost_model, config, varlen=self.attention == "varlen")
        return sorted(found.values(), key=lambda p: _balanced_ms(p, cost_model))

    def _cut(
        self,
        samples: Samples,
        padded: PaddedLengths,
        order: NDArray[np.int64],
        cost_model: CostModel,
        config: PlannerConfig,
        recompute: Recompute,
        extra: Sequence[float],
        cutoff_ms: float,
    ) -> list[Partition]:
        """Cuts into micro-batches of which one must fit a device at once, and of which 1F1B's number must.

        The first may be larger, and leave it to the schedule how many it can hold.
        """
        depth = cost_model.parallelism.pipeline
        if self.attention == "varlen":
            return varlen_partitions(samples, order, cost_model, config, recompute, (1, depth), extra, cutoff_ms)
        made = partitions(padded, order, cost_model, config, recompute, 1, extra, cutoff_ms)
        # The others' longest micro-batches are no longer.
        if made and fits_in_flight(made[0], padded, cost_model, config, depth):
            return made
        return made + partitions(padded, order, cost_model, config, recompute, depth, extra, cutoff_ms)

    def _price(
        self,
        partitions: Sequence[Sequence[tuple[int, ...]]],
        samples: Samples,
        padded: PaddedLengths,
        cost_model: CostModel,
        config: PlannerConfig,
    ) -> list[Work]:
        """The micro-batches of each partition and their costs."""
        if self.attention == "padded":
            return price_padded(partitions, padded, cost_model, config)
        extra = config.decoder_extra_tokens if cost_model.encoder_decoder else 0
        result = []
        for groups in partitions:
            groups = with_enough_groups(groups, cost_model.parallelism.data)
            encoder_len = [samples.encoder_len[list(group)] for group in groups]
            decoder_len = [samples.decoder_len[list(group)] + extra for group in groups]
            micro_batches = tuple(
                MicroBatch(rows=(group,), encoder_len=int(encoder.sum()), decoder_len=int(decoder.sum()))
                for group, encoder, decoder in zip(groups, encoder_len, decoder_len, strict=True)
            )
            costs = {kind: cost_model.varlen_costs(encoder_len, decoder_len, kind) for kind in config.recompute}
            result.append(Work(micro_batches=micro_batches, costs=costs))
        return result


def _balanced_ms(made: Partition, cost_model: CostModel) -> float:
    """The objective with the sum of the fullest replica instead of the mean: what to rank partitions by."""
    parallelism = cost_model.parallelism
    parts = karmarkar_karp(made.times_ms, parallelism.data)
    fullest = max(sum(made.times_ms[i] for i in part) for part in parts)
    return (parallelism.pipeline - 1) / parallelism.num_chunks * max(made.times_ms) + fullest


def plan_iteration(samples: Samples, cost_model: CostModel, config: PlannerConfig) -> Plan:
    """DynaPipe's plan of one training iteration of a global batch. Same arguments, same plan.

    Raises InputError for an empty batch or fewer samples than replicas, InfeasibleError naming the sample that fits
    nowhere or saying how much memory is missing.
    """
    return make_plan(DynaPipe(), samples, cost_model, config)


def make_plan(planner: Planner, samples: Samples, cost_model: CostModel, config: PlannerConfig) -> Plan:
    """Any planner's plan of one training iteration."""
    check_batch(samples, cost_model)
    replicas = planner.schedule(samples, cost_model, config)
    return assemble(planner, len(samples), replicas, cost_model, config)


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


def with_enough_groups(groups: Sequence[tuple[int, ...]], num_replicas: int) -> tuple[tuple[int, ...], ...]:
    """Halve the largest groups until every replica can get one. Smaller micro-batches need no more memory."""
    result = list(groups)
    while len(result) < num_replicas:
        largest = max(range(len(result)), key=lambda i: len(result[i]))
        group = result[largest]
        half = len(group) // 2
        result[largest : largest + 1] = [group[:half], group[half:]]
    return tuple(result)


def price_padded(
    partitions: Sequence[Sequence[tuple[int, ...]]],
    padded: PaddedLengths,
    cost_model: CostModel,
    config: PlannerConfig,
) -> list[Work]:
    """Pad the groups of several partitions to micro-batches, and price them all in one go."""
    chosen = [with_enough_groups(groups, cost_model.parallelism.data) for groups in partitions]
    shapes = np.concatenate([group_shapes(groups, padded) for groups in chosen])
    costs = {kind: cost_model.micro_batch_costs(shapes, kind) for kind in config.recompute}
    result = []
    begin = 0
    for groups in chosen:
        part = np.arange(begin, begin + len(groups))
        begin += len(groups)
        micro_batches = tuple(
            MicroBatch(rows=tuple((sample,) for sample in group), encoder_len=encoder_len, decoder_len=decoder_len)
            for group, (_, encoder_len, decoder_len) in zip(groups, shapes[part].tolist(), strict=True)
        )
        result.append(
            Work(micro_batches=micro_batches, costs={kind: priced.select(part) for kind, priced in costs.items()})
        )
    return result


def schedule_work(work: Work, cost_model: CostModel, config: PlannerConfig) -> list[Scheduled] | None:
    """Balance micro-batches over the replicas and schedule each; None when some replica has no feasible schedule."""
    return schedule_parts(work, balance(work.costs, cost_model.parallelism.data), cost_model, config)


def balance(
    costs: Mapping[Recompute, MicroBatchCosts], num_replicas: int, kind: Recompute | None = None
) -> list[list[int]]:
    """Micro-batches of each replica, with equal times as far as possible.

    A micro-batch counts with its time under ``kind``, the one it was made for; by default under its cheapest, since
    replicas may end up with different kinds.
    """
    chosen = costs.values() if kind is None else (costs[kind],)
    times = np.stack([(c.forward_ms + c.backward_ms).max(axis=1) for c in chosen]).min(axis=0)
    # A micro-batch that fits no kind makes the schedule fail later; here it only must not upset the sums.
    return karmarkar_karp(np.where(np.isfinite(times), times, 0.0).tolist(), num_replicas)


def schedule_parts(
    work: Work,
    parts: Sequence[Sequence[int]],
    cost_model: CostModel,
    config: PlannerConfig,
) -> list[Scheduled] | None:
    """Schedule each replica's part; None when some replica has no feasible schedule."""
    replicas = []
    for part in parts:
        choices = {recompute: chosen.select(part) for recompute, chosen in work.costs.items()}
        best = schedule_replica(tuple(work.micro_batches[i] for i in part), choices, cost_model, config)
        if best is None:
            return None
        replicas.append(best)
    return replicas


def schedule_replica(
    micro_batches: tuple[MicroBatch, ...],
    costs: Mapping[Recompute, MicroBatchCosts],
    cost_model: CostModel,
    config: PlannerConfig,
) -> Scheduled | None:
    """The fastest feasible schedule of one replica over its recompute kinds."""
    best: Scheduled | None = None
    for recompute, chosen in costs.items():
        free_mb = free_memory_mb(cost_model, config, recompute)
        if not chosen.feasible.all() or (free_mb <= 0).any():
            continue
        found = find_schedule(chosen, cost_model.parallelism.pipeline, free_mb, config, max_moves=0)
        if found is None or not found.feasible:
            continue
        if best is None or found.makespan_ms < best.schedule.makespan_ms:
            best = Scheduled(micro_batches=micro_batches, choices=costs, recompute=recompute, schedule=found)
    return best


def improve(
    replicas: Sequence[Scheduled], cost_model: CostModel, config: PlannerConfig, max_moves: int, *, go_on: bool = False
) -> list[Scheduled]:
    """Search for better schedules of each replica, as ``config.reorder`` allows.

    From the reordering's starting orders, also under other recompute kinds that come close with one of them; or, if
    ``go_on``, from the schedules at hand.
    """
    if go_on and (config.reorder != "search" or max_moves == 0):
        return list(replicas)
    result = []
    for replica in replicas:
        best = replica
        at_hand = np.array([replica.schedule.permutation], dtype=np.int64)
        starts = at_hand if go_on else starting_orders(replica.costs, config)
        for kind in (replica.recompute,) if go_on else _close_kinds(replica, starts, cost_model, config):
            found = find_schedule(
                replica.choices[kind],
                cost_model.parallelism.pipeline,
                free_memory_mb(cost_model, config, kind),
                config,
                max_moves=max_moves,
                starts=starts,
            )
            if found is not None and found.feasible and found.makespan_ms < best.schedule.makespan_ms:
                best = replace(replica, recompute=kind, schedule=found)
        result.append(best)
    return result


def _close_kinds(
    replica: Scheduled, starts: NDArray[np.int64], cost_model: CostModel, config: PlannerConfig
) -> list[Recompute]:
    """The replica's recompute kind, and those that some starting order brings within reach of it."""
    num_devices = cost_model.parallelism.pipeline
    reach_ms = _WITHIN_REACH * replica.schedule.makespan_ms
    kinds = [replica.recompute]
    for kind, costs in replica.choices.items():
        free_mb = free_memory_mb(cost_model, config, kind)
        if kind == replica.recompute or not costs.feasible.all() or (free_mb <= 0).any():
            continue
        work_ms = (costs.forward_ms + costs.backward_ms).sum(axis=0)
        busiest_ms = max(work_ms[device::num_devices].sum() for device in range(num_devices))
        if busiest_ms >= replica.schedule.makespan_ms:
            continue
        found = find_schedule(costs, num_devices, free_mb, config, max_moves=0, starts=starts)
        if found is not None and found.feasible and found.makespan_ms < reach_ms:
            kinds.append(kind)
    return kinds


def free_memory_mb(cost_model: CostModel, config: PlannerConfig, recompute: Recompute) -> NDArray[np.float64]:
    """Memory left for activations on each pipeline device."""
    limits = np.array(config.device_limits_mb(cost_model.parallelism.pipeline))
    return limits - cost_model.state_mb(recompute)


def slowest_ms(replicas: Sequence[Scheduled]) -> float:
    """Expected time of an iteration: that of its slowest replica."""
    return max(replica.schedule.makespan_ms for replica in replicas)


def assemble(
    planner: Planner, num_samples: int, replicas: Sequence[Scheduled], cost_model: CostModel, config: PlannerConfig
) -> Plan:
    """The plan of scheduled replicas, checked."""
    stages = cost_model.stages
    input_stages = frozenset({0, first_decoder_stage(stages)})
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
        planner=planner.name,
        num_samples=num_samples,
        parallelism=cost_model.parallelism,
        stages=stages,
        memory_limit_mb=tuple(float(x) for x in config.device_limits_mb(cost_model.parallelism.pipeline)),
        attention=planner.attention,
        decoder_extra_tokens=config.decoder_extra_tokens if cost_model.encoder_decoder else 0,
        replicas=tuple(plans),
    )
    check_plan(plan)
    return plan


def no_schedule_error(work: Work, cost_model: CostModel, config: PlannerConfig) -> InfeasibleError:
    """Why ``work`` cannot be scheduled: beyond the profile, or too little memory."""
    limits = config.device_limits_mb(cost_model.parallelism.pipeline)
    uncovered = ~np.logical_or.reduce([costs.feasible for costs in work.costs.values()])
    if uncovered.any():
        index = int(uncovered.argmax())
        return InfeasibleError(
            f"the profile does not cover micro-batch {index}",
            expected=f"rows of encoder length up to {cost_model.max_lengths[0]} and decoder length up to "
            f"{cost_model.max_lengths[1]}, in numbers that were measured",
            found=f"(rows, encoder length, decoder length) = {work.micro_batches[index].shape}",
            fix="lower max_len or micro_batch_size, or profile longer sequences",
        )
    return InfeasibleError(
        "no schedule keeps the activations within memory",
        expected=f"at most {min(limits):.0f} MB a device",
        found=f"{cost_model.parallelism.label()}, schedules {', '.join(config.schedules)}, recompute "
        f"{', '.join(config.recompute)}",
        fix="raise memory_limit_mb, pipeline or tensor, or allow more schedules and kinds of recompute",
    )
