"""Which weight gradients hide which all-to-all: the paper's assignment problem, by two solvers (Alg. 1).

All-to-all j takes t_j ms and unit i w_i ms; each unit may go to one all-to-all of those it is allowed at. Wanted is the
most hidden time, the sum over j of min(t_j, the w of the units at j). It is NP-hard (generalised assignment).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmsys.core.errors import InputError
from llmsys.lancet.cp_sat import or_tools, solve_apart

UNASSIGNED = -1
_TICKS_PER_MS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """``targets[i]``: the all-to-all of unit i, or `UNASSIGNED`. ``hidden_ms``: the problem's objective.

    ``bound_ms``: no assignment hides more. ``proven``: this one is optimal.
    """

    targets: tuple[int, ...]
    hidden_ms: float
    bound_ms: float
    proven: bool


def hidden_ms(comm_ms: Sequence[float], unit_ms: Sequence[float], targets: Sequence[int]) -> float:
    """The objective: time of communication that ``targets`` covers."""
    loads: list[list[float]] = [[] for _ in comm_ms]
    for unit, target in enumerate(targets):
        if target != UNASSIGNED:
            loads[target].append(unit_ms[unit])
    return math.fsum(min(available, math.fsum(load)) for available, load in zip(comm_ms, loads, strict=True))


def assign_greedy(comm_ms: Sequence[float], unit_ms: Sequence[float], allowed: Sequence[Sequence[int]]) -> Assignment:
    """Algorithm 1 of the paper: best fit, all-to-alls in their order; ``allowed[j]`` lists the units for j.

    Each all-to-all takes the unit whose time is nearest to what is left of its own, until nothing is left or no unit;
    the last one may take longer than what is left. Of equally near units the first in ``allowed[j]`` is taken.
    """
    _check(comm_ms, unit_ms, allowed)
    targets = [UNASSIGNED] * len(unit_ms)
    for j, available in enumerate(comm_ms):
        left_ms = available
        free = [i for i in allowed[j] if targets[i] == UNASSIGNED]
        while left_ms > 0 and free:
            best = min(range(len(free)), key=lambda place: abs(left_ms - unit_ms[free[place]]))
            unit = free.pop(best)
            targets[unit] = j
            left_ms -= unit_ms[unit]
    hidden = hidden_ms(comm_ms, unit_ms, targets)
    usable = {unit for units in allowed for unit in units}
    bound = min(math.fsum(comm_ms), math.fsum(unit_ms[unit] for unit in usable))
    return Assignment(targets=tuple(targets), hidden_ms=hidden, bound_ms=bound, proven=hidden >= bound)


def assign_exact(
    comm_ms: Sequence[float],
    unit_ms: Sequence[float],
    allowed: Sequence[Sequence[int]],
    *,
    solver_limit: float = 2.0,
    gap: float = 0.0,
    seed: int = 0,
) -> Assignment:
    """The best assignment, by OR-Tools CP-SAT on times in whole ticks of 0.1 us, started from the greedy one.

    Best up to half a tick for each time and up to ``gap``, a share of what is hidden. Same input, same result: one
    worker, a fixed seed, and a limit in the solver's deterministic seconds. When that is reached the best assignment
    found is returned, with ``proven`` false and the bound reached. Never worse than `assign_greedy`. Units of equal
    time and equal choice are counted, not told apart.
    """
    _check(comm_ms, unit_ms, allowed)
    start = assign_greedy(comm_ms, unit_ms, allowed)
    if start.proven or not unit_ms:
        return start
    groups = _groups(unit_ms, allowed)
    limits = _Limits(deterministic_s=solver_limit, gap=gap, rounding_ticks=(len(unit_ms) + len(comm_ms)) / 2, seed=seed)
    found = solve_apart(_count_exactly, comm_ms, groups, start.targets, limits)
    if found is None:
        return start
    counts, bound, optimal = found
    targets = max(start.targets, _targets(groups, counts, len(unit_ms)), key=lambda t: hidden_ms(comm_ms, unit_ms, t))
    hidden = hidden_ms(comm_ms, unit_ms, targets)
    bound = max(hidden, bound)
    # A limit may be reached after the bound has come close, and before the solver looks at it.
    proven = optimal or bound - hidden <= max(gap * hidden, limits.rounding_ticks / _TICKS_PER_MS)
    return Assignment(targets=targets, hidden_ms=hidden, bound_ms=bound, proven=bool(proven))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Units that are alike: ``at`` are the all-to-alls that each may go to."""

    unit_ms: float
    at: tuple[int, ...]
    units: tuple[int, ...]


