"""Runs of the public DynaPipe planner on fixed inputs, as recorded in ``dynapipe_reference.json`` of data.root."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from experiments.dynapipe._setup import cost_model
from llmsys import _C
from llmsys.dynapipe.config import Parallelism, PlannerConfig
from llmsys.dynapipe.costs import CostModel
from llmsys.dynapipe.data import find_data_file
from llmsys.dynapipe.workload import Samples

REFERENCE_FILE = "dynapipe_reference.json"
# Suffixes of runs whose search was restricted; all others searched as the planner does by default.
_RESTRICTED = ("_notsp", "_1f1b", "_noperm", "_wfc")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceCase:
    """One input, with what the public planner made of it: medians over its unrestricted runs."""

    name: str
    model: str
    samples: Samples
    parallelism: Parallelism
    config: PlannerConfig
    iteration_ms: float
    cpu_s: float | None
    peak_mb: float
    num_micro_batches: int
    replicas: tuple[Mapping[str, Any], ...]

    def costs(self, data_root: Path | None, *, count_backward_extra: bool) -> CostModel:
        """The reference's cost rules: a point next to an unmeasured one is infeasible."""
        return cost_model(
            self.model, self.parallelism, data_root, hole="infeasible", count_backward_extra=count_backward_extra
        )

    def replayed_ms(self, costs: CostModel) -> float:
        """The slowest replica of the recorded plan (one of the runs), run with our costs in its recorded order."""
        return max(_replay_ms(replica, costs) for replica in self.replicas)


def load_cases(data_root: Path) -> list[ReferenceCase]:
    """All cases of the file; DataNotFoundError, naming data.root, when it is not there."""
    content = json.loads(find_data_file(data_root, REFERENCE_FILE).read_text(encoding="utf-8"))
    return [_case(entry) for entry in content["cases"]]


def _case(entry: Mapping[str, Any]) -> ReferenceCase:
    case = entry["case"]
    runs = [run for run in entry["runs"] if not any(part in run["variant"] for part in _RESTRICTED)]
    cpu_s = [run["cpu_total_s"] for run in runs if run["cpu_total_s"] is not None]
    lengths = np.array(case["lens"], dtype=np.int64)
    if case["enc_layers"] and case["dec_layers"]:
        samples = Samples.encoder_decoder(lengths[:, 0], lengths[:, 1])
    else:
        samples = Samples(encoder_len=np.zeros_like(lengths), decoder_len=lengths)
    return ReferenceCase(
        name=entry["name"],
        model=case["profile"],
        samples=samples,
        parallelism=Parallelism(data=case["dp"], pipeline=case["pp"], tensor=case["tp"], zero_stage=case["zero"]),
        config=PlannerConfig(memory_limit_mb=float(case["mem_mb"]), length_multiple=case["round"]),
        iteration_ms=median(run["iteration_ms"] for run in runs),
        cpu_s=median(cpu_s) if cpu_s else None,
        peak_mb=median(max(run["peak_memory_mb"]) for run in runs),
        num_micro_batches=sum(runs[0]["micro_batches"]),
        replicas=tuple(entry["plan"]["replicas"]),
    )


def _replay_ms(replica: Mapping[str, Any], costs: CostModel) -> float:
    """Shapes are (samples, encoder, decoder), a GPT's length in the encoder's place; backward stages count on."""
    shapes = np.array(replica["shapes"], dtype=np.int64)[replica["micro_batch_order"]]
    if not costs.encoder_decoder:
        shapes = shapes[:, [0, 2, 1]]
    num_stages = costs.parallelism.num_stages
    orders = [
        np.array(
            [
                (micro_batch, stage, 0) if kind == "ForwardPass" else (micro_batch, 2 * num_stages - 1 - stage, 1)
                for kind, micro_batch, stage in instructions
                if kind in ("ForwardPass", "BackwardPass")
            ],
            dtype=np.int32,
        )
        for instructions in replica["instructions"]
    ]
    columns = costs.micro_batch_costs(shapes, replica["recompute"]).columns()
    return float(_C.replay(columns, costs.parallelism.pipeline, orders)["makespan_ms"])
