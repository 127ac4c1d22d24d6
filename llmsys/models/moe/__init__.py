"""Mixture-of-experts models with expert parallelism: settings, the layer, GPT-2 with it, and steps around a step."""

from __future__ import annotations

from llmsys.models.moe.config import Gate, GPT2MoEConfig, MoEConfig, deepseek_layer, gpt2_l_moe, gpt2_s_moe
from llmsys.models.moe.gpt2 import GPT2MoE
from llmsys.models.moe.layer import MoELayer
from llmsys.models.moe.parallel import average_gradients, check_capacity

__all__ = [
    "GPT2MoE",
    "GPT2MoEConfig",
    "Gate",
    "MoEConfig",
    "MoELayer",
    "average_gradients",
    "check_capacity",
    "deepseek_layer",
    "gpt2_l_moe",
    "gpt2_s_moe",
]
