"""Plans: what check_plan finds, and where it points."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest

from llmsys.core.errors import PlanError
from llmsys.core.specs import Architecture
from llmsys.dynapipe.plan import Plan, check_deadlock, check_plan, from_text, to_text
from llmsys.dynapipe.plan.instructions import (
    BackwardPass,
    ForwardPass,
    FreeBuffer,
    Instruction,
    LoadInput,
    RecvActivationFinish,
    RecvActivationStart,
    SendActivationFinish,
    SendActivationStart,
    SendGradFinish,
    SendGradStart,
    Transfer,
)
from tests.dynapipe.synthetic import toy_plan

Ops = list[Instruction]
Edit = Callable[[list[Ops]], tuple[int, int] | None]


@pytest.fixture
def plan(architecture: Architecture) -> Plan:
    return toy_plan(architecture)


def edited(plan: Plan, edit: Edit, replica: int = 0) -> tuple[Plan, tuple[int, int] | None]:
    """The plan with one replica's lists edited in place, and what ``edit`` returned: the cell to be blamed."""
    lists = [list(ops) for ops in plan.replicas[replica].instructions]
    cell = edit(lists)
    changed = dataclasses.replace(plan.replicas[replica], instructions=tuple(map(tuple, lists)))
    replicas = [changed if number == replica else other for number, other in enumerate(plan.replicas)]
    return dataclasses.replace(plan, replicas=tuple(replicas)), cell


def find(ops: Ops, kind: type[Instruction], number: int = 0) -> int:
    return [index for index, op in enumerate(ops) if type(op) is kind][number]


def caught(plan: Plan) -> PlanError:
    with pytest.raises(PlanError) as info:
        check_plan(plan)
    assert info.value.expected and info.value.found and info.value.fix
    return info.value


def assert_marked(error: PlanError, plan: Plan, cell: tuple[int, int]) -> None:
    """The grid shows every device and puts exactly this cell into marks."""
    device, index = cell
    replica = int(error.summary.split()[1].rstrip(":"))
    op = plan.replicas[replica].instructions[device][index]
    rows = error.grid.splitlines()
    assert [row.split(":")[0] for row in rows] == [f"device {d}" for d in range(plan.parallelism.pipeline)]
    marked = [(number, cell) for number, row in enumerate(rows) for cell in re.findall(r">\S+<", row)]
    assert len(marked) == 1 and marked[0][0] == device
    assert re.fullmatch(rf">{op.code}{op.micro_batch}(\.{op.stage})?<", marked[0][1])
    assert str(error).endswith(error.grid)


# --- faults, each with the cell that the error has to mark ---


def swap_two_starts(lists: list[Ops]) -> tuple[int, int]:
    ops = lists[1]
    i, j = find(ops, SendActivationStart, 0), find(ops, SendActivationStart, 1)
    ops[i], ops[j] = ops[j], ops[i]
    # Device 0 and 1 agree; seen from device 1 the first of the two is wrong.
    return 1, i


def drop_a_receive_start(lists: list[Ops]) -> tuple[int, int]:
    at = find(lists[1], RecvActivationStart, -1)
    dropped = lists[1].pop(at)
    sends = [i for i, op in enumerate(lists[0]) if type(op) is SendActivationStart]
    return 0, next(i for i in sends if lists[0][i].micro_batch == dropped.micro_batch)


def drop_the_last_transfer(lists: list[Ops]) -> tuple[int, int]:
    lists[1].pop(find(lists[1], SendGradStart, -1))
    at = [i for i, op in enumerate(lists[0]) if isinstance(op, Transfer) and type(op).__name__.endswith("Start")]
    return 0, at[-1]


def finish_before_start(lists: list[Ops]) -> tuple[int, int]:
    ops = lists[0]
    start, finish = find(ops, SendActivationStart), find(ops, SendActivationFinish)
    ops.insert(start, ops.pop(finish))
    return 0, start


