"""What DynaPipe's figures share: the paper's models, cluster, costs, workload and parallelism."""

from __future__ import annotations

import dataclasses
import difflib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from llmsys.core.costs import Hole
from llmsys.core.errors import ConfigError, InputError
from llmsys.core.specs import NODES, Architecture, ClusterSpec, LinkSpec, ModelSpec
from llmsys.dynapipe.config import Parallelism, PlannerConfig
from llmsys.dynapipe.costs import CostModel
from llmsys.dynapipe.plan import Plan
from llmsys.dynapipe.planner import plan_iteration
from llmsys.dynapipe.profile import LayerProfile, open_profile
from llmsys.dynapipe.workload import LengthTable, Samples, global_batches, open_lengths

DEVICES_PER_NODE = 8
MEMORY_LIMIT_MB = 36_000.0
"""What DynaPipe may use of an A100-40GB in the artifact."""

# A p4d node has four 100 Gbps adapters for eight devices: one pair of devices gets one adapter.
_INTER_LINK = LinkSpec(name="one 100G adapter", bandwidth_gbps=100.0)
_TENSOR_DEGREES = (1, 2, 4, 8)  # those of the layer profiles
_MAX_ROWS_PER_TASK = 2_000  # a few tasks would be most of the samples otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperModel:
    """A model of the paper with the layer profile that fits it and the devices it was trained on."""

    spec: ModelSpec
    profile_name: str
    num_devices: int


def _gpt(name: str, num_layers: int, num_devices: int) -> PaperModel:
    spec = ModelSpec(
        name=name,
        architecture="decoder_only",
        hidden=4096,
        num_heads=32,
        kv_channels=128,
        ffn_hidden=16384,
        num_encoder_layers=0,
        num_decoder_layers=num_layers,
        vocab_size=50_304,
    )
    return PaperModel(spec=spec, profile_name="gpt_6.7b", num_devices=num_devices)


def _t5(name: str, num_layers: int, num_devices: int) -> PaperModel:
    """``num_layers`` each of encoder and decoder."""
    spec = ModelSpec(
        name=name,
        architecture="encoder_decoder",
        hidden=1024,
        num_heads=128,
        kv_channels=128,
        ffn_hidden=65536,
        num_encoder_layers=num_layers,
        num_decoder_layers=num_layers,
        vocab_size=32_128,
    )
    return PaperModel(spec=spec, profile_name="t5_11b", num_devices=num_devices)


# The paper's GPTs for 16 and 32 devices have wider layers, which no public profile covers.
MODELS: dict[str, PaperModel] = {
    "gpt_3.35b": _gpt("GPT 3.35B", 16, 4),
    "gpt_6.7b": _gpt("GPT 6.7B", 32, 8),
    "t5_5.6b": _t5("T5 5.6B", 12, 4),
    "t5_11b": _t5("T5 11B", 24, 8),
    "t5_22b": _t5("T5 22B", 48, 16),
    "t5_45b": _t5("T5 45B", 96, 32),
}


def paper_model(name: str) -> PaperModel:
    """The model called ``name`` in MODELS; ConfigError with the nearest name for any other."""
    found = MODELS.get(name)
    if found is None:
        near = difflib.get_close_matches(name, MODELS, n=1)
        raise ConfigError(
            f"there is no model {name!r}",
            expected="one of " + ", ".join(MODELS),
            found=repr(name),
            fix=f"did you mean {near[0]!r}?" if near else "choose one of these",
        )
    return found


