"""Settings of DynaPipe: how a model is spread over devices, and what the planner may do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from llmsys.core.errors import ConfigError
from llmsys.core.specs import ModelSpec

Recompute = Literal["none", "selective", "full"]
ScheduleKind = Literal["1f1b", "adaptive"]
Order = Literal["sort", "tour"]
Attention = Literal["padded", "varlen"]
Reorder = Literal["none", "clusters", "search"]


def require_choices(name: str, values: object, literal: object) -> None:
    """ConfigError unless ``values`` is a tuple of at least one, and only of members of the Literal type ``literal``."""
    choices = get_args(literal)
    if not isinstance(values, tuple) or not values or any(value not in choices for value in values):
        raise ConfigError(
            f"{name} is none of the choices",
            expected="of " + ", ".join(map(repr, choices)),
            found=repr(values[0] if isinstance(values, tuple) and len(values) == 1 else values),
            fix=f"set {name}",
        )


def require_counts(owner: object, least: dict[str, int]) -> None:
    """ConfigError unless each named field of ``owner`` is a whole number of at least its ``least``."""
    for name, lowest in least.items():
        value = getattr(owner, name)
        if type(value) is not int or value < lowest:
            raise ConfigError(
                f"{name} is out of range",
                expected=f"a whole number of at least {lowest}",
                found=repr(value),
                fix=f"set {name}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """How many ways the model and the batch are split.

    ``data`` replicas of ``pipeline`` devices (each a group of ``tensor`` devices), ``num_chunks`` model chunks on
    each device (more than one: interleaved schedules), ZeRO stage ``zero_stage`` (0 to 3) over the replicas.
    """

    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    num_chunks: int = 1
    zero_stage: int = 0

    def __post_init__(self) -> None:
        require_counts(self, {"data": 1, "pipeline": 1, "tensor": 1, "num_chunks": 1, "zero_stage": 0})
        if self.zero_stage > 3:
            raise ConfigError(
                "zero_stage is out of range", expected="0, 1, 2 or 3", found=str(self.zero_stage), fix="set zero_stage"
            )

    @property
    def num_devices(self) -> int:
        return self.data * self.pipeline * self.tensor

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline, counting each model chunk; stage v runs on device v % pipeline."""
        return self.pipeline * self.num_chunks

    def label(self) -> str:
        chunks = f" x{self.num_chunks} chunks" if self.num_chunks > 1 else ""
        return f"dp{self.data} tp{self.tensor} pp{self.pipeline}{chunks}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLayers:
    """Layers of one pipeline stage, encoder layers first. ``head`` is the output projection and loss."""

    num_encoder: int
    num_decoder: int
    head: bool


def stage_layers(model: ModelSpec, parallelism: Parallelism) -> tuple[StageLayers, ...]:
    """Consecutive layers for each stage, as even as possible; the first stages get what is left over.

    The last stage also holds the head, so it never gets an extra layer unless all do. ConfigError when there are
    fewer layers than stages.
    """
    num_stages = parallelism.num_stages
    if model.num_layers < num_stages:
        raise ConfigError(
            "a pipeline stage would have no layer",
            expected=f"at most {model.num_layers} stages for the {model.num_layers} layers of {model.name}",
            found=f"pipeline={parallelism.pipeline} x num_chunks={parallelism.num_chunks} = {num_stages} stages",
            fix="lower pipeline or num_chunks",
        )
    base, left_over = divmod(model.num_layers, num_stages)
    stages, begin = [], 0
    for stage in range(num_stages):
        end = begin + base + (1 if stage < left_over else 0)
        num_encoder = max(0, min(end, model.num_encoder_layers) - begin)
        stages.append(
            StageLayers(num_encoder=num_encoder, num_decoder=end - begin - num_encoder, head=stage == num_stages - 1)
        )
        begin = end
    return tuple(stages)


def first_decoder_stage(stages: tuple[StageLayers, ...]) -> int:
    """The first stage with decoder layers: it reads the targets, and in a decoder-only model it is stage 0."""
    return next(v for v, stage in enumerate(stages) if stage.num_decoder > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerConfig:
    """What the planner may do.

    ``memory_limit_mb``: of a device, in the MB of the layer profile (10^6 bytes in the authors'); one number, or one
        for each pipeline device.
    ``order``: how samples are lined up before they are cut into micro-batches. "sort" by length (decoder length
        breaks ties); "tour" is a short path through (encoder, decoder) lengths, which for a decoder-only model is
        the same.
    ``recompute``: the activation recomputation kinds to choose from.
    ``schedules``: the pipeline schedules to choose from.
    ``reorder``: "none" keeps the order of the partition; "clusters" is the paper's (orders of clusters of similar
        micro-batches); "search" goes on from there with up to ``max_moves`` seeded swaps and moves a replica.
    ``max_in_flight``: most micro-batches a device may hold at once in the adaptive schedule.
    ``length_multiple``: padded lengths are rounded up to a multiple of this.
    ``decoder_extra_tokens``: tokens added to a target in an encoder-decoder model (start and end marks).
    ``max_tour_kicks``: work limit of the tour.
    ``seed``: same inputs and seed give the same plan.
    """

    memory_limit_mb: float | tuple[float, ...] = 36_000.0
    order: Order = "tour"
    recompute: tuple[Recompute, ...] = ("none", "selective", "full")
    schedules: tuple[ScheduleKind, ...] = ("1f1b", "adaptive")
    reorder: Reorder = "search"
    max_moves: int = 400
    max_in_flight: int = 1_000_000
    length_multiple: int = 8
    decoder_extra_tokens: int = 2
    max_tour_kicks: int = 600
    seed: int = 0

    def __post_init__(self) -> None:
        limits = self.memory_limit_mb if isinstance(self.memory_limit_mb, tuple) else (self.memory_limit_mb,)
        if not limits or any(type(limit) not in (int, float) or not 0 < limit < math.inf for limit in limits):
            raise ConfigError(
                "memory_limit_mb is out of range",
                expected="a number above 0, or a tuple of one for each pipeline device",
                found=repr(self.memory_limit_mb),
                fix="set memory_limit_mb",
            )
        require_choices("order", (self.order,), Order)
        require_choices("recompute", self.recompute, Recompute)
        require_choices("schedules", self.schedules, ScheduleKind)
        require_choices("reorder", (self.reorder,), Reorder)
        require_counts(
            self,
            {
                "max_moves": 0,
                "max_in_flight": 1,
                "length_multiple": 1,
                "decoder_extra_tokens": 0,
                "max_tour_kicks": 0,
                "seed": 0,
            },
        )

    def device_limits_mb(self, num_devices: int) -> tuple[float, ...]:
        """The memory limit of each of ``num_devices`` pipeline devices."""
        if not isinstance(self.memory_limit_mb, tuple):
            return (self.memory_limit_mb,) * num_devices
        if len(self.memory_limit_mb) != num_devices:
            raise ConfigError(
                "memory_limit_mb does not fit the pipeline",
                expected=f"one number, or one for each of the {num_devices} pipeline devices",
                found=f"{len(self.memory_limit_mb)} numbers",
                fix="set memory_limit_mb",
            )
        return self.memory_limit_mb
