"""Micro-batch construction: the dynamic program over ordered samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmsys import _C
from llmsys.core.errors import InfeasibleError
from llmsys.dynapipe.config import PlannerConfig, Recompute
from llmsys.dynapipe.costs import CostModel, MicroBatchCosts
from llmsys.dynapipe.profile import PackSums
from llmsys.dynapipe.workload import Samples

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

# Kernels are busy long before a micro-batch has so many tokens; the bound keeps the number of runs in check.
_MAX_VARLEN_TOKENS = 16_384


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PaddedLengths:
    """Lengths of every sample as a micro-batch of its own would pad them, in tokens; shape (n,) each."""

    encoder_len: IntArray
    decoder_len: IntArray

    @classmethod
    def of(cls, samples: Samples, *, encoder_decoder: bool, config: PlannerConfig) -> PaddedLengths:
        extra = config.decoder_extra_tokens if encoder_decoder else 0
        return cls(
            encoder_len=round_up(samples.encoder_len, config.length_multiple),
            decoder_len=round_up(samples.decoder_len + extra, config.length_multiple),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Partition:
    """Micro-batches as the dynamic program made them.

    ``groups``: sample indices of each. ``times_ms``: forward plus backward time of each on its slowest device.
    ``objective_ms``: (stages - 1) / chunks * longest + sum / replicas. ``recompute``: assumed by the costs.
    """

    groups: tuple[tuple[int, ...], ...]
    times_ms: tuple[float, ...]
    objective_ms: float
    recompute: Recompute
    in_flight: int


def round_up(lengths: IntArray, multiple: int) -> IntArray:
    return -(-lengths // multiple) * multiple


def partition(
    padded: PaddedLengths,
    order: IntArray,
    cost_model: CostModel,
    config: PlannerConfig,
    recompute: Recompute,
    in_flight: int,
) -> Partition | None:
    """The best cut of ``order`` into micro-batches, exact for the objective; None when memory allows none.

    ``in_flight``: how many micro-batches like it must fit a device at once. With as many as there are pipeline devices
    1F1B fits; with 1 it is up to the schedule how many it can hold.
    """
    made = partitions(padded, order, cost_model, config, recompute, in_flight, (), np.inf)
    return made[0] if made else None


def partitions(
    padded: PaddedLengths,
    order: IntArray,
    cost_model: CostModel,
    config: PlannerConfig,
    recompute: Recompute,
    in_flight: int,
    extra_factors: Sequence[float],
    extra_cutoff_ms: float,
) -> list[Partition]:
    """``partition``'s best cut, then the best when the longest micro-batch counts more by each of ``extra_factors``.

    The objective takes replicas to be balanced perfectly. With few micro-batches a replica they cannot be, and cuts
    with shorter ones balance better. They are left out when even the best objective is above ``extra_cutoff_ms``.
    Empty when memory allows none.
    """
    parallelism = cost_model.parallelism
    encoder, decoder, head = cost_model.native_tables(recompute)
    limits = config.device_limits_mb(parallelism.pipeline)
    result = _C.partition_samples(
        encoder,
        decoder,
        head,
        cost_model.device_loads(recompute, limits, in_flight),
        np.ascontiguousarray(padded.encoder_len[order]),
        np.ascontiguousarray(padded.decoder_len[order]),
        (parallelism.pipeline - 1) / parallelism.num_chunks,
        float(parallelism.data),
        int(cost_model.layer_tables(recompute).decoder.axes[-1][-1]),
        list(extra_factors),
        extra_cutoff_ms,
    )
    return _to_partitions(result, order, recompute, in_flight)


def _to_partitions(
    results: _C.PartitionResults, order: IntArray, recompute: Recompute, in_flight: int
) -> list[Partition]:
    made = []
    in_order = order.tolist()
    found: list[_C.PartitionResult] = [results, *results["others"]]
    for result in found:
        if not result["feasible"]:
            continue
        ends = result["ends"].tolist()
        made.append(
            Partition(
                groups=tuple(tuple(in_order[begin:end]) for begin, end in zip([0, *ends[:-1]], ends, strict=True)),
                times_ms=tuple(result["times_ms"].tolist()),
                objective_ms=result["objective_ms"],
                recompute=recompute,
                in_flight=in_flight,
            )
        )
    return made


def varlen_partitions(
    samples: Samples,
    order: IntArray,
    cost_model: CostModel,
    config: PlannerConfig,
    recompute: Recompute,
    in_flights: Sequence[int],
    extra_factors: Sequence[float],
    extra_cutoff_ms: float,
) -> list[Partition]:
    """``partitions`` where micro-batches concatenate their samples (variable-length attention, no padding).

    Beyond the paper: a run's cost then follows from sums over its samples. For each of ``in_flights`` in turn.
    """
    parallelism = cost_model.parallelism
    extra = config.decoder_extra_tokens if cost_model.encoder_decoder else 0
    encoder_len, decoder_len = samples.encoder_len[order], samples.decoder_len[order] + extra
    limits = np.array(config.device_limits_mb(parallelism.pipeline)) - cost_model.state_mb(recompute)
    begins, ends = _runs_within(encoder_len + decoder_len, _MAX_VARLEN_TOKENS)
    costs = cost_model.varlen_costs_of_sums(
        PackSums.of_runs(encoder_len, np.zeros_like(encoder_len), begins, ends),
        PackSums.of_runs(decoder_len, encoder_len, begins, ends),
        recompute,
    )
    offset = np.searchsorted(begins, np.arange(len(order) + 1)).astype(np.int64)
    made: list[Partition] = []
    for in_flight in in_flights:
        result = _C.partition_runs(
            offset,
            _run_times(costs, cost_model, limits, in_flight),
            (parallelism.pipeline - 1) / parallelism.num_chunks,
            float(parallelism.data),
            list(extra_factors),
            extra_cutoff_ms,
        )
        made += _to_partitions(result, order, recompute, in_flight)
    return made


def _run_times(costs: MicroBatchCosts, cost_model: CostModel, limits: FloatArray, in_flight: int) -> FloatArray:
    """Time of each run on its slowest device, infinite where some device has no room for it."""
    times = np.zeros(len(costs.forward_ms))
    fits = np.ones(len(times), dtype=np.bool_)
    for device in range(cost_model.parallelism.pipeline):
        stages = cost_model.device_stages(device)
        stored = costs.stored_mb[:, stages].sum(axis=1)
        # While one chunk runs, the others' activations are stored already.
        peak = (stored[:, None] - costs.stored_mb[:, stages] + costs.forward_peak_mb[:, stages]).max(axis=1)
        fits &= (in_flight * stored <= limits[device]) & ((in_flight - 1) * stored + peak <= limits[device])
        times = np.maximum(times, (costs.forward_ms + costs.backward_ms)[:, stages].sum(axis=1))
    return np.where(fits, times, np.inf)


def _runs_within(tokens: IntArray, max_tokens: int) -> tuple[IntArray, IntArray]:
    """All runs [begin, end) of at most ``max_tokens`` tokens, single samples always; ordered by begin, then end."""
    total = np.concatenate([[0], np.cumsum(tokens)])
    index = np.arange(len(tokens))
    last = np.maximum(np.searchsorted(total, total[:-1] + max_tokens, side="right") - 1, index + 1)
    widths = last - index
    begins = np.repeat(index, widths)
    first = np.repeat(np.cumsum(widths) - widths, widths)
    return begins.astype(np.int64), (begins + 1 + np.arange(len(begins)) - first).astype(np.int64)


def fits_in_flight(
    made: Partition, padded: PaddedLengths, cost_model: CostModel, config: PlannerConfig, in_flight: int
) -> bool:
    """Whether each micro-batch of a partition fits ``in_flight`` times; then nothing is better under that rule."""
    encoder, decoder, head = cost_model.native_tables(made.recompute)
    limits = config.device_limits_mb(cost_model.parallelism.pipeline)
    counts, encoder_len, decoder_len = np.ascontiguousarray(group_shapes(made.groups, padded).T)
    loads = cost_model.device_loads(made.recompute, limits, in_flight)
    times = _C.micro_batch_times(encoder, decoder, head, loads, encoder_len, decoder_len, counts)
    return bool(np.isfinite(times).all())


def group_shapes(groups: tuple[tuple[int, ...], ...], padded: PaddedLengths) -> IntArray:
    """Rows (samples, encoder length, decoder length) of each group, shape (groups, 3)."""
    sizes = np.array([len(group) for group in groups], dtype=np.int64)
    members = np.array([sample for group in groups for sample in group], dtype=np.int64)
    begins = np.cumsum(sizes) - sizes
    longest = (np.maximum.reduceat(lengths[members], begins) for lengths in (padded.encoder_len, padded.decoder_len))
    return np.stack([sizes, *longest], axis=1)


def explain_infeasible(
    samples: Samples, padded: PaddedLengths, cost_model: CostModel, config: PlannerConfig, *, varlen: bool = False
) -> InfeasibleError:
    """Why no partition exists: the longest sample that does not fit by itself, with its length and the limit."""
    parallelism = cost_model.parallelism
    limits = np.array(config.device_limits_mb(parallelism.pipeline))
    fits = np.zeros(len(samples), dtype=np.bool_)
    least_mb = np.inf
    ones = np.ones(len(samples), dtype=np.int64)
    shapes = np.stack([ones, padded.encoder_len, padded.decoder_len], axis=1)
    for recompute in config.recompute:
        state = cost_model.state_mb(recompute)
        costs = _alone(samples, shapes, cost_model, config, recompute, varlen)
        peak = np.zeros((len(samples), parallelism.pipeline))
        for device in range(parallelism.pipeline):
            stages = cost_model.device_stages(device)
            peak[:, device] = state[device] + costs.forward_peak_mb[:, stages].sum(axis=1)
        fits |= costs.feasible & (peak <= limits).all(axis=1)
        least_mb = min(least_mb, float(state.max()))
    if least_mb > limits.min():
        return InfeasibleError(
            "the model itself does not fit",
            expected=f"at most {limits.min():.0f} MB a device",
            found=f"{least_mb:.0f} MB of parameters, gradients and optimizer state with {parallelism.label()}, "
            f"zero_stage={parallelism.zero_stage}",
            fix="raise pipeline, tensor or zero_stage, or memory_limit_mb",
        )
    longest_covered = cost_model.max_lengths
    if fits.all():
        return InfeasibleError(
            "no partition into micro-batches fits",
            expected=f"at most {limits.min():.0f} MB a device",
            found=f"{len(samples)} samples that fit one by one",
            fix="raise memory_limit_mb, or allow more kinds of recompute",
        )
    total = samples.encoder_len + samples.decoder_len
    worst = int(np.where(fits, -1, total).argmax())
    return InfeasibleError(
        f"sample {worst} fits no micro-batch",
        expected=f"at most {limits.min():.0f} MB a device, and lengths the profile covers: encoder up to "
        f"{longest_covered[0]}, decoder up to {longest_covered[1]}",
        found=f"sample {worst}: encoder length {samples.encoder_len[worst]}, decoder length "
        f"{samples.decoder_len[worst]} ({int((~fits).sum())} such samples in all)",
        fix="truncate samples (max_len), raise tensor or memory_limit_mb, or allow recompute 'full'",
    )


def _alone(
    samples: Samples,
    shapes: IntArray,
    cost_model: CostModel,
    config: PlannerConfig,
    recompute: Recompute,
    varlen: bool,
) -> MicroBatchCosts:
    """Costs of each sample as a micro-batch of its own."""
    if not varlen:
        return cost_model.micro_batch_costs(shapes, recompute)
    extra = config.decoder_extra_tokens if cost_model.encoder_decoder else 0
    begins = np.arange(len(samples))
    none = np.zeros_like(samples.encoder_len)
    return cost_model.varlen_costs_of_sums(
        PackSums.of_runs(samples.encoder_len, none, begins, begins + 1),
        PackSums.of_runs(samples.decoder_len + extra, samples.encoder_len, begins, begins + 1),
        recompute,
    )
