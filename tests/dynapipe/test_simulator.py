"""The simulator: its rules on hand-made plans, and what it refuses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from llmsys import _C
from llmsys.core.errors import InfeasibleError, InputError, PlanError
from llmsys.core.specs import Architecture
from llmsys.dynapipe.communication import PassTimes, plan_instructions
from llmsys.dynapipe.config import PlannerConfig
from llmsys.dynapipe.costs import CostModel
from llmsys.dynapipe.plan import Estimate, MicroBatch, Plan, ReplicaPlan, check_plan
from llmsys.dynapipe.plan.instructions import RecvGradFinish
from llmsys.dynapipe.planner import plan_iteration
from llmsys.dynapipe.simulator import replica_costs, simulate
from tests.dynapipe import oracles
from tests.dynapipe.oracles import Orders
from tests.dynapipe.synthetic import toy_cost_model, toy_profile, toy_samples
from tests.dynapipe.test_schedule import random_orders

pytestmark = pytest.mark.native


def plan_by_hand(model: CostModel, lengths: list[int], orders: Orders) -> Plan:
    """One replica; micro-batch m holds sample m, padded to ``lengths[m]``. The estimate is left at 0."""
    pair = model.encoder_decoder
    micro_batches = tuple(
        MicroBatch(rows=((m,),), encoder_len=length if pair else 0, decoder_len=length)
        for m, length in enumerate(lengths)
    )
    shapes = np.array([m.shape for m in micro_batches])
    costs = model.micro_batch_costs(shapes, "none")
    arrays = [np.array(order, dtype=np.int32) for order in orders]
    run = _C.replay(costs.columns(), len(orders), arrays)
    times = PassTimes(start_ms=run["start_ms"], send_start_ms=run["send_start_ms"])
    first_decoder = next(v for v, stage in enumerate(model.stages) if stage.num_decoder)
    replica = ReplicaPlan(
        micro_batches=micro_batches,
        recompute="none",
        schedule="1f1b",
        estimate=Estimate(makespan_ms=0.0, peak_mb=(0.0,) * len(orders)),
        instructions=plan_instructions(arrays, times, costs, frozenset({0, first_decoder})),
    )
    plan = Plan(
        planner="hand",
        num_samples=len(lengths),
        parallelism=model.parallelism,
        stages=model.stages,
        memory_limit_mb=(1e9,) * len(orders),
        replicas=(replica,),
    )
    check_plan(plan)
    return plan


@pytest.mark.parametrize("seed", range(12))
def test_simulation_equals_the_event_queue(architecture: Architecture, seed: int) -> None:
    """Random pass orders, whole timelines: the third implementation of the rules agrees with the other two."""
    rng = np.random.default_rng(seed)
    pipeline, num_chunks, num_micro_batches = int(rng.integers(1, 5)), int(rng.integers(1, 3)), int(rng.integers(1, 7))
    model = toy_cost_model(architecture, pipeline=pipeline, num_chunks=num_chunks)
    orders = random_orders(rng, num_micro_batches, pipeline * num_chunks, pipeline)
    plan = plan_by_hand(model, rng.integers(8, 500, num_micro_batches).tolist(), orders)
    expected = oracles.replay(replica_costs(plan, 0, model).columns(), pipeline, orders)
    assert expected is not None
    result = simulate(plan, model)
    assert result.makespan_ms == result.replicas[0].makespan_ms == expected["makespan_ms"]
    np.testing.assert_allclose(np.array(result.replicas[0].peak_mb), model.state_mb("none") + expected["peak_mb"])
    for span in result.replicas[0].timeline.spans:
        args = dict(span.args)
        cell = args["micro_batch"], args["stage"], int(span.name.startswith(("B", "SG")))
        planned = expected["send_start_ms" if span.kind == "send" else "start_ms"]
        assert span.start_ms == planned[cell], span


def test_timeline_has_a_compute_and_a_send_lane_for_each_device() -> None:
    model = toy_cost_model("decoder_only", data=2, pipeline=2)
    plan = plan_iteration(toy_samples(np.random.default_rng(0), "decoder_only", 20), model, PlannerConfig(max_moves=5))
    for number, replica in enumerate(simulate(plan, model).replicas):
        lanes = [f"replica {number}/device {d}{kind}" for d in (0, 1) for kind in ("", " send")]
        assert sorted(replica.timeline.lanes) == sorted(lanes)
        kinds = {span.kind for span in replica.timeline.spans}
        assert kinds == {"forward", "backward", "send"}
        busy = sum(s.end_ms - s.start_ms for s in replica.timeline.spans if s.kind != "send")
        assert replica.bubble_fraction == pytest.approx(1 - busy / (2 * replica.makespan_ms))


def test_a_device_sends_one_result_after_the_other() -> None:
    """Two forwards in a row with a slow link: the second transfer waits for the first, computing goes on."""
    slow = dataclasses.replace(toy_cost_model("decoder_only").cluster.intra_link, bandwidth_gbps=0.001)
    model = toy_cost_model("decoder_only", pipeline=2)
    model = dataclasses.replace(model, cluster=dataclasses.replace(model.cluster, intra_link=slow))
    plan = plan_by_hand(model, [64, 64], oracles.one_f_one_b(2, 2))
    costs = replica_costs(plan, 0, model)
    forward, send = costs.forward_ms[0, 0], costs.send_forward_ms[0, 0]
    assert send > 5 * forward
    spans = {(s.lane, s.name): s for s in simulate(plan, model).replicas[0].timeline.spans}
    assert spans["replica 0/device 0", "F1"].start_ms == forward
    assert spans["replica 0/device 0 send", "SA0"].start_ms == forward
    assert spans["replica 0/device 0 send", "SA1"].start_ms == pytest.approx(forward + send)
    assert spans["replica 0/device 1", "F1"].start_ms == pytest.approx(forward + 2 * send)


def test_peaks_are_those_of_the_order() -> None:
    model = toy_cost_model("decoder_only", pipeline=1)
    together: Orders = [[(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]]
    in_turn: Orders = [[(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)]]
    state = float(model.state_mb("none")[0])
    peaks = []
    for orders in (together, in_turn):
        plan = plan_by_hand(model, [128, 64], orders)
        costs = replica_costs(plan, 0, model)
        peaks.append(simulate(plan, model).replicas[0].peak_mb[0] - state)
    stored, peak, extra = (c[:, 0] for c in (costs.stored_mb, costs.forward_peak_mb, costs.backward_extra_mb))
    assert peaks[0] == pytest.approx(max(peak[0], stored[0] + peak[1], stored.sum() + extra[0]))
    assert peaks[1] == pytest.approx(max(peak.max(), (stored + extra).max()))


def test_memory_above_the_limit_is_reported() -> None:
    model = toy_cost_model("decoder_only", pipeline=2)
    plan = plan_by_hand(model, [64, 64], oracles.one_f_one_b(2, 2))
    tiny = dataclasses.replace(plan, memory_limit_mb=(1.0, 1.0))
    assert simulate(tiny, model).peak_mb == simulate(plan, model).peak_mb > 1.0


def test_gradient_all_reduce_is_added_when_asked_for(architecture: Architecture) -> None:
    model = toy_cost_model(architecture, data=2, pipeline=2)
    plan = plan_iteration(toy_samples(np.random.default_rng(0), architecture, 20), model, PlannerConfig(max_moves=5))
    plain, synced = simulate(plan, model), simulate(plan, model, grad_sync=True)
    kinds = {replica.recompute for replica in plan.replicas}
    assert synced.grad_sync_ms == max(model.grad_sync_ms(kind) for kind in kinds) > 0
    assert synced.iteration_ms == plain.iteration_ms + synced.grad_sync_ms
    assert synced.makespan_ms == plain.makespan_ms == max(r.makespan_ms for r in plain.replicas)
    assert plain.bubble_fraction == pytest.approx(np.mean([r.bubble_fraction for r in plain.replicas]))
    assert plain.peak_mb == max(max(r.peak_mb) for r in plain.replicas)


def test_a_plan_for_another_profile_is_refused() -> None:
    model = toy_cost_model("decoder_only", pipeline=2)
    plan = plan_by_hand(model, [64, 512], oracles.one_f_one_b(2, 2))
    small = toy_cost_model("decoder_only", profile=toy_profile("decoder_only", capacity_mb=60.0), pipeline=2)
    with pytest.raises(InfeasibleError, match=r"does not cover micro-batch 1(.|\n)*\(1, 0, 512\)"):
        simulate(plan, small)


def test_a_plan_for_another_split_or_model_is_refused() -> None:
    model = toy_cost_model("decoder_only", pipeline=4)
    samples = toy_samples(np.random.default_rng(1), "decoder_only", 12)
    plan = plan_iteration(samples, model, PlannerConfig(max_moves=0))
    others = [toy_cost_model("decoder_only", pipeline=number) for number in (2, 8)]
    for other in (*others, toy_cost_model("encoder_decoder", pipeline=4)):
        with pytest.raises(InputError, match="another model or another split"):
            simulate(plan, other)


def test_a_deadlock_is_an_error() -> None:
    """A plan that nobody checked: device 0 waits for a gradient before it computes anything."""
    model = toy_cost_model("decoder_only", pipeline=2)
    plan = plan_by_hand(model, [64, 64], oracles.one_f_one_b(2, 2))
    first = list(plan.replicas[0].instructions[0])
    wait = next(i for i, op in enumerate(first) if type(op) is RecvGradFinish)
    first.insert(0, first.pop(wait))
    replica = dataclasses.replace(plan.replicas[0], instructions=(tuple(first), plan.replicas[0].instructions[1]))
    with pytest.raises(PlanError, match="deadlock"):
        simulate(dataclasses.replace(plan, replicas=(replica,)), model)
