"""Communication planning: any pass order becomes lists that meet, cannot deadlock and keep their buffers straight."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llmsys import _C
from llmsys.dynapipe.communication import PassTimes, plan_instructions
from llmsys.dynapipe.config import Parallelism, StageLayers
from llmsys.dynapipe.costs import MicroBatchCosts
from llmsys.dynapipe.plan import Estimate, MicroBatch, Plan, ReplicaPlan, check_plan, transfers_between
from llmsys.dynapipe.plan.instructions import (
    SENDS,
    BackwardPass,
    ForwardPass,
    FreeBuffer,
    Instruction,
    LoadInput,
    RecvActivationFinish,
    RecvActivationStart,
    RecvGradFinish,
    RecvGradStart,
    SendActivationStart,
    SendGradFinish,
    Transfer,
)
from llmsys.dynapipe.plan.text import _op_text
from tests.dynapipe import oracles
from tests.dynapipe.oracles import Orders
from tests.dynapipe.synthetic import FloatArray, random_costs
from tests.dynapipe.test_schedule import random_orders

pytestmark = pytest.mark.native


def plan_of(columns: list[FloatArray], orders: Orders, first_decoder: int = 0) -> Plan:
    """A plan of one replica that runs ``orders``; micro-batch m holds sample m.

    Stages below ``first_decoder`` have encoder layers; that stage and the first load token ids.
    """
    costs = MicroBatchCosts(**dict(zip(MicroBatchCosts.__dataclass_fields__, columns, strict=True)))
    arrays = [np.array(order, dtype=np.int32).reshape(-1, 3) for order in orders]
    run = _C.replay(costs.columns(), len(orders), arrays)
    assert run["complete"]
    times = PassTimes(start_ms=run["start_ms"], send_start_ms=run["send_start_ms"])
    num_micro_batches, num_stages = columns[0].shape
    replica = ReplicaPlan(
        micro_batches=tuple(MicroBatch(rows=((m,),), encoder_len=0, decoder_len=8) for m in range(num_micro_batches)),
        recompute="none",
        schedule="1f1b",
        estimate=Estimate(makespan_ms=run["makespan_ms"], peak_mb=tuple(run["peak_mb"].tolist())),
        instructions=plan_instructions(arrays, times, costs, frozenset({0, first_decoder})),
    )
    return Plan(
        planner="test",
        num_samples=num_micro_batches,
        parallelism=Parallelism(pipeline=len(orders), num_chunks=num_stages // len(orders)),
        stages=tuple(
            StageLayers(
                num_encoder=int(v < first_decoder), num_decoder=int(v >= first_decoder), head=v == num_stages - 1
            )
            for v in range(num_stages)
        ),
        memory_limit_mb=(1e9,) * len(orders),
        replicas=(replica,),
    )


@pytest.fixture(params=range(40))
def random_plan(request: pytest.FixtureRequest) -> tuple[Plan, list[FloatArray], Orders]:
    """Random pass orders, not of any schedule, with cheap, equal or dear transfers."""
    rng = np.random.default_rng(request.param)
    num_devices, num_chunks, num_micro_batches = (
        int(rng.integers(1, 5)),
        int(rng.integers(1, 4)),
        int(rng.integers(1, 9)),
    )
    num_stages = num_devices * num_chunks
    columns = random_costs(rng, num_micro_batches, num_stages, send=float(rng.choice([0.01, 1.0, 4.0])))
    if request.param % 3 == 0:  # whole numbers: much happens at the same time
        columns = [np.maximum(1.0, np.round(column)) for column in columns]
    if request.param % 5 == 0:  # transfers in no time at all
        columns[5], columns[6] = 0 * columns[5], 0 * columns[6]
    if request.param % 4 == 0:  # and passes too
        columns = [*(c * (rng.random(c.shape) < 0.5) for c in columns[:2]), *columns[2:]]
    orders = random_orders(rng, num_micro_batches, num_stages, num_devices)
    return plan_of(columns, orders, num_stages // 2), columns, orders


RandomPlan = tuple[Plan, list[FloatArray], Orders]


def test_any_order_gives_a_plan_that_can_run(random_plan: RandomPlan) -> None:
    plan, _, orders = random_plan
    check_plan(plan)
    for device, order in enumerate(orders):
        assert plan.replicas[0].compute_order(device) == [(m, v, bool(b)) for m, v, b in order]


def test_two_devices_list_their_transfers_in_one_order(random_plan: RandomPlan) -> None:
    replica = random_plan[0].replicas[0]
    for device, peer in itertools.combinations(range(len(replica.instructions)), 2):
        mine = [(op.micro_batch, type(op) in SENDS) for _, op in transfers_between(replica, device, peer)]
        theirs = [(op.micro_batch, type(op) not in SENDS) for _, op in transfers_between(replica, peer, device)]
        assert mine == theirs


def test_transfers_start_in_the_planned_order(random_plan: RandomPlan) -> None:
    plan, columns, orders = random_plan
    run = oracles.replay(columns, len(orders), orders)
    assert run is not None
    for device, instructions in enumerate(plan.replicas[0].instructions):
        starts = []
        for op in instructions:
            if isinstance(op, Transfer) and type(op).__name__.endswith("Start"):
                sending = type(op) in SENDS
                activation = type(op) in (SendActivationStart, RecvActivationStart)
                source = op.stage if sending else op.stage - (1 if activation else -1)
                starts.append(run["send_start_ms"][op.micro_batch, source, 0 if activation else 1])
            elif type(op) in (ForwardPass, BackwardPass):
                # A pass comes after every transfer that has started by then, and before those that start later.
                begin = run["start_ms"][op.micro_batch, op.stage, int(type(op) is BackwardPass)]
                assert all(start <= begin for start in starts), (device, op)
                starts.append(begin)
        assert starts == sorted(starts)


def test_receives_finish_just_before_their_pass(random_plan: RandomPlan) -> None:
    for instructions in random_plan[0].replicas[0].instructions:
        for op, following in itertools.pairwise(instructions):
            if type(op) in (RecvActivationFinish, RecvGradFinish):
                expected = ForwardPass if type(op) is RecvActivationFinish else BackwardPass
                assert type(following) is expected
                assert (following.micro_batch, following.stage) == (op.micro_batch, op.stage)


def test_buffers_are_few(random_plan: RandomPlan) -> None:
    """Slots are used again: never more of them than data alive at one time."""
    for instructions in random_plan[0].replicas[0].instructions:
        live: set[int] = set()
        most, slots = 0, set()
        for op in instructions:
            if isinstance(op, FreeBuffer):
                live.remove(op.buffer)
                continue
            filled = [op.buffer] if isinstance(op, LoadInput | RecvActivationStart | RecvGradStart) else []
            filled += op.writes if isinstance(op, ForwardPass | BackwardPass) else ()
            live.update(filled)
            slots.update(filled)
            most = max(most, len(live))
        assert not live and slots == set(range(most))


def test_the_smallest_pipeline_word_for_word() -> None:
    columns = [np.ones((2, 2)) * value for value in (1.0, 2.0, 1.0, 1.0, 0.0, 0.5, 0.5)]
    plan = plan_of(columns, oracles.one_f_one_b(2, 2))
    first, second = ([_op_text(op) for op in ops] for ops in plan.replicas[0].instructions)
    # F0 at 0, F1 at 1; the second device runs F0 from 1.5, B0 from 2.5, F1 from 4.5, B1 from 5.5.
    assert first == [
        "L0.0[0]", "F0.0[0>1]",
        "SA0.0[1]@1", "L1.0[2]", "F1.0[2>3]",
        "SA1.0[3]@1", "RG0.0[4]@1",
        "sa0.0[1]@1", "rg0.0[4]@1", "B0.0[0,1,4>]", "X0.0[0]", "X0.0[1]", "X0.0[4]",
        "RG1.0[0]@1",
        "sa1.0[3]@1", "rg1.0[0]@1", "B1.0[2,3,0>]", "X1.0[2]", "X1.0[3]", "X1.0[0]",
    ]  # fmt: skip
    assert second == [
        "RA0.1[0]@0",
        "ra0.1[0]@0", "F0.1[0>]",
        "RA1.1[1]@0", "B0.1[0>2]", "X0.1[0]",
        "SG0.1[2]@0",
        "ra1.1[1]@0", "F1.1[1>]",
        "sg0.1[2]@0", "X0.1[2]", "B1.1[1>0]", "X1.1[1]",
        "SG1.1[0]@0",
        "sg1.1[0]@0", "X1.1[0]",
    ]  # fmt: skip


def test_one_device_needs_no_transfers() -> None:
    columns = random_costs(np.random.default_rng(0), 3, 4)
    plan = plan_of(columns, random_orders(np.random.default_rng(1), 3, 4, 1))
    assert not any(isinstance(op, Transfer) for op in plan.replicas[0].instructions[0])


def test_gradient_sends_end_once_they_are_over() -> None:
    """No wait is put before a pass for a send that is still under way by then."""
    rng = np.random.default_rng(5)
    columns = random_costs(rng, 6, 3)
    orders = oracles.one_f_one_b(6, 3)
    run = oracles.replay(columns, 3, orders)
    assert run is not None
    for instructions in plan_of(columns, orders).replicas[0].instructions:
        later: Instruction | None = None
        for op in reversed(instructions):
            if type(op) in (ForwardPass, BackwardPass):
                later = op
            elif type(op) is SendGradFinish and later is not None:
                end = run["send_start_ms"][op.micro_batch, op.stage, 1] + columns[6][op.micro_batch, op.stage]
                assert end <= run["start_ms"][later.micro_batch, later.stage, int(type(later) is BackwardPass)]
