"""Whether the buffers of a plan live long enough, and hold what each instruction takes them to hold."""

from __future__ import annotations

from llmsys.core.errors import PlanError
from llmsys.dynapipe.plan.instructions import (
    BackwardPass,
    ForwardPass,
    FreeBuffer,
    Instruction,
    LoadInput,
    RecvActivationFinish,
    RecvActivationStart,
    RecvGradFinish,
    RecvGradStart,
    SendActivationFinish,
    SendActivationStart,
    SendGradFinish,
    SendGradStart,
    Transfer,
)
from llmsys.dynapipe.plan.model import Plan

# What a buffer holds: the loaded input of a stage, the output of a stage, or the gradient of that output.
_Data = tuple[str, int, int]  # kind, micro-batch, stage

_FREE: tuple[str, _Data | None] = ("free", None)

# What a transfer moves, the stage whose output it belongs to relative to the transfer's own, and the state of the
# buffer before and after.
_TRANSFERS: dict[type[Instruction], tuple[str, int, str, str]] = {
    SendActivationStart: ("output", 0, "full", "sending"),
    SendActivationFinish: ("output", 0, "sending", "full"),
    RecvActivationStart: ("output", -1, "free", "filling"),
    RecvActivationFinish: ("output", -1, "filling", "full"),
    SendGradStart: ("gradient", -1, "full", "sending"),
    SendGradFinish: ("gradient", -1, "sending", "full"),
    RecvGradStart: ("gradient", 0, "free", "filling"),
    RecvGradFinish: ("gradient", 0, "filling", "full"),
}


def broken_rule(
    plan: Plan, replica: int, cell: tuple[int, int] | None, summary: str, expected: str, found: str
) -> PlanError:
    """The error for a rule that ``replica`` breaks, at ``cell`` = (device, index of the instruction)."""
    return PlanError(
        f"replica {replica}: {summary}",
        expected=expected,
        found=found,
        fix="make the plan anew; a plan that was edited or cut off cannot be repaired",
        grid=plan.grid(replica, cell),
    )


def check_buffers(plan: Plan, replica: int, device: int) -> None:
    """PlanError unless every buffer is written once, read while it holds the right data, and freed after that."""
    instructions = plan.replicas[replica].instructions[device]
    buffers = _Buffers(plan)
    for index, op in enumerate(instructions):
        problem = buffers.run(op)
        if problem:
            raise broken_rule(
                plan, replica, (device, index), f"device {device} misuses a buffer",
                "buffers written once, read while they hold the data, and freed after their last use",
                f"{type(op).__name__} of micro-batch {op.micro_batch}, stage {op.stage}: {problem}",
            )  # fmt: skip
    if buffers.live:
        last_use = max(index for index, op in enumerate(instructions) if buffers.live.keys() & set(_buffers_of(op)))
        raise broken_rule(
            plan, replica, (device, last_use), f"device {device} never frees a buffer",
            "no buffer in use at the end", f"buffers {sorted(buffers.live)}",
        )  # fmt: skip


def _buffers_of(op: Instruction) -> tuple[int, ...]:
    if isinstance(op, ForwardPass | BackwardPass):
        return (*op.reads, *op.writes)
    assert isinstance(op, LoadInput | FreeBuffer | Transfer)
    return (op.buffer,)


class _Buffers:
    """The buffers of a device: a state ("filling" while a receive is under way, "full" or "sending") and the data."""

    def __init__(self, plan: Plan) -> None:
        self.live: dict[int, tuple[str, _Data]] = {}
        self._last_stage = len(plan.stages) - 1
        self._loads_input = [plan.loads_input(v) for v in range(len(plan.stages))]

    def run(self, op: Instruction) -> str:
        """Apply ``op``; what is wrong with it, or nothing."""
        if isinstance(op, Transfer):
            return self._run_transfer(op)
        if isinstance(op, FreeBuffer):
            state, data = self.live.get(op.buffer, _FREE)
            if state != "full" or data is None or data[1] != op.micro_batch:
                return f"frees buffer {op.buffer}, which is {_describe(state, data)}"
            del self.live[op.buffer]
            return ""
        if isinstance(op, LoadInput):
            if not self._loads_input[op.stage]:
                return "the stage has no input of its own"
            return self._fill(op.buffer, "full", ("input", op.micro_batch, op.stage))
        assert isinstance(op, ForwardPass | BackwardPass)
        return self._run_pass(op)

    def _run_pass(self, op: ForwardPass | BackwardPass) -> str:
        m, v = op.micro_batch, op.stage
        needed: list[_Data] = [("input", m, v)] if self._loads_input[v] else []
        if v > 0:
            needed.append(("output", m, v - 1))
        made: list[_Data] = []
        if isinstance(op, BackwardPass):
            if v < self._last_stage:
                needed += [("output", m, v), ("gradient", m, v)]
            if v > 0:
                made.append(("gradient", m, v - 1))
        elif v < self._last_stage:
            made.append(("output", m, v))
        if len(op.reads) != len(needed) or len(op.writes) != len(made):
            return f"reads {len(op.reads)} and writes {len(op.writes)} buffers, not {len(needed)} and {len(made)}"
        for buffer, data in zip(op.reads, needed, strict=True):
            state, held = self.live.get(buffer, _FREE)
            if state not in ("full", "sending") or held != data:
                return f"reads {_describe('', data)} from buffer {buffer}, which is {_describe(state, held)}"
        return self._fill(op.writes[0], "full", made[0]) if made else ""

    def _run_transfer(self, op: Transfer) -> str:
        what, offset, before, after = _TRANSFERS[type(op)]
        data = (what, op.micro_batch, op.stage + offset)
        if before == "free":
            return self._fill(op.buffer, after, data)
        state, held = self.live.get(op.buffer, _FREE)
        if state != before or held != data:
            verb = "sends" if after == "sending" else "waits for"
            return f"{verb} {_describe('', data)} in buffer {op.buffer}, which is {_describe(state, held)}"
        self.live[op.buffer] = (after, data)
        return ""

    def _fill(self, buffer: int, state: str, data: _Data) -> str:
        if buffer in self.live:
            return f"fills buffer {buffer}, which is {_describe(*self.live[buffer])}"
        self.live[buffer] = (state, data)
        return ""


def _describe(state: str, data: _Data | None) -> str:
    if data is None:
        return state
    what, micro_batch, stage = data
    return f"{state} {'with ' if state else ''}the {what} of micro-batch {micro_batch}, stage {stage}".strip()
