"""Lancet: overlap of all-to-all with computation in whole training graphs of mixture-of-experts models.

What is here needs no torch: graphs of steps, costs, planners, plans, the simulator. `runtime` has the backend of
torch.compile and `optimize`.
"""

from llmsys.lancet.baselines import PLANNERS, AsCaptured, CapacityPipelining, RaiseSink, planner_named
from llmsys.lancet.config import PlannerConfig
from llmsys.lancet.costs import CostModel, TableCosts, cluster_costs
from llmsys.lancet.graph import Graph, Op, Split, Tensor
from llmsys.lancet.plan import Plan, check_plan, describe, from_text, to_text
from llmsys.lancet.planner import Lancet, Planner
from llmsys.lancet.simulator import SimulationResult, simulate
from llmsys.lancet.workload import StepConfig, build_step, moe_model

__all__ = [
    "PLANNERS",
    "AsCaptured",
    "CapacityPipelining",
    "CostModel",
    "Graph",
    "Lancet",
    "Op",
    "Plan",
    "Planner",
    "PlannerConfig",
    "RaiseSink",
    "SimulationResult",
    "Split",
    "StepConfig",
    "TableCosts",
    "Tensor",
    "build_step",
    "check_plan",
    "cluster_costs",
    "describe",
    "from_text",
    "moe_model",
    "planner_named",
    "simulate",
    "to_text",
]
