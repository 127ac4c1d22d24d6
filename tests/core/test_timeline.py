from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from llmsys.core.errors import InputError
from llmsys.core.timeline import Selection, Span, Timeline


def span(lane: str, start: float, end: float, kind: str = "forward", name: str = "x") -> Span:
    return Span(lane=lane, name=name, kind=kind, start_ms=start, end_ms=end)


# dev0 computes 0-4 and 6-10 (idle 4-6); dev1 computes 2-6; the network is busy 3-5 and 5-7.
SMALL = Timeline(
    spans=(
        Span(lane="dev1/compute", name="F0", kind="forward", start_ms=2, end_ms=6),
        Span(lane="dev0/compute", name="B0", kind="backward", start_ms=6, end_ms=10),
        Span(lane="dev0/compute", name="F0", kind="forward", start_ms=0, end_ms=4, args=(("mb", 0), ("s", "x"))),
        Span(lane="net", name="send F0", kind="comm", start_ms=3, end_ms=5),
        Span(lane="net", name="send B0", kind="comm", start_ms=5, end_ms=7),
    ),
    lanes=("dev0/compute", "dev1/compute", "net", "spare"),
)


def test_spans_are_sorted_and_lanes_ordered() -> None:
    assert [s.start_ms for s in SMALL.spans] == [0, 2, 3, 5, 6]
    assert Timeline(spans=SMALL.spans[::-1], lanes=SMALL.lanes) == SMALL
    assert Timeline(spans=(span("b", 1, 2), span("a", 0, 1))).lanes == ("a", "b")
    assert Timeline(spans=(span("b", 1, 2), span("a", 0, 1)), lanes=("b",)).lanes == ("b", "a")


def test_makespan_counts_from_the_first_start() -> None:
    assert SMALL.makespan_ms == 10
    late = Timeline(spans=(span("a", 100, 103), span("b", 101, 110), span("a", 104, 105)))
    assert (late.start_ms, late.end_ms, late.makespan_ms) == (100, 110, 10)
    assert Timeline(spans=()).makespan_ms == 0


def test_busy_and_bubble() -> None:
    assert SMALL.busy_ms("dev0/compute") == 8
    assert SMALL.busy_ms("dev0/compute", kinds=["backward"]) == 4
    assert SMALL.busy_ms("spare") == 0
    compute = ["dev0/compute", "dev1/compute"]
    assert SMALL.bubble_fraction(lanes=compute) == pytest.approx(1 - 12 / 20)
    assert SMALL.bubble_fraction(lanes=compute, kinds=["forward"]) == pytest.approx(1 - 8 / 20)
    assert SMALL.bubble_fraction() == pytest.approx(1 - 16 / 40)
    assert Timeline(spans=()).bubble_fraction() == 0
    with pytest.raises(InputError, match="no such lane"):
        SMALL.busy_ms("dev2/compute")


def test_overlap_and_exposed() -> None:
    assert SMALL.overlap_ms("dev0/compute", "net") == 2  # 3-4 and 6-7
    assert SMALL.exposed_ms("net", "dev0/compute") == 2  # 4-6
    compute = Selection(kinds=("forward", "backward"))
    assert SMALL.overlap_ms(Selection(kinds=("comm",)), compute) == 4
    assert SMALL.exposed_ms(Selection(kinds=("comm",)), compute) == 0
    assert SMALL.exposed_ms(compute, "net") == 6
    dev1_backward = Selection(lanes=("dev1/compute",), kinds=("backward",))
    assert SMALL.overlap_ms(dev1_backward, "net") == 0
    assert SMALL.exposed_ms(Selection(), Selection()) == 0
    assert SMALL.overlap_ms(Selection(), Selection()) == 10


def test_queries_agree_with_counting_on_a_fine_grid() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        starts = rng.integers(0, 100, 30)
        lengths = rng.integers(0, 20, 30)
        lanes = rng.choice(["a", "b", "c"], 30)
        kinds = rng.choice(["k", "l"], 30)
        spans = tuple(
            span(str(lane), int(s), int(s + n), str(kind))
            for s, n, lane, kind in zip(starts, lengths, lanes, kinds, strict=True)
        )
        timeline = Timeline(spans=spans, lanes=("a", "b", "c"), allow_overlap=True)

        def covered(wanted: np.ndarray, starts: np.ndarray = starts, lengths: np.ndarray = lengths) -> np.ndarray:
            grid = np.zeros(130, dtype=bool)
            for s, n in zip(starts[wanted], lengths[wanted], strict=True):
                grid[s : s + n] = True
            return grid

        first, second = covered(lanes == "a"), covered((kinds == "k") & (lanes != "a"))
        others = Selection(lanes=("b", "c"), kinds=("k",))
        assert timeline.busy_ms("a") == first.sum()
        assert timeline.overlap_ms("a", others) == (first & second).sum()
        assert timeline.overlap_ms(others, "a") == (first & second).sum()
        assert timeline.exposed_ms("a", others) == (first & ~second).sum()


