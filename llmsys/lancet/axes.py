"""Which ops of a range can run in parts, and along which axes (the paper's axis inferencer).

The rules are in `axis_csp`. In a mixture-of-experts layer they give what the paper describes: a range that holds only
the two all-to-alls and what is between them is cut along the capacity; one that holds the gate too, or what follows, is
cut along the batch, and between the all-to-alls along the irregular axis; and a gate that needs the whole batch runs
before the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from llmsys.core.errors import InputError
from llmsys.lancet.axis_csp import OUTSIDE, RangeOp, RangeProblem, Solution, solve
from llmsys.lancet.config import AxisSolver
from llmsys.lancet.graph import Graph, Op, Split

_Sizes = list[list[frozenset[int]]]  # of each op and split: the dimensions that are cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """``ops``: those to split, by index, increasing; none if the range cannot be cut. ``splits[i]`` is the place of the
    chosen one in the splits of ``ops[i]``.

    ``units``: the smallest dimension that is cut. All others are multiples of it; there cannot be more parts.
    ``stopped_by``: the op that cannot be split, and because of which ops before it run whole; None if there is none.
    """

    ops: tuple[int, ...]
    splits: tuple[int, ...]
    units: int
    stopped_by: int | None


def infer_splits(
    graph: Graph,
    first: int,
    last: int,
    *,
    solver: AxisSolver = "cp_sat",
    units: int | None = None,
    solver_limit: float = 10.0,
    seed: int = 0,
) -> Inference:
    """Axes for the ops from ``first`` to ``last``, both included. All-to-alls of the range are split, or nothing is.

    ``units``: cut only dimensions that are multiples of it; by default the number that lets most ops be split.
    ``solver_limit`` (deterministic seconds) and ``seed`` are for "cp_sat". InputError if the range is none; ConfigError
    if OR-Tools is needed and missing.
    """
    if not 0 <= first <= last < len(graph.ops):
        raise InputError(
            "this is no range of ops",
            expected=f"0 <= first <= last < {len(graph.ops)}",
            found=f"first {first}, last {last}",
            fix="give the range as indices of graph.ops, both included",
        )
    sizes = [[_cut_sizes(graph, op, split) for split in op.splits] for op in graph.ops[first : last + 1]]
    problem = range_problem(graph, first, last)

    def solved(multiple: int) -> Solution:
        choice = solve(_restricted(problem, sizes, multiple), solver, solver_limit, seed)
        return _without_dead_ends(graph, first, last, choice)

    found = solved(units or 1)
    if units is None and not _has_units(sizes, found):
        found = _best_units(sizes, solved)
    chosen = {first + i: place for i, place in enumerate(found) if place is not None}
    return Inference(
        ops=tuple(chosen),
        splits=tuple(chosen.values()),
        units=min(_used_sizes(sizes, found), default=1),
        stopped_by=_stopped_by(graph, first, last, chosen),
    )


def _has_units(sizes: _Sizes, found: Solution) -> bool:
    """Whether every dimension that is cut is a multiple of the smallest one."""
    used = _used_sizes(sizes, found)
    return all(size % min(used) == 0 for size in used)


def _best_units(sizes: _Sizes, solved: Callable[[int], Solution]) -> Solution:
    """The solution with most split ops, and of equals the largest units, over all dimensions that could be cut."""
    best = 0
    found: Solution = ()
    for size in sorted({size for op in sizes for split in op for size in split}):
        other = solved(size)
        num_split = sum(place is not None for place in other)
        if num_split >= max(best, 1) and min(_used_sizes(sizes, other), default=0) == size:
            best, found = num_split, other
    return found


def _cut_sizes(graph: Graph, op: Op, split: Split) -> frozenset[int]:
    made = (tensor.name for tensor in op.outputs)
    named = zip((*op.inputs, *made), (*split.inputs, *split.outputs), strict=True)
    return frozenset(graph.tensors[name].shape[axis] for name, axis in named if axis >= 0)


def _used_sizes(sizes: _Sizes, found: Solution) -> set[int]:
    return {size for i, place in enumerate(found) if place is not None for size in sizes[i][place]}


def _restricted(problem: RangeProblem, sizes: _Sizes, units: int) -> RangeProblem:
    """The problem without the splits of dimensions that are no multiples of ``units``."""
    if units == 1:
        return problem
    return tuple(
        replace(op, splits=tuple(s for s in op.splits if all(size % units == 0 for size in sizes[i][s[0]])))
        for i, op in enumerate(problem)
    )


def range_problem(graph: Graph, first: int, last: int) -> RangeProblem:
    """What `axis_csp` needs to know of the ops from ``first`` to ``last``, both included."""
    outside: dict[str, int] = {}
    worth = _worth_splitting(graph, first, last)

    def source(name: str) -> tuple[int, int]:
        producer = graph.producers.get(name, OUTSIDE)
        if producer < first:
            return OUTSIDE, outside.setdefault(name, len(outside))
        return producer - first, [tensor.name for tensor in graph.ops[producer].outputs].index(name)

    return tuple(
        RangeOp(
            required=op.kind == "all_to_all",
            random=op.random,
            splits=tuple((i, s.inputs, s.outputs) for i, s in enumerate(op.splits)) if worth >> index & 1 else (),
            inputs=tuple(map(source, op.inputs)),
        )
        for index, op in enumerate(graph.ops[first : last + 1], first)
    )


def _worth_splitting(graph: Graph, first: int, last: int) -> int:
    """As bits, the ops from which a path leads to or from an all-to-all of the range, or to an op after one.

    Any other one, such as a loss on the gate's scores, would in parts only delay the start of an all-to-all.
    """
    found = 0
    for index in _after_all_to_alls(graph, first, last):
        found |= (1 << index) | graph.ancestors[index]
    return found


def _after_all_to_alls(graph: Graph, first: int, last: int) -> list[int]:
    """The all-to-alls of the range, and what needs them."""
    comm = sum(1 << i for i in range(first, last + 1) if graph.ops[i].kind == "all_to_all")
    return [i for i in range(first, last + 1) if comm >> i & 1 or graph.ancestors[i] & comm]


def _without_dead_ends(graph: Graph, first: int, last: int, found: Solution) -> Solution:
    """Lets ops run whole whose parts no other op needs in parts: those that come before the all-to-alls, and views.

    What they take in parts is then joined instead of what they make. The result keeps all constraints.
    """
    after = set(_after_all_to_alls(graph, first, last))
    places = dict(enumerate(found, first))
    for index in sorted(places, reverse=True):
        op = graph.ops[index]
        users = (i for tensor in op.outputs for i in graph.consumers[tensor.name])
        may_go = op.is_view or index not in after
        if may_go and not op.random and not any(places.get(i) is not None for i in users):
            places[index] = None
    return tuple(places.values())


def _stopped_by(graph: Graph, first: int, last: int, chosen: Mapping[int, int]) -> int | None:
    """What `Inference.stopped_by` says; where nothing can be split, an all-to-all without a split comes first."""
    comm = [i for i in range(first, last + 1) if graph.ops[i].kind == "all_to_all"]
    if not comm:
        return None
    unsplit = [i for i in comm if not graph.ops[i].splits]
    if unsplit:
        return unsplit[0]
    for index in range(comm[0] - 1, first - 1, -1):
        if not graph.ancestors[comm[0]] >> index & 1 or index in chosen or graph.ops[index].splits:
            continue
        if any(graph.ancestors[index] >> i & 1 and graph.ops[i].splits for i in range(first, index)):
            return index
    return None
