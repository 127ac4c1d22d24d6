"""What a run leaves behind: validated rows, a manifest of how they were made, and the files with both."""

from __future__ import annotations

import hashlib
import io
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import pandas as pd
from tqdm import tqdm

from llmsys.core.errors import ConfigError, InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
Scalar: TypeAlias = str | int | float | bool | None
Row: TypeAlias = dict[str, Scalar]
"""One result. Every row has ``source`` (of SOURCES), ``device`` (what it holds for) and ``seed`` (int)."""

SOURCES = ("measured", "simulated", "paper")
LOG_PERIOD_S = 10.0

ROWS_FILE, MANIFEST_FILE, IMAGE_FILE, VECTOR_FILE = "rows.csv", "manifest.json", "figure.png", "figure.svg"
UNPLOTTED_FILE = "rows_unplotted.csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """What an experiment's ``run`` gets beside its own settings.

    ``data_root`` is the directory of the real workload files; None means: use the quantile tables shipped
    with the project. ``device`` describes the CPU that runs the experiment; rows that measure this machine
    carry it.
    """

    seed: int
    scale: str
    data_root: Path | None
    device: str

    def progress(self, iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Iterate with progress on stderr: a bar on a terminal, elsewhere one line every ten seconds."""
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        # Bars of parallel jobs would overwrite each other, so only the main process draws one.
        is_main = multiprocessing.current_process().name == "MainProcess"
        if is_main and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            return iter(tqdm(iterable, desc=description, total=total, leave=False, dynamic_ncols=True))
        return _log_lines(iterable, description, total)


def _log_lines(iterable: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    last_s = time.monotonic()
    for count, item in enumerate(iterable, start=1):
        yield item
        if time.monotonic() - last_s >= LOG_PERIOD_S:
            last_s = time.monotonic()
            print(f"{description}: {count}{f' of {total}' if total else ''}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One number of a claim: the paper's value beside ours.

    None: the paper (or our run) has no such number. ``note`` says what a reader must know to judge the ratio.
    ``source``: what ours is, one of SOURCES; empty means those of the rows (set it where these differ).
    """

    name: str
    paper: float | None
    ours: float | None
    unit: str
    note: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        if self.source not in ("", *SOURCES):
            raise InputError(
                f"comparison {self.name!r}: unknown source",
                expected="one of " + ", ".join(SOURCES) + ", or empty",
                found=repr(self.source),
                fix="set source to what our number is",
            )

    @property
    def ratio(self) -> float | None:
        """ours / paper, or None when either is missing, not finite, or the paper's is zero."""
        paper, ours = finite(self.paper), finite(self.ours)
        return None if paper is None or ours is None or paper == 0 else ours / paper

    def as_dict(self) -> dict[str, Scalar]:
        """The fields and the ratio as JSON can hold them: a number that is not finite becomes None."""
        numbers = {"paper": finite(self.paper), "ours": finite(self.ours), "ratio": self.ratio}
        return {"name": self.name, **numbers, "unit": self.unit, "note": self.note, "source": self.source}


def finite(value: float | None) -> float | None:
    """``value`` as a float, or None when it is missing, infinite or not a number."""
    return float(value) if value is not None and math.isfinite(value) else None


def require_positive(config: object, *names: str, or_zero: bool = False) -> None:
    """For an experiment's ``Config``: its settings ``names`` must be finite and above 0 (``or_zero``: at least 0).

    A setting that is a tuple needs at least one number, and each must be. Raises ConfigError naming the setting.
    """
    allowed = "at least 0" if or_zero else "above 0"
    for name in names:
        value = getattr(config, name)
        is_list = isinstance(value, (tuple, list))
        numbers = value if is_list else (value,)
        if not numbers or not all(0 < number < math.inf or (or_zero and number == 0) for number in numbers):
            raise ConfigError(
                f"{name} is out of range",
                expected=("at least one number, each " if is_list else "a number ") + allowed,
                found=repr(value),
                fix=f"set settings.{name}",
            )


def rows_to_frame(experiment: str, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The validated rows as a table, with NumPy scalars turned into Python ones.

    Raises InputError, with the experiment and the index of the row, for a row that breaks the rules of
    ``Row``.
    """
    if not rows:
        raise InputError(
            f"experiment {experiment} produced no rows",
            expected="at least one row",
            found="an empty list",
            fix="check the settings that select what is run",
        )
    return pd.DataFrame([_valid_row(experiment, index, row) for index, row in enumerate(rows)])


def _valid_row(experiment: str, index: int, row: Mapping[str, Any]) -> Row:
    where = f"experiment {experiment}, row {index}"
    if not isinstance(row, Mapping):
        raise InputError(
            f"{where}: not a mapping",
            expected="column name -> scalar",
            found=repr(row),
            fix="let run() return a list of dicts",
        )
    clean: Row = {}
    for key, value in row.items():
        scalar = value.item() if isinstance(value, np.generic) else value
        if not isinstance(key, str) or not isinstance(scalar, (str, int, float, bool, type(None))):
            raise InputError(
                f"{where}: column {key!r} is not a scalar",
                expected="a text key with a text, number, bool or None",
                found=f"{value!r} of type {type(value).__name__}",
                fix="write one column for each number",
            )
        clean[key] = scalar
    source, device, seed = (clean.get(key) for key in ("source", "device", "seed"))
    _require(where, "source", source in SOURCES, "one of " + ", ".join(SOURCES), clean)
    _require(where, "device", isinstance(device, str) and bool(device.strip()), "text that says on what", clean)
    _require(where, "seed", isinstance(seed, int) and not isinstance(seed, bool), "a whole number", clean)
    return clean


def _require(where: str, column: str, holds: bool, expected: str, row: Row) -> None:
    if not holds:
        raise InputError(
            f"{where}: wrong or missing {column!r}",
            expected=expected,
            found=repr(row[column]) if column in row else "columns " + ", ".join(row),
            fix=f"let run() set {column!r} in every row",
        )


def write_result(directory: Path, rows: pd.DataFrame, manifest: Mapping[str, Any], figure: Figure) -> None:
    """Write rows.csv, figure.png, figure.svg and manifest.json below ``directory``.

    All content is made before the first file is touched and each file is replaced in one step, the manifest
    last: an interrupted run leaves the files of the run before it. The manifest gets the digest of rows.csv,
    which ties them.
    """
    table = to_csv(rows)
    files = {
        ROWS_FILE: table,
        IMAGE_FILE: image(figure, "png"),
        VECTOR_FILE: image(figure, "svg"),
        MANIFEST_FILE: to_json({**manifest, "rows_sha256": hashlib.sha256(table).hexdigest()}),
    }
    for name, content in files.items():
        write_atomically(directory / name, content)
    (directory / UNPLOTTED_FILE).unlink(missing_ok=True)


def to_csv(rows: pd.DataFrame) -> bytes:
    return rows.to_csv(index=False, lineterminator="\n").encode()


def to_json(value: Mapping[str, Any]) -> bytes:
    # allow_nan=False: NaN is no JSON, and a manifest must be readable by any tool.
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file ``path`` by ``content`` in one step: readers see the old or the new file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def image(figure: Figure, kind: str) -> bytes:
    """The figure as the bytes of a "png" or "svg" file; the same figure gives the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "llmsys"}):
        figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
    return buffer.getvalue()