def p4d_cluster(num_devices: int) -> ClusterSpec:
    """The paper's machines: nodes of 8 A100-40GB, 4800 Gbps inside, 100 Gbps for a pair between nodes, latency 0.

    Fewer than 8 devices are part of one node.
    """
    per_node = min(num_devices, DEVICES_PER_NODE)
    node = dataclasses.replace(NODES["p4d"], devices_per_node=per_node, inter_link=_INTER_LINK)
    return node.cluster(-(-num_devices // per_node))


@cache
def profile(data_root: Path | None, name: str, hole: Hole = "extrapolate") -> LayerProfile:
    """The layer profile ``name``: the authors' in ``data_root``, else the shipped fit to it. Read once."""
    return open_profile(data_root, name, hole=hole)


def cost_model(
    model: str,
    parallelism: Parallelism,
    data_root: Path | None,
    *,
    hole: Hole = "extrapolate",
    count_backward_extra: bool = True,
) -> CostModel:
    """Costs of the paper's ``model`` on just the p4d devices that ``parallelism`` takes."""
    chosen = paper_model(model)
    return CostModel(
        profile=profile(data_root, chosen.profile_name, hole),
        model=chosen.spec,
        cluster=p4d_cluster(parallelism.num_devices),
        parallelism=parallelism,
        count_backward_extra=count_backward_extra,
    )


def simulated_device(costs: CostModel) -> str:
    """What a simulated row holds for: devices, and where their costs come from."""
    origin = costs.profile.origin.replace(f"{costs.profile.device} ", "").replace(" (", ", ").rstrip(")")
    return f"{costs.parallelism.num_devices} x {costs.profile.device} ({origin})"


@cache
def lengths(data_root: Path | None) -> LengthTable:
    """The workload's length table, at most 2,000 rows a task; one table for all seeds. Read once."""
    return open_lengths(data_root, max_rows_per_task=_MAX_ROWS_PER_TASK)


def batches(
    data_root: Path | None, architecture: Architecture, tokens: int, max_len: int, num: int, seed: int
) -> list[Samples]:
    """``num`` global batches of at most ``tokens`` real tokens, samples cut to ``max_len``."""
    return global_batches(
        lengths(data_root),
        architecture=architecture,
        tokens_per_batch=tokens,
        max_len=max_len,
        num_batches=num,
        seed=seed,
    )


def fixed_size_batch(
    data_root: Path | None, architecture: Architecture, num_samples: int, max_len: int, seed: int
) -> Samples:
    """``num_samples`` distinct random samples, cut to ``max_len``. InputError when the workload has fewer."""
    table = lengths(data_root)
    if num_samples > len(table):
        raise InputError(
            "the workload has too few samples",
            expected=f"at least {num_samples} samples",
            found=f"{len(table)} samples",
            fix="lower settings.num_samples" + ("" if data_root else " or set data.root to the real files"),
        )
    chosen = np.random.default_rng(seed).permutation(len(table))[:num_samples]
    return Samples.of(architecture, table.input_tokens[chosen], table.target_tokens[chosen]).truncate(max_len)


# From the artifact's best configurations, where we know them: (model, longest sequence or None for any other).
_DYNAPIPE_BEST: dict[tuple[str, int | None], Parallelism] = {
    ("gpt_6.7b", None): Parallelism(data=2, pipeline=4, tensor=1, zero_stage=1),
    ("gpt_6.7b", 8192): Parallelism(data=1, pipeline=2, tensor=4, zero_stage=1),
    ("t5_5.6b", None): Parallelism(tensor=4, zero_stage=1),
    ("t5_11b", None): Parallelism(tensor=8, zero_stage=1),
    ("t5_22b", None): Parallelism(pipeline=2, tensor=8, zero_stage=1),
    ("t5_45b", None): Parallelism(pipeline=4, tensor=8, zero_stage=1),
}


def paper_parallelism(model: str, max_len: int) -> Parallelism | None:
    """How the artifact's best configuration splits ``model`` for DynaPipe; None where it is not known to us."""
    return _DYNAPIPE_BEST.get((model, max_len)) or _DYNAPIPE_BEST.get((model, None))


def parallelisms(
    num_devices: int,
    model: str,
    devices_per_node: int = DEVICES_PER_NODE,
    *,
    tensor_degrees: Sequence[int] = _TENSOR_DEGREES,
    zero_stage: int = 1,
) -> tuple[Parallelism, ...]:
    """All ways to split ``num_devices``: tensor inside a node, pipeline up to the number of layers, the rest data."""
    num_layers = paper_model(model).spec.num_layers
    return tuple(
        Parallelism(data=rest // pipeline, pipeline=pipeline, tensor=tensor, zero_stage=zero_stage)
        for tensor in tensor_degrees
        if num_devices % tensor == 0 and tensor <= devices_per_node
        for rest in (num_devices // tensor,)
        for pipeline in range(1, min(rest, num_layers) + 1)
        if rest % pipeline == 0
    )


def timed_plans(
    samples: Samples, costs: CostModel, config: PlannerConfig, num_repeats: int
) -> tuple[list[Plan], list[float]]:
    """The plans of ``num_repeats`` runs of the whole planner, and the CPU seconds of each (one thread).

    Whole means from lengths to checked instruction lists: order, partition, schedule search, communication, checks.
    One run before the clock starts prepares the costs, which a training run does once, and warms the caches.
    """
    plan_iteration(samples, costs, config)
    plans, cpu_s = [], []
    for _ in range(num_repeats):
        start_s = time.process_time()
        plans.append(plan_iteration(samples, costs, config))
        cpu_s.append(time.process_time() - start_s)
    return plans, cpu_s
