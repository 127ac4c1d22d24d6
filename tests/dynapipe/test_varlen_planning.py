"""DynaPipe with variable-length attention, and how good partitions, balance and plans are."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmsys.core.errors import InfeasibleError, InputError
from llmsys.core.specs import Architecture
from llmsys.dynapipe import microbatch
from llmsys.dynapipe.balance import karmarkar_karp
from llmsys.dynapipe.baselines import Packing, TokenBased
from llmsys.dynapipe.config import PlannerConfig, Recompute
from llmsys.dynapipe.costs import CostModel, MicroBatchCosts
from llmsys.dynapipe.microbatch import PaddedLengths, Partition, partition, partitions, varlen_partitions
from llmsys.dynapipe.ordering import order_samples
from llmsys.dynapipe.planner import DynaPipe, balance, make_plan, plan_iteration, slowest_ms
from llmsys.dynapipe.simulator import simulate
from llmsys.dynapipe.workload import Samples
from tests.dynapipe import oracles
from tests.dynapipe.synthetic import RECOMPUTES, Rng, grids, toy_cost_model, toy_samples

FAST = PlannerConfig(memory_limit_mb=6000.0, max_moves=20)
VARLEN = DynaPipe(attention="varlen")


def random_problem(rng: Rng, architecture: Architecture, n: int) -> tuple[CostModel, Samples, PlannerConfig]:
    """Some samples on random stages, and memory from far too little to more than enough."""
    pipeline, num_chunks = int(rng.integers(1, 5)), int(rng.integers(1, 3))
    model = toy_cost_model(
        architecture,
        num_layers=int(rng.integers(pipeline * num_chunks + 1, 12)),
        data=int(rng.integers(1, 4)),
        pipeline=pipeline,
        num_chunks=num_chunks,
    )
    limits = model.state_mb("none") + 10.0 ** rng.uniform(1.3, 3.3) * rng.uniform(0.7, 1.3, pipeline)
    config = replace(FAST, memory_limit_mb=tuple(limits.tolist()), decoder_extra_tokens=int(rng.integers(0, 4)))
    return model, toy_samples(rng, architecture, n, max_len=300), config


def run_times(
    model: CostModel, samples: Samples, order: np.ndarray, config: PlannerConfig, recompute: Recompute, in_flight: int
) -> np.ndarray:
    """``times[i, j]`` of samples i to j - 1 of ``order`` in one micro-batch; infinite where a device has no room.

    ``in_flight`` such micro-batches are held at once, the last of them in its forward pass.
    """
    n, depth = len(order), model.parallelism.pipeline
    extra = config.decoder_extra_tokens if model.encoder_decoder else 0
    runs = [(i, j) for i in range(n) for j in range(i + 1, n + 1)]
    encoder = [samples.encoder_len[order[i:j]] for i, j in runs]
    decoder = [samples.decoder_len[order[i:j]] + extra for i, j in runs]
    costs = model.varlen_costs(encoder, decoder, recompute)
    free = np.array(config.device_limits_mb(depth)) - model.state_mb(recompute)
    times = np.full((n, n + 1), np.inf)
    for (i, j), forward, backward, stored, peak in zip(runs, *costs.columns()[:4], strict=True):
        slowest = 0.0
        for device in range(depth):
            stages = range(device, model.parallelism.num_stages, depth)
            kept = sum(stored[v] for v in stages)
            # Of the one that runs, the other chunks' activations are stored.
            needed = (in_flight - 1) * kept + max(sum(stored[u] for u in stages if u != v) + peak[v] for v in stages)
            fits = needed <= free[device] and in_flight * kept <= free[device]
            slowest = max(slowest, sum(forward[v] + backward[v] for v in stages) if fits else np.inf)
        times[i, j] = slowest
    return times


def check_best(found: Partition | None, times: np.ndarray, order: np.ndarray, model: CostModel) -> None:
    """``found`` is a cut of ``order`` with the times and the objective that it claims, and no cut is better."""
    factor = (model.parallelism.pipeline - 1) / model.parallelism.num_chunks
    best = oracles.best_partition_by_trying_all(times, factor, model.parallelism.data)
    if found is None:
        assert np.isinf(best)
        return
    costs = cut_times(found, times, order)
    np.testing.assert_allclose(found.times_ms, costs, rtol=1e-9)
    assert found.objective_ms == pytest.approx(oracles.objective(costs, factor, model.parallelism.data), rel=1e-9)
    assert found.objective_ms == pytest.approx(best, rel=1e-9)


def cut_times(found: Partition, times: np.ndarray, order: np.ndarray) -> list[float]:
    assert [i for group in found.groups for i in group] == order.tolist()
    ends = np.cumsum([len(group) for group in found.groups]).tolist()
    return [float(times[run]) for run in zip([0, *ends[:-1]], ends, strict=True)]


def varlen(
    model: CostModel, samples: Samples, order: np.ndarray, config: PlannerConfig, recompute: Recompute, in_flight: int
) -> Partition | None:
    made = varlen_partitions(samples, order, model, config, recompute, (in_flight,), (), np.inf)
    assert len(made) <= 1 and all((p.recompute, p.in_flight) == (recompute, in_flight) for p in made)
    return made[0] if made else None


# --- partitions for variable-length attention ---


@pytest.mark.native
@pytest.mark.parametrize("seed", range(25))
def test_partition_is_the_best_of_all(architecture: Architecture, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model, samples, config = random_problem(rng, architecture, int(rng.integers(1, 9)))
    order, recompute = rng.permutation(len(samples)), RECOMPUTES[seed % 3]
    for in_flight in {1, 2, model.parallelism.pipeline}:
        times = run_times(model, samples, order, config, recompute, in_flight)
        check_best(varlen(model, samples, order, config, recompute, in_flight), times, order, model)


def test_the_problems_are_of_all_kinds(architecture: Architecture) -> None:
    """Batches that one micro-batch could hold, that memory forces to be cut, and that fit nowhere."""
    answers = set()
    for seed in range(25):
        rng = np.random.default_rng(seed)
        model, samples, config = random_problem(rng, architecture, int(rng.integers(1, 9)))
        order = rng.permutation(len(samples))
        times = run_times(model, samples, order, config, "none", 1)
        found = varlen(model, samples, order, config, "none", 1)
        answers.add("nothing" if found is None else "memory" if np.isinf(times[0, 1:]).any() else "free")
    assert answers == {"nothing", "memory", "free"}


def test_several_in_flight_come_in_turn(architecture: Architecture) -> None:
    rng = np.random.default_rng(1)
    model, samples = toy_cost_model(architecture, pipeline=3), toy_samples(rng, architecture, 30, max_len=300)
    config = replace(FAST, memory_limit_mb=float(model.state_mb("none").max()) + 250.0)
    order = order_samples(samples.encoder_len, samples.decoder_len, config)
    made = varlen_partitions(samples, order, model, config, "none", (1, 3), (1.0, 5.0), np.inf)
    assert [p.in_flight for p in made] == [1, 1, 1, 3, 3, 3]
    for first, in_flight in ((0, 1), (3, 3)):
        alone = varlen(model, samples, order, config, "none", in_flight)
        assert alone is not None and alone.groups == made[first].groups
    assert made[3].objective_ms > made[0].objective_ms and max(made[3].times_ms) < max(made[0].times_ms)


def test_huge_micro_batches_are_not_tried(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    model, samples = toy_cost_model(architecture, pipeline=2), toy_samples(rng, architecture, 9, max_len=120)
    extra = FAST.decoder_extra_tokens if model.encoder_decoder else 0
    total = samples.encoder_len + samples.decoder_len + extra
    monkeypatch.setattr(microbatch, "_MAX_VARLEN_TOKENS", limit := int(total.max()) - 10)
    order = np.arange(9)
    times = run_times(model, samples, order, FAST, "none", 1)
    for i, j in itertools.combinations(range(10), 2):
        if j - i > 1 and total[i:j].sum() > limit:
            times[i, j] = np.inf
    found = varlen(model, samples, order, FAST, "none", 1)
    check_best(found, times, order, model)
    assert found is not None and sorted(map(len, found.groups))[-1] > 1
    assert int(total.argmax()) in {group[0] for group in found.groups if len(group) == 1}


def test_costs_do_not_depend_on_which_others_are_priced(architecture: Architecture) -> None:
    """To the last bit: the planner prices all micro-batches at once, the simulator each replica's."""
    rng, model = np.random.default_rng(0), toy_cost_model(architecture, pipeline=2)
    decoder = [rng.integers(1, 300, rng.integers(1, 9)) for _ in range(40)]
    encoder = [rng.integers(1, 300, len(pack)) if model.encoder_decoder else 0 * pack for pack in decoder]
    together = model.varlen_costs(encoder, decoder, "none")
    for number, begin in itertools.product((1, 2, 5), range(35)):
        part = slice(begin, begin + number)
        alone = model.varlen_costs(encoder[part], decoder[part], "none")
        for one, column in zip(alone.columns(), together.columns(), strict=True):
            np.testing.assert_array_equal(one, column[part])


