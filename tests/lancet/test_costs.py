"""Costs: tables, kernels by formula, skewed experts, and that splitting never saves computation."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from llmsys.core.errors import ConfigError, InputError
from llmsys.core.specs import NODES
from llmsys.lancet.costs import (
    CostModel,
    LoadSkew,
    MessageTable,
    RooflineCosts,
    TableCosts,
    cluster_costs,
    deepep_messages,
    node_messages,
    shipped_skew,
)
from llmsys.lancet.costs.roofline import base_name
from llmsys.lancet.data import read_shipped
from llmsys.lancet.graph import LAST, PARTIAL, Graph, Op, Split, Tensor, irregular, is_irregular
from llmsys.lancet.workload import StepConfig, build_step, moe_model


@pytest.fixture(scope="module")
def graph() -> Graph:
    return build_step(StepConfig(model=moe_model("gpt2_s_moe"), num_gpus=16, batch_per_gpu=16))


@pytest.fixture(scope="module")
def costs() -> RooflineCosts:
    return cluster_costs(NODES["p4de"], 16, arithmetic="tf32")


def product(m: int, n: int, k: int, *, target: str = "mm", dtype: str = "bfloat16", flops: float = 0.0) -> Graph:
    a, b = Tensor(name="a", shape=(m, k), dtype=dtype), Tensor(name="b", shape=(k, n), dtype=dtype)
    c = Tensor(name="c", shape=(m, n), dtype=dtype)
    split = Split(inputs=(0, -1), outputs=(0,))
    op = Op(
        name="p",
        kind="compute",
        target=target,
        inputs=("a", "b"),
        outputs=(c,),
        phase="forward",
        flops=flops,
        splits=(split,),
    )
    return Graph(name="product", inputs=(a, b), ops=(op,), outputs=("c",))


def test_given_times_are_answered_as_given() -> None:
    graph = product(8, 8, 8)
    (op,) = graph.ops
    table = TableCosts(ops_ms={"p": 6.0}, parts_ms={("p", 2): 3.5}, copies_ms={"a": 0.25}, part_overhead_ms=0.5)
    assert table.op_ms(graph, op) == 6.0
    assert table.op_ms(graph, op, 2, op.splits[0]) == 3.5
    assert table.op_ms(graph, op, 3, op.splits[0]) == 2.5
    assert table.slice_ms(graph.tensors["a"], 1, 2) == table.join_ms(graph.tensors["a"], 0, 2) == 0.25
    assert table.join_ms(graph.tensors["b"], 0, 2) == 0.0
    view = dataclasses.replace(op, name="v", is_view=True)
    assert table.op_ms(graph, view) == 0.0
    with pytest.raises(InputError) as caught:
        table.op_ms(graph, dataclasses.replace(op, name="q"))
    assert "'q'" in caught.value.summary and "ops_ms['q']" in caught.value.fix


def test_a_message_table_is_linear_between_its_points() -> None:
    table = MessageTable(sizes_bytes=(1000, 2000, 4000), ms=(1.0, 1.5, 3.5))
    assert [table.time_ms(size) for size in (1000, 1500, 3000, 4000)] == [1.0, 1.25, 2.5, 3.5]
    assert table.time_ms(1) == 1.0  # latency
    assert table.time_ms(5000) == pytest.approx(4.5)


@pytest.mark.parametrize(
    ("sizes", "ms"), [((1, 2), (2.0, 1.0)), ((2, 1), (1.0, 2.0)), ((1,), (1.0,)), ((1, 2), (1.0,)), ((1, 2), (-1, 2))]
)
def test_a_message_table_out_of_order_is_refused(sizes: tuple[float, ...], ms: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="not in order"):
        MessageTable(sizes_bytes=sizes, ms=ms)


@pytest.mark.parametrize("num_gpus", [8, 16, 32, 64])
@pytest.mark.parametrize("name", ["p3dn", "p4de"])
def test_an_all_to_all_moves_at_most_what_the_network_carries(name: str, num_gpus: int) -> None:
    node = NODES[name]
    table = node_messages(node, num_gpus, network_efficiency=0.9).dispatch
    size, nodes = 64e6, num_gpus // 8
    leaving = 8 * size * (nodes - 1) / nodes
    fastest_ms = leaving / (node.inter_link.bandwidth_gbps / 8 * 1e6)
    assert table.time_ms(size) >= fastest_ms
    if nodes > 1:
        assert table.time_ms(size) == pytest.approx(fastest_ms / 0.9 + 0.027 * (nodes - 1), rel=0.01)


def test_all_to_alls_take_longer_on_more_nodes_and_slower_networks() -> None:
    def time_ms(name: str, num_gpus: int) -> float:
        return node_messages(NODES[name], num_gpus, network_efficiency=0.9).dispatch.time_ms(32e6)

    times = [time_ms("p4de", num_gpus) for num_gpus in (8, 16, 32, 64)]
    assert times == sorted(times) and times[0] < times[-1] / 10
    assert time_ms("p3dn", 64) == pytest.approx(4 * time_ms("p4de", 64), rel=0.1)


def test_devices_that_make_no_whole_nodes_are_refused() -> None:
    for num_gpus in (1, 3, 12):
        with pytest.raises(ConfigError, match="whole nodes"):
            node_messages(NODES["p4de"], num_gpus, network_efficiency=0.9)
    with pytest.raises(ConfigError) as caught:
        deepep_messages(24)
    assert "8, 16, 32, 64" in caught.value.expected


def test_deepep_slows_down_where_the_network_begins() -> None:
    size = 4096 * 8 * 7168 * 2.0
    combines = [deepep_messages(gpus).combine.time_ms(size) for gpus in (8, 16, 32, 64)]
    assert combines == sorted(combines) and combines[-1] > 10 * combines[0]
    # 4,096 tokens on one node: the source has 0.97 ms for the combine and 0.49 for the dispatch.
    assert combines[0] == pytest.approx(0.9725, rel=0.12)
    assert deepep_messages(8).dispatch.time_ms(size) == pytest.approx(0.4912, rel=0.12)


@pytest.mark.parametrize(
    ("node", "m", "n", "k", "measured_ms"),
    [("p4de", 8192, 4096, 4096, 1.1085), ("p4de", 2048, 3072, 768, 0.0485), ("h100", 8192, 4096, 4096, 0.3513)],
)
def test_matmuls_take_about_what_was_measured(node: str, m: int, n: int, k: int, measured_ms: float) -> None:
    graph = product(m, n, k)
    found = cluster_costs(NODES[node], 8, arithmetic="16bit").op_ms(graph, graph.ops[0])
    assert found == pytest.approx(measured_ms, rel=0.3)


def test_a_matmul_never_beats_the_peak() -> None:
    graph = product(8192, 8192, 8192, dtype="float32")
    for name, arithmetic, tflops in (("p3dn", "fp32", 15.7), ("p4de", "tf32", 156.0), ("h100", "16bit", 989.0)):
        found = cluster_costs(NODES[name], 8, arithmetic=arithmetic).op_ms(graph, graph.ops[0])  # type: ignore[arg-type]
        assert found > 2 * 8192**3 / (tflops * 1e9)


def test_flops_that_are_not_given_are_counted_from_the_shapes(costs: RooflineCosts) -> None:
    counted, given = product(256, 512, 1024), product(256, 512, 1024, flops=2.0 * 256 * 512 * 1024)
    assert costs.op_ms(counted, counted.ops[0]) == costs.op_ms(given, given.ops[0])
    torch_name = product(256, 512, 1024, target="aten.mm.default")
    assert costs.op_ms(torch_name, torch_name.ops[0]) == costs.op_ms(given, given.ops[0])


@pytest.mark.parametrize("target", ["mm", "aten.mm", "aten.mm.default", "mm.default", "aten::mm"])
def test_operators_are_known_by_their_own_names(target: str) -> None:
    assert base_name(target) == "mm"


@pytest.mark.parametrize("skewed", [False, True])
def test_parts_of_computation_cost_at_least_the_whole_in_sum(graph: Graph, costs: RooflineCosts, skewed: bool) -> None:
    skew = shipped_skew("olmoe-1b-7b topk", 32, capacity_factor=1.0, experts_per_link=2) if skewed else None
    costs = dataclasses.replace(costs, skew=skew)
    num_checked = 0
    for op in graph.ops:
        # Less than the whole may be asked of experts that are not full: the unpartitioned op counts their padding.
        whole_ms = costs.op_ms(graph, op)
        if op.is_comm or (skewed and any(is_irregular(axis) for s in op.splits for axis in (*s.inputs, *s.outputs))):
            continue
        assert whole_ms > 0
        for split in op.splits:
            sums = [k * costs.op_ms(graph, op, k, split) for k in (1, 2, 4, 8)]
            assert sums[0] == whole_ms
            assert all(b > a for a, b in itertools.pairwise(sums)), (op.name, sums)
            num_checked += 1
    assert num_checked > 300


def test_every_part_of_a_matmul_reads_the_whole_weight(graph: Graph, costs: RooflineCosts) -> None:
    op = graph.ops[graph.index_of["l0.attn.qkv"]]
    (split,) = op.splits
    weight = graph.tensors["l0.attn.qkv.weight"].size_bytes + graph.tensors["l0.attn.qkv.bias"].size_bytes
    again_ms = costs.kernels.read * weight / (costs.device.memory_bandwidth_gb_per_s * 1e6) + costs.kernels.launch_ms
    overhead_ms = 4 * costs.op_ms(graph, op, 4, split) - costs.op_ms(graph, op)
    assert overhead_ms == pytest.approx(3 * again_ms)


def test_larger_tensors_cost_more(costs: RooflineCosts) -> None:
    def total(batch: int) -> dict[str, float]:
        step = build_step(StepConfig(model=moe_model("gpt2_s_moe"), num_gpus=16, batch_per_gpu=batch))
        return {op.name: costs.op_ms(step, op) for op in step.ops}

    small, large = total(8), total(16)
    assert all(large[name] >= small[name] for name in small)
    assert sum(large.values()) > 1.5 * sum(small.values())


def test_an_all_to_all_in_parts_follows_the_static_rule(graph: Graph, costs: RooflineCosts) -> None:
    op = graph.ops[graph.comm_ops("all_to_all")[0]]
    size = graph.tensors[op.inputs[0]].size_bytes
    for split in op.splits:
        assert costs.op_ms(graph, op, 4, split) == costs.messages.dispatch.time_ms(size / 4)


def test_uneven_experts_send_less_but_compute_in_fuller_buffers(graph: Graph, costs: RooflineCosts) -> None:
    skew = shipped_skew("olmoe-1b-7b topk", 32, capacity_factor=1.0, experts_per_link=2)
    skewed = dataclasses.replace(costs, skew=skew)
    to_experts, from_experts = (graph.ops[index] for index in graph.comm_ops("all_to_all")[:2])
    uneven = to_experts.splits[0]
    assert skewed.op_ms(graph, to_experts) == costs.op_ms(graph, to_experts)  # the whole one is padded
    counts_ms = costs.messages.dispatch.time_ms(0)
    sent = skewed.op_ms(graph, from_experts, 2, uneven)
    assert skewed.op_ms(graph, to_experts, 2, uneven) == pytest.approx(sent + counts_ms)
    assert sent < costs.op_ms(graph, from_experts, 2, uneven) * 1.5
    matmul = graph.ops[graph.index_of["l1.moe.experts.up"]]
    assert skewed.op_ms(graph, matmul, 2, matmul.splits[0]) > costs.op_ms(graph, matmul, 2, matmul.splits[0])
    assert skewed.op_ms(graph, matmul, 2, matmul.splits[1]) == costs.op_ms(graph, matmul, 2, matmul.splits[1])


def test_rows_of_the_parts_add_up_to_the_unpartitioned_rows() -> None:
    rng = np.random.default_rng(0)
    for num_parts in (1, 2, 3, 8):
        skew = LoadSkew.of(rng.random(16) + 0.1, capacity_factor=1.2, experts_per_link=2)
        rows = skew.part_rows(num_parts)
        np.testing.assert_allclose(rows.sum(axis=0), np.minimum(np.array(skew.loads) / 1.2, 1.0))
        assert rows.sum(axis=0).max() / num_parts <= skew.buffer_share(num_parts) + 1e-12 <= 1.0 + 1e-9
        assert skew.sent_share(num_parts) <= skew.buffer_share(num_parts) + 1e-12


def test_even_loads_give_the_static_rule() -> None:
    skew = LoadSkew.of(np.ones(8), capacity_factor=1.0, experts_per_link=2)
    assert [skew.buffer_share(k) for k in (1, 2, 4)] == pytest.approx([1, 0.5, 0.25])
    assert [skew.sent_share(k) for k in (1, 2, 4)] == pytest.approx([1, 0.5, 0.25])
    assert skew.dropped_share == 0.0
    busy = LoadSkew.of([3, 1, 0, 0], capacity_factor=1.0, experts_per_link=1)
    assert busy.dropped_share == pytest.approx(0.5)
    assert busy.buffer_share(2) == pytest.approx((1.0 + 0.5) / 2)  # full at once, then the second expert's other half


@pytest.mark.parametrize(
    ("loads", "changes", "error"),
    [([], {}, InputError), ([-1.0, 2.0], {}, InputError), ([0.0, 0.0], {}, InputError), ([1.0] * 3, {}, ConfigError)],
)
def test_bad_loads_are_refused(loads: list[float], changes: dict[str, float], error: type[Exception]) -> None:
    with pytest.raises(error):
        LoadSkew.of(loads, capacity_factor=1.0, experts_per_link=2)


def test_copies(graph: Graph, costs: RooflineCosts) -> None:
    tensor = graph.tensors["l1.moe.dispatch"]
    assert costs.slice_ms(tensor, 0, 4) == 0.0  # a view
    assert 0 < costs.slice_ms(tensor, 1, 2) < costs.slice_ms(tensor, 1, 8)
    assert costs.join_ms(tensor, LAST, 4) == 0.0
    once = costs.join_ms(tensor, 0, 4)
    assert 0 < once < costs.join_ms(tensor, irregular(1), 4)
    assert costs.join_ms(tensor, PARTIAL, 3) == pytest.approx(2 * costs.join_ms(tensor, PARTIAL, 2))
    in_place = dataclasses.replace(costs, free_joins=True)
    assert in_place.join_ms(tensor, 0, 4) == 0.0 and in_place.join_ms(tensor, 1, 4) > 0


def test_an_arithmetic_that_a_device_lacks_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        cluster_costs(NODES["p3dn"], 8, arithmetic="tf32")
    assert caught.value.expected == "one of fp32, 16bit"


def test_costs_keep_the_contract(costs: RooflineCosts) -> None:
    models: list[CostModel] = [costs, TableCosts(ops_ms={})]
    assert all(model.name for model in models)
    assert "tf32" in costs.name and "400 Gbps" in costs.name


def test_shipped_tables_say_where_they_are_from() -> None:
    for name in ("device_fit.json", "all_to_all_fit.json", "load_quantiles.json"):
        assert "make_lancet_tables" in read_shipped(name)["description"]


@pytest.mark.data
def test_shipped_tables_are_what_the_script_makes(tmp_path: Path) -> None:
    root = Path(os.environ.get("LLMSYS_DATA_ROOT", Path(__file__).resolve().parents[2] / "../shared/data"))
    if not (root / "gpu_gemm_perf.parquet").is_file():
        pytest.skip(f"no gpu_gemm_perf.parquet in {root}: set LLMSYS_DATA_ROOT to the directory of the real files")
    make = pytest.importorskip("experiments.make_lancet_tables")
    make.main([str(root), "--output", str(tmp_path)])
    for name in ("device_fit.json", "all_to_all_fit.json", "load_quantiles.json"):
        made = json.loads((tmp_path / name).read_text())
        assert_close(made, read_shipped(name), name)


def assert_close(made: object, shipped: object, where: str) -> None:
    if isinstance(made, dict) and isinstance(shipped, dict):
        assert made.keys() == shipped.keys(), where
        for key in made:
            assert_close(made[key], shipped[key], f"{where}.{key}")
    elif isinstance(made, list) and isinstance(shipped, list):
        assert made == pytest.approx(shipped, rel=1e-3), where
    elif isinstance(made, float):
        assert made == pytest.approx(shipped, rel=1e-3, abs=1e-4), where
    else:
        assert made == shipped, where
