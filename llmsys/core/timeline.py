"""What happened when: spans on lanes; overlap and bubble queries, Chrome trace JSON, text Gantt charts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsys.core.errors import InputError

Scalar = str | int | float | bool | None
Intervals = list[tuple[float, float]]

# Two spans of one lane may overlap by this much: trace files round times, and one nanosecond is no overlap.
OVERLAP_TOLERANCE_MS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One thing that occupied ``lane`` from ``start_ms`` to ``end_ms``.

    ``kind`` groups spans for queries and colours (say "forward"), ``name`` tells one from another (say "F3").
    """

    lane: str
    name: str
    kind: str
    start_ms: float
    end_ms: float
    args: tuple[tuple[str, Scalar], ...] = ()

    def __post_init__(self) -> None:
        # Written so that NaN fails too.
        if not -math.inf < self.start_ms <= self.end_ms < math.inf:
            raise InputError(
                f"span {self.name!r} on lane {self.lane!r} has impossible times",
                expected="finite times, end_ms >= start_ms",
                found=f"start_ms = {self.start_ms}, end_ms = {self.end_ms}",
                fix="set start_ms and end_ms",
            )

    @property
    def duration_ms(self) -> float:
        return self.end_ms - self.start_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which spans a query means: those on ``lanes`` and of ``kinds``; None stands for all."""

    lanes: tuple[str, ...] | None = None
    kinds: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Spans sorted by start, end and lane, and the lanes in their order of display.

    ``lanes`` may list lanes without spans; lanes that it leaves out follow in order of their first span. A
    lane named "group/part" is shown as thread "part" of process "group" in trace viewers. Raises InputError
    when two spans of one lane overlap by more than a nanosecond, unless ``allow_overlap``, and when a lane is
    listed twice.
    """

    spans: tuple[Span, ...]
    lanes: tuple[str, ...] = ()
    allow_overlap: bool = False

    def __post_init__(self) -> None:
        spans = sorted(self.spans, key=lambda span: (span.start_ms, span.end_ms))
        lanes = tuple(dict.fromkeys([*self.lanes, *(span.lane for span in spans)]))
        if len(set(self.lanes)) != len(self.lanes):
            raise InputError(
                "a lane is listed twice",
                expected="different lanes",
                found=str(self.lanes),
                fix="remove the repeated name from lanes",
            )
        rank = {lane: number for number, lane in enumerate(lanes)}
        spans.sort(key=lambda span: (span.start_ms, span.end_ms, rank[span.lane]))
        if not self.allow_overlap:
            _refuse_overlap(spans)
        object.__setattr__(self, "spans", tuple(spans))
        object.__setattr__(self, "lanes", lanes)

    @property
    def start_ms(self) -> float:
        return self.spans[0].start_ms if self.spans else 0.0

    @property
    def end_ms(self) -> float:
        return max((span.end_ms for span in self.spans), default=0.0)

    @property
    def makespan_ms(self) -> float:
        """From the earliest start to the latest end; 0 for no spans."""
        return self.end_ms - self.start_ms

    def select(self, selection: Selection | str) -> list[Span]:
        """The selected spans in order; a str is the name of one lane. InputError for an unknown lane."""
        wanted = Selection(lanes=(selection,)) if isinstance(selection, str) else selection
        for lane in wanted.lanes or ():
            if lane not in self.lanes:
                raise InputError(
                    "no such lane",
                    expected="one of " + ", ".join(self.lanes),
                    found=repr(lane),
                    fix="select one of these lanes, or list it in lanes if it has no span",
                )
        lanes = None if wanted.lanes is None else frozenset(wanted.lanes)
        kinds = None if wanted.kinds is None else frozenset(wanted.kinds)
        return [
            span
            for span in self.spans
            if (lanes is None or span.lane in lanes) and (kinds is None or span.kind in kinds)
        ]

    def busy_ms(self, lane: str, kinds: Sequence[str] | None = None) -> float:
        """Time during which ``lane`` has at least one span (of ``kinds``, if given)."""
        return _length(_union(self.select(Selection(lanes=(lane,), kinds=_tuple(kinds)))))

    def bubble_fraction(self, lanes: Sequence[str] | None = None, kinds: Sequence[str] | None = None) -> float:
        """Idle share of ``lanes`` (default: all): 1 - sum of their busy times / (number of lanes x makespan).

        Only spans of ``kinds`` count as busy. Name the compute lanes when there are lanes of other things
        too. 0 for an empty timeline.
        """
        names = self.lanes if lanes is None else tuple(lanes)
        available_ms = len(names) * self.makespan_ms
        if available_ms == 0:
            return 0.0
        return 1.0 - sum(self.busy_ms(lane, kinds) for lane in names) / available_ms

    def overlap_ms(self, first: Selection | str, second: Selection | str) -> float:
        """Time during which a span of ``first`` and a span of ``second`` are both active."""
        return _intersection_ms(_union(self.select(first)), _union(self.select(second)))

    def exposed_ms(self, first: Selection | str, second: Selection | str) -> float:
        """Time during which a span of ``first`` is active and none of ``second``."""
        intervals = _union(self.select(first))
        return _length(intervals) - _intersection_ms(intervals, _union(self.select(second)))

    def to_chrome_trace(self) -> dict[str, Any]:
        """The timeline in the trace event format that Perfetto and chrome://tracing open; times in us."""
        groups = list(dict.fromkeys(_group(lane) for lane in self.lanes))
        ids = {lane: (groups.index(_group(lane)), number) for number, lane in enumerate(self.lanes)}
        events: list[dict[str, Any]] = []
        for pid, group in enumerate(groups):
            events.append(_metadata("process_name", pid, 0, name=group))
            events.append(_metadata("process_sort_index", pid, 0, sort_index=pid))
        for lane, (pid, tid) in ids.items():
            # "lane" is our own addition, which viewers ignore; it keeps the full name for reading back.
            events.append(_metadata("thread_name", pid, tid, name=lane.rpartition("/")[2], lane=lane))
            events.append(_metadata("thread_sort_index", pid, tid, sort_index=tid))
        for span in self.spans:
            pid, tid = ids[span.lane]
            event = {"ph": "X", "pid": pid, "tid": tid, "name": span.name, "cat": span.kind}
            event |= {"ts": span.start_ms * 1e3, "dur": span.duration_ms * 1e3, "args": dict(span.args)}
            events.append(event)
        return {
            "traceEvents": events,
            "displayTimeUnit": "ms",
            "otherData": {"allow_overlap": self.allow_overlap},
        }

    def write_chrome_trace(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_chrome_trace()), encoding="utf-8")

    @staticmethod
    def from_chrome_trace(trace: Mapping[str, Any]) -> Timeline:
        """Read what ``to_chrome_trace`` made; times come back up to rounding.

        Traces of other programs are read as far as they hold complete ("X") events; their lanes are named
        "process/thread". Raises InputError without a list of events, or for an event without its times.
        """
        events = trace.get("traceEvents")
        if not isinstance(events, list):
            raise InputError(
                "this is no Chrome trace",
                expected="a traceEvents list",
                found=f"keys {list(trace)}, traceEvents of type {type(events).__name__}",
                fix="pass the JSON object of a trace, with its events under traceEvents",
            )
        lanes = _lanes_of_trace(events)
        spans = [
            _span_of_event(event, lanes.get((event.get("pid"), event.get("tid"))))
            for event in events
            if event.get("ph") == "X"
        ]
        allow_overlap = bool(trace.get("otherData", {}).get("allow_overlap", False))
        return Timeline(spans=tuple(spans), lanes=tuple(lanes.values()), allow_overlap=allow_overlap)

    def to_text_gantt(self, width: int = 100) -> str:
        """A chart for terminals and logs: a row per lane with ``width`` columns of time, a scale, a legend.

        A span shows its name, as far as it fits, then the letter of its kind up to its end. "." is idle. A
        span shorter than a column still gets one where it hides nothing; of two in a column the later shows.
        """
        if width < 10:
            raise InputError("the chart is too narrow", expected="width >= 10", found=str(width), fix="set width")
        letters = _kind_letters(dict.fromkeys(span.kind for span in self.spans))
        column_ms = self.makespan_ms / width or 1.0
        rows = {lane: ["."] * width for lane in self.lanes}
        for span in self.spans:
            _draw(rows[span.lane], span, self.start_ms, column_ms, letters[span.kind])
        margin = max((len(_ascii(lane)) for lane in self.lanes), default=0)
        lines = [f"{_ascii(lane):<{margin}} |{''.join(row)}|" for lane, row in rows.items()]
        lines += [" " * (margin + 2) + line for line in _scale(self.start_ms, column_ms, width)]
        legend = [f"{letter} = {_ascii(kind) or '(no kind)'}" for kind, letter in letters.items()]
        lines.append(", ".join([*legend, ". = idle", f"one column = {column_ms:.4g} ms"]))
        return "\n".join(lines)