@pytest.mark.parametrize(("start", "end"), [(2, 1), (math.nan, 1), (0, math.nan), (0, math.inf), (-math.inf, 0)])
def test_impossible_times(start: float, end: float) -> None:
    with pytest.raises(InputError, match="impossible times"):
        span("a", start, end)


def test_overlaps_in_one_lane() -> None:
    spans = (span("a", 0, 4, name="first"), span("a", 3, 5, name="second"))
    with pytest.raises(InputError, match="overlap on lane 'a'") as caught:
        Timeline(spans=spans)
    assert caught.value.found == "'first' until 4 ms, 'second' from 3 ms"
    assert Timeline(spans=spans, allow_overlap=True).busy_ms("a") == 5
    Timeline(spans=(span("a", 0, 4), span("a", 4 - 1e-9, 5), span("b", 3, 5), span("a", 5, 5)))
    with pytest.raises(InputError, match="overlap"):
        Timeline(spans=(span("a", 0, 9), span("a", 1, 1), span("a", 9, 10)))
    with pytest.raises(InputError, match="listed twice"):
        Timeline(spans=(), lanes=("a", "a"))


def test_chrome_trace_has_the_documented_shape() -> None:
    trace = SMALL.to_chrome_trace()
    events = trace["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(processes.values()) == ["dev0", "dev1", "timeline"]
    assert list(threads.values()) == ["compute", "compute", "net", "spare"]
    complete = [e for e in events if e["ph"] == "X"]
    assert len(complete) == 5
    first = complete[0]
    assert (first["name"], first["cat"], first["ts"], first["dur"]) == ("F0", "forward", 0, 4000)
    assert first["args"] == {"mb": 0, "s": "x"}
    assert processes[first["pid"]] == "dev0"


def test_chrome_trace_round_trip(tmp_path: Path) -> None:
    assert Timeline.from_chrome_trace(SMALL.to_chrome_trace()) == SMALL
    file = tmp_path / "trace.json"
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.uniform(0, 1, 500)) + 1e5
    spans = tuple(span("g/a", s, e, name=f"{i}") for i, (s, e) in enumerate(itertools.pairwise(ends)))
    timeline = Timeline(spans=spans, lanes=("g/a", "g/sub/b"))
    timeline.write_chrome_trace(file)
    back = Timeline.from_chrome_trace(json.loads(file.read_text()))
    assert back.lanes == timeline.lanes
    assert [s.name for s in back.spans] == [s.name for s in timeline.spans]
    np.testing.assert_allclose([s.end_ms for s in back.spans], ends[1:], rtol=1e-14)
    overlapping = Timeline(spans=(span("a", 0, 4), span("a", 3, 5)), allow_overlap=True)
    assert Timeline.from_chrome_trace(overlapping.to_chrome_trace()) == overlapping


def test_traces_of_others() -> None:
    events = [
        {"ph": "M", "name": "process_name", "pid": 7, "args": {"name": "python"}},
        {"ph": "X", "name": "op", "pid": 7, "tid": 3, "ts": 1000, "dur": 500},
        {"ph": "i", "name": "marker", "pid": 7, "tid": 3, "ts": 1000},
    ]
    timeline = Timeline.from_chrome_trace({"traceEvents": events})
    assert timeline.spans == (Span(lane="python/3", name="op", kind="", start_ms=1.0, end_ms=1.5),)
    with pytest.raises(InputError, match="lacks its times"):
        Timeline.from_chrome_trace({"traceEvents": [{"ph": "X", "name": "op", "pid": 1, "tid": 1, "ts": 1}]})
    with pytest.raises(InputError, match="no Chrome trace"):
        Timeline.from_chrome_trace({"events": []})


def test_text_gantt() -> None:
    assert SMALL.to_text_gantt(width=20).splitlines() == [
        "dev0/compute |F0ffffff....B0bbbbbb|",
        "dev1/compute |....F0ffffff........|",
        "net          |......sendsend......|",
        "spare        |....................|",
        "              +    +    +    +    +",
        "              0    2.5  5    7.5  10 ms",
        "f = forward, c = comm, b = backward, . = idle, one column = 0.5 ms",
    ]


def test_text_gantt_of_odd_timelines() -> None:
    spans = (
        span("a", 0, 0.001, "forward"),
        span("a", 0.001, 100, "fetch", "étape"),
        span("a", 100, 100, "for"),
    )
    lines = Timeline(spans=spans).to_text_gantt(width=12).splitlines()
    assert lines[0] == "a |?tapeeeeeeee|", "the wide span covers the cell of the narrow one"
    assert lines[3].startswith("f = forward, e = fetch, o = for")
    narrow = Timeline(spans=(span("a", 0, 0.001), span("a", 50, 100, "backward", "B")))
    assert narrow.to_text_gantt(width=10).splitlines()[0] == "a |f....Bbbbb|"
    assert "idle" in Timeline(spans=(), lanes=("a",)).to_text_gantt()
    assert "(no kind)" in Timeline(spans=(span("a", 5, 5, ""),)).to_text_gantt()
    with pytest.raises(InputError, match="too narrow"):
        SMALL.to_text_gantt(width=5)
