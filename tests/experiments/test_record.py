"""Rows, comparisons, files and progress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from experiments import record
from experiments.record import Comparison, RunContext
from experiments.run import run_experiment
from llmsys.core.errors import InputError

ROW = {"source": "simulated", "device": "a demo", "seed": 0, "value": 1.5}


class TestRows:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"source": "guessed"}, "'source'.*measured, simulated, paper.*'guessed'"),
            ({"source": None}, "'source'"),
            ({"device": " "}, "'device'"),
            ({"seed": True}, "'seed'"),
            ({"seed": 1.0}, "'seed'"),
            ({"value": [1, 2]}, "'value' is not a scalar"),
            ({"value": np.arange(2)}, "'value' is not a scalar"),
        ],
    )
    def test_a_wrong_row_is_named(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=f"(?s)experiment demo/x, row 1.*{message}"):
            record.rows_to_frame("demo/x", [ROW, ROW | change])

    @pytest.mark.parametrize("column", ["source", "device", "seed"])
    def test_a_missing_column_is_named(self, column: str) -> None:
        row = {key: value for key, value in ROW.items() if key != column}
        with pytest.raises(InputError, match=f"row 0.*{column!r}"):
            record.rows_to_frame("demo/x", [row])

    def test_no_rows_are_an_error(self) -> None:
        with pytest.raises(InputError, match="demo/x produced no rows"):
            record.rows_to_frame("demo/x", [])

    def test_numpy_scalars_become_plain_and_absent_columns_empty(self) -> None:
        rows = record.rows_to_frame("demo/x", [ROW | {"seed": np.int64(3), "value": np.float32(2)}, ROW | {"more": 1}])
        assert list(rows["seed"]) == [3, 0]
        assert rows["value"].dtype == float
        assert np.isnan(rows["more"][0])


class TestComparison:
    @pytest.mark.parametrize(
        ("paper", "ours", "ratio"),
        [(4.0, 2.0, 0.5), (None, 2.0, None), (4.0, None, None), (0.0, 1.0, None), (4.0, float("nan"), None)],
    )
    def test_ratio(self, paper: float | None, ours: float | None, ratio: float | None) -> None:
        assert Comparison(name="x", paper=paper, ours=ours, unit="").ratio == ratio

    def test_an_unknown_source_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"(?s)'x'.*measured, simulated, paper.*'guess'"):
            Comparison(name="x", paper=1.0, ours=1.0, unit="s", source="guess")

    def test_as_dict_is_strict_json(self) -> None:
        item = Comparison(name="x", paper=np.float64(1.5), ours=float("inf"), unit="s")  # type: ignore[arg-type]
        assert json.loads(record.to_json(item.as_dict())) == {
            "name": "x", "paper": 1.5, "ours": None, "ratio": None, "unit": "s", "note": "", "source": "",
        }  # fmt: skip


class TestWriting:
    def test_a_failing_run_leaves_the_result_before_it(self, tmp_path: Path) -> None:
        rows = record.rows_to_frame("demo/x", [ROW])
        record.write_result(tmp_path, rows, {"run": 1}, Figure())
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        assert set(before) == {"rows.csv", "manifest.json", "figure.png", "figure.svg"}

        class Broken(Figure):
            def savefig(self, *args: object, **kwargs: object) -> None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            record.write_result(tmp_path, pd.concat([rows, rows]), {"run": 2}, Broken())
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before

    def test_an_interrupted_write_keeps_the_old_file_and_no_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "rows.csv"
        record.write_atomically(file, b"old")

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            record.write_atomically(file, b"new")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"rows.csv": b"old"}

    def test_the_same_rows_give_the_same_bytes(self, demo: list[str], tmp_path: Path) -> None:
        contents = []
        for part in ("a", "b"):
            overrides = [*demo, f"output_dir={tmp_path / part}"]
            directory = run_experiment("demo/fig2", "tiny", overrides, save=True).directory
            assert directory is not None
            contents.append([(directory / name).read_bytes() for name in ("rows.csv", "figure.png", "figure.svg")])
        assert contents[0] == contents[1]


class TestProgress:
    CONTEXT = RunContext(seed=0, scale="tiny", data_root=None, device="a demo")

    def test_it_is_quiet_for_a_short_loop_without_a_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert list(self.CONTEXT.progress([1, 2, 3], "demo")) == [1, 2, 3]
        assert capsys.readouterr() == ("", "")

    def test_it_prints_lines_when_the_period_has_passed(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(record, "LOG_PERIOD_S", 0.0)
        list(self.CONTEXT.progress(iter("ab"), "demo", total=2))
        out, err = capsys.readouterr()
        assert (out, err) == ("", "demo: 1 of 2\ndemo: 2 of 2\n")