# --- plans for variable-length attention ---


@pytest.mark.parametrize("number", range(0, len(grids()), 2))
@pytest.mark.parametrize("limit_mb", [2200.0, 6000.0])
def test_plans_are_of_the_best_kind(architecture: Architecture, number: int, limit_mb: float) -> None:
    """Whole plans: micro-batches without padding, at the costs of what they hold."""
    model = toy_cost_model(architecture, **grids()[number])
    samples = toy_samples(np.random.default_rng(number), architecture, 30)
    plan = make_plan(VARLEN, samples, model, replace(FAST, memory_limit_mb=limit_mb))
    assert plan.planner == "dynapipe_varlen" and plan.attention == "varlen"
    extra = plan.decoder_extra_tokens
    assert extra == (2 if model.encoder_decoder else 0)
    assert plan.padded_tokens() == (samples.encoder_len.sum(), samples.decoder_len.sum() + extra * len(samples))
    result = simulate(plan, model, samples=samples)
    assert result.makespan_ms == plan.estimated_ms and result.peak_mb <= limit_mb * (1 + 1e-12)


def test_one_replica_on_one_device_is_cut_for_the_least_total(architecture: Architecture) -> None:
    # Then an iteration takes the sum of its micro-batches, and the plan is the best partition of the best kind.
    model = toy_cost_model(architecture)
    for seed in range(6):
        samples = toy_samples(np.random.default_rng(seed), architecture, 8, max_len=300)
        config = replace(FAST, memory_limit_mb=float(model.state_mb("none")[0]) + (300.0 if seed % 2 else 3000.0))
        padded = PaddedLengths.of(samples, encoder_decoder=model.encoder_decoder, config=config)
        order = order_samples(padded.encoder_len, padded.decoder_len, config)
        best = min(
            oracles.best_partition_by_trying_all(run_times(model, samples, order, config, kind, 1), 0.0, 1.0)
            for kind in RECOMPUTES
        )
        plan = make_plan(VARLEN, samples, model, config)
        assert plan.estimated_ms == pytest.approx(best, rel=1e-9)


