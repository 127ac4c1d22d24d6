"""Whether a plan can run: every sample once, passes in order, transfers that meet, buffers that live long enough.

``check_plan`` runs whenever a plan is made and whenever one is read, never only on demand.
"""

from __future__ import annotations

import itertools

from llmsys.core.errors import PlanError
from llmsys.dynapipe.plan.buffers import broken_rule, check_buffers
from llmsys.dynapipe.plan.instructions import (
    FINISHES,
    STARTS,
    BackwardPass,
    ForwardPass,
    Instruction,
    RecvGradFinish,
    RecvGradStart,
    SendActivationFinish,
    SendActivationStart,
    Transfer,
)
from llmsys.dynapipe.plan.model import Plan, ReplicaPlan

_TOWARDS_NEXT = frozenset({SendActivationStart, SendActivationFinish, RecvGradStart, RecvGradFinish})


def check_plan(plan: Plan) -> None:
    """Raise PlanError, with the grid and the cell marked, at the first broken rule."""
    _check_form(plan)
    _check_samples(plan)
    for replica in range(len(plan.replicas)):
        _check_passes(plan, replica)
        _check_pairs(plan, replica)
        check_deadlock(plan, replica)
        for device in range(plan.parallelism.pipeline):
            check_buffers(plan, replica, device)


def _check_form(plan: Plan) -> None:
    """Whether the plan's parts are as many as its parallelism says, and its micro-batches have a shape."""
    p = plan.parallelism
    counts = [
        ("replicas", p.data, len(plan.replicas)),
        ("stages", p.num_stages, len(plan.stages)),
        ("memory limits", p.pipeline, len(plan.memory_limit_mb)),
        ("stages with a head", 1, sum(stage.head for stage in plan.stages)),
    ]
    for number, replica in enumerate(plan.replicas):
        counts.append((f"devices in replica {number}", p.pipeline, len(replica.instructions)))
        counts.append((f"peaks in replica {number}", p.pipeline, len(replica.estimate.peak_mb)))
        for index, m in enumerate(replica.micro_batches):
            sizes = (len(m.rows), *map(len, m.rows), m.encoder_len + 1, m.decoder_len)
            counts.append((f"empty sizes in micro-batch {index} of replica {number}", 0, sum(n < 1 for n in sizes)))
    wrong = [(name, expected, found) for name, expected, found in counts if expected != found]
    if wrong or not any(stage.num_decoder > 0 for stage in plan.stages):
        name, expected, found = wrong[0] if wrong else ("stages with decoder layers", "at least 1", 0)
        raise PlanError(
            f"the plan has a wrong number of {name}", expected=str(expected), found=str(found), fix="make the plan anew"
        )


def _check_samples(plan: Plan) -> None:
    holders = [
        (sample, replica, index)
        for replica, work in enumerate(plan.replicas)
        for index, micro_batch in enumerate(work.micro_batches)
        for sample in micro_batch.samples
    ]
    seen: set[int] = set()
    for sample, replica, index in holders:
        if sample in seen or not 0 <= sample < plan.num_samples:
            where = enumerate(plan.replicas[replica].instructions[0])
            first = next((i for i, op in where if op.micro_batch == index), None)
            raise broken_rule(
                plan, replica, None if first is None else (0, first),
                "the micro-batches do not hold every sample exactly once",
                f"each of the samples 0 to {plan.num_samples - 1} once",
                f"sample {sample} in micro-batch {index}" + (", but also before" if sample in seen else ""),
            )  # fmt: skip
        seen.add(sample)
    if len(seen) < plan.num_samples:
        missing = next(sample for sample in range(plan.num_samples) if sample not in seen)
        raise PlanError(
            "the micro-batches do not hold every sample exactly once",
            expected=f"each of the samples 0 to {plan.num_samples - 1} once",
            found=f"sample {missing} nowhere, {plan.num_samples - len(seen)} samples missing in all",
            fix="make the plan anew",
        )


def _check_passes(plan: Plan, replica: int) -> None:
    """Each device runs each micro-batch's forward, then its backward pass, once for each of its stages."""
    work = plan.replicas[replica]
    num_micro_batches, num_stages, pipeline = len(work.micro_batches), len(plan.stages), plan.parallelism.pipeline
    for device, instructions in enumerate(work.instructions):
        seen: dict[tuple[int, int], int] = {}
        for index, op in enumerate(instructions):
            if not (0 <= op.micro_batch < num_micro_batches and 0 <= op.stage < num_stages):
                raise broken_rule(
                    plan, replica, (device, index), "an instruction names work that does not exist",
                    f"micro-batch below {num_micro_batches}, stage below {len(plan.stages)}",
                    f"micro-batch {op.micro_batch}, stage {op.stage}",
                )  # fmt: skip
            if op.stage % pipeline != device:
                raise broken_rule(
                    plan, replica, (device, index), "an instruction is on the wrong device",
                    f"stage {op.stage} on device {plan.device_of(op.stage)}", f"it is on device {device}",
                )  # fmt: skip
            kind = type(op)
            if isinstance(op, Transfer):
                far = far_stage(op)
                if not 0 <= far < num_stages or op.peer != far % pipeline:
                    raise broken_rule(
                        plan, replica, (device, index), "a transfer has the wrong other end",
                        f"the device of stage {far}, of the stages below {len(plan.stages)}", f"device {op.peer}",
                    )  # fmt: skip
                continue
            if kind is not ForwardPass and kind is not BackwardPass:
                continue
            key = (op.micro_batch, op.stage)
            state = 1 if kind is ForwardPass else 2
            if seen.get(key, 0) != state - 1:
                raise broken_rule(
                    plan, replica, (device, index), "a pass is out of order or repeated",
                    "one forward pass, then one backward pass, of every micro-batch and stage",
                    f"{type(op).__name__} of micro-batch {op.micro_batch} on stage {op.stage}",
                )  # fmt: skip
            seen[key] = state
        missing = [
            (m, v)
            for v in range(device, len(plan.stages), plan.parallelism.pipeline)
            for m in range(num_micro_batches)
            if seen.get((m, v)) != 2
        ]
        if missing:
            raise broken_rule(
                plan, replica, None, f"device {device} does not finish its work",
                "a forward and a backward pass of every micro-batch and stage",
                f"{len(missing)} incomplete, the first is micro-batch {missing[0][0]} on stage {missing[0][1]}",
            )  # fmt: skip


