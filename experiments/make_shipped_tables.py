"""Make the tables that ship with llmsys from the real files.

``python -m experiments.make_shipped_tables DATA_ROOT`` writes ``length_quantiles.json`` and
``profile_fit.json`` into llmsys/dynapipe/data (or ``--output``). Equal input gives equal files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import llmsys.dynapipe.data
from llmsys.core.costs import GridTable
from llmsys.dynapipe.profile import PROFILE_NAMES, LayerProfile, load_profile
from llmsys.dynapipe.profile.formulas import fit, fit_capacity, layer_terms
from llmsys.dynapipe.profile.sources import formula_kind
from llmsys.dynapipe.profile.tables import measured_points, rising_peaks
from llmsys.dynapipe.workload import LengthTable, load_multitask_lengths

MAX_ROWS_PER_TASK = 2000
SEED = 0
NUM_INPUT_LEVELS = 97
NUM_BUCKETS = 48
NUM_TARGET_LEVELS = 65
# The tail is sampled more finely: it decides padding and the largest micro-batch.
TAIL_LEVELS = (0.984, 0.987, 0.99, 0.9925, 0.995, 0.998, 0.999, 0.9995)

LENGTHS_DESCRIPTION = (
    "Quantiles of the token counts of multi-task training samples, made by "
    "experiments/make_shipped_tables.py from lengths of public samples of the FLAN v2 family: the P3/T0 "
    "sample in yizhongw/self-instruct, the chain-of-thought files of google-research/FLAN, "
    "Super-NaturalInstructions tasks in eshaanpathak/natural-instructions-code, "
    "suzgunmirac/BIG-Bench-Hard, cmnfriend/O-LoRA and dialogues of "
    "google-research-datasets/dstc8-schema-guided-dialogue. At most 2,000 rows of each of 467 tasks, "
    "chosen at random with seed 0. FLAN v2 itself is not among them, so its mixture weights differ. "
    "input_quantiles[i] is the input length at level input_levels[i]; target_quantiles[k][j] is the "
    "target length at level target_levels[j] among the samples whose input length is in the k-th of "
    "equally filled ranges."
)
PROFILE_DESCRIPTION = (
    "Cost formulas of one layer on an A100-40GB, fitted by experiments/make_shipped_tables.py to the "
    "profile that the DynaPipe authors published (github.com/chenyu-jiang/Megatron-LM, branch dynapipe). "
    "A cost is the largest over planes of the sum of coefficient times term; terms: see "
    "llmsys/dynapipe/profile/formulas.py. A micro-batch fits if the sum of capacity times term is at most "
    "1. Times in ms; memory in MB of 10^6 bytes. Errors are relative."
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data_root", type=Path, help="directory of the real files (the setting data.root)")
    parser.add_argument("--output", type=Path, default=Path(llmsys.dynapipe.data.__file__).parent)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("length_quantiles.json", length_quantiles(options.data_root)),
        ("profile_fit.json", profile_fits(options.data_root)),
    ):
        path = options.output / name
        path.write_text(_compact_json(content), encoding="utf-8")
        print(f"{path}: {path.stat().st_size} bytes")


def length_quantiles(root: Path) -> dict[str, Any]:
    """The content of length_quantiles.json."""
    input_levels = np.sort([*np.linspace(0, 1, NUM_INPUT_LEVELS), *TAIL_LEVELS])
    target_levels = np.sort([*np.linspace(0, 1, NUM_TARGET_LEVELS), 0.99, 0.995])
    tokenizers = {}
    for tokenizer in ("t5", "cl100k"):
        table = load_multitask_lengths(root, max_rows_per_task=MAX_ROWS_PER_TASK, seed=SEED, tokenizer=tokenizer)
        tokenizers[tokenizer] = {
            "input_quantiles": _rounded(np.quantile(table.input_tokens, input_levels)),
            "target_quantiles": [_rounded(np.quantile(targets, target_levels)) for targets in _targets_by_input(table)],
        }
    return {
        "description": LENGTHS_DESCRIPTION,
        "input_levels": _rounded(input_levels),
        "target_levels": _rounded(target_levels),
        "tokenizers": tokenizers,
    }


def profile_fits(root: Path) -> dict[str, Any]:
    """The content of profile_fit.json."""
    profiles = [load_profile(root, name, hole="infeasible") for name in PROFILE_NAMES]
    sizes = {size for p in profiles for tables in p.tables.values() for size in tables.decoder.axes[-1].tolist()}
    return {
        "description": PROFILE_DESCRIPTION,
        "micro_batch_sizes": [int(size) for size in sorted(sizes)],
        "profiles": {profile.name: _profile_fit(profile) for profile in profiles},
    }


def table_fit(profile: LayerProfile, part: str, grid: GridTable) -> dict[str, Any]:
    """Formulas, their errors and the memory capacity of one table of a profile without filled holes."""
    points, feasible = measured_points(grid)
    kind = formula_kind(profile.architecture, part)
    terms = layer_terms(kind, points)
    result: dict[str, Any] = {"capacity": _significant(fit_capacity(points))}
    for column, values in grid.columns.items():
        kept = np.ones(len(points), dtype=np.bool_)
        if column == "peak_mb":
            kept = rising_peaks(values, grid.axes[-1], feasible)
        formula = fit(kind, column, terms[kept], values[feasible][kept])
        result[column] = {
            "planes": [_significant(plane) for plane in formula.coefficients],
            "median_error": round(formula.median_error, 4),
            "p95_error": round(formula.p95_error, 4),
            "share_fitted": round(float(kept.mean()), 3),
        }
    return result


def _profile_fit(profile: LayerProfile) -> dict[str, Any]:
    entries = []
    for (tp, recompute), tables in tqdm(sorted(profile.tables.items()), desc=f"fitting {profile.name}"):
        parts = {"encoder": tables.encoder, "decoder": tables.decoder, "head": tables.head}
        entries.append(
            {
                "tp": tp,
                "recompute": recompute,
                "lengths": [int(length) for length in tables.decoder.axes[0]],
                "params_mb": {
                    part: round(size_mb, 2)
                    for (key_tp, key_recompute, part), size_mb in profile.params_mb.items()
                    if (key_tp, key_recompute) == (tp, recompute)
                },
                "tables": {part: table_fit(profile, part, grid) for part, grid in parts.items() if grid is not None},
            }
        )
    errors = [
        column["median_error"]
        for entry in entries
        for table in entry["tables"].values()
        for column in table.values()
        if isinstance(column, dict)
    ]
    return {
        "architecture": profile.architecture,
        "median_error": round(float(np.median(errors)), 4),
        "entries": entries,
    }


def _targets_by_input(table: LengthTable) -> list[NDArray[np.int64]]:
    """Target lengths of the samples in each of NUM_BUCKETS equally filled ranges of input length."""
    # Ties of equal input length are broken at random: rows of the file are grouped by task.
    order = np.lexsort((np.random.default_rng(SEED).random(len(table)), table.input_tokens))
    return [table.target_tokens[rows] for rows in np.array_split(order, NUM_BUCKETS)]


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [int(v) if float(v).is_integer() else round(float(v), 6) for v in values]


def _significant(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _compact_json(content: dict[str, Any]) -> str:
    """JSON with short lists on one line, so that a changed table gives a readable diff."""
    lines = json.dumps(content, indent=1).split("\n")
    text, depth = [], 0
    for line in lines:
        stripped = line.strip()
        text.append(stripped if depth else line)
        opens, closes = stripped.endswith("["), stripped.rstrip(",") == "]"
        depth += opens - closes
        text.append("" if depth else "\n")
    return "".join(text)


if __name__ == "__main__":
    main()
