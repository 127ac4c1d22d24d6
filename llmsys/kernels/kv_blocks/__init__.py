"""Moves of KV blocks within a device: gather to staging, scatter from it, and re-layout between two caches.

A cache is one layer's tensor with dimensions (K or V, block, token in the block, head, dim), in this order whatever the
order in memory: ``logical_view`` makes such a view, and any strides will do. Data types do not matter, since elements
move as integers of equal or, where alignment allows, greater width: every bit pattern arrives as it was.

``implementation``: "torch" is the reference and works everywhere. "triton" needs CUDA tensors, or TRITON_INTERPRET=1
set before this package is imported. "auto" takes Triton wherever it can run. On CUDA everything is queued on the
current stream of the tensors' device, and the host does not wait unless said so. A call must not write memory that it
also reads.
"""

from __future__ import annotations

from llmsys.kernels.kv_blocks.blocks import gather_blocks, logical_view, relayout_blocks, scatter_blocks
from llmsys.kernels.kv_blocks.checks import LOGICAL_DIMS, BlockIds
from llmsys.kernels.kv_blocks.move import Implementation
from llmsys.kernels.kv_blocks.tokens import TokenMap, map_tokens

__all__ = [
    "LOGICAL_DIMS",
    "BlockIds",
    "Implementation",
    "TokenMap",
    "gather_blocks",
    "logical_view",
    "map_tokens",
    "relayout_blocks",
    "scatter_blocks",
]
