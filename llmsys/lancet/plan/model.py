"""The plan of a step: in which order it runs, which part of it in parts, and what each all-to-all hides.

A plan is all that planners, simulator and runtime share. Its instructions are executed in their order by one compute
lane; a `Start` returns at once and its communication runs on the lane of its group, in order of the starts; a `Wait`
blocks. Nothing else is asynchronous.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

WHOLE = -1
"""The ``part`` of an instruction that concerns the whole op or tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Compute op ``op`` (its index in the graph), or one part of it."""

    op: int
    part: int = WHOLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Launch communication op ``op``, or one part of it."""

    op: int
    part: int = WHOLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Block until what the `Start` of the same ``op`` and ``part`` launched is complete."""

    op: int
    part: int = WHOLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Cut tensor ``tensor``, which exists as a whole, along dimension ``axis`` into the parts of region ``region``."""

    region: int
    tensor: str
    axis: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """Make the whole of ``tensor`` of its parts, which region ``region`` made along ``axis`` (see `graph`)."""

    region: int
    tensor: str
    axis: int


Instruction: TypeAlias = Run | Start | Wait | Slice | Join


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A range of ops that runs in ``num_parts`` parts.

    ``ops``: the indices of the ops that are split, in the graph's order; ``splits[i]`` is the place in
    ``graph.ops[ops[i]].splits`` of the split that op ``ops[i]`` uses. Ops of the range that are not in it run whole,
    before or after.
    """

    num_parts: int
    ops: tuple[int, ...]
    splits: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What the planner expects of a step. Times in ms, memory in MB of 10^6 bytes.

    ``exposed_comm_ms``: time in which communication runs and the compute lane waits. ``peak_mb``: of the tensors that
    are alive together, graph inputs included; ``captured_peak_mb``: the same for the graph's own order.
    """

    step_ms: float
    compute_ms: float
    comm_ms: float
    exposed_comm_ms: float
    peak_mb: float
    captured_peak_mb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """``hidden_under[a]``: the weight-gradient ops that were assigned to all-to-all ``a``, in order of execution.

    ``notes``: what the planner wants a user to know, such as a gate that could not be split.
    """

    planner: str
    graph_name: str
    fingerprint: str
    instructions: tuple[Instruction, ...]
    regions: tuple[Region, ...]
    hidden_under: Mapping[int, tuple[int, ...]]
    estimate: Estimate
    notes: tuple[str, ...] = ()
