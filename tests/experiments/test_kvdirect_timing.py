"""What `kvdirect/sync_overhead` and `kvdirect/dynamic_membership` measure adds up."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np
import pytest

from experiments.kvdirect import dynamic_membership as membership
from experiments.kvdirect import sync_overhead as sync
from experiments.kvdirect._worker_settings import IDLE, MODEL, STATES
from experiments.run import run_experiment
from llmsys import _C
from llmsys.core.errors import ConfigError, TransportError

needs_engine = pytest.mark.skipif(not _C.engine_built(), reason="llmsys._C was built without UCX's headers")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    cfg = sync.Config(request_blocks=32, num_blocks=64)
    with sync._Bench(cfg, seed=0) as started:
        for system in sync.SYSTEMS:
            started.measure(system, IDLE)
        yield started


@needs_engine
@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("system", sync.SYSTEMS)
def test_phases_sum_to_the_measured_time(bench: Any, system: str, state: str) -> None:
    # The phases come from clocks in two processes, the total from one clock in one of them.
    repeats = [bench.measure(system, state) for _ in range(5)]
    totals = [sum(phases.values()) for phases in repeats]
    rest = median(abs(phases[sync.REST]) for phases in repeats)
    assert rest <= sync.REST_SHARE * median(totals) + sync.REST_S
    for phases in repeats:
        assert all(seconds >= 0 for phase, seconds in phases.items() if phase != sync.REST)
        assert max(phases, key=lambda phase: phases[phase]) != sync.REST


@needs_engine
@pytest.mark.slow
def test_a_busy_target_delays_the_wake_up_of_messages_and_not_the_data_of_a_pull(bench: Any) -> None:
    message = f"messages, {sync.PACKED}"

    def waits(system: str, state: str, phase: str) -> float:
        return median(bench.measure(system, state)[phase] for _ in range(5))

    woken = {state: waits(message, state, sync.WAKE_UP) for state in (IDLE, MODEL)}
    moved = waits(sync.PULL_SHM, MODEL, sync.DATA)
    assert woken[MODEL] > 2 * woken[IDLE]
    assert moved < woken[MODEL]


@pytest.mark.parametrize(
    ("phases", "num_wrong", "complaint"),
    [({sync.POST: 0.1}, 2, "brought wrong bytes"), ({sync.POST: 0.3, sync.DATA: -0.1}, 0, "overlap")],
)
def test_wrong_bytes_and_wrong_clocks_are_refused(
    phases: dict[str, float], num_wrong: int, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = {"num_wrong": num_wrong, "total_s": 0.2}
    monkeypatch.setattr(sync._Bench, "_by_pull", lambda *_: (dict(phases), result))
    with pytest.raises(TransportError, match=complaint):
        sync._Bench(sync.Config(), seed=0).measure(sync.PULL_SHM, IDLE)


def pull(holder: str, *times_s: float) -> membership.Pull:
    return membership.Pull(holder=holder, times_s=times_s, size_bytes=100, paths=("shm",))


def test_bins_hold_every_byte_once() -> None:
    pulls = [pull("a", 0.0, 1.0, 2.0, 4.0), pull("b", 0.5, 0.75), pull("a", 6.0, 6.5)]
    edges = np.linspace(0.0, 7.0, 15)
    # The first request of each pull only marks its beginning.
    assert membership._sizes(pulls, "a", edges).sum() == pytest.approx(400)
    assert membership._sizes(pulls, "b", edges).sum() == pytest.approx(100)
    assert membership._sizes(pulls, "a", np.array([2.0, 3.0]))[0] == pytest.approx(50)
    assert membership._rate(pulls, ["a", "b"], 0.0, 1.0) == pytest.approx(200 / 1e9)


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"(?s)networks is out of range.*this host, limited link.*moon"):
        membership.Config(networks=("moon",))


@needs_engine
@pytest.mark.slow
def test_members_that_go_are_noticed_and_those_that_come_are_used() -> None:
    rows = run_experiment("kvdirect/dynamic_membership", "tiny").rows
    events = rows[rows["quantity"] == "event"].set_index("event")
    assert list(events.index) == list(membership.EVENTS)
    # A killed process is noticed by its closed connection, long before its lease.
    lease_s = membership.Config().lease_s
    assert events.loc[membership.KILL, "until_noticed_s"] < lease_s
    assert "PeerLostError" in events.loc[membership.KILL, "error"]
    curves = rows[rows["quantity"] == "throughput"]
    pulled = curves.groupby("holder")["gb_per_s"].sum()
    assert (pulled > 0).all() and len(pulled) == len(membership.HOLDERS)
    gone_s = events.loc[membership.LEAVE, "time_s"] + events.loc[membership.LEAVE, "until_noticed_s"]
    late = curves[(curves["holder"] == membership.GUEST) & (curves["time_s"] > gone_s + 0.1)]
    assert (late["gb_per_s"] == 0).all()
