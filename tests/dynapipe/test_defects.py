"""What is known to go wrong in the public planner must not go wrong here: one test for each such defect.

The numbers are those of the list the tests are named for; 6 (token counts without padding) is test_baselines.py's
test_6_token_counts_include_padding, 13 (an unprotected plan store) belongs to the runtime, and 15 is about code that
does not exist here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsys.core.config import build
from llmsys.core.errors import ConfigError, DataNotFoundError, InfeasibleError, InputError, PlanError
from llmsys.core.specs import Architecture
from llmsys.dynapipe.config import PlannerConfig
from llmsys.dynapipe.costs import CostModel
from llmsys.dynapipe.microbatch import PaddedLengths, group_shapes, partition
from llmsys.dynapipe.ordering import order_samples
from llmsys.dynapipe.plan import check_plan, to_bytes
from llmsys.dynapipe.plan.instructions import RecvActivationStart
from llmsys.dynapipe.planner import plan_iteration
from llmsys.dynapipe.profile import load_profile, open_profile
from llmsys.dynapipe.simulator import simulate
from llmsys.dynapipe.workload import LengthTable, Samples, load_multitask_lengths
from tests.dynapipe import oracles
from tests.dynapipe.synthetic import toy_cluster, toy_cost_model, toy_model, toy_profile, toy_samples

FAST = PlannerConfig(memory_limit_mb=6000.0, max_moves=20)


@pytest.mark.parametrize("scale", [1.0, 0.1, 1e-3])
def test_1_thin_steps_between_candidates(architecture: Architecture, scale: float) -> None:
    """Steps of 5 ms between the longest micro-batches tried: worse the smaller the model, at last none feasible."""
    model = toy_cost_model(architecture, profile=toy_profile(architecture, time_scale=scale), pipeline=4)
    samples = toy_samples(np.random.default_rng(4), architecture, 30)
    padded = PaddedLengths.of(samples, encoder_decoder=model.encoder_decoder, config=FAST)
    order = order_samples(padded.encoder_len, padded.decoder_len, FAST)
    found = partition(padded, order, model, FAST, "none", 1)
    assert found is not None
    lengths = padded.encoder_len[order], padded.decoder_len[order]
    times = oracles.run_times(model, "none", FAST.device_limits_mb(4), 1.0, *lengths)
    assert found.objective_ms == pytest.approx(oracles.best_partition_by_every_maximum(times, 3.0, 1.0), rel=1e-9)
    if scale < 0.01:  # so small that steps of 5 ms would try nothing but the first candidate
        assert np.ptp(times[np.isfinite(times)]) < 5.0
    plan = plan_iteration(samples, model, FAST)
    assert plan.estimated_ms > 0 and plan.num_micro_batches >= 4


def test_2_first_feasible_recomputation(architecture: Architecture) -> None:
    """It stopped at the first kind that fits a share of memory, though another one's partition was better."""
    model = toy_cost_model(architecture, pipeline=4)
    samples = toy_samples(np.random.default_rng(6), architecture, 60)
    seen = set()
    for free_mb in (150.0, 300.0, 600.0, 1200.0, 4000.0):
        config = dataclasses.replace(FAST, memory_limit_mb=float(model.state_mb("none").max()) + free_mb)
        plan = plan_iteration(samples, model, config)
        seen |= {replica.recompute for replica in plan.replicas}
        for kind in ("none", "selective", "full"):
            try:
                only = plan_iteration(samples, model, dataclasses.replace(config, recompute=(kind,)))  # type: ignore[arg-type]
            except InfeasibleError:
                continue
            assert plan.estimated_ms <= only.estimated_ms * 1.03, (free_mb, kind)
    assert seen > {"none"}


@pytest.mark.parametrize("data", [2, 3, 8])
def test_3_zero_3_divides_everything_once(architecture: Architecture, data: int) -> None:
    model = toy_cost_model(architecture, data=data, pipeline=2, zero_stage=3)
    for kind in ("none", "selective", "full"):
        expected = model.params_mb(kind) * 8 / data  # type: ignore[arg-type]
        np.testing.assert_allclose(model.state_mb(kind), expected, rtol=1e-14)  # type: ignore[arg-type]


