"""Drawing a timeline."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from experiments import style
from llmsys.core.timeline import Span, Timeline


def _timeline() -> Timeline:
    def span(lane: str, name: str, kind: str, start_ms: float, end_ms: float) -> Span:
        return Span(lane=lane, name=name, kind=kind, start_ms=start_ms, end_ms=end_ms)

    spans = (
        span("device 0", "F0", "forward", 0, 40),
        span("device 0", "B0", "backward", 60, 99.9),
        span("device 1", "F0", "forward", 40, 40.1),
        span("device 1", "odd", "something else", 50, 60),
    )
    return Timeline(spans=spans, lanes=("device 1", "device 0", "idle"))


def _drawn(lanes: tuple[str, ...] | None = None) -> Axes:
    _, axes = style.subplots()
    style.gantt(axes[0, 0], _timeline(), lanes=lanes)
    return axes[0, 0]


def test_every_span_is_a_bar_at_its_time_in_the_row_of_its_lane() -> None:
    ax = _drawn()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["device 1", "device 0", "idle"]
    bars = [
        (path.get_extents().x0, path.get_extents().x1, round((path.get_extents().y0 + path.get_extents().y1) / 2))
        for collection in ax.collections
        for path in collection.get_paths()
    ]
    assert bars == [(40, 40.1, 0), (50, 60, 0), (0, 40, 1), (60, 99.9, 1)]
    top, bottom = ax.transData.transform([(0, 0), (0, 2)])[:, 1]
    assert top > bottom
    assert ax.get_xlim() == (0, 99.9)


def test_kinds_have_colours_and_a_legend() -> None:
    ax = _drawn()
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["forward", "something else", "backward"]
    faces = [to_hex(face).upper() for collection in ax.collections for face in collection.get_facecolors()]
    assert faces[0] == faces[2] == style.SKY and faces[3] == style.ORANGE
    assert len(set(faces)) == 3


def test_names_stand_only_where_they_fit() -> None:
    assert sorted(text.get_text() for text in _drawn().texts) == ["B0", "F0", "odd"]


def test_lanes_can_be_chosen_and_an_empty_timeline_drawn() -> None:
    assert [text.get_text() for text in _drawn(("device 0",)).texts] == ["F0", "B0"]
    _, axes = style.subplots()
    style.gantt(axes[0, 0], Timeline(spans=(), lanes=("device 0",)))
    assert not axes[0, 0].texts
