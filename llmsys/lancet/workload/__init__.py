"""Synthetic training steps of the paper's models, for planning and simulating where no GPU is.

``model`` says which step, ``step.build_step`` makes its graph; ``tape``, ``attention`` and ``experts`` are its parts.
"""

from __future__ import annotations

from llmsys.lancet.workload.model import MODELS, Gate, MoEModel, StepConfig, moe_model
from llmsys.lancet.workload.step import build_step

__all__ = ["MODELS", "Gate", "MoEModel", "StepConfig", "build_step", "moe_model"]
