"""Whole plans of small random workloads: complete, within memory, exact about themselves, and repeatable."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsys.core.errors import ConfigError, InfeasibleError, InputError
from llmsys.core.specs import Architecture
from llmsys.dynapipe.config import PlannerConfig
from llmsys.dynapipe.costs import CostModel
from llmsys.dynapipe.plan import Plan, from_bytes, from_text, to_bytes, to_text, transfers_between
from llmsys.dynapipe.plan.instructions import SENDS
from llmsys.dynapipe.planner import plan_iteration, with_enough_groups
from llmsys.dynapipe.simulator import simulate
from llmsys.dynapipe.workload import Samples
from tests.dynapipe.synthetic import grids, toy_cost_model, toy_profile, toy_samples

FAST = PlannerConfig(memory_limit_mb=6000.0, max_moves=20)
ROOT = Path(__file__).resolve().parents[2]


def problem(architecture: Architecture, number: int) -> tuple[CostModel, Samples, PlannerConfig]:
    rng = np.random.default_rng(number)
    extra, num_samples = bool(number % 2), int(rng.integers(3, 45))
    model = toy_cost_model(architecture, count_backward_extra=extra, **grids()[number])
    samples = toy_samples(rng, architecture, num_samples)
    # From roomy to as little as a micro-batch of the longest sample needs, twice over.
    return model, samples, replace(FAST, memory_limit_mb=float(rng.choice([6000.0, 2500.0])), seed=number)


@pytest.mark.parametrize("number", range(len(grids())))
def test_plans_keep_their_promises(architecture: Architecture, number: int) -> None:
    model, samples, config = problem(architecture, number)
    plan = plan_iteration(samples, model, config)
    check_samples(plan, samples, config)
    check_transfers(plan)
    check_estimate(plan, model)
    assert from_text(to_text(plan)) == plan and from_bytes(to_bytes(plan)) == plan
    assert plan.planner == "dynapipe" and plan.attention == "padded" and plan.num_samples == len(samples)
    assert plan.parallelism == model.parallelism and plan.stages == model.stages


def check_samples(plan: Plan, samples: Samples, config: PlannerConfig) -> None:
    """Every sample in one micro-batch, which is as long as the longest of them, rounded up, and no longer."""
    held = [sample for r in plan.replicas for m in r.micro_batches for sample in m.samples]
    assert sorted(held) == list(range(len(samples)))
    assert all(replica.micro_batches for replica in plan.replicas)
    extra = config.decoder_extra_tokens if samples.encoder_len.any() else 0
    for micro_batch in (m for r in plan.replicas for m in r.micro_batches):
        index = list(micro_batch.samples)
        assert all(len(row) == 1 for row in micro_batch.rows)
        for got, longest in (
            (micro_batch.encoder_len, samples.encoder_len[index].max()),
            (micro_batch.decoder_len, samples.decoder_len[index].max() + extra),
        ):
            assert longest <= got < longest + config.length_multiple and got % config.length_multiple == 0
    encoder, decoder = plan.padded_tokens()
    assert encoder >= samples.encoder_len.sum() and decoder >= samples.decoder_len.sum() + extra * len(samples)


def check_transfers(plan: Plan) -> None:
    for replica in plan.replicas:
        for device, peer in itertools.combinations(range(plan.parallelism.pipeline), 2):
            mine = [(op.micro_batch, type(op) in SENDS) for _, op in transfers_between(replica, device, peer)]
            theirs = [(op.micro_batch, type(op) not in SENDS) for _, op in transfers_between(replica, peer, device)]
            assert mine == theirs


def check_estimate(plan: Plan, model: CostModel) -> None:
    """The simulator, which shares no code with the planner's estimate, gets the same; also from both forms."""
    for form in (plan, from_text(to_text(plan)), from_bytes(to_bytes(plan))):
        result = simulate(form, model)
        assert result.makespan_ms == plan.estimated_ms
        assert result.iteration_ms == plan.estimated_ms and result.grad_sync_ms == 0.0
        for replica, expected in zip(result.replicas, plan.replicas, strict=True):
            assert replica.makespan_ms == expected.estimate.makespan_ms
            np.testing.assert_allclose(replica.peak_mb, expected.estimate.peak_mb, rtol=1e-9)
            assert (np.array(replica.peak_mb) <= np.array(plan.memory_limit_mb) * (1 + 1e-12)).all()
    assert plan.estimated_peak_mb == max(max(r.estimate.peak_mb) for r in plan.replicas)