def _refuse_overlap(spans: Iterable[Span]) -> None:
    last: dict[str, Span] = {}
    for span in spans:
        before = last.get(span.lane)
        if before is not None and span.start_ms < before.end_ms - OVERLAP_TOLERANCE_MS:
            raise InputError(
                f"two spans overlap on lane {span.lane!r}",
                expected="one span at a time on each lane",
                found=f"{before.name!r} until {before.end_ms} ms, {span.name!r} from {span.start_ms} ms",
                fix="put them on different lanes, or pass allow_overlap=True",
            )
        if before is None or span.end_ms >= before.end_ms:
            last[span.lane] = span


def _union(spans: Iterable[Span]) -> Intervals:
    """Disjoint increasing intervals that cover the same time as ``spans``, which are sorted by start."""
    merged: Intervals = []
    for span in spans:
        if merged and span.start_ms <= merged[-1][1]:
            if span.end_ms > merged[-1][1]:
                merged[-1] = (merged[-1][0], span.end_ms)
        else:
            merged.append((span.start_ms, span.end_ms))
    return merged


def _length(intervals: Intervals) -> float:
    return math.fsum(end - start for start, end in intervals)


def _intersection_ms(first: Intervals, second: Intervals) -> float:
    pieces: list[float] = []
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if end > start:
            pieces.append(end - start)
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return math.fsum(pieces)


