"""FX graphs read as our graph: collectives, names across the two passes, views, order beside data, and refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import fx
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._functorch.partitioners import default_partition
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore

from llmsys.core.errors import InputError
from llmsys.lancet.graph import Graph
from llmsys.lancet.passes.capture import Captured, capture
from llmsys.lancet.passes.operators import UNKNOWN_SIZE
from llmsys.lancet.passes.rewrite import rewrite
from llmsys.lancet.plan import Wait
from llmsys.lancet.runtime import irregular
from tests.lancet.fx_plans import as_captured, plan_of, random_order

functional = torch.ops._c10d_functional


@pytest.fixture(scope="module", autouse=True)
def fake_group() -> Iterator[None]:
    """Four ranks of which only this one is there: enough to trace collectives, not to run them."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def traced(function: Callable[..., Any], *inputs: torch.Tensor, mode: str = "fake") -> fx.GraphModule:
    return make_fx(torch.func.functionalize(function), tracing_mode=mode)(*inputs)  # type: ignore[arg-type]


def exchange(x: torch.Tensor) -> torch.Tensor:
    size = [x.shape[0] // 4] * 4
    started = functional.all_to_all_single(x, size, size, dist.group.WORLD.group_name)  # type: ignore[union-attr]
    return functional.wait_tensor(started)


def joint(function: Callable[..., Any], *inputs: torch.Tensor) -> Captured:
    """Forward and backward of a function of tensors that need gradients."""
    module = aot_export_joint_simple(function, [i.requires_grad_() for i in inputs], trace_joint=True)
    return capture(*default_partition(module, [], num_fwd_outputs=1))


def kinds(graph: Graph) -> list[str]:
    return [op.kind for op in graph.ops]


def test_a_collective_and_its_wait_are_one_op() -> None:
    graph = capture(traced(lambda x: exchange(x * 2) + 1, torch.ones(4, 6))).graph
    assert kinds(graph) == ["compute", "all_to_all", "compute"]
    op = graph.ops[1]
    assert op.inputs == (graph.ops[0].outputs[0].name,)
    assert op.outputs[0].shape == (4, 6)
    assert op.group == "group0"


def test_other_collectives_and_several_results() -> None:
    def function(x: torch.Tensor) -> Any:
        group = dist.group.WORLD
        total = collectives.all_reduce(x, "sum", group)  # type: ignore[arg-type]
        first, second = collectives.all_gather_into_tensor_coalesced([x, x + 1], group)  # type: ignore[arg-type]
        return total + 1, first + second

    graph = capture(traced(function, torch.ones(4, 6))).graph
    assert [(op.target.split(".")[1], len(op.outputs)) for op in graph.ops if op.kind == "collective"] == [
        ("all_reduce", 1),
        ("all_gather_into_tensor_coalesced", 2),
    ]


def test_groups_are_numbered_as_they_appear() -> None:
    half = dist.new_group([0, 1])

    def function(x: torch.Tensor) -> torch.Tensor:
        started = functional.all_to_all_single(x, [2, 2], [2, 2], half.group_name)
        return exchange(functional.wait_tensor(started))

    captured = capture(traced(function, torch.ones(4, 6)))
    assert [op.group for op in captured.graph.ops] == ["group0", "group1"]
    assert captured.groups["group0"] == half.group_name


def test_the_backward_takes_what_the_forward_saves() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
        return ((exchange_autograd(x @ w) ** 2).sum(),)

    graph = joint(function, torch.ones(4, 6), torch.ones(6, 6)).graph
    assert [op.kind for op in graph.ops if op.is_comm] == ["all_to_all"] * 2
    assert [op.phase for op in graph.ops if op.is_comm] == ["forward", "backward"]
    forward_made = {t.name for i in graph.select("forward") for t in graph.ops[i].outputs}
    used_later = {name for i in graph.select("backward") for name in graph.ops[i].inputs}
    assert forward_made & used_later


def exchange_autograd(x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = collectives.all_to_all_single_autograd(x, None, None, dist.group.WORLD)  # type: ignore[arg-type]
    return found


def test_dead_collectives_are_removed() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        exchange(x + 1)
        functional.all_to_all_single(x, [1] * 4, [1] * 4, dist.group.WORLD.group_name)  # type: ignore[union-attr]
        return exchange(x * 2)

    module = traced(function, torch.ones(4, 6))
    assert str(module.graph).count("all_to_all_single.default") == 3
    captured = capture(module)
    assert kinds(captured.graph) == ["compute", "all_to_all"]
    again = capture(traced(function, torch.ones(4, 6)))
    assert again.graph.fingerprint == captured.graph.fingerprint


def test_a_collective_used_before_its_wait_is_refused_by_name() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        started = functional.all_to_all_single(x, [1] * 4, [1] * 4, dist.group.WORLD.group_name)  # type: ignore[union-attr]
        return started + functional.wait_tensor(started)

    module = traced(function, torch.ones(4, 6))
    with pytest.raises(InputError, match="'all_to_all_single' of the forward graph is used before") as caught:
        capture(module)
    assert "add" in caught.value.found


def test_an_operator_that_writes_to_its_input_is_refused_by_name() -> None:
    module = make_fx(lambda x: x.add_(1), tracing_mode="fake")(torch.ones(4))
    with pytest.raises(InputError, match="'add_' of the forward graph writes"):
        capture(module)


def point_to_point() -> Captured:
    """all-to-all, send and receive, all-to-all: none needs the other's data."""
    graph, group = fx.Graph(), "0"
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4, 6, device="meta")

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = torch.empty(4, 6, device="meta")
        return node

    first = call(functional.all_to_all_single.default, x, [1] * 4, [1] * 4, group)
    first = call(functional.wait_tensor.default, first)
    call(functional.wait_tensor.default, call(functional.isend.default, x, 1, 0, group))
    got = call(functional.wait_tensor.default, call(functional.irecv.default, x, 1, 0, group))
    last = call(functional.all_to_all_single.default, x, [1] * 4, [1] * 4, group)
    last = call(functional.wait_tensor.default, last)
    graph.output((first, got, last))
    return capture(fx.GraphModule({}, graph))


def test_point_to_point_stays_in_its_place_among_collectives() -> None:
    captured = point_to_point()
    graph = captured.graph
    assert kinds(graph) == ["all_to_all", *["compute"] * 4, "all_to_all"]
    for index in range(1, 6):
        assert not graph.independent(index - 1, index), f"{graph.ops[index].name} can be moved over what is before it"
    assert all(op.splits == () for op in graph.ops)
    forward, _ = rewrite(captured, random_order(graph, 0), irregular)
    targets = [str(node.target) for node in forward.graph.nodes if node.op == "call_function"]
    assert targets == [str(node.target) for node in captured.forward.graph.nodes if node.op == "call_function"]


def test_sizes_known_only_at_run_time_are_guessed_and_run_whole() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ w).view(x.shape[0] // 2, -1)

    captured = capture(traced(function, torch.ones(4, 6), torch.ones(6, 8), mode="symbolic"))
    assert captured.has_symbols
    assert all(op.splits == () for op in captured.graph.ops)
    assert captured.graph.ops[-1].outputs[0].shape == (2, 16)
    assert any("s" in line for line in captured.lines())

    def counted(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return torch.zeros(n.sum().item(), 2) + x

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        graph = capture(traced(counted, torch.ones(2), torch.ones(3, dtype=torch.int64), mode="symbolic")).graph
    assert graph.ops[-1].outputs[0].shape == (UNKNOWN_SIZE, 2)


def test_marks_of_operators() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> Any:
        y = torch.nn.functional.dropout(x.t() @ w, 0.5)
        return y.view(-1), torch.bernoulli(x)

    graph = capture(traced(function, torch.ones(4, 6), torch.ones(4, 8))).graph
    by_target = {op.target: op for op in graph.ops}
    assert by_target["aten.t.default"].is_view
    assert by_target["aten.view.default"].is_view
    assert by_target["aten.mm.default"].flops == 2 * 6 * 4 * 8
    assert "float32[4,6][6,1]@cpu" in by_target["aten.t.default"].cost_key
    assert sum(op.random for op in graph.ops) >= 2


def test_cost_keys_tell_strides_and_scalars_apart() -> None:
    def key(function: Callable[..., Any], *inputs: torch.Tensor) -> str:
        return capture(traced(function, *inputs)).graph.ops[-1].cost_key

    x = torch.ones(4, 4)
    assert key(lambda a: a @ a, x) != key(lambda a: a @ a, x.t())
    assert key(lambda a: a * 2, x) != key(lambda a: a * 3, x)
    assert key(lambda a: a * 2, x) == key(lambda a: a * 2, x + 1)


def test_a_plan_that_starts_what_it_does_not_have_is_refused() -> None:
    captured = capture(traced(lambda x: exchange(x * 2), torch.ones(4, 6)))
    plan = as_captured(captured.graph)
    for place in range(len(plan.instructions)):
        broken = plan_of(captured.graph, [i for n, i in enumerate(plan.instructions) if n != place])
        with pytest.raises(Exception, match=r"before it is there|cannot be executed"):
            rewrite(captured, broken, irregular)
    assert isinstance(plan.instructions[-1], Wait)
    with pytest.raises(Exception, match="another graph"):
        other = capture(traced(lambda x: exchange(x * 3 + 1), torch.ones(4, 6)))
        rewrite(other, plan, irregular)
