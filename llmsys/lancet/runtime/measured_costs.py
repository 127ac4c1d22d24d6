"""Costs of a captured step that were measured on this machine: a `CostModel` for planners and the simulator.

All ranks measure at the same time, so that each has the share of memory bandwidth that it has in a step, and then use
the means of their times: planners need equal costs on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from llmsys.core.errors import InputError
from llmsys.lancet.costs import MessageTable
from llmsys.lancet.graph import LAST, PARTIAL, Graph, Op, Split, Tensor, is_irregular
from llmsys.lancet.passes.capture import Captured
from llmsys.lancet.runtime import irregular
from llmsys.lancet.runtime.messages import LinkTimes
from llmsys.lancet.runtime.op_calls import OpCall
from llmsys.lancet.runtime.profiler import Bench, Prepared

Curve = tuple[tuple[int, float], ...]
"""Times of one part, in ms, by the number of parts."""

_COPY_SIZES = tuple(1 << power for power in range(14, 26, 2))
_COPY_ROW_BYTES = 1024
_COPIES = ("cat", "add", "rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCosts:
    """Times by op name. Of ops that can be split, curves of one part's time by (op name, place of the split).

    Numbers of parts between those measured are interpolated in the time of all parts together; beyond them it stays.
    ``copies``: "cat" of the parts of a tensor, "add" of two tensors, "rows" of an irregular join, by bytes.
    """

    name: str
    ops_ms: Mapping[str, float]
    parts_ms: Mapping[tuple[str, int], Curve]
    copies: Mapping[str, MessageTable]
    link: LinkTimes
    comm_kinds: Mapping[str, str] = field(default_factory=dict)

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
        """Slices are views; those of a dimension with the capacity inside an outer factor are taken for views too."""
        return 0.0

    def join_ms(self, tensor: Tensor, axis: int, num_parts: int) -> float:
        if axis == LAST:
            return 0.0
        if axis == PARTIAL:
            return (num_parts - 1) * self.copies["add"].time_ms(tensor.size_bytes)
        return self.copies["rows" if is_irregular(axis) else "cat"].time_ms(tensor.size_bytes)

    def launch_ms(self, graph: Graph, op: Op, num_parts: int) -> tuple[float, float]:
        """What the compute lane needs to start a communication, and to take over what has arrived."""
        size = graph.tensors[op.inputs[0]].size_bytes / num_parts
        times = self.link.of("dense" if num_parts == 1 else self.comm_kinds.get(op.name, "dense"))
        return times.start.time_ms(size), times.wait.time_ms(size)

    def _comm_ms(self, graph: Graph, op: Op, num_parts: int, split: Split | None) -> float:
        if op.kind != "all_to_all":
            raise InputError(
                f"there is no measured time of {op.kind} {op.name!r} of graph {graph.name!r}",
                expected="all-to-alls only",
                found=op.target,
                fix="leave other collectives out of the step, or use costs with a table of them",
            )
        irregular_part = split is not None and is_irregular(split.inputs[0])
        kind = self.comm_kinds.get(op.name, "dense") if irregular_part else "dense"
        return self.link.of(kind).lane.time_ms(graph.tensors[op.inputs[0]].size_bytes / num_parts)

    def _found(self, table: Mapping[Any, Any], key: object, graph: Graph) -> Any:
        if key not in table:
            raise InputError(
                f"there is no measured time of {key!r} of graph {graph.name!r}",
                expected=f"an op of the step that was measured for costs {self.name!r}",
                found=f"{len(table)} other ops",
                fix="measure the step that is to be planned",
            )
        return table[key]


def measure_costs(
    captured: Captured,
    bench: Bench,
    link: LinkTimes,
    *,
    num_parts: Sequence[int] = (2, 4, 8),
    group: dist.ProcessGroup | None = None,
) -> MeasuredCosts:
    """Measure every op of the step, whole and in these numbers of parts, and the copies; saves the bench's cache.

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
    copies = dict(zip(_COPIES, _copy_tables(bench), strict=True))
    bench.cache.save()
    costs = MeasuredCosts(
        name=f"measured: {bench.environment}",
        ops_ms=ops_ms,
        parts_ms=parts_ms,
        copies=copies,
        link=link,
        comm_kinds={graph.ops[op].name: _comm_kind(graph, op) for op in graph.comm_ops("all_to_all")},
    )
    return _averaged(costs, group)


