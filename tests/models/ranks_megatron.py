"""What the ranks of test_megatron.py run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from llmsys.models.megatron import MegatronMoE, on_this_device
from llmsys.models.moe import MoEConfig, MoELayer

LAYERS: dict[str, dict[str, Any]] = {
    "top_k": {"gate": "top_k", "top_k": 2},
    "renormalised": {"gate": "top_k", "top_k": 3, "renormalise": True},
    "switch": {"gate": "switch"},
    "swiglu and a shared expert": {"gate": "top_k", "top_k": 2, "activation": "swiglu", "shared_ffn_hidden": 6},
}


def differences(settings: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, float]:
    """The greatest relative differences of outputs and gradients."""
    sizes: dict[str, Any] = {"hidden": 8, "ffn_hidden": 12, "num_experts": 4, "init_std": 0.4, "capacity_factor": None}
    layer = MoELayer(MoEConfig(**sizes, **settings), group=group).double()
    peer = MegatronMoE(layer)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(20, 8, dtype=torch.float64, generator=generator).requires_grad_()
    other_x = x.detach().clone().requires_grad_()
    y, _ = layer(x)
    y.square().sum().backward()
    with on_this_device():
        other_y = peer(other_x)
        other_y.square().sum().backward()
    found = {"outputs": error(other_y, y), "inputs": error(other_x.grad, x.grad)}
    for number, (ours, theirs, place) in enumerate(peer.weight_pairs(layer)):
        assert ours.grad is not None and theirs.grad is not None
        found[f"weights {number}"] = error(theirs.grad, ours.grad if place is None else ours.grad[place].T)
    return found


def error(found: Any, expected: Any) -> float:
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape and expected.any()
    return float((found - expected).abs().max() / expected.abs().max())


def run_checks() -> dict[str, dict[str, float]]:
    """Of each layer, with its experts on all ranks, and with all of them on this one."""
    groups = {"all ranks": dist.group.WORLD, "one rank": None}
    return {
        f"{name}, {where}": differences(settings, group)
        for name, settings in LAYERS.items()
        for where, group in groups.items()
    }
