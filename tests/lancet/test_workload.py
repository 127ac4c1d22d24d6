"""Synthetic steps: their arithmetic, their sizes, and that the backward pass mirrors the forward."""

from __future__ import annotations

import dataclasses
import math

import pytest

from llmsys.core.errors import ConfigError
from llmsys.lancet.graph import LAST, PARTIAL, REPLICATED, Graph, Op, dimension_of, irregular, is_irregular
from llmsys.lancet.workload import MODELS, MoEModel, StepConfig, build_step, moe_model

SMALL = dataclasses.replace(moe_model("gpt2_s_moe"), name="small", num_layers=4, hidden=64, vocab_size=96, head_dim=4)
SMALL_GATED = dataclasses.replace(
    moe_model("deepseek_stage"), name="small gated", num_layers=2, hidden=64, num_heads=4, num_experts=8, top_k=2
)


def step(model: MoEModel = SMALL, **changes: object) -> StepConfig:
    gate = "switch" if model.top_k == 1 else "top_k"
    settings = {"num_gpus": 4, "batch_per_gpu": 8, "seq_len": 16, "gate": gate, **changes}
    return StepConfig(model=model, **settings)  # type: ignore[arg-type]


def dense_parameters(graph: Graph) -> tuple[int, int]:
    """Numbers of values in the matrices of dense layers, and in those of this device's experts."""
    weights = [tensor for tensor in graph.inputs if tensor.name.endswith(".weight") and len(tensor.shape) > 1]
    matmul = {name for op in graph.ops if op.flops for name in op.inputs}
    used = [tensor for tensor in weights if tensor.name in matmul]
    experts = sum(math.prod(tensor.shape) for tensor in used if ".experts." in tensor.name)
    return sum(math.prod(tensor.shape) for tensor in used) - experts, experts


def attention_flops(config: StepConfig) -> float:
    model = config.model
    return 2 * 2.0 * config.num_tokens * config.seq_len * model.num_heads * model.head_dim * model.num_layers


@pytest.mark.parametrize("name", ["gpt2_s_moe", "gpt2_l_moe"])
@pytest.mark.parametrize("capacity_factor", [1.0, 1.25])
def test_a_step_takes_six_flops_a_parameter_and_token(name: str, capacity_factor: float) -> None:
    config = StepConfig(model=moe_model(name), num_gpus=16, batch_per_gpu=8, capacity_factor=capacity_factor)
    graph = build_step(config)
    dense, experts = dense_parameters(graph)
    # An expert sees the rows that all devices' capacities hold, full or not.
    rows = config.capacity * config.num_gpus
    expected = 6.0 * dense * config.num_tokens + 6.0 * experts * rows + 3 * attention_flops(config)
    assert sum(op.flops for op in graph.ops) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("name", "millions"), [("gpt2_s_moe", 124.4), ("gpt2_l_moe", 354.8)])
def test_the_models_are_gpt2_with_more_experts(name: str, millions: float) -> None:
    """GPT-2 small and medium have 124 and 355 million parameters; half of their blocks become mixtures."""
    model = moe_model(name)
    graph = build_step(StepConfig(model=model, num_gpus=1, batch_per_gpu=1))
    total = sum(math.prod(t.shape) for t in graph.inputs if t.name.endswith((".weight", ".bias")))
    gates = model.num_moe_layers * model.hidden * model.experts_per_gpu
    # Two experts a device stand for one block; experts have no biases here.
    block = 2 * model.hidden * model.ffn_hidden
    biases = model.num_moe_layers * (model.hidden + model.ffn_hidden)
    dense = total - gates - model.num_moe_layers * block + biases
    positions = (1024 - 512) * model.hidden
    assert (dense + positions) / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize("model", [SMALL, SMALL_GATED], ids=lambda model: model.name)
def test_every_forward_all_to_all_has_a_backward_twin(model: MoEModel) -> None:
    graph = build_step(step(model))
    exchanges = [graph.ops[index] for index in graph.comm_ops("all_to_all")]
    forward = [op for op in exchanges if op.phase == "forward"]
    backward = [op for op in exchanges if op.phase == "backward"]
    assert len(forward) == 2 * model.num_moe_layers
    assert [op.layer for op in backward] == [op.layer for op in reversed(forward)]
    assert [op.outputs[0].shape for op in backward] == [op.outputs[0].shape for op in reversed(forward)]
    ways = [op.cost_key.split(":")[0] for op in forward]
    assert ways == ["dispatch", "combine"] * model.num_moe_layers
    # The gradient of what came back goes out, and the gradient of what went out comes back.
    assert [op.cost_key.split(":")[0] for op in backward] == ways


@pytest.mark.parametrize("model", [SMALL, SMALL_GATED], ids=lambda model: model.name)
def test_every_parameter_gets_a_gradient_of_its_shape(model: MoEModel) -> None:
    graph = build_step(step(model))
    gradients = sorted(graph.tensors[name].shape for name in graph.outputs if name.endswith(".backward"))
    parameters = sorted(t.shape for t in graph.inputs if t.name.endswith((".weight", ".bias")))
    tied = [(model.vocab_size, model.hidden)] if model.vocab_size else []  # the head's, beside the embedding's
    assert gradients == sorted(parameters + tied)


