"""Settings of Lancet's planners."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from llmsys.core.errors import ConfigError

WeightGradients = Literal["greedy", "exact", "none"]
Partition = Literal["dp", "none"]
AxisSolver = Literal["cp_sat", "propagate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerConfig:
    """What a planner may do.

    ``max_parts``: most parts of a partitioned range (rho of the paper, which uses 8).
    ``group_fraction``: ops are grouped until they take this share of the time between two MoE layers (gamma; 1/5).
    ``memory_limit_mb``: of the tensors alive together, in MB of 10^6 bytes; None for no limit.
    ``weight_gradients``: how weight gradients are dealt to all-to-alls: "greedy" is the paper's Algorithm 1, "exact"
        solves its assignment problem, "none" leaves them where they are.
    ``partition``: "dp" cuts ranges of the forward pass in parts by the paper's dynamic program, "none" does not.
    ``axis_solver``: what finds the axes of a range: "cp_sat" is the paper's constraint program, "propagate" passes
        axes from op to op, which is faster.
    ``solver_limit``: work limit of each exact solution, in the solver's deterministic seconds, so that the same input
        gives the same plan on a slow machine; a plan's notes say when it was reached.
    ``seed``: of the solvers.
    """

    max_parts: int = 8
    group_fraction: float = 0.2
    memory_limit_mb: float | None = None
    weight_gradients: WeightGradients = "greedy"
    partition: Partition = "dp"
    axis_solver: AxisSolver = "cp_sat"
    solver_limit: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, literal in (
            ("weight_gradients", WeightGradients),
            ("partition", Partition),
            ("axis_solver", AxisSolver),
        ):
            value = getattr(self, name)
            if value not in get_args(literal):
                raise _refused(name, "one of " + ", ".join(map(repr, get_args(literal))), value)
        for name, lowest in (("max_parts", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < lowest:
                raise _refused(name, f"a whole number of at least {lowest}", value)
        if not _is_number(self.group_fraction) or not 0 < self.group_fraction <= 1:
            raise _refused("group_fraction", "a number above 0, and at most 1", self.group_fraction)
        for name in ("memory_limit_mb", "solver_limit"):
            value = getattr(self, name)
            if value is None and name == "memory_limit_mb":
                continue
            if not _is_number(value) or not 0 < value < math.inf:
                raise _refused(name, "a number above 0", value)


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _refused(name: str, expected: str, found: object) -> ConfigError:
    return ConfigError(f"{name} is out of range", expected=expected, found=repr(found), fix=f"set {name}")