def test_4_empty_replicas_and_empty_batches(architecture: Architecture) -> None:
    model = toy_cost_model(architecture, data=4, pipeline=2)
    samples = toy_samples(np.random.default_rng(0), architecture, 4, max_len=20)
    plan = plan_iteration(samples, model, FAST)
    assert [len(replica.micro_batches) for replica in plan.replicas] == [1, 1, 1, 1]
    for too_few in (samples.select([0, 1, 2]), samples.select([])):
        with pytest.raises(InputError) as info:
            plan_iteration(too_few, model, FAST)
        assert "at least" in info.value.expected and "raise tokens_per_batch" in info.value.fix


def test_5_every_option_works_for_decoder_only_models() -> None:
    model = toy_cost_model("decoder_only", data=2, pipeline=2, num_chunks=2)
    samples = toy_samples(np.random.default_rng(0), "decoder_only", 30)
    options: list[dict[str, Any]] = [
        {"order": "sort"},
        {"order": "tour"},
        {"reorder": "none"},
        {"reorder": "clusters"},
        {"schedules": ("1f1b",)},
        {"schedules": ("adaptive",)},
        {"recompute": ("full",)},
        {"max_in_flight": 1},
        {"length_multiple": 1},
    ]
    for option in options:
        plan = plan_iteration(samples, model, dataclasses.replace(FAST, **option))
        assert simulate(plan, model).makespan_ms == plan.estimated_ms


def test_7_the_deadlock_check_explains_itself(architecture: Architecture) -> None:
    """Its error path raised an UnboundLocalError, and nothing called it; here no plan is made or read without it."""
    model = toy_cost_model(architecture, pipeline=3)
    plan = plan_iteration(toy_samples(np.random.default_rng(0), architecture, 20), model, FAST)
    lists = [list(ops) for ops in plan.replicas[0].instructions]
    at = next(i for i, op in enumerate(lists[1]) if type(op) is RecvActivationStart)
    lists[1].append(lists[1].pop(at))
    replica = dataclasses.replace(plan.replicas[0], instructions=tuple(map(tuple, lists)))
    with pytest.raises(PlanError) as info:
        check_plan(dataclasses.replace(plan, replicas=(replica,)))
    assert info.value.expected and info.value.found and "device 0" in info.value.grid and ">" in info.value.grid


def test_8_a_hole_beside_a_measured_size(architecture: Architecture) -> None:
    """One size out of memory made everything above the last measured size infinite, however little above."""
    at = {}
    for hole in ("infeasible", "extrapolate"):
        model = toy_cost_model(architecture, profile=toy_profile(architecture, capacity_mb=800.0, hole=hole))  # type: ignore[arg-type]
        sizes = np.arange(1, 33)
        shapes = np.stack([sizes, 0 * sizes + 256, 0 * sizes + 256], axis=1)
        at[hole] = int(model.micro_batch_costs(shapes, "none").feasible.sum())
    assert at["infeasible"] in (1, 2, 4, 8, 16) and at["extrapolate"] == 2 * at["infeasible"]


@pytest.mark.data
def test_8_nine_samples_of_2048_on_the_real_profile(real_data_root: Path) -> None:
    times = {}
    for hole in ("infeasible", "extrapolate"):
        decoder = load_profile(real_data_root, "gpt_6.7b", hole=hole).layer_tables(1, "none").decoder  # type: ignore[arg-type]
        times[hole] = decoder.query([[2048, 8], [2048, 9]])["fw_ms"]
    assert times["infeasible"][0] == pytest.approx(44.43, abs=0.01) and np.isinf(times["infeasible"][1])
    assert np.isfinite(times["extrapolate"]).all() and times["extrapolate"][1] > times["extrapolate"][0]


