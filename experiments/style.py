"""How every figure looks: one colour per method, one mark per source, red crosses for out of memory.

Nothing here computes a result. Figures are made without pyplot, so that importing this module or drawing a
figure neither chooses a backend nor leaves open figures behind.
"""

from __future__ import annotations

import re
import textwrap
import zlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from llmsys.core.timeline import Timeline

BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, GREY, OLIVE = "#56B4E9", "#CC79A7", "#6B7280", "#999933"
PALETTE = (BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE, OLIVE, GREY)
"""Colours that stay apart for the common kinds of colour blindness (Okabe and Ito's, no pale yellow)."""

_OUT_OF_MEMORY_MARK: dict[str, Any] = {
    "marker": "x",
    "markersize": 7,
    "markeredgewidth": 2,
    "color": "#C1121F",
}

# Keys are method names in lower case without punctuation.
_METHOD_COLORS = {
    "dynapipe": BLUE,
    "mlmds": ORANGE,
    "packing": ORANGE,
    "mlmdsc": PURPLE,
    "varlenpacking": GREEN,
    "variablelengthpacking": GREEN,
    "packingvarlen": GREEN,
    "tokenbased": SKY,
    "fixedmicrobatch": VERMILLION,
    "fixedsize": VERMILLION,
    "dynapipetokens": BLUE,
    "dynapipeencoder": BLUE,
    "dynapipedecoder": SKY,
    "mlmdstokens": ORANGE,
    "mlmdsencoder": ORANGE,
    "mlmdsdecoder": VERMILLION,
    "dynapipevarlen": PURPLE,
    "tbs": OLIVE,
    "tbt": GREEN,
    "dps": SKY,
    "dpt": BLUE,
    "1f1b": ORANGE,
    "interleaved1f1b": OLIVE,
    "adaptivenoreorder": SKY,
    "adaptive": BLUE,
    "search": GREEN,
    "dynapipeownmicrobatches": PURPLE,
    "backwardworkspacecounted": BLUE,
    "leftoutoftheplanpublicplannersrule": GREY,
    "ours": BLUE,
    "oursbackwardworkspacecounted": SKY,
    "publicplanner": GREY,
    "publicplannersplanourcosts": OLIVE,
    "ascaptured": GREY,
    "raisesink": OLIVE,
    "tutelstyle": ORANGE,
    "lancet": BLUE,
    "lancetdwonly": SKY,
    "lancetpartitiononly": GREEN,
    "torchoverlap": VERMILLION,
    "matmulsintf32": BLUE,
    "matmulsinfp32": ORANGE,
    "gpt": BLUE,
    "t5": ORANGE,
    "gpt335b": SKY,
    "gpt67b": BLUE,
    "t556b": OLIVE,
    "t511b": ORANGE,
    "t522b": PURPLE,
    "t545b": VERMILLION,
    "memcpyinoneprocess": "#111827",
    "ourssharedmemory": BLUE,
    "ourssharedmemory1thread": "#1E3A8A",
    "oursprocessvmreadv": SKY,
    "oursprocessvmreadv1thread": "#0E7490",
    "oursucxovertcp": PURPLE,
    "nixlreadprogressthreadsleeps": VERMILLION,
    "nixlreadnoprogressthread": ORANGE,
    "nixlread2transferthreads": "#7F1D1D",
    "nixlreadprogressthreadpolls": OLIVE,
    "glootwosidedperblock": GREY,
    "glootwosidedpacked": GREEN,
}

_KIND_COLORS = {"forward": SKY, "backward": ORANGE, "send": GREY}
_NAME_WIDTH = 0.006  # of the makespan, a letter: narrower spans are drawn without their names


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceStyle:
    """How one source is drawn: bars by fill and hatch, lines by dash and marker."""

    hatch: str
    fill_alpha: float
    line: str
    marker: str
    marker_filled: bool


SOURCE_STYLES = {
    "measured": SourceStyle(hatch="", fill_alpha=1.0, line="-", marker="o", marker_filled=True),
    "simulated": SourceStyle(hatch="////", fill_alpha=0.45, line="--", marker="s", marker_filled=True),
    "paper": SourceStyle(hatch="", fill_alpha=0.0, line=":", marker="D", marker_filled=False),
}


def method_color(method: str) -> str:
    """The colour of ``method`` in every figure; an unlisted name gets one that depends on the name alone."""
    key = _key(method)
    return _METHOD_COLORS.get(key) or PALETTE[zlib.crc32(key.encode()) % len(PALETTE)]


def method_colors(methods: Iterable[str]) -> dict[str, str]:
    """Colours for the methods of one figure; unlisted names move to a free colour where theirs is taken."""
    unique = list(dict.fromkeys(methods))
    colors = {method: method_color(method) for method in unique if _key(method) in _METHOD_COLORS}
    for method in sorted(set(unique) - set(colors)):
        start = PALETTE.index(method_color(method))
        ring = PALETTE[start:] + PALETTE[:start]
        colors[method] = next((color for color in ring if color not in colors.values()), ring[0])
    return {method: colors[method] for method in unique}