def free_twice(lists: list[Ops]) -> tuple[int, int]:
    at = find(lists[0], FreeBuffer)
    lists[0].insert(at + 1, lists[0][at])
    return 0, at + 1


def never_free(lists: list[Ops]) -> tuple[int, int]:
    ops = lists[0]
    at = find(ops, FreeBuffer, -1)
    dropped = ops.pop(at)
    assert isinstance(dropped, FreeBuffer)
    used = [
        i for i, op in enumerate(ops) if dropped.buffer in (getattr(op, "reads", ()) or (getattr(op, "buffer", -1),))
    ]
    return 0, used[-1]


def reuse_a_live_buffer(lists: list[Ops]) -> tuple[int, int]:
    at = find(lists[0], LoadInput, 1)
    first = lists[0][find(lists[0], LoadInput)]
    assert isinstance(first, LoadInput)
    lists[0][at] = dataclasses.replace(lists[0][at], buffer=first.buffer)  # type: ignore[call-arg]
    return 0, at


def read_before_arrival(lists: list[Ops]) -> tuple[int, int]:
    at = find(lists[1], RecvActivationFinish)
    lists[1].pop(at)
    return 1, at


def read_other_data(lists: list[Ops]) -> tuple[int, int]:
    """Two forward passes whose inputs are loaded by then exchange them."""
    ops = lists[0]
    first, second = find(ops, LoadInput, 0), find(ops, LoadInput, 1)
    swapped = ops.pop(second)
    ops[first : first + 1] = [
        dataclasses.replace(ops[first], micro_batch=swapped.micro_batch),
        dataclasses.replace(swapped, micro_batch=ops[first].micro_batch),
    ]
    return 0, find(ops, ForwardPass)


def finish_another_send(lists: list[Ops]) -> tuple[int, int]:
    ops = lists[0]
    at, other = find(ops, SendActivationFinish), ops[find(ops, SendActivationStart, 1)]
    assert find(ops, SendActivationStart, 1) < at and isinstance(other, Transfer)
    ops[at] = dataclasses.replace(ops[at], buffer=other.buffer)  # type: ignore[call-arg]
    return 0, at


def wrong_device(lists: list[Ops]) -> tuple[int, int]:
    lists[0][0], lists[1][0] = lists[1][0], lists[0][0]
    return 0, 0


def wrong_peer(lists: list[Ops]) -> tuple[int, int]:
    at = find(lists[0], SendActivationFinish)
    lists[0][at] = dataclasses.replace(lists[0][at], peer=9)  # type: ignore[call-arg]
    return 0, at


def beyond_the_last_stage(lists: list[Ops]) -> tuple[int, int]:
    lists[2].insert(0, SendActivationStart(micro_batch=0, stage=2, buffer=99, peer=0))
    return 2, 0


def unknown_micro_batch(lists: list[Ops]) -> tuple[int, int]:
    lists[1][3] = dataclasses.replace(lists[1][3], micro_batch=10_000)
    return 1, 3


def unknown_stage(lists: list[Ops]) -> tuple[int, int]:
    lists[0][0] = dataclasses.replace(lists[0][0], stage=3)
    return 0, 0


def backward_first(lists: list[Ops]) -> tuple[int, int]:
    ops = lists[2]
    forward = find(ops, ForwardPass)
    backward = find(ops, BackwardPass)
    ops[forward], ops[backward] = ops[backward], ops[forward]
    return 2, forward


def forward_twice(lists: list[Ops]) -> tuple[int, int]:
    at = find(lists[0], ForwardPass)
    lists[0].insert(at + 1, lists[0][at])
    return 0, at + 1


def free_while_sending(lists: list[Ops]) -> tuple[int, int]:
    ops = lists[1]
    finish = find(ops, SendGradFinish, -1)
    freed = next(
        i
        for i, op in enumerate(ops)
        if i > finish and type(op) is FreeBuffer and op.buffer == ops[finish].buffer  # type: ignore[attr-defined]
    )
    ops.insert(finish, ops.pop(freed))
    return 1, finish


