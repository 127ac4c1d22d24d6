"""Make the tables of Lancet's cost model that ship with llmsys from the real files.

``python -m experiments.make_lancet_tables DATA_ROOT`` writes ``device_fit.json``, ``all_to_all_fit.json`` and
``load_quantiles.json`` into llmsys/lancet/data (or ``--output``). Equal input gives equal files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import llmsys.lancet.data
from llmsys.core.specs import DEVICES

FloatArray = NDArray[np.float64]

SYSTEMS = {"A100-80GB": "a100_sxm", "H100-SXM": "h100_sxm"}
VIDUR_DEVICES = {"A100-80GB": "a100", "H100-SXM": "h100"}
ITEM_BYTES = 2  # all of the sources measured 16-bit numbers
MIN_WIDTH = 256  # of a matrix in the fit: narrower ones occur in no model here
NCCL_KNOTS = (1 << 10, 1 << 16, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28, 1 << 29)
DEEPEP_HIDDEN, DEEPEP_TOP_K = 7168, 8
# Bytes of a value on the wire. The source does not say: the two directions' times inside a node are as 1 to 2, and
# DeepEP's own benchmark sends fp8 and returns bf16.
DEEPEP_ITEM_BYTES = {"dispatch": 1, "combine": 2}
DEEPEP_MAX_TOKENS = 16_384
LOAD_LEVELS = 65

DESCRIPTIONS = {
    "device_fit.json": (
        "Time of one kernel in ms, fitted by experiments/make_lancet_tables.py with nonnegative coefficients and "
        "least relative squares. matmul: launch_ms + compute * flops / peak + read * bytes of both factors / bandwidth "
        "+ write * bytes of the product / bandwidth, to 16-bit GEMM latencies of ai-dynamo/aiconfigurator (Apache-2.0) "
        "with n and k of at least 256; compute is at least the inverse of the best measured share of the peak. add, "
        "activation, norm: launch_ms + traffic * bytes / bandwidth, to microsoft/vidur's layer profile (MIT). Errors "
        "are relative."
    ),
    "all_to_all_fit.json": (
        "Time of one all-to-all in ms by the bytes of one rank's buffer, fitted by experiments/make_lancet_tables.py. "
        "nccl: values at sizes_bytes, linear between, inside one node, to NCCL latencies of ai-dynamo/aiconfigurator "
        "(Apache-2.0). deepep: latency_ms + bytes / bandwidth on H100 nodes of 8, to the same project's DeepEP "
        "measurements (hidden 7168, top-8 of 256 experts, the fastest number of SMs, notification included, up to "
        "16384 tokens); bytes count 8 copies of a token at 1 byte a value for dispatch and 2 for combine, while DeepEP "
        "itself sends a token once to each node."
    ),
    "load_quantiles.json": (
        "Quantiles of expert load over its mean at equally spaced levels, averaged over corpora and layers, made by "
        "experiments/make_lancet_tables.py from evaluation-time routing that allenai/OLMoE published (Apache-2.0)."
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data_root", type=Path, help="directory of the real files (the setting data.root)")
    parser.add_argument("--output", type=Path, default=Path(llmsys.lancet.data.__file__).parent)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    makers = {
        "device_fit.json": device_fits,
        "all_to_all_fit.json": all_to_all_fits,
        "load_quantiles.json": load_quantiles,
    }
    for name, make in makers.items():
        path = options.output / name
        content = {"description": DESCRIPTIONS[name], **make(options.data_root)}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"{path}: {path.stat().st_size} bytes")


def device_fits(root: Path) -> dict[str, Any]:
    """The content of device_fit.json: ``devices`` by name."""
    gemm = pd.read_parquet(root / "gpu_gemm_perf.parquet")
    layers = pd.read_parquet(root / "vidur_mlp_profile.parquet")
    fits: dict[str, Any] = {}
    for name, system in SYSTEMS.items():
        bandwidth = DEVICES[name].memory_bandwidth_gb_per_s * 1e6  # bytes in one ms
        mine = layers[layers["device"] == VIDUR_DEVICES[name]]
        fits[name] = {"matmul": _matmul_fit(gemm[gemm["system"] == system], name)} | {
            op: _memory_fit(mine[column].to_numpy(dtype=float), values * ITEM_BYTES / bandwidth)
            for op, (column, values) in _moved_values(mine).items()
        }
    return {"devices": fits}


def _matmul_fit(rows: pd.DataFrame, device: str) -> dict[str, float]:
    spec = DEVICES[device]
    rows = rows.groupby(["m", "n", "k"])["latency_ms"].median().reset_index()
    rows = rows[(rows["n"] >= MIN_WIDTH) & (rows["k"] >= MIN_WIDTH)]
    m, n, k, ms = (rows[column].to_numpy(dtype=float) for column in ("m", "n", "k", "latency_ms"))
    peak, bandwidth = spec.peak_16bit_tflops * 1e9, spec.memory_bandwidth_gb_per_s * 1e6  # in one ms
    terms = np.stack(
        [
            np.ones_like(m),
            2 * m * n * k / peak,
            ITEM_BYTES * (m * k + k * n) / bandwidth,
            ITEM_BYTES * m * n / bandwidth,
        ],
        axis=1,
    )
    least_compute = float(np.min(ms / terms[:, 1]))  # of the launch as well, so a little too much
    rest = nonnegative_fit(terms / ms[:, None], 1 - least_compute * terms[:, 1] / ms)
    rest[1] += least_compute
    launch_ms, compute, read, write = (_significant(value) for value in rest)
    return {"launch_ms": launch_ms, "compute": compute, "read": read, "write": write, **_errors(terms @ rest / ms)}


def _moved_values(rows: pd.DataFrame) -> dict[str, tuple[str, FloatArray]]:
    """Of each kind of op its column and the values it reads and writes."""
    tokens, hidden = rows["num_tokens"].to_numpy(dtype=float), rows["n_embd"].to_numpy(dtype=float)
    inner = rows["n_expanded_embd"].to_numpy(dtype=float) / rows["num_tensor_parallel_workers"].to_numpy(dtype=float)
    gated = rows["use_gated_mlp"].to_numpy(dtype=bool)
    return {
        "add": ("add_ms", 3 * tokens * hidden),
        "activation": ("mlp_act_ms", np.where(gated, 3, 2) * tokens * inner),
        "norm": ("input_layernorm_ms", 2 * tokens * hidden),
    }


def _memory_fit(ms: FloatArray, least_ms: FloatArray) -> dict[str, float]:
    kept = np.isfinite(ms) & (ms > 0)
    ms, least_ms = ms[kept], least_ms[kept]
    terms = np.stack([np.ones_like(ms), least_ms], axis=1)
    # Small tensors are found in the caches; in a training step they rarely are, so no traffic beats the memory.
    rest = nonnegative_fit(terms / ms[:, None], 1 - terms[:, 1] / ms)
    rest[1] += 1.0
    return {
        "launch_ms": _significant(rest[0]),
        "traffic": _significant(rest[1]),
        **_errors(terms @ rest / ms),
    }


def all_to_all_fits(root: Path) -> dict[str, Any]:
    """The content of all_to_all_fit.json."""
    nccl = pd.read_parquet(root / "gpu_nccl_perf.parquet")
    nccl = nccl[(nccl["op_name"] == "alltoall") & (nccl["nccl_dtype"] == "half")]
    deepep = pd.read_parquet(root / "gpu_deepep_normal_multinode.parquet")
    deepep = deepep[(deepep["system"] == "h100_sxm") & (deepep["num_token"] <= DEEPEP_MAX_TOKENS)]
    return {
        "sizes_bytes": list(NCCL_KNOTS),
        "nccl": {
            name: {
                str(gpus): _nccl_fit(nccl[(nccl["system"] == system) & (nccl["num_gpus"] == gpus)])
                for gpus in (2, 4, 8)
            }
            for name, system in SYSTEMS.items()
        },
        "deepep": {
            direction: {
                str(nodes): _deepep_fit(deepep[deepep["node_num"] == nodes], direction)
                for nodes in sorted(set(deepep["node_num"]))
            }
            for direction in ("dispatch", "combine")
        },
    }


def _nccl_fit(rows: pd.DataFrame) -> dict[str, Any]:
    rows = rows.groupby("message_size")["latency_ms"].median().reset_index()
    sizes = rows["message_size"].to_numpy(dtype=float) * ITEM_BYTES
    ms = rows["latency_ms"].to_numpy(dtype=float)
    kept = sizes >= NCCL_KNOTS[0]
    sizes, ms = sizes[kept], ms[kept]
    hats = np.stack([np.interp(sizes, NCCL_KNOTS, row) for row in np.eye(len(NCCL_KNOTS))], axis=1)
    # Increments from knot to knot are fitted, so that the table never falls.
    steps = hats @ np.tril(np.ones((len(NCCL_KNOTS), len(NCCL_KNOTS))))
    increments = nonnegative_fit(steps / ms[:, None], np.ones_like(ms))
    return {"ms": [_significant(value) for value in np.cumsum(increments)], **_errors(steps @ increments / ms)}


def _deepep_fit(rows: pd.DataFrame, direction: str) -> dict[str, float]:
    total = rows[f"{direction}_transmit_us"] + rows[f"{direction}_notify_us"]
    best = total.groupby(rows["num_token"]).min()
    sizes = best.index.to_numpy(dtype=float) * DEEPEP_TOP_K * DEEPEP_HIDDEN * DEEPEP_ITEM_BYTES[direction]
    ms = best.to_numpy(dtype=float) / 1e3
    terms = np.stack([np.ones_like(ms), sizes / 1e6], axis=1)
    latency_ms, ms_per_mb = nonnegative_fit(terms / ms[:, None], np.ones_like(ms))
    errors = _errors(terms @ np.array([latency_ms, ms_per_mb]) / ms)
    return {"latency_ms": _significant(latency_ms), "bandwidth_gb_per_s": _significant(1 / ms_per_mb), **errors}


def load_quantiles(root: Path) -> dict[str, Any]:
    """The content of load_quantiles.json: ``loads`` by "model, ranks"."""
    rows = pd.read_parquet(root / "moe_expert_load_dense.parquet")
    levels = (np.arange(LOAD_LEVELS) + 0.5) / LOAD_LEVELS
    loads = {}
    for (model, ranks), mine in rows.groupby(["model", "ranks"]):
        curves = []
        for _, routing in mine.groupby(["corpus", "layer_slot"]):
            load = np.sort(routing["selections"].to_numpy(dtype=float))
            curves.append(np.interp(levels, (np.arange(len(load)) + 0.5) / len(load), load / load.mean()))
        mean = np.mean(curves, axis=0)
        loads[f"{model} {ranks}"] = [_significant(value, 4) for value in mean / mean.mean()]
    return {"loads": loads}


def nonnegative_fit(terms: FloatArray, target: FloatArray) -> FloatArray:
    """Least squares with coefficients of at least 0; exhaustive, so for a few terms only.

    ``terms``: shape (n, t); ``target``: shape (n,). The best of the solutions on subsets of the terms that are not
    negative is the solution.
    """
    num_terms = terms.shape[1]
    best, least = np.zeros(num_terms), float(np.sum(target**2))
    gram, right = terms.T @ terms, terms.T @ target
    for size in range(1, num_terms + 1):
        for chosen in map(list, combinations(range(num_terms), size)):
            solution = np.linalg.lstsq(gram[np.ix_(chosen, chosen)], right[chosen], rcond=None)[0]
            if (solution < 0).any():
                continue
            residual = float(np.sum((terms[:, chosen] @ solution - target) ** 2))
            if residual < least:
                best, least = np.zeros(num_terms), residual
                best[chosen] = solution
    return best


def _errors(ratios: FloatArray) -> dict[str, float]:
    errors = np.abs(ratios - 1)
    return {
        "median_error": round(float(np.median(errors)), 4),
        "p95_error": round(float(np.quantile(errors, 0.95)), 4),
    }


def _significant(value: float, digits: int = 5) -> float:
    return float(f"{value:.{digits}g}")


if __name__ == "__main__":
    main()
