"""Where the time of message passing goes: one request's blocks by two-sided messages and by KVDirect's pull."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.patches import Patch

from experiments import style
from experiments.kvdirect._worker_settings import IDLE, INITIATOR, MODEL, PACKED, PER_BLOCK, PYTHON, STATES, TARGET
from experiments.kvdirect._workers import Nursery, Worker, free_port
from experiments.record import Comparison, Row, RunContext, require_positive
from llmsys.comm.transports.ucx_library import find_ucx_library
from llmsys.core.errors import TransportError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Synchronisation: where the time of message passing goes, and what a pull leaves of it"
CLAIM = """The paper's motivation: with message passing most of a transfer is not data. The target must be told, its
thread must wake up, gather blocks, and send while the receiver receives and scatters; a one-sided pull needs none of
that. It gives an average of 22.23 GB/s for KVDirect and 4.05 GB/s for UCX with 4 connections, on GPUs with RDMA; no
other number of it is known to us. Ours: host memory of one machine, scattered blocks of one request. Messages are
gloo's over TCP loopback; a pull copies by shared memory or CMA, or goes over TCP by UCX, which is no RDMA. The
completion is a round trip for all: afterwards both sides know that the blocks are free. The target is idle, or a Python
loop runs beside its endpoint, or it computes model steps and looks at messages between them. By shared memory and CMA
the data need nothing of the target's process, over TCP its progress thread and so a share of its processor, which the
target's own work may take. The completion is answered by a Python thread of the target, which a Python loop delays."""