FAULTS: list[Edit] = [
    swap_two_starts,
    drop_a_receive_start,
    drop_the_last_transfer,
    finish_before_start,
    free_twice,
    never_free,
    reuse_a_live_buffer,
    read_before_arrival,
    read_other_data,
    finish_another_send,
    wrong_device,
    wrong_peer,
    beyond_the_last_stage,
    unknown_micro_batch,
    unknown_stage,
    backward_first,
    forward_twice,
    free_while_sending,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_are_found_and_their_cell_is_marked(plan: Plan, fault: Edit) -> None:
    check_plan(plan)
    broken, cell = edited(plan, fault)
    assert cell is not None
    error = caught(broken)
    assert_marked(error, broken, cell)
    # A reader refuses it as well.
    with pytest.raises(PlanError):
        from_text(to_text(broken))


def test_waiting_in_a_circle_is_found(architecture: Architecture) -> None:
    # Six stages on a ring of three devices. Device 0 wants the output of stage 2 before it sends that of stage 0.
    plan = toy_plan(architecture, 1, pipeline=3, num_chunks=2)

    def send_late(lists: list[Ops]) -> tuple[int, int]:
        send = lists[0].pop(find(lists[0], SendActivationStart))
        arrival = find(lists[0], RecvActivationFinish)
        lists[0].insert(arrival + 1, send)
        return 0, arrival

    broken, cell = edited(plan, send_late)
    assert cell is not None
    error = caught(broken)
    assert error.summary == "replica 0: the devices wait for each other"
    for device, stage in ((0, 3), (1, 1), (2, 2)):
        assert f"device {device} waits in RecvActivationFinish of micro-batch 0, stage {stage}" in error.found
    assert_marked(error, broken, cell)
    with pytest.raises(PlanError, match="wait for each other"):
        check_deadlock(broken, 0)


def test_every_dropped_instruction_is_found(plan: Plan) -> None:
    for device in range(plan.parallelism.pipeline):
        for index in range(len(plan.replicas[0].instructions[device])):
            broken, _ = edited(plan, lambda lists, d=device, i=index: lists[d].pop(i) and None)  # type: ignore[misc]
            assert caught(broken).grid


def test_every_repeated_instruction_is_found(plan: Plan) -> None:
    for device in range(plan.parallelism.pipeline):
        for index, op in enumerate(plan.replicas[0].instructions[device]):
            broken, _ = edited(plan, lambda lists, d=device, i=index, o=op: lists[d].insert(i, o))  # type: ignore[misc]
            assert caught(broken).grid


def test_swapped_neighbours_are_found_or_harmless(plan: Plan) -> None:
    """Exchanging two neighbours breaks a rule, or leaves a plan with the same passes in the same order."""
    num_found = 0
    for device in range(plan.parallelism.pipeline):
        for index in range(len(plan.replicas[0].instructions[device]) - 1):

            def swap(lists: list[Ops], d: int = device, i: int = index) -> None:
                lists[d][i], lists[d][i + 1] = lists[d][i + 1], lists[d][i]

            broken, _ = edited(plan, swap)
            try:
                check_plan(broken)
            except PlanError:
                num_found += 1
            else:
                old, new = (sorted(p.replicas[0].compute_order(device)) for p in (plan, broken))
                assert old == new
    assert num_found > 20


def with_micro_batches(plan: Plan, change: Callable[[list[object]], object], replica: int = 0) -> Plan:
    micro_batches = list(plan.replicas[replica].micro_batches)
    change(micro_batches)  # type: ignore[arg-type]
    changed = dataclasses.replace(plan.replicas[replica], micro_batches=tuple(micro_batches))
    return dataclasses.replace(
        plan, replicas=tuple(changed if i == replica else r for i, r in enumerate(plan.replicas))
    )


def test_samples_are_counted(plan: Plan) -> None:
    own = plan.replicas[0].micro_batches
    stranger = plan.replicas[1].micro_batches[0].rows[0]

    def set_rows(index: int, rows: tuple[tuple[int, ...], ...]) -> Plan:
        return with_micro_batches(plan, lambda m: m.__setitem__(index, dataclasses.replace(own[index], rows=rows)))

    twice = caught(set_rows(1, (*own[1].rows, own[0].rows[0])))
    assert f"sample {own[0].rows[0][0]} in micro-batch 1, but also before" in twice.found
    assert re.search(r"^device 0:.*>[A-Za-z]+1<", twice.grid, re.M)
    of_other = caught(set_rows(0, (*own[0].rows, stranger)))
    assert of_other.summary.startswith("replica 1") and f"sample {stranger[0]}" in of_other.found
    unknown = caught(set_rows(0, (*own[0].rows, (plan.num_samples,))))
    assert f"sample {plan.num_samples} in micro-batch 0" in unknown.found and unknown.grid
    lost = next(m for m, batch in enumerate(own) if len(batch.rows) > 1)
    assert (
        f"sample {own[lost].rows[0][0]} nowhere, 1 samples missing" in caught(set_rows(lost, own[lost].rows[1:])).found
    )
    many = dataclasses.replace(plan, num_samples=10**15)
    assert f"{10**15 - plan.num_samples} samples missing" in caught(many).found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replicas": ()}, "number of replicas"),
        ({"stages": ()}, "number of stages"),
        ({"memory_limit_mb": (1.0,)}, "number of memory limits"),
    ],
)
def test_parts_are_counted(plan: Plan, changes: dict[str, object], message: str) -> None:
    assert message in caught(dataclasses.replace(plan, **changes)).summary  # type: ignore[arg-type]


