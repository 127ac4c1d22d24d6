"""Where a layer profile comes from: the authors' measurements in data.root, or the shipped fit."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from llmsys.core.costs import GridTable, Hole
from llmsys.core.errors import InputError
from llmsys.core.specs import Architecture
from llmsys.dynapipe.config import Recompute
from llmsys.dynapipe.data import find_data_file, read_columns, read_shipped
from llmsys.dynapipe.profile.formulas import Kind, capacity_terms, layer_terms
from llmsys.dynapipe.profile.tables import (
    AXES,
    MEMORY_COLUMNS,
    TIME_COLUMNS,
    LayerProfile,
    LayerTables,
    grid_from_points,
)

PROFILE_FILE = "dynapipe_layer_profile.parquet"
MODEL_STATE_FILE = "dynapipe_model_state.csv"
PROFILE_NAMES = ("gpt_6.7b", "t5_11b")
DEVICE = "A100-40GB"

_SHIPPED_FIT = "profile_fit.json"
_KEY_COLUMNS = ("model", "tp", "recompute", "component")
_SIZE_COLUMNS = ("enc_len", "dec_len", "micro_batch_size")
_SIZE_COLUMN = {
    "seq_len": "enc_len",
    "enc_len": "enc_len",
    "dec_len": "dec_len",
    "micro_batch_size": "micro_batch_size",
}


def open_profile(root: Path | None, name: str, *, hole: Hole = "extrapolate") -> LayerProfile:
    """``load_profile`` if ``root`` (the setting data.root) is given, else ``fitted_profile``."""
    return fitted_profile(name, hole=hole) if root is None else load_profile(root, name, hole=hole)


# (hidden, num_heads, kv_channels, ffn_hidden) of the layers that the authors profiled.
_LAYER_SHAPES = {"gpt_6.7b": (4096, 32, 128, 16384), "t5_11b": (1024, 128, 128, 65536)}


def load_profile(root: Path, name: str = "gpt_6.7b", *, hole: Hole = "extrapolate") -> LayerProfile:
    """The DynaPipe authors' measurements of one layer of ``name`` on an A100-40GB.

    Read from ``dynapipe_layer_profile.parquet`` and ``dynapipe_model_state.csv`` in ``root``. The axes of a
    table are the lengths and sizes that occur in it; a point without a row was out of memory and is treated
    as ``hole`` says (see GridTable). One missing inside the measured region always stays infeasible. A model
    whose only layers are called "encoder" there is decoder-only: its layers become ``decoder``. Raises
    DataNotFoundError or InputError, both naming data.root.
    """
    columns = read_columns(
        find_data_file(root, PROFILE_FILE), [*_KEY_COLUMNS, *_SIZE_COLUMNS, *TIME_COLUMNS, *MEMORY_COLUMNS]
    )
    own = columns["model"].astype(str) == name
    if not own.any():
        raise InputError(
            f"{PROFILE_FILE} in data.root has no model {name!r}",
            expected=f"of {sorted(set(columns['model'].astype(str)))}",
            found=repr(name),
            fix="set the profile name to one of them",
        )
    rows = {key: values[own] for key, values in columns.items()}
    is_pair = bool((rows["component"].astype(str) == "decoder").any())
    architecture: Architecture = "encoder_decoder" if is_pair else "decoder_only"
    tables = {}
    for tp, recompute in sorted({(int(t), str(r)) for t, r in zip(rows["tp"], rows["recompute"], strict=True)}):
        chosen = (rows["tp"] == tp) & (rows["recompute"].astype(str) == recompute)
        part = {key: values[chosen] for key, values in rows.items()}
        tables[tp, cast(Recompute, recompute)] = _measured_tables(
            part, architecture, hole, f"{PROFILE_FILE}, {name}, tp={tp}, recompute={recompute}"
        )
    return LayerProfile(
        name=name,
        architecture=architecture,
        device=DEVICE,
        origin="authors' A100-40GB layer profile",
        tables=tables,
        params_mb=_read_params_mb(root, name, architecture),
        layer_shape=_LAYER_SHAPES.get(name),
    )


def fitted_profile(name: str, *, hole: Hole = "extrapolate") -> LayerProfile:
    """A stand-in for the authors' profile of ``name``, computed from the formulas that ship with the project.

    Axes are those of the measurements; each value comes from a formula (see ``formulas``) of our own fitting,
    and a point that the fitted memory capacity excludes is unmeasured, so ``hole`` applies to it. Relative
    error on the measured points, over all 12 (tp, recompute) of both models (the file has every entry's):

    - times: median at most 5%, p95 at most 34% (backward of GPT's head; at most 18% elsewhere);
    - memory: median at most 1%, p95 at most 7%, except T5's stored memory under full recomputation (a few MB:
      median up to 6%, p95 up to 51%) and its decoder's peak at tp=1 and 4 without recomputation (p95 22% and
      14%). Measured peaks that fall when the micro-batch grows (allocator effects, up to 17% of a table) were
      left out of the fit, so the fitted peak of the largest micro-batches is higher than the measured one;
    - the largest micro-batch at given lengths is the measured power of two for at least 63% of the lengths of
      each table, and one power off at the others.

    Raises InputError for an unknown name.
    """
    shipped = read_shipped(_SHIPPED_FIT)
    if name not in shipped["profiles"]:
        raise InputError(
            f"no fitted profile {name!r} is shipped",
            expected=f"of {sorted(shipped['profiles'])}",
            found=repr(name),
            fix="set the profile name to one of them",
        )
    content = shipped["profiles"][name]
    architecture: Architecture = content["architecture"]
    tables: dict[tuple[int, Recompute], LayerTables] = {}
    params_mb: dict[tuple[int, Recompute, str], float] = {}
    for entry in content["entries"]:
        tp, recompute = int(entry["tp"]), cast(Recompute, entry["recompute"])
        axes = (
            np.array(entry["lengths"], dtype=np.float64),
            np.array(shipped["micro_batch_sizes"], dtype=np.float64),
        )
        grids = {
            part: _fitted_grid(architecture, part, axes, formulas, hole) for part, formulas in entry["tables"].items()
        }
        tables[tp, recompute] = LayerTables(encoder=grids.get("encoder"), decoder=grids["decoder"], head=grids["head"])
        for part, size_mb in entry["params_mb"].items():
            params_mb[tp, recompute, part] = float(size_mb)
    return LayerProfile(
        name=name,
        architecture=architecture,
        device=DEVICE,
        origin=f"fit to the authors' A100-40GB layer profile (median error {content['median_error']:.1%})",
        tables=tables,
        params_mb=params_mb,
        layer_shape=_LAYER_SHAPES.get(name),
    )


def formula_kind(architecture: Architecture, part: str) -> Kind:
    """Which formula (see ``formulas``) describes table ``part``."""
    if part == "head":
        return "head"
    return "cross_layer" if (architecture, part) == ("encoder_decoder", "decoder") else "layer"


def _measured_tables(rows: dict[str, Any], architecture: Architecture, hole: Hole, label: str) -> LayerTables:
    names = {"decoder": "encoder", "head": "postprocess"}
    if architecture == "encoder_decoder":
        names = {"encoder": "encoder", "decoder": "decoder", "head": "postprocess"}
    grids: dict[str, GridTable] = {}
    for part, component in names.items():
        chosen = rows["component"].astype(str) == component
        if not chosen.any():
            raise InputError(
                f"{label}: no rows of component {component!r}",
                expected=f"components {sorted(names.values())}",
                found=f"{sorted(set(rows['component'].astype(str)))}",
                fix="complete the profile in data.root",
            )
        axis_names = AXES[architecture, part]
        coordinates = np.stack([rows[_SIZE_COLUMN[axis]][chosen] for axis in axis_names], axis=1).astype(np.int64)
        if (coordinates < 1).any():
            bad = coordinates[(coordinates < 1).any(axis=1)][0]
            raise InputError(
                f"{label}, {component}: a size is not positive",
                expected=f"{', '.join(axis_names)} of at least 1",
                found=str(dict(zip(axis_names, bad.tolist(), strict=True))),
                fix="correct the profile in data.root",
            )
        columns = TIME_COLUMNS if part == "head" else (*TIME_COLUMNS, *MEMORY_COLUMNS)
        values = {column: rows[column][chosen].astype(np.float64) for column in columns}
        grids[part] = grid_from_points(axis_names, coordinates, values, hole, label=f"{label}, {component}")
    return LayerTables(encoder=grids.get("encoder"), decoder=grids["decoder"], head=grids["head"])


def _read_params_mb(root: Path, name: str, architecture: Architecture) -> dict[tuple[int, Recompute, str], float]:
    path = find_data_file(root, MODEL_STATE_FILE)
    needed = ("model", "tp", "recompute", "component", "params_mb_16bit")
    params_mb: dict[tuple[int, Recompute, str], float] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [column for column in needed if column not in (reader.fieldnames or ())]
        if missing:
            raise InputError(
                f"{MODEL_STATE_FILE} in data.root lacks columns",
                expected=f"columns {list(needed)}",
                found=f"columns {list(reader.fieldnames or ())}; missing {missing}",
                fix="set data.root to a directory with a complete file",
            )
        for row in reader:
            if row["model"] == name:
                is_layer = row["component"] != "embedding"
                part = "decoder" if is_layer and architecture == "decoder_only" else row["component"]
                try:
                    key = (int(row["tp"]), cast(Recompute, row["recompute"]), part)
                    params_mb[key] = float(row["params_mb_16bit"])
                except ValueError as error:
                    raise InputError(
                        f"{MODEL_STATE_FILE} in data.root, line {reader.line_num}: not a number",
                        expected="numbers in tp and params_mb_16bit",
                        found=str(dict(row)),
                        fix="correct that line",
                    ) from error
    return params_mb


def _fitted_grid(
    architecture: Architecture,
    part: str,
    axes: tuple[NDArray[np.float64], NDArray[np.float64]],
    formulas: dict[str, Any],
    hole: Hole,
) -> GridTable:
    axis_names = AXES[architecture, part]
    kind = formula_kind(architecture, part)
    lengths, sizes = axes
    mesh = np.meshgrid(*[lengths] * (len(axis_names) - 1), sizes, indexing="ij")
    points = np.stack([axis.reshape(-1) for axis in mesh], axis=1)
    terms = layer_terms(kind, points)
    fits = capacity_terms(points) @ np.array(formulas["capacity"]) <= 1
    columns = TIME_COLUMNS if part == "head" else (*TIME_COLUMNS, *MEMORY_COLUMNS)
    values = {name: (terms[fits] @ np.array(formulas[name]["planes"]).T).max(axis=1) for name in columns}
    return grid_from_points(axis_names, points[fits].astype(np.int64), values, hole, label=f"fitted profile, {part}")