def transfers_by_peer(work: ReplicaPlan, device: int) -> dict[int, list[tuple[int, Transfer]]]:
    """(index, start) of each transfer that ``device`` lists, in its order, by peer."""
    found: dict[int, list[tuple[int, Transfer]]] = {}
    for index, op in enumerate(work.instructions[device]):
        if type(op) in STARTS and isinstance(op, Transfer):
            found.setdefault(op.peer, []).append((index, op))
    return found


def transfers_between(work: ReplicaPlan, device: int, peer: int) -> list[tuple[int, Transfer]]:
    """(index, start) of each transfer that ``device`` lists with ``peer``, in its order."""
    return transfers_by_peer(work, device).get(peer, [])


def far_stage(op: Instruction) -> int:
    """The stage at the other end of a transfer."""
    return op.stage + (1 if type(op) in _TOWARDS_NEXT else -1)


def _check_pairs(plan: Plan, replica: int) -> None:
    """Two devices list their common transfers in one order, each start meeting its counterpart.

    A channel between two ranks (NCCL's, for one) matches transfers by order alone, so this is what makes the
    transfers of a plan meet the right data.
    """
    listed = [transfers_by_peer(plan.replicas[replica], device) for device in range(plan.parallelism.pipeline)]
    for device in range(plan.parallelism.pipeline):
        for peer in range(device + 1, plan.parallelism.pipeline):
            mine, theirs = listed[device].get(peer, []), listed[peer].get(device, [])
            for a, b in itertools.zip_longest(mine, theirs):
                if a is None or b is None or not _meet(a[1], b[1]):
                    at, other, seen, answer = (device, peer, a, b) if a is not None else (peer, device, b, a)
                    assert seen is not None
                    index, op = seen
                    raise broken_rule(
                        plan, replica, (at, index),
                        f"devices {device} and {peer} list their common transfers differently",
                        f"{STARTS[type(op)].__name__} of micro-batch {op.micro_batch} for stage {far_stage(op)} on "
                        f"device {other}",
                        f"{type(answer[1]).__name__} of micro-batch {answer[1].micro_batch} for stage "
                        f"{answer[1].stage}" if answer is not None else "nothing",
                    )  # fmt: skip


def _meet(a: Transfer, b: Transfer) -> bool:
    return STARTS[type(a)] is type(b) and a.micro_batch == b.micro_batch and far_stage(a) == b.stage


def check_deadlock(plan: Plan, replica: int) -> None:
    """Run the instruction lists with transfers that need both ends; PlanError when they end up waiting in a circle.

    A finish waits until both ends have started. Any executor that starts transfers in list order then completes:
    it can only be more eager than this one.
    """
    work = plan.replicas[replica]
    position = [0] * len(work.instructions)
    started: list[set[tuple[type[Instruction], int, int]]] = [set() for _ in work.instructions]
    waiting_on: dict[int, list[int]] = {}
    runnable = list(range(len(work.instructions)))
    while runnable:
        device = runnable.pop()
        instructions = work.instructions[device]
        while position[device] < len(instructions):
            op = instructions[position[device]]
            kind = type(op)
            if kind in STARTS:
                started[device].add((kind, op.micro_batch, op.stage))
                runnable.extend(waiting_on.pop(device, ()))
            elif kind in FINISHES and isinstance(op, Transfer):
                start = FINISHES[kind]
                if (start, op.micro_batch, op.stage) not in started[device]:
                    raise broken_rule(
                        plan, replica, (device, position[device]), "a transfer is finished before it is started",
                        f"{start.__name__} earlier on device {device}", f"{kind.__name__} first",
                    )  # fmt: skip
                if (STARTS[start], op.micro_batch, far_stage(op)) not in started[op.peer]:
                    waiting_on.setdefault(op.peer, []).append(device)
                    break
            position[device] += 1
    stuck = [d for d in range(len(work.instructions)) if position[d] < len(work.instructions[d])]
    if stuck:
        heads = [work.instructions[d][position[d]] for d in stuck]
        raise broken_rule(
            plan, replica, (stuck[0], position[stuck[0]]), "the devices wait for each other",
            "every transfer's other end to be started",
            "; ".join(
                f"device {d} waits in {type(op).__name__} of micro-batch {op.micro_batch}, stage {op.stage}"
                for d, op in zip(stuck, heads, strict=True)
            ),
        )  # fmt: skip
