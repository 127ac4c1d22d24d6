"""GPT-2 with experts: causal, trainable, and one graph for torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmsys.core.errors import ConfigError, InputError
from llmsys.models.moe import Gate, GPT2MoE, GPT2MoEConfig, MoEConfig
from llmsys.models.text import VOCAB_SIZE, text_batch
from llmsys.models.transformer import CausalSelfAttention


def tiny(
    gate: Gate = "switch", *, hidden: int = 32, num_layers: int = 2, aux_loss_weight: float = 0.0
) -> GPT2MoEConfig:
    moe = MoEConfig(
        hidden=hidden,
        ffn_hidden=2 * hidden,
        num_experts=4,
        gate=gate,
        top_k=1 if gate == "switch" else 2,
        aux_loss_weight=aux_loss_weight,
    )
    return GPT2MoEConfig(
        num_layers=num_layers, num_heads=4, ffn_hidden=2 * hidden, moe=moe, vocab_size=VOCAB_SIZE, max_seq_len=64
    )


def test_a_position_sees_itself_and_those_before() -> None:
    attention = CausalSelfAttention(8, 2, std=0.5, output_std=0.5).double()
    x = torch.randn(2 * 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    query, key, value = attention.qkv(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    expected = torch.zeros(2, 5, 8, dtype=torch.float64)
    for batch in range(2):
        for head in range(2):
            for at in range(5):
                scores = key[batch, head, : at + 1] @ query[batch, head, at] / 2
                mixed = torch.softmax(scores, 0) @ value[batch, head, : at + 1]
                expected[batch, at, head * 4 : head * 4 + 4] = mixed
    torch.testing.assert_close(attention(x, 5), attention.out(expected.view(10, 8)))


def test_later_tokens_change_nothing_before_them() -> None:
    """The switch gate gives slots to tokens in order, so the whole model is causal within a sequence."""
    model = GPT2MoE(tiny()).double()
    tokens = text_batch(0, batch_size=1, seq_len=20)[0]
    changed = tokens.clone()
    changed[0, 12:] = 1
    before, after = model(tokens), model(changed)
    assert before.shape == (1, 20, VOCAB_SIZE)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.isclose(before[:, 12:], after[:, 12:]).all()


def test_loss_is_the_cross_entropy_and_the_layers_losses() -> None:
    tokens, targets = text_batch(0, batch_size=2, seq_len=16)
    plain, balanced = GPT2MoE(tiny(num_layers=4)), GPT2MoE(tiny(num_layers=4, aux_loss_weight=0.5))
    expected = F.cross_entropy(plain(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(plain(tokens, targets), expected)
    # Two layers, each with a loss near its weight, since no expert is preferred yet.
    assert float((balanced(tokens, targets) - expected).detach()) == pytest.approx(1.0, abs=0.1)


def test_it_learns_english() -> None:
    torch.manual_seed(0)
    model = GPT2MoE(tiny(aux_loss_weight=0.01))
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for step in range(25):
        loss = model(*text_batch(step, batch_size=4, seq_len=64))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 5.4, "about log(256) before training"
    assert sum(losses[-5:]) / 5 < 4.1


@pytest.mark.parametrize("gate", ["switch", "random"])
def test_compiled_whole_and_equal_to_eager(gate: Gate) -> None:
    batch = text_batch(0, batch_size=2, seq_len=16)
    found = []
    for compile_it in (False, True):
        model = GPT2MoE(tiny(gate))
        torch.manual_seed(4)
        loss = (torch.compile(model, fullgraph=True, backend="aot_eager") if compile_it else model)(*batch)
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_refused() -> None:
    with pytest.raises(InputError, match="at most max_seq_len=64"):
        GPT2MoE(tiny())(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ConfigError, match="num_heads=4"):
        GPT2MoE(tiny(hidden=30))
    with pytest.raises(ConfigError, match="num_layers=0"):
        tiny(num_layers=0)
