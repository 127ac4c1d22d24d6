"""The cost model: stages, memory and transfers by hand, and the same answers as the native solvers."""

from __future__ import annotations

import dataclasses
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest

from llmsys import _C
from llmsys.core.costs import GridTable, alpha_beta_ms, ring_all_reduce_ms
from llmsys.core.errors import ConfigError, InfeasibleError, InputError
from llmsys.core.specs import Architecture
from llmsys.dynapipe.baselines import Packing
from llmsys.dynapipe.config import Parallelism, PlannerConfig, StageLayers, stage_layers
from llmsys.dynapipe.costs import CostModel
from llmsys.dynapipe.planner import DynaPipe, plan_iteration
from llmsys.dynapipe.profile import LayerTables
from tests.dynapipe.synthetic import (
    PARAMS_MB,
    grids,
    profile_of,
    random_profile,
    toy_cluster,
    toy_cost_model,
    toy_model,
    toy_profile,
    toy_samples,
)

EMBEDDING, ENCODER, DECODER = PARAMS_MB["embedding"], PARAMS_MB["encoder"], PARAMS_MB["decoder"]


def layers(architecture: Architecture, num_layers: int, **parallelism: int) -> list[tuple[int, int]]:
    stages = stage_layers(toy_model(architecture, num_layers), Parallelism(**parallelism))
    assert [stage.head for stage in stages] == [False] * (len(stages) - 1) + [True]
    return [(stage.num_encoder, stage.num_decoder) for stage in stages]


def test_stages_share_the_layers() -> None:
    assert layers("decoder_only", 8, pipeline=4) == [(0, 2)] * 4
    assert layers("decoder_only", 8, pipeline=3) == [(0, 3), (0, 3), (0, 2)]
    assert layers("decoder_only", 7, pipeline=2, num_chunks=2) == [(0, 2), (0, 2), (0, 2), (0, 1)]
    assert layers("encoder_decoder", 8, pipeline=3) == [(3, 0), (1, 2), (0, 2)]
    assert layers("encoder_decoder", 7, pipeline=1, num_chunks=3) == [(3, 0), (1, 1), (0, 2)]
    assert layers("encoder_decoder", 2, pipeline=2) == [(1, 0), (0, 1)]
    with pytest.raises(ConfigError, match=r"no layer(.|\n)*pipeline=4 x num_chunks=2 = 8 stages(.|\n)*lower"):
        layers("decoder_only", 7, pipeline=4, num_chunks=2)


@pytest.mark.parametrize("name", ["data", "pipeline", "tensor", "num_chunks"])
def test_parallelism_is_at_least_one(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is out of range"):
        Parallelism(**{name: 0})


def test_parallelism_of_zero() -> None:
    with pytest.raises(ConfigError, match="zero_stage is out of range"):
        Parallelism(zero_stage=4)
    parallelism = Parallelism(data=2, pipeline=3, tensor=4, num_chunks=2)
    assert (parallelism.num_devices, parallelism.num_stages) == (24, 6)
    assert parallelism.label() == "dp2 tp4 pp3 x2 chunks"


@pytest.mark.parametrize(
    "change",
    [
        {"memory_limit_mb": 0.0},
        {"memory_limit_mb": (100.0, -1.0)},
        {"memory_limit_mb": ()},
        {"memory_limit_mb": "36000"},
        {"memory_limit_mb": float("nan")},
        {"seed": 1.5},
        {"max_moves": -1},
        {"max_in_flight": 0},
        {"length_multiple": 0},
        {"decoder_extra_tokens": -1},
        {"max_tour_kicks": -1},
        {"seed": -1},
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ConfigError, match=f"{name} is out of range"):
        PlannerConfig(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"recompute": ()},
        {"recompute": "none"},
        {"recompute": ("none", "some")},
        {"schedules": ()},
        {"schedules": ("zb",)},
        {"order": "sorted"},
        {"reorder": "cluster"},
    ],
)
def test_unknown_choices_are_refused(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ConfigError, match=f"{name} is none of the choices"):
        PlannerConfig(**change)
    for planner in (DynaPipe, partial(Packing, max_len=8)):
        with pytest.raises(ConfigError, match="attention is none of the choices"):
            planner(attention="flash")