def test_simulating_needs_the_samples(architecture: Architecture) -> None:
    model = toy_cost_model(architecture, data=2, pipeline=2)
    samples = toy_samples(np.random.default_rng(3), architecture, 30)
    for planner in (VARLEN, Packing(max_len=600, max_target_len=250, attention="varlen")):
        plan = make_plan(planner, samples, model, FAST)
        with pytest.raises(InputError, match=r"what its samples(.|\n)*the 30 samples(.|\n)*none(.|\n)*pass samples"):
            simulate(plan, model)
        with pytest.raises(InputError, match=r"the 30 samples(.|\n)*29 samples"):
            simulate(plan, model, samples=samples.select(range(29)))
        # Other lengths, other times; a padded plan says all by itself.
        longer = Samples(encoder_len=samples.encoder_len * 2, decoder_len=samples.decoder_len * 2)
        assert simulate(plan, model, samples=longer).makespan_ms > plan.estimated_ms
    padded = plan_iteration(samples, model, FAST)
    assert simulate(padded, model, samples=samples).makespan_ms == simulate(padded, model).makespan_ms


def test_nothing_fits(architecture: Architecture) -> None:
    model = toy_cost_model(architecture, pipeline=2)
    samples = toy_samples(np.random.default_rng(4), architecture, 20)
    state = float(model.state_mb("none").max())
    for limit, message in ((state * 0.9, "the model itself"), (state + 20.0, "fits no micro-batch")):
        with pytest.raises(InfeasibleError, match=rf"{message}(.|\n)*{limit:.0f} MB"):
            make_plan(VARLEN, samples, model, replace(FAST, memory_limit_mb=limit))


