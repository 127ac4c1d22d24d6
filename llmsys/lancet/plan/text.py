"""A plan as text: for people, golden files and diffs. ``from_text(to_text(plan)) == plan``, to the last bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import TypeVar

from llmsys.core.errors import PlanError
from llmsys.lancet.graph import LAST, PARTIAL, REPLICATED, Graph, dimension_of, irregular, is_irregular
from llmsys.lancet.plan.model import WHOLE, Estimate, Instruction, Join, Plan, Region, Run, Slice, Start, Wait

HEADER = "llmsys lancet plan, version 1"
_OPS: dict[str, type[Run | Start | Wait]] = {"run": Run, "start": Start, "wait": Wait}
_TENSORS: dict[str, type[Slice | Join]] = {"slice": Slice, "join": Join}
_CODES: dict[type[Instruction], str] = {kind: code for code, kind in (*_OPS.items(), *_TENSORS.items())}
_COMMENT = re.compile(r"^((?:run|start|wait) \S+)  +# .*$")
_AXES = {REPLICATED: "replicated", PARTIAL: "partial", LAST: "last"}
_ESTIMATES = ("step_ms", "compute_ms", "comm_ms", "exposed_comm_ms", "peak_mb", "captured_peak_mb")
_T = TypeVar("_T")


def axis_text(axis: int) -> str:
    """An axis of `graph` in words: "1", "irregular(1)", "partial"."""
    return f"irregular({dimension_of(axis)})" if is_irregular(axis) else _AXES.get(axis, str(axis))


def instruction_text(instruction: Instruction) -> str:
    """One instruction: ``run 12``, ``start 7.0`` (op 7, part 0), ``join region 0 axis 1 "name"``."""
    code = _CODES[type(instruction)]
    if isinstance(instruction, Slice | Join):
        axis = axis_text(instruction.axis)
        return f"{code} region {instruction.region} axis {axis} {json.dumps(instruction.tensor)}"
    part = "" if instruction.part == WHOLE else f".{instruction.part}"
    return f"{code} {instruction.op}{part}"


def listing(graph: Graph, plan: Plan, mark: int, around: int = 5) -> str:
    """The instructions around place ``mark`` with the names of their ops; the marked one has an arrow."""
    first, stop = max(0, mark - around), min(len(plan.instructions), mark + around + 1)
    lines = []
    for place in range(first, stop):
        arrow = ">" if place == mark else " "
        lines.append(f"{arrow} {place:>5}  {_named(graph, plan.instructions[place])}")
    return "\n".join(lines)


def _named(graph: Graph | None, instruction: Instruction) -> str:
    text = instruction_text(instruction)
    if graph is None or isinstance(instruction, Slice | Join) or not 0 <= instruction.op < len(graph.ops):
        return text
    op = graph.ops[instruction.op]
    return f"{text:<14}  # {op.name} {op.target} {op.phase}"


def to_text(plan: Plan, graph: Graph | None = None) -> str:
    """All of a plan, one instruction a line; ``graph`` adds the ops' names as comments, which reading drops."""
    numbers = " ".join(f"{name}={getattr(plan.estimate, name)!r}" for name in _ESTIMATES)
    lines = [
        HEADER,
        f"planner {json.dumps(plan.planner)}",
        f"graph {json.dumps(plan.graph_name)}",
        f"fingerprint {json.dumps(plan.fingerprint)}",
        f"estimate {numbers}",
        *(f"note {json.dumps(note)}" for note in plan.notes),
    ]
    for region in plan.regions:
        ops = " ".join(f"{op}:{split}" for op, split in zip(region.ops, region.splits, strict=True))
        lines.append(f"region num_parts={region.num_parts} {ops}")
    lines += [f"hidden {op}:" + "".join(f" {i}" for i in hidden) for op, hidden in plan.hidden_under.items()]
    lines += [_named(graph, instruction) for instruction in plan.instructions]
    return "\n".join(lines) + "\n"


def from_text(text: str) -> Plan:
    """The plan that `to_text` wrote. PlanError names the line that cannot be read; `check_plan` says if it can run."""
    given = [_COMMENT.sub(r"\1", line) for line in text.splitlines()]
    plan = _Reader(given).plan()
    # Lost, repeated or unknown words that were read over would show here.
    for number, line in enumerate(to_text(plan).splitlines()):
        if number >= len(given) or given[number] != line:
            raise _unreadable(number + 1, line, given[number] if number < len(given) else "the end of the text")
    return plan


def _unreadable(number: int, expected: str, found: str) -> PlanError:
    return PlanError(
        f"line {number} of the plan's text is not as to_text writes it",
        expected=expected[:100],
        found=repr(found[:100]),
        fix="make the plan anew, or restore the file",
    )