def test_9_unseeded_shuffles(architecture: Architecture) -> None:
    model = toy_cost_model(architecture, data=2, pipeline=3)
    samples = toy_samples(np.random.default_rng(0), architecture, 60)
    plans = []
    for state in (1, 2):
        np.random.seed(state)  # the generator that was used without a seed
        plans.append(plan_iteration(samples, model, FAST))
    assert plans[0] == plans[1]


def test_10_one_rounding_for_all(architecture: Architecture) -> None:
    """Extra tokens were counted by the costs but not by the partition, and rounded differently."""
    model = toy_cost_model(architecture, pipeline=3)
    samples = toy_samples(np.random.default_rng(3), architecture, 40)
    for config in (FAST, dataclasses.replace(FAST, length_multiple=16, decoder_extra_tokens=7)):
        padded = PaddedLengths.of(samples, encoder_decoder=model.encoder_decoder, config=config)
        made = partition(
            padded, order_samples(padded.encoder_len, padded.decoder_len, config), model, config, "none", 1
        )
        assert made is not None
        costs = model.micro_batch_costs(group_shapes(made.groups, padded), "none")
        # The times that the partition was chosen by are those that the schedule is made with.
        np.testing.assert_allclose(made.times_ms, (costs.forward_ms + costs.backward_ms).max(axis=1), rtol=1e-9)
        plan = plan_iteration(samples, model, config)
        for m in plan.replicas[0].micro_batches:
            index = list(m.samples)
            assert (m.encoder_len, m.decoder_len) == (padded.encoder_len[index].max(), padded.decoder_len[index].max())


@pytest.mark.parametrize(("pipeline", "num_chunks", "num_layers"), [(2, 3, 7), (3, 3, 10), (3, 1, 7), (4, 1, 5)])
def test_11_odd_chunks_and_uneven_stages(
    architecture: Architecture, pipeline: int, num_chunks: int, num_layers: int
) -> None:
    """C / 2 in whole numbers lost half a chunk's work, and stages had to be equal."""
    model = toy_cost_model(architecture, num_layers=num_layers, pipeline=pipeline, num_chunks=num_chunks)
    samples = toy_samples(np.random.default_rng(3), architecture, 25)
    padded = PaddedLengths.of(samples, encoder_decoder=model.encoder_decoder, config=FAST)
    made = partition(padded, np.arange(25), model, FAST, "none", 1)
    assert made is not None
    costs = model.micro_batch_costs(group_shapes(made.groups, padded), "none")
    times = costs.forward_ms + costs.backward_ms
    per_device = [times[:, model.device_stages(d)].sum(axis=1) for d in range(pipeline)]
    np.testing.assert_allclose(made.times_ms, np.max(per_device, axis=0), rtol=1e-9)
    plan = plan_iteration(samples, model, FAST)
    assert simulate(plan, model).makespan_ms == plan.estimated_ms


def test_12_memory_of_the_backward_pass_and_limits_of_devices(architecture: Architecture) -> None:
    samples = toy_samples(np.random.default_rng(8), architecture, 30)
    with_extra, without = (
        toy_cost_model(architecture, pipeline=2, count_backward_extra=count) for count in (True, False)
    )
    plan = plan_iteration(samples, without, FAST)
    assert simulate(plan, with_extra).peak_mb >= simulate(plan, without).peak_mb
    costs = with_extra.micro_batch_costs(plan.replicas[0].shapes(), plan.replicas[0].recompute)
    assert (costs.backward_extra_mb > 0).all()
    # Recomputing stores little, but the backward pass needs the layer's full activations again.
    full = with_extra.micro_batch_costs(plan.replicas[0].shapes(), "full")
    assert (full.backward_extra_mb > full.stored_mb / 4).all()
    state = with_extra.state_mb("none")
    limits = (float(state[0]) + 3000.0, float(state[1]) + 600.0)
    tight = plan_iteration(samples, with_extra, dataclasses.replace(FAST, memory_limit_mb=limits))
    peaks = np.array([replica.peak_mb for replica in simulate(tight, with_extra).replicas])
    assert (peaks <= np.array(limits)).all() and tight.memory_limit_mb == limits


