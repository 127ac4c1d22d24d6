"""The simulator: runs a plan's instruction lists on lanes with modelled durations.

It reads only the plan and the cost model, not what the planner expected, and shares no code with the planner's own
estimate; tests hold the two equal.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from llmsys.core.errors import InfeasibleError, InputError
from llmsys.core.sim import LaneOp, run_lanes
from llmsys.core.timeline import Timeline
from llmsys.dynapipe.costs import CostModel, MicroBatchCosts
from llmsys.dynapipe.plan import Plan
from llmsys.dynapipe.plan.instructions import (
    FINISHES,
    SENDS,
    BackwardPass,
    ForwardPass,
    Instruction,
    RecvActivationFinish,
    RecvGradFinish,
    SendActivationFinish,
    SendActivationStart,
)
from llmsys.dynapipe.workload import Samples


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplicaResult:
    """One replica's run. ``peak_mb`` and ``bubble_fraction`` have one entry for each pipeline device."""

    timeline: Timeline
    makespan_ms: float
    peak_mb: tuple[float, ...]
    bubble_fraction: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimulationResult:
    """``iteration_ms`` is the slowest replica plus ``grad_sync_ms``, the gradients' all-reduce (0 if left out)."""

    replicas: tuple[ReplicaResult, ...]
    iteration_ms: float
    grad_sync_ms: float

    @property
    def makespan_ms(self) -> float:
        """The slowest replica, without the gradients' all-reduce."""
        return max(replica.makespan_ms for replica in self.replicas)

    @property
    def peak_mb(self) -> float:
        return max(max(replica.peak_mb) for replica in self.replicas)

    @property
    def bubble_fraction(self) -> float:
        return float(np.mean([replica.bubble_fraction for replica in self.replicas]))


def simulate(
    plan: Plan, cost_model: CostModel, *, samples: Samples | None = None, grad_sync: bool = False
) -> SimulationResult:
    """Run a plan. ``samples``, the planned batch, is needed when the plan's attention is "varlen".

    Raises InfeasibleError when the profile does not cover a micro-batch, PlanError on a deadlock.

    Memory above the limit is reported in ``peak_mb``, not refused. Rules: a pass starts when its device is free, all
    waits listed before it are over; a device sends one result after the other while it computes; waits for arrived
    data and posts take no time. The timeline of replica r has lanes "replica r/device d" and ".../device d send".
    """
    if plan.parallelism != cost_model.parallelism or plan.stages != cost_model.stages:
        raise InputError(
            "the plan was made for another model or another split",
            expected=f"{plan.parallelism.label()}, stages {plan.stages}",
            found=f"{cost_model.parallelism.label()}, stages {cost_model.stages}",
            fix="simulate with the cost model that the plan was made with",
        )
    replicas = tuple(_simulate_replica(number, plan, cost_model, samples) for number in range(len(plan.replicas)))
    sync_ms = max(cost_model.grad_sync_ms(replica.recompute) for replica in plan.replicas) if grad_sync else 0.0
    slowest = max(replica.makespan_ms for replica in replicas)
    return SimulationResult(replicas=replicas, iteration_ms=slowest + sync_ms, grad_sync_ms=sync_ms)


def replica_costs(plan: Plan, number: int, cost_model: CostModel, samples: Samples | None = None) -> MicroBatchCosts:
    """Costs of a replica's micro-batches; InfeasibleError names the first that the profile does not cover."""
    replica = plan.replicas[number]
    if plan.attention == "varlen":
        if samples is None or len(samples) != plan.num_samples:
            raise InputError(
                "variable-length attention costs what its samples' lengths say",
                expected=f"the {plan.num_samples} samples that were planned",
                found="none" if samples is None else f"{len(samples)} samples",
                fix="pass samples to simulate",
            )
        indices = [np.array(m.samples, dtype=np.int64) for m in replica.micro_batches]
        extra = plan.decoder_extra_tokens
        return cost_model.varlen_costs(
            [samples.encoder_len[index] for index in indices],
            [samples.decoder_len[index] + extra for index in indices],
            replica.recompute,
        )
    costs = cost_model.micro_batch_costs(replica.shapes(), replica.recompute)
    if not costs.feasible.all():
        index = int(np.argmin(costs.feasible))
        raise InfeasibleError(
            f"the profile does not cover micro-batch {index}",
            expected=f"lengths up to {cost_model.max_lengths}, sizes measured for recompute {replica.recompute!r}",
            found=f"(rows, encoder length, decoder length) = {replica.micro_batches[index].shape}",
            fix="simulate with the profile that the plan was made for",
        )
    return costs