def test_a_profile_of_other_layers_is_refused() -> None:
    model = toy_cost_model("decoder_only")
    shape = model.model.layer_shape
    known = dataclasses.replace(model.profile, layer_shape=shape)
    assert dataclasses.replace(model, profile=known).profile.layer_shape == shape
    other = dataclasses.replace(model.profile, layer_shape=(shape[0] + 1, *shape[1:]))
    with pytest.raises(ConfigError, match="other layers"):
        dataclasses.replace(model, profile=other)


def test_cost_models_travel_to_worker_processes(architecture: Architecture) -> None:
    model = toy_cost_model(architecture, pipeline=2)
    samples = toy_samples(np.random.default_rng(0), architecture, 12)
    plan = plan_iteration(samples, model, PlannerConfig(max_moves=5))
    again: CostModel = pickle.loads(pickle.dumps(model))
    assert plan_iteration(samples, again, PlannerConfig(max_moves=5)) == plan


def test_one_kind_of_recomputation_is_enough_of_a_profile() -> None:
    model = toy_cost_model("decoder_only", pipeline=2)
    only_full = {key: tables for key, tables in model.profile.tables.items() if key[1] == "full"}
    model = dataclasses.replace(model, profile=dataclasses.replace(model.profile, tables=only_full))
    samples = toy_samples(np.random.default_rng(0), "decoder_only", 12)
    plan = plan_iteration(samples, model, PlannerConfig(recompute=("full",), max_moves=5))
    assert {replica.recompute for replica in plan.replicas} == {"full"}


def test_limits_of_devices() -> None:
    assert PlannerConfig(memory_limit_mb=5.0).device_limits_mb(3) == (5.0, 5.0, 5.0)
    each = PlannerConfig(memory_limit_mb=(5.0, 6.0))
    assert each.device_limits_mb(2) == (5.0, 6.0)
    with pytest.raises(ConfigError, match="for each of the 3 pipeline devices"):
        each.device_limits_mb(3)


# --- state ---


@pytest.mark.parametrize("data", [1, 2, 3, 8])
@pytest.mark.parametrize(("zero_stage", "shared"), [(0, 0), (1, 6), (2, 7), (3, 8)])
def test_state_has_eight_units_of_which_zero_shares(zero_stage: int, shared: int, data: int) -> None:
    model = toy_cost_model("decoder_only", data=data, pipeline=2, zero_stage=zero_stage)
    units = (8 - shared) + shared / data
    np.testing.assert_allclose(model.state_mb("none"), units * model.params_mb("none"), rtol=1e-14)
    if zero_stage == 3:
        np.testing.assert_allclose(model.state_mb("none"), model.params_mb("none") * 8 / data, rtol=1e-14)


def test_the_embedding_rests_where_it_is_used() -> None:
    assert toy_cost_model("decoder_only", pipeline=1).params_mb("none").tolist() == [8 * DECODER + EMBEDDING]
    # First stage and head.
    gpt = toy_cost_model("decoder_only", pipeline=4)
    expected = [2 * DECODER + EMBEDDING, 2 * DECODER, 2 * DECODER, 2 * DECODER + EMBEDDING]
    assert gpt.params_mb("none").tolist() == expected
    # First stage, first stage with decoder layers, head; stages 3, 1 + 2, 2.
    t5 = toy_cost_model("encoder_decoder", pipeline=3)
    expected = [3 * ENCODER + EMBEDDING, ENCODER + 2 * DECODER + EMBEDDING, 2 * DECODER + EMBEDDING]
    assert t5.params_mb("none").tolist() == expected
    # Stages 0 and 2 on device 0, 1 and 3 on device 1; the decoder begins on stage 2.
    chunked = toy_cost_model("encoder_decoder", pipeline=2, num_chunks=2)
    assert chunked.device_stages(1) == [1, 3]
    assert chunked.params_mb("none").tolist() == [2 * ENCODER + 2 * DECODER + EMBEDDING] * 2


