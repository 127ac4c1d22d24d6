"""The instructions of a region: what is cut and joined, which ops run whole, and in which order all of it runs.

A region lists only the ops that are split. The other ops of its span run before the parts, or after them if they need
something that the parts make. The order is that of `pipeline.walk`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

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

    Op j of the pipeline is ``first + j`` of the graph; ``places[j]`` is the split it uses, None if it runs whole.
    ``slices`` and ``joins``: (tensor, axis).
    """

    first: int
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
        ops = range(layout.first, layout.first + len(layout.places))
        counts = [1 if place is None else num_parts for place in layout.places]
        launches = [self._launch(op, count) for op, count in zip(ops, counts, strict=True)]
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
            self._known[key] = self.costs.op_ms(self.graph, op, 1 if whole else num_parts, split)
        return self._known[key]

    def _launch(self, index: int, num_parts: int) -> tuple[float, float]:
        launch_ms = getattr(self.costs, "launch_ms", None)
        if launch_ms is None or not self.graph.ops[index].is_comm:
            return 0.0, 0.0
        start_ms, wait_ms = launch_ms(self.graph, self.graph.ops[index], num_parts)
        return start_ms, wait_ms

    def _copy(self, verb: str, tensor: str, axis: int, num_parts: int) -> float:
        key = (verb, tensor, axis, num_parts)
        if key not in self._known:
            price = self.costs.slice_ms if verb == "slice" else self.costs.join_ms
            self._known[key] = price(self.graph.tensors[tensor], axis, num_parts)
        return self._known[key]


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
    return _OPS[step.verb](op=found.first + step.number, part=step.part)


def layout(graph: Graph, first: int, last: int, places: Mapping[int, int]) -> Layout:
    """The ops from ``first`` to ``last`` (both included), of which ``places`` says which run in parts and how."""
    window = range(first, last + 1)
    roles = _roles(graph, window, places)
    lanes = sorted({graph.ops[i].group for i in window if graph.ops[i].is_comm})
    slices, own_slices = _slices(graph, window, places)
    joins, uses = _joins(graph, window, places)
    waits = [
        tuple(
            before - first
            for before in graph.predecessors[i]
            if before >= first and graph.ops[before].is_comm and (before not in places or i in places)
        )
        for i in window
    ]
    pipeline = Pipeline(
        roles=roles,
        lanes=tuple(lanes.index(graph.ops[i].group) if graph.ops[i].is_comm else COMPUTE for i in window),
        waits=tuple(waits),
        slices=own_slices,
        joins=tuple(graph.producers[name] - first for name, _ in joins),
        uses=uses,
    )
    return Layout(first=first, places=tuple(map(places.get, window)), slices=slices, joins=joins, pipeline=pipeline)


def _roles(graph: Graph, window: range, places: Mapping[int, int]) -> tuple[int, ...]:
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
    return tuple(roles.values())


def _slices(
    graph: Graph, window: range, places: Mapping[int, int]
) -> tuple[tuple[tuple[str, int], ...], tuple[tuple[int, ...], ...]]:
    """What is cut, in the order of first use, and which of it each op is the first to use."""
    numbers: dict[tuple[str, int], int] = {}
    own: list[tuple[int, ...]] = []
    for index in window:
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
    graph: Graph, window: range, places: Mapping[int, int]
) -> tuple[tuple[tuple[str, int], ...], tuple[tuple[int, ...], ...]]:
    """What is joined, in the order in which it is made, and what of it each op of the range needs."""
    outputs = frozenset(graph.outputs)
    joins: list[tuple[str, int]] = []
    uses: list[list[int]] = [[] for _ in window]
    for index in window:
        if index not in places:
            continue
        op = graph.ops[index]
        for tensor, axis in zip(op.outputs, op.splits[places[index]].outputs, strict=True):
            whole = [i for i in graph.consumers[tensor.name] if i not in places]
            if axis == REPLICATED or not (whole or tensor.name in outputs):
                continue
            for user in whole:
                if user in window:
                    uses[user - window.start].append(len(joins))
            joins.append((tensor.name, axis))
    return tuple(joins), tuple(map(tuple, uses))
