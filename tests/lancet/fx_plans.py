"""Plans for tests of the passes, made without costs: as captured, in random order, and with ops in parts."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from llmsys.lancet.graph import LAST, PARTIAL, REPLICATED, Graph, Op, Split
from llmsys.lancet.plan import Estimate, Instruction, Join, Plan, Region, Run, Slice, Start, Wait

NOTHING = Estimate(step_ms=0.0, compute_ms=0.0, comm_ms=0.0, exposed_comm_ms=0.0, peak_mb=0.0, captured_peak_mb=0.0)


def plan_of(graph: Graph, instructions: Iterable[Instruction], regions: Sequence[Region] = ()) -> Plan:
    return Plan(
        planner="test",
        graph_name=graph.name,
        fingerprint=graph.fingerprint,
        instructions=tuple(instructions),
        regions=tuple(regions),
        hidden_under={},
        estimate=NOTHING,
    )


def whole(op: Op, index: int) -> list[Instruction]:
    return [Start(op=index), Wait(op=index)] if op.is_comm else [Run(op=index)]


def as_captured(graph: Graph) -> Plan:
    return plan_of(graph, [i for index, op in enumerate(graph.ops) for i in whole(op, index)])


def random_order(graph: Graph, seed: int) -> Plan:
    """A random valid order: starts of collectives in the captured order, waits anywhere before the first use."""
    rng = random.Random(seed)
    instructions: list[Instruction] = []
    for phase in ("forward", "backward"):
        todo = list(graph.select(phase))  # type: ignore[arg-type]
        done = {i for i in range(len(graph.ops)) if graph.ops[i].phase != phase or phase == "backward"} - set(todo)
        flying: list[int] = []
        while todo or flying:
            first = {k: next((i for i in todo if ordered(graph.ops[i]) == k), None) for k in ("comm", "random")}
            ready = [i for i in todo if set(graph.predecessors[i]) <= done and first.get(ordered(graph.ops[i]), i) == i]
            pick = rng.choice([*ready, *flying])
            if pick in flying:
                flying.remove(pick)
                instructions.append(Wait(op=pick))
                done.add(pick)
                continue
            todo.remove(pick)
            if graph.ops[pick].is_comm:
                flying.append(pick)
                instructions.append(Start(op=pick))
            else:
                instructions.append(Run(op=pick))
                done.add(pick)
    return plan_of(graph, instructions)


def ordered(op: Op) -> str:
    return "comm" if op.is_comm else "random" if op.random else ""


def one_op_in_parts(graph: Graph, index: int, place: int, num_parts: int) -> Plan:
    return ranged(graph, {index: place}, num_parts)


def ranged(graph: Graph, chosen: dict[int, int], num_parts: int) -> Plan:
    """The ops of ``chosen`` (op: split), all of one phase, in parts, part by part op by op; all others whole.

    Ops between them that need a part's result come after the region, all else before.
    """
    region = Region(num_parts=num_parts, ops=tuple(sorted(chosen)), splits=tuple(chosen[i] for i in sorted(chosen)))
    needs_region = 0
    for index in range(len(graph.ops)):
        if index in chosen or graph.ancestors[index] & (needs_region | _bits(chosen)):
            needs_region |= 1 << index
    phase = graph.ops[min(chosen)].phase
    others = [i for i in range(len(graph.ops)) if i not in chosen]
    before = [
        i
        for i in others
        if (graph.ops[i].phase, phase) == ("forward", "backward")
        or (graph.ops[i].phase == phase and not needs_region >> i & 1)
    ]
    after = [i for i in others if i not in before]
    instructions = [i for index in before for i in whole(graph.ops[index], index)]
    instructions += parts_of(graph, region)
    instructions += [i for index in after for i in whole(graph.ops[index], index)]
    return plan_of(graph, instructions, [region])


def _bits(ops: Iterable[int]) -> int:
    return sum(1 << i for i in ops)


def parts_of(graph: Graph, region: Region) -> list[Instruction]:
    """Slices, then op by op all parts (all starts before the first wait), then joins of what is used outside."""
    made: dict[str, int] = {}
    sliced: dict[tuple[str, int], None] = {}
    body: list[Instruction] = []
    for index, place in zip(region.ops, region.splits, strict=True):
        op = graph.ops[index]
        split = op.splits[place]
        for name, axis in zip(op.inputs, split.inputs, strict=True):
            if axis != REPLICATED and name not in made:
                sliced[name, axis] = None
        made.update({t.name: axis for t, axis in zip(op.outputs, split.outputs, strict=True)})
        parts = range(region.num_parts)
        if op.is_comm:
            body += [Start(op=index, part=p) for p in parts]
            body += [Wait(op=index, part=p) for p in parts]
        else:
            body += [Run(op=index, part=p) for p in parts]
    slices = [Slice(region=0, tensor=name, axis=axis) for name, axis in sliced]
    outside = {n for i, op in enumerate(graph.ops) if i not in region.ops for n in op.inputs} | set(graph.outputs)
    joins = [Join(region=0, tensor=name, axis=axis) for name, axis in made.items() if name in outside]
    return [*slices, *body, *joins]


def random_region(graph: Graph, ops: Sequence[int], seed: int) -> dict[int, int]:
    """Splits for some of ``ops`` that fit each other: an op's cut inputs are cut so by their makers, or come from
    outside; what is replicated comes from outside. Ops that find no such split run whole, and so do their users.
    """
    rng = random.Random(seed)
    axes: dict[str, int] = {}
    blocked: set[str] = set()
    chosen: dict[int, int] = {}
    for index in ops:
        op = graph.ops[index]
        fitting = [p for p, split in enumerate(op.splits) if _fits(op, split, axes, blocked)]
        if fitting and rng.random() < 0.97:
            place = rng.choice(fitting)
            chosen[index] = place
            axes.update({t.name: axis for t, axis in zip(op.outputs, op.splits[place].outputs, strict=True)})
        elif any(name in axes or name in blocked for name in op.inputs):
            blocked.update(tensor.name for tensor in op.outputs)
    return chosen


def _fits(op: Op, split: Split, axes: dict[str, int], blocked: set[str]) -> bool:
    for name, axis in zip(op.inputs, split.inputs, strict=True):
        if name in blocked:
            return False
        if name in axes:
            if axes[name] != axis or axis in (PARTIAL, LAST, REPLICATED):
                return False
        elif axis < REPLICATED:
            return False
    return True