# --- micro-batches ---


def values(table: GridTable | None, *point: int) -> dict[str, float]:
    assert table is not None
    return {name: float(column[0]) for name, column in table.query([point]).items()}


def test_costs_of_a_decoder_only_model_by_hand() -> None:
    model = toy_cost_model("decoder_only", pipeline=3)
    costs = model.micro_batch_costs(np.array([[4, 0, 96], [1, 0, 8]]), "selective")
    tables = model.layer_tables("selective")
    layer, head = values(tables.decoder, 96, 4), values(tables.head, 96, 4)
    np.testing.assert_allclose(costs.forward_ms[0], np.array([3, 3, 2]) * layer["fw_ms"] + [0, 0, head["fw_ms"]])
    np.testing.assert_allclose(costs.backward_ms[0], np.array([3, 3, 2]) * layer["bw_ms"] + [0, 0, head["bw_ms"]])
    np.testing.assert_allclose(costs.stored_mb[0], np.array([3, 3, 2]) * layer["stored_mb"])
    peak = np.array([2, 2, 1]) * layer["stored_mb"] + layer["peak_mb"]
    np.testing.assert_allclose(costs.forward_peak_mb[0], peak)
    np.testing.assert_allclose(costs.backward_extra_mb[0], layer["peak_mb"] - layer["stored_mb"])
    assert costs.feasible.tolist() == [True, True]
    small = values(tables.decoder, 8, 1)
    np.testing.assert_allclose(costs.stored_mb[1], np.array([3, 3, 2]) * small["stored_mb"])


def test_costs_of_an_encoder_decoder_model_by_hand() -> None:
    model = toy_cost_model("encoder_decoder", pipeline=3)
    costs = model.micro_batch_costs(np.array([[4, 96, 24]]), "none")
    tables = model.layer_tables("none")
    encoder, decoder, head = (
        values(tables.encoder, 96, 4),
        values(tables.decoder, 96, 24, 4),
        values(tables.head, 24, 4),
    )
    expected = [3 * encoder["fw_ms"], encoder["fw_ms"] + 2 * decoder["fw_ms"], 2 * decoder["fw_ms"] + head["fw_ms"]]
    np.testing.assert_allclose(costs.forward_ms[0], expected)
    stored = [3 * encoder["stored_mb"], encoder["stored_mb"] + 2 * decoder["stored_mb"], 2 * decoder["stored_mb"]]
    np.testing.assert_allclose(costs.stored_mb[0], stored)
    mixed = max(encoder["peak_mb"], encoder["stored_mb"] + decoder["stored_mb"] + decoder["peak_mb"])
    np.testing.assert_allclose(costs.forward_peak_mb[0, 1], mixed)


def test_backward_goes_back_through_the_memory_of_the_forward_pass(architecture: Architecture) -> None:
    """What a backward pass needs at most is what the forward pass needed: later layers are freed before earlier run."""
    model = toy_cost_model(architecture, pipeline=1)
    costs = model.micro_batch_costs(np.array([[4, 96, 24], [2, 256, 64]]), "full")
    np.testing.assert_allclose(costs.stored_mb + costs.backward_extra_mb, costs.forward_peak_mb)
    without = toy_cost_model(architecture, pipeline=1, count_backward_extra=False)
    assert not without.micro_batch_costs(np.array([[4, 96, 24]]), "full").backward_extra_mb.any()


