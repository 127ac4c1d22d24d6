"""The mixture-of-experts layer and its settings, in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmsys.core.config import build, to_plain
from llmsys.core.errors import ConfigError
from llmsys.models.moe import GPT2MoEConfig, MoEConfig, MoELayer, check_capacity, deepseek_layer, gpt2_l_moe, gpt2_s_moe
from llmsys.models.transformer import FeedForward, activate

SIZES: dict[str, Any] = {"hidden": 6, "ffn_hidden": 10, "num_experts": 4, "init_std": 0.5}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def expert_output(layer: MoELayer, expert: int, x: torch.Tensor) -> torch.Tensor:
    return activate(x @ layer.up[expert], layer.config.activation) @ layer.down[expert]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("renormalise", [False, True])
def test_without_drops_a_token_gets_its_experts_by_weight(activation: str, renormalise: bool) -> None:
    config = MoEConfig(
        **SIZES,
        gate="top_k",
        top_k=2,
        capacity_factor=None,
        activation=activation,  # type: ignore[arg-type]
        renormalise=renormalise,
        shared_ffn_hidden=3,
    )
    layer = MoELayer(config).double()
    x = normal(9, 6)
    y, aux_loss = layer(x)
    assert aux_loss is None and layer.shared is not None and layer.router is not None
    for token in range(9):
        weights, experts = torch.softmax(layer.router @ x[token], 0).topk(2)
        if renormalise:
            weights = weights / weights.sum()
        expected = sum(w * expert_output(layer, int(e), x[token]) for w, e in zip(weights, experts, strict=True))
        torch.testing.assert_close(y[token], expected + layer.shared(x[token : token + 1])[0])


def test_dropped_tokens_get_zeros() -> None:
    layer = MoELayer(MoEConfig(**SIZES, capacity_factor=0.5)).double()
    assert layer.router is not None
    with torch.no_grad():
        layer.router.zero_()  # all tie, so all choose the first expert, which has 2 slots
    y, _ = layer(normal(16, 6))
    assert y[:2].all() and not y[2:].any()


def test_experts_that_choose_divide_their_places() -> None:
    layer = MoELayer(MoEConfig(**SIZES, gate="expert_choice", top_k=2, capacity_factor=1.0)).double()
    x = normal(12, 6)
    y, _ = layer(x)
    assert layer.router is not None
    scores = torch.softmax(x @ layer.router.T, dim=1)
    expected = torch.zeros_like(x)
    for expert in range(4):
        for token in scores[:, expert].topk(6).indices:
            expected[token] += scores[token, expert] * expert_output(layer, expert, x[token])
    torch.testing.assert_close(y, expected)


def test_a_random_gate_draws_for_each_batch() -> None:
    layer = MoELayer(MoEConfig(**SIZES, gate="random", top_k=1, capacity_factor=None)).double()
    assert layer.router is None
    x = normal(1, 6).expand(64, 6)
    seen = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        seen.append(layer(x)[0])
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    options = torch.stack([expert_output(layer, expert, x[0]) for expert in range(4)])
    which = torch.cdist(seen[0], options).argmin(dim=1)
    torch.testing.assert_close(seen[0], options[which])
    assert set(which.tolist()) == {0, 1, 2, 3}


def test_load_balancing_loss() -> None:
    """Fedus et al. 2021, equations 4 to 6: the weight times E times the sum of f_e * P_e; 1 times it when balanced."""
    layer = MoELayer(MoEConfig(**SIZES, aux_loss_weight=0.1)).double()
    assert layer.router is not None
    x = normal(20, 6)
    _, aux_loss = layer(x)
    scores = torch.softmax(x @ layer.router.T, dim=1).detach()
    share = torch.bincount(scores.argmax(dim=1), minlength=4) / 20
    expected = 0.1 * 4 * sum(float(share[e] * scores[:, e].mean()) for e in range(4))
    assert float(aux_loss.detach()) == pytest.approx(expected)
    with torch.no_grad():
        layer.router.copy_(50 * torch.eye(4, 6))
    assert float(layer(torch.eye(4, 6, dtype=torch.float64).repeat(3, 1))[1].detach()) == pytest.approx(0.1)
    assert float(layer(torch.eye(4, 6, dtype=torch.float64)[:1].repeat(3, 1))[1].detach()) == pytest.approx(0.4)


def test_gradients_of_the_whole_layer() -> None:
    layer = MoELayer(MoEConfig(**SIZES, gate="top_k", top_k=2, capacity_factor=0.75, shared_ffn_hidden=3)).double()
    x = normal(8, 6).requires_grad_()
    parameters = tuple(layer.parameters())
    names = [name for name, _ in layer.named_parameters()]

    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))[0]
        return y

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_routes_in_float32(dtype: torch.dtype) -> None:
    layer = MoELayer(MoEConfig(**SIZES, gate="top_k", top_k=2, capacity_factor=None)).to(dtype)
    x = normal(9, 6).to(dtype).requires_grad_()
    y, _ = layer(x)
    exact = MoELayer(layer.config).double()
    exact.load_state_dict(layer.state_dict())
    torch.testing.assert_close(y.double(), exact(x.detach().double())[0], rtol=0.05, atol=0.02)
    y.sum().backward()
    assert y.dtype == dtype and x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens: int) -> None:
    layer = MoELayer(MoEConfig(**SIZES, gate="top_k", top_k=2))
    x = torch.rand(num_tokens, 6, requires_grad=True)
    y, _ = layer(x)
    y.sum().backward()
    assert y.shape == (num_tokens, 6) and layer.up.grad is not None
    assert bool(layer.up.grad.any()) == bool(num_tokens)


def test_capacity_is_exact() -> None:
    for factor, top_k, tokens, expected in ((1.1, 1, 40, 11), (1.25, 2, 24, 15), (1.0, 1, 7, 2), (0.01, 1, 4, 1)):
        config = MoEConfig(hidden=2, ffn_hidden=2, num_experts=4, gate="top_k", top_k=top_k, capacity_factor=factor)
        assert config.capacity(tokens) == expected
        assert check_capacity(MoELayer(config), tokens) == expected
    assert MoEConfig(hidden=2, ffn_hidden=2, num_experts=4, capacity_factor=None).capacity(37) == 37


def test_parameters_depend_on_the_key_only() -> None:
    config = MoEConfig(**SIZES, shared_ffn_hidden=3)
    torch.manual_seed(1)
    first = MoELayer(config, key=(0, "a"))
    torch.manual_seed(2)
    same, other = MoELayer(config, key=(0, "a")), MoELayer(config, key=(0, "b"))
    for (name, ours), theirs, different in zip(
        first.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
        assert not torch.isclose(ours, different).any(), name
    flat = torch.cat([parameter.flatten() for parameter in first.parameters()])
    assert len(flat.unique()) == len(flat), "no two parameters are drawn alike"
    assert float(first.up.detach().std()) == pytest.approx(0.5, rel=0.15)


def test_presets() -> None:
    small, large = gpt2_s_moe(16), gpt2_l_moe(16, gate="batch_prioritized")
    assert (small.num_layers, small.moe.hidden, small.moe.num_experts, small.num_heads) == (12, 768, 32, 16)
    assert (large.num_layers, large.moe.hidden, large.moe.gate) == (24, 1024, "batch_prioritized")
    assert [layer for layer in range(12) if small.has_experts(layer)] == [1, 3, 5, 7, 9, 11]
    layer = deepseek_layer(hidden=8, ffn_hidden=4, num_experts=16)
    assert (layer.top_k, layer.renormalise, layer.shared_ffn_hidden) == (8, True, 4)
    y, _ = MoELayer(layer)(torch.rand(5, 8))
    assert y.shape == (5, 8)
    assert build(GPT2MoEConfig, to_plain(small)) == small


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": 0}, "hidden=0"),
        ({"top_k": 2}, "top_k=2"),
        ({"gate": "top_k", "top_k": 5}, "from 1 to 4"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
        ({"capacity_factor": float("nan")}, "capacity_factor=nan"),
        ({"shared_ffn_hidden": -1}, "shared_ffn_hidden=-1"),
        ({"aux_loss_weight": 0.1, "gate": "random"}, "with gate 'random'"),
    ],
)
def test_unusable_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoEConfig(**(SIZES | wrong))


def test_dense_block() -> None:
    block = FeedForward(6, 10, key=(1,)).double()
    x = normal(3, 6)
    expected = F.linear(F.gelu(F.linear(x, block.up.weight), approximate="tanh"), block.down.weight)
    torch.testing.assert_close(block(x), expected)  # biases begin at zero