def test_parts_of_replicas_are_counted(plan: Plan) -> None:
    first, *others = plan.replicas
    estimate = dataclasses.replace(first.estimate, peak_mb=())
    for change, message in (
        ({"instructions": first.instructions[:2]}, "devices in replica 0"),
        ({"estimate": estimate}, "peaks in replica 0"),
    ):
        broken = dataclasses.replace(plan, replicas=(dataclasses.replace(first, **change), *others))
        assert message in caught(broken).summary
    headless = dataclasses.replace(plan, stages=tuple(dataclasses.replace(s, head=False) for s in plan.stages))
    assert "stages with a head" in caught(headless).summary
    bodiless = dataclasses.replace(plan, stages=tuple(dataclasses.replace(s, num_decoder=0) for s in plan.stages))
    assert "stages with decoder layers" in caught(bodiless).summary
    shapeless = with_micro_batches(
        plan, lambda m: m.__setitem__(0, dataclasses.replace(first.micro_batches[0], decoder_len=0))
    )
    assert "empty sizes in micro-batch 0 of replica 0" in caught(shapeless).summary


def test_the_grid_shows_the_passes(plan: Plan) -> None:
    rows = plan.grid().splitlines()
    assert len(rows) == 3 and all(re.match(r"device \d: (F\d+ )+B", row) for row in rows[:1])
    assert all(len(row) <= 120 for row in plan.grid().splitlines())
    long = toy_plan("decoder_only", 400, pipeline=4)
    assert all(len(row) == 120 and row.endswith(" ...") for row in long.grid().splitlines())
    last = len(long.replicas[0].instructions[2]) - 1
    row = long.grid(0, (2, last)).splitlines()[2]
    assert row.startswith("device 2: ... ") and row.endswith("<")
    chunked = toy_plan("encoder_decoder", pipeline=2, num_chunks=2)
    assert re.match(r"device 0: F0\.0 |device 0: F\d+\.0 ", chunked.grid())
    assert "40 samples" in plan.summary() and plan.summary().count("replica") == 2
