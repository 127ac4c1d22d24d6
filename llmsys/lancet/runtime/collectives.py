"""Collectives of a step other than all-to-alls, measured as the step calls them: on their groups, with their sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from llmsys.core.errors import LlmsysError
from llmsys.lancet.passes.capture import Captured
from llmsys.lancet.runtime.messages import group_of
from llmsys.lancet.runtime.op_calls import OpCall


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveTimes:
    """What the caller needs to start it, and from then until its result is there."""

    start_ms: float
    lane_ms: float


def measure_collectives(
    captured: Captured, device: torch.device, *, num_repeats: int = 5
) -> Mapping[str, CollectiveTimes]:
    """Times by the name of the op, each alone on an idle link; equal calls are measured once.

    The result is this rank's own. Blocks; all ranks of the step call it together, with equal graphs. LlmsysError that
    names the op if its call fails.
    """
    graph = captured.graph
    known: dict[str, CollectiveTimes] = {}
    found: dict[str, CollectiveTimes] = {}
    for index in graph.comm_ops("collective"):
        op, call = graph.ops[index], OpCall(captured, index)
        key = f"{op.group} {call.key()}"
        if key not in known:
            group = group_of(captured.groups[op.group])
            try:
                known[key] = _measured(call.function(device), group, num_repeats)
            except LlmsysError:
                raise
            except Exception as error:
                raise LlmsysError(
                    f"collective {op.name!r} of graph {graph.name!r} could not be measured",
                    expected=f"{op.target} to run on the group of lane {op.group!r}, {group.size()} ranks",
                    found=f"{type(error).__name__}: {error}",
                    fix="give the step's costs by hand (costs=...), for instance a llmsys.lancet.costs.TableCosts",
                ) from error
        found[op.name] = known[key]
    return found


def _measured(call: Callable[[], Any], group: dist.ProcessGroup, num_repeats: int) -> CollectiveTimes:
    rounds = []
    for _ in range(num_repeats + 1):
        dist.barrier(group)
        begin_s = time.perf_counter()
        started = call()
        started_s = time.perf_counter()
        for result in started if isinstance(started, list | tuple) else (started,):
            functional.wait_tensor(result)  # type: ignore[no-untyped-call]
        rounds.append((started_s - begin_s, time.perf_counter() - started_s))
    start_s, lane_s = (statistics.median(values) for values in zip(*rounds[1:], strict=True))
    return CollectiveTimes(start_ms=start_s * 1e3, lane_ms=lane_s * 1e3)
