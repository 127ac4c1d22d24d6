"""Settings of mixture-of-experts layers and of GPT-2 models with them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from llmsys.core.errors import ConfigError
from llmsys.models.transformer import Activation

Gate = Literal["switch", "top_k", "random", "batch_prioritized", "expert_choice"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """One layer.

    ``num_experts``: of all ranks together. ``gate``: see the custom op ``moe_route``; "random" draws scores for each
    batch, has no router, and weighs each choice 1 / top_k. ``capacity_factor``: see `capacity`; None drops nothing.
    ``renormalise``: the weights of a token's choices add up to 1, before drops. ``shared_ffn_hidden``: size of an
    expert that every rank holds and every token passes, 0 for none. ``aux_loss_weight``: of the load-balancing loss
    (Fedus et al. 2021, section 2.2), 0 for none. Experts have no biases.
    """

    hidden: int
    ffn_hidden: int
    num_experts: int
    gate: Gate = "switch"
    top_k: int = 1
    capacity_factor: float | None = 1.25
    renormalise: bool = False
    activation: Activation = "gelu"
    shared_ffn_hidden: int = 0
    aux_loss_weight: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        sizes = {"hidden": self.hidden, "ffn_hidden": self.ffn_hidden, "num_experts": self.num_experts}
        for name, size in sizes.items():
            if size < 1:
                raise _unusable(name, "at least 1", size)
        most = 1 if self.gate == "switch" else self.num_experts
        if not 1 <= self.top_k <= most:
            raise _unusable("top_k", f"from 1 to {most}, with gate {self.gate!r}", self.top_k)
        if self.capacity_factor is not None and not 0 < self.capacity_factor < float("inf"):
            raise _unusable("capacity_factor", "a finite number above 0, or None", self.capacity_factor)
        if self.shared_ffn_hidden < 0:
            raise _unusable("shared_ffn_hidden", "0 or more", self.shared_ffn_hidden)
        if self.aux_loss_weight < 0 or (self.aux_loss_weight and self.gate in ("random", "expert_choice")):
            wanted = "0 or more, and 0 for gates that balance by themselves (random, expert_choice)"
            raise _unusable("aux_loss_weight", wanted, f"{self.aux_loss_weight} with gate {self.gate!r}")

    @property
    def slots_per_token(self) -> tuple[int, int]:
        """Slots that each expert has for a token of one rank, before rounding up: numerator and denominator."""
        if self.capacity_factor is None:
            return 1, 1
        # Exact, so that ceil(1.1 * 10) is 11: the float product is a little more.
        return (Fraction(str(self.capacity_factor)) * self.top_k / self.num_experts).as_integer_ratio()

    def capacity(self, num_tokens: int) -> int:
        """Slots of each expert for ``num_tokens`` tokens of one rank: ceil(capacity_factor * top_k * tokens / experts).

        With a factor of None, as many as there are tokens, of which none can then be dropped. At least 1.
        """
        return capacity_of(num_tokens, self.slots_per_token)


def capacity_of(num_tokens: int, slots_per_token: tuple[int, int]) -> int:
    """`MoEConfig.capacity` in whole numbers only, which torch.compile can follow."""
    numerator, denominator = slots_per_token
    return max(1, -(-numerator * num_tokens // denominator))


@dataclass(frozen=True, slots=True, kw_only=True)
class GPT2MoEConfig:
    """A GPT-2 decoder in which every ``moe_every``-th feed-forward block is an MoE layer, from the ``moe_every``-th on.

    ``moe.hidden`` is the model's. Dense blocks have ``ffn_hidden``. Word embedding and output layer share weights.
    """

    num_layers: int
    num_heads: int
    ffn_hidden: int
    moe: MoEConfig
    moe_every: int = 2
    vocab_size: int = 50257
    max_seq_len: int = 1024

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "ffn_hidden", "moe_every", "vocab_size", "max_seq_len"):
            if getattr(self, name) < 1:
                raise _unusable(name, "at least 1", getattr(self, name))

    def has_experts(self, layer: int) -> bool:
        return layer % self.moe_every == self.moe_every - 1


def gpt2_s_moe(
    num_ranks: int, *, gate: Gate = "switch", top_k: int = 1, capacity_factor: float = 1.25
) -> GPT2MoEConfig:
    """GPT2-S-MoE of Lancet (MLSys'24): 12 layers, hidden 768, two experts a rank; the public code has 16 heads.

    The paper does not print the capacity factor.
    """
    return _paper_model(12, 768, num_ranks, gate, top_k, capacity_factor)


def gpt2_l_moe(
    num_ranks: int, *, gate: Gate = "switch", top_k: int = 1, capacity_factor: float = 1.25
) -> GPT2MoEConfig:
    """GPT2-L-MoE of Lancet: 24 layers, hidden 1024; else as `gpt2_s_moe`."""
    return _paper_model(24, 1024, num_ranks, gate, top_k, capacity_factor)


def _paper_model(
    num_layers: int, hidden: int, num_ranks: int, gate: Gate, top_k: int, capacity_factor: float
) -> GPT2MoEConfig:
    moe = MoEConfig(
        hidden=hidden,
        ffn_hidden=4 * hidden,
        num_experts=2 * num_ranks,
        gate=gate,
        top_k=top_k,
        capacity_factor=capacity_factor,
    )
    return GPT2MoEConfig(num_layers=num_layers, num_heads=16, ffn_hidden=4 * hidden, moe=moe)


def deepseek_layer(
    *,
    hidden: int = 7168,
    ffn_hidden: int = 2048,
    num_experts: int = 256,
    top_k: int = 8,
    capacity_factor: float | None = 1.25,
) -> MoEConfig:
    """One layer in the style of DeepSeek-V3: top-8 with weights that add up to 1, swiglu, and a shared expert.

    Its scores are a softmax, and there are no groups of experts and no balancing bias, in which DeepSeek-V3 differs.
    """
    return MoEConfig(
        hidden=hidden,
        ffn_hidden=ffn_hidden,
        num_experts=num_experts,
        gate="top_k",
        top_k=top_k,
        capacity_factor=capacity_factor,
        renormalise=True,
        activation="swiglu",
        shared_ffn_hidden=ffn_hidden,
    )


def _unusable(name: str, expected: str, found: object) -> ConfigError:
    return ConfigError(f"{name} is not usable", expected=expected, found=f"{name}={found}", fix=f"set {name}")
