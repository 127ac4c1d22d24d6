"""Costs of operations, of their parts, and of cutting and joining tensors.

``model`` has the contract and a table of given times; ``roofline`` the paper's clusters, with ``messages`` for
collectives and ``skew`` for uneven experts.
"""

from __future__ import annotations

from llmsys.lancet.costs.messages import ClusterMessages, MessageTable, deepep_messages, node_messages
from llmsys.lancet.costs.model import CostModel, TableCosts
from llmsys.lancet.costs.roofline import KernelFit, RooflineCosts, cluster_costs
from llmsys.lancet.costs.skew import LoadSkew, shipped_skew

__all__ = [
    "ClusterMessages",
    "CostModel",
    "KernelFit",
    "LoadSkew",
    "MessageTable",
    "RooflineCosts",
    "TableCosts",
    "cluster_costs",
    "deepep_messages",
    "node_messages",
    "shipped_skew",
]