@pytest.mark.native
@pytest.mark.parametrize("parallelism", grids())
def test_costs_and_native_solvers_agree(architecture: Architecture, parallelism: dict[str, int]) -> None:
    """The partition is made with the native times; schedules are made with these costs."""
    rng = np.random.default_rng(3)
    profile = random_profile(rng, architecture, lengths=(8, 64, 256), hole_rate=0.1)
    model = toy_cost_model(architecture, profile=profile, **parallelism)
    shapes = np.stack([rng.integers(1, 9, 40), rng.integers(1, 260, 40), rng.integers(1, 260, 40)], axis=1)
    costs = model.micro_batch_costs(shapes, "none")
    pipeline = model.parallelism.pipeline
    per_device = np.zeros((40, pipeline))
    for device in range(pipeline):
        stages = model.device_stages(device)
        per_device[:, device] = (costs.forward_ms + costs.backward_ms)[:, stages].sum(axis=1)
    loads = model.device_loads("none", [1e9] * pipeline, 1)
    counts, encoder_len, decoder_len = (np.ascontiguousarray(column) for column in shapes.T)
    native = _C.micro_batch_times(*model.native_tables("none"), loads, encoder_len, decoder_len, counts)
    np.testing.assert_allclose(native, per_device.max(axis=1), rtol=1e-9)
    assert (np.isfinite(native) == costs.feasible).all() and 5 < costs.feasible.sum() < 40


def test_what_the_profile_does_not_cover_is_infinite(architecture: Architecture) -> None:
    model = toy_cost_model(architecture, pipeline=8)  # one layer a stage
    shapes = np.array([[1, 64, 64], [1, 2000, 2000], [40, 64, 64], [32, 512, 512]])
    with np.errstate(invalid="raise"):
        costs = model.micro_batch_costs(shapes, "none")
    assert costs.feasible.tolist() == [True, False, False, False]
    assert not any(np.isnan(column).any() for column in costs.columns())


def test_costs_below_the_smallest_length_are_never_negative() -> None:
    rng = np.random.default_rng(1)
    model = toy_cost_model("decoder_only", profile=random_profile(rng, "decoder_only", hole_rate=0.0), pipeline=8)
    tables = model.layer_tables("none")
    counts = np.arange(1, 9)
    points = np.stack([np.ones_like(counts), counts], axis=1)
    assert any((column < 0).any() for column in tables.decoder.query(points).values())
    costs = model.micro_batch_costs(np.stack([counts, np.zeros_like(counts), np.ones_like(counts)], axis=1), "none")
    assert all((column >= 0).all() for column in costs.columns())


def test_a_hole_in_one_column_makes_the_micro_batch_infeasible() -> None:
    """A time without a memory (or the other way round) is no measurement to plan with."""
    axes = [np.array([8.0, 16.0]), np.array([1.0, 2.0])]
    ones = np.ones((2, 2))
    for broken in ("fw_ms", "bw_ms", "stored_mb", "peak_mb"):
        columns = {name: ones.copy() for name in ("fw_ms", "bw_ms", "stored_mb", "peak_mb")}
        columns[broken][1, 1] = np.nan
        decoder = GridTable(axes, columns)
        head = GridTable(axes, {"fw_ms": ones, "bw_ms": ones})
        tables = LayerTables(encoder=None, decoder=decoder, head=head)
        model = toy_cost_model("decoder_only", profile=profile_of("decoder_only", lambda _, t=tables: t))
        costs = model.micro_batch_costs(np.array([[2, 0, 16], [2, 0, 8]]), "none")
        assert costs.feasible.tolist() == [False, True], broken


def test_equal_shapes_and_selections() -> None:
    model = toy_cost_model("decoder_only", pipeline=2)
    costs = model.micro_batch_costs(np.array([[2, 0, 64], [1, 0, 32], [2, 0, 64]]), "none")
    chosen = costs.select([2, 1])
    assert (chosen.forward_ms == costs.forward_ms[[0, 1]]).all() and chosen.forward_ms.flags.c_contiguous
    assert model.micro_batch_costs(np.zeros((0, 3), dtype=np.int64), "none").feasible.shape == (0,)


@pytest.mark.parametrize("shapes", [[[1, 2]], [1, 2, 3], [[0, 0, 8]], [[-1, 0, 8]]])
def test_bad_shapes_are_refused(shapes: list[Any]) -> None:
    with pytest.raises(InputError, match="shapes have the wrong form"):
        toy_cost_model("decoder_only").micro_batch_costs(np.array(shapes), "none")


