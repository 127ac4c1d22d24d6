"""The report: every result below ``output_dir`` on one page, the paper's numbers beside ours.

``python -m experiments.report`` collects what is there; ``--run`` first runs the experiments. It writes
``<output_dir>/report/index.html`` (one self-contained file) and ``report.md`` with its images beside it.
"""

from __future__ import annotations

import argparse
import base64
import fnmatch
import hashlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from tqdm import tqdm

from experiments import catalog, environment, record, settings
from experiments.run import INTERRUPTED, compose, execute, use_files_only
from llmsys.core.errors import InputError, LlmsysError

REPORT_DIRECTORY = "report"
MAX_ROWS_SHOWN = 200
# What the templates use; a manifest without one of them is reported as unreadable.
MANIFEST_KEYS = {"experiment", "title", "claim", "scale", "seed", "settings", "data", "sources", "num_rows"}
MANIFEST_KEYS |= {
    "comparisons",
    "device",
    "git",
    "versions",
    "python",
    "started",
    "duration_s",
    "rows_sha256",
}
SOURCE_MEANINGS = {
    "measured": "timed or counted on the named device by this code",
    "simulated": "computed by a model of the named device; no such device ran",
    "paper": "printed by the paper's authors",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An experiment that gave no result, with the text of its error."""

    experiment: str
    scale: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One result as the templates show it; ``rows`` are formatted text and at most MAX_ROWS_SHOWN."""

    manifest: dict[str, Any]
    directory: Path
    anchor: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_intact: bool
    other_scales: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The experiment, with the point of a sweep if it is one."""
        variant = self.manifest.get("variant")
        return self.manifest["experiment"] + (f" [{variant}]" if variant else "")

    def own_sources(self, item: Mapping[str, str] | None = None) -> list[str]:
        """What ours is: the source of one compared number, else those of the rows but the paper's."""
        if item and item["source"]:
            return [item["source"]]
        return [source for source in self.manifest["sources"] if source != "paper"] or ["paper"]


def collect(output_dir: Path, scale: str | None = None, only: str = "*") -> tuple[list[Section], list[Failure]]:
    """All results below ``output_dir``: of each experiment the one at the largest scale, or at ``scale``.

    ``only`` selects experiments by comma-separated wildcards. A manifest that cannot be read gives a Failure
    and hides nothing else.
    """
    found: dict[tuple[str, str], list[Section]] = {}
    failures = []
    for file in sorted(output_dir.glob(f"*/*/*/**/{record.MANIFEST_FILE}")):
        if file.relative_to(output_dir).parts[0] == REPORT_DIRECTORY:
            continue
        try:
            section = _read_section(file, output_dir)
            key = (section.manifest["experiment"], section.manifest.get("variant", ""))
            size = settings.SCALES.index(section.manifest["scale"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            name = "/".join(file.relative_to(output_dir).parts[:2])
            failures.append(Failure(experiment=name, scale="?", error=f"{file} cannot be read: {error!r}"))
            continue
        wanted = any(fnmatch.fnmatchcase(key[0], pattern.strip()) for pattern in only.split(","))
        if wanted and scale in (None, settings.SCALES[size]):
            found.setdefault(key, []).append(section)
    keys = sorted(found, key=lambda key: (catalog.natural_key(key[0]), catalog.natural_key(key[1])))
    return [_largest(found[key]) for key in keys], failures


def _largest(sections: Sequence[Section]) -> Section:
    ordered = sorted(sections, key=lambda section: settings.SCALES.index(section.manifest["scale"]))
    scales = tuple(section.manifest["scale"] for section in ordered[:-1])
    best = ordered[-1]
    return Section(**{field: getattr(best, field) for field in Section.__slots__} | {"other_scales": scales})


def _read_section(file: Path, output_dir: Path) -> Section:
    manifest = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):
        raise ValueError("not a JSON object")
    if missing := MANIFEST_KEYS - manifest.keys():
        raise ValueError("no " + ", no ".join(sorted(missing)))
    if not (file.parent / record.IMAGE_FILE).is_file():
        raise FileNotFoundError(f"no {record.IMAGE_FILE} beside it")
    table = (file.parent / record.ROWS_FILE).read_bytes()
    rows = pd.read_csv(file.parent / record.ROWS_FILE, nrows=MAX_ROWS_SHOWN)
    return Section(
        manifest=manifest,
        directory=file.parent,
        anchor="-".join(file.parent.relative_to(output_dir).parts).replace("=", "-").replace(",", "-"),
        columns=tuple(rows.columns),
        rows=tuple(tuple(format_cell(value) for value in row) for row in rows.itertuples(index=False)),
        is_intact=hashlib.sha256(table).hexdigest() == manifest["rows_sha256"],
    )


def format_cell(value: object) -> str:
    """Text for one table cell: numbers to four significant digits and without exponent up to a billion."""
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    number = value.item() if hasattr(value, "item") else value
    if not isinstance(number, float):
        return str(number)
    if number.is_integer() and abs(number) < 1e9:
        return f"{number:.0f}"
    return f"{number:,.0f}" if 1e4 <= abs(number) < 1e9 else f"{number:.4g}"


def write_report(
    output_dir: Path, failures: Sequence[Failure] = (), *, scale: str | None = None, only: str = "*"
) -> Path:
    """Write the report of what ``collect`` finds, plus ``failures``. Returns the path of index.html.

    Raises InputError when there is nothing to report.
    """
    sections, unreadable = collect(output_dir, scale, only)
    if not sections and not failures and not unreadable:
        raise InputError(
            "there is nothing to report",
            expected=f"results below {output_dir}" + (f" at scale={scale}" if scale else ""),
            found="none",
            fix="run an experiment first, add --run, or set output_dir",
        )
    target = output_dir / REPORT_DIRECTORY
    content: dict[str, Any] = {
        "sections": sections,
        "failures": [*failures, *unreadable],
        "source_meanings": SOURCE_MEANINGS,
        "git": environment.git_state(),
        "generated": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "max_rows": MAX_ROWS_SHOWN,
    }
    for section in sections:
        write_image(target, section)
    templates = _templates(target)
    page, text = templates.get_template("report_template.html"), templates.get_template("report_template.md")
    record.write_atomically(target / "report.md", text.render(content).encode())
    record.write_atomically(target / "index.html", page.render(content).encode())
    return target / "index.html"


def write_image(target: Path, section: Section) -> None:
    """Copy the figure beside the Markdown file, which cannot embed it."""
    (target / "images").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(section.directory / record.IMAGE_FILE, target / "images" / f"{section.anchor}.png")


def _templates(target: Path) -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["cell"] = format_cell
    templates.filters["inline_image"] = _inline_image
    templates.filters["paragraphs"] = _paragraphs
    templates.filters["markdown_cell"] = _markdown_cell
    templates.filters["json"] = lambda value: json.dumps(value, indent=1, ensure_ascii=False)
    templates.filters["relative"] = lambda path: Path(os.path.relpath(path, target)).as_posix()
    return templates


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def _markdown_cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _inline_image(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def run_all(scale: str, only: str, overrides: Sequence[str]) -> list[Failure]:
    """Run and save every experiment that matches ``only``; the failures, each also told on stderr."""
    failures = []
    bar = tqdm(catalog.expand(only), desc="experiments", disable=not sys.stderr.isatty())
    for name in bar:
        bar.set_postfix_str(name)
        if bar.disable:
            print(f"running {name} at scale={scale}", file=sys.stderr, flush=True)
        try:
            execute(name, compose(name, scale, overrides))
        except Exception as error:  # One broken experiment must not cost the results of the others.
            text = str(error) if isinstance(error, LlmsysError) else "".join(traceback.format_exception(error))
            failures.append(Failure(experiment=name, scale=scale, error=text))
            tqdm.write(f"failed: {name}: {text}", file=sys.stderr)
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. The last line printed is the path of the page."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument("--run", action="store_true", help="run the experiments first")
    parser.add_argument("--scale", choices=settings.SCALES, help="scale to run (default small) or to show (largest)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="experiments, for example 'dynapipe/*'")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="output_dir=..., seed=..., data.root=...")
    options = parser.parse_args(arguments)
    use_files_only()
    scale, failures = options.scale, []
    try:
        output_dir = _output_dir(options.overrides)
        if options.run:
            scale = scale or "small"
            failures = run_all(scale, options.only, options.overrides)
        page = write_report(output_dir, failures, scale=scale, only=options.only)
    except LlmsysError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: finished experiments are saved; report them without --run", file=sys.stderr)
        return INTERRUPTED
    print(page)
    return 1 if failures else 0


def _output_dir(overrides: Sequence[str]) -> Path:
    given: Mapping[str, str] = dict(word.split("=", 1) for word in overrides if "=" in word)
    wrong = [word for word in overrides if "=" not in word or word.startswith(("scale=", "experiment="))]
    if wrong:
        raise InputError(
            "the report cannot use these words",
            expected="KEY=VALUE",
            found=", ".join(wrong),
            fix="choose with --scale and --only",
        )
    return Path(settings.checked_output_dir(given.get("output_dir", "outputs")))


if __name__ == "__main__":
    sys.exit(main())