MODULE = "experiments.kvdirect._sync_worker"
PULL_SHM, PULL_CMA, PULL_TCP = "KVDirect pull, shm", "KVDirect pull, cma", "KVDirect pull, UCX over TCP"
MESSAGES = {f"messages, {PER_BLOCK}": PER_BLOCK, f"messages, {PACKED}": PACKED}
PULLS = {PULL_SHM: ("shm", "fast"), PULL_CMA: ("cma", "fast"), PULL_TCP: ("cma", "tcp")}
SYSTEMS = (*MESSAGES, *PULLS)
WAKE_UP, GATHER, WIRE, SCATTER = "request and wake-up", "gather", "send and receive", "scatter"
POST, START, DATA, COMPLETION, REST = "post", "start", "data", "completion", "not accounted for"
PHASES = (WAKE_UP, GATHER, WIRE, SCATTER, POST, START, DATA, COMPLETION, REST)
# Phases sum to the measured total within this share of it and this time: what lies between two steps of Python.
REST_SHARE, REST_S = 0.05, 0.0005
START_TIMEOUT_S = 90.0
_COLORS = (
    style.VERMILLION,
    style.ORANGE,
    style.SKY,
    style.PURPLE,
    style.OLIVE,
    style.GREY,
    style.BLUE,
    style.GREEN,
    "#111827",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A request takes ``request_blocks`` of the target's ``num_blocks``, in random order on both sides."""

    num_repeats: int = 15
    block_bytes: int = 65536
    request_blocks: int = 256
    num_blocks: int = 512

    def __post_init__(self) -> None:
        require_positive(self, "num_repeats", "block_bytes", "request_blocks", "num_blocks")


def run(cfg: Config, context: RunContext) -> list[Row]:
    cells: dict[tuple[str, str], list[dict[str, float]]] = {}
    with _Bench(cfg, context.seed) as bench:
        # State inside of repeat, system inside of state: a drift of the machine hits all alike. The first is a warm-up.
        for repeat in context.progress(range(-1, cfg.num_repeats), "repeats", total=cfg.num_repeats + 1):
            for state in STATES:
                for system in SYSTEMS:
                    phases = bench.measure(system, state)
                    if repeat >= 0:
                        cells.setdefault((system, state), []).append(phases)
        paths = bench.paths
    rows: list[Row] = []
    for (system, state), repeats in cells.items():
        size_bytes = cfg.request_blocks * cfg.block_bytes
        total_s = median(sum(phases.values()) for phases in repeats)
        shared: Row = {
            "system": system,
            "target": state,
            "path": paths[system],
            "num_repeats": cfg.num_repeats,
            "size_bytes": size_bytes,
            "block_bytes": cfg.block_bytes,
            "total_ms": 1e3 * total_s,
            "gb_per_s": size_bytes / total_s / 1e9,
            "source": "measured",
            "device": context.device,
            "seed": context.seed,
        }
        for phase in PHASES:
            if phase in repeats[0]:
                rows.append(shared | {"phase": phase, "ms": 1e3 * median(phases[phase] for phases in repeats)})
    return rows


class _Bench:
    """Two pairs of processes: one for messages, one for KVDirect (whose initiator for TCP is a third process)."""

    def __init__(self, cfg: Config, seed: int) -> None:
        self._cfg = cfg
        self._rng = np.random.default_rng(seed)
        self._num_requests = 0
        self.paths = dict.fromkeys(MESSAGES, "gloo over TCP")

    def __enter__(self) -> _Bench:
        self._nursery = Nursery(MODULE)
        try:
            self._start()
        except BaseException:
            self._nursery.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._nursery.close()

    def _start(self) -> None:
        cfg = self._cfg
        shape = {"num_blocks": cfg.num_blocks, "block_bytes": cfg.block_bytes}
        self._message_pair = [self._nursery.spawn(f"messages-{side}") for side in ("target", "initiator")]
        port = free_port()
        calls = []
        for rank, worker in zip((TARGET, INITIATOR), self._message_pair, strict=True):
            call = worker.call("start_messages", rank=rank, port=port, request_blocks=cfg.request_blocks, **shape)
            call.wait_stage("listening", START_TIMEOUT_S)
            calls.append(call)
        for call in calls:
            call.result(START_TIMEOUT_S)
        library = find_ucx_library().path
        self._pullers: dict[str, Worker] = {}
        self._target = self._nursery.spawn("target")
        address = self._target.ask(
            "start_endpoint", START_TIMEOUT_S, name="target", library=library, fast=True, **shape
        )
        for name in ("fast", "tcp"):
            puller = self._pullers[name] = self._nursery.spawn(name)
            puller.ask("start_endpoint", START_TIMEOUT_S, name=name, library=library, fast=name == "fast", **shape)
            puller.ask("connect", START_TIMEOUT_S, address=address)

    def measure(self, system: str, state: str) -> dict[str, float]:
        """Seconds of each phase of one request; they sum to its time, with what no phase accounts for as one more.

        Raises:
            TransportError: wrong bytes, or phases that do not fit the measured total.
        """
        count = self._cfg.request_blocks
        remote, local = (self._rng.permutation(self._cfg.num_blocks)[:count].tolist() for _ in range(2))
        if system in MESSAGES:
            phases, result = self._by_messages(MESSAGES[system], state, remote, local)
        else:
            phases, result = self._by_pull(system, state, local)
        if result["num_wrong"]:
            raise _wrong(f"{system} brought wrong bytes", "none", f"{result['num_wrong']} wrong blocks")
        phases[REST] = result["total_s"] - sum(phases.values())
        if min(phases[phase] for phase in phases if phase != REST) < 0:
            raise _wrong(f"phases of {system} overlap", "each at least 0 s", f"{phases}")
        return phases

    def _by_messages(
        self, method: str, state: str, remote: list[int], local: list[int]
    ) -> tuple[dict[str, float], Any]:
        target, initiator = self._message_pair
        with _busy(target, state if state == PYTHON else IDLE):
            serving = target.call("serve_messages", method=method, num_blocks=len(remote), between_steps=state == MODEL)
            serving.wait_stage("waiting", START_TIMEOUT_S)
            self._wait_until_it_waits(state)
            result = initiator.ask("fetch_messages", START_TIMEOUT_S, method=method, remote_ids=remote, local_ids=local)
            there = serving.result(START_TIMEOUT_S)
        here = result["steps"]
        phases = {WAKE_UP: there["request"][0] - here["request"][0]}
        if method == PACKED:
            phases[GATHER] = _length(there["gather"])
        phases[WIRE] = here["receive"][1] - there["send"][0]
        if method == PACKED:
            phases[SCATTER] = _length(here["scatter"])
        return phases | {COMPLETION: _length(here["completion"])}, result

    def _by_pull(self, system: str, state: str, local: list[int]) -> tuple[dict[str, float], Any]:
        tensor, name = PULLS[system]
        self._num_requests += 1
        ticket = self._target.ask(
            "hold",
            request=f"r{self._num_requests}",
            peer=name,
            tensor=tensor,
            num_blocks=self._cfg.request_blocks,
        )
        with _busy(self._target, state):
            self._wait_until_it_waits(state)
            result = self._pullers[name].ask("pull", START_TIMEOUT_S, ticket=ticket, local_ids=local)
        self.paths[system] = ", ".join(result["paths"])
        steps = result["steps"]
        return {
            POST: _length(steps["post"]),
            START: _length(steps["start"]),
            DATA: _length(steps["data"]),
            COMPLETION: _length(steps["completion"]),
        }, result

    def _wait_until_it_waits(self, state: str) -> None:
        """Gives the target time to get from its word to its wait, and a random place within a model step."""
        threading_delay_s = 0.003 if state == IDLE else 0.05
        time.sleep(threading_delay_s + float(self._rng.random()) * 0.02)


@contextmanager
def _busy(target: Worker, state: str) -> Iterator[None]:
    if state == IDLE:
        yield
        return
    target.ask("be_busy", state=state)
    try:
        yield
    finally:
        target.ask("be_idle")


def _length(step: tuple[float, float]) -> float:
    return step[1] - step[0]


def _wrong(what: str, expected: str, found: str) -> TransportError:
    return TransportError(what, expected=expected, found=found, fix="see the steps in _sync_worker")


def plot(rows: pd.DataFrame) -> Figure:
    states = list(dict.fromkeys(rows["target"]))
    figure, axes = style.subplots(1, len(states), panel_width_in=3.7, panel_height_in=4.0)
    colors = dict(zip(PHASES, _COLORS, strict=True))
    for ax, state in zip(axes[0], states, strict=True):
        here = rows[rows["target"] == state]
        bottom = np.zeros(len(SYSTEMS))
        for phase in PHASES:
            mine = here[here["phase"] == phase].set_index("system")["ms"].reindex(SYSTEMS).fillna(0.0)
            heights = mine.to_numpy(float).clip(min=0.0)
            ax.bar(range(len(SYSTEMS)), heights, 0.7, bottom=bottom, color=colors[phase])
            bottom += heights
        for place, top in enumerate(bottom):
            ax.text(place, top, f"{top:.1f}", ha="center", va="bottom", fontsize=8)
        ax.set_xticks(range(len(SYSTEMS)), [system.replace(", ", ",\n") for system in SYSTEMS], fontsize=7, rotation=35)
        ax.set_title(f"target: {state}", fontsize=10)
        ax.set_ylim(0, 1.1 * float(bottom.max()))
    axes[0, 0].set_ylabel("time of one request (ms), medians")
    shown = [phase for phase in PHASES if (rows["phase"] == phase).any()]
    handles = [Patch(color=colors[phase], label=phase) for phase in shown]
    request = rows.iloc[0]
    sizes = f"{request['size_bytes'] / 2**20:g} MiB in blocks of {request['block_bytes'] / 1024:g} KiB"
    handles.append(
        Patch(
            facecolor="none",
            edgecolor="none",
            label=f"measured: {request['device']}, {sizes}",
        )
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def compare(rows: pd.DataFrame) -> list[Comparison]:
    """Rates, how much of a request is data, and what a busy target adds to it."""
    totals = rows.drop_duplicates(["system", "target"]).set_index(["system", "target"])
    result = [
        Comparison(name="KVDirect, average rate", paper=22.23, ours=_rate(totals, PULL_SHM), unit="GB/s", note=_NOTE),
        Comparison(
            name="message passing, average rate",
            paper=4.05,
            ours=_rate(totals, f"messages, {PACKED}"),
            unit="GB/s",
            note="the paper's: UCX with 4 connections; ours: gloo",
        ),
    ]
    for system in SYSTEMS:
        mine = rows[(rows["system"] == system) & (rows["target"] == IDLE)]
        moved = mine[mine["phase"].isin([WIRE, DATA])]["ms"].sum()
        result.append(
            Comparison(
                name=f"{system}: share of data in the time",
                paper=None,
                ours=float(moved / mine["ms"].sum()),
                unit="x",
                note="target idle",
            )
        )
        for state in (PYTHON, MODEL):
            added = totals.loc[(system, state), "total_ms"] - totals.loc[(system, IDLE), "total_ms"]
            result.append(
                Comparison(name=f"{system}: added by {state}", paper=None, ours=float(added), unit="ms", note="")
            )
    return result


_NOTE = "the paper's: GPUs with RDMA; ours: host memory of one machine, target idle, whole request"


def _rate(totals: pd.DataFrame, system: str) -> float:
    return float(totals.loc[(system, IDLE), "gb_per_s"])
