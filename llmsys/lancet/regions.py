"""The instructions of a region: what is cut and joined, which ops run whole, and in which order all of it runs.

A region lists only the ops that are split. The other ops of its span run before the parts, or after them if they need
something that the parts make. The order is that of `pipeline.walk`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import inf

from llmsys.core.errors import InputError
from llmsys.lancet.axis_csp import AFTER, BEFORE, SPLIT
from llmsys.lancet.costs import CostModel
from llmsys.lancet.graph import REPLICATED, Graph
from llmsys.lancet.pipeline import COMPUTE, Durations, Pipeline, Step, end_times, walk
from llmsys.lancet.plan import Instruction, Join, Region, Run, Slice, Start, Wait

_OPS: Mapping[str, Callable[..., Instruction]] = {"run": Run, "start": Start, "wait": Wait}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A range of ops as a `Pipeline`, and what its numbers stand for.

    Op j of the pipeline is ``ops[j]`` of the graph; ``places[j]`` is the split it uses, None if it runs whole.
    ``slices`` and ``joins``: (tensor, axis).
    """

    ops: tuple[int, ...]
    places: tuple[int | None, ...]
    slices: tuple[tuple[str, int], ...]
    joins: tuple[tuple[str, int], ...]
    pipeline: Pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Times under one cost model; each question is asked once. ``launch_ms`` of the cost model is optional."""

    graph: Graph
    costs: CostModel
    _known: dict[tuple[object, ...], float] = field(default_factory=dict)

    def durations(self, layout: Layout, num_parts: int) -> Durations:
        ops = layout.ops
        counts = [1 if place is None else num_parts for place in layout.places]
        launches = [self._launch(*of) for of in zip(ops, layout.places, counts, strict=True)]
        return Durations(
            ops_ms=tuple(self.op_ms(*of, num_parts) for of in zip(ops, layout.places, strict=True)),
            starts_ms=tuple(launch[0] for launch in launches),
            waits_ms=tuple(launch[1] for launch in launches),
            slices_ms=tuple(self._copy("slice", *of, num_parts) for of in layout.slices),
            joins_ms=tuple(self._copy("join", *of, num_parts) for of in layout.joins),
        )

    def times_ms(self, layout: Layout, counts: Sequence[int]) -> list[float]:
        """How long a range takes in each number of parts, from idle lanes to the end of its last instruction."""
        return end_times(layout.pipeline, [self.durations(layout, count) for count in counts], counts)

    def op_ms(self, index: int, place: int | None = None, num_parts: int = 1) -> float:
        """Of one part of an op, or of the whole where ``place`` is None."""
        key = (index, place, 1 if place is None else num_parts)
        if key not in self._known:
            op = self.graph.ops[index]
            whole = place is None
            split = None if place is None else op.splits[place]
            op_ms = self.costs.op_ms(self.graph, op, 1 if whole else num_parts, split)
            self._known[key] = self._checked(op_ms, f"op {op.name!r}")
        return self._known[key]

    def _launch(self, index: int, place: int | None, num_parts: int) -> tuple[float, float]:
        launch_ms = getattr(self.costs, "launch_ms", None)
        op = self.graph.ops[index]
        if launch_ms is None or not op.is_comm:
            return 0.0, 0.0
        start_ms, wait_ms = launch_ms(self.graph, op, num_parts, None if place is None else op.splits[place])
        return start_ms, wait_ms

    def _copy(self, verb: str, tensor: str, axis: int, num_parts: int) -> float:
        key = (verb, tensor, axis, num_parts)
        if key not in self._known:
            price = self.costs.slice_ms if verb == "slice" else self.costs.join_ms
            copy_ms = price(self.graph.tensors[tensor], axis, num_parts)
            self._known[key] = self._checked(copy_ms, f"the {verb} of tensor {tensor!r}")
        return self._known[key]

    def _checked(self, time_ms: float, what: str) -> float:
        if not 0.0 <= time_ms < inf:
            raise InputError(
                f"costs {self.costs.name!r} give no usable time of {what} of graph {self.graph.name!r}",
                expected="a finite number of ms, 0 or more",
                found=repr(time_ms),
                fix="mend the cost model or the table that it reads",
            )
        return time_ms


def span(graph: Graph, region: Region) -> tuple[int, int]:
    """The first and the last op of a region. InputError for a region without ops, or with an unknown op or split."""
    known = all(
        0 <= op < len(graph.ops) and 0 <= place < len(graph.ops[op].splits)
        for op, place in zip(region.ops, region.splits, strict=False)
    )
    if not region.ops or len(region.ops) != len(region.splits) or not known or list(region.ops) != sorted(region.ops):
        raise InputError(
            f"this is no region of graph {graph.name!r}",
            expected="ops of the graph, increasing, and for each the place of one of its splits",
            found=f"ops {region.ops}, splits {region.splits}",
            fix="take regions from choose_regions or capacity_region",
        )
    return region.ops[0], region.ops[-1]


def emit(graph: Graph, number: int, region: Region, costs: CostModel) -> list[Instruction]:
    """All instructions of the ops in the span of ``region``, which is region ``number`` of its plan.

    Each op is there once, or once for each part, in an order that is valid if what comes from before the span is
    there. Communication of the span is waited for inside. What the parts make and whole ops use, in the span or later,
    is joined inside. InputError if an op of the region needs something that only an op after the parts makes.
    """
    first, last = span(graph, region)
    found = layout(graph, first, last, dict(zip(region.ops, region.splits, strict=True)))
    durations = Prices(graph=graph, costs=costs).durations(found, region.num_parts)
    return [_instruction(found, number, step) for step in walk(found.pipeline, durations, region.num_parts).steps]


def _instruction(found: Layout, number: int, step: Step) -> Instruction:
    if step.verb == "slice":
        tensor, axis = found.slices[step.number]
        return Slice(region=number, tensor=tensor, axis=axis)
    if step.verb == "join":
        tensor, axis = found.joins[step.number]
        return Join(region=number, tensor=tensor, axis=axis)
    return _OPS[step.verb](op=found.ops[step.number], part=step.part)


def layout(graph: Graph, first: int, last: int, places: Mapping[int, int]) -> Layout:
    """The ops from ``first`` to ``last`` (both included), of which ``places`` says which run in parts and how."""
    ops = _order(graph, range(first, last + 1), places)
    number_of = {op: number for number, op in enumerate(ops)}
    roles = _roles(graph, range(first, last + 1), places)
    lanes = sorted({graph.ops[i].group for i in ops if graph.ops[i].is_comm})
    slices, own_slices = _slices(graph, ops, places)
    joins, uses = _joins(graph, ops, places)
    waits = [
        tuple(
            number_of[before]
            for before in graph.predecessors[i]
            if before >= first and graph.ops[before].is_comm and (before not in places or i in places)
        )
        for i in ops
    ]
    pipeline = Pipeline(
        roles=tuple(roles[i] for i in ops),
        lanes=tuple(lanes.index(graph.ops[i].group) if graph.ops[i].is_comm else COMPUTE for i in ops),
        waits=tuple(waits),
        slices=own_slices,
        joins=tuple(number_of[graph.producers[name]] for name, _ in joins),
        uses=uses,
    )
    return Layout(ops=ops, places=tuple(map(places.get, ops)), slices=slices, joins=joins, pipeline=pipeline)


def _order(graph: Graph, window: range, places: Mapping[int, int]) -> tuple[int, ...]:
    """The graph's order, but in a stage of computation what needs the communication right before it comes last.

    So a part of a shared expert runs while the results of the same part's other experts are on their way.
    """
    split = [i for i in window if i in places]
    ordered: list[int] = []
    comm = 0
    for is_comm, run in groupby(split, lambda i: graph.ops[i].is_comm):
        stage = list(run)
        if is_comm:
            comm = sum(1 << i for i in stage)
        elif sum(graph.ops[i].random for i in stage) < 2:
            late = [i for i in stage if graph.ancestors[i] & comm]
            stage = [*(i for i in stage if i not in late), *late]
        ordered += stage
    source = iter(ordered)
    return tuple(next(source) if i in places else i for i in window)


def _roles(graph: Graph, window: range, places: Mapping[int, int]) -> Mapping[int, int]:
    roles: dict[int, int] = {}
    has_drawn = False
    for index in window:
        op = graph.ops[index]
        after = [i for i in graph.predecessors[index] if roles.get(i) == AFTER]
        if index in places:
            roles[index] = SPLIT
            if after:
                raise InputError(
                    f"op {op.name!r} of graph {graph.name!r} cannot run in parts in this region",
                    expected="a region in which no op between two others runs whole",
                    found=f"it needs op {graph.ops[after[0]].name!r}, which runs whole and needs parts itself",
                    fix="take regions from choose_regions or capacity_region",
                )
        else:
            needs_parts = after or any(i in places and i >= window.start for i in graph.predecessors[index])
            roles[index] = AFTER if needs_parts or (op.random and has_drawn) else BEFORE
        has_drawn |= op.random and roles[index] != BEFORE
    return roles


def _slices(
    graph: Graph, ops: Sequence[int], places: Mapping[int, int]
) -> tuple[tuple[tuple[str, int], ...], tuple[tuple[int, ...], ...]]:
    """What is cut, in the order of first use, and which of it each op is the first to use."""
    numbers: dict[tuple[str, int], int] = {}
    own: list[tuple[int, ...]] = []
    for index in ops:
        num_before = len(numbers)
        if index in places:
            op = graph.ops[index]
            for name, axis in zip(op.inputs, op.splits[places[index]].inputs, strict=True):
                is_whole = graph.producers.get(name) not in places
                if axis != REPLICATED and is_whole:
                    numbers.setdefault((name, axis), len(numbers))
        own.append(tuple(range(num_before, len(numbers))))
    return tuple(numbers), tuple(own)


def _joins(
    graph: Graph, ops: Sequence[int], places: Mapping[int, int]
) -> tuple[tuple[tuple[str, int], ...], tuple[tuple[int, ...], ...]]:
    """What is joined, in the order in which it is made, and what of it each op of the range needs."""
    outputs = frozenset(graph.outputs)
    joins: list[tuple[str, int]] = []
    uses: dict[int, list[int]] = {op: [] for op in ops}
    for index in ops:
        if index not in places:
            continue
        op = graph.ops[index]
        for tensor, axis in zip(op.outputs, op.splits[places[index]].outputs, strict=True):
            whole = [i for i in graph.consumers[tensor.name] if i not in places]
            if axis == REPLICATED or not (whole or tensor.name in outputs):
                continue
            for user in whole:
                if user in uses:
                    uses[user].append(len(joins))
            joins.append((tensor.name, axis))
    return tuple(joins), tuple(map(tuple, uses.values()))
