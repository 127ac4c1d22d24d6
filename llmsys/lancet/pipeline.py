"""The order in which a range runs in parts, and how long that takes: P(i, n, k) of the paper's partition pass.

The ops that are split form stages: maximal runs of computation, or of communication without a dependency. Stages run
one after the other, and in a stage its ops for the first part, then for the second, and so on; the communication of a
part starts right after the computation of the part that comes before it. Of the ops that run whole, some come before
all parts and some after.

Times are those of a plan: one compute lane that executes in order, and a lane for each group that takes transfers in
the order of their starts. A wait blocks the compute lane. Joining parts is work for the compute lane; it is put under
the waits that would block it anyway, else before the first op that needs the whole tensor, else at the end.

`walk` is the definition; `end_times` gives the same times, bit for bit, from C++.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmsys import _C
from llmsys.lancet.axis_csp import AFTER, BEFORE, SPLIT
from llmsys.lancet.plan import WHOLE

Verb: TypeAlias = Literal["run", "start", "wait", "slice", "join"]
COMPUTE = -1
"""The ``lane`` of an op that is no communication."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """A range of ops, numbered from 0 in the order of the graph; slices and joins have numbers of their own.

    ``roles``: BEFORE, SPLIT or AFTER. ``lanes``: COMPUTE or the number of a communication lane.
    ``waits``: of each op, the communication ops whose end it needs, of the same part if they are split.
    ``slices``: of each op, the cuts that come right before its first part. ``joins``: of each join the op that makes
    its parts. ``uses``: of each op, the joins that must come before it; only of ops that run after the parts.
    """

    roles: tuple[int, ...]
    lanes: tuple[int, ...]
    waits: tuple[tuple[int, ...], ...]
    slices: tuple[tuple[int, ...], ...]
    joins: tuple[int, ...]
    uses: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """Times in ms for one number of parts: of each op or of one of its parts, of what its start and its wait cost on
    the compute lane, and of each slice and join, all parts together."""

    ops_ms: tuple[float, ...]
    starts_ms: tuple[float, ...]
    waits_ms: tuple[float, ...]
    slices_ms: tuple[float, ...]
    joins_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """``number`` is that of an op, or of a slice or a join."""

    verb: Verb
    number: int
    part: int = WHOLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """``end_ms``: when the compute lane is done; no communication is left then."""

    steps: tuple[Step, ...]
    end_ms: float


def walk(pipeline: Pipeline, durations: Durations, num_parts: int) -> Walk:
    """Runs a range, from idle lanes on. Takes time in proportion to its ops times ``num_parts``."""
    walker = _Walker(pipeline, durations, num_parts)
    for op, part in order(pipeline, num_parts):
        walker.issue(op, part)
    walker.drain()
    return Walk(steps=tuple(walker.steps), end_ms=walker.now_ms)


def order(pipeline: Pipeline, num_parts: int) -> Iterator[tuple[int, int]]:
    """The ops and parts in the order in which the compute lane runs or starts them."""
    ops = range(len(pipeline.roles))
    yield from ((op, WHOLE) for op in ops if pipeline.roles[op] == BEFORE)
    for ops_of_round in _rounds(pipeline):
        yield from ((op, part) for part in range(num_parts) for op in ops_of_round)
    yield from ((op, WHOLE) for op in ops if pipeline.roles[op] == AFTER)


def _rounds(pipeline: Pipeline) -> Iterator[list[int]]:
    """Each holds a stage of computation and the stage of communication that follows it; one of the two may be empty.

    Communication that waits for other communication begins a new stage, or the parts would run one after the other.
    """
    current: list[int] = []
    for op in (op for op, role in enumerate(pipeline.roles) if role == SPLIT):
        if pipeline.lanes[op] == COMPUTE:
            begins_stage = bool(current) and pipeline.lanes[current[-1]] != COMPUTE
        else:
            begins_stage = not set(pipeline.waits[op]).isdisjoint(current)
        if begins_stage:
            yield current
            current = []
        current.append(op)
    yield current


def end_times(pipeline: Pipeline, durations: Sequence[Durations], counts: Sequence[int]) -> list[float]:
    """``walk(pipeline, durations[i], counts[i]).end_ms`` for all i. Releases Python's lock. Times must be >= 0."""
    ends_ms = _C.pipeline_times(
        roles=_integers(pipeline.roles),
        lanes=_integers(pipeline.lanes),
        waits=_lists(pipeline.waits),
        slices=_lists(pipeline.slices),
        joins=_integers(pipeline.joins),
        uses=_lists(pipeline.uses),
        num_parts=_integers(counts),
        ops_ms=_table([row.ops_ms for row in durations]),
        starts_ms=_table([row.starts_ms for row in durations]),
        waits_ms=_table([row.waits_ms for row in durations]),
        slices_ms=_table([row.slices_ms for row in durations]),
        joins_ms=_table([row.joins_ms for row in durations]),
    )
    return [float(end_ms) for end_ms in ends_ms]


