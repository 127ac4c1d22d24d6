"""Two small simulators: lanes that run fixed lists of ops, and an event loop with fair-shared links."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmsys.core.errors import InputError, PlanError
from llmsys.core.timeline import Scalar, Span, Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneOp:
    """One operation of a lane. ``op_id`` is unique over all lanes; ``name`` defaults to its text."""

    op_id: Hashable
    lane: str
    duration_ms: float
    depends_on: tuple[Hashable, ...] = ()
    kind: str = ""
    name: str = ""
    args: tuple[tuple[str, Scalar], ...] = ()

    def __post_init__(self) -> None:
        # Written so that NaN fails too.
        if not 0 <= self.duration_ms < math.inf:
            raise InputError(
                f"op {self.op_id!r} has an impossible duration",
                expected="a finite duration_ms of at least 0",
                found=str(self.duration_ms),
                fix="set duration_ms",
            )


def run_lanes(ops_per_lane: Mapping[str, Sequence[LaneOp]]) -> Timeline:
    """Run each lane's list in its order; the lanes of the result are those of ``ops_per_lane``.

    An op starts as soon as its lane is free and every op in its ``depends_on`` has ended; all lanes start at
    0. Linear in the number of ops and dependencies. Raises PlanError for a repeated ``op_id``, an op in
    another lane's list, a dependency that no lane runs, and a deadlock. The last names, for each lane that is
    stuck, its next op (its head) and what that waits for, and the cycles of lanes that wait for each other.
    """
    # Ops are numbered lane after lane, so that a lane's next op is one number; hashing every op_id again and
    # again would double the time.
    ops, lane_of, needs = _number_ops(ops_per_lane)
    lanes = list(ops_per_lane)
    dependents: list[list[int]] = [[] for _ in ops]
    for number, needed_ops in enumerate(needs):
        for needed in needed_ops:
            dependents[needed].append(number)
    waiting = [len(needed_ops) for needed_ops in needs]
    next_op, stop = _lane_bounds(ops_per_lane)
    free_ms = [0.0] * len(lanes)
    end_ms = [math.nan] * len(ops)
    spans: list[Span] = []
    runnable = list(range(len(lanes)))
    while runnable:
        lane = runnable.pop()
        at, lane_free_ms = next_op[lane], free_ms[lane]
        while at < stop[lane] and waiting[at] == 0:
            op = ops[at]
            start = lane_free_ms
            for needed in needs[at]:
                start = max(start, end_ms[needed])
            end = end_ms[at] = lane_free_ms = start + op.duration_ms
            name = op.name or str(op.op_id)
            spans.append(Span(lane=op.lane, name=name, kind=op.kind, start_ms=start, end_ms=end, args=op.args))
            for later in dependents[at]:
                waiting[later] -= 1
                if waiting[later] == 0 and later == next_op[lane_of[later]] and lane_of[later] != lane:
                    runnable.append(lane_of[later])
            at += 1
        next_op[lane], free_ms[lane] = at, lane_free_ms
    if len(spans) < len(ops):
        raise _Deadlock(lanes, ops, lane_of, needs, next_op, stop).error(num_done=len(spans))
    return Timeline(spans=tuple(spans), lanes=tuple(lanes))


def _number_ops(
    ops_per_lane: Mapping[str, Sequence[LaneOp]],
) -> tuple[list[LaneOp], list[int], list[tuple[int, ...]]]:
    """All ops lane after lane; of each, the number of its lane and the numbers of the ops it depends on."""
    ops: list[LaneOp] = []
    lane_of: list[int] = []
    number_of: dict[Hashable, int] = {}
    for lane_number, (lane, lane_ops) in enumerate(ops_per_lane.items()):
        for op in lane_ops:
            if op.lane != lane:
                raise PlanError(
                    f"op {op.op_id!r} is in the list of another lane",
                    expected=f"only ops of lane {lane!r} in its list",
                    found=f"an op of lane {op.lane!r}",
                    fix=f"move it to the list of lane {op.lane!r}, or set its lane",
                )
            if number_of.setdefault(op.op_id, len(ops)) != len(ops):
                raise PlanError(
                    f"op {op.op_id!r} is given twice",
                    expected="each op_id once",
                    found=f"on lanes {ops[number_of[op.op_id]].lane!r} and {lane!r}",
                    fix="give one of them another op_id, or remove it",
                )
            ops.append(op)
            lane_of.append(lane_number)
    try:
        needs = [tuple({number_of[needed] for needed in op.depends_on}) for op in ops]
    except KeyError:
        raise _missing_dependency(ops, number_of) from None
    return ops, lane_of, needs


def _missing_dependency(ops: Sequence[LaneOp], known: Container[Hashable]) -> PlanError:
    op, needed = next((op, needed) for op in ops for needed in op.depends_on if needed not in known)
    return PlanError(
        f"op {op.op_id!r} of lane {op.lane!r} depends on an op that no lane runs",
        expected="depends_on to name ops of the given lists",
        found=repr(needed),
        fix="take it out of depends_on, or add that op to a lane",
    )


def _lane_bounds(ops_per_lane: Mapping[str, Sequence[LaneOp]]) -> tuple[list[int], list[int]]:
    """The number of each lane's first op, and the number after its last."""
    stop = list(itertools.accumulate(len(lane_ops) for lane_ops in ops_per_lane.values()))
    return [0, *stop[:-1]][: len(stop)], stop


