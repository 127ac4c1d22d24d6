"""What DynaPipe is compared with: packing, fixed micro-batch sizes, fixed token counts.

Every baseline is a planner: same signature, same plan, same simulator. Systems of today schedule with 1F1B in a fixed
order, whatever the planner's settings allow, so ``static`` ones do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from llmsys.core.errors import ConfigError, InfeasibleError, InputError
from llmsys.dynapipe.config import Attention, PlannerConfig, Recompute, require_choices
from llmsys.dynapipe.costs import CostModel, MicroBatchCosts
from llmsys.dynapipe.microbatch import PaddedLengths
from llmsys.dynapipe.ordering import order_samples
from llmsys.dynapipe.plan import MicroBatch
from llmsys.dynapipe.planner import (
    Scheduled,
    Work,
    no_schedule_error,
    price_padded,
    schedule_parts,
    schedule_work,
)
from llmsys.dynapipe.workload import Samples

IntArray = NDArray[np.int64]


def static(config: PlannerConfig) -> PlannerConfig:
    """Settings of a system with a fixed pipeline schedule."""
    return replace(config, schedules=("1f1b",), reorder="none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Samples packed into rows of ``max_len`` tokens, ``micro_batch_size`` rows a micro-batch.

    ``attention`` "padded": every row is computed at full length, attention across its samples included, as in the
    paper's baseline. "varlen": attention only within samples and no work on unused tokens, as in FlashAttention's
    variable-length kernels, which is what people use today.
    ``max_target_len``: decoder tokens of a row in an encoder-decoder model (default: ``max_len`` and the planner's
    ``decoder_extra_tokens``, so that a row holds any sample truncated to ``max_len``).
    Rows are filled first-fit in the order of arrival. Rows go to replicas in turn.
    """

    max_len: int
    micro_batch_size: int = 1
    max_target_len: int | None = None
    attention: Attention = "padded"

    def __post_init__(self) -> None:
        for name in ("max_len", "micro_batch_size", "max_target_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is out of range", expected="at least 1", found=str(value), fix=f"set {name}")
        require_choices("attention", (self.attention,), Attention)

    @property
    def name(self) -> str:
        return "packing" if self.attention == "padded" else "varlen_packing"

    def schedule(self, samples: Samples, cost_model: CostModel, config: PlannerConfig) -> list[Scheduled]:
        extra = config.decoder_extra_tokens if cost_model.encoder_decoder else 0
        targets = samples.decoder_len + extra
        limits = self.row_lengths(cost_model, extra)
        rows = first_fit(samples.encoder_len, targets, limits)
        data = cost_model.parallelism.data
        # A micro-batch takes as many rows as it may, but no replica stays idle while rows are left.
        size = min(self.micro_batch_size, max(1, len(rows) // data))
        groups = [rows[i : i + size] for i in range(0, len(rows), size)]
        if len(groups) < data:
            raise InfeasibleError(
                "packing leaves a replica without work",
                expected=f"at least {data} rows, one for each replica",
                found=f"{len(rows)} rows of up to {self.max_len} tokens",
                fix="lower parallelism.data or max_len, or raise tokens_per_batch",
            )
        micro_batches = [MicroBatch(rows=tuple(g), encoder_len=limits[0], decoder_len=limits[1]) for g in groups]
        costs = self._costs(micro_batches, samples.encoder_len, targets, cost_model, config)
        return _in_turn(Work(micro_batches=tuple(micro_batches), costs=costs), cost_model, static(config))

    def row_lengths(self, cost_model: CostModel, decoder_extra_tokens: int = 0) -> tuple[int, int]:
        """(encoder, decoder) tokens of a row."""
        if not cost_model.encoder_decoder:
            return 0, self.max_len
        return self.max_len, (self.max_target_len or self.max_len + decoder_extra_tokens)

    def _costs(
        self,
        micro_batches: Sequence[MicroBatch],
        encoder_len: IntArray,
        decoder_len: IntArray,
        cost_model: CostModel,
        config: PlannerConfig,
    ) -> dict[Recompute, MicroBatchCosts]:
        if self.attention == "varlen":
            indices = [np.array(m.samples, dtype=np.int64) for m in micro_batches]
            encoder, decoder = [encoder_len[i] for i in indices], [decoder_len[i] for i in indices]
            return {kind: cost_model.varlen_costs(encoder, decoder, kind) for kind in config.recompute}
        shapes = np.array([m.shape for m in micro_batches], dtype=np.int64)
        return {kind: cost_model.micro_batch_costs(shapes, kind) for kind in config.recompute}


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedSize:
    """Sorted samples, ``micro_batch_size`` at a time, padded to the longest of each micro-batch; replicas in turn."""

    micro_batch_size: int
    name: str = "fixed_size"
    attention: Attention = "padded"

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise ConfigError(
                "micro_batch_size is out of range",
                expected="at least 1",
                found=str(self.micro_batch_size),
                fix="set micro_batch_size",
            )

    def schedule(self, samples: Samples, cost_model: CostModel, config: PlannerConfig) -> list[Scheduled]:
        padded = PaddedLengths.of(samples, encoder_decoder=cost_model.encoder_decoder, config=config)
        order = order_samples(padded.encoder_len, padded.decoder_len, replace(config, order="sort")).tolist()
        size = self.micro_batch_size
        groups = [tuple(order[i : i + size]) for i in range(0, len(order), size)]
        (work,) = price_padded([groups], padded, cost_model, config)
        return _in_turn(work, cost_model, static(config))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBased:
    """Ordered samples cut wherever the micro-batch's tokens, padding included, would pass ``tokens_per_micro_batch``.

    The paper's TB(S) and TB(T), by the ``order`` setting. Balancing and scheduling are DynaPipe's, so a comparison
    shows the partition alone. A sample longer than the limit is a micro-batch of its own.
    """

    tokens_per_micro_batch: int
    name: str = "token_based"
    attention: Attention = "padded"

    def __post_init__(self) -> None:
        if self.tokens_per_micro_batch < 1:
            raise ConfigError(
                "tokens_per_micro_batch is out of range",
                expected="at least 1",
                found=str(self.tokens_per_micro_batch),
                fix="set tokens_per_micro_batch",
            )

    def schedule(self, samples: Samples, cost_model: CostModel, config: PlannerConfig) -> list[Scheduled]:
        padded = PaddedLengths.of(samples, encoder_decoder=cost_model.encoder_decoder, config=config)
        groups = self.groups(padded, order_samples(padded.encoder_len, padded.decoder_len, config))
        (work,) = price_padded([groups], padded, cost_model, config)
        replicas = schedule_work(work, cost_model, config)
        if replicas is None:
            raise no_schedule_error(work, cost_model, config)
        return replicas

    def groups(self, padded: PaddedLengths, order: IntArray) -> list[tuple[int, ...]]:
        """Runs of ``order`` that keep to the limit."""
        groups: list[tuple[int, ...]] = []
        current: list[int] = []
        encoder_len = decoder_len = 0
        for sample in order.tolist():
            longer_encoder = max(encoder_len, int(padded.encoder_len[sample]))
            longer_decoder = max(decoder_len, int(padded.decoder_len[sample]))
            tokens = (len(current) + 1) * (longer_encoder + longer_decoder)
            if current and tokens > self.tokens_per_micro_batch:
                groups.append(tuple(current))
                current = []
                longer_encoder, longer_decoder = int(padded.encoder_len[sample]), int(padded.decoder_len[sample])
            current.append(sample)
            encoder_len, decoder_len = longer_encoder, longer_decoder
        return [*groups, tuple(current)]


def first_fit(encoder_len: IntArray, decoder_len: IntArray, limits: tuple[int, int]) -> list[tuple[int, ...]]:
    """Pack samples into rows: each goes to the first row with room for both of its lengths.

    InputError names a sample that is longer than an empty row.
    """
    return list(_first_fit(tuple(encoder_len.tolist()), tuple(decoder_len.tolist()), limits))


# A grid search packs the same batch for every parallelism and micro-batch size.
@lru_cache(maxsize=64)
def _first_fit(
    encoder_len: tuple[int, ...], decoder_len: tuple[int, ...], limits: tuple[int, int]
) -> tuple[tuple[int, ...], ...]:
    rows: list[list[int]] = []
    room: list[list[int]] = []
    first_open = 0
    for sample, (encoder, decoder) in enumerate(zip(encoder_len, decoder_len, strict=True)):
        if encoder > limits[0] or decoder > limits[1]:
            raise InputError(
                f"sample {sample} is longer than a row",
                expected=f"encoder length up to {limits[0]}, decoder length up to {limits[1]}",
                found=f"encoder length {encoder}, decoder length {decoder}",
                fix="truncate samples, or raise max_len (max_target_len)",
            )
        for row in range(first_open, len(rows)):
            if encoder <= room[row][0] and decoder <= room[row][1]:
                break
        else:
            row = len(rows)
            rows.append([])
            room.append(list(limits))
        rows[row].append(sample)
        room[row][0] -= encoder
        room[row][1] -= decoder
        # Rows without room for any sample need not be looked at again.
        while first_open < len(rows) and (room[first_open][1] == 0 or (limits[0] and room[first_open][0] == 0)):
            first_open += 1
    return tuple(tuple(row) for row in rows)


def _in_turn(work: Work, cost_model: CostModel, config: PlannerConfig) -> list[Scheduled]:
    """Deal micro-batches to the replicas in turn and schedule them."""
    data = cost_model.parallelism.data
    parts = [list(range(first, len(work.micro_batches), data)) for first in range(data)]
    replicas = schedule_parts(work, parts, cost_model, config)
    if replicas is None:
        raise no_schedule_error(work, cost_model, config)
    return replicas
