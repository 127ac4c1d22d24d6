"""How fast scattered blocks of one process's memory arrive in another's, by the ways there are on one machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from experiments.kvdirect import _bandwidth_plot as drawing
from experiments.kvdirect._bandwidth_plot import best_nixl, median_ratio
from experiments.kvdirect._pairs import Pair, open_pairs, rotated
from experiments.kvdirect._rows import check_ours_present, shared_columns
from experiments.kvdirect._scatter import CONTIGUOUS, RUN_LENGTH, RUNS, SHUFFLED, Pattern
from experiments.kvdirect._systems import (
    CMA,
    CMA_ONE,
    GLOO_BLOCKS,
    GLOO_PACKED,
    MEMCPY,
    SHM,
    SHM_ONE,
    TCP,
    System,
    chosen,
)
from experiments.record import Comparison, Row, RunContext, require_positive
from llmsys.core.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "KVDirect: reading scattered blocks from another process, by block size"
CLAIM = """The paper reports 22.23 GB/s on average against 4.05 GB/s of UCX with four connections, on GPUs with RDMA.
Here is host memory of one machine without RDMA, so those numbers cannot be expected; what is compared is how close each
way of moving blocks comes to a memcpy of the same blocks in the same order, coalesced alike.

Ours reads by a copy from memory that the target's engine allocated and the initiator maps, by process_vm_readv from any
memory (CMA), or by UCX over TCP on loopback. The first two do not involve the target's process; over TCP the progress
threads of both sides work, which is not one-sided RDMA. NIXL's READ is shown at its better setting of the progress
thread, and with two threads that share a transfer; gloo sends each block as a message, or packs blocks and unpacks
them. Ours copies with two threads
by default and is shown with one as well; memcpy and gloo have one. Our engine asks the kernel to put registered memory
into huge pages, which is part of why its process_vm_readv is faster than NIXL's; settings.huge_pages=true gives all
systems huge pages from the start. Rates of ours count from the call to the end of the wait, those of the others
from when their library begins, without our checks of the batch. Every transfer is compared byte by byte once. Processes
that are not measured are stopped."""

SHM_MIN_RATIO = 0.9
CMA_MIN_RATIO = 1.3
GLOO_MIN_RATIO = 3.0
POSTING_MAX_SHARE = 0.05
_SHM_BLOCK, _GLOO_BLOCK = 16 << 10, 64 << 10
_OURS = (SHM, CMA, TCP)
_POSTED = (SHM, CMA)
_MANY_THREADS = 1 << 10
_GLOO = (GLOO_BLOCKS, GLOO_PACKED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_sizes: bytes; of single shuffled blocks. run_block_sizes: those of runs and of contiguous blocks.

    total_bytes: of one transfer. systems: names; none means all. posting_blocks, posting_block_sizes: of the transfers
    whose posting is timed. idle_s: how long each pair of processes is watched doing nothing. huge_pages: whether all
    systems' memory asks for them, but not what is shared (which Linux gives small pages by default).
    """

    block_sizes: tuple[int, ...] = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
    run_block_sizes: tuple[int, ...] = (4 << 10, 16 << 10, 64 << 10)
    total_bytes: int = 256 << 20
    num_repeats: int = 5
    systems: tuple[str, ...] = ()
    posting_blocks: int = 32_768
    posting_block_sizes: tuple[int, ...] = (4 << 10, 16 << 10)
    idle_s: float = 1.0
    huge_pages: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "block_sizes", "run_block_sizes", "total_bytes", "num_repeats")
        require_positive(self, "posting_blocks", "posting_block_sizes", "idle_s")
        unit = max(*self.block_sizes, *(RUN_LENGTH * size for size in self.run_block_sizes))
        if any(self.total_bytes % size for size in (*self.block_sizes, unit)) or any(
            size % 8 for size in (*self.block_sizes, *self.run_block_sizes, *self.posting_block_sizes)
        ):
            raise ConfigError(
                "total_bytes is out of range",
                expected=f"a multiple of every block size and of {unit}; block sizes that are multiples of 8",
                found=f"total_bytes={self.total_bytes}, block_sizes={self.block_sizes}",
                fix="set settings.total_bytes and the block sizes to powers of two",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    """One transfer to be measured; repeat 0 warms up and has its contents checked."""

    repeat: int
    pair: Pair
    pattern: Pattern
    coalesce: bool
    quantity: str = "bandwidth"


def run(cfg: Config, context: RunContext) -> list[Row]:
    systems = chosen(cfg.systems)
    sizes = [_memory_bytes(system, cfg) for system in systems]
    with open_pairs(systems, sizes, huge_pages=cfg.huge_pages) as pairs:
        present = [pair for pair in pairs if not pair.missing]
        check_ours_present(pairs)
        rows = [row for pair in present for row in _idle_rows(pair, cfg, context)]
        cells = list(_cells(present, cfg, context.seed))
        for cell in context.progress(cells, "transfers"):
            rows += _measure(cell, cfg, context)
    missing = [pair for pair in pairs if pair.missing]
    return rows + [shared_columns(pair, context) | {"quantity": "missing", "note": pair.missing} for pair in missing]


def _memory_bytes(system: System, cfg: Config) -> int:
    posted = cfg.posting_blocks * max(cfg.posting_block_sizes) if system.name in _POSTED else 0
    return max(cfg.total_bytes, posted)


def _cells(pairs: list[Pair], cfg: Config, seed: int) -> Iterator[_Cell]:
    """Repeats outside, systems inside: what changes in the machine over minutes meets all systems alike.

    Each repeat begins with another system, since what ran before (caches, memory traffic) matters too.
    """
    kinds = ((SHUFFLED, cfg.block_sizes), (RUNS, cfg.run_block_sizes), (CONTIGUOUS, cfg.run_block_sizes))
    points = [(kind, size) for kind, sizes in kinds for size in sizes]
    for repeat in range(cfg.num_repeats + 1):
        for kind, size in points:
            for pair in rotated(pairs, repeat):
                num_blocks = min(cfg.total_bytes // size, pair.system.max_blocks or cfg.total_bytes)
                pattern = Pattern(kind=kind, block_bytes=size, num_blocks=num_blocks, seed=seed)
                yield _Cell(repeat=repeat, pair=pair, pattern=pattern, coalesce=True)
                if pair.system.coalesces and kind != SHUFFLED:
                    yield _Cell(repeat=repeat, pair=pair, pattern=pattern, coalesce=False)
        for size in cfg.posting_block_sizes:
            pattern = Pattern(kind=SHUFFLED, block_bytes=size, num_blocks=cfg.posting_blocks, seed=seed)
            for pair in rotated(pairs, repeat):
                if pair.system.name in _POSTED:
                    yield _Cell(repeat=repeat, pair=pair, pattern=pattern, coalesce=True, quantity="posting")


def _measure(cell: _Cell, cfg: Config, context: RunContext) -> list[Row]:
    with cell.pair.turn():
        if cell.repeat:
            # A process that was stopped starts cold: its threads must first find their cores again.
            cell.pair.measure(cell.pattern.quarter(), coalesce=cell.coalesce)
        measured = cell.pair.measure(cell.pattern, coalesce=cell.coalesce, verify=cell.repeat == 0)
    if cell.repeat == 0:
        return []
    pattern = cell.pattern
    counted_s = measured.seconds if cell.pair.system.kind in ("ucx", "memcpy") else measured.moving_s
    columns: Row = {
        "quantity": cell.quantity,
        "scatter": pattern.kind,
        "block_bytes": pattern.block_bytes,
        "num_blocks": pattern.num_blocks,
        "coalesce": cell.coalesce,
        "num_segments": measured.num_segments,
        "repeat": cell.repeat,
        "gb_per_s": pattern.size_bytes / counted_s / 1e9,
        "seconds": measured.seconds,
        "moving_s": measured.moving_s,
        "posting_s": measured.posting_s,
        "posting_share": measured.posting_s / measured.seconds,
        "path": measured.path,
        "huge_pages": cfg.huge_pages,
    }
    return [shared_columns(cell.pair, context) | columns]


def _idle_rows(pair: Pair, cfg: Config, context: RunContext) -> list[Row]:
    with pair.turn():
        percents = pair.idle_cpu_percent(cfg.idle_s)
    return [
        shared_columns(pair, context) | {"quantity": "idle", "role": role, "cpu_percent": percent}
        for role, percent in zip(("initiator", "target"), percents, strict=False)
    ]


def plot(rows: pd.DataFrame) -> Figure:
    return drawing.plot(rows, posting_limit=POSTING_MAX_SHARE)


def compare(rows: pd.DataFrame) -> list[Comparison]:
    """The four targets: medians over repeats of ratios within a repeat, and whether they hold.

    Ours with two threads meets NIXL with any number of them, ours with one meets NIXL with one.
    """
    return [
        _at_least(rows, SHM, MEMCPY, _SHM_BLOCK, SHM_MIN_RATIO),
        _at_least(rows, SHM_ONE, MEMCPY, _SHM_BLOCK, SHM_MIN_RATIO),
        _over_nixl(rows, CMA, max_threads=_MANY_THREADS),
        _over_nixl(rows, CMA_ONE, max_threads=1),
        _over_gloo(rows),
        *_posting(rows),
    ]


def _verdict(holds: bool, target: str) -> str:
    return f"{'holds' if holds else 'DOES NOT HOLD'}: {target}"


def _at_least(rows: pd.DataFrame, ours: str, other: str, block: int, target: float) -> Comparison:
    ratio = median_ratio(rows, SHUFFLED, block, ours, other)
    return Comparison(
        name=f"single blocks of {block >> 10} KiB: {ours} / {other}",
        paper=None,
        ours=ratio,
        unit="x",
        note="not measured" if ratio is None else _verdict(ratio >= target, f"at least {target:g}"),
    )


def _over_nixl(rows: pd.DataFrame, ours: str, max_threads: int) -> Comparison:
    """Against whichever setting of NIXL is the fastest at each block size."""
    sizes = sorted(set(rows.loc[rows["scatter"] == SHUFFLED, "block_bytes"].dropna().astype(int)))
    best = {size: best_nixl(rows, SHUFFLED, size, max_threads) for size in sizes}
    ratios = {size: median_ratio(rows, SHUFFLED, size, ours, name) for size, name in best.items() if name}
    found = {size: ratio for size, ratio in ratios.items() if ratio is not None}
    lowest = min(found.values(), default=None)
    with_threads = "" if max_threads == _MANY_THREADS else f" with {max_threads} copying thread"
    texts = [f"{ratio:.2f} at {size >> 10} KiB ({best[size]})" for size, ratio in found.items()]
    verdict = "NIXL was not measured"
    if lowest is not None:
        target = f"at least {CMA_MIN_RATIO:g} at every block size"
        verdict = f"{_verdict(lowest >= CMA_MIN_RATIO, target)}; {', '.join(texts)}"
    return Comparison(
        name=f"single blocks: {ours} / NIXL at its best{with_threads}, lowest over block sizes",
        paper=None,
        ours=lowest,
        unit="x",
        note=verdict,
    )


def _over_gloo(rows: pd.DataFrame) -> Comparison:
    pairs = {(ours, other): median_ratio(rows, SHUFFLED, _GLOO_BLOCK, ours, other) for ours in _OURS for other in _GLOO}
    lowest = {ours: min((r for o in _GLOO if (r := pairs[ours, o]) is not None), default=None) for ours in _OURS}
    ratio = lowest[CMA]
    texts = [f"{name}: {value:.2f}" for name, value in lowest.items() if value is not None]
    note = "not measured"
    if ratio is not None:
        note = f"{_verdict(ratio >= GLOO_MIN_RATIO, f'at least {GLOO_MIN_RATIO:g}')}; {', '.join(texts)}"
    return Comparison(
        name=f"single blocks of {_GLOO_BLOCK >> 10} KiB: {CMA} / gloo at its best",
        paper=None,
        ours=ratio,
        unit="x",
        note=note,
    )


def _posting(rows: pd.DataFrame) -> list[Comparison]:
    posted = rows[rows["quantity"] == "posting"]
    medians = posted.groupby(["block_bytes", "method", "num_blocks"], sort=True)[
        ["posting_share", "posting_s"]
    ].median()
    result = []
    for (block, method, count), values in medians.iterrows():
        share = float(values["posting_share"])
        result.append(
            Comparison(
                name=f"posting {int(count)} blocks of {int(block) >> 10} KiB, {method}: share of the transfer's time",
                paper=None,
                ours=share,
                unit="",
                note=f"{_verdict(share < POSTING_MAX_SHARE, f'below {POSTING_MAX_SHARE:g}')}; "
                f"{1e3 * values['posting_s']:.2f} ms",
            )
        )
    return result
