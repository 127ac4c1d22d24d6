"""One puller keeps pulling from several holders while holders join, leave, die and come back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments import style
from experiments.kvdirect._worker_settings import StreamSettings
from experiments.kvdirect._workers import Call, Nursery, Worker, free_port
from experiments.network import DEVICE, limited_link
from experiments.record import Comparison, Row, RunContext, require_positive
from llmsys.comm.transports.ucx_library import find_ucx_library
from llmsys.core.errors import ConfigError, InputError, TransportError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Dynamic membership: throughput while holders join, leave, die and come back"
CLAIM = """The paper says that workers connect lazily and at any time, so that prefill and decode workers come and go
while serving; we know no number of it. Here one puller makes whole requests (ask, ticket, transfer, acknowledged
completion), one after the other from each of up to three holders. One joins, then leaves in good order; another is
killed and comes back as a new process at the same address. Everything is on one machine: memory copies by shared
memory, or UCX over TCP through a rate-limited link between two network namespaces, which is no RDMA. The puller's one
progress thread is shared by all holders, so the rate of those that stay rises when one goes."""

MODULE = "experiments.kvdirect._stream_worker"
HOST, LINK = "this host", "limited link"
NETWORKS = (HOST, LINK)
FIRST, SECOND, GUEST = "holder A", "holder B", "holder C"
HOLDERS = (FIRST, SECOND, GUEST)
JOIN, LEAVE, KILL, RETURN = "C joins", "C leaves", "B is killed", "B is back"
EVENTS = (JOIN, LEAVE, KILL, RETURN)
START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """``networks``: of NETWORKS; the link needs root. ``phase_s``: time between two events. ``bin_s``: of the curve."""

    networks: tuple[str, ...] = (HOST,)
    phase_s: float = 2.0
    bin_s: float = 0.1
    lease_s: float = 2.0
    link_gbit_per_s: float = 2.0
    block_bytes: int = 65536
    request_blocks: int = 64
    num_blocks: int = 512

    def __post_init__(self) -> None:
        require_positive(self, "phase_s", "bin_s", "lease_s", "link_gbit_per_s")
        require_positive(self, "block_bytes", "request_blocks", "num_blocks")
        unknown = [network for network in self.networks if network not in NETWORKS]
        if unknown or not self.networks:
            raise ConfigError(
                "networks is out of range",
                expected="some of " + ", ".join(NETWORKS),
                found=repr(self.networks),
                fix="set settings.networks",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """``at_s``: of the fault, or when the holder listened. ``done_s``: of the puller's first request, or of the error.

    ``start_s``: how long the new process took until it listened.
    """

    name: str
    holder: str
    at_s: float
    done_s: float
    start_s: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """What the puller did with one holder during one of its lives."""

    holder: str
    times_s: tuple[float, ...]
    size_bytes: int
    paths: tuple[str, ...]


def run(cfg: Config, context: RunContext) -> list[Row]:
    rows: list[Row] = []
    for network in context.progress(cfg.networks, "networks"):
        try:
            with _places(network, cfg) as (holders, puller, address, net_device):
                begin_s, end_s, events, pulls = _Play(cfg, holders, puller, address, net_device).run()
        except InputError as error:
            if network != LINK:
                raise
            print(f"left out: {network}: {error.summary}")
            continue
        paths = ", ".join(sorted({path for pull in pulls for path in pull.paths}))
        shared: Row = {
            "network": network,
            "path": paths,
            "limit_gbit_per_s": cfg.link_gbit_per_s if network == LINK else None,
            "source": "measured",
            "device": context.device,
            "seed": context.seed,
        }
        rows += [shared | row for row in _bins(cfg, pulls, begin_s, end_s)]
        rows += [shared | row for row in _event_rows(cfg, pulls, events, begin_s)]
    return rows


@contextmanager
def _places(network: str, cfg: Config) -> Iterator[tuple[Nursery, Nursery, str, str]]:
    """Where holders and puller are forked, the address that holders listen on, and the device for UCX."""
    with ExitStack() as stack:
        if network == HOST:
            nursery = stack.enter_context(Nursery(MODULE))
            yield nursery, nursery, "127.0.0.1", ""
            return
        link = stack.enter_context(limited_link(cfg.link_gbit_per_s))
        first = stack.enter_context(Nursery(MODULE, command_prefix=link.ends[0].prefix))
        second = stack.enter_context(Nursery(MODULE, command_prefix=link.ends[1].prefix, secret=first.secret))
        yield first, second, link.ends[0].address, DEVICE


class _Play:
    """The events, one a phase, and what the puller saw of them."""

    def __init__(self, cfg: Config, holders: Nursery, puller: Nursery, address: str, net_device: str) -> None:
        self._cfg = cfg
        self._nurseries = (holders, puller)
        self._address, self._net_device = address, net_device
        self._library = find_ucx_library().path
        self._workers: dict[str, Worker] = {}
        self._addresses: dict[str, str] = {}
        self._calls: dict[str, Call] = {}
        self._pulls: list[Pull] = []

    def run(self) -> tuple[float, float, list[Event], list[Pull]]:
        cfg = self._cfg
        self._puller = self._nurseries[1].spawn("puller")
        self._ask_start(self._puller, "puller", "127.0.0.1" if not self._net_device else "0.0.0.0", 0)
        for holder in (FIRST, SECOND):
            self._start(holder)
            self._pull(holder)
        begin_s = time.monotonic()
        events = []
        for event in (self._join, self._leave, self._kill, self._return):
            time.sleep(cfg.phase_s)
            events.append(event())
        time.sleep(cfg.phase_s)
        end_s = time.monotonic()
        self._puller.ask("stop_pulling")
        for holder in list(self._calls):
            result = self._end(holder)
            if result["error"]:
                raise _wrong(f"pulling from {holder} ended early", "no error", result["error"])
        return begin_s, end_s, events, self._pulls

    def _join(self) -> Event:
        return self._come(JOIN, GUEST)

    def _leave(self) -> Event:
        at_s = self._workers[GUEST].ask("leave")
        return self._event_of_loss(LEAVE, GUEST, at_s)

    def _kill(self) -> Event:
        at_s = time.monotonic()
        self._workers[SECOND].kill()
        return self._event_of_loss(KILL, SECOND, at_s)

    def _return(self) -> Event:
        self._workers[SECOND].join()
        return self._come(RETURN, SECOND, int(self._addresses[SECOND].rpartition(":")[2]))

    def _come(self, name: str, holder: str, port: int = 0) -> Event:
        order_s = time.monotonic()
        self._start(holder, port)
        at_s = time.monotonic()
        return Event(name=name, holder=holder, at_s=at_s, done_s=self._pull(holder), start_s=at_s - order_s)

    def _event_of_loss(self, name: str, holder: str, at_s: float) -> Event:
        result = self._end(holder)
        if not result["error"]:
            raise _wrong(f"the loss of {holder} was not noticed", "an error", "none")
        return Event(name=name, holder=holder, at_s=at_s, done_s=result["error_s"], error=result["error"])

    def _start(self, holder: str, port: int = 0) -> None:
        port = port or free_port()
        worker = self._workers[holder] = self._nurseries[0].spawn(holder)
        self._addresses[holder] = self._ask_start(worker, holder, self._address, port)

    def _ask_start(self, worker: Worker, name: str, host: str, port: int) -> str:
        cfg = self._cfg
        settings = StreamSettings(
            name=name,
            host=host,
            port=port,
            library=self._library,
            net_device=self._net_device,
            lease_s=cfg.lease_s,
            num_blocks=cfg.num_blocks,
            block_bytes=cfg.block_bytes,
            request_blocks=cfg.request_blocks,
        )
        address = worker.ask("start", START_TIMEOUT_S, **asdict(settings))["address"]
        assert isinstance(address, str)
        return address

    def _pull(self, holder: str) -> float:
        """Begins to pull; when the first request was acknowledged."""
        call = self._puller.call("pull", address=self._addresses[holder], timeout_s=START_TIMEOUT_S)
        self._calls[holder] = call
        if not call.wait_stage("first", START_TIMEOUT_S):
            raise _wrong(f"nothing could be pulled from {holder}", "a first request", f"{call.result(1.0)['error']}")
        return float(call.stages["first"]["at_s"])

    def _end(self, holder: str) -> dict[str, Any]:
        result: dict[str, Any] = self._calls.pop(holder).result(START_TIMEOUT_S)
        if result["num_wrong"]:
            raise _wrong(f"wrong bytes from {holder}", "none", f"{result['num_wrong']} wrong blocks")
        self._pulls.append(
            Pull(
                holder=holder,
                times_s=tuple(result["times_s"]),
                size_bytes=result["size_bytes"],
                paths=tuple(result["paths"]),
            )
        )
        return result


def _wrong(what: str, expected: str, found: str) -> TransportError:
    return TransportError(what, expected=expected, found=found, fix="see the workers' output above, or raise lease_s")


def _bins(cfg: Config, pulls: Sequence[Pull], begin_s: float, end_s: float) -> list[Row]:
    edges = np.arange(begin_s, end_s, cfg.bin_s)
    rows: list[Row] = []
    for holder in HOLDERS:
        size_bytes = _sizes(pulls, holder, edges)
        rows += [
            {
                "quantity": "throughput",
                "holder": holder,
                "time_s": float(edge - begin_s),
                "gb_per_s": float(size) / cfg.bin_s / 1e9,
            }
            for edge, size in zip(edges[:-1], size_bytes, strict=True)
        ]
    return rows


def _sizes(pulls: Sequence[Pull], holder: str, edges: np.ndarray) -> np.ndarray:
    """Bytes in each bin; those of a request are spread evenly over the time it took."""
    total = np.zeros(len(edges) - 1)
    for pull in pulls:
        if pull.holder == holder and len(pull.times_s) > 1:
            done = np.arange(len(pull.times_s)) * pull.size_bytes
            total += np.diff(np.interp(edges, pull.times_s, done))
    return total


def _event_rows(cfg: Config, pulls: Sequence[Pull], events: Sequence[Event], begin_s: float) -> list[Row]:
    rows: list[Row] = []
    window_s = 0.8 * cfg.phase_s
    for event in events:
        others = [holder for holder in HOLDERS if holder != event.holder]
        before = _rate(pulls, HOLDERS, event.at_s - window_s, event.at_s)
        after = _rate(pulls, HOLDERS, event.done_s, event.done_s + window_s)
        others_before = _rate(pulls, others, event.at_s - window_s, event.at_s)
        # At least so long that a bin's worth of requests falls into it.
        during = _rate(pulls, others, event.at_s, max(event.done_s, event.at_s + 3 * cfg.bin_s))
        rows.append(
            {
                "quantity": "event",
                "event": event.name,
                "holder": event.holder,
                "time_s": event.at_s - begin_s,
                "until_noticed_s": event.done_s - event.at_s,
                "start_s": event.start_s,
                "error": event.error,
                "before_gb_per_s": before,
                "after_gb_per_s": after,
                "others_share": during / others_before if others_before else None,
            }
        )
    return rows


def _rate(pulls: Sequence[Pull], holders: Sequence[str], begin_s: float, end_s: float) -> float:
    edges = np.array([begin_s, end_s])
    return sum(float(_sizes(pulls, holder, edges)[0]) for holder in holders) / (end_s - begin_s) / 1e9


def plot(rows: pd.DataFrame) -> Figure:
    networks = list(dict.fromkeys(rows["network"]))
    figure, axes = style.subplots(len(networks), 1, panel_width_in=8.6, panel_height_in=3.0)
    colors = style.method_colors(HOLDERS)
    for ax, network in zip(axes[:, 0], networks, strict=True):
        here = rows[rows["network"] == network]
        curves = here[here["quantity"] == "throughput"]
        series = [curves[curves["holder"] == holder].sort_values("time_s") for holder in HOLDERS]
        ax.stackplot(
            series[0]["time_s"].to_numpy(float),
            *[one["gb_per_s"].to_numpy(float) for one in series],
            colors=[colors[holder] for holder in HOLDERS],
            alpha=0.85,
            step="post",
        )
        top = float(sum(one["gb_per_s"].to_numpy(float) for one in series).max())
        for event in here[here["quantity"] == "event"].itertuples():
            ax.axvline(event.time_s, color="#111827", linestyle=":", linewidth=1)
            text = f"{event.event}\n{1e3 * event.until_noticed_s:.0f} ms"
            ax.text(event.time_s + 0.03, top * 1.24, text, fontsize=8, va="top")
        ax.set(ylim=(0, top * 1.28), xlabel="time (s)", ylabel="pulled (GB/s), stacked")
        limits = here["limit_gbit_per_s"].dropna()
        limit = f", {limits.iloc[0]:g} Gbit/s" if len(limits) else ""
        ax.set_title(f"{network}{limit}, path {here['path'].iloc[0]}", fontsize=11)
        ax.margins(x=0)
    curves = rows[rows["quantity"] == "throughput"]
    style.legend(figure, curves, method="holder", methods=HOLDERS)
    return figure


def compare(rows: pd.DataFrame) -> list[Comparison]:
    """For each event: how long until the puller noticed or had the first bytes, and what others kept meanwhile."""
    result = []
    for event in rows[rows["quantity"] == "event"].itertuples():
        what = "first request acknowledged" if event.event in (JOIN, RETURN) else "error at the puller"
        name = f"{event.network}: {event.event}"
        note = f"{what}; {event.before_gb_per_s:.2f} GB/s before, {event.after_gb_per_s:.2f} after"
        result += [
            Comparison(name=f"{name}, until", paper=None, ours=1e3 * event.until_noticed_s, unit="ms", note=note),
            Comparison(
                name=f"{name}, rate of the others meanwhile",
                paper=None,
                ours=event.others_share,
                unit="x",
                note="of their rate before",
            ),
        ]
    return result
