"""What a measured training step is asked to do, and what it finds: for `_measured_run` and `_measured_worker`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NUM_CHOICES = 3
"""How often the rate of the link is chosen for a model: by its computation, then corrected by what was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A GPT-2 with an MoE layer in every second block, two experts a rank, capacity factor 1.25."""

    name: str
    hidden: int = 256
    num_layers: int = 4
    num_heads: int = 4
    vocab_size: int = 2048
    seq_len: int = 128
    batch_size: int = 8
    gate: Literal["switch", "batch_prioritized"] = "switch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """``bench_ms``: at least, for each operator. ``cache_file``: of their times, or empty. ``trace_directory``: for
    Chrome traces of the first round; empty for none.
    """

    models: tuple[Model, ...]
    systems: tuple[str, ...]
    num_repeats: int
    part_counts: tuple[int, ...]
    seed: int
    timeout_s: float
    bench_ms: float = 20.0
    cache_file: str = ""
    trace_directory: str = ""
    port: int = 29500


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One step of one system. ``step_ms``: the slower rank's. ``waited_ms``: in waits for communication, mean of ranks.

    Errors of gradients and loss are against eager execution. ``replay_error``: of the measured times put back through
    the plan. ``num_moved``: weight-gradient ops that were moved under an all-to-all.
    """

    model: str
    system: str
    repeat: int
    step_ms: float
    waited_ms: float
    predicted_ms: float
    predicted_exposed_ms: float
    replay_error: float
    gradient_error: float
    loss_error: float
    num_regions: int
    max_parts: int
    num_moved: int
    planning_s: float
    notes: str