class _Reader:
    """Reads lines in order; ``at`` is the number of lines read."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.at = 0

    def plan(self) -> Plan:
        try:
            return self._plan()
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            line = self.lines[self.at - 1] if 0 < self.at <= len(self.lines) else "the end of the text"
            raise _unreadable(self.at, f"the form that to_text writes ({error})", line) from error

    def _plan(self) -> Plan:
        if self._next() != HEADER:
            raise ValueError(f"the first line is {HEADER!r}")
        planner, graph, fingerprint = (self._one(word, _quoted) for word in ("planner", "graph", "fingerprint"))
        estimate = self._one("estimate", _estimate)
        notes = tuple(self._all("note", _quoted))
        regions = tuple(self._all("region", _region))
        hidden = dict(self._all("hidden", _hidden))
        instructions = []
        while self.at < len(self.lines):
            instructions.append(_instruction(self._next()))
        return Plan(
            planner=planner,
            graph_name=graph,
            fingerprint=fingerprint,
            instructions=tuple(instructions),
            regions=regions,
            hidden_under=hidden,
            estimate=estimate,
            notes=notes,
        )

    def _next(self) -> str:
        self.at += 1
        if self.at > len(self.lines):
            raise ValueError("the text ends too early")
        return self.lines[self.at - 1]

    def _one(self, word: str, read: Callable[[str], _T]) -> _T:
        line = self._next()
        if not line.startswith(word + " "):
            raise ValueError(f"a line that begins with {word!r}")
        return read(line[len(word) + 1 :])

    def _all(self, word: str, read: Callable[[str], _T]) -> Iterator[_T]:
        while self.at < len(self.lines) and self.lines[self.at].startswith(word + " "):
            yield self._one(word, read)


def _quoted(text: str) -> str:
    value = json.loads(text)
    if not isinstance(value, str):
        raise ValueError("a text in quotes")
    return value


def _estimate(text: str) -> Estimate:
    fields = dict(word.split("=", 1) for word in text.split())
    return Estimate(**{name: float(value) for name, value in fields.items()})


def _region(text: str) -> Region:
    first, *ops = text.split()
    pairs = [op.split(":") for op in ops]
    return Region(
        num_parts=int(first.removeprefix("num_parts=")),
        ops=tuple(int(op) for op, _ in pairs),
        splits=tuple(int(split) for _, split in pairs),
    )


def _hidden(text: str) -> tuple[int, tuple[int, ...]]:
    op, hidden = text.split(":")
    return int(op), tuple(int(index) for index in hidden.split())


def _axis(text: str) -> int:
    for axis, word in _AXES.items():
        if text == word:
            return axis
    match = re.fullmatch(r"irregular\((\d+)\)", text)
    return irregular(int(match[1])) if match else int(text)


def _instruction(line: str) -> Instruction:
    code, _, rest = line.partition(" ")
    if code in _OPS:
        op, _, part = rest.partition(".")
        return _OPS[code](op=int(op), part=int(part) if part else WHOLE)
    match = re.fullmatch(r"region (\d+) axis (\S+) (.*)", rest)
    if code not in _TENSORS or match is None:
        raise ValueError("an instruction")
    return _TENSORS[code](region=int(match[1]), axis=_axis(match[2]), tensor=_quoted(match[3]))


def describe(plan: Plan, graph: Graph) -> str:
    """A summary for people: the estimate, each region, and what hides each all-to-all of the graph."""
    e = plan.estimate
    lines = [
        f"{plan.planner} plan of {plan.graph_name}: {e.step_ms:.3f} ms expected, {e.compute_ms:.3f} ms compute, "
        f"{e.comm_ms:.3f} ms communication of which {e.exposed_comm_ms:.3f} ms exposed",
        f"  {len(plan.instructions)} instructions; peak {e.peak_mb:.1f} MB, {e.captured_peak_mb:.1f} MB as captured",
    ]
    parts = {op: region.num_parts for region in plan.regions for op in region.ops}
    for number, region in enumerate(plan.regions):
        first, last = graph.ops[region.ops[0]].name, graph.ops[region.ops[-1]].name
        lines.append(f"  region {number}: {len(region.ops)} ops in {region.num_parts} parts, {first} to {last}")
    width = max((len(graph.ops[op].name) for op in graph.comm_ops("all_to_all")), default=0)
    for op in graph.comm_ops("all_to_all"):
        hidden = [graph.ops[index].name for index in plan.hidden_under.get(op, ())]
        shown = ", ".join(hidden[:4]) + (f" and {len(hidden) - 4} more" if len(hidden) > 4 else "")
        name = f"{graph.ops[op].name:<{width}}"
        lines.append(f"  {name}  {graph.ops[op].phase:<8}  parts {parts.get(op, 1)}  hides behind: {shown or '-'}")
    return "\n".join([*lines, *(f"  note: {note}" for note in plan.notes)])
