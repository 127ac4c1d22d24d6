"""torch's own overlap pass as a baseline: torch._inductor.fx_passes.overlap_scheduling on the captured modules.

It reorders nodes within the forward and within the backward, prefetches collectives and sinks waits, by estimates of
its own unless it is given others. It prices no all-to-all (its NCCL estimate is off), so it gets the times that all
planners get. Settings are made generous, so that none of its limits decides: any memory, any distance, no bucketing.
Its result here is an order of our ops, a `Plan` as every planner makes one. It never cuts an op in parts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import fx

from llmsys.core.errors import InputError
from llmsys.lancet.config import PlannerConfig
from llmsys.lancet.costs import CostModel
from llmsys.lancet.estimate import Pricer
from llmsys.lancet.graph import Graph
from llmsys.lancet.memory import find_peak
from llmsys.lancet.passes.capture import Captured
from llmsys.lancet.plan import Estimate, Instruction, Plan, Run, Start, Wait, check_plan

_UNLIMITED = 1_000_000
_SETTINGS = {
    "max_in_flight_gb": float(_UNLIMITED),
    "max_compute_pre_fetch": _UNLIMITED,
    "max_coll_distance": _UNLIMITED,
    "max_memory_increase_gb": float(_UNLIMITED),
    "max_memory_increase_ratio": None,
    "collective_bucketing": False,
    "prioritize_bucketing_during_scheduling": False,
    "max_off_bucket_gb": None,
    "pre_bucketing_fsdp_collectives": False,
    "insert_overlap_deps": False,
    "compute_overlap_multipler": 1.0,
    "collective_estimator": "analytical",
    "compute_estimator": "analytical",
    "enable_fusion_regions": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchOverlap:
    """A planner that needs the FX modules, and an initialised process group (torch asks for its size).

    Every op's cost is told to the pass. It lets its own notion of computation hide communication best: operators that
    torch counts floating-point operations of. PlanError if its order breaks a rule of plans, such as that all-to-alls
    of a group keep theirs.
    """

    name: str = "torch_overlap"

    def make_from_modules(self, captured: Captured, costs: CostModel, config: PlannerConfig) -> Plan:
        graph = captured.graph
        instructions: list[Instruction] = []
        for module in (captured.forward, captured.backward):
            if module is not None:
                instructions += _scheduled(captured, module, costs)
        as_captured = [i for index in range(len(graph.ops)) for i in _whole(graph, index)]
        times = Pricer(graph, costs).run(instructions, [])
        plan = Plan(
            planner=self.name,
            graph_name=graph.name,
            fingerprint=graph.fingerprint,
            instructions=tuple(instructions),
            regions=(),
            hidden_under={},
            estimate=Estimate(
                step_ms=times.step_ms,
                compute_ms=times.compute_ms,
                comm_ms=times.comm_ms,
                exposed_comm_ms=times.exposed_comm_ms,
                peak_mb=find_peak(graph, instructions, []).peak_mb,
                captured_peak_mb=find_peak(graph, as_captured, []).peak_mb,
            ),
            notes=(f"torch {torch.__version__}",),
        )
        check_plan(plan, graph)
        return plan


def _whole(graph: Graph, index: int) -> list[Instruction]:
    return [Start(op=index), Wait(op=index)] if graph.ops[index].is_comm else [Run(op=index)]


def _scheduled(captured: Captured, module: fx.GraphModule, costs: CostModel) -> list[Instruction]:
    copies: dict[fx.Node, fx.Node] = {}
    copied = fx.Graph()
    for node in module.graph.nodes:
        copies[node] = copied.node_copy(node, copies.__getitem__)
    ops = {copies[nodes.node]: index for index, nodes in enumerate(captured.nodes) if nodes.node in copies}
    waits = {
        copies[nodes.results[-1]]: index
        for index, nodes in enumerate(captured.nodes)
        if nodes.node in copies and captured.graph.ops[index].is_comm
    }
    times = {node: costs.op_ms(captured.graph, captured.graph.ops[index]) for node, index in ops.items()}

    def estimate(node: fx.Node, size: int | None = None) -> float:
        return times.get(node, 0.0)

    scheduled = fx.GraphModule(module, copied)
    _reorder(scheduled, estimate)
    instructions: list[Instruction] = []
    for node in scheduled.graph.nodes:
        if node in waits:
            instructions.append(Wait(op=waits[node]))
        elif node in ops:
            kind = Start if captured.graph.ops[ops[node]].is_comm else Run
            instructions.append(kind(op=ops[node]))
    return instructions


def _reorder(module: fx.GraphModule, estimate: Callable[..., float]) -> None:
    """Run the pass, in place. Its roofline, which it asks before the estimates it was given, knows GPUs only."""
    try:
        from torch._inductor.fx_passes import overlap_scheduling
    except ImportError as error:
        raise InputError(
            "torch's overlap pass is not there",
            expected="torch._inductor.fx_passes.overlap_scheduling, as in torch 2.13, and triton, which it imports",
            found=f"torch {torch.__version__}: {error}",
            fix="install triton, or use another planner",
        ) from error
    run = overlap_scheduling.schedule_overlap_bucketing
    known = inspect.signature(run).parameters
    settings: dict[str, Any] = {name: value for name, value in _SETTINGS.items() if name in known}
    with patch.object(overlap_scheduling, "estimate_roofline_runtime_ms", estimate):
        run(module, custom_runtime_estimation=estimate, **settings)