@dataclass(frozen=True, slots=True)
class _Deadlock:
    """The state in which no lane can go on; ``next_op`` holds the number of each lane's head."""

    lanes: Sequence[str]
    ops: Sequence[LaneOp]
    lane_of: Sequence[int]
    needs: Sequence[Sequence[int]]
    next_op: Sequence[int]
    stop: Sequence[int]

    def error(self, num_done: int) -> PlanError:
        stuck = [lane for lane in range(len(self.lanes)) if self.next_op[lane] < self.stop[lane]]
        unmet = {lane: self._unmet(lane) for lane in stuck}
        found = [f"{num_done} of {len(self.ops)} ops ran"]
        for lane in stuck:
            waits = ", ".join(self._describe(needed) for needed in unmet[lane])
            head = self.ops[self.next_op[lane]]
            found.append(f"lane {self.lanes[lane]!r}: head {head.op_id!r} waits for {waits}")
        for cycle in _cycles({lane: self.lane_of[needed[0]] for lane, needed in unmet.items()}):
            found.append("cycle of lanes: " + " -> ".join(repr(self.lanes[lane]) for lane in cycle))
        return PlanError(
            f"deadlock: {len(stuck)} of {len(self.lanes)} lanes are stuck",
            expected="an order of each lane in which every op can run",
            found="\n    ".join(found),
            fix="reorder one lane of the cycle so that the op which is waited for comes before its head",
            grid="\n".join(self._row(lane) for lane in stuck),
        )

    def _unmet(self, lane: int) -> list[int]:
        needs = self.needs[self.next_op[lane]]
        return sorted(needed for needed in needs if needed >= self.next_op[self.lane_of[needed]])

    def _describe(self, needed: int) -> str:
        lane = self.lane_of[needed]
        behind = needed - self.next_op[lane]
        place = f"{behind} behind the head" if behind else "the head"
        return f"{self.ops[needed].op_id!r} ({place} of lane {self.lanes[lane]!r})"

    def _row(self, lane: int) -> str:
        """The head in brackets, between the two ops before it and the four after it."""
        at = self.next_op[lane]
        first = max(self.stop[lane - 1] if lane else 0, at - 2)
        names = [str(op.op_id) for op in self.ops[first : min(at + 5, self.stop[lane])]]
        names[at - first] = f"[{names[at - first]}]"
        return " ".join([f"{self.lanes[lane]} |", *names])


def _cycles(follows: Mapping[int, int]) -> list[list[int]]:
    """The cycles of a graph in which each node has one successor; each ends with its first node again."""
    seen: set[int] = set()
    cycles = []
    for start in follows:
        path: list[int] = []
        node = start
        while node not in seen:
            seen.add(node)
            path.append(node)
            node = follows[node]
        if node in path:
            cycles.append([*path[path.index(node) :], node])
    return cycles


class EventLoop:
    """Runs callbacks at simulated times: in order of time and, at equal times, of scheduling."""

    def __init__(self) -> None:
        self._now_ms = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._num_scheduled = 0

    @property
    def now_ms(self) -> float:
        return self._now_ms

    def schedule(self, at_ms: float, callback: Callable[[], None]) -> None:
        """Call ``callback`` at ``at_ms``. Raises InputError for a time before ``now_ms``, or not finite."""
        if not self._now_ms <= at_ms < math.inf:
            raise InputError(
                "an event cannot be scheduled then",
                expected=f"a finite time, not before now ({self._now_ms} ms)",
                found=f"{at_ms} ms",
                fix="set at_ms, for example to now_ms plus a delay",
            )
        heapq.heappush(self._queue, (at_ms, self._num_scheduled, callback))
        self._num_scheduled += 1

    def run(self, until_ms: float = math.inf) -> float:
        """Run all events up to and including ``until_ms``, also new ones; returns ``now_ms``.

        Afterwards ``now_ms`` is ``until_ms``, or the time of the last event if that is infinite.
        """
        while self._queue and self._queue[0][0] <= until_ms:
            self._now_ms, _, callback = heapq.heappop(self._queue)
            callback()
        if until_ms != math.inf:
            self._now_ms = max(self._now_ms, until_ms)
        return self._now_ms