def _comm_kind(graph: Graph, index: int) -> str:
    """Whether an irregular all-to-all leads to the experts or back: before it, over views, a gate's rows or not."""
    op = graph.ops[index]
    while op.inputs and op.inputs[0] in graph.producers:
        op = graph.ops[graph.producers[op.inputs[0]]]
        if not op.is_view:
            break
    return "there" if op.target.startswith("llmsys.moe_dispatch") else "back"


def _averaged(costs: MeasuredCosts, group: dist.ProcessGroup | None) -> MeasuredCosts:
    if not dist.is_initialized():
        return costs
    everyones: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, (costs.ops_ms, costs.parts_ms, costs.copies), group=group)
    ops_ms = {name: _mean(ranks[0][name] for ranks in everyones) for name in costs.ops_ms}
    parts_ms = {
        key: tuple((k, _mean(ranks[1][key][place][1] for ranks in everyones)) for place, (k, _) in enumerate(curve))
        for key, curve in costs.parts_ms.items()
    }
    copies = {
        name: MessageTable(
            sizes_bytes=table.sizes_bytes,
            ms=tuple(_mean(ranks[2][name].ms[place] for ranks in everyones) for place in range(len(table.ms))),
        )
        for name, table in costs.copies.items()
    }
    return MeasuredCosts(
        name=costs.name, ops_ms=ops_ms, parts_ms=parts_ms, copies=copies, link=costs.link, comm_kinds=costs.comm_kinds
    )


def _mean(values: Iterator[float]) -> float:
    return float(np.mean(list(values)))


def _copy_tables(bench: Bench) -> tuple[MessageTable, ...]:
    """Of `_COPIES`: of two parts, into a whole of each size."""
    makers = {"cat": _cat, "add": _add, "rows": _join_rows}
    tables = []
    for what in _COPIES:
        make = makers[what]
        ms = [
            bench.time_ms(f"{what} {size} bytes", lambda make=make, size=size: make(size, bench.device))  # type: ignore[misc]
            for size in _COPY_SIZES
        ]
        rising = tuple(np.maximum.accumulate(ms).tolist())  # noise must not make a larger copy faster
        tables.append(MessageTable(sizes_bytes=tuple(map(float, _COPY_SIZES)), ms=rising))
    return tuple(tables)


def _halves(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    rows = size // _COPY_ROW_BYTES // 2
    first, second = (torch.ones(rows, _COPY_ROW_BYTES // 4, device=device) for _ in range(2))
    return first, second


def _cat(size: int, device: torch.device) -> Prepared:
    parts = _halves(size, device)
    return Prepared(run=lambda: torch.cat(parts), hot=parts)


def _add(size: int, device: torch.device) -> Prepared:
    first, second = (torch.ones(size // 4, device=device) for _ in range(2))
    return Prepared(run=lambda: first + second, hot=(first, second))


def _join_rows(size: int, device: torch.device) -> Prepared:
    """Two full parts of two experts."""
    rows = size // _COPY_ROW_BYTES // 2
    order = torch.arange(rows, device=device)[:, None]
    x = torch.ones(rows, _COPY_ROW_BYTES // 4, device=device)
    parts = [irregular.dispatch(x, order % 2, order // 2 + half * (rows // 2), 2) for half in range(2)]
    buffers, of_parts = [buffer for buffer, _ in parts], [rows_of for _, rows_of in parts]
    shape = (2, rows, _COPY_ROW_BYTES // 4)
    run = lambda: irregular.join(buffers, of_parts, rows, ("g", "e", "c"), shape=shape)  # noqa: E731
    return Prepared(run=run, hot=tuple(buffers))
