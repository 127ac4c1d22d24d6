"""Which compute ops can run while an all-to-all is on the wire, and what has to move along with each (dW labelling).

The paper's rule: an op can hide an all-to-all if no directed path joins the two, in either direction. In the backward
pass these are the weight gradients of the layers before it in time, with their casts and accumulations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmsys.lancet.graph import Graph, Op, Phase

CHEAP_SHARE = 0.5
"""A neighbour that takes at most this share of an op's time moves along with it and is no candidate of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Compute ops that move together: ``seed``, and views and cheap ops that feed only it or that only it feeds.

    ``ops`` are in the graph's order. ``duration_ms`` is of all of them.
    """

    seed: int
    ops: tuple[int, ...]
    duration_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """``all_to_alls`` of a phase in order, and the units that can hide some of them.

    ``labelled[j]``: by the paper's rule, the units that can hide all-to-all ``all_to_alls[j]``, as places in ``units``.
    ``movable[j]``: those of them that can in fact run directly after its start, where no other communication and no
    random op is in the way.
    """

    all_to_alls: tuple[int, ...]
    units: tuple[Unit, ...]
    labelled: tuple[tuple[int, ...], ...]
    movable: tuple[tuple[int, ...], ...]


def label(graph: Graph, phase: Phase = "backward") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of each op, the all-to-alls of ``phase`` that the paper's rule lets it hide: (all-to-alls, sets as bits).

    Bit j of a set stands for the j-th all-to-all. Only compute ops of the phase have a set that is not empty. Linear in
    the edges of the graph: a path is passed on as a set of all-to-alls, not as a set of ops.
    """
    all_to_alls = tuple(i for i in graph.comm_ops("all_to_all") if graph.ops[i].phase == phase)
    joined = _joined(graph, all_to_alls)
    full = (1 << len(all_to_alls)) - 1
    sets = tuple(
        full & ~(before | after) if op.phase == phase and not op.is_comm else 0
        for op, before, after in zip(graph.ops, *joined, strict=True)
    )
    return all_to_alls, sets


def _joined(graph: Graph, targets: Sequence[int]) -> tuple[list[int], list[int]]:
    """Of each op, which ``targets`` have a path to it and to which it has a path; itself is in neither."""
    own = [0] * len(graph.ops)
    for number, index in enumerate(targets):
        own[index] = 1 << number
    before, after = [0] * len(own), [0] * len(own)
    for index, predecessors in enumerate(graph.predecessors):
        for earlier in predecessors:
            before[index] |= before[earlier] | own[earlier]
    for index in range(len(own) - 1, -1, -1):
        for earlier in graph.predecessors[index]:
            after[earlier] |= after[index] | own[index]
    return before, after


def find_candidates(graph: Graph, op_ms: Sequence[float], phase: Phase = "backward") -> Candidates:
    """The units of a phase, and which all-to-alls each can hide; ``op_ms`` has the time of each whole op."""
    all_to_alls, sets = label(graph, phase)
    units = _units(graph, op_ms, sets)
    labelled: list[list[int]] = [[] for _ in all_to_alls]
    movable: list[list[int]] = [[] for _ in all_to_alls]
    ready_after = _ready_after(graph)
    needed_before = _needed_before(graph)
    for number, unit in enumerate(units):
        allowed = sets[unit.seed]
        ready = max(ready_after[i] for i in unit.ops)
        needed = min(needed_before[i] for i in unit.ops)
        pinned = any(graph.ops[i].random for i in unit.ops)
        for j, index in enumerate(all_to_alls):
            if allowed >> j & 1:
                labelled[j].append(number)
                if ready < index < needed and not pinned:
                    movable[j].append(number)
    return Candidates(
        all_to_alls=all_to_alls,
        units=units,
        labelled=tuple(map(tuple, labelled)),
        movable=tuple(map(tuple, movable)),
    )


def find_successors(graph: Graph) -> list[list[int]]:
    """Of each op, the ops that take tensors from it, increasing."""
    found: list[list[int]] = [[] for _ in graph.ops]
    for index, predecessors in enumerate(graph.predecessors):
        for earlier in predecessors:
            found[earlier].append(index)
    return found


def _fixed(op: Op) -> bool:
    return op.is_comm or op.random


def _ready_after(graph: Graph) -> list[int]:
    """Of each op, its last ancestor that cannot be moved to an earlier place with it; -1 for none."""
    found = [-1] * len(graph.ops)
    for index, predecessors in enumerate(graph.predecessors):
        for earlier in predecessors:
            found[index] = max(found[index], found[earlier], earlier if _fixed(graph.ops[earlier]) else -1)
    return found


def _needed_before(graph: Graph) -> list[int]:
    """Of each op, its first descendant that must keep its place; the number of ops for none.

    All-to-alls keep theirs, or hiding one would delay another, and so do random ops. Collectives such as the sum of
    a gradient over data-parallel ranks follow the op they wait for.
    """
    found = [len(graph.ops)] * len(graph.ops)
    for index in range(len(graph.ops) - 1, -1, -1):
        op = graph.ops[index]
        own = index if op.kind == "all_to_all" or op.random else len(graph.ops)
        for earlier in graph.predecessors[index]:
            found[earlier] = min(found[earlier], found[index], own)
    return found


def _units(graph: Graph, op_ms: Sequence[float], sets: Sequence[int]) -> tuple[Unit, ...]:
    """Longest op first, each takes its views and cheap neighbours; what costs nothing and is left is no unit."""
    taken = [False] * len(graph.ops)
    successors = find_successors(graph)
    units = []
    seeds = [i for i, op in enumerate(graph.ops) if sets[i] and not op.is_view and op_ms[i] > 0]
    for seed in sorted(seeds, key=lambda i: (-op_ms[i], i)):
        if taken[seed]:
            continue
        members = _gather(graph, op_ms, sets, successors, taken, seed)
        for index in members:
            taken[index] = True
        ops = tuple(sorted(members))
        units.append(Unit(seed=seed, ops=ops, duration_ms=sum(op_ms[i] for i in ops)))
    return tuple(sorted(units, key=lambda unit: unit.seed))


def _gather(
    graph: Graph,
    op_ms: Sequence[float],
    sets: Sequence[int],
    successors: Sequence[Sequence[int]],
    taken: Sequence[bool],
    seed: int,
) -> set[int]:
    """``seed`` with its exclusive neighbours, found outwards from it."""
    members = {seed}
    queue = [seed]
    limit_ms = CHEAP_SHARE * op_ms[seed]
    outputs = set(graph.outputs)

    def fits(index: int) -> bool:
        op = graph.ops[index]
        return (
            index not in members
            and not taken[index]
            and not _fixed(op)
            and op.phase == graph.ops[seed].phase
            and (op.is_view or op_ms[index] <= limit_ms)
        )

    while queue:
        index = queue.pop()
        for earlier in graph.predecessors[index]:
            made = graph.ops[earlier].outputs
            exclusive = members.issuperset(successors[earlier]) and not any(t.name in outputs for t in made)
            if fits(earlier) and exclusive:
                members.add(earlier)
                queue.append(earlier)
        for later in successors[index]:
            own = (i for i in graph.predecessors[later] if graph.ops[i].phase == graph.ops[later].phase)
            # One that could hide more all-to-alls than the seed is better left to them.
            if fits(later) and sets[later] == sets[seed] and members.issuperset(own):
                members.add(later)
                queue.append(later)
    return members
