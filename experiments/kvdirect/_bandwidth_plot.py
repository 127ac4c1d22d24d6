"""Draws transfer_bandwidth, and takes medians of its rows."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.ticker import NullLocator

from experiments import style
from experiments.kvdirect._scatter import CONTIGUOUS, RUNS, SHUFFLED
from experiments.kvdirect._systems import SYSTEMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NIXL = [name for name, system in SYSTEMS.items() if system.kind == "nixl"]


def median_ratio(rows: pd.DataFrame, scatter: str, block_bytes: int, ours: str, other: str) -> float | None:
    """Median over repeats of one method's rate over another's in the same repeat; None without rows of both."""
    chosen = rows[
        (rows["quantity"] == "bandwidth")
        & (rows["scatter"] == scatter)
        & (rows["block_bytes"] == block_bytes)
        & (rows["coalesce"] == True)  # noqa: E712
    ]
    rates = chosen.pivot_table(index="repeat", columns="method", values="gb_per_s")
    if ours not in rates or other not in rates:
        return None
    return float((rates[ours] / rates[other]).median())


def best_nixl(rows: pd.DataFrame, scatter: str, block_bytes: int, max_threads: int) -> str | None:
    """The setting of NIXL with the highest median rate there, of those that copy with at most `max_threads`.

    None if NIXL was not measured.
    """
    names = [name for name in _NIXL if SYSTEMS[name].num_copying_threads <= max_threads]
    chosen = rows[(rows["quantity"] == "bandwidth") & (rows["scatter"] == scatter)]
    chosen = chosen[(chosen["block_bytes"] == block_bytes) & chosen["method"].isin(names)]
    medians = chosen.groupby("method")["gb_per_s"].median()
    return None if medians.empty else str(medians.idxmax())


def plot(rows: pd.DataFrame, *, posting_limit: float) -> Figure:
    figure, axes = style.subplots(2, 3, panel_width_in=4.3, panel_height_in=3.3)
    methods = [name for name in SYSTEMS if (rows["method"] == name).any()]
    for ax, scatter in zip(axes[0], (SHUFFLED, RUNS, CONTIGUOUS), strict=True):
        _rates(ax, rows, scatter, methods)
    axes[0, 0].set_ylabel("GB/s (median)")
    _idle(axes[1, 0], rows[rows["quantity"] == "idle"], methods)
    _posting(axes[1, 1], rows[rows["quantity"] == "posting"], methods, posting_limit)
    _paths(axes[1, 2], rows, methods)
    style.legend(figure, rows, methods=methods, num_columns=4)
    return figure


def _rates(ax: Axes, rows: pd.DataFrame, scatter: str, methods: list[str]) -> None:
    mine = rows[(rows["quantity"] == "bandwidth") & (rows["scatter"] == scatter)]
    keys = ["method", "source", "block_bytes", "coalesce"]
    medians = mine.groupby(keys, sort=False)["gb_per_s"].median().reset_index()
    coalesced = medians["coalesce"] == True  # noqa: E712
    style.lines(ax, medians[coalesced], x="block_bytes", y="gb_per_s", methods=methods)
    colors = style.method_colors(methods)
    for name, line in medians[~coalesced].groupby("method", sort=False):
        ordered = line.sort_values("block_bytes")
        ax.plot(
            ordered["block_bytes"],
            ordered["gb_per_s"],
            color=colors[str(name)],
            linestyle=(0, (1, 1.5)),
            marker="o",
            markersize=5,
            markerfacecolor="white",
        )
    ticks = sorted(set(mine["block_bytes"].astype(int)))
    ax.set(xscale="log", xlabel="block size (KiB)", ylim=(0, None))
    ax.set_xticks(ticks, [str(tick >> 10) for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    hint = "" if coalesced.all() else "\nhollow, dotted: without coalescing"
    ax.set_title(f"{scatter}{hint}", fontsize=10)


def _idle(ax: Axes, rows: pd.DataFrame, methods: list[str]) -> None:
    colors = style.method_colors(methods)
    shown = [name for name in methods if (rows["method"] == name).any()]
    for place, name in enumerate(shown):
        for shift, role in ((-0.2, "initiator"), (0.2, "target")):
            values = rows[(rows["method"] == name) & (rows["role"] == role)]["cpu_percent"]
            if len(values):
                value = float(values.iloc[0])
                face = colors[name] if role == "initiator" else "white"
                ax.barh(place + shift, max(value, 0.02), 0.36, facecolor=face, edgecolor=colors[name])
                ax.text(max(value, 0.02) * 1.15, place + shift, f"{value:.2g}%", va="center", fontsize=7)
    ax.set_yticks(range(len(shown)), shown, fontsize=7)
    ax.invert_yaxis()
    ax.set(xscale="log", xlim=(0.01, 500), xlabel="of one core")
    ax.set_title("idle CPU time (filled: initiator, hollow: target)", fontsize=10)


def _posting(ax: Axes, rows: pd.DataFrame, methods: list[str], limit: float) -> None:
    medians = rows.groupby(["method", "source", "block_bytes"], sort=False)["posting_share"].median().reset_index()
    medians["percent"] = 100 * medians["posting_share"]
    medians["block"] = [f"{int(size) >> 10} KiB" for size in medians["block_bytes"]]
    style.grouped_bars(ax, medians, category="block", value="percent", methods=methods)
    for bars in ax.containers:
        ax.bar_label(bars, fmt="%.1f%%", fontsize=8)  # type: ignore[arg-type]
    ax.axhline(100 * limit, color=style.GREY, linestyle="--", linewidth=1)
    count = int(rows["num_blocks"].max()) if len(rows) else 0
    ax.set(xlabel="block size", ylabel="% of the transfer's time")
    ax.set_title(f"posting {count:,} blocks in one call", fontsize=10)


def _paths(ax: Axes, rows: pd.DataFrame, methods: list[str]) -> None:
    ax.set_axis_off()
    lines = []
    for name in methods:
        mine = rows[rows["method"] == name]
        if (mine["quantity"] == "missing").any():
            text = f"{name}: left out, {mine['note'].dropna().iloc[0]}"
        else:
            paths = " or ".join(dict.fromkeys(mine["path"].dropna()))
            transports = str(mine["settings"].iloc[0]).partition(", ")[0].removeprefix("transports: ")
            text = f"{name}: {paths}" + (f" ({transports})" if paths in ("nixl", "gloo") else "")
            text += f"; {mine['library'].iloc[0]}"
        lines += textwrap.wrap(text, 62, subsequent_indent="   ")
    ax.text(0, 1, "Path and library\n" + "\n".join(lines), va="top", fontsize=7, transform=ax.transAxes)