def _groups(unit_ms: Sequence[float], allowed: Sequence[Sequence[int]]) -> list[_Group]:
    at: list[list[int]] = [[] for _ in unit_ms]
    for j, units in enumerate(allowed):
        for unit in units:
            at[unit].append(j)
    found: dict[tuple[float, tuple[int, ...]], list[int]] = {}
    for unit, places in enumerate(at):
        if places:
            found.setdefault((unit_ms[unit], tuple(places)), []).append(unit)
    return [_Group(unit_ms=ms, at=places, units=tuple(units)) for (ms, places), units in found.items()]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limits:
    deterministic_s: float
    gap: float
    rounding_ticks: float
    seed: int


def _count_exactly(
    comm_ms: Sequence[float], groups: Sequence[_Group], start: Sequence[int], limits: _Limits
) -> tuple[dict[tuple[int, int], int], float, bool] | None:
    """How many units of each group go to each all-to-all, the bound in ms, whether it is reached; None if unsolved."""
    cp_model: Any = or_tools()
    model = cp_model.CpModel()
    counts = _add_counts(model, groups, start)
    _add_objective(model, comm_ms, groups, counts)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = limits.seed
    solver.parameters.max_deterministic_time = limits.deterministic_s
    # Without the linear relaxation of all of it, the bound stays at the sum of the all-to-alls for very long.
    solver.parameters.linearization_level = 2
    solver.parameters.absolute_gap_limit = limits.rounding_ticks
    solver.parameters.relative_gap_limit = limits.gap
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    found = {key: int(solver.value(count)) for key, count in counts.items()}
    return found, float(solver.best_objective_bound) / _TICKS_PER_MS, bool(status == cp_model.OPTIMAL)


def _add_counts(model: Any, groups: Sequence[_Group], start: Sequence[int]) -> dict[tuple[int, int], Any]:
    """Of each group and all-to-all, how many of its units go there, with a hint of how many do in ``start``."""
    counts = {}
    for g, group in enumerate(groups):
        for j in group.at:
            counts[g, j] = model.new_int_var(0, len(group.units), f"{g} at {j}")
            model.add_hint(counts[g, j], sum(start[unit] == j for unit in group.units))
        model.add(sum(counts[g, j] for j in group.at) <= len(group.units))
    return counts


def _add_objective(
    model: Any, comm_ms: Sequence[float], groups: Sequence[_Group], counts: dict[tuple[int, int], Any]
) -> None:
    covered = []
    for j, available in enumerate(comm_ms):
        at_j = [(counts[g, j], round(group.unit_ms * _TICKS_PER_MS)) for g, group in enumerate(groups) if j in group.at]
        covered.append(model.new_int_var(0, round(available * _TICKS_PER_MS), f"hidden {j}"))
        model.add(covered[j] <= sum(count * ticks for count, ticks in at_j))
    model.maximize(sum(covered))


def _targets(groups: Sequence[_Group], counts: dict[tuple[int, int], int], num_units: int) -> tuple[int, ...]:
    """Of each unit, its all-to-all, when ``counts`` units of a group go to each."""
    targets = [UNASSIGNED] * num_units
    for g, group in enumerate(groups):
        free = iter(group.units)
        for j in group.at:
            for _ in range(counts[g, j]):
                targets[next(free)] = j
    return tuple(targets)


def _check(comm_ms: Sequence[float], unit_ms: Sequence[float], allowed: Sequence[Sequence[int]]) -> None:
    if len(allowed) != len(comm_ms):
        raise InputError(
            "the choices do not fit the all-to-alls",
            expected=f"one list of units for each of the {len(comm_ms)} all-to-alls",
            found=f"{len(allowed)} lists",
            fix="pass allowed with one entry for each of comm_ms",
        )
    for name, times in (("comm_ms", comm_ms), ("unit_ms", unit_ms)):
        for number, time_ms in enumerate(times):
            if not 0 <= time_ms < math.inf:
                raise InputError(
                    f"{name}[{number}] is no time",
                    expected="a finite number of at least 0",
                    found=str(time_ms),
                    fix="mend the cost model that it is from",
                )
    for j, units in enumerate(allowed):
        for unit in units:
            if not 0 <= unit < len(unit_ms):
                raise InputError(
                    f"all-to-all {j} is allowed a unit that does not exist",
                    expected=f"units 0 to {len(unit_ms) - 1}",
                    found=str(unit),
                    fix="pass allowed with places in unit_ms",
                )