def _key(method: str) -> str:
    return re.sub(r"[^a-z0-9]", "", method.lower())


def subplots(
    num_rows: int = 1,
    num_columns: int = 1,
    *,
    panel_width_in: float = 4.6,
    panel_height_in: float = 3.2,
    **options: Any,
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes as an array (num_rows, num_columns), always 2-D. Options as in matplotlib."""
    size = (panel_width_in * num_columns, panel_height_in * num_rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#E5E7EB", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def grouped_bars(
    ax: Axes,
    rows: pd.DataFrame,
    *,
    category: str,
    value: str,
    method: str = "method",
    categories: Sequence[Hashable] | None = None,
    methods: Sequence[str] | None = None,
    out_of_memory: str = "out_of_memory",
) -> None:
    """One group of bars for each value of column ``category``, in it one bar for each method and source.

    At most one row per (category, method, source). ``categories`` and ``methods`` fix which are drawn and in
    what order (default: order of appearance). A row whose column ``out_of_memory`` is true gets a red cross
    on the axis in the place of its bar.
    """
    groups = list(dict.fromkeys(rows[category])) if categories is None else list(categories)
    shown = list(dict.fromkeys(rows[method])) if methods is None else list(methods)
    colors = method_colors(shown)
    series = _series(rows, method, shown)
    width = 0.8 / max(len(series), 1)
    for rank, (name, source) in enumerate(series):
        mine = rows[(rows[method] == name) & (rows["source"] == source)].drop_duplicates(category)
        mine = mine.set_index(category).reindex(groups)
        x = np.arange(len(groups)) + (rank - (len(series) - 1) / 2) * width
        failed = _flags(mine, out_of_memory)
        heights = np.where(failed, np.nan, _numbers(mine, value))
        _draw_bars(ax, x, heights, width * 0.92, colors[name], source)
        mark_out_of_memory(ax, x[failed])
    ax.set_xticks(np.arange(len(groups)), [str(group) for group in groups])


def _draw_bars(ax: Axes, x: np.ndarray, y: np.ndarray, width: float, color: str, source: str) -> BarContainer:
    look = SOURCE_STYLES[source]
    face = to_rgba(color, look.fill_alpha) if look.fill_alpha else "white"
    linestyle = "--" if source == "paper" else "-"
    return ax.bar(x, y, width, facecolor=face, edgecolor=color, hatch=look.hatch, linestyle=linestyle, linewidth=1.0)


def _series(rows: pd.DataFrame, method: str, names: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs (method, source) that have rows, by method and then by source."""
    present = set(zip(rows[method], rows["source"], strict=True))
    return [(name, source) for name in names for source in SOURCE_STYLES if (name, source) in present]


def _flags(rows: pd.DataFrame, column: str) -> np.ndarray:
    """Column of booleans as an array; False where the column or its value is missing."""
    if column not in rows:
        return np.zeros(len(rows), dtype=bool)
    return np.array([value is not None and value == True for value in rows[column]], dtype=bool)  # noqa: E712


def _numbers(rows: pd.DataFrame, column: str) -> np.ndarray:
    """Column as floats; NaN where it has none, or where no row has it, as when everything is out of memory."""
    return rows[column].to_numpy(dtype=float) if column in rows else np.full(len(rows), np.nan)


def mark_out_of_memory(ax: Axes, x: Sequence[float] | np.ndarray) -> None:
    """A red cross just above the x axis at each of the data positions ``x``."""
    if len(x):
        ax.plot(
            x,
            np.full(len(x), 0.035),
            linestyle="none",
            transform=ax.get_xaxis_transform(),
            clip_on=False,
            zorder=5,
            **_OUT_OF_MEMORY_MARK,
        )


def lines(
    ax: Axes,
    rows: pd.DataFrame,
    *,
    x: str,
    y: str,
    method: str = "method",
    methods: Sequence[str] | None = None,
) -> None:
    """One line for each method and source, by ascending ``x``; the source decides dash and marker."""
    shown = list(dict.fromkeys(rows[method])) if methods is None else list(methods)
    colors = method_colors(shown)
    for name, source in _series(rows, method, shown):
        look = SOURCE_STYLES[source]
        mine = rows[(rows[method] == name) & (rows["source"] == source)].sort_values(x)
        ax.plot(
            mine[x].to_numpy(),
            _numbers(mine, y),
            color=colors[name],
            linestyle=look.line,
            **_marker(look, colors[name]),
        )


def points(ax: Axes, rows: pd.DataFrame, *, x: str, y: str, method: str = "method", diagonal: bool = False) -> None:
    """Scatter of rows: colour by method, marker by source; ``diagonal`` adds the line of agreement."""
    colors = method_colors(rows[method])
    for (name, source), mine in rows.groupby([method, "source"], sort=False):
        ax.plot(
            mine[x].to_numpy(dtype=float),
            mine[y].to_numpy(dtype=float),
            linestyle="none",
            alpha=0.7,
            **_marker(SOURCE_STYLES[source], colors[name]),
        )
    if diagonal:
        ax.axline((0, 0), slope=1, color=GREY, linewidth=1, zorder=0)


def boxes(
    ax: Axes,
    rows: pd.DataFrame,
    *,
    category: str,
    value: str,
    method: str = "method",
    categories: Sequence[Hashable] | None = None,
) -> None:
    """Box plots without outliers: a group for each ``category``, in it a box for each method and source."""
    groups = list(dict.fromkeys(rows[category])) if categories is None else list(categories)
    colors = method_colors(rows[method])
    series = _series(rows, method, colors)
    width = 0.8 / max(len(series), 1)
    for rank, (name, source) in enumerate(series):
        mine = rows[(rows[method] == name) & (rows["source"] == source)]
        found = [_numbers(mine[mine[category] == group], value) for group in groups]
        samples = [numbers[np.isfinite(numbers)] for numbers in found]
        look = SOURCE_STYLES[source]
        drawn = ax.boxplot(
            samples,
            positions=np.arange(len(groups)) + (rank - (len(series) - 1) / 2) * width,
            widths=width * 0.85,
            showfliers=False,
            patch_artist=True,
            manage_ticks=False,
            medianprops={"color": "#111827"},
        )
        for box in drawn["boxes"]:
            box.set(facecolor=to_rgba(colors[name], look.fill_alpha), edgecolor=colors[name], hatch=look.hatch)
    ax.set_xticks(np.arange(len(groups)), [str(group) for group in groups])


def gantt(ax: Axes, timeline: Timeline, *, lanes: Sequence[str] | None = None) -> None:
    """Spans as bars over time, the first lane on top, coloured by kind; names stand where they fit.

    ``lanes`` chooses and orders (default: all lanes). Nothing here tells measured from simulated: the title has to.
    """
    shown = list(timeline.lanes if lanes is None else lanes)
    kinds = dict.fromkeys(span.kind for lane in shown for span in timeline.select(lane))
    spare = [color for color in PALETTE if color not in _KIND_COLORS.values()]
    others = (kind for kind in kinds if kind not in _KIND_COLORS)
    colors = _KIND_COLORS | {kind: spare[rank % len(spare)] for rank, kind in enumerate(others)}
    for row, lane in enumerate(shown):
        spans = timeline.select(lane)
        bars = [(span.start_ms, span.duration_ms) for span in spans]
        ax.broken_barh(
            bars, (row - 0.4, 0.8), facecolors=[colors[s.kind] for s in spans], edgecolor="white", linewidth=0.4
        )
        for span in spans:
            if span.duration_ms >= _NAME_WIDTH * len(span.name) * timeline.makespan_ms > 0:
                middle_ms = (span.start_ms + span.end_ms) / 2
                ax.text(middle_ms, row, span.name, ha="center", va="center", fontsize=6, clip_on=True)
    ax.set_yticks(range(len(shown)), shown, fontsize=8)
    ax.margins(x=0)
    ax.set(xlabel="time (ms)", ylim=(len(shown) - 0.5, -0.5))
    ax.grid(visible=False)
    handles = [Patch(facecolor=colors[kind], label=kind) for kind in kinds]
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=8)


