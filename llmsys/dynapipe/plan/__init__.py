"""The plan of one training iteration: what planners make, and executors run."""

from llmsys.dynapipe.plan.binary import from_bytes, to_bytes
from llmsys.dynapipe.plan.checks import check_deadlock, check_plan, transfers_between
from llmsys.dynapipe.plan.model import Estimate, MicroBatch, Plan, ReplicaPlan
from llmsys.dynapipe.plan.text import from_text, to_text

__all__ = [
    "Estimate",
    "MicroBatch",
    "Plan",
    "ReplicaPlan",
    "check_deadlock",
    "check_plan",
    "from_bytes",
    "from_text",
    "to_bytes",
    "to_text",
    "transfers_between",
]