def _simulate_replica(number: int, plan: Plan, cost_model: CostModel, samples: Samples | None) -> ReplicaResult:
    replica = plan.replicas[number]
    costs = replica_costs(plan, number, cost_model, samples)
    lanes: dict[str, list[LaneOp]] = {}
    for device, instructions in enumerate(replica.instructions):
        name = f"replica {number}/device {device}"
        lanes[name], lanes[f"{name} send"] = _lane_ops(name, instructions, costs)
    timeline = run_lanes(lanes)
    state = cost_model.state_mb(replica.recompute)
    peak = tuple(
        float(state[device]) + _activation_peak_mb(instructions, costs)
        for device, instructions in enumerate(replica.instructions)
    )
    compute_lanes = [lane for lane in lanes if not lane.endswith("send")]
    return ReplicaResult(
        timeline=timeline,
        makespan_ms=timeline.makespan_ms,
        peak_mb=peak,
        bubble_fraction=timeline.bubble_fraction(lanes=compute_lanes),
    )


def _transfer_id(op: Instruction) -> Hashable:
    """Names a transfer by its direction, micro-batch and sending stage, whichever end ``op`` is."""
    kind = type(op)
    if kind in (SendActivationStart, SendActivationFinish):
        return "activation", op.micro_batch, op.stage
    if kind is RecvActivationFinish:
        return "activation", op.micro_batch, op.stage - 1
    if kind is RecvGradFinish:
        return "gradient", op.micro_batch, op.stage + 1
    return "gradient", op.micro_batch, op.stage


def _lane_ops(
    name: str, instructions: tuple[Instruction, ...], costs: MicroBatchCosts
) -> tuple[list[LaneOp], list[LaneOp]]:
    """The device's passes, and its transfers."""
    passes: list[LaneOp] = []
    sends: list[LaneOp] = []
    waits: list[Hashable] = []
    for op in instructions:
        kind = type(op)
        m, v = op.micro_batch, op.stage
        if kind in FINISHES:
            waits.append(_transfer_id(op))
        elif kind is ForwardPass or kind is BackwardPass:
            forward = kind is ForwardPass
            # The stage before may be on the same device: its result is there without a transfer.
            duration = costs.forward_ms[m, v] if forward else costs.backward_ms[m, v]
            passes.append(
                LaneOp(
                    op_id=(op.code, m, v),
                    lane=name,
                    duration_ms=float(duration),
                    depends_on=tuple(waits),
                    kind="forward" if forward else "backward",
                    name=f"{op.code}{m}",
                    args=(("micro_batch", m), ("stage", v)),
                )
            )
            waits = []
        elif kind in SENDS:
            forward = kind is SendActivationStart
            duration = costs.send_forward_ms[m, v] if forward else costs.send_backward_ms[m, v]
            sends.append(
                LaneOp(
                    op_id=_transfer_id(op),
                    lane=f"{name} send",
                    duration_ms=float(duration),
                    depends_on=(("F" if forward else "B", m, v),),
                    kind="send",
                    name=f"{op.code}{m}",
                    args=(("micro_batch", m), ("stage", v)),
                )
            )
    return passes, sends


def _activation_peak_mb(instructions: tuple[Instruction, ...], costs: MicroBatchCosts) -> float:
    """The highest use while the device runs its passes in order."""
    held = peak = 0.0
    for op in instructions:
        if type(op) is ForwardPass:
            peak = max(peak, held + float(costs.forward_peak_mb[op.micro_batch, op.stage]))
            held += float(costs.stored_mb[op.micro_batch, op.stage])
        elif type(op) is BackwardPass:
            peak = max(peak, held + float(costs.backward_extra_mb[op.micro_batch, op.stage]))
            held -= float(costs.stored_mb[op.micro_batch, op.stage])
    return peak