def test_padding_costs_and_concatenating_does_not(architecture: Architecture) -> None:
    # Equal samples as long as a grid point have no padding, so that both kinds cost nearly the same.
    model = toy_cost_model(architecture, pipeline=3)
    equal = Samples.of(architecture, [64] * 40, [62 if model.encoder_decoder else 64] * 40)
    times = [make_plan(planner, equal, model, FAST).estimated_ms for planner in (DynaPipe(), VARLEN)]
    assert times[1] == pytest.approx(times[0], rel=0.03)
    mixed = toy_samples(np.random.default_rng(5), architecture, 40)
    times = [make_plan(planner, mixed, model, FAST).estimated_ms for planner in (DynaPipe(), VARLEN)]
    assert times[1] < 0.95 * times[0]


# --- cuts with shorter micro-batches, and their balance ---


@pytest.mark.native
@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("attention", ["padded", "varlen"])
def test_other_cuts_have_shorter_micro_batches(architecture: Architecture, attention: str, seed: int) -> None:
    """Each is the best when the longest counts more; the plain objective can only be worse."""
    rng = np.random.default_rng(seed)
    model, samples, config = random_problem(rng, architecture, 9)
    config = replace(config, memory_limit_mb=6000.0, length_multiple=1)
    order, factors = np.arange(9), (0.3, 1.0, 4.0)
    padded = PaddedLengths.of(samples, encoder_decoder=model.encoder_decoder, config=config)
    if attention == "varlen":
        made = varlen_partitions(samples, order, model, config, "none", (1,), factors, np.inf)
        times = run_times(model, samples, order, config, "none", 1)
    else:
        made = partitions(padded, order, model, config, "none", 1, factors, np.inf)
        limits = config.device_limits_mb(model.parallelism.pipeline)
        times = oracles.run_times(model, "none", limits, 1, padded.encoder_len, padded.decoder_len)
        alone = partition(padded, order, model, config, "none", 1)
        assert alone is not None and alone.groups == made[0].groups
    assert len(made) == 4
    factor, data = (model.parallelism.pipeline - 1) / model.parallelism.num_chunks, model.parallelism.data
    for cut, extra in zip(made, (0.0, *factors), strict=True):
        costs = cut_times(cut, times, order)
        assert cut.objective_ms == pytest.approx(oracles.objective(costs, factor, data), rel=1e-9)
        best = oracles.best_partition_by_trying_all(times, factor + extra, data)
        assert oracles.objective(costs, factor + extra, data) == pytest.approx(best, rel=1e-9)
    for one, other in itertools.pairwise(made):
        assert max(other.times_ms) <= max(one.times_ms) * (1 + 1e-12)
        assert other.objective_ms >= one.objective_ms * (1 - 1e-12)


def test_other_cuts_are_left_out_beyond_the_cutoff(architecture: Architecture) -> None:
    rng = np.random.default_rng(6)
    model, samples = toy_cost_model(architecture, data=2, pipeline=3), toy_samples(rng, architecture, 25, max_len=300)
    padded = PaddedLengths.of(samples, encoder_decoder=model.encoder_decoder, config=FAST)
    order = order_samples(padded.encoder_len, padded.decoder_len, FAST)
    every = partitions(padded, order, model, FAST, "none", 1, (2.0, 8.0), np.inf)
    assert len(every) == 3 and max(every[2].times_ms) < max(every[0].times_ms)
    best_ms = every[0].objective_ms
    for cutoff_ms, number in ((best_ms, 3), (best_ms * 0.999, 1)):
        made = partitions(padded, order, model, FAST, "none", 1, (2.0, 8.0), cutoff_ms)
        assert [cut.groups for cut in made] == [cut.groups for cut in every[:number]]


