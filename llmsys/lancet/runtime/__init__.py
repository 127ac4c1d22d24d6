"""What executes a plan on devices: the backend of torch.compile, the irregular all-to-all of parts, and measuring.

Importing it registers the backend "lancet".
"""

from llmsys.lancet.passes.planning import Planning
from llmsys.lancet.runtime.backend import CompiledStep, LancetBackend, no_overlap_reason
from llmsys.lancet.runtime.optimize import Optimized, optimize

__all__ = ["CompiledStep", "LancetBackend", "Optimized", "Planning", "no_overlap_reason", "optimize"]
