"""Every experiment that exists runs at scale=tiny and keeps the contract of ``experiments``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from experiments import catalog, environment, network, record, settings
from experiments.run import CONF, run_experiment
from llmsys.core.config import build, load_yaml

NAMES = catalog.names()
NEED_A_LINK = ("kvdirect/limited_link", "lancet/limited_link", "lancet/fig14")


def test_every_module_has_a_yaml_and_every_yaml_a_module() -> None:
    files = (CONF / "experiment").glob("*/*.yaml")
    assert {f"{file.parent.name}/{file.stem}" for file in files} == set(NAMES)


def test_the_default_experiment_exists() -> None:
    defaults = load_yaml(CONF / "config.yaml")["defaults"]
    assert isinstance(defaults, list)
    (choice,) = (entry["experiment"] for entry in defaults if isinstance(entry, dict) and "experiment" in entry)
    assert choice in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_yaml_changes_defaults_and_never_restates_them(name: str) -> None:
    experiment = catalog.load(name)
    parts = settings.yaml_parts(name, load_yaml(CONF / "experiment" / f"{name}.yaml"))
    common = parts["settings"]
    for values in (common, *({**common, **(scale or {})} for scale in parts["scales"].values())):
        whole = build(experiment.config_type, values)
        for key in values:
            without = {other: value for other, value in values.items() if other != key}
            assert build(experiment.config_type, without) != whole, f"{key} is the default already"


@pytest.mark.parametrize("name", NAMES)
def test_the_config_is_a_frozen_slotted_keyword_only_dataclass(name: str) -> None:
    config_type = catalog.load(name).config_type
    config = config_type()
    assert config_type.__dataclass_params__.frozen
    assert not hasattr(config, "__dict__")
    assert all(field.kw_only for field in dataclasses.fields(config))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_at_scale_tiny(name: str, tmp_path: Path) -> None:
    if name in NEED_A_LINK and (reason := network.why_not()):
        pytest.skip(reason)
    experiment = catalog.load(name)
    result = run_experiment(name, "tiny", [f"output_dir={tmp_path}"], save=True)

    assert result.directory == tmp_path / name / "tiny"
    for file in (record.ROWS_FILE, record.MANIFEST_FILE, record.IMAGE_FILE):
        assert (result.directory / file).stat().st_size > 0
    manifest = (result.directory / record.MANIFEST_FILE).read_text()
    rows = pd.read_csv(result.directory / record.ROWS_FILE)
    assert json.loads(manifest)["num_rows"] == len(result.rows) == len(rows)
    assert not any(str(path) in manifest for path in (environment.REPOSITORY, tmp_path, Path.home()))

    assert isinstance(result.figure, Figure)
    assert experiment.title and experiment.claim
    assert all(isinstance(item, record.Comparison) for item in result.comparisons)
    assert any(item.ours is not None for item in result.comparisons), "nothing is compared"

    # A figure can be drawn again from the saved rows, and drawing changes nothing in them.
    before = rows.copy()
    assert isinstance(experiment.plot(rows), Figure)
    assert len(experiment.compare(rows)) == len(result.comparisons)
    pd.testing.assert_frame_equal(rows, before)
