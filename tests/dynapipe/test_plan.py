"""Plans: what check_plan finds, and the text and binary forms, whole and damaged."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from llmsys.core.errors import PlanError
from llmsys.core.specs import Architecture
from llmsys.dynapipe.config import PlannerConfig
from llmsys.dynapipe.plan import Plan, check_plan, from_bytes, from_text, to_bytes, to_text
from llmsys.dynapipe.plan.instructions import (
    BackwardPass,
    ForwardPass,
    FreeBuffer,
    Instruction,
    LoadInput,
    RecvActivationFinish,
    RecvActivationStart,
    RecvGradFinish,
    SendActivationFinish,
    SendActivationStart,
    SendGradFinish,
    SendGradStart,
    Transfer,
)
from llmsys.dynapipe.planner import plan_iteration
from tests.dynapipe.synthetic import ARCHITECTURES, toy_cost_model, toy_samples

Ops = list[Instruction]
Edit = Callable[[list[Ops]], tuple[int, int] | None]


@cache
def make(architecture: Architecture, num_samples: int = 40, **parallelism: int) -> Plan:
    model = toy_cost_model(architecture, **(parallelism or {"data": 2, "pipeline": 3}))
    samples = toy_samples(np.random.default_rng(num_samples), architecture, num_samples)
    return plan_iteration(samples, model, PlannerConfig(memory_limit_mb=6000.0, max_moves=20))


PLANS = [
    make("decoder_only"),
    make("encoder_decoder"),
    make("decoder_only", pipeline=1),
    make("encoder_decoder", data=1, pipeline=2, num_chunks=2),
    make("decoder_only", 7, data=3, pipeline=4),
]


@pytest.fixture
def plan(architecture: Architecture) -> Plan:
    return make(architecture)


def all_samples(plan: Plan) -> list[int]:
    return sorted(sample for r in plan.replicas for m in r.micro_batches for sample in m.samples)


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


def wait_in_a_circle(lists: list[Ops]) -> tuple[int, int]:
    """Device 1 wants the gradient of its first micro-batch before it sends the output."""
    ops = lists[1]
    finish = ops.pop(find(ops, RecvGradFinish))
    send = next(
        i for i, op in enumerate(ops) if type(op) is SendActivationStart and op.micro_batch == finish.micro_batch
    )
    receive = next(
        op for op in ops if type(op).__name__ == "RecvGradStart" and op.micro_batch == finish.micro_batch
    )
    ops.remove(receive)
    # Both ends list the pair early, so that it is only the wait which is wrong.
    ops[send:send] = [receive, finish]
    theirs = lists[2]
    sent = next(
        op for op in theirs if type(op) is SendGradStart and op.micro_batch == finish.micro_batch
    )
    arrival = next(
        i for i, op in enumerate(theirs) if type(op) is RecvActivationStart and op.micro_batch == finish.micro_batch
    )
    theirs.remove(sent)
    before = next(i for i, op in enumerate(theirs) if type(op) is RecvActivationFinish)
    theirs.insert(min(arrival, before), sent)
    return -1, -1


def free_twice(lists: list[Ops]) -> tuple[int, int]:
    at = find(lists[0], FreeBuffer)
    lists[0].insert(at + 1, lists[0][at])
    return 0, at + 1


def never_free(lists: list[Ops]) -> tuple[int, int]:
    ops = lists[0]
    at = find(ops, FreeBuffer, -1)
    dropped = ops.pop(at)
    assert isinstance(dropped, FreeBuffer)
    used = [i for i, op in enumerate(ops) if dropped.buffer in (getattr(op, "reads", ()) or (getattr(op, "buffer", -1),))]
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
        i for i, op in enumerate(ops) if i > finish and type(op) is FreeBuffer and op.buffer == ops[finish].buffer  # type: ignore[attr-defined]
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


def test_waiting_in_a_circle_is_found(plan: Plan) -> None:
    broken, _ = edited(plan, wait_in_a_circle)
    error = caught(broken)
    assert error.summary == "replica 0: the devices wait for each other"
    assert "device 1 waits in RecvGradFinish" in error.found and ">rg" in error.grid


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
    assert f"sample {own[lost].rows[0][0]} nowhere, 1 samples missing" in caught(set_rows(lost, own[lost].rows[1:])).found
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
    last = len(plan.replicas[1].instructions[2]) - 1
    row = plan.grid(1, (2, last)).splitlines()[2]
    assert row.startswith("device 2: ... ") and row.endswith("<")
    chunked = make("encoder_decoder", data=1, pipeline=2, num_chunks=2)
    assert re.match(r"device 0: F0\.0 |device 0: F\d+\.0 ", chunked.grid())
    assert "40 samples" in plan.summary() and plan.summary().count("replica") == 2


def test_text_of_a_small_plan_is_readable() -> None:
    text = to_text(make("decoder_only", 7, data=3, pipeline=4))
    assert text.startswith("llmsys dynapipe plan, version 1\nplanner dynapipe\nsamples 7\n")
    assert "parallelism data=3 pipeline=4 tensor=1 num_chunks=1 zero_stage=0" in text
    assert "stages 0+2 0+2 0+2 0+2+head" in text and max(map(len, text.splitlines())) < 250


# --- the two forms ---


@pytest.mark.parametrize("index", range(len(PLANS)))
def test_forms_round_trip(index: int) -> None:
    plan = PLANS[index]
    assert from_text(to_text(plan)) == plan and from_bytes(to_bytes(plan)) == plan
    assert to_text(from_bytes(to_bytes(plan))) == to_text(plan)
    assert hash(from_text(to_text(plan))) == hash(plan)


def test_bytes_are_few() -> None:
    plan = make("decoder_only", 400, data=1, pipeline=4)
    assert plan.num_micro_batches >= 40
    per_micro_batch = len(to_bytes(plan)) / plan.num_micro_batches
    assert per_micro_batch * 40 < 10_000


def accepted(read: Callable[[], Plan]) -> Plan | None:
    """What a reader makes of damaged input: a plan, or a PlanError. Any other exception fails the test."""
    try:
        return read()
    except PlanError as error:
        assert error.expected and error.found and error.fix
        return None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_truncated_text_is_refused(architecture: Architecture) -> None:
    text = to_text(make(architecture))
    for length in [*range(0, len(text.rstrip()), 7), *range(len(text) - 30, len(text.rstrip()))]:
        with pytest.raises(PlanError):
            from_text(text[:length])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_truncated_bytes_are_refused(architecture: Architecture) -> None:
    data = to_bytes(make(architecture))
    for length in range(len(data)):
        with pytest.raises(PlanError):
            from_bytes(data[:length])
    for extra in (b"\0", data):
        with pytest.raises(PlanError):
            from_bytes(data + extra)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_damaged_bytes_are_refused(architecture: Architecture) -> None:
    data = to_bytes(make(architecture, 14))
    rng = np.random.default_rng(0)
    for position in range(len(data)):
        for value in rng.integers(0, 256, 3).tolist():
            if value != data[position]:
                with pytest.raises(PlanError):
                    from_bytes(data[:position] + bytes([value]) + data[position + 1 :])
    for _ in range(200):
        with pytest.raises(PlanError):
            from_bytes(rng.bytes(int(rng.integers(0, 60))))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_damaged_text_is_refused_or_keeps_every_sample(architecture: Architecture) -> None:
    plan = make(architecture, 14)
    text = to_text(plan)
    rng = np.random.default_rng(0)
    num_refused = 0
    for number in range(1500):
        at = int(rng.integers(len(text)))
        sign = str(rng.integers(10)) if number % 3 else chr(rng.integers(32, 127))
        found = accepted(lambda at=at, sign=sign: from_text(text[:at] + sign + text[at + 1 :]))  # type: ignore[misc]
        num_refused += found is None
        if found is not None:
            assert_same_work(found, plan)
    assert num_refused > 1000


def assert_same_work(found: Plan, plan: Plan) -> None:
    """Numbers that describe the plan may be other ones; the samples and what is done with them may not."""
    check_plan(found)
    assert all_samples(found) == all_samples(plan)
    for mine, theirs in zip(found.replicas, plan.replicas, strict=True):
        for device in range(plan.parallelism.pipeline):
            assert mine.compute_order(device) == theirs.compute_order(device)
            loads = [[op.micro_batch for op in r.instructions[device] if type(op) is LoadInput] for r in (mine, theirs)]
            assert loads[0] == loads[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_text_with_tokens_lost_repeated_or_exchanged_is_refused(architecture: Architecture) -> None:
    plan = make(architecture, 14)
    lines = to_text(plan).splitlines()
    for number, line in enumerate(lines):
        tokens = line.split(" ")
        for i, token in enumerate(tokens):
            if token in ("planner", "dynapipe") or not token:
                continue
            changes = [tokens[:i] + tokens[i + 1 :], [*tokens[:i], token, *tokens[i:]]]
            for changed in changes:
                text = "\n".join([*lines[:number], " ".join(changed), *lines[number + 1 :]])
                assert accepted(lambda text=text: from_text(text)) is None, " ".join(changed)  # type: ignore[misc]
        for text in (lines[:number] + lines[number + 1 :], [*lines[: number + 1], *lines[number:]]):
            if line:
                assert accepted(lambda text=text: from_text("\n".join(text))) is None, line  # type: ignore[misc]
    first = next(i for i, line in enumerate(lines) if line.startswith("micro_batch 0"))
    assert lines[first + 1].startswith("micro_batch 1")
    lines[first], lines[first + 1] = lines[first + 1], lines[first]
    assert accepted(lambda: from_text("\n".join(lines))) is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("version 1", "version 2", "line 1 of the plan's text"),
        ("recompute=none", "recompute=some", "unknown schedule or recompute kind"),
        ("data=2", "data=0", "at least 1"),
        ("data=2", "data=two", "invalid literal"),
        ("F0.0[", "Q0.0[", "unknown instruction"),
        ("samples 40", "samples 41", "sample 40 nowhere"),
        ("device 1", "device 2", "device"),
    ],
)
def test_text_errors_say_where(old: str, new: str, message: str) -> None:
    text = to_text(make("decoder_only"))
    assert old in text
    with pytest.raises(PlanError) as info:
        from_text(text.replace(old, new, 1))
    assert message in str(info.value)


def test_bytes_errors_say_what() -> None:
    with pytest.raises(PlanError, match="these bytes are no plan"):
        from_bytes(b"")
    with pytest.raises(PlanError, match="these bytes are no plan"):
        from_bytes(to_text(make("decoder_only")).encode())
