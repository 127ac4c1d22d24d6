"""The constraint program of a range: which ops run in parts, by which of their splits (the paper's axis inferencer).

The paper's variables are the axes of tensors. Here a variable is the choice of an op: one of its splits, or to run
whole before all parts, or whole after them. Axes of tensors follow, and every constraint is between two ops:

- an op that takes a tensor from one that runs after the parts runs after them as well;
- an op that runs before the parts takes tensors only from ops that do;
- between two split ops the axis must be the same, and be one that cuts; a sum that is not complete (PARTIAL) or a state
  that is not the last one (LAST) is of use to whole ops only;
- a tensor that exists as a whole can be cut along a dimension, but not along an irregular axis: which rows belong to
  which part, only the gate that made them in parts knows;
- all ops that cut a tensor cut it along the same axis;
- ops that draw random numbers keep their order.

Every required op must be split. Of all solutions the one with the most split ops is taken, as in the paper; among these
the one with the earlier entries of `Op.splits`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise
from typing import Any

from llmsys.lancet.config import AxisSolver
from llmsys.lancet.cp_sat import or_tools, solve_apart
from llmsys.lancet.graph import REPLICATED, is_irregular

BEFORE, SPLIT, AFTER = 0, 1, 2
"""The roles of an op: whole before the parts, in parts, whole after them."""

OUTSIDE = -1
_MAX_NODES = 20_000  # of the backtracking search; ranges of real models need a few


_Splits = tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]


def role_of(splits: _Splits, choice: int) -> int:
    """The role that a choice gives to an op with these splits: see `RangeOp`."""
    return SPLIT if choice < len(splits) else BEFORE if choice == len(splits) else AFTER


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeOp:
    """An op of a range.

    ``splits``: (place in `Op.splits`, axes of inputs, axes of outputs) of those that may be used. ``inputs``: for each
    input (the op of the range that makes it, which output), or (OUTSIDE, a number that is equal for equal tensors).
    A choice is a place in ``splits``, or ``len(splits)`` for "before", or one more for "after".
    """

    required: bool
    random: bool
    splits: _Splits
    inputs: tuple[tuple[int, int], ...]


RangeProblem = tuple[RangeOp, ...]
"""The structure of a range, free of names and sizes: equal for equal layers, so that each is solved once."""

Solution = tuple[int | None, ...]
"""For each op the place in `Op.splits`, None where it runs whole. Empty where there is no solution."""


@dataclass(slots=True, kw_only=True)
class _Constraints:
    """``domains``: the choices of each op as bits. ``rows[p, q][a]``: the choices of q that go with choice a of p.

    ``neighbours``: of each op, the others that it shares a constraint with. ``values``: of the choices of each op.
    """

    domains: list[int]
    rows: dict[tuple[int, int], tuple[int, ...]]
    neighbours: list[list[int]]
    values: list[list[int]]


@lru_cache(maxsize=4096)
def solve(problem: RangeProblem, solver: AxisSolver, solver_limit: float = 10.0, seed: int = 0) -> Solution:
    """The best solution. ``solver_limit`` (deterministic seconds) and ``seed`` are for "cp_sat".

    Both solvers find one of the same value; "propagate" gives up looking for a better one after 20,000 nodes.
    ConfigError if OR-Tools is needed and missing.
    """
    if not any(op.required for op in problem):
        return ()
    constraints = _constraints(problem)
    if not _propagate(constraints.domains, constraints, range(len(problem))):
        return ()
    if solver == "propagate":
        choices = _backtrack(constraints)
    else:
        choices = solve_apart(_constraint_program, constraints, solver_limit, seed)
    if choices is None:
        return ()
    return tuple(
        op.splits[c][0] if role_of(op.splits, c) == SPLIT else None for op, c in zip(problem, choices, strict=True)
    )


def _constraints(problem: RangeProblem) -> _Constraints:
    domains = [sum(1 << c for c in range(len(op.splits) + 2) if _is_possible(op, c)) for op in problem]
    rows: dict[tuple[int, int], tuple[int, ...]] = {}
    neighbours: list[list[int]] = [[] for _ in problem]
    for (p, q), links in _links(problem).items():
        table = _table(problem[p].splits, problem[q].splits, tuple(links))
        rows[p, q] = table
        rows[q, p] = _transposed(table, len(problem[q].splits) + 2)
        neighbours[p].append(q)
        neighbours[q].append(p)
    # One op more is worth more than any choice among the splits of all ops.
    scale = 1 + sum(max((s[0] for s in op.splits), default=0) for op in problem)
    values = [[scale - s[0] for s in op.splits] + [0, 0] for op in problem]
    return _Constraints(domains=domains, rows=rows, neighbours=neighbours, values=values)


@lru_cache(maxsize=4096)
def _transposed(table: tuple[int, ...], num_columns: int) -> tuple[int, ...]:
    return tuple(sum(1 << a for a, row in enumerate(table) if row >> b & 1) for b in range(num_columns))


def _is_possible(op: RangeOp, choice: int) -> bool:
    if role_of(op.splits, choice) != SPLIT:
        return not op.required
    _, axes, _ = op.splits[choice]
    cuts: dict[tuple[int, int], int] = {}
    for axis, source in zip(axes, op.inputs, strict=True):
        if axis == REPLICATED:
            continue
        if not _cuts(axis) or (source[0] == OUTSIDE and is_irregular(axis)) or cuts.setdefault(source, axis) != axis:
            return False
    return True


def _cuts(axis: int) -> bool:
    return axis >= 0 or is_irregular(axis)


# How two ops of a range are joined: the second takes output x of the first as input y; or both take one tensor, as
# inputs x and y; or both draw random numbers.
_Link = tuple[str, int, int]


def _links(problem: RangeProblem) -> dict[tuple[int, int], list[_Link]]:
    links: dict[tuple[int, int], list[_Link]] = {}
    users: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for index, op in enumerate(problem):
        for position, source in enumerate(op.inputs):
            users.setdefault(source, []).append((index, position))
            if source[0] != OUTSIDE:
                links.setdefault((source[0], index), []).append(("edge", source[1], position))
    for uses in users.values():
        for (p, x), (q, y) in combinations(uses, 2):
            if p != q:
                links.setdefault((p, q), []).append(("shared", x, y))
    for p, q in pairwise(index for index, op in enumerate(problem) if op.random):
        links.setdefault((p, q), []).append(("random", 0, 0))
    return links


@lru_cache(maxsize=4096)
def _table(first: _Splits, second: _Splits, links: tuple[_Link, ...]) -> tuple[int, ...]:
    return tuple(
        sum(1 << b for b in range(len(second) + 2) if all(_agree(first, a, second, b, link) for link in links))
        for a in range(len(first) + 2)
    )


def _agree(first: _Splits, a: int, second: _Splits, b: int, link: _Link) -> bool:
    kind, x, y = link
    roles = role_of(first, a), role_of(second, b)
    if kind == "random":
        return roles[0] <= roles[1]
    if kind == "shared":
        if roles != (SPLIT, SPLIT):
            return True
        axes = first[a][1][x], second[b][1][y]
        return REPLICATED in axes or axes[0] == axes[1]
    if roles == (SPLIT, SPLIT):
        made, used = first[a][2][x], second[b][1][y]
        return made == used and _cuts(made)
    if roles == (BEFORE, SPLIT):
        return not is_irregular(second[b][1][y])
    return roles[0] <= roles[1]


def _backtrack(constraints: _Constraints) -> list[int] | None:
    """Depth-first search with arc consistency at every node, best values first, cut off by the sum of best values."""
    rows, values = constraints.rows, constraints.values
    best: list[int] | None = None
    best_value, num_nodes = -1, 0
    stack = [constraints.domains]
    while stack and num_nodes < _MAX_NODES:
        num_nodes += 1
        domains = stack.pop()
        # The first choice of a domain, its lowest bit, has the highest value.
        choices = [(domain & -domain).bit_length() - 1 for domain in domains]
        value = sum(row[choice] for row, choice in zip(values, choices, strict=True))
        if value <= best_value:
            continue
        if all(row[choices[p]] >> choices[q] & 1 for (p, q), row in rows.items()):
            best, best_value = choices, value
            continue
        _, index = min((domain.bit_count(), index) for index, domain in enumerate(domains) if domain & (domain - 1))
        choice = 1 << choices[index]
        for domain in (domains[index] & ~choice, choice):  # the last one is looked at first
            child = [*domains[:index], domain, *domains[index + 1 :]]
            if _propagate(child, constraints, (index,)):
                stack.append(child)
    return best


def _propagate(domains: list[int], constraints: _Constraints, changed: Iterable[int]) -> bool:
    """Removes in place what no neighbour goes with; False when an op has no choice left."""
    if not all(domains):
        return False
    queue = list(changed)
    while queue:
        p = queue.pop()
        for q in constraints.neighbours[p]:
            allowed = 0
            for choice, row in enumerate(constraints.rows[p, q]):
                if domains[p] >> choice & 1:
                    allowed |= row
            if domains[q] & ~allowed:
                domains[q] &= allowed
                if not domains[q]:
                    return False
                queue.append(q)
    return True


def _constraint_program(constraints: _Constraints, solver_limit: float, seed: int) -> list[int] | None:
    """Domains are arc-consistent: ops with one choice left need no variable, as their constraints hold already."""
    cp_model = or_tools()
    model = cp_model.CpModel()
    chosen: dict[int, Any] = {}
    terms = []
    for index, (domain, values) in enumerate(zip(constraints.domains, constraints.values, strict=True)):
        choices = [c for c in range(len(values)) if domain >> c & 1]
        if len(choices) == 1:
            continue
        variable = model.new_int_var_from_domain(cp_model.Domain.from_values(choices), f"choice_{index}")
        literals = [model.new_bool_var(f"choice_{index}_is_{c}") for c in choices]
        model.add_exactly_one(literals)
        model.add(variable == sum(c * literal for c, literal in zip(choices, literals, strict=True)))
        chosen[index] = variable
        terms += [values[c] * literal for c, literal in zip(choices, literals, strict=True)]
    for (p, q), table in constraints.rows.items():
        if p < q and p in chosen and q in chosen:
            pairs = [(a, b) for a, row in enumerate(table) for b in range(row.bit_length()) if row >> b & 1]
            model.add_allowed_assignments([chosen[p], chosen[q]], pairs)
    model.maximize(sum(terms))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed
    solver.parameters.max_deterministic_time = solver_limit
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    left = [domain.bit_length() - 1 for domain in constraints.domains]
    return [int(solver.value(chosen[index])) if index in chosen else only for index, only in enumerate(left)]
