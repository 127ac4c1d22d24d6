"""The constraint program of a range: which ops run in parts, by which of their splits (section 5 of the paper).

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

from llmsys.core.errors import ConfigError
from llmsys.lancet.config import AxisSolver
from llmsys.lancet.graph import REPLICATED, is_irregular

BEFORE, SPLIT, AFTER = 0, 1, 2
"""The roles of an op: whole before the parts, in parts, whole after them."""

OUTSIDE = -1
_MAX_NODES = 20_000  # of the backtracking search; ranges of real models need a few


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeOp:
    """An op of a range.

    ``splits``: (place in `Op.splits`, axes of inputs, axes of outputs) of those that may be used. ``inputs``: for each
    input (the op of the range that makes it, which output), or (OUTSIDE, a number that is equal for equal tensors).
    A choice is a place in ``splits``, or ``len(splits)`` for "before", or one more for "after".
    """

    required: bool
    random: bool
    splits: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]
    inputs: tuple[tuple[int, int], ...]

    @property
    def num_choices(self) -> int:
        return len(self.splits) + 2

    def role(self, choice: int) -> int:
        return SPLIT if choice < len(self.splits) else BEFORE if choice == len(self.splits) else AFTER


RangeProblem = tuple[RangeOp, ...]
"""The structure of a range, free of names and sizes: equal for equal layers, so that each is solved once."""

Solution = tuple[int | None, ...]
"""For each op the place in `Op.splits`, None where it runs whole. Empty where there is no solution."""


@dataclass(slots=True, kw_only=True)
class _Constraints:
    """``domains``: the choices of each op as bits. ``rows[p, q][a]``: the choices of q that go with choice a of p."""

    domains: list[int]
    rows: dict[tuple[int, int], tuple[int, ...]]
    values: list[list[int]]


@lru_cache(maxsize=4096)
def solve(problem: RangeProblem, solver: AxisSolver, solver_limit: float = 10.0, seed: int = 0) -> Solution:
    """The best solution. ``solver_limit`` (deterministic seconds) and ``seed`` are for "cp_sat".

    Both solvers find one of the same value; "propagate" gives up looking for a better one after 20,000 nodes.
    ConfigError if OR-Tools is needed and missing.
    """
    constraints = _constraints(problem)
    if not all(constraints.domains) or not any(op.required for op in problem):
        return ()
    if solver == "propagate":
        choices = _backtrack(constraints)
    else:
        choices = _constraint_program(constraints, solver_limit, seed)
    if choices is None:
        return ()
    return tuple(op.splits[c][0] if op.role(c) == SPLIT else None for op, c in zip(problem, choices, strict=True))


def _constraints(problem: RangeProblem) -> _Constraints:
    domains = [sum(1 << c for c in range(op.num_choices) if _is_possible(op, c)) for op in problem]
    rows: dict[tuple[int, int], tuple[int, ...]] = {}
    for (p, q), links in _links(problem).items():
        table = _table(problem[p], problem[q], tuple(links))
        rows[p, q] = table
        rows[q, p] = tuple(
            sum(1 << a for a, row in enumerate(table) if row >> b & 1) for b in range(problem[q].num_choices)
        )
    # One op more is worth more than any choice among the splits of all ops.
    scale = 1 + sum(max((s[0] for s in op.splits), default=0) for op in problem)
    values = [[scale - s[0] for s in op.splits] + [0, 0] for op in problem]
    return _Constraints(domains=domains, rows=rows, values=values)


def _is_possible(op: RangeOp, choice: int) -> bool:
    if op.role(choice) != SPLIT:
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
def _table(first: RangeOp, second: RangeOp, links: tuple[_Link, ...]) -> tuple[int, ...]:
    return tuple(
        sum(1 << b for b in range(second.num_choices) if all(_agree(first, a, second, b, link) for link in links))
        for a in range(first.num_choices)
    )


def _agree(first: RangeOp, a: int, second: RangeOp, b: int, link: _Link) -> bool:
    kind, x, y = link
    roles = first.role(a), second.role(b)
    if kind == "random":
        return roles[0] <= roles[1]
    if kind == "shared":
        if roles != (SPLIT, SPLIT):
            return True
        axes = first.splits[a][1][x], second.splits[b][1][y]
        return REPLICATED in axes or axes[0] == axes[1]
    if roles == (SPLIT, SPLIT):
        made, used = first.splits[a][2][x], second.splits[b][1][y]
        return made == used and _cuts(made)
    if roles == (BEFORE, SPLIT):
        return not is_irregular(second.splits[b][1][y])
    return roles[0] <= roles[1]


def _backtrack(constraints: _Constraints) -> list[int] | None:
    """Depth-first search with arc consistency at every node, best values first, cut off by the sum of best values."""
    neighbours: list[list[int]] = [[] for _ in constraints.domains]
    for p, q in constraints.rows:
        neighbours[p].append(q)
    best: list[int] | None = None
    best_value, num_nodes = -1, 0
    start = list(constraints.domains)
    stack = [start] if _propagate(start, constraints.rows, neighbours, range(len(start))) else []
    while stack and num_nodes < _MAX_NODES:
        num_nodes += 1
        domains = stack.pop()
        if sum(_top(domain, row)[1] for domain, row in zip(domains, constraints.values, strict=True)) <= best_value:
            continue
        open_ops = [(domain.bit_count(), index) for index, domain in enumerate(domains) if domain & (domain - 1)]
        if not open_ops:
            best = [domain.bit_length() - 1 for domain in domains]
            best_value = sum(row[c] for row, c in zip(constraints.values, best, strict=True))
            continue
        index = min(open_ops)[1]
        choice = 1 << _top(domains[index], constraints.values[index])[0]
        for domain in (domains[index] & ~choice, choice):  # the last one is looked at first
            child = [*domains[:index], domain, *domains[index + 1 :]]
            if _propagate(child, constraints.rows, neighbours, (index,)):
                stack.append(child)
    return best


def _top(domain: int, values: list[int]) -> tuple[int, int]:
    """The first choice of the highest value in a domain, and that value."""
    choice = max((c for c in range(len(values)) if domain >> c & 1), key=lambda c: (values[c], -c))
    return choice, values[choice]


def _propagate(
    domains: list[int],
    rows: dict[tuple[int, int], tuple[int, ...]],
    neighbours: list[list[int]],
    changed: Iterable[int],
) -> bool:
    """Removes in place what no neighbour goes with; False when an op has no choice left."""
    queue = list(changed)
    while queue:
        p = queue.pop()
        for q in neighbours[p]:
            allowed = 0
            for choice, row in enumerate(rows[p, q]):
                if domains[p] >> choice & 1:
                    allowed |= row
            if domains[q] & ~allowed:
                domains[q] &= allowed
                if not domains[q]:
                    return False
                queue.append(q)
    return True


def _constraint_program(constraints: _Constraints, solver_limit: float, seed: int) -> list[int] | None:
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise ConfigError(
            "axis_solver 'cp_sat' needs OR-Tools",
            expected="the package ortools",
            found=str(error),
            fix="install ortools, or set axis_solver to 'propagate'",
        ) from error
    model = cp_model.CpModel()
    chosen = []
    terms = []
    for index, (domain, values) in enumerate(zip(constraints.domains, constraints.values, strict=True)):
        choices = [c for c in range(len(values)) if domain >> c & 1]
        variable = model.new_int_var_from_domain(cp_model.Domain.from_values(choices), f"choice_{index}")
        literals = [model.new_bool_var(f"choice_{index}_is_{c}") for c in choices]
        model.add_exactly_one(literals)
        model.add(variable == sum(c * literal for c, literal in zip(choices, literals, strict=True)))
        chosen.append(variable)
        terms += [values[c] * literal for c, literal in zip(choices, literals, strict=True)]
    for (p, q), table in constraints.rows.items():
        if p < q:
            pairs = [(a, b) for a, row in enumerate(table) for b in range(row.bit_length()) if row >> b & 1]
            model.add_allowed_assignments([chosen[p], chosen[q]], pairs)
    model.maximize(sum(terms))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed
    solver.parameters.max_deterministic_time = solver_limit
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    return [int(solver.value(variable)) for variable in chosen]