def _tuple(values: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values)


def _group(lane: str) -> str:
    return lane.rpartition("/")[0] or "timeline"


def _metadata(event: str, pid: int, tid: int, **args: Scalar) -> dict[str, Any]:
    return {"ph": "M", "name": event, "pid": pid, "tid": tid, "args": args}


def _lanes_of_trace(events: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, Any], str]:
    """Lane names by (pid, tid), in the order of the thread metadata, then of the first event."""
    processes = {
        event.get("pid"): str(event["args"]["name"]) for event in events if event.get("name") == "process_name"
    }
    lanes: dict[tuple[Any, Any], str] = {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "thread_name":
            pid = event.get("pid")
            name = f"{processes.get(pid, pid)}/{event['args']['name']}"
            lanes[pid, event.get("tid")] = str(event["args"].get("lane", name))
    for event in events:
        if event.get("ph") == "X":
            pid, tid = event.get("pid"), event.get("tid")
            lanes.setdefault((pid, tid), f"{processes.get(pid, pid)}/{tid}")
    return lanes


def _span_of_event(event: Mapping[str, Any], lane: str | None) -> Span:
    start_us, duration_us = event.get("ts"), event.get("dur")
    if lane is None or not isinstance(start_us, (int, float)) or not isinstance(duration_us, (int, float)):
        raise InputError(
            "a trace event lacks its times",
            expected="numbers ts and dur",
            found=str(event),
            fix="add ts and dur, in us, or remove the event from the trace",
        )
    return Span(
        lane=lane,
        name=str(event.get("name", "")),
        kind=str(event.get("cat", "")),
        start_ms=start_us / 1e3,
        end_ms=(start_us + duration_us) / 1e3,
        args=tuple(event.get("args", {}).items()),
    )


def _kind_letters(kinds: Iterable[str]) -> dict[str, str]:
    """One letter a kind: the first free one of its own letters, else the first free one of the alphabet."""
    letters: dict[str, str] = {}
    for kind in kinds:
        own = [letter for letter in kind.lower() if letter.isascii() and letter.isalpha()]
        free = (letter for letter in [*own, *"abcdefghijklmnopqrstuvwxyz"] if letter not in letters.values())
        letters[kind] = next(free, "#")
    return letters


def _draw(row: list[str], span: Span, origin_ms: float, column_ms: float, letter: str) -> None:
    first = round((span.start_ms - origin_ms) / column_ms)
    last = round((span.end_ms - origin_ms) / column_ms)
    if first >= last:
        first = min(first, len(row) - 1)
        if row[first] == ".":
            row[first] = letter
        return
    text = _ascii(span.name)[: last - first].ljust(last - first, letter)
    row[first:last] = list(text)


def _scale(start_ms: float, column_ms: float, width: int) -> list[str]:
    """A line of tick marks and a line of their times, at a quarter of the width each."""
    marks, times = [" "] * (width + 1), [" "] * (width + 16)
    for quarter in range(5):
        column = quarter * width // 4
        marks[column] = "+"
        text = f"{start_ms + column * column_ms:.4g}" + (" ms" if quarter == 4 else "")
        times[column : column + len(text)] = list(text)
    return ["".join(marks), "".join(times).rstrip()]


def _ascii(text: str) -> str:
    return "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in text)