def _integers(values: Sequence[int]) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def _lists(values: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    offsets = list(accumulate(map(len, values), initial=0))
    return _integers(offsets), _integers(list(chain.from_iterable(values)))


def _table(rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    return np.array(rows, dtype=np.float64).reshape(len(rows), -1 if rows and rows[0] else 0)


class _Walker:
    """The state of the lanes; every sum is made in the same order as in C++."""

    def __init__(self, pipeline: Pipeline, durations: Durations, num_parts: int) -> None:
        self.pipeline, self.durations, self.num_parts = pipeline, durations, num_parts
        self.now_ms = 0.0
        self.steps: list[Step] = []
        self._free_ms = dict.fromkeys(pipeline.lanes, 0.0)
        self._end_ms: dict[tuple[int, int], float] = {}
        self._num_done = [0] * len(pipeline.roles)
        self._pending = list(range(len(pipeline.joins)))

    def issue(self, op: int, part: int) -> None:
        pipeline, durations = self.pipeline, self.durations
        if part <= 0:
            for number in pipeline.slices[op]:
                self.now_ms += durations.slices_ms[number]
                self.steps.append(Step(verb="slice", number=number))
        for producer in pipeline.waits[op]:
            self._wait(producer, part if pipeline.roles[producer] == SPLIT else WHOLE)
        for number in pipeline.uses[op]:
            self._join(number)
        lane = pipeline.lanes[op]
        if lane == COMPUTE:
            self.now_ms += durations.ops_ms[op]
            self._num_done[op] += 1
            self.steps.append(Step(verb="run", number=op, part=part))
            return
        self.now_ms += durations.starts_ms[op]
        self._free_ms[lane] = max(self.now_ms, self._free_ms[lane]) + durations.ops_ms[op]
        self._end_ms[op, part] = self._free_ms[lane]
        self.steps.append(Step(verb="start", number=op, part=part))

    def drain(self) -> None:
        for number in tuple(self._pending):
            self._join(number)
        for op, part in sorted(self._end_ms):
            self._wait(op, part)

    def _wait(self, op: int, part: int) -> None:
        end_ms = self._end_ms.pop((op, part), None)
        if end_ms is None:
            return
        for number in tuple(self._pending):
            is_ready = self._num_done[self.pipeline.joins[number]] == self.num_parts
            if is_ready and self.now_ms + self.durations.joins_ms[number] <= end_ms:
                self._join(number)
        self.now_ms = max(self.now_ms, end_ms) + self.durations.waits_ms[op]
        self._num_done[op] += 1
        self.steps.append(Step(verb="wait", number=op, part=part))

    def _join(self, number: int) -> None:
        if number not in self._pending:
            return
        self._pending.remove(number)
        producer = self.pipeline.joins[number]
        for part in range(self.num_parts):
            self._wait(producer, part)
        self.now_ms += self.durations.joins_ms[number]
        self.steps.append(Step(verb="join", number=number))
