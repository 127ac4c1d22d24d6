"""DynaPipe's experiments at their edges: settings out of range, nothing that fits, seeds."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure

from experiments import catalog, record
from experiments.dynapipe import _systems, fig16b, schedule_study
from experiments.dynapipe._setup import batches, cost_model, fixed_size_batch, lengths
from experiments.run import run_experiment
from llmsys.core.config import build
from llmsys.core.errors import ConfigError, InfeasibleError, InputError
from llmsys.dynapipe.planner import plan_iteration

NAMES = catalog.names("dynapipe/*")
MAY_BE_ZERO = ("fused_speedups", "base_std", "base_comm_factor")
# Points are cached by their seed: with one of their own, no other test gets what is broken here.
SEED = 987


def numeric_settings(config: object) -> list[tuple[str, bool]]:
    """Name, and whether it is a list, of each setting that is a number or a list of them."""
    found = []
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        is_list = isinstance(value, tuple)
        if isinstance(value[0] if is_list and value else value, (int, float)):
            found.append((field.name, is_list))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_counts_and_sizes_must_be_above_0(name: str) -> None:
    config_type = catalog.load(name).config_type
    settings = numeric_settings(config_type())
    assert settings
    for setting, is_list in settings:
        for bad in (-1, *(() if setting in MAY_BE_ZERO else (0,))):
            with pytest.raises(ConfigError, match=rf"(?s){setting} is out of range.*{bad}.*set settings\.{setting}"):
                build(config_type, {setting: [bad] if is_list else bad}, "settings")
        if is_list:
            with pytest.raises(ConfigError, match=rf"(?s){setting} is out of range.*at least one"):
                build(config_type, {setting: []}, "settings")


def test_a_speedup_that_slows_down_is_named_by_its_setting() -> None:
    config_type = catalog.load("dynapipe/varlen_gain").config_type
    with pytest.raises(ConfigError, match=r"(?s)0 \(as profiled\) or at least 1.*0\.5.*set settings\.fused_speedups"):
        build(config_type, {"fused_speedups": [0.0, 0.5]}, "settings")


def check_drawing(result: Any, name: str) -> pd.DataFrame:
    """Rows from memory and rows from the file can both be drawn and compared; gives the latter."""
    experiment = catalog.load(name)
    rows = pd.read_csv(io.BytesIO(record.to_csv(result.rows)))
    assert isinstance(experiment.plot(rows), Figure)
    assert len(experiment.compare(rows)) == len(result.comparisons)
    record.image(result.figure, "png")
    return rows


@pytest.mark.parametrize(
    "name", [f"dynapipe/{figure}" for figure in ("fig13", "fig14", "fig15", "fig16a", "varlen_gain")]
)
def test_figures_of_systems_survive_when_nothing_fits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_systems, "choose", lambda *_: None)
    result = run_experiment(name, "tiny", [f"seed={SEED}"])
    assert check_drawing(result, name)["out_of_memory"].all()
    assert all(record.finite(item.ours) is None for item in result.comparisons)


def test_fig16a_survives_a_split_that_was_not_profiled() -> None:
    result = run_experiment("dynapipe/fig16a", "tiny", ["settings.parallelism.tensor=3"])
    assert check_drawing(result, "dynapipe/fig16a")["out_of_memory"].all()


def test_fig16b_survives_when_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise InfeasibleError("nothing fits")

    monkeypatch.setattr(fig16b, "plan_iteration", fail)
    result = run_experiment("dynapipe/fig16b", "tiny")
    assert check_drawing(result, "dynapipe/fig16b")["out_of_memory"].all()
    assert all(item.ours is None for item in result.comparisons)


def test_fig18b_survives_limits_at_which_nothing_fits() -> None:
    result = run_experiment("dynapipe/fig18b", "tiny", ["settings.memory_limits_mb=[15000.0]"])
    assert check_drawing(result, "dynapipe/fig18b")["out_of_memory"].all()


def test_fig16b_schedules_1f1b_as_the_planner_did() -> None:
    costs = cost_model(fig16b.MODEL, fig16b.PARALLELISM, None)
    (samples,) = batches(None, "decoder_only", 16_384, 4096, 1, 0)
    config = fig16b.VARIANTS[fig16b.ONE_F_ONE_B]
    plan = plan_iteration(samples, costs, config)
    assert fig16b._scheduled_ms(plan, costs, config) == pytest.approx(plan.estimated_ms)
    assert fig16b._scheduled_ms(plan, costs, fig16b.VARIANTS[fig16b.SEARCH]) < plan.estimated_ms


def test_a_fixed_size_batch_has_the_size_that_was_asked_for() -> None:
    count = len(lengths(None))
    assert len(fixed_size_batch(None, "decoder_only", count, 512, 0)) == count
    with pytest.raises(InputError, match=rf"(?s)too few samples.*{count + 1}.*{count} samples.*num_samples"):
        fixed_size_batch(None, "decoder_only", count + 1, 512, 0)


def test_seeds_of_the_schedule_study_share_no_draw() -> None:
    drawn = [tuple(schedule_study._time_factors(0.4, 4, seed, draw)) for seed in range(3) for draw in range(3)]
    assert len(set(drawn)) == len(drawn)


def test_rows_of_the_schedule_study_carry_the_seed_of_the_run() -> None:
    rows = run_experiment("dynapipe/schedule_study", "tiny", ["seed=5", "settings.num_stages=[2]"]).rows
    assert set(rows["seed"]) == {5} and set(rows["draw"]) == {0, 1}
    assert not rows.duplicated(["sweep", "num_stages", "std", "comm_factor", "method", "draw"]).any()
