"""The measured experiments of Lancet: their settings, their verdicts, and ranks that fail."""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd
import pytest

from experiments import network
from experiments.lancet import _measured_run, fig14, limited_link
from experiments.lancet._measured_job import Model
from experiments.lancet._measured_systems import TORCH
from experiments.lancet._setup import AS_CAPTURED, LANCET
from llmsys.core.errors import ConfigError, PeerLostError

TINY = Model(name="tiny", hidden=64, num_layers=2, vocab_size=128, seq_len=32, batch_size=4)


@pytest.mark.parametrize(
    "change",
    [{"systems": ("Lancet", "nonsense")}, {"comm_share": 1.0}, {"part_counts": (1, 2)}, {"num_repeats": 0}],
)
def test_settings_that_cannot_be_measured_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        limited_link.Config(**change)
    with pytest.raises(ConfigError):
        fig14.Config(**change)


def rows(step: dict[str, float], wait: dict[str, float], **columns: float) -> pd.DataFrame:
    common = {"gradient_error": 0.0, "replay_error": 0.001, "predicted_ms": 100.0} | columns
    found = [
        {"model": "m", "method": method, "repeat": repeat, "step_ms": ms + repeat, "waited_ms": wait[method]} | common
        for method, ms in step.items()
        for repeat in (-1, 0, 1)
    ]
    return pd.DataFrame(found)


def verdicts(table: pd.DataFrame) -> dict[str, tuple[float | None, bool]]:
    return {c.name: (c.ours, "DOES NOT HOLD" not in c.note) for c in limited_link.compare(table)}


def test_verdicts_follow_from_the_medians() -> None:
    waits = {AS_CAPTURED: 40.0, LANCET: 20.0, TORCH: 30.0}
    good = verdicts(rows({AS_CAPTURED: 115.0, LANCET: 100.0, TORCH: 100.0}, waits))
    assert good[f"m: step of {AS_CAPTURED} / step of {LANCET}"] == (pytest.approx(1.15), True)
    assert good[f"m: step of {TORCH} / step of {LANCET}"] == (pytest.approx(1.0), True)
    assert good[f"m: time in waits, cut against {AS_CAPTURED}"] == (pytest.approx(50.0), True)
    assert good["m: gradients against eager execution, worst of all systems"] == (0.0, True)

    slow = rows({AS_CAPTURED: 114.0, LANCET: 100.0, TORCH: 99.0}, waits | {LANCET: 21.0}, gradient_error=2e-4)
    assert [holds for _, holds in verdicts(slow).values()] == [True, False, False, False, False]


def test_a_rate_is_corrected_by_what_it_gave() -> None:
    link = network.Link((), 1500)  # type: ignore[arg-type]
    told = {"compute_ms": 60.0, "waited_ms": 20.0, "link_bytes": 1e6}
    first = _measured_run._rate(link, told, 40.0, 0.0)
    assert first == pytest.approx(1e6 * 8 / 40e-3 / 1e9 / link.payload_share)
    assert _measured_run._rate(link, told, 40.0, first) == pytest.approx(first / 2)


def test_the_error_of_predictions_is_that_of_medians() -> None:
    steps = rows({AS_CAPTURED: 100.0, LANCET: 80.0}, {AS_CAPTURED: 40.0, LANCET: 10.0})
    steps["quantity"] = "step"
    predictions = pd.DataFrame(
        [
            {"model": "m", "method": name, "quantity": "prediction", "error_percent": e}
            for name, e in (("a", 2), ("b", 9))
        ]
    )
    error, replayed = fig14.compare(pd.concat([steps, predictions]))
    assert error.ours == pytest.approx(5.5) and "DOES NOT HOLD" in error.note
    assert replayed.ours == pytest.approx(0.1) and "DOES NOT HOLD" not in replayed.note


def test_a_rank_that_fails_ends_the_run_with_its_output() -> None:
    if reason := network.why_not():
        pytest.skip(reason)
    settings = limited_link.Config(models=(TINY,), num_repeats=1)
    job = dataclasses.replace(settings.job(seed=0), models=(dataclasses.replace(TINY, num_heads=7),))
    with pytest.raises(PeerLostError, match="of the measured step ended") as caught:
        list(_measured_run.measure(job, 0.4))
    assert "num_heads" in str(caught.value)
