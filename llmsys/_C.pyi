from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

class BuildInfo(TypedDict):
    compiler: str
    compiler_version: str
    cxx_standard: int
    cuda_toolchain: bool
    sanitize: str

class PartitionResult(TypedDict):
    feasible: bool
    ends: NDArray[np.int64]
    times_ms: NDArray[np.float64]
    objective_ms: float
    t_max_ms: float
    num_evaluations: int

class PartitionResults(PartitionResult):
    num_runs: int
    others: list[PartitionResult]

class SearchResult(TypedDict):
    feasible: bool
    kind: str
    permutation: NDArray[np.int32]
    orders: list[NDArray[np.int32]]
    makespan_ms: float
    peak_mb: NDArray[np.float64]
    overflow_mb: float
    num_evaluations: int

class ReplayResult(TypedDict):
    complete: bool
    makespan_ms: float
    peak_mb: NDArray[np.float64]
    start_ms: NDArray[np.float64]
    send_start_ms: NDArray[np.float64]

def build_info() -> BuildInfo:
    """How this module was built: compiler, C++ standard, whether a CUDA toolchain was found, sanitizers."""

class CostTable:
    """Costs of one layer on a grid of (lengths, micro-batch size): columns forward, backward, stored, peak."""

    def __init__(self, axes: Sequence[NDArray[np.float64]], columns: Sequence[NDArray[np.float64]]) -> None: ...

def partition_samples(
    encoder: CostTable | None,
    decoder: CostTable,
    head: CostTable,
    devices: NDArray[np.float64],
    encoder_len: NDArray[np.int64],
    decoder_len: NDArray[np.int64],
    pipeline_factor: float,
    num_replicas: float,
    max_size: int,
    extra_factors: Sequence[float] = (),
    extra_cutoff_ms: float = ...,
) -> PartitionResults:
    """Split an ordered sequence of samples into micro-batches; exact for DynaPipe's objective.

    ``others`` are the best when the longest micro-batch counts more by each of ``extra_factors``; none
    when the best objective is beyond ``extra_cutoff_ms``.

    ``devices`` has rows (encoder layers, decoder layers, has head, micro-batches in flight, available memory).
    """

def partition_runs(
    offset: NDArray[np.int64],
    times_ms: NDArray[np.float64],
    pipeline_factor: float,
    num_replicas: float,
    extra_factors: Sequence[float] = (),
    extra_cutoff_ms: float = ...,
) -> PartitionResults:
    """The same from given times: ``times_ms[offset[i] + k]`` is that of samples i to i + k, inf if it does not fit."""

def micro_batch_times(
    encoder: CostTable | None,
    decoder: CostTable,
    head: CostTable,
    devices: NDArray[np.float64],
    encoder_len: NDArray[np.int64],
    decoder_len: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Times of micro-batches on their slowest device, infinite where they do not fit."""

def search_schedule(
    columns: Sequence[NDArray[np.float64]],
    num_devices: int,
    kinds: Sequence[str],
    permutations: NDArray[np.int64],
    memory_limit_mb: NDArray[np.float64],
    max_in_flight: int,
    max_moves: int,
    seed: int,
) -> SearchResult:
    """Best schedule kind and micro-batch order found for one replica."""

def replay(
    columns: Sequence[NDArray[np.float64]], num_devices: int, orders: Sequence[NDArray[np.int32]]
) -> ReplayResult:
    """Run device orders, rows (micro-batch, stage, backward), with real durations."""

def open_path(x: NDArray[np.int64], y: NDArray[np.int64], max_kicks: int, seed: int) -> NDArray[np.int32]:
    """Visiting order of a short open L1 path through points."""