def _marker(look: SourceStyle, color: str) -> dict[str, Any]:
    face = color if look.marker_filled else "white"
    return {"marker": look.marker, "markersize": 5, "markerfacecolor": face, "markeredgecolor": color}


def legend(
    figure: Figure,
    rows: pd.DataFrame,
    *,
    method: str = "method",
    methods: Sequence[str] | None = None,
    out_of_memory: str = "out_of_memory",
    num_columns: int | None = None,
) -> None:
    """One legend below the figure: a colour for each method, then each source's mark and devices."""
    shown = list(dict.fromkeys(rows[method])) if methods is None else list(methods)
    handles: list[Any] = [
        Patch(facecolor=color, edgecolor=color, label=name) for name, color in method_colors(shown).items()
    ]
    handles += [_source_handle(rows, source) for source in SOURCE_STYLES if (rows["source"] == source).any()]
    if _flags(rows, out_of_memory).any():
        handles.append(Line2D([], [], linestyle="none", label="out of memory or not profiled", **_OUT_OF_MEMORY_MARK))
    columns = num_columns or min(len(handles), 4)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _source_handle(rows: pd.DataFrame, source: str) -> Patch:
    look = SOURCE_STYLES[source]
    devices = list(dict.fromkeys(rows.loc[rows["source"] == source, "device"].astype(str)))
    text = ", ".join(devices[:2]) + (f" and {len(devices) - 2} more" if len(devices) > 2 else "")
    face = to_rgba(GREY, look.fill_alpha) if look.fill_alpha else "white"
    return Patch(
        facecolor=face,
        edgecolor=GREY,
        hatch=look.hatch,
        linestyle="--" if source == "paper" else "-",
        label=textwrap.fill(f"{source}: {text}", 44),
    )
