"""Parts of a GPT-2 style decoder. Activations are (tokens of the batch in order, hidden), so that only attention
knows sequences. Dropout is 0 everywhere. ``key`` is what parameters are drawn from (see `seeds`).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from llmsys.core.errors import ConfigError
from llmsys.models.seeds import seeded_normal

Activation = Literal["gelu", "swiglu"]


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """GPT-2's gelu; or "swiglu", which halves the last dimension: silu of the first half times the second."""
    if activation == "gelu":
        return F.gelu(x, approximate="tanh")
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def input_columns(ffn_hidden: int, activation: Activation) -> int:
    """Columns that the first matrix of a feed-forward block has."""
    return 2 * ffn_hidden if activation == "swiglu" else ffn_hidden


class FeedForward(nn.Module):
    """Two linear layers with an activation between them: (T, hidden) to (T, hidden)."""

    def __init__(
        self,
        hidden: int,
        ffn_hidden: int,
        *,
        activation: Activation = "gelu",
        bias: bool = True,
        std: float = 0.02,
        output_std: float = 0.02,
        key: tuple[object, ...] = (),
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.up = seeded_linear(hidden, input_columns(ffn_hidden, activation), bias, std, *key, "up")
        self.down = seeded_linear(ffn_hidden, hidden, bias, output_std, *key, "down")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(activate(self.up(x), self.activation))
        return found


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each position to itself and those before: (batch * seq_len, hidden) to the same."""

    def __init__(
        self, hidden: int, num_heads: int, *, std: float = 0.02, output_std: float = 0.02, key: tuple[object, ...] = ()
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden % num_heads:
            raise ConfigError(
                "heads of unequal size",
                expected="num_heads that divides hidden",
                found=f"hidden={hidden}, num_heads={num_heads}",
                fix="set num_heads",
            )
        self.num_heads = num_heads
        self.qkv = seeded_linear(hidden, 3 * hidden, True, std, *key, "qkv")
        self.out = seeded_linear(hidden, hidden, True, output_std, *key, "out")

    def forward(self, x: torch.Tensor, seq_len: int) -> torch.Tensor:
        num_tokens, hidden = x.shape
        qkv = self.qkv(x).view(num_tokens // seq_len, seq_len, 3, self.num_heads, hidden // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        found: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(num_tokens, hidden))
        return found


def seeded_linear(inputs: int, outputs: int, bias: bool, std: float, *key: object) -> nn.Linear:
    """A linear layer with normal weights and a bias of zeros."""
    linear = nn.Linear(inputs, outputs, bias=bias, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        linear.weight.copy_(seeded_normal((outputs, inputs), std, *key))
        if bias:
            linear.bias.zero_()
    return linear
