"""The costs that a step is planned by if none are given: measured on this machine, on all ranks together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from llmsys.lancet.passes.calls import operands, outputs_of
from llmsys.lancet.passes.capture import Captured
from llmsys.lancet.runtime.measured_costs import MeasuredCosts, measure_costs
from llmsys.lancet.runtime.messages import measure_all_to_all
from llmsys.lancet.runtime.profile_cache import ProfileCache, default_cache_file
from llmsys.lancet.runtime.profiler import Bench

_ROW_BYTES = 1024
_PART_SIZES = (1, 2, 4, 8)


def measured_step_costs(captured: Captured) -> MeasuredCosts:
    """Operators by the profiler, whose cache is a file of the user's; all-to-alls on the step's first group.

    Takes seconds to minutes the first time. All ranks call it together, with equal graphs. Blocks.
    """
    graph = captured.graph
    sizes = {graph.tensors[graph.ops[op].inputs[0]].size_bytes for op in graph.comm_ops("all_to_all")}
    name = captured.groups[graph.ops[graph.comm_ops()[0]].group]
    group = distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]
    smallest = _ROW_BYTES * 2 * group.size()  # what measure_all_to_all needs
    tried = {max(size // part, smallest) for size in sizes for part in _PART_SIZES} | {smallest, 4 * smallest}
    link = measure_all_to_all(sorted(tried), group, row_bytes=_ROW_BYTES)
    bench = Bench(ProfileCache(default_cache_file()), device=_device(captured).type)
    return measure_costs(captured, bench, link, group=dist.group.WORLD)


def _device(captured: Captured) -> torch.device:
    for node in captured.forward.graph.nodes:
        for used in operands(node):
            value = outputs_of(used)[0]
            if isinstance(value, torch.Tensor):
                return value.device
    return torch.device("cpu")
