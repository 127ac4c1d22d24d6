"""The systems that run on the limited link, and the plan of each for a captured step."""

from __future__ import annotations

from experiments.lancet._setup import SYSTEMS, System
from llmsys.lancet.baselines import AsCaptured
from llmsys.lancet.config import PlannerConfig
from llmsys.lancet.costs import CostModel, TableCosts
from llmsys.lancet.passes.capture import Captured
from llmsys.lancet.passes.overlap_scheduler import TorchOverlap
from llmsys.lancet.plan import Plan

TORCH = "torch OverlapScheduler"
MEASURED_SYSTEMS = (*SYSTEMS, TORCH)


def plan_of(system: str, captured: Captured, costs: CostModel) -> Plan:
    if system == TORCH:
        return TorchOverlap().make_from_modules(captured, costs, PlannerConfig())
    chosen: System = SYSTEMS[system]
    config = PlannerConfig(weight_gradients=chosen.weight_gradients, partition=chosen.partition)
    return chosen.planner.make(captured.graph, costs, config)


def plan_as_captured(captured: Captured) -> Plan:
    """The one that needs no costs."""
    any_costs = TableCosts(ops_ms={op.name: 1.0 for op in captured.graph.ops})
    return AsCaptured().make(captured.graph, any_costs, PlannerConfig())
