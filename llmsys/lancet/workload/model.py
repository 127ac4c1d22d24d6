"""Which step is built: the shape of the model, the batch, the devices, and the paper's two models."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from llmsys.core.errors import ConfigError

Gate = Literal["switch", "top_k", "random", "batch_prioritized"]
Attention = Literal["unfused", "fused", "latent"]

TOKEN_MAJOR_GATES = ("switch", "top_k", "random")
"""Gates whose routing of a slice of the batch follows from the capacity that the slices before have used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEModel:
    """A decoder-only transformer in which some feed-forward blocks are mixtures of experts.

    ``moe_every``: 2 makes layers 1, 3, 5, ... MoE layers (every other one, as in the paper), 1 all of them.
    ``attention``: "unfused" as PyTorch and RAF ran it in 2022 (two batched products and a softmax), "fused" as one
    kernel, "latent" with the low-rank projections of DeepSeek-V2 and V3 and one kernel.
    ``gated``: SwiGLU experts and blocks, without biases; else GELU. ``shared_experts``: run on every token beside the
    routed ones. ``num_experts``: 0 means ``experts_per_gpu`` times the devices. ``vocab_size``: 0 leaves out embedding,
    head and loss, as in the middle of a pipeline.
    """

    name: str
    num_layers: int
    hidden: int
    num_heads: int
    ffn_hidden: int
    expert_hidden: int
    vocab_size: int
    moe_every: int = 2
    experts_per_gpu: int = 2
    num_experts: int = 0
    top_k: int = 1
    shared_experts: int = 0
    gated: bool = False
    attention: Attention = "unfused"
    head_dim: int = 64

    def is_moe(self, layer: int) -> bool:
        return layer % self.moe_every == self.moe_every - 1

    @property
    def num_moe_layers(self) -> int:
        return sum(self.is_moe(layer) for layer in range(self.num_layers))


def _gpt2(name: str, num_layers: int, hidden: int) -> MoEModel:
    return MoEModel(
        name=name,
        num_layers=num_layers,
        hidden=hidden,
        num_heads=16,
        ffn_hidden=4 * hidden,
        expert_hidden=4 * hidden,
        vocab_size=50_257,
        head_dim=hidden // 16,
    )


# Sections 7 and the authors' configurations: GPT-2 of Hugging Face with every other block a mixture, two experts a GPU,
# 16 heads in both. The last is no model of the paper: four layers of DeepSeek-V3's shape, as a pipeline stage has them.
MODELS: dict[str, MoEModel] = {
    "gpt2_s_moe": _gpt2("GPT2-S-MoE", 12, 768),
    "gpt2_l_moe": _gpt2("GPT2-L-MoE", 24, 1024),
    "deepseek_stage": MoEModel(
        name="DeepSeek-V3 shape, 4 layers",
        num_layers=4,
        hidden=7168,
        num_heads=128,
        ffn_hidden=18_432,
        expert_hidden=2048,
        vocab_size=0,
        moe_every=1,
        num_experts=256,
        top_k=8,
        shared_experts=1,
        gated=True,
        attention="latent",
        head_dim=192,
    ),
}


def moe_model(name: str) -> MoEModel:
    """The model called ``name`` in MODELS; ConfigError with the nearest name for any other."""
    found = MODELS.get(name)
    if found is None:
        near = difflib.get_close_matches(name, MODELS, n=1)
        raise ConfigError(
            f"there is no model {name!r}",
            expected="one of " + ", ".join(MODELS),
            found=repr(name),
            fix=f"did you mean {near[0]!r}?" if near else "choose one of these",
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class StepConfig:
    """One training step of one device: ``batch_per_gpu`` sequences of ``seq_len`` tokens on ``num_gpus`` devices.

    All devices hold the dense layers and share out the experts. ``capacity_factor``: the capacity of an expert for the
    tokens of one device is this times top_k * tokens / experts, rounded up. The paper names none; 1 is the default.
    ``data_parallel``: all-reduce the gradient of each dense matrix, as collectives of ``data_group``.
    The figures leave them out: they are the same for every system, and overlap with the backward pass as they are.
    Dropout is left out. ``dtype``: of activations and weights.
    """

    model: MoEModel
    num_gpus: int
    batch_per_gpu: int
    seq_len: int = 512
    gate: Gate = "switch"
    capacity_factor: float = 1.0
    dtype: str = "float32"
    data_parallel: bool = False
    expert_group: str = "ep"
    data_group: str = "dp"

    def __post_init__(self) -> None:
        if min(self.num_gpus, self.batch_per_gpu, self.seq_len) < 1 or not self.capacity_factor > 0:
            raise ConfigError(
                "a training step needs devices, a batch and room in its experts",
                expected="num_gpus, batch_per_gpu and seq_len of at least 1, capacity_factor above 0",
                found=f"{self.num_gpus}, {self.batch_per_gpu}, {self.seq_len}, {self.capacity_factor}",
                fix="set the one that is too small",
            )
        if self.gate == "switch" and self.model.top_k != 1:
            raise ConfigError(
                "the Switch gate sends a token to one expert",
                expected=f"a gate for top_k = {self.model.top_k}: 'top_k', 'random' or 'batch_prioritized'",
                found="gate 'switch'",
                fix="set gate",
            )
        if self.num_experts % self.num_gpus or self.num_experts < self.model.top_k:
            raise ConfigError(
                "the experts do not spread evenly over the devices",
                expected=f"a multiple of num_gpus = {self.num_gpus}, at least top_k = {self.model.top_k}",
                found=f"{self.num_experts} experts",
                fix="set num_gpus, num_experts or experts_per_gpu",
            )

    @property
    def num_tokens(self) -> int:
        return self.batch_per_gpu * self.seq_len

    @property
    def num_experts(self) -> int:
        return self.model.num_experts or self.model.experts_per_gpu * self.num_gpus

    @property
    def experts_per_gpu(self) -> int:
        return self.num_experts // self.num_gpus

    @property
    def capacity(self) -> int:
        """Rows of one expert for the tokens of one device."""
        wanted = self.capacity_factor * self.model.top_k * self.num_tokens / self.num_experts
        return max(int(-(-wanted // 1)), 1)
