"""The custom ops of MoE layers: against loops, under autograd, and inside torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from llmsys.core.errors import InputError
from llmsys.kernels import moe

NUM_EXPERTS = 4


def routed(num_tokens: int, top_k: int, capacity: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.randn(num_tokens, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed))
    used = torch.zeros(NUM_EXPERTS, dtype=torch.int64)
    experts, slots, _ = moe.moe_route(scores, used, "top_k", top_k, capacity)
    return experts, slots


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1, grad: bool = False) -> torch.Tensor:
    numbers = torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return numbers.requires_grad_(grad)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_dispatch_and_combine_follow_their_definitions(num_tokens: int, top_k: int) -> None:
    capacity, hidden = 5, 6
    experts, slots = routed(num_tokens, top_k, capacity)
    x, weights = normal(num_tokens, hidden), normal(num_tokens, top_k)
    buffer = torch.zeros(NUM_EXPERTS, capacity, hidden, dtype=x.dtype)
    y = torch.zeros_like(x)
    filled = normal(NUM_EXPERTS, capacity, hidden)
    for token in range(num_tokens):
        for k in range(top_k):
            if slots[token, k] >= 0:
                buffer[experts[token, k], slots[token, k]] = x[token]
                y[token] += filled[experts[token, k], slots[token, k]] * weights[token, k]
    assert torch.equal(moe.moe_dispatch(x, experts, slots, NUM_EXPERTS, capacity), buffer)
    assert torch.equal(moe.moe_combine(filled, weights, experts, slots), y)


def test_nothing_of_free_slots_and_dropped_choices_gets_into_results() -> None:
    """A buffer that came from the network may hold anything in slots that no token has."""
    capacity = 2
    experts, slots = routed(9, 2, capacity)
    assert (slots < 0).any()
    written = moe.moe_dispatch(torch.ones(9, 3), experts, slots, NUM_EXPERTS, capacity)
    buffer = torch.where(written > 0, 1.0, torch.nan)
    buffer[0, 0] = torch.inf  # a dropped choice reads no row, also not the first
    slots = slots.masked_fill((experts == 0) & (slots == 0), -1)
    weights = torch.where(slots < 0, torch.nan, 1.0)
    kept = (slots >= 0).sum(dim=1)
    assert torch.equal(moe.moe_combine(buffer, weights, experts, slots), kept[:, None].expand(9, 3).float())
    grads = moe.moe_combine_weights_grad(torch.ones(9, 3), buffer, experts, slots)
    assert torch.equal(grads, torch.where(slots < 0, 0.0, 3.0))
    back = moe.moe_combine_buffer_grad(torch.ones(9, 3), weights, experts, slots, NUM_EXPERTS, capacity)
    assert torch.isfinite(back).all() and int(back.sum()) == 3 * int(kept.sum())


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("capacity", [1, 3, 11])
def test_gradients(top_k: int, capacity: int) -> None:
    experts, slots = routed(11, top_k, capacity)
    x = normal(11, 3, grad=True)
    assert torch.autograd.gradcheck(lambda x: moe.moe_dispatch(x, experts, slots, NUM_EXPERTS, capacity), (x,))
    buffer, weights = normal(NUM_EXPERTS, capacity, 3, grad=True), normal(11, top_k, grad=True)
    assert torch.autograd.gradcheck(lambda b, w: moe.moe_combine(b, w, experts, slots), (buffer, weights))


def test_weights_get_gradients_of_their_own_type() -> None:
    experts, slots = routed(6, 2, 6)
    buffer = normal(NUM_EXPERTS, 6, 8, dtype=torch.bfloat16, grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        weights = normal(6, 2, dtype=dtype, grad=True)
        y = moe.moe_combine(buffer, weights, experts, slots)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16 and weights.grad is not None and weights.grad.dtype == dtype


def one_call_of_each() -> list[tuple[Any, tuple[Any, ...]]]:
    experts, slots = routed(7, 2, 3)
    x, weights = normal(7, 5, grad=True), normal(7, 2, grad=True)
    buffer = normal(NUM_EXPERTS, 3, 5, grad=True)
    used = torch.zeros(NUM_EXPERTS, dtype=torch.int64)
    routes = [(moe.moe_route, (normal(7, NUM_EXPERTS), used, gate, 1, 3)) for gate in moe.GATES]
    return [
        *routes,
        (moe.moe_dispatch, (x, experts, slots, NUM_EXPERTS, 3)),
        (moe.moe_combine, (buffer, weights, experts, slots)),
        (moe.moe_gather, (buffer.detach(), experts, slots)),
        (moe.moe_combine_buffer_grad, (x.detach(), weights.detach(), experts, slots, NUM_EXPERTS, 3)),
        (moe.moe_combine_weights_grad, (x.detach(), buffer.detach(), experts, slots)),
    ]


def test_ops_keep_the_rules_of_torch() -> None:
    """Schema, no writes to inputs, no output that shares memory with an input, shapes as told to the compiler."""
    for op, arguments in one_call_of_each():
        torch.library.opcheck(op, arguments)


def small_layer(x: torch.Tensor, router: torch.Tensor, gate: str, top_k: int, capacity: int) -> torch.Tensor:
    scores = torch.softmax(x @ router, dim=-1)
    used = torch.zeros(NUM_EXPERTS, dtype=torch.int64)
    experts, slots, _ = moe.moe_route(scores, used, gate, top_k, capacity)
    buffer = moe.moe_dispatch(x, experts, slots, NUM_EXPERTS, capacity)
    return moe.moe_combine(buffer * 3, scores.gather(1, experts), experts, slots)


@pytest.mark.parametrize(
    ("gate", "top_k"), [("switch", 1), ("top_k", 2), ("batch_prioritized", 2), ("expert_choice", 1)]
)
def test_compiled_whole_and_equal_to_eager(gate: str, top_k: int) -> None:
    graphs: list[str] = []

    def record(module: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(module.code)
        return make_boxed_func(module.forward)

    compiled = torch.compile(small_layer, fullgraph=True, backend=aot_autograd(fw_compiler=record))
    found = []
    for run in (small_layer, compiled, compiled):
        x, router = (
            normal(24, 8, dtype=torch.float32, grad=True),
            normal(8, NUM_EXPERTS, dtype=torch.float32, grad=True),
        )
        y = run(x, router, gate, top_k, 4)
        y.square().sum().backward()
        found.append((y, x.grad, router.grad))
    for other in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], other, strict=True))
    forward, backward = graphs
    assert "llmsys.moe_route.default" in forward and "llmsys.moe_combine_weights_grad.default" in backward


def test_compiled_for_any_number_of_tokens() -> None:
    compiled = torch.compile(small_layer, fullgraph=True, backend="aot_eager", dynamic=True)
    router = normal(8, NUM_EXPERTS)
    for num_tokens in (24, 9, 31):
        x = normal(num_tokens, 8)
        expected = small_layer(x, router, "top_k", 2, num_tokens // 2)
        assert torch.equal(compiled(x, router, "top_k", 2, num_tokens // 2), expected)


X, BUFFER, WEIGHTS = torch.rand(6, 3), torch.rand(4, 2, 3), torch.rand(6, 2)
EXPERTS, SLOTS = routed(6, 2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moe.moe_dispatch(X[:5], EXPERTS, SLOTS, 4, 2), r"experts is \(6, 2\)"),
        (lambda: moe.moe_dispatch(X.long(), EXPERTS, SLOTS, 4, 2), "torch.int64"),
        (lambda: moe.moe_dispatch(X, EXPERTS, SLOTS[:, :1], 4, 2), r"slots .*shape \(6, 1\)"),
        (lambda: moe.moe_dispatch(X, EXPERTS.int(), SLOTS, 4, 2), "torch.int32"),
        (lambda: moe.moe_dispatch(X, EXPERTS, SLOTS, 3, 2), "numbers from 0 to 2"),
        (lambda: moe.moe_dispatch(X, EXPERTS, SLOTS, 4, 1), "numbers from -1 to 0"),
        (lambda: moe.moe_dispatch(X, EXPERTS, SLOTS - 1, 4, 2), "from -2"),
        (lambda: moe.moe_dispatch(X, EXPERTS, SLOTS, 4, 0), "capacity=0"),
        (lambda: moe.moe_dispatch(X, EXPERTS[:, :0], SLOTS[:, :0], 4, 2), "at least one choice"),
        (lambda: moe.moe_combine(BUFFER[0], WEIGHTS, EXPERTS, SLOTS), r"\(experts, capacity, hidden\)"),
        (lambda: moe.moe_combine(BUFFER, WEIGHTS[:, :1], EXPERTS, SLOTS), r"shape \(6, 2\), as experts"),
        (lambda: moe.moe_combine(BUFFER[:2], WEIGHTS, EXPERTS, SLOTS), "numbers from 0 to 1"),
        (lambda: moe.moe_gather(BUFFER[:, :1], EXPERTS, SLOTS), "numbers from -1 to 0"),
        (lambda: moe.moe_combine_weights_grad(X[:, :2], BUFFER, EXPERTS, SLOTS), "3 elements"),
        (lambda: moe.moe_combine_weights_grad(X.half(), BUFFER, EXPERTS, SLOTS), "torch.float16"),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        call()
