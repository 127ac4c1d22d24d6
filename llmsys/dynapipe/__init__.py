"""DynaPipe: micro-batching and pipeline schedules for multi-task training with varying sequence lengths.

The names below are the way in; README.md beside this file has an example and says where each part of the paper is.
Modules of this package import from each other's files, never from here.
"""

from llmsys.dynapipe.baselines import FixedSize, Packing, TokenBased
from llmsys.dynapipe.config import Parallelism, PlannerConfig
from llmsys.dynapipe.costs import CostModel
from llmsys.dynapipe.plan import Plan, from_bytes, from_text, to_bytes, to_text
from llmsys.dynapipe.planner import DynaPipe, Planner, make_plan, plan_iteration
from llmsys.dynapipe.profile import LayerProfile, open_profile
from llmsys.dynapipe.simulator import SimulationResult, simulate
from llmsys.dynapipe.workload import LengthTable, Samples, global_batches, open_lengths

__all__ = [
    "CostModel",
    "DynaPipe",
    "FixedSize",
    "LayerProfile",
    "LengthTable",
    "Packing",
    "Parallelism",
    "Plan",
    "Planner",
    "PlannerConfig",
    "Samples",
    "SimulationResult",
    "TokenBased",
    "from_bytes",
    "from_text",
    "global_batches",
    "make_plan",
    "open_lengths",
    "open_profile",
    "plan_iteration",
    "simulate",
    "to_bytes",
    "to_text",
]
