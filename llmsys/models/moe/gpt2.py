"""GPT-2 with mixture-of-experts layers, the model that Lancet (MLSys'24) trains."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from llmsys.core.errors import InputError
from llmsys.models.moe.config import GPT2MoEConfig
from llmsys.models.moe.layer import MoELayer
from llmsys.models.seeds import seeded_normal
from llmsys.models.transformer import CausalSelfAttention, FeedForward

_STD = 0.02


class Block(nn.Module):
    """Attention and a feed-forward block, each behind a layer norm and added to its input."""

    def __init__(self, config: GPT2MoEConfig, layer: int, group: dist.ProcessGroup | None, seed: int) -> None:
        super().__init__()
        hidden = config.moe.hidden
        output_std = _STD / math.sqrt(2 * config.num_layers)  # as GPT-2: so that the sum of all blocks keeps its size
        key = (seed, layer)
        self.attention_norm = nn.LayerNorm(hidden)
        self.attention = CausalSelfAttention(
            hidden, config.num_heads, std=_STD, output_std=output_std, key=(*key, "attention")
        )
        self.ffn_norm = nn.LayerNorm(hidden)
        self.ffn: MoELayer | FeedForward
        if config.has_experts(layer):
            self.ffn = MoELayer(config.moe, group=group, key=(*key, "moe"), output_std=output_std)
        else:
            self.ffn = FeedForward(hidden, config.ffn_hidden, std=_STD, output_std=output_std, key=(*key, "ffn"))

    def forward(self, x: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = x + self.attention(self.attention_norm(x), seq_len)
        aux_loss = None
        if isinstance(self.ffn, MoELayer):
            y, aux_loss = self.ffn(self.ffn_norm(x))
        else:
            y = self.ffn(self.ffn_norm(x))
        return x + y, aux_loss


class GPT2MoE(nn.Module):
    """A decoder whose experts are spread over the ranks of ``group``, and whose other parts every rank holds.

    All ranks must give the same ``seed``. With data of their own on each rank, `average_gradients` after the backward
    makes the gradients those of the mean loss.
    """

    def __init__(self, config: GPT2MoEConfig, *, group: dist.ProcessGroup | None = None, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        hidden = config.moe.hidden
        self.token_embedding = nn.Parameter(seeded_normal((config.vocab_size, hidden), _STD, seed, "tokens"))
        self.position_embedding = nn.Parameter(seeded_normal((config.max_seq_len, hidden), _STD, seed, "positions"))
        self.blocks = nn.ModuleList(Block(config, layer, group, seed) for layer in range(config.num_layers))
        self.norm = nn.LayerNorm(hidden)

    @property
    def moe_layers(self) -> tuple[MoELayer, ...]:
        return tuple(module for module in self.modules() if isinstance(module, MoELayer))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (batch, seq_len, vocabulary) of ``tokens`` (batch, seq_len), int64.

        With ``targets`` of the same shape, the mean cross-entropy instead, plus the layers' load-balancing losses.
        """
        batch, seq_len = tokens.shape
        if seq_len > self.config.max_seq_len:
            raise InputError(
                "the sequences are too long",
                expected=f"at most max_seq_len={self.config.max_seq_len} tokens",
                found=f"{seq_len}",
                fix="raise max_seq_len, or cut the sequences",
            )
        x = F.embedding(tokens, self.token_embedding) + self.position_embedding[:seq_len]
        x = x.view(batch * seq_len, self.config.moe.hidden)
        aux_losses = []
        for block in self.blocks:
            x, aux_loss = block(x, seq_len)
            if aux_loss is not None:
                aux_losses.append(aux_loss)
        logits = F.linear(self.norm(x), self.token_embedding)
        if targets is None:
            return logits.view(batch, seq_len, -1)
        loss = F.cross_entropy(logits, targets.reshape(-1))
        for aux_loss in aux_losses:
            loss = loss + aux_loss
        return loss
