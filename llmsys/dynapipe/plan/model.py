"""What a plan is: micro-batches for every replica, and an instruction list for every pipeline device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmsys.dynapipe.config import Attention, Parallelism, Recompute, ScheduleKind, StageLayers, first_decoder_stage
from llmsys.dynapipe.plan.instructions import BackwardPass, ForwardPass, Instruction


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Some samples of the global batch, padded to common lengths (tokens). Decoder-only: ``encoder_len`` is 0.

    ``rows`` says which samples share a row: one a row when samples are padded, several when they are packed.
    """

    rows: tuple[tuple[int, ...], ...]
    encoder_len: int
    decoder_len: int

    @property
    def samples(self) -> tuple[int, ...]:
        return tuple(sample for row in self.rows for sample in row)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows, encoder length, decoder length)."""
        return len(self.rows), self.encoder_len, self.decoder_len


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What the planner expects of one replica: time in ms, and peak memory in MB of each pipeline device."""

    makespan_ms: float
    peak_mb: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlan:
    """The work of one data-parallel replica. ``instructions`` has one list for each pipeline device."""

    micro_batches: tuple[MicroBatch, ...]
    recompute: Recompute
    schedule: ScheduleKind
    estimate: Estimate
    instructions: tuple[tuple[Instruction, ...], ...]

    def shapes(self) -> NDArray[np.int64]:
        """Rows (rows, encoder length, decoder length), shape (micro-batches, 3)."""
        return np.array([m.shape for m in self.micro_batches], dtype=np.int64).reshape(-1, 3)

    def compute_order(self, device: int) -> list[tuple[int, int, bool]]:
        """(micro-batch, stage, is backward) of each pass, in the order the device runs them."""
        return [
            (op.micro_batch, op.stage, type(op) is BackwardPass)
            for op in self.instructions[device]
            if type(op) in (ForwardPass, BackwardPass)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One training iteration: every sample of a global batch, on every device.

    ``planner`` names what made it. ``attention``: "padded" micro-batches compute on all tokens of their padded rows,
    also across packed samples; "varlen" ones concatenate their samples and attend only within each.
    ``decoder_extra_tokens`` are added to each target. ``memory_limit_mb`` has one entry for each pipeline device. The
    text and binary forms hold all of it; ``check_plan`` tells whether it can run.
    """

    planner: str
    num_samples: int
    parallelism: Parallelism
    stages: tuple[StageLayers, ...]
    memory_limit_mb: tuple[float, ...]
    attention: Attention = "padded"
    decoder_extra_tokens: int = 0
    replicas: tuple[ReplicaPlan, ...]

    @property
    def num_micro_batches(self) -> int:
        return sum(len(replica.micro_batches) for replica in self.replicas)

    @property
    def estimated_ms(self) -> float:
        """Expected time of the slowest replica."""
        return max(replica.estimate.makespan_ms for replica in self.replicas)

    @property
    def estimated_peak_mb(self) -> float:
        return max(max(replica.estimate.peak_mb) for replica in self.replicas)

    def padded_tokens(self) -> tuple[int, int]:
        """(encoder, decoder) tokens of all micro-batches, padding included."""
        shapes = np.concatenate([replica.shapes() for replica in self.replicas])
        return int((shapes[:, 0] * shapes[:, 1]).sum()), int((shapes[:, 0] * shapes[:, 2]).sum())

    def device_of(self, stage: int) -> int:
        return stage % self.parallelism.pipeline

    def loads_input(self, stage: int) -> bool:
        """Whether a stage reads token ids: the first does, and the first one with decoder layers."""
        return stage in (0, first_decoder_stage(self.stages))

    def grid(self, replica: int = 0, mark: tuple[int, int] | None = None, width: int = 120) -> str:
        """The passes of each device in order, as a grid; ``mark`` = (device, index) puts one cell in brackets.

        Long lists are cut to the part around the mark, or to their beginning.
        """
        lines = []
        for device, instructions in enumerate(self.replicas[replica].instructions):
            cells: list[str] = []
            at = 0
            for index, op in enumerate(instructions):
                marked = mark == (device, index)
                if not marked and type(op) not in (ForwardPass, BackwardPass):
                    continue
                cell = f"{op.code}{op.micro_batch}" + (f".{op.stage}" if self.parallelism.num_chunks > 1 else "")
                at = len(cells) if marked else at
                cells.append(f">{cell}<" if marked else cell)
            first = max(0, at - 8)
            text = f"device {device}: " + ("... " if first else "") + " ".join(cells[first:])
            lines.append(text if len(text) <= width else text[: width - 4] + " ...")
        return "\n".join(lines)

    def summary(self) -> str:
        """A few lines for people."""
        lines = [
            f"{self.planner} plan: {self.num_samples} samples in {self.num_micro_batches} micro-batches, "
            f"{self.parallelism.label()}, {self.estimated_ms:.1f} ms expected"
        ]
        for number, replica in enumerate(self.replicas):
            sizes = Counter(len(m.rows) for m in replica.micro_batches)
            common = ", ".join(f"{count}x{size}" for size, count in sorted(sizes.items()))
            lines.append(
                f"  replica {number}: {len(replica.micro_batches)} micro-batches (count x rows: {common}), "
                f"{replica.schedule}, recompute {replica.recompute}, {replica.estimate.makespan_ms:.1f} ms, "
                f"peak {max(replica.estimate.peak_mb):.0f} MB"
            )
        return "\n".join(lines)