def test_same_arguments_give_the_same_plan(cost_model: CostModel, samples: Samples) -> None:
    plan = plan_iteration(samples, cost_model, FAST)
    assert plan_iteration(samples, cost_model, FAST) == plan
    # Neither does a model that has planned other things before, or global random state, matter.
    np.random.seed(0)
    fresh = toy_cost_model(cost_model.model.architecture, data=2, pipeline=3)
    plan_iteration(samples.select(range(10)), fresh, FAST)
    assert plan_iteration(samples, fresh, FAST) == plan


_PRINT_PLANS = """
import tests.conftest  # which native module to use
from tests.dynapipe.test_planner import FAST, problem
from llmsys.dynapipe.plan import to_text
from llmsys.dynapipe.planner import plan_iteration
for number in (5, 12, 19):
    for architecture in ("decoder_only", "encoder_decoder"):
        model, samples, config = problem(architecture, number)
        print(to_text(plan_iteration(samples, model, config)))
"""


def test_hash_seeds_do_not_matter() -> None:
    texts = set()
    for seed in ("0", "1", "4711"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", _PRINT_PLANS]
        run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        texts.add(run.stdout)
    assert len(texts) == 1 and texts.pop().count("llmsys dynapipe plan") == 6


def test_more_search_is_never_worse(cost_model: CostModel, samples: Samples) -> None:
    tight = replace(FAST, memory_limit_mb=2500.0)
    times = [
        plan_iteration(samples, cost_model, replace(tight, reorder=reorder, max_moves=moves)).estimated_ms  # type: ignore[arg-type]
        for reorder, moves in (("none", 0), ("clusters", 0), ("search", 0), ("search", 50), ("search", 400))
    ]
    assert times[1] == times[2] and times == sorted(times, reverse=True) and times[-1] < times[0]


def test_each_setting_is_obeyed(cost_model: CostModel, samples: Samples) -> None:
    for schedule, recompute in itertools.product(("1f1b", "adaptive"), ("none", "selective", "full")):
        config = replace(FAST, schedules=(schedule,), recompute=(recompute,))
        plan = plan_iteration(samples, cost_model, config)
        assert {(r.schedule, r.recompute) for r in plan.replicas} == {(schedule, recompute)}
    lone = plan_iteration(samples, cost_model, replace(FAST, length_multiple=1, decoder_extra_tokens=0))
    assert sum(lone.padded_tokens()) < sum(plan_iteration(samples, cost_model, FAST).padded_tokens())


def test_adaptive_needs_less_memory_when_told_to(cost_model: CostModel, samples: Samples) -> None:
    peaks = [
        plan_iteration(samples, cost_model, replace(FAST, schedules=("adaptive",), max_in_flight=n)).estimated_peak_mb
        for n in (1, 1000)
    ]
    assert peaks[0] < peaks[1]


def test_each_device_has_its_own_limit(architecture: Architecture) -> None:
    model = toy_cost_model(architecture, pipeline=3)
    samples = toy_samples(np.random.default_rng(0), architecture, 40)
    state = model.state_mb("none")
    roomy = plan_iteration(samples, model, replace(FAST, memory_limit_mb=tuple((state + 4000).tolist())))
    needed = np.array(roomy.replicas[0].estimate.peak_mb) - state
    limits = tuple((state + np.array([4000, 4000, 0.6 * needed[2]])).tolist())
    tight = plan_iteration(samples, model, replace(FAST, memory_limit_mb=limits))
    assert tight.memory_limit_mb == limits and tight != roomy
    peaks = tight.replicas[0].estimate.peak_mb
    assert peaks[2] <= limits[2] and max(peaks[:2]) - state[0] > 0.6 * needed[2]


def test_layers_and_chunks_need_not_divide(architecture: Architecture) -> None:
    samples = toy_samples(np.random.default_rng(2), architecture, 20)
    for pipeline, num_chunks, num_layers in ((3, 1, 8), (2, 3, 13), (3, 3, 9), (4, 2, 11)):
        model = toy_cost_model(architecture, num_layers=num_layers, pipeline=pipeline, num_chunks=num_chunks)
        plan = plan_iteration(samples, model, FAST)
        assert sum(stage.num_encoder + stage.num_decoder for stage in plan.stages) == num_layers
        assert simulate(plan, model).makespan_ms == plan.estimated_ms


def test_a_single_sample_and_one_for_each_replica(architecture: Architecture) -> None:
    for data in (1, 2, 3):
        model = toy_cost_model(architecture, data=data, pipeline=2)
        samples = toy_samples(np.random.default_rng(1), architecture, data)
        plan = plan_iteration(samples, model, FAST)
        assert [len(replica.micro_batches) for replica in plan.replicas] == [1] * data


def test_replicas_never_stay_without_work(architecture: Architecture) -> None:
    # Equal short samples that one micro-batch would hold best.
    model = toy_cost_model(architecture, data=3, pipeline=1)
    samples = Samples.of(architecture, [8] * 7, [6] * 7)
    plan = plan_iteration(samples, model, FAST)
    sizes = [sum(len(m.samples) for m in replica.micro_batches) for replica in plan.replicas]
    assert sum(sizes) == 7 and min(sizes) >= 1


def test_largest_groups_are_halved() -> None:
    groups = ((0, 1, 2, 3, 4), (5,))
    assert with_enough_groups(groups, 2) == groups
    assert with_enough_groups(groups, 3) == ((0, 1), (2, 3, 4), (5,))
    assert with_enough_groups(groups, 6) == ((0,), (1,), (2,), (3,), (4,), (5,))


def test_memory_decides_between_recompute_kinds(architecture: Architecture) -> None:
    model = toy_cost_model(architecture, pipeline=2)
    samples = toy_samples(np.random.default_rng(5), architecture, 40)
    times = {}
    for free_mb in (6000.0, 250.0):
        limit = float(model.state_mb("none").max()) + free_mb
        plan = plan_iteration(samples, model, replace(FAST, memory_limit_mb=limit))
        times[free_mb] = (plan.replicas[0].recompute, plan.estimated_ms)
    assert times[6000.0][0] == "none" and times[250.0][0] != "none"
    assert times[6000.0][1] < times[250.0][1]


# --- what cannot be planned ---


def infeasible(samples: Samples, model: CostModel, **changes: Any) -> InfeasibleError:
    with pytest.raises(InfeasibleError) as info:
        plan_iteration(samples, model, replace(FAST, **changes))
    assert info.value.expected and info.value.found and info.value.fix
    return info.value


def test_bad_batches_are_refused(cost_model: CostModel, samples: Samples) -> None:
    with pytest.raises(InputError, match=r"batch is empty(.|\n)*0 samples(.|\n)*raise tokens_per_batch"):
        plan_iteration(samples.select([]), cost_model, FAST)
    with pytest.raises(InputError, match=r"fewer samples than replicas(.|\n)*at least 2(.|\n)*1 samples(.|\n)*lower"):
        plan_iteration(samples.select([0]), cost_model, FAST)
    other = Samples.of("decoder_only" if cost_model.encoder_decoder else "encoder_decoder", [8, 8], [8, 8])
    with pytest.raises(ConfigError, match="another kind than the model"):
        plan_iteration(other, cost_model, FAST)


def test_what_does_not_fit_is_named(cost_model: CostModel, samples: Samples) -> None:
    lengths = samples.decoder_len.copy()
    lengths[11] = 600
    too_long = Samples(encoder_len=samples.encoder_len, decoder_len=lengths)
    error = infeasible(too_long, cost_model)
    assert error.summary == "sample 11 fits no micro-batch" and "600" in error.found and "512" in error.expected
    state = float(cost_model.state_mb("none").max())
    assert infeasible(samples, cost_model, memory_limit_mb=state * 0.9).summary == "the model itself does not fit"
    error = infeasible(samples, cost_model, memory_limit_mb=state + 20, recompute=("none",))
    assert "fits no micro-batch" in error.summary and f"{state + 20:.0f} MB" in error.expected
    with pytest.raises(ConfigError, match="memory_limit_mb does not fit the pipeline"):
        plan_iteration(samples, cost_model, replace(FAST, memory_limit_mb=(6000.0, 6000.0)))


def test_profiles_with_holes_are_planned_around(architecture: Architecture) -> None:
    # Of 32 samples only the shortest were measured; a hole rule decides about one size more.
    samples = toy_samples(np.random.default_rng(5), architecture, 60)
    for hole in ("infeasible", "extrapolate"):
        profile = toy_profile(architecture, capacity_mb=350.0, hole=hole)  # type: ignore[arg-type]
        model = toy_cost_model(architecture, profile=profile, pipeline=2)
        plan = plan_iteration(samples, model, FAST)
        assert simulate(plan, model).makespan_ms == plan.estimated_ms
        costs = model.micro_batch_costs(plan.replicas[0].shapes(), plan.replicas[0].recompute)
        assert costs.feasible.all()


def test_samples_shorter_than_the_profile_can_be_planned(architecture: Architecture) -> None:
    model = toy_cost_model(architecture, data=2, pipeline=2)
    samples = Samples.of(architecture, [1] * 30, [1] * 30)
    plan = plan_iteration(samples, model, replace(FAST, length_multiple=1, decoder_extra_tokens=0))
    assert simulate(plan, model).makespan_ms == plan.estimated_ms
