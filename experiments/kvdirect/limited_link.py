"""How much of a network link's rate transfers of scattered blocks use, and how long a message takes over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.ticker import NullLocator

from experiments import style
from experiments.kvdirect._pairs import Pair, open_pairs, rotated
from experiments.kvdirect._rows import check_ours_present, shared_columns
from experiments.kvdirect._scatter import SHUFFLED, Pattern
from experiments.kvdirect._systems import (
    GLOO_BLOCKS,
    GLOO_PACKED,
    NIXL_SLEEPS,
    SYSTEMS,
    TCP,
    OptionValue,
    System,
    chosen,
)
from experiments.network import DEVICE, Link, limited_link
from experiments.record import Comparison, Row, RunContext, require_positive
from llmsys.core.errors import ConfigError, TransportError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "KVDirect: reading scattered blocks over a link of limited rate"
CLAIM = """No figure of the paper. Two processes in two network namespaces of one machine, joined by a virtual Ethernet
link that a token bucket limits in each direction; the rate counts all headers, so with frames of 1,500 bytes at most
95.6% of it can be payload of TCP. Target: ours reaches at least 90% of the rate. Ours is UCX over TCP (both processes'
progress threads work; this is not one-sided RDMA); gloo sends each block as a message, or packs blocks and unpacks
them. Also shown is the time of a notification there and back, on the idle link."""

TARGET_SHARE = 0.9
_MAX_SHARE = 1.1  # the bucket of the link is full at first
_METHODS = (TCP, NIXL_SLEEPS, GLOO_BLOCKS, GLOO_PACKED)
# Shared memory and process_vm_readv reach across network namespaces, so they would never use the link.
_OURS_ON_LINK: dict[str, OptionValue] = {"shm": False, "cma": False, "tls": "tcp,self", "net_devices": DEVICE}
_UCX_ON_LINK = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": DEVICE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """rates_gbit_per_s: of the link. block_sizes: bytes. seconds: how long a transfer would take at the whole rate.

    payload_bytes, num_round_trips: of the notifications. systems: names; none means all that can use a network.
    """

    rates_gbit_per_s: tuple[float, ...] = (1.0, 4.0)
    block_sizes: tuple[int, ...] = (16 << 10, 64 << 10, 256 << 10, 1 << 20)
    seconds: float = 0.5
    num_repeats: int = 3
    payload_bytes: int = 64
    num_round_trips: int = 200
    mtu_bytes: int = 1500
    systems: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_positive(self, "rates_gbit_per_s", "block_sizes", "seconds", "num_repeats")
        require_positive(self, "payload_bytes", "num_round_trips", "mtu_bytes")
        for name in self.systems:
            if name not in _METHODS:
                raise ConfigError(
                    f"{name!r} cannot be measured over a link",
                    expected="of " + ", ".join(_METHODS),
                    found=name,
                    fix="set settings.systems",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    """One transfer to be measured; repeat 0 warms up and has its contents checked."""

    repeat: int
    rate_gbit_per_s: float
    pair: Pair
    pattern: Pattern


def run(cfg: Config, context: RunContext) -> list[Row]:
    systems = [_on_link(system) for system in chosen(cfg.systems or _METHODS)]
    largest = max(_size_bytes(cfg, rate) for rate in cfg.rates_gbit_per_s)
    with (
        limited_link(cfg.rates_gbit_per_s[0], mtu_bytes=cfg.mtu_bytes) as link,
        open_pairs(systems, [largest] * len(systems), link.ends) as pairs,
    ):
        check_ours_present(pairs)
        present = [pair for pair in pairs if not pair.missing]
        rows: list[Row] = []
        limited_to = cfg.rates_gbit_per_s[0]
        for cell in context.progress(list(_cells(present, cfg, context.seed)), "transfers"):
            if cell.rate_gbit_per_s != limited_to:
                limited_to = cell.rate_gbit_per_s
                link.limit(limited_to)
            rows += _measure(cell, link, context)
        for pair in context.progress(present, "round trips"):
            rows += _round_trips(pair, limited_to, cfg, context)
    missing = [pair for pair in pairs if pair.missing]
    return rows + [shared_columns(pair, context) | {"quantity": "missing", "note": pair.missing} for pair in missing]


def _on_link(system: System) -> System:
    if system.kind == "ucx":
        return dataclasses.replace(system, options=_OURS_ON_LINK)
    # NIXL takes these from the environment; gloo uses the address that it is given.
    return dataclasses.replace(system, env=_UCX_ON_LINK)


def _size_bytes(cfg: Config, rate_gbit_per_s: float) -> int:
    """Of a transfer at this rate: whole blocks of every size."""
    unit = max(cfg.block_sizes)
    return max(round(cfg.seconds * rate_gbit_per_s * 1e9 / 8 / unit), 1) * unit


def _cells(pairs: list[Pair], cfg: Config, seed: int) -> Iterator[_Cell]:
    for repeat in range(cfg.num_repeats + 1):
        for rate in cfg.rates_gbit_per_s:
            for block in cfg.block_sizes:
                for pair in rotated(pairs, repeat):
                    num_blocks = min(_size_bytes(cfg, rate) // block, pair.system.max_blocks or 1 << 62)
                    pattern = Pattern(kind=SHUFFLED, block_bytes=block, num_blocks=num_blocks, seed=seed)
                    yield _Cell(repeat=repeat, rate_gbit_per_s=rate, pair=pair, pattern=pattern)


def _measure(cell: _Cell, link: Link, context: RunContext) -> list[Row]:
    with cell.pair.turn():
        measured = cell.pair.measure(cell.pattern, verify=cell.repeat == 0)
    if cell.repeat == 0:
        return []
    gbit_per_s = cell.pattern.size_bytes * 8 / measured.seconds / 1e9
    _check_used(cell, gbit_per_s)
    columns: Row = {
        "quantity": "bandwidth",
        "rate_gbit_per_s": cell.rate_gbit_per_s,
        "block_bytes": cell.pattern.block_bytes,
        "num_blocks": cell.pattern.num_blocks,
        "repeat": cell.repeat,
        "gbit_per_s": gbit_per_s,
        "share_of_rate": gbit_per_s / cell.rate_gbit_per_s,
        "payload_limit": link.payload_share,
        "seconds": measured.seconds,
        "path": measured.path,
        "mtu_bytes": link.mtu_bytes,
    }
    return [shared_columns(cell.pair, context) | columns]


def _check_used(cell: _Cell, gbit_per_s: float) -> None:
    """Raises TransportError for more than the link can have carried: then the bytes went another way."""
    if gbit_per_s > _MAX_SHARE * cell.rate_gbit_per_s:
        raise TransportError(
            f"{cell.pair.system.name} did not use the link",
            expected=f"at most {cell.rate_gbit_per_s:g} Gbit/s",
            found=f"{gbit_per_s:.3g} Gbit/s",
            fix="switch off the paths that reach across network namespaces, such as shared memory",
        )


def _round_trips(pair: Pair, rate_gbit_per_s: float, cfg: Config, context: RunContext) -> list[Row]:
    with pair.turn():
        pair.round_trips(max(cfg.num_round_trips // 10, 1), cfg.payload_bytes)
        times_us = pd.Series(pair.round_trips(cfg.num_round_trips, cfg.payload_bytes)) * 1e6
    columns: Row = {
        "quantity": "round trip",
        "rate_gbit_per_s": rate_gbit_per_s,
        "payload_bytes": cfg.payload_bytes,
        "num_round_trips": cfg.num_round_trips,
        "median_us": float(times_us.median()),
        "p99_us": float(times_us.quantile(0.99)),
    }
    return [shared_columns(pair, context) | columns]


def plot(rows: pd.DataFrame) -> Figure:
    transfers = rows[rows["quantity"] == "bandwidth"]
    rates = sorted(set(transfers["rate_gbit_per_s"]))
    figure, axes = style.subplots(1, len(rates) + 1, panel_width_in=4.2, panel_height_in=3.9)
    methods = [name for name in SYSTEMS if (transfers["method"] == name).any()]
    for ax, rate in zip(axes[0], rates, strict=False):
        _shares(ax, transfers[transfers["rate_gbit_per_s"] == rate], methods)
        ax.set_title(f"{rate:g} Gbit/s", fontsize=10)
    axes[0, 0].set_ylabel("payload / rate of the link (median)")
    _latencies(axes[0, -1], rows[rows["quantity"] == "round trip"], methods)
    figure.suptitle(_paths(rows), fontsize=7)
    style.legend(figure, rows, methods=methods, num_columns=4)
    return figure


def _paths(rows: pd.DataFrame) -> str:
    """Path and library of each method, a line each; why, if it was left out."""
    lines = []
    for name, mine in rows.groupby("method", sort=False):
        if (mine["quantity"] == "missing").any():
            lines.append(f"{name}: left out, {mine['note'].dropna().iloc[0]}")
        else:
            transports = str(mine["settings"].iloc[0]).partition(", paths")[0].partition(", ucx_config")[0]
            path = " or ".join(dict.fromkeys(mine["path"].dropna()))
            lines.append(f"{name}: path {path}, {mine['library'].iloc[0]}, {transports}")
    return "\n".join(lines)


def _shares(ax: Axes, rows: pd.DataFrame, methods: list[str]) -> None:
    medians = rows.groupby(["method", "source", "block_bytes"], sort=False)["share_of_rate"].median().reset_index()
    style.lines(ax, medians, x="block_bytes", y="share_of_rate", methods=methods)
    limit = float(rows["payload_limit"].iloc[0])
    for height, text, line, side in (
        (limit, "all that TCP can carry", "-", "bottom"),
        (TARGET_SHARE, "target", "--", "top"),
    ):
        ax.axhline(height, color=style.GREY, linestyle=line, linewidth=1)
        ax.annotate(text, (0.02, height), xycoords=("axes fraction", "data"), fontsize=7, va=side)
    ticks = sorted(set(rows["block_bytes"].astype(int)))
    ax.set(xscale="log", xlabel="block size (KiB)", ylim=(0, 1.05))
    ax.set_xticks(ticks, [str(tick >> 10) for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())


def _latencies(ax: Axes, rows: pd.DataFrame, methods: list[str]) -> None:
    colors = style.method_colors(methods)
    for place, name in enumerate(methods):
        mine = rows[rows["method"] == name]
        if len(mine):
            median, p99 = float(mine["median_us"].iloc[0]), float(mine["p99_us"].iloc[0])
            ax.barh(place, median, 0.6, color=colors[name])
            ax.plot([median, p99], [place, place], color=style.GREY, linewidth=1, marker="|")
            ax.text(p99, place, f"  {median:.0f} (p99 {p99:.0f})", va="center", fontsize=8)
    ax.set_yticks(range(len(methods)), methods, fontsize=7)
    ax.invert_yaxis()
    ax.set(xlabel="µs", xlim=(0, 1.6 * float(rows["p99_us"].max())))
    ax.set_title("notification there and back (median, p99)", fontsize=10)


def compare(rows: pd.DataFrame) -> list[Comparison]:
    """Ours at each rate: the lowest of the medians over block sizes, against the target."""
    transfers = rows[rows["quantity"] == "bandwidth"]
    result = []
    for rate, mine in transfers.groupby("rate_gbit_per_s"):
        medians = mine.groupby(["method", "block_bytes"])["share_of_rate"].median()
        ours = medians[TCP] if TCP in medians.index.get_level_values("method") else pd.Series(dtype=float)
        lowest = float(ours.min()) if len(ours) else None
        note = "not measured"
        if lowest is not None:
            others = [f"{name}: {values.min():.3f}" for name, values in medians.groupby("method") if name != TCP]
            sizes = [f"{share:.3f} at {int(block) >> 10} KiB" for block, share in ours.items()]
            verdict = "holds" if lowest >= TARGET_SHARE else "DOES NOT HOLD"
            note = "; ".join([f"{verdict}: at least {TARGET_SHARE:g}", ", ".join(sizes), *others])
        result.append(
            Comparison(
                name=f"link of {rate:g} Gbit/s: share of its rate, {TCP}, lowest over block sizes",
                paper=None,
                ours=lowest,
                unit="",
                note=note,
            )
        )
    return result
