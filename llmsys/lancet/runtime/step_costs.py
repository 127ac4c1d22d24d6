"""The costs that a step is planned by if none are given: measured on this machine, on all ranks together."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from llmsys.lancet.passes.calls import operands, outputs_of
from llmsys.lancet.passes.capture import Captured
from llmsys.lancet.runtime.measured_costs import MeasuredCosts, measure_costs
from llmsys.lancet.runtime.messages import LinkTimes, group_of, measure_all_to_all
from llmsys.lancet.runtime.profile_cache import ProfileCache, default_cache_file
from llmsys.lancet.runtime.profiler import Bench

_ROW_BYTES = 1024
_PART_SIZES = (1, 2, 4, 8)


_log = logging.getLogger(__name__)


def measured_step_costs(captured: Captured, group: dist.ProcessGroup | None = None) -> MeasuredCosts:
    """Operators by the profiler, whose cache is a file of the user's; communication on the groups of the step.

    Takes seconds to minutes the first time. All ranks of ``group`` (None: all) call it together, with equal graphs.
    Blocks. A step may have several groups, also ones that overlap: all ranks measure lane after lane, in the order of
    the graph.
    """
    cache = default_cache_file()
    if dist.get_rank(group) == 0:
        _log.warning("lancet: measuring %d operators and their all-to-alls, see %s", len(captured.graph.ops), cache)
    links = {lane: found for lane in captured.groups if (found := _link(captured, lane)) is not None}
    bench = Bench(ProfileCache(cache), device=_device(captured).type)
    return measure_costs(captured, bench, links, group=group or dist.group.WORLD)


def _link(captured: Captured, lane: str) -> LinkTimes | None:
    """Times of the all-to-alls of one lane; None if it has none."""
    graph = captured.graph
    all_to_alls = [graph.ops[op] for op in graph.comm_ops("all_to_all") if graph.ops[op].group == lane]
    if not all_to_alls:
        return None
    group = group_of(captured.groups[lane])
    sizes = {graph.tensors[op.inputs[0]].size_bytes for op in all_to_alls}
    smallest = _ROW_BYTES * 2 * group.size()  # what measure_all_to_all needs
    tried = {max(size // part, smallest) for size in sizes for part in _PART_SIZES} | {smallest, 4 * smallest}
    return measure_all_to_all(sorted(tried), group, row_bytes=_ROW_BYTES)


def _device(captured: Captured) -> torch.device:
    for node in captured.forward.graph.nodes:
        for used in operands(node):
            value = outputs_of(used)[0]
            if isinstance(value, torch.Tensor):
                return value.device
    return torch.device("cpu")
