"""The report of made-up results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments import report
from experiments.run import run_experiment
from llmsys.core.errors import InputError


class TestReport:
    @pytest.fixture
    def outputs(self, demo: list[str], tmp_path: Path) -> Path:
        for scale in ("tiny", "small"):
            run_experiment("demo/fig2", scale, [*demo, f"output_dir={tmp_path}"], save=True)
        return tmp_path

    def test_the_page_is_self_contained_and_escaped(self, outputs: Path) -> None:
        page = report.write_report(outputs)
        html = page.read_text()
        assert page == outputs / "report" / "index.html"
        assert html.count("data:image/png;base64,") == 1
        assert "http:" not in html and "https:" not in html and "<script" not in html and "<link" not in html
        assert "&lt;b&gt;twice&lt;/b&gt;" in html and "<b>twice" not in html and "&lt;title&gt;" in html
        assert (page.parent / "../demo/fig2/small/rows.csv").is_file() and "../demo/fig2/small/rows.csv" in html
        for word in (
            "speed-up",
            "1.25×",
            "simulated",
            "Commit",
            "seed 0",
            "8 x demo",
            "also run at scale tiny",
        ):
            assert word in html

    def test_the_markdown_has_the_numbers_and_its_images_beside_it(self, outputs: Path) -> None:
        folder = report.write_report(outputs, scale="tiny").parent
        text = (folder / "report.md").read_text()
        assert "| speed-up | 4 | 3 | 0.75 | measured | x | \\| |" in text
        assert "(images/demo-fig2-tiny.png)" in text and (folder / "images" / "demo-fig2-tiny.png").is_file()
        assert "demo-fig2-small" not in text and "<b>" not in text

    def test_only_the_first_rows_are_shown(self, demo: list[str], tmp_path: Path) -> None:
        overrides = [*demo, f"output_dir={tmp_path}", "settings.num_points=150"]
        run_experiment("demo/fig2", "tiny", overrides, save=True)
        html = report.write_report(tmp_path).read_text()
        assert "300 rows, the first 200 shown" in html
        assert f"<td>{512 * 100}</td>" in html and f"<td>{512 * 101}</td>" not in html

    def test_damaged_results_are_shown_as_such(self, outputs: Path) -> None:
        rows = outputs / "demo" / "fig2" / "small" / "rows.csv"
        rows.write_text(rows.read_text().replace("simulated", "measured"))
        broken = outputs / "demo" / "fig10" / "tiny"
        broken.mkdir(parents=True)
        (broken / "manifest.json").write_text("{")
        html = report.write_report(outputs).read_text()
        assert "rows.csv is not the file that this manifest was written with" in html
        assert "Failed: demo/fig10" in html and "cannot be read" in html

    def test_nothing_to_report_is_an_error(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(InputError, match="nothing to report"):
            report.write_report(tmp_path)
        assert report.main([f"output_dir={tmp_path}"]) == 1
        assert "nothing to report" in capsys.readouterr().err

    @pytest.mark.parametrize("words", [[], ["--run", "--only", "demo/fig2"]])
    def test_a_file_is_no_output_directory(
        self, demo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
    ) -> None:
        (tmp_path / "file").touch()
        assert report.main([*words, f"output_dir={tmp_path / 'file'}"]) == 1
        told = capsys.readouterr().err
        assert "file is a file" in told and "Traceback" not in told and "running" not in told

    def test_run_goes_on_after_a_failure_and_tells_of_it(
        self, demo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = [
            "--run",
            "--scale",
            "tiny",
            "--only",
            "demo/fig10,demo/fig2",
            f"output_dir={tmp_path}",
            *demo,
        ]
        assert report.main(words) == 1
        out = capsys.readouterr().out
        page = Path(out.splitlines()[-1])
        html = page.read_text()
        assert page == tmp_path / "report" / "index.html"
        assert "Failed: demo/fig10" in html and "broken &lt;on&gt; purpose" in html and "speed-up" in html
        assert report.main([*words[:3], "--only", "demo/fig2", *words[5:]]) == 0

    @pytest.mark.parametrize(
        ("value", "text"),
        [(None, "–"), (float("nan"), "–"), (3.0, "3"), (0.123456, "0.1235"), (65536.0, "65536"),
         (True, "True"), (123456.7, "123,457"), (1.5e12, "1.5e+12"), (np.int64(7), "7"), ("a", "a")],
    )  # fmt: skip
    def test_format_cell(self, value: object, text: str) -> None:
        assert report.format_cell(value) == text
