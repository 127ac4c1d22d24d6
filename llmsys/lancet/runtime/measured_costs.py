"""Costs of a captured step that were measured on this machine: a `CostModel` for planners and the simulator.

All ranks measure at the same time, so that each has the share of memory bandwidth that it has in a step, and then use
the same times, made of all ranks': planners need equal costs everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch.distributed as dist

from llmsys.core.errors import InputError
from llmsys.lancet.costs import MessageTable
from llmsys.lancet.graph import LAST, PARTIAL, Graph, Op, Split, Tensor, is_irregular
from llmsys.lancet.passes.capture import Captured
from llmsys.lancet.runtime.collectives import CollectiveTimes, measure_collectives
from llmsys.lancet.runtime.copies import copied_slices, measure_copies
from llmsys.lancet.runtime.messages import LinkTimes, MessageTimes
from llmsys.lancet.runtime.op_calls import OpCall
from llmsys.lancet.runtime.profiler import Bench

Curve = tuple[tuple[int, float], ...]
"""Times of one part, in ms, by the number of parts."""

_MAX_TAKEN = 0.9  # of a message's time: noise in what it takes must not leave nothing on its lane


@dataclass(frozen=True, slots=True, kw_only=True)
class IrregularMessage:
    """``kind``: "there", to the experts, or "back". ``fill``: the share of the buffer's rows that can be filled, since
    there are no more than choices; only these are sent.
    """

    kind: str
    fill: float


_DENSE = IrregularMessage(kind="dense", fill=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCosts:
    """Times by op name. Of ops that can be split, curves of one part's time by (op name, place of the split).

    Numbers of parts between those measured are interpolated in the time of all parts together; beyond them it stays.
    ``copies``: see `measure_copies`; ``copied_slices``: the (tensor, axis) of which parts are no views.
    ``links``: all-to-alls, by the graph's lanes; ``collectives``: all other communication, by op name.
    ``irregular``: what all-to-alls do in irregular parts, by op name.
    """

    name: str
    ops_ms: Mapping[str, float]
    parts_ms: Mapping[tuple[str, int], Curve]
    copies: Mapping[str, MessageTable]
    links: Mapping[str, LinkTimes]
    collectives: Mapping[str, CollectiveTimes] = field(default_factory=dict)
    irregular: Mapping[str, IrregularMessage] = field(default_factory=dict)
    copied_slices: frozenset[tuple[str, int]] = frozenset()

    def op_ms(self, graph: Graph, op: Op, num_parts: int = 1, split: Split | None = None) -> float:
        if op.is_view:
            return 0.0
        if op.is_comm:
            return self._comm_ms(graph, op, num_parts, split)
        if num_parts == 1 or split is None:
            return float(self._found(self.ops_ms, op.name, graph))
        curve = self._found(self.parts_ms, (op.name, op.splits.index(split)), graph)
        all_parts = np.interp(num_parts, [k for k, _ in curve], [k * ms for k, ms in curve])
        return float(all_parts) / num_parts

    def slice_ms(self, tensor: Tensor, axis: int, num_parts: int) -> float:
        is_copied = num_parts > 1 and (tensor.name, axis) in self.copied_slices
        return self.copies["slice"].time_ms(tensor.size_bytes) if is_copied else 0.0

    def join_ms(self, tensor: Tensor, axis: int, num_parts: int) -> float:
        if axis == LAST:
            return 0.0
        if axis == PARTIAL:
            return (num_parts - 1) * self.copies["add"].time_ms(tensor.size_bytes)
        return self.copies["rows" if is_irregular(axis) else "cat"].time_ms(tensor.size_bytes)

    def launch_ms(self, graph: Graph, op: Op, num_parts: int, split: Split | None = None) -> tuple[float, float]:
        """What the compute lane needs for a communication: from its start on, and to take over what has arrived.

        What the communication takes of computation beside it is counted at its start, and not on its own lane.
        """
        if op.kind != "all_to_all":
            return self._collective(graph, op).start_ms, 0.0
        times, size = self._message(graph, op, num_parts, split)
        taken_ms, _ = _shares(times, size, num_parts)
        return times.start.time_ms(size) + taken_ms, times.wait.time_ms(size)

    def _comm_ms(self, graph: Graph, op: Op, num_parts: int, split: Split | None) -> float:
        if op.kind != "all_to_all":
            return self._collective(graph, op).lane_ms
        return _shares(*self._message(graph, op, num_parts, split), num_parts)[1]

    def _message(self, graph: Graph, op: Op, num_parts: int, split: Split | None) -> tuple[MessageTimes, float]:
        """The tables of an all-to-all, and the bytes at which to read them."""
        is_irregular_part = split is not None and is_irregular(split.inputs[0])
        form = self.irregular.get(op.name, _DENSE) if is_irregular_part else _DENSE
        link: LinkTimes = self._found(self.links, op.group, graph)
        return link.of(form.kind), form.fill * graph.tensors[op.inputs[0]].size_bytes / num_parts

    def _collective(self, graph: Graph, op: Op) -> CollectiveTimes:
        found: CollectiveTimes = self._found(self.collectives, op.name, graph)
        return found

    def _found(self, table: Mapping[Any, Any], key: object, graph: Graph) -> Any:
        if key not in table:
            raise InputError(
                f"there is no measured time of {key!r} of graph {graph.name!r}",
                expected=f"an op of the step that was measured for costs {self.name!r}",
                found=f"{len(table)} other ops",
                fix="measure the step that is to be planned",
            )
        return table[key]


def _shares(times: MessageTimes, size: float, num_parts: int) -> tuple[float, float]:
    """What an all-to-all takes of computation beside it, and what is left of its time on the lane."""
    lane = times.lane if num_parts == 1 else times.stream
    lane_ms = lane.time_ms(size)
    taken_ms = min(times.taken.time_ms(size), _MAX_TAKEN * lane_ms)
    return taken_ms, lane_ms - taken_ms


def measure_costs(
    captured: Captured,
    bench: Bench,
    links: Mapping[str, LinkTimes],
    *,
    num_parts: Sequence[int] = (2, 4, 8),
    group: dist.ProcessGroup | None = None,
) -> MeasuredCosts:
    """Measure every op of the step, whole and in these numbers of parts, and the copies; saves the bench's cache.

    ``links``: of each lane of the graph that has all-to-alls. Other collectives are measured here.
    Equal ops are measured once. With torch.distributed initialised all ranks of ``group`` have to call this together.
    """
    ops_ms: dict[str, float] = {}
    parts_ms: dict[tuple[str, int], Curve] = {}
    graph = captured.graph
    for index, op in enumerate(graph.ops):
        if op.is_comm or op.is_view:
            continue
        ops_ms[op.name] = OpCall(captured, index).time_ms(bench)
        for place, split in enumerate(op.splits):
            curve = [(k, OpCall(captured, index, split, k).time_ms(bench)) for k in num_parts]
            parts_ms[op.name, place] = ((1, ops_ms[op.name]), *curve)
    copies = measure_copies(bench)
    bench.cache.save()
    costs = MeasuredCosts(
        name=f"measured: {bench.environment}",
        ops_ms=ops_ms,
        parts_ms=parts_ms,
        copies=copies,
        links=links,
        collectives=measure_collectives(captured, bench.device),
        irregular={graph.ops[op].name: _irregular_message(captured, op) for op in graph.comm_ops("all_to_all")},
        copied_slices=copied_slices(captured),
    )
    return averaged(costs, group)


def _irregular_message(captured: Captured, index: int) -> IrregularMessage:
    """Before an all-to-all to the experts, over views, stands the dispatch of a gate's rows; before one back does not.

    Either has the rows of the last dispatch before it.
    """
    graph = captured.graph
    dispatches = [
        i
        for i, op in enumerate(graph.ops[:index])
        if op.target.startswith("llmsys.moe_dispatch") and graph.ancestors[index] >> i & 1
    ]
    if not dispatches:
        return IrregularMessage(kind="back", fill=1.0)
    choices = math.prod(graph.tensors[graph.ops[dispatches[-1]].inputs[1]].shape)
    slots = math.prod(graph.ops[dispatches[-1]].outputs[0].shape[:2])
    source = index
    while graph.ops[source].inputs[0] in graph.producers and (source == index or graph.ops[source].is_view):
        source = graph.producers[graph.ops[source].inputs[0]]
    return IrregularMessage(kind="there" if source in dispatches else "back", fill=min(1.0, choices / slots))


def averaged(costs: MeasuredCosts, group: dist.ProcessGroup | None) -> MeasuredCosts:
    """Means of the ranks' times, but of operators in proportion to those of the slowest rank: at each all-to-all all
    ranks wait for it.
    """
    if not dist.is_initialized():
        return costs
    everyones: list[Any] = [None] * dist.get_world_size(group)
    mine = (costs.ops_ms, costs.parts_ms, costs.copies, costs.links, costs.collectives)
    dist.all_gather_object(everyones, mine, group=group)
    totals = [sum(ops_ms.values()) for ops_ms, *_ in everyones]
    slower = max(totals) * len(totals) / sum(totals) if sum(totals) else 1.0
    ops_ms, parts_ms, copies, links, collectives = _mean(everyones)
    return replace(
        costs,
        ops_ms={name: slower * ms for name, ms in ops_ms.items()},
        parts_ms={key: tuple((k, slower * ms) for k, ms in curve) for key, curve in parts_ms.items()},
        copies=copies,
        links=links,
        collectives=collectives,
    )


def _mean(values: Sequence[Any]) -> Any:
    """The mean of each number with a fraction in equally built values; all else is the first one's."""
    first = values[0]
    if isinstance(first, float):
        return float(np.mean(values))
    if isinstance(first, Mapping):
        return {key: _mean([value[key] for value in values]) for key in first}
    if isinstance(first, tuple):
        return tuple(_mean(column) for column in zip(*values, strict=True))
    if is_dataclass(first):
        return replace(first, **{f.name: _mean([getattr(v, f.name) for v in values]) for f in fields(first)})  # type: ignore[type-var]
    return first