def cut_shapes(graph: Graph, op: Op, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> list[tuple[str, int]]:
    shapes = [graph.tensors[name] for name in op.inputs] + list(op.outputs)
    return [
        (tensor.name, tensor.shape[dimension_of(axis)])
        for tensor, axis in zip(shapes, (*inputs, *outputs), strict=True)
        if axis >= 0 or is_irregular(axis)
    ]


@pytest.mark.parametrize("model", [SMALL, SMALL_GATED], ids=lambda model: model.name)
def test_splits_name_axes_that_exist_and_fit_together(model: MoEModel) -> None:
    config = step(model)
    graph = build_step(config)
    num_checked = 0
    for op in graph.ops:
        for split in op.splits:
            assert all(axis >= REPLICATED or is_irregular(axis) for axis in split.inputs), op.name
            sizes = cut_shapes(graph, op, split.inputs, split.outputs)
            # Everything is cut along the batch (whole sequences) or along the capacity.
            assert {size for _, size in sizes} <= {config.batch_per_gpu, config.capacity}, (op.name, sizes)
            num_checked += 1
    assert num_checked > len(graph.ops) * 0.9


def test_what_lies_between_the_all_to_alls_splits_both_ways() -> None:
    graph = build_step(step())
    for index in graph.comm_ops("all_to_all"):
        op = graph.ops[index]
        assert [split.inputs for split in op.splits] == [(irregular(1),), (1,)]
    inner = [op for op in graph.ops if ".experts." in op.name or ".to_local" in op.name or ".to_senders" in op.name]
    assert len(inner) > 0
    for op in inner:
        assert len(op.splits) == 2
        expected = {PARTIAL} if ".dw" in op.name else {irregular(1), irregular(2), 1, 2}
        assert {axis for split in op.splits for axis in split.outputs} <= expected


@pytest.mark.parametrize(("gate", "can_split"), [("switch", True), ("random", True), ("batch_prioritized", False)])
def test_only_token_major_gates_can_be_split(gate: str, can_split: bool) -> None:
    graph = build_step(step(gate=gate))
    routes = [op for op in graph.ops if op.target == "moe_route"]
    assert len(routes) == SMALL.num_moe_layers
    for op in routes:
        assert op.chained == bool(op.splits) == can_split
        if can_split:
            assert op.splits[0].inputs == (0, REPLICATED) and op.splits[0].outputs == (0, 0, LAST)


def test_a_weight_gradient_has_no_path_to_the_all_to_alls_of_earlier_layers() -> None:
    graph = build_step(step())
    first = graph.index_of["l1.moe.from_experts.dx.backward"]
    later = graph.index_of["l2.attn.qkv.dw.backward"]
    assert graph.independent(first, later)
    assert not graph.independent(first, graph.index_of["l2.attn.qkv.dx.backward"])
    assert not graph.independent(first, graph.index_of["l1.moe.experts.down.dw.backward"])


@pytest.mark.parametrize("model", [SMALL, SMALL_GATED], ids=lambda model: model.name)
def test_both_gradients_of_an_op_come_from_the_gradient_of_its_output(model: MoEModel) -> None:
    graph = build_step(step(model))
    pairs = [(op, op.name.replace(".dx.", ".dw.")) for op in graph.ops if ".dx." in op.name]
    pairs = [(dx, graph.ops[graph.index_of[name]]) for dx, name in pairs if name in graph.index_of]
    assert len(pairs) > 5 * model.num_layers
    for dx, dw in pairs:
        (shared,) = {name for name in {*dx.inputs} & {*dw.inputs} if name not in forward_tensors(graph)}
        assert ".backward" in shared or shared == "hidden_grad"


def forward_tensors(graph: Graph) -> set[str]:
    made = {tensor.name for index in graph.select("forward") for tensor in graph.ops[index].outputs}
    return made | {tensor.name for tensor in graph.inputs if tensor.name != "hidden_grad"}


def test_gradients_are_all_reduced_only_if_asked_and_never_the_experts() -> None:
    plain, reduced = build_step(step()), build_step(step(data_parallel=True))
    assert plain.comm_ops("collective") == ()
    ops = [reduced.ops[index] for index in reduced.comm_ops("collective")]
    assert {op.group for op in ops} == {"dp"} and len(reduced.ops) == len(plain.ops) + len(ops)
    assert not any(".experts." in op.inputs[0] for op in ops)
    # Of each dense layer: qkv, out, and up and down or the gate's; norms have [2, H] and count as well.
    assert sum(op.layer == 0 for op in ops) == 6
    assert all(op.outputs[0].name in reduced.outputs for op in ops)


def test_equal_configs_give_equal_graphs_and_others_other_ones() -> None:
    assert build_step(step()).fingerprint == build_step(step()).fingerprint
    assert build_step(step()).fingerprint != build_step(step(capacity_factor=2.0)).fingerprint


@pytest.mark.parametrize(("name", "num_ops"), [("gpt2_s_moe", 613), ("gpt2_l_moe", 1213), ("deepseek_stage", 298)])
def test_graph_sizes(name: str, num_ops: int) -> None:
    """About 50 ops a layer, which is what the planners' running times go by."""
    graph = build_step(step(MODELS[name], num_gpus=16))
    assert len(graph.ops) == num_ops


@pytest.mark.parametrize(
    ("factor", "capacity"),
    [(1.0, 16), (1.01, 17), (0.001, 1)],  # 4 GPUs, 2 experts each, 8 * 16 tokens, top-1
)
def test_capacity_is_rounded_up(factor: float, capacity: int) -> None:
    assert step(capacity_factor=factor).capacity == capacity


def test_experts_that_do_not_spread_evenly_are_refused() -> None:
    with pytest.raises(ConfigError, match="spread evenly") as caught:
        step(SMALL_GATED, num_gpus=3)
    assert "8 experts" in caught.value.found and "num_gpus" in caught.value.fix


def test_a_switch_gate_has_one_choice() -> None:
    with pytest.raises(ConfigError, match="one expert"):
        step(SMALL_GATED, gate="switch")


def test_an_unknown_model_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        moe_model("gpt2_s")
    assert "gpt2_s_moe" in caught.value.fix