def costs_of(times: list[list[float]]) -> MicroBatchCosts:
    """Rows of forward times of one micro-batch on each stage; backward takes as long."""
    forward = np.array(times)
    zeros = {name: np.zeros_like(forward) for name in MicroBatchCosts.__dataclass_fields__}
    return MicroBatchCosts(**(zeros | {"forward_ms": forward, "backward_ms": forward}))


def test_balance_counts_the_slowest_stage() -> None:
    # By stage 0 alone {0} and {1, 2, 3} would balance, by sums {0, 1} and {2, 3}.
    costs: dict[Recompute, MicroBatchCosts] = {"none": costs_of([[6, 1], [2, 5], [2, 5], [2, 4]])}
    assert balance(costs, 2) == karmarkar_karp([12, 10, 10, 8], 2)
    assert sorted(balance(costs, 2)) == [[0, 3], [1, 2]]


def test_balance_by_kind() -> None:
    """A partition made for one kind is balanced by its times; without a kind the cheapest counts."""
    costs: dict[Recompute, MicroBatchCosts] = {
        "none": costs_of([[4], [3], [2], [1]]),
        "full": costs_of([[4], [4], [4], [12]]),
        "selective": costs_of([[np.inf], [9], [4], [5]]),
    }
    assert sorted(balance(costs, 2, "none")) == sorted(balance(costs, 2)) == [[0, 3], [1, 2]]
    assert sorted(balance(costs, 2, "full")) == [[0, 1, 2], [3]]
    # What fits no kind makes scheduling fail later; here it only must not upset the sums.
    assert sorted(balance(costs, 2, "selective")) == sorted(karmarkar_karp([0, 18, 8, 10], 2)) != [[0], [1, 2, 3]]
    assert sorted(map(len, balance({"none": costs_of([[np.inf]] * 4)}, 2))) == [2, 2]


# --- how good plans are ---

TOKENS = (128, 256, 512, 1024, 2048)


def workload(architecture: Architecture, seed: int) -> tuple[CostModel, Samples, PlannerConfig]:
    rng = np.random.default_rng(1000 + seed)
    shape: dict[str, Any] = {"data": int(rng.integers(1, 4)), "pipeline": int(rng.integers(1, 5))}
    samples = toy_samples(rng, architecture, int(rng.integers(40, 120)), max_len=300)
    config = replace(FAST, memory_limit_mb=float(rng.choice([6000.0, 3000.0])), seed=seed)
    return toy_cost_model(architecture, **shape), samples, config


def over_token_based(architecture: Architecture, seed: int) -> float:
    """DynaPipe's time over that of the best token-based partition, with the same order, balance and schedules."""
    model, samples, config = workload(architecture, seed)
    times = []
    for tokens in TOKENS:
        try:
            replicas = TokenBased(tokens_per_micro_batch=tokens).schedule(samples, model, config)
        except InfeasibleError:
            continue
        times.append(slowest_ms(replicas))
    return slowest_ms(DynaPipe().schedule(samples, model, config)) / min(times)


def test_partitions_beat_the_best_token_count(architecture: Architecture) -> None:
    """Ratios of 300 such workloads: 0.95 on average and 1.014 at worst for decoder-only models.

    Encoder-decoder pipelines: 0.98 and 1.11. Their slowest device is another one for each micro-batch, so that the
    paper's objective, a sum over slowest devices, says less about the schedule. A single device has no such problem.
    """
    ratios = np.array([over_token_based(architecture, seed) for seed in range(20)])
    alone = np.array([workload(architecture, seed)[0].parallelism.pipeline == 1 for seed in range(20)])
    mean, worst = (0.96, 1.02) if architecture == "decoder_only" else (0.99, 1.12)
    assert ratios.mean() < mean and ratios.max() < worst
    assert alone.any() and ratios[alone].max() < 1.0
