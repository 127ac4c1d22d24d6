"""Measured or fitted time and memory of one layer: what DynaPipe's cost model is made of.

Reading order: ``tables`` (what a profile is), ``sources`` (where one comes from), ``formulas`` (smooth cost
formulas fitted to a profile), ``varlen`` (packed sequences with variable-length attention, derived from a
profile).
"""

from llmsys.dynapipe.config import Recompute
from llmsys.dynapipe.profile.fused import fused_profile
from llmsys.dynapipe.profile.sources import (
    MODEL_STATE_FILE,
    PROFILE_FILE,
    PROFILE_NAMES,
    fitted_profile,
    load_profile,
    open_profile,
)
from llmsys.dynapipe.profile.tables import RECOMPUTES, LayerProfile, LayerTables
from llmsys.dynapipe.profile.varlen import PackSums, VarlenCosts, VarlenLayer, varlen_terms

__all__ = [
    "MODEL_STATE_FILE",
    "PROFILE_FILE",
    "PROFILE_NAMES",
    "RECOMPUTES",
    "LayerProfile",
    "LayerTables",
    "PackSums",
    "Recompute",
    "VarlenCosts",
    "VarlenLayer",
    "fitted_profile",
    "fused_profile",
    "load_profile",
    "open_profile",
    "varlen_terms",
]
