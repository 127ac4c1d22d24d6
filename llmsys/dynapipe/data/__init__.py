"""Reading data files: the tables shipped in this folder, and the real ones of the setting data.root.

Shipped: ``length_quantiles.json`` (lengths of multi-task training samples) and ``profile_fit.json`` (cost
formulas fitted to the DynaPipe authors' A100 profile). ``experiments/make_shipped_tables.py`` makes both from
the real files, which are not part of the project.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmsys.core.errors import ConfigError, DataNotFoundError, InputError

_FIX = "set data.root to a directory that holds the file, or leave it unset to use the shipped tables"


def find_data_file(root: Path, name: str) -> Path:
    """The path of file ``name`` in directory ``root``; DataNotFoundError if either is not there."""
    root = Path(root)
    if not root.is_dir():
        raise DataNotFoundError(
            "data.root is not a directory",
            expected=f"a directory with {name}",
            found=f"nothing at {root}" if not root.exists() else f"{root} is a file",
            fix=_FIX,
        )
    path = root / name
    if not path.is_file():
        raise DataNotFoundError(f"data.root has no file {name}", expected=str(path), found=_listing(root), fix=_FIX)
    return path


def read_columns(path: Path, columns: Sequence[str]) -> dict[str, Any]:
    """The named columns of a parquet file, each a numpy array; nulls of number columns become NaN.

    Raises ConfigError if pyarrow is not installed, InputError if the file is no parquet file or lacks a
    column.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigError(
            "reading the files of data.root needs pyarrow",
            expected="pyarrow, a dependency of llmsys, to be importable",
            found=str(error),
            fix="install pyarrow, or leave data.root unset to use the tables shipped with llmsys",
        ) from error
    try:
        available = parquet.read_schema(path).names
        missing = [name for name in columns if name not in available]
        if missing:
            raise InputError(
                f"{path.name} in data.root lacks columns",
                expected=f"columns {list(columns)}",
                found=f"columns {list(available)}; missing {missing}",
                fix=_FIX,
            )
        table = parquet.read_table(path, columns=list(columns))
    except pyarrow.ArrowInvalid as error:
        raise InputError(
            f"{path.name} in data.root is not a readable parquet file",
            expected="a complete parquet file (no pointer of a large-file store)",
            found=str(error).splitlines()[0],
            fix=_FIX,
        ) from error
    return {name: table[name].to_numpy() for name in columns}


def read_shipped(name: str) -> dict[str, Any]:
    """The content of a JSON file of this folder."""
    content: dict[str, Any] = json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))
    return content


def _listing(root: Path) -> str:
    names = sorted(path.name for path in root.iterdir())
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{root} with {len(names)} entries" + (f": {shown}" if names else "")
