"""The plan of one step: what planners make, and the simulator and the runtime run."""

from llmsys.lancet.plan.checks import check_form, check_plan, cut_sizes
from llmsys.lancet.plan.model import WHOLE, Estimate, Instruction, Join, Plan, Region, Run, Slice, Start, Wait
from llmsys.lancet.plan.text import describe, from_text, instruction_text, to_text

__all__ = [
    "WHOLE",
    "Estimate",
    "Instruction",
    "Join",
    "Plan",
    "Region",
    "Run",
    "Slice",
    "Start",
    "Wait",
    "check_form",
    "check_plan",
    "cut_sizes",
    "describe",
    "from_text",
    "instruction_text",
    "to_text",
]