def test_14_size_of_a_stored_plan() -> None:
    """32 bytes for each dimension of each tensor made 44 kB of four stages and sixteen micro-batches."""
    model = toy_cost_model("decoder_only", pipeline=4)
    plan = plan_iteration(toy_samples(np.random.default_rng(0), "decoder_only", 200), model, FAST)
    assert plan.num_micro_batches >= 16
    assert len(to_bytes(plan)) < 250 * plan.num_micro_batches


# --- inputs that are plainly bad: each is refused, with a word on what to change ---


def planned(samples: Samples, model: CostModel | None = None) -> None:
    plan_iteration(samples, model or toy_cost_model("decoder_only", data=2, pipeline=2), FAST)


def explained(error: Any) -> None:
    assert error.summary and error.expected and error.found and error.fix


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(InputError, match="batch is empty") as info:
        planned(Samples.decoder_only([], []))
    explained(info.value)


def test_an_over_long_sample_is_named_with_its_length_and_the_limit() -> None:
    with pytest.raises(InfeasibleError, match="sample 2 fits no micro-batch") as info:
        planned(Samples.decoder_only([10, 20, 900, 30], [5, 5, 50, 5]))
    explained(info.value)
    assert "decoder length 950" in info.value.found and "decoder up to 512" in info.value.expected


def test_fewer_samples_than_replicas_are_refused() -> None:
    with pytest.raises(InputError, match="fewer samples than replicas") as info:
        planned(Samples.decoder_only([10], [5]))
    explained(info.value)
    assert "at least 2" in info.value.expected and "1 samples" in info.value.found


def test_a_profile_with_holes_limits_what_can_be_planned() -> None:
    profile = toy_profile("decoder_only", capacity_mb=120.0)
    model = CostModel(
        profile=profile,
        model=toy_model("decoder_only"),
        cluster=toy_cluster(),
        parallelism=toy_cost_model("decoder_only", pipeline=2).parallelism,
    )
    short = Samples.decoder_only([100] * 20, [20] * 20)
    plan = plan_iteration(short, model, FAST)
    assert simulate(plan, model).makespan_ms == plan.estimated_ms
    with pytest.raises(InfeasibleError, match="sample 1 fits no micro-batch") as info:
        planned(Samples.decoder_only([100, 480], [20, 20]), model)
    explained(info.value)


@pytest.mark.parametrize("bad", [0, -3])
def test_lengths_of_zero_or_less_are_refused(bad: int) -> None:
    for make in (
        lambda: Samples.decoder_only([5, bad], [5, 5]),
        lambda: Samples.encoder_decoder([5, 5], [5, bad]),
        lambda: Samples(encoder_len=np.array([0, 0]), decoder_len=np.array([4, bad])),
    ):
        with pytest.raises(InputError, match="sample 1 has") as info:
            make()
        explained(info.value)
    if bad < 0:
        with pytest.raises(InputError, match="sample 1 has"):
            LengthTable.of([5, bad], [5, 5], origin="test")


def test_unknown_settings_are_refused_with_the_nearest_known() -> None:
    with pytest.raises(ConfigError, match=r"memory_limit(.|\n)*memory_limit_mb"):
        build(PlannerConfig, {"memory_limit": 36_000}, path="planner")
    with pytest.raises(ConfigError, match="reorder"):
        build(PlannerConfig, {"reorder": "all"})
    with pytest.raises(ConfigError, match=r"planner(.|\n)*max_moves is out of range"):
        build(PlannerConfig, {"max_moves": -1}, path="planner")
    made = build(PlannerConfig, {"memory_limit_mb": [10, 20.0], "recompute": ["full"], "schedules": ["1f1b"]})
    assert made == PlannerConfig(memory_limit_mb=(10, 20.0), recompute=("full",), schedules=("1f1b",))


def test_a_missing_data_directory_is_named() -> None:
    for load in (
        lambda root: load_multitask_lengths(root),
        lambda root: open_profile(root, "gpt_6.7b"),
    ):
        with pytest.raises(DataNotFoundError, match=r"data\.root is not a directory") as info:
            load(Path("no/such/directory"))
        explained(info.value)
