"""Whether a plan can run: every sample once, passes in order, transfers that meet, buffers that live long enough.

``check_plan`` runs whenever a plan is made and whenever one is read, never only on demand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from llmsys.core.errors import PlanError
from llmsys.dynapipe.plan.instructions import (
    FINISHES,
    SENDS,
    STARTS,
    BackwardPass,
    ForwardPass,
    FreeBuffer,
    Instruction,
    LoadInput,
    RecvActivationFinish,
    RecvActivationStart,
    RecvGradFinish,
    RecvGradStart,
    Transfer,
)
from llmsys.dynapipe.plan.model import Plan, ReplicaPlan

_RECEIVES = frozenset({RecvActivationStart, RecvGradStart})
_ARRIVALS = frozenset({RecvActivationFinish, RecvGradFinish})


def check_plan(plan: Plan) -> None:
    """Raise PlanError, with the grid and the cell marked, at the first broken rule."""
    _check_samples(plan)
    for replica in range(len(plan.replicas)):
        _check_passes(plan, replica)
        _check_pairs(plan, replica)
        check_deadlock(plan, replica)
        for device in range(plan.parallelism.pipeline):
            _check_buffers(plan, replica, device)


def _error(
    plan: Plan, replica: int, cell: tuple[int, int] | None, summary: str, expected: str, found: str
) -> PlanError:
    return PlanError(
        f"replica {replica}: {summary}",
        expected=expected,
        found=found,
        fix="make the plan anew; a plan that was edited or cut off cannot be repaired",
        grid=plan.grid(replica, cell),
    )


def _check_samples(plan: Plan) -> None:
    counts = Counter(
        sample for replica in plan.replicas for micro_batch in replica.micro_batches for sample in micro_batch.samples
    )
    wrong = [sample for sample in range(plan.num_samples) if counts[sample] != 1]
    strangers = sorted(set(counts) - set(range(plan.num_samples)))
    if wrong or strangers:
        first = (wrong + strangers)[0]
        raise PlanError(
            "the micro-batches do not hold every sample exactly once",
            expected=f"each of the samples 0 to {plan.num_samples - 1} once",
            found=f"sample {first} {counts[first]} times, {len(wrong) + len(strangers)} samples wrong in all",
            fix="make the plan anew",
        )
    if len(plan.replicas) != plan.parallelism.data:
        raise PlanError(
            "the number of replicas does not match",
            expected=str(plan.parallelism.data),
            found=str(len(plan.replicas)),
            fix="make the plan anew",
        )


def _check_passes(plan: Plan, replica: int) -> None:
    """Each device runs each micro-batch's forward, then its backward pass, once for each of its stages."""
    work = plan.replicas[replica]
    if len(work.instructions) != plan.parallelism.pipeline:
        raise _error(
            plan, replica, None, "wrong number of devices", str(plan.parallelism.pipeline), str(len(work.instructions))
        )
    num_micro_batches = len(work.micro_batches)
    for device, instructions in enumerate(work.instructions):
        seen: dict[tuple[int, int], int] = {}
        for index, op in enumerate(instructions):
            cell = (device, index)
            if not (0 <= op.micro_batch < num_micro_batches and 0 <= op.stage < len(plan.stages)):
                raise _error(
                    plan, replica, cell, "an instruction names work that does not exist",
                    f"micro-batch below {num_micro_batches}, stage below {len(plan.stages)}",
                    f"micro-batch {op.micro_batch}, stage {op.stage}",
                )  # fmt: skip
            if plan.device_of(op.stage) != device:
                raise _error(
                    plan, replica, cell, "an instruction is on the wrong device",
                    f"stage {op.stage} on device {plan.device_of(op.stage)}", f"it is on device {device}",
                )  # fmt: skip
            if type(op) not in (ForwardPass, BackwardPass):
                continue
            key = (op.micro_batch, op.stage)
            state = 1 if type(op) is ForwardPass else 2
            if seen.get(key, 0) != state - 1:
                raise _error(
                    plan, replica, cell, "a pass is out of order or repeated",
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
            raise _error(
                plan, replica, None, f"device {device} does not finish its work",
                "a forward and a backward pass of every micro-batch and stage",
                f"{len(missing)} incomplete, the first is micro-batch {missing[0][0]} on stage {missing[0][1]}",
            )  # fmt: skip


def transfers_between(work: ReplicaPlan, device: int, peer: int) -> Iterator[tuple[int, Transfer]]:
    """(index, start) of each transfer that ``device`` lists with ``peer``, in its order."""
    for index, op in enumerate(work.instructions[device]):
        if type(op) in STARTS and isinstance(op, Transfer) and op.peer == peer:
            yield index, op


def far_stage(op: Instruction) -> int:
    """The stage at the other end of a transfer."""
    towards_next = op.code.upper() in ("SA", "RG")
    return op.stage + 1 if towards_next else op.stage - 1


def _check_pairs(plan: Plan, replica: int) -> None:
    """Two devices list their common transfers in one order, each start meeting its counterpart.

    A channel between two ranks (NCCL's, for one) matches transfers by order alone, so this is what makes the
    transfers of a plan meet the right data.
    """
    work = plan.replicas[replica]
    for device in range(plan.parallelism.pipeline):
        for peer in range(device + 1, plan.parallelism.pipeline):
            mine, theirs = list(transfers_between(work, device, peer)), list(transfers_between(work, peer, device))
            if len(mine) != len(theirs):
                raise _error(
                    plan, replica, None, f"devices {device} and {peer} list different numbers of transfers",
                    f"{len(mine)}, as device {device}", f"{len(theirs)} on device {peer}",
                )  # fmt: skip
            for (index, a), (_, b) in zip(mine, theirs, strict=True):
                if STARTS[type(a)] is not type(b) or a.micro_batch != b.micro_batch or far_stage(a) != b.stage:
                    raise _error(
                        plan, replica, (device, index),
                        f"devices {device} and {peer} list their common transfers in different orders",
                        f"{STARTS[type(a)].__name__} of micro-batch {a.micro_batch} for stage {far_stage(a)} on "
                        f"device {peer}",
                        f"{type(b).__name__} of micro-batch {b.micro_batch} for stage {b.stage}",
                    )  # fmt: skip


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
                    raise _error(
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
        raise _error(
            plan, replica, (stuck[0], position[stuck[0]]), "the devices wait for each other",
            "every transfer's other end to be started",
            "; ".join(
                f"device {d} waits in {type(op).__name__} of micro-batch {op.micro_batch}, stage {op.stage}"
                for d, op in zip(stuck, heads, strict=True)
            ),
        )  # fmt: skip


def _check_buffers(plan: Plan, replica: int, device: int) -> None:
    """A buffer is written once, used only while it holds data, and freed once, after the last use."""
    live: dict[int, str] = {}  # "filling" (a receive is under way), "full" or "sending"
    for index, op in enumerate(plan.replicas[replica].instructions[device]):
        problem = _run_buffer_op(op, live)
        if problem:
            raise _error(
                plan, replica, (device, index), f"device {device} misuses a buffer",
                "buffers written once, read while full, and freed after their last use",
                f"{type(op).__name__} of micro-batch {op.micro_batch}, stage {op.stage}: {problem}",
            )  # fmt: skip
    if live:
        raise _error(
            plan, replica, None, f"device {device} never frees a buffer", "no buffer in use at the end",
            f"buffers {sorted(live)}",
        )  # fmt: skip


def _run_buffer_op(op: Instruction, live: dict[int, str]) -> str:
    """Apply ``op`` to the buffers' states; what is wrong with it, or nothing."""
    kind = type(op)
    if isinstance(op, ForwardPass | BackwardPass):
        for buffer in op.reads:
            if live.get(buffer) not in ("full", "sending"):
                return f"reads buffer {buffer}, which is {live.get(buffer, 'free')}"
        for buffer in op.writes:
            if buffer in live:
                return f"writes buffer {buffer}, which is {live[buffer]}"
            live[buffer] = "full"
        return ""
    assert isinstance(op, LoadInput | FreeBuffer | Transfer)
    buffer, state = op.buffer, live.get(op.buffer, "free")
    if kind is LoadInput or kind in _RECEIVES:
        if state != "free":
            return f"fills buffer {buffer}, which is {state}"
        live[buffer] = "full" if kind is LoadInput else "filling"
    elif kind in _ARRIVALS:
        if state != "filling":
            return f"waits for buffer {buffer}, which is {state}"
        live[buffer] = "full"
    elif kind in SENDS:
        if state != "full":
            return f"sends buffer {buffer}, which is {state}"
        live[buffer] = "sending"
    elif kind is FreeBuffer:
        if state != "full":
            return f"frees buffer {buffer}, which is {state}"
        del live[buffer]
    else:  # the end of a send
        if state != "sending":
            return f"finishes the send of buffer {buffer}, which is {state}"
        live[buffer] = "full"
    return ""
