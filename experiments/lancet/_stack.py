"""Stacked bars: what the time of a step consists of, by group and by method."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments import style


def stacked_bars(
    ax: Axes, rows: pd.DataFrame, parts: Mapping[str, str], colors: Mapping[str, str], *, group: str, group_label: str
) -> None:
    """For each value of column ``group`` a bar for each method; ``parts``: column -> label, the first at the bottom.

    Rows are of one source. Methods stand below their bars, groups above them.
    """
    methods = list(dict.fromkeys(rows["method"]))
    groups: list[Hashable] = list(dict.fromkeys(rows[group]))
    width = len(methods) + 0.8
    ticks: list[float] = []
    for number, value in enumerate(groups):
        mine = rows[rows[group] == value].drop_duplicates("method").set_index("method").reindex(methods)
        x = number * width + np.arange(len(methods))
        bottom = np.zeros(len(methods))
        for column, label in parts.items():
            heights = np.nan_to_num(mine[column].to_numpy(dtype=float))
            look = style.SOURCE_STYLES[str(rows["source"].iloc[0])]
            face = to_rgba(colors[label], look.fill_alpha)
            ax.bar(x, heights, 0.85, bottom, facecolor=face, edgecolor=colors[label], hatch=look.hatch)
            bottom += heights
        ticks += x.tolist()
        middle = number * width + (len(methods) - 1) / 2
        ax.text(middle, 1.0, f"{value} {group_label}", transform=ax.get_xaxis_transform(), ha="center", fontsize=8)
    ax.set_xticks(ticks, methods * len(groups), rotation=90, fontsize=7)


def part_legend(figure: Figure, rows: pd.DataFrame, colors: Mapping[str, str], labels: Sequence[str]) -> None:
    """A colour for each part, and what the bars' source is."""
    sources = "; ".join(
        f"{source}: {', '.join(dict.fromkeys(mine['device'].astype(str)))}" for source, mine in rows.groupby("source")
    )
    handles = [Patch(facecolor=colors[label], label=label) for label in labels]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8, title=sources)
    figure.legends[-1].get_title().set_fontsize(8)
