"""Every split that the rules claim: the parts, run by torch and joined, equal the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from llmsys.core.errors import PlanError
from llmsys.lancet.graph import is_irregular
from llmsys.lancet.passes.capture import Captured, capture
from llmsys.lancet.passes.pieces import region_units
from llmsys.lancet.passes.rewrite import rewrite
from llmsys.lancet.passes.rules import RULES
from llmsys.lancet.plan import Plan, Region
from llmsys.lancet.runtime import irregular
from tests.lancet.fx_plans import one_op_in_parts, random_region, ranged

Function = Callable[..., Any]
ops = torch.ops.aten


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def tokens(*shape: int, high: int = 6) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, mask is None, attn_mask=mask)[0]


def attend_backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    out, lse = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    return ops._scaled_dot_product_flash_attention_for_cpu_backward(q, q, k, v, out, lse, 0.0, True)


def norm_backward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
    _, mean, rstd = ops.native_layer_norm(x, [x.shape[-1]], weight, bias, 1e-5)
    mask = [True, True, True]
    return ops.native_layer_norm_backward(x, x, [x.shape[-1]], mean, rstd, weight, bias, mask)


def route(scores: torch.Tensor) -> Any:
    used = torch.zeros(scores.shape[1], dtype=torch.int64)
    return torch.ops.llmsys.moe_route(scores, used, "top_k", 2, 3)


CASES: dict[str, tuple[Function, tuple[torch.Tensor, ...]]] = {
    "pointwise": (lambda a, b: (F.gelu(a) * b + 1, torch.where(a > 0, a, b)), (draw(4, 6), draw(6))),
    "pointwise_broadcast": (lambda a, b, c: a + b - c, (draw(2, 1, 6), draw(4, 1), draw())),
    "gelu_backward": (lambda g, x: (ops.gelu_backward(g, x), ops.threshold_backward(g, x, 0)),
                      (draw(4, 6), draw(4, 6))),
    "dtype": (lambda a: a.double().float(), (draw(4, 6),)),
    "mm": (torch.mm, (draw(4, 6), draw(6, 8))),
    "bmm": (torch.bmm, (draw(2, 4, 6), draw(2, 6, 8))),
    "addmm": (torch.addmm, (draw(8), draw(4, 6), draw(6, 8))),
    "addmm_matrix": (torch.addmm, (draw(4, 1), draw(4, 6), draw(6, 8))),
    "baddbmm": (torch.baddbmm, (draw(2, 1, 8), draw(2, 4, 6), draw(2, 6, 8))),
    "view": (lambda a: (a.view(4, 6) * 2, a.view(2, 12) + 1, a.view(8, 3) + 1, a.view(24) + 1), (draw(2, 2, 6),)),
    "unsafe_view": (lambda a: a.transpose(0, 1).reshape(8, 3) + 1, (draw(4, 6),)),
    "expand": (lambda a, b: (a.expand(4, 2, 6) + 1, b.expand(4, -1, 6) + 1), (draw(2, 6), draw(4, 2, 1))),
    "permute": (lambda a: a.permute(2, 0, 1) + 1, (draw(2, 4, 6),)),
    "transpose": (lambda a: (a.transpose(-1, 0) + 1, a[0].t() + 1), (draw(2, 4, 6),)),
    "unsqueeze": (lambda a: (a.unsqueeze(1) + 1, a.unsqueeze(-1) + 1), (draw(4, 6),)),
    "squeeze": (lambda a: (a.squeeze() + 1, a.squeeze(1) + 1, ops.squeeze.dims(a, [1, 2]) + 1), (draw(4, 1, 6),)),
    "select": (lambda a: (a[:, 1] + 1, a.select(-1, 0) + 1, *a.unbind(1)), (draw(4, 2, 6),)),
    "slice": (lambda a: (a[:, 1:3] + 1, a[:, :, ::2] + 1), (draw(4, 4, 6),)),
    "split": (lambda a: tuple(p + 1 for p in (*a.chunk(3, -1), *a.split([1, 3], 1))), (draw(4, 4, 6),)),
    "cat": (lambda a, b: torch.cat([a, b], -1), (draw(4, 2, 6), draw(4, 2, 2))),
    "stack": (lambda a, b: (torch.stack([a, b], 1), torch.stack([b, a], -1)), (draw(4, 2), draw(4, 2))),
    "slice_backward": (lambda g: ops.slice_backward(g, [4, 6], 1, 0, 2, 1), (draw(4, 2),)),
    "select_backward": (lambda g: ops.select_backward(g, [4, 3, 6], 1, 2), (draw(4, 6),)),
    "softmax": (lambda a: (a.softmax(-1), a.log_softmax(0), a.cumsum(1)), (draw(4, 6),)),
    "softmax_backward": (lambda g, y: (ops._softmax_backward_data(g, y, -1, g.dtype),
                                       ops._log_softmax_backward_data(g, y, 0, g.dtype)), (draw(4, 6), draw(4, 6))),
    "topk": (lambda a: (*a.topk(2, -1), *a.sort(-1)), (draw(4, 6),)),
    "gather": (lambda a, i: a.gather(1, i), (draw(4, 6), tokens(4, 2))),
    "reduce": (lambda a: (a.sum(1), a.sum((0, 2), True), a.mean(-1), a.amax(1, True), a.argmax(-1)), (draw(2, 4, 6),)),
    "sum": (lambda a: a.sum(), (draw(4, 6),)),
    "layer_norm": (lambda x, w, b: ops.native_layer_norm(x, [6], w, b, 1e-5), (draw(4, 2, 6), draw(6), draw(6))),
    "layer_norm_plain": (lambda x: F.layer_norm(x, [6]), (draw(4, 2, 6),)),
    "layer_norm_backward": (norm_backward, (draw(4, 2, 6), draw(6), draw(6))),
    "embedding": (lambda w, i: F.embedding(i, w), (draw(6, 8), tokens(4, 2))),
    "embedding_backward": (lambda g, i: ops.embedding_dense_backward(g, i, 6, -1, False),
                           (draw(4, 2, 8), tokens(4, 2))),
    "attention": (lambda q, k, v: attend(q, k, v),
                  (draw(2, 4, 6, 8), draw(2, 4, 6, 8, seed=1), draw(2, 4, 6, 8, seed=2))),
    "attention_mask": (attend, (draw(2, 4, 6, 8), draw(2, 4, 6, 8), draw(2, 4, 6, 8), draw(2, 1, 6, 6))),
    "attention_backward": (attend_backward, (draw(2, 4, 6, 8), draw(2, 4, 6, 8), draw(2, 4, 6, 8))),
    "dropout_backward": (lambda g, m: ops.native_dropout_backward(g, m > 0, 2.0), (draw(4, 6), draw(4, 6))),
    "route": (route, (draw(8, 4),)),
}  # fmt: skip


def captured_of(function: Function, inputs: tuple[torch.Tensor, ...]) -> Captured:
    return capture(make_fx(torch.func.functionalize(function), tracing_mode="fake")(*inputs))


def runs_equal(captured: Captured, plan: Plan, inputs: tuple[torch.Tensor, ...]) -> None:
    expected, found = captured.forward(*inputs), rewrite(captured, plan, irregular)[0](*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def largest(captured: Captured, chosen: dict[int, int]) -> int:
    region = Region(num_parts=1, ops=tuple(chosen), splits=tuple(chosen.values()))
    return region_units(captured, 0, region)


@pytest.mark.parametrize("name", CASES)
def test_parts_of_one_op_make_the_whole(name: str) -> None:
    function, inputs = CASES[name]
    captured = captured_of(function, inputs)
    num_splits = 0
    for index, op in enumerate(captured.graph.ops):
        for place, split in enumerate(op.splits):
            if any(map(is_irregular, (*split.inputs, *split.outputs))):
                continue
            num_splits += 1
            for num_parts in range(2, largest(captured, {index: place}) + 1):
                runs_equal(captured, one_op_in_parts(captured.graph, index, place, num_parts), inputs)
    assert num_splits, "the case tests nothing"


def test_every_rule_has_a_case() -> None:
    tested = {op.target for function, inputs in CASES.values() for op in captured_of(function, inputs).graph.ops}
    needs_ranks = {"llmsys.moe_dispatch.default", "llmsys.moe_combine.default"}
    aliases = {"aten.reshape.default", "aten.chunk.default", "aten.alias.default", "aten.detach.default"}
    left = {target for target in RULES if not target.startswith("_c10d")} - tested - needs_ranks - aliases
    assert left == set()


def block(seed: int) -> tuple[Function, tuple[torch.Tensor, ...]]:
    """A random chain of the operators of a transformer, on (batch 4, length 6, hidden 8)."""
    rng = torch.Generator().manual_seed(seed)

    def pick(high: int) -> int:
        return int(torch.randint(0, high, (1,), generator=rng))

    steps = [pick(9) for _ in range(8)]
    weights = (draw(8, 24), draw(8, 8), draw(8))

    def function(x: torch.Tensor, w3: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        for step in steps:
            if step == 0:
                q, k, v = ((x.reshape(24, 8) @ w3).view(4, 6, 24)).chunk(3, -1)
                heads = [t.view(4, 6, 2, 4).transpose(1, 2) for t in (q, k, v)]
                x = x + attend(*heads).transpose(1, 2).reshape(4, 6, 8)
            elif step == 1:
                x = F.layer_norm(x, [8], b, b)
            elif step == 2:
                x = torch.addmm(b, F.gelu(x).reshape(-1, 8), w).view(4, 6, 8)
            elif step == 3:
                x = x.softmax(-1) * x.sum(-1, True)
            elif step == 4:
                x = torch.bmm(x, x.transpose(1, 2)).bmm(x)
            elif step == 5:
                x = torch.cat([x[..., 4:], x[..., :4]], -1)
            elif step == 6:
                x = x.transpose(0, 1).contiguous().transpose(0, 1)
            elif step == 7:
                x = x + x.mean(1, True).expand(4, 6, 8)
            else:
                x = (x.unsqueeze(1) * x.unsqueeze(2)).sum(2) / 8
            x = x / (1 + x.abs().amax((1, 2), True))
        return x

    return function, (draw(4, 6, 8, seed=seed), *weights)


@pytest.mark.parametrize("seed", range(16))
def test_parts_of_random_ranges_make_the_whole(seed: int) -> None:
    function, inputs = block(seed)
    captured = captured_of(function, inputs)
    num_ops = len(captured.graph.ops)
    first = seed % (num_ops // 2)
    chosen = random_region(captured.graph, range(first, num_ops), seed)
    try:
        units = largest(captured, chosen)
    except PlanError:  # dimensions that no number of parts divides
        chosen = dict([next(iter(chosen.items()))])
        units = largest(captured, chosen)
    for num_parts in {2, units}:
        runs_equal(captured, ranged(captured.graph, chosen, num_parts), inputs)


def test_more_parts_than_units_are_refused() -> None:
    captured = captured_of(lambda a, b: a + b, (draw(3, 4), draw(3, 4)))
    with pytest.raises(PlanError, match="at most 3 parts"):
        rewrite(captured, one_op_in_parts(captured.graph, 0, 0, 4), irregular)


def test_random_operators_run_whole() -> None:
    captured = captured_of(lambda a: torch.bernoulli(a.sigmoid()) + F.dropout(a, 0.5), (draw(4, 6),))
    drawn = [op for op in captured.graph.ops if op.random]
    assert len(drawn) >= 2
    assert all(op.splits == () for op in drawn)


def test_a_contraction_with_an_addend_is_not_cut() -> None:
    captured = captured_of(torch.addmm, (draw(8), draw(4, 6), draw(6, 8)))
    assert {split.outputs for split in captured.graph.ops[0].splits} == {(0,), (1,)}
