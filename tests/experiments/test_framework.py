"""From words on the command line to a result, tried on the made-up paper of conftest.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pandas as pd
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from experiments import catalog, environment, record, settings
from experiments.run import CONF, compose, run_experiment
from llmsys.core.errors import ConfigError, DataNotFoundError


def command_line(module: str, demo_root: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(environment.REPOSITORY), str(demo_root)])
    options = ["--config-dir", str(demo_root / "conf")] if module == "experiments.run" else []
    return subprocess.run(
        [sys.executable, "-m", module, *options, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, "HYDRA_FULL_ERROR": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )


class TestCatalog:
    def test_names_are_in_natural_order_without_helpers(self, demo: list[str]) -> None:
        assert catalog.names() == ("demo/fig2", "demo/fig3", "demo/fig10")
        assert catalog.expand("demo/fig1*, demo/fig2") == ("demo/fig10", "demo/fig2")

    def test_an_unknown_name_lists_the_valid_ones(self, demo: list[str]) -> None:
        with pytest.raises(ConfigError, match=r"(?s)'demo/fig22'.*demo/fig2, demo/fig3, demo/fig10.*=demo/fig2\?"):
            run_experiment("demo/fig22")

    def test_an_incomplete_module_says_what_it_lacks(self, demo: list[str]) -> None:
        with pytest.raises(ConfigError, match=r"(?s)demo/fig3.*no CLAIM, no Config, no run, no plot, no compare"):
            catalog.load("demo/fig3")


class TestSettings:
    def build(self, demo: list[str], scale: str, *overrides: str) -> Any:
        cfg = compose("demo/fig2", scale, [*demo, *overrides])
        return settings.build_config(catalog.load("demo/fig2"), cfg, scale)

    def test_the_command_line_wins_over_the_scale_over_the_yaml_over_the_code(self, demo: list[str]) -> None:
        paper, tiny, small = (self.build(demo, scale) for scale in ("paper", "tiny", "small"))
        assert (paper.num_points, paper.factor) == (4, 3.0)
        assert (tiny.num_points, tiny.factor) == (2, 3.0)
        assert (small.num_points, small.factor) == (4, 5.0)
        changed = self.build(demo, "small", "settings.factor=7.0", "settings.num_points=1")
        assert (changed.num_points, changed.factor) == (1, 7.0)

    def test_a_part_of_a_nested_setting_can_be_changed(self, demo: list[str]) -> None:
        changed = self.build(demo, "tiny", "settings.cluster.name=mine")
        assert (changed.cluster.num_nodes, changed.cluster.name) == (1, "mine")

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("settings.num_pointz=3", r"did you mean 'settings\.num_points'"),
            ("settings.cluster.nodes=3", r"settings\.cluster\.nodes"),
            ("settings.num_points=many", r"settings\.num_points: wrong type"),
            ("scale=tinny", "(?s)no scale 'tinny'.*tiny, small, paper"),
            ("seed=first", "seed: wrong type"),
            ("sede=1", "(?s)cannot be composed.*sede"),
            ("seed=-1", "(?s)seed is out of range.*at least 0.*-1"),
            ("data.root=no/such/dir", "(?s)no/such/dir is missing.*set data.root"),
            ("data.root=", "(?s)data.root is empty.*data.root=null"),
        ],
    )
    def test_a_wrong_word_is_explained(self, demo: list[str], override: str, message: str) -> None:
        error = DataNotFoundError if "data.root" in override else ConfigError
        with pytest.raises(error, match=message):
            run_experiment("demo/fig2", "tiny", [*demo, override])

    @pytest.mark.parametrize(
        ("content", "message"),
        [({"setings": {}}, "'settings'"), ({"scales": {"huge": {}}}, "tiny, small, paper")],
    )
    def test_a_wrong_yaml_key_is_named_with_its_file(self, content: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=f"(?s)conf/experiment/demo/x.yaml.*{message}"):
            settings.yaml_parts("demo/x", content)

    def test_points_of_a_sweep_have_different_names(self) -> None:
        def name(*overrides: str) -> str:
            return settings.variant_name(["experiment=demo/fig2", "scale=tiny", *overrides])

        assert name() == name("output_dir=/somewhere") == ""
        assert name("seed=1", "++settings.factor=2") == "seed=1,factor=2"
        long = "++settings.text=" + "x" * 300
        names = [
            name("seed=1"),
            name("++settings.a=b/c"),
            name("++settings.a=b:c"),
            name(long),
            name(long + "y"),
        ]
        assert len(set(names)) == len(names)
        assert all("/" not in text and len(text) < 120 for text in names)


class TestEnvironment:
    def test_auto_is_the_variable_then_the_shared_directory_then_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        repository = tmp_path / "repository"
        monkeypatch.delenv(environment.DATA_ROOT_VARIABLE, raising=False)
        assert environment.resolve_data_root("auto", repository) is None
        shared = tmp_path / "shared" / "data"
        shared.mkdir(parents=True)
        assert environment.resolve_data_root("auto", repository) == shared
        monkeypatch.setenv(environment.DATA_ROOT_VARIABLE, str(tmp_path))
        assert environment.resolve_data_root("auto", repository) == tmp_path
        assert environment.resolve_data_root(None, repository) is None
        monkeypatch.setenv(environment.DATA_ROOT_VARIABLE, str(tmp_path / "gone"))
        with pytest.raises(DataNotFoundError, match=r"(?s)LLMSYS_DATA_ROOT.*gone is missing.*data.root"):
            environment.resolve_data_root("auto", repository)

    def test_a_file_is_no_data_root(self, tmp_path: Path) -> None:
        file = tmp_path / "lengths.parquet"
        file.touch()
        with pytest.raises(DataNotFoundError, match="is a file"):
            environment.resolve_data_root(str(file))

    def test_git_state(self, tmp_path: Path) -> None:
        unknown = {"commit": "unknown", "dirty": False}
        assert environment.git_state(tmp_path) == unknown
        git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run([*git, "init", "-q"], check=True)
        assert environment.git_state(tmp_path) == unknown
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
        clean = environment.git_state(tmp_path)
        assert len(str(clean["commit"])) == 40 and clean["dirty"] is False
        (tmp_path / "inside").mkdir()
        (tmp_path / "inside" / "new").touch()
        assert environment.git_state(tmp_path)["dirty"] is True
        assert environment.git_state(tmp_path / "inside") == unknown

    def test_versions_need_no_import(self) -> None:
        versions = environment.package_versions(["numpy", "no-such-package"])
        assert versions == {"numpy": np.__version__, "no-such-package": "not installed"}

    def test_the_device_has_cores_and_threads(self) -> None:
        assert " CPU (" in environment.describe_device() and "thread" in environment.describe_device()


class TestRunExperiment:
    def test_it_can_be_called_again_and_inside_another_hydra_program(self, demo: list[str]) -> None:
        first = run_experiment("demo/fig2", "tiny", [*demo, "seed=5"])
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            outer = GlobalHydra.instance().hydra
            second = run_experiment("demo/fig2", "tiny", [*demo, "seed=5"])
            assert GlobalHydra.instance().hydra is outer
        pd.testing.assert_frame_equal(first.rows, second.rows)
        assert first.directory is None
        assert not GlobalHydra.instance().is_initialized()

    def test_the_manifest_says_how_the_rows_were_made(self, demo: list[str], tmp_path: Path) -> None:
        overrides = [*demo, "seed=5", f"output_dir={tmp_path / 'out'}", f"data.root={tmp_path}"]
        result = run_experiment("demo/fig2", "tiny", overrides, save=True)
        assert result.directory == tmp_path / "out" / "demo" / "fig2" / "tiny"
        text = (result.directory / "manifest.json").read_text()
        saved = json.loads(text)
        assert saved["settings"]["num_points"] == 2 and saved["settings"]["fail"] == ""
        assert (saved["seed"], saved["scale"], saved["num_rows"]) == (5, "tiny", 4)
        assert (saved["sources"], saved["data"]) == (["simulated"], "real files")
        assert saved["comparisons"][0]["ratio"] == pytest.approx(result.comparisons[0].ours / 4.0)
        assert {"llmsys", "numpy", "torch"} <= set(saved["versions"])
        assert saved["duration_s"] > 0 and saved["started"].endswith("+00:00")
        assert str(tmp_path) not in text and str(environment.REPOSITORY) not in text

    def test_without_files_the_manifest_says_so(self, demo: list[str]) -> None:
        result = run_experiment("demo/fig2", "tiny", [*demo, "data.root=null"])
        assert result.manifest["data"] == "shipped quantile tables"

    def test_a_file_is_no_output_directory(self, demo: list[str], tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match=r"(?s)file is a file.*set output_dir"):
            run_experiment("demo/fig2", "tiny", [*demo, f"output_dir={tmp_path / 'file' / 'below'}"], save=True)

    def test_rows_survive_a_figure_that_cannot_be_drawn(self, demo: list[str], tmp_path: Path) -> None:
        overrides = [*demo, f"output_dir={tmp_path}"]
        with pytest.raises(RuntimeError, match="cannot draw") as caught:
            run_experiment("demo/fig2", "tiny", [*overrides, "settings.factor=1e7"], save=True)
        kept = tmp_path / "demo" / "fig2" / "tiny" / record.UNPLOTTED_FILE
        assert len(pd.read_csv(kept)) == 4
        assert str(kept) in caught.value.__notes__[0]
        run_experiment("demo/fig2", "tiny", overrides, save=True)
        assert not kept.exists()


class TestCommandLine:
    def test_one_run_from_any_directory(self, demo_root: Path, tmp_path: Path) -> None:
        done = command_line("experiments.run", demo_root, tmp_path, "experiment=demo/fig2", "settings.num_points=3")
        assert done.returncode == 0, done.stderr
        assert "speed-up" in done.stdout and "outputs/demo/fig2/tiny" in done.stdout.splitlines()[-1]
        files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
        names = ("rows.csv", "manifest.json", "figure.png", "figure.svg")
        assert files == {f"outputs/demo/fig2/tiny/{name}" for name in names}

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("experiment=demo/fig2", "settings.num_pointz=3"), "did you mean 'settings.num_points'?"),
            (("experiment=demo/nothing",), "expected: one of demo/fig2, demo/fig3, demo/fig10"),
            (("experiment=demo/fig2", "unknown=3"), "Key 'unknown'"),
            (("experiment=demo/fig2", "seed=-1"), "seed is out of range"),
            (("experiment=demo/fig2", "output_dir=file"), "file is a file"),
            (("experiment=demo/fig2", "output_dir=file/below"), "file is a file"),
            (("experiment=demo/fig2", "output_dir="), "results cannot be written below output_dir"),
            (("--multirun", "experiment=demo/fig2", "seed=1,2", "output_dir=file"), "file is a file"),
        ],
    )
    def test_errors_end_with_their_text(
        self, demo_root: Path, tmp_path: Path, words: tuple[str, ...], message: str
    ) -> None:
        (tmp_path / "file").touch()
        done = command_line("experiments.run", demo_root, tmp_path, *words)
        assert done.returncode == 1
        assert message in done.stderr and "Traceback" not in done.stderr and done.stderr.startswith("error: ")
        assert done.stderr.count("fix:") == 1 and "interpolation" not in done.stderr

    def test_debug_shows_the_traceback(self, demo_root: Path, tmp_path: Path) -> None:
        words = ("experiment=demo/fig2", "settings.num_pointz=3", "debug=true")
        done = command_line("experiments.run", demo_root, tmp_path, *words)
        assert done.returncode == 1 and "Traceback" in done.stderr

    def test_help_lists_the_experiments(self, demo_root: Path, tmp_path: Path) -> None:
        done = command_line("experiments.run", demo_root, tmp_path, "--help")
        assert done.returncode == 0, done.stderr
        assert "demo/fig2" in done.stdout and "scale: tiny" in done.stdout

    def test_a_parallel_sweep_keeps_every_point_and_tells_of_the_failed(self, demo_root: Path, tmp_path: Path) -> None:
        words = [
            "--multirun",
            "hydra/launcher=joblib",
            "experiment=demo/fig2,demo/fig10",
            "settings.factor=2,3",
        ]
        done = command_line("experiments.run", demo_root, tmp_path, *words)
        assert done.returncode == 1
        assert done.stderr.count("RuntimeError: broken <on> purpose") == 2
        assert done.stderr.splitlines()[-1] == "error: at least one job of the sweep failed, see above"
        written = {path.parent.name for path in (tmp_path / "outputs").rglob("manifest.json")}
        assert written == {"factor=2", "factor=3"}


def test_importing_the_framework_chooses_no_backend() -> None:
    code = "import sys, experiments.report, experiments.style; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=environment.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "False"


def test_the_configuration_has_no_setting_of_an_experiment() -> None:
    config = OmegaConf.load(CONF / "config.yaml")
    assert set(config) - {"defaults", "hydra", "settings"} == set(settings.RunOptions.__dataclass_fields__)
