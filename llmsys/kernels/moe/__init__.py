"""Mixture-of-experts kernels as torch custom ops: routing, dispatch to buffers of the experts, combining of results.

`ops` says what each op does. Routing is vectorised torch (`routing`); dispatch, combine and their gradients are Triton
kernels (`rows`) for CUDA tensors and plain torch (`reference`) elsewhere.
"""

from __future__ import annotations

from llmsys.kernels.moe.ops import (
    moe_combine,
    moe_combine_buffer_grad,
    moe_combine_weights_grad,
    moe_dispatch,
    moe_gather,
    moe_route,
)
from llmsys.kernels.moe.routing import GATES, TOKEN_MAJOR_GATES

__all__ = [
    "GATES",
    "TOKEN_MAJOR_GATES",
    "moe_combine",
    "moe_combine_buffer_grad",
    "moe_combine_weights_grad",
    "moe_dispatch",
    "moe_gather",
    "moe_route",
]