@dataclass(slots=True, kw_only=True)
class _Transfer:
    remaining_bytes: float
    cap_bytes_per_ms: float
    on_done: Callable[[], None]
    rate_bytes_per_ms: float = 0.0
    finish_ms: float = math.inf


class FairShareLink:
    """A link whose active transfers share its capacity max-min fairly at every moment (processor sharing).

    Each transfer gets capacity / number of active ones; what a transfer with a lower cap of its own leaves
    over is shared by the others (progressive filling). GB are 10^9 bytes. For latency, start later.
    """

    def __init__(self, loop: EventLoop, *, capacity_gb_per_s: float) -> None:
        self._loop = loop
        self._capacity_bytes_per_ms = 1e6 * _positive("capacity_gb_per_s", capacity_gb_per_s)
        self._active: list[_Transfer] = []
        self._settled_ms = loop.now_ms
        self._epoch = 0

    @property
    def num_active(self) -> int:
        return len(self._active)

    def start(self, size_bytes: float, on_done: Callable[[], None], *, max_gb_per_s: float = math.inf) -> None:
        """Begin a transfer now; ``on_done`` is called by the event loop when its last byte has passed.

        Transfers that finish together call back in the order of their start. ``max_gb_per_s`` caps this one.
        """
        if not 0 <= size_bytes < math.inf:
            raise InputError(
                "not a transfer size", expected="finite, at least 0", found=f"{size_bytes} bytes", fix="set size_bytes"
            )
        cap = max_gb_per_s if max_gb_per_s == math.inf else _positive("max_gb_per_s", max_gb_per_s)
        self._settle()
        self._active.append(_Transfer(remaining_bytes=float(size_bytes), cap_bytes_per_ms=1e6 * cap, on_done=on_done))
        self._share()

    def _settle(self) -> None:
        """Account for the bytes that passed since the rates last changed."""
        now = self._loop.now_ms
        for transfer in self._active:
            passed = transfer.rate_bytes_per_ms * (now - self._settled_ms)
            transfer.remaining_bytes = max(0.0, transfer.remaining_bytes - passed)
        self._settled_ms = now

    def _share(self) -> None:
        """Progressive filling, then one event at the earliest finish; events of older rates become void."""
        self._epoch += 1
        if not self._active:
            return
        left, num_left = self._capacity_bytes_per_ms, len(self._active)
        for transfer in sorted(self._active, key=lambda transfer: transfer.cap_bytes_per_ms):
            transfer.rate_bytes_per_ms = min(transfer.cap_bytes_per_ms, left / num_left)
            left -= transfer.rate_bytes_per_ms
            num_left -= 1
            duration = transfer.remaining_bytes / transfer.rate_bytes_per_ms
            transfer.finish_ms = self._loop.now_ms + duration
        epoch = self._epoch
        earliest = min(transfer.finish_ms for transfer in self._active)
        self._loop.schedule(earliest, lambda: self._finish(epoch))

    def _finish(self, epoch: int) -> None:
        if epoch != self._epoch:
            return
        self._settle()
        # Equal transfers reach equal times up to rounding; a picosecond keeps them one event.
        due = self._loop.now_ms + 1e-9
        done = [transfer for transfer in self._active if transfer.finish_ms <= due]
        self._active = [transfer for transfer in self._active if transfer.finish_ms > due]
        self._share()
        for transfer in done:
            transfer.on_done()


def poisson_arrivals_ms(*, rate_per_s: float, num_arrivals: int, seed: int) -> NDArray[np.float64]:
    """Increasing times in ms of the first arrivals of a Poisson process from time 0, (num_arrivals,)."""
    _positive("rate_per_s", rate_per_s)
    if num_arrivals < 0:
        raise InputError(
            "a negative number of arrivals",
            expected="num_arrivals >= 0",
            found=str(num_arrivals),
            fix="set num_arrivals",
        )
    gaps_s = np.random.default_rng(seed).exponential(1.0 / rate_per_s, size=num_arrivals)
    return np.asarray(1e3 * np.cumsum(gaps_s), dtype=np.float64)


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise InputError(f"{name} is out of range", expected="finite, above 0", found=str(value), fix=f"set {name}")
    return value