# --- transfers ---


def test_transfers_take_what_their_link_takes() -> None:
    # Two replicas of four devices on nodes of four: device d of replica r is rank 2 d + r, so 1 to 2 leaves the node.
    model = toy_cost_model("decoder_only", data=2, pipeline=4)
    costs = model.micro_batch_costs(np.array([[4, 0, 96]]), "none")
    size_mb = 4 * 96 * model.model.hidden * 2 / 1e6
    intra = alpha_beta_ms(size_mb, model.cluster.intra_link)
    inter = alpha_beta_ms(size_mb, model.cluster.inter_link)
    assert costs.send_forward_ms[0].tolist() == pytest.approx([intra, inter, intra, 0.0])
    assert costs.send_backward_ms[0].tolist() == pytest.approx([0.0, intra, inter, intra])


def test_a_link_is_that_of_the_slowest_replica() -> None:
    # Three replicas: devices 0 and 1 of replica 0 are ranks 0 and 3, of replica 1 ranks 1 and 4.
    model = toy_cost_model("decoder_only", data=3, pipeline=2)
    assert model.link(0) == model.cluster.inter_link
    assert toy_cost_model("decoder_only", pipeline=1, num_chunks=2).link(0) is None
    ring = toy_cost_model("decoder_only", pipeline=2, num_chunks=2)
    costs = ring.micro_batch_costs(np.array([[4, 0, 96]]), "none")
    assert (costs.send_forward_ms[0, :3] > 0).all() and costs.send_forward_ms[0, 3] == 0


def test_boundaries_carry_the_encoder_and_then_both() -> None:
    model = toy_cost_model("encoder_decoder", pipeline=4)  # two encoder stages, two decoder stages
    lengths = np.array([96.0]), np.array([24.0])
    assert [float(model.boundary_tokens(v, *lengths)[0]) for v in range(3)] == [96, 96, 120]
    gpt = toy_cost_model("decoder_only", pipeline=2)
    assert float(gpt.boundary_tokens(0, *lengths)[0]) == 24


def test_gradients_are_reduced_over_the_slowest_ring() -> None:
    model = toy_cost_model("decoder_only", data=2, pipeline=4)
    largest = float(model.params_mb("none").max())
    assert model.grad_sync_ms("none") == ring_all_reduce_ms(largest, 2, model.cluster.intra_link)
    wide = toy_cost_model("decoder_only", data=6, pipeline=1)
    assert wide.grad_sync_ms("none") == ring_all_reduce_ms(
        float(wide.params_mb("none").max()), 6, wide.cluster.inter_link
    )
    assert toy_cost_model("decoder_only", pipeline=4).grad_sync_ms("none") == 0.0


# --- what does not fit together ---


def cost_model_of(**changes: Any) -> CostModel:
    arguments: dict[str, Any] = {
        "profile": toy_profile("decoder_only"),
        "model": toy_model("decoder_only"),
        "cluster": toy_cluster(8),
        "parallelism": Parallelism(pipeline=2),
    }
    return CostModel(**arguments | changes)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="another kind of model"):
        cost_model_of(profile=toy_profile("encoder_decoder"))
    with pytest.raises(ConfigError, match=r"too few devices(.|\n)*16 for dp4 tp1 pp4(.|\n)*8 in toy"):
        cost_model_of(parallelism=Parallelism(data=4, pipeline=4))
    with pytest.raises(InfeasibleError, match="no tables for tp=2"):
        cost_model_of(parallelism=Parallelism(tensor=2))
    with pytest.raises(ConfigError, match="no layer"):
        cost_model_of(model=toy_model("decoder_only", 1))
    assert cost_model_of().stages == (
        StageLayers(num_encoder=0, num_decoder=4, head=False),
        StageLayers(num_encoder=0, num_decoder=4, head=True),
    )
    assert cost_model_of().max_lengths == (0, 512)
