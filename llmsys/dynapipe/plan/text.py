"""A plan as text: for people, golden files and diffs. ``from_text(to_text(plan)) == plan``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import cast, get_args

from llmsys.core.errors import PlanError
from llmsys.dynapipe.config import Attention, Parallelism, Recompute, ScheduleKind, StageLayers
from llmsys.dynapipe.plan.checks import check_plan
from llmsys.dynapipe.plan.instructions import (
    BY_CODE,
    BackwardPass,
    ForwardPass,
    FreeBuffer,
    Instruction,
    LoadInput,
    Transfer,
)
from llmsys.dynapipe.plan.model import Estimate, MicroBatch, Plan, ReplicaPlan

HEADER = "llmsys dynapipe plan, version 1"
_OPS_PER_LINE = 12
_OP = re.compile(r"([A-Za-z]+)(\d+)\.(\d+)\[([\d,]*)(?:>([\d,]*))?\](?:@(\d+))?")


def to_text(plan: Plan) -> str:
    """All of a plan. An instruction is ``code micro-batch.stage[buffers]@peer``; passes write ``[read>written]``."""
    p = plan.parallelism
    lines = [
        HEADER,
        f"planner {plan.planner}",
        f"samples {plan.num_samples}",
        f"attention {plan.attention} decoder_extra_tokens={plan.decoder_extra_tokens}",
        f"parallelism data={p.data} pipeline={p.pipeline} tensor={p.tensor} num_chunks={p.num_chunks} "
        f"zero_stage={p.zero_stage}",
        "stages " + " ".join(f"{s.num_encoder}+{s.num_decoder}{'+head' if s.head else ''}" for s in plan.stages),
        f"memory_limit_mb {_floats(plan.memory_limit_mb)}",
    ]
    for number, replica in enumerate(plan.replicas):
        lines += ["", f"replica {number} schedule={replica.schedule} recompute={replica.recompute}"]
        lines.append(f"estimate {replica.estimate.makespan_ms!r} {_floats(replica.estimate.peak_mb)}")
        for index, m in enumerate(replica.micro_batches):
            rows = ";".join(",".join(map(str, row)) for row in m.rows)
            lines.append(f"micro_batch {index} encoder={m.encoder_len} decoder={m.decoder_len} rows={rows}")
        for device, instructions in enumerate(replica.instructions):
            lines.append(f"device {device}")
            ops = [_op_text(op) for op in instructions]
            lines += ["  " + " ".join(ops[i : i + _OPS_PER_LINE]) for i in range(0, len(ops), _OPS_PER_LINE)]
    return "\n".join(lines) + "\n"


def from_text(text: str) -> Plan:
    """The plan that ``to_text`` wrote; PlanError names the line that cannot be read, or the rule the plan breaks."""
    plan = _Reader(text).plan()
    # Lost, repeated or unknown words that were read over would show here.
    written, given = to_text(plan).splitlines(), text.splitlines()
    for number, line in enumerate(written):
        if number >= len(given) or given[number].rstrip() != line:
            raise PlanError(
                f"line {number + 1} of the plan's text is not as to_text writes it",
                expected=repr(line[:100]),
                found=repr(given[number][:100]) if number < len(given) else "the end of the text",
                fix="make the plan anew, or restore the file",
            )
    check_plan(plan)
    return plan


def _floats(values: tuple[float, ...]) -> str:
    return " ".join(repr(float(value)) for value in values)


def _op_text(op: Instruction) -> str:
    where = f"{op.code}{op.micro_batch}.{op.stage}"
    if isinstance(op, ForwardPass | BackwardPass):
        return f"{where}[{','.join(map(str, op.reads))}>{','.join(map(str, op.writes))}]"
    assert isinstance(op, LoadInput | FreeBuffer | Transfer)
    return f"{where}[{op.buffer}]" + (f"@{op.peer}" if isinstance(op, Transfer) else "")


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",")) if text else ()


def _op_from(token: str) -> Instruction:
    match = _OP.fullmatch(token)
    kind = BY_CODE.get(match[1]) if match else None
    if match is None or kind is None:
        raise ValueError(f"unknown instruction {token!r}")
    micro_batch, stage = int(match[2]), int(match[3])
    if kind is ForwardPass or kind is BackwardPass:
        return kind(micro_batch=micro_batch, stage=stage, reads=_integers(match[4]), writes=_integers(match[5] or ""))
    (buffer,) = _integers(match[4])
    if issubclass(kind, Transfer):
        return kind(micro_batch=micro_batch, stage=stage, buffer=buffer, peer=int(match[6]))
    return kind(micro_batch=micro_batch, stage=stage, buffer=buffer)  # type: ignore[call-arg]


class _Reader:
    def __init__(self, text: str) -> None:
        self.lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        self.at = 0

    def plan(self) -> Plan:
        try:
            return self._plan()
        except (ValueError, IndexError, KeyError, StopIteration, TypeError) as error:
            number, line = self.lines[min(self.at, len(self.lines)) - 1] if self.lines else (0, "")
            raise PlanError(
                f"line {number} of the plan's text cannot be read",
                expected="the form that to_text writes",
                found=f"{line.strip()[:100]!r} ({error})",
                fix="make the plan anew, or restore the file",
            ) from error

    def _next(self, keyword: str) -> str:
        if self.at >= len(self.lines):
            self.at += 1
            raise ValueError(f"the text ends where a line {keyword!r} should be")
        line = self.lines[self.at][1].strip()
        self.at += 1
        if line != keyword and not line.startswith(keyword + " "):
            raise ValueError(f"expected a line that begins with {keyword!r}")
        return line[len(keyword) :].strip()

    def _peek(self, keyword: str) -> bool:
        return self.at < len(self.lines) and self.lines[self.at][1].startswith(keyword)

    def _plan(self) -> Plan:
        self._next(HEADER)
        planner = self._next("planner")
        num_samples = int(self._next("samples"))
        attention, rest = self._next("attention").split(" ", 1)
        extra = int(_assignments(rest)["decoder_extra_tokens"])
        if attention not in get_args(Attention):
            raise ValueError(f"unknown attention {attention!r}")
        fields = _assignments(self._next("parallelism"))
        parallelism = Parallelism(**{name: int(value) for name, value in fields.items()})
        stages = tuple(_stage_from(part) for part in self._next("stages").split())
        limits = tuple(float(part) for part in self._next("memory_limit_mb").split())
        replicas = []
        while self.at < len(self.lines):
            replicas.append(self._replica(parallelism.pipeline))
        return Plan(
            planner=planner,
            num_samples=num_samples,
            parallelism=parallelism,
            stages=stages,
            memory_limit_mb=limits,
            attention=cast(Attention, attention),
            decoder_extra_tokens=extra,
            replicas=tuple(replicas),
        )

    def _replica(self, num_devices: int) -> ReplicaPlan:
        fields = _assignments(self._next("replica").split(" ", 1)[1])
        if fields["schedule"] not in get_args(ScheduleKind) or fields["recompute"] not in get_args(Recompute):
            raise ValueError(f"unknown schedule or recompute kind in {fields}")
        numbers = [float(part) for part in self._next("estimate").split()]
        micro_batches = []
        while self._peek("micro_batch"):
            words = _assignments(self._next("micro_batch").split(" ", 1)[1])
            micro_batches.append(
                MicroBatch(
                    rows=tuple(_integers(row) for row in words["rows"].split(";")),
                    encoder_len=int(words["encoder"]),
                    decoder_len=int(words["decoder"]),
                )
            )
        instructions = []
        for device in range(num_devices):
            if int(self._next("device")) != device:
                raise ValueError(f"expected device {device}")
            instructions.append(tuple(self._ops()))
        return ReplicaPlan(
            micro_batches=tuple(micro_batches),
            recompute=cast(Recompute, fields["recompute"]),
            schedule=cast(ScheduleKind, fields["schedule"]),
            estimate=Estimate(makespan_ms=numbers[0], peak_mb=tuple(numbers[1:])),
            instructions=tuple(instructions),
        )

    def _ops(self) -> Iterator[Instruction]:
        while self._peek("  "):
            line = self.lines[self.at][1]
            self.at += 1
            yield from (_op_from(token) for token in line.split())


def _assignments(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split())


def _stage_from(text: str) -> StageLayers:
    parts = text.split("+")
    return StageLayers(num_encoder=int(parts[0]), num_decoder=int(parts[1]), head=parts[2:] == ["head"])
