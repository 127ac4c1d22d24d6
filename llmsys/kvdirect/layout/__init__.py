"""How a worker's KV cache lies in memory, and which bytes move between workers that lay it out differently.

A worker keeps one tensor per layer; all layers have the same layout. KVDirect addresses remote blocks as base + offset
of these tensors, so everything here is in byte offsets from the start of a layer's tensor. Beyond the paper, whose
workers are alike: the two sides may differ in tensor-parallel size, block size and order of dimensions.
"""

from __future__ import annotations

from llmsys.kvdirect.layout.cache import (
    FLOWKV_ORDER,
    HEAD_MAJOR_ORDER,
    VLLM_ORDER,
    Dim,
    HeadRange,
    KvLayout,
    Order,
    SourceRank,
    source_ranks,
)
from llmsys.kvdirect.layout.relayout import Method, RelayoutCosts, RelayoutPlan, plan_relayout
from llmsys.kvdirect.layout.segments import Segments, transfer_segments

__all__ = [
    "FLOWKV_ORDER",
    "HEAD_MAJOR_ORDER",
    "VLLM_ORDER",
    "Dim",
    "HeadRange",
    "KvLayout",
    "Method",
    "Order",
    "RelayoutCosts",
    "RelayoutPlan",
    "Segments",
    "SourceRank",
    "plan_relayout",
    "source_ranks",
    "transfer_segments",
]
