"""Micro-batch construction: the native dynamic program against all partitions and against the plain program."""

from __future__ import annotations

import numpy as np
import pytest

from llmsys import _C
from llmsys.core.errors import InfeasibleError
from llmsys.core.specs import Architecture
from llmsys.dynapipe.config import Parallelism, PlannerConfig
from llmsys.dynapipe.costs import CostModel
from llmsys.dynapipe.microbatch import (
    PaddedLengths,
    Partition,
    explain_infeasible,
    fits_in_flight,
    group_shapes,
    partition,
)
from llmsys.dynapipe.profile import LayerProfile
from llmsys.dynapipe.workload import Samples
from tests.dynapipe import oracles
from tests.dynapipe.synthetic import (
    RECOMPUTES,
    Rng,
    random_profile,
    toy_cluster,
    toy_cost_model,
    toy_model,
    toy_profile,
    toy_samples,
)

# With a length multiple of 1 and no extra tokens, padded lengths are the sample's own.
EXACT = PlannerConfig(length_multiple=1, decoder_extra_tokens=0)


def random_samples(rng: Rng, architecture: Architecture, n: int, lowest: int = 3, highest: int = 66) -> Samples:
    encoder = rng.integers(lowest, highest, n) if architecture == "encoder_decoder" else np.zeros(n, dtype=np.int64)
    return Samples(encoder_len=encoder, decoder_len=rng.integers(lowest, highest, n))


def random_problem(rng: Rng, architecture: Architecture) -> tuple[CostModel, tuple[float, ...]]:
    """A random profile on random stages, and memory limits from far too little to more than enough."""
    pipeline, num_chunks = int(rng.integers(1, 6)), int(rng.integers(1, 3))
    model = toy_cost_model(
        architecture,
        profile=random_profile(rng, architecture, hole_rate=rng.choice([0.0, 0.1, 0.3])),
        num_layers=int(rng.integers(pipeline * num_chunks + (architecture == "encoder_decoder"), 14)),
        data=int(rng.integers(1, 4)),
        pipeline=pipeline,
        num_chunks=num_chunks,
    )
    free = 10.0 ** rng.uniform(2.0, 4.0)
    limits = (model.state_mb("none") + free * rng.uniform(0.7, 1.3, pipeline)).tolist()
    return model, tuple(limits)


def solve(samples: Samples, model: CostModel, limits: tuple[float, ...], in_flight: int) -> Partition | None:
    config = PlannerConfig(length_multiple=1, decoder_extra_tokens=0, memory_limit_mb=limits)
    padded = PaddedLengths.of(samples, encoder_decoder=model.encoder_decoder, config=config)
    return partition(padded, np.arange(len(samples)), model, config, "none", in_flight)


def check_against(best: float, found: Partition | None, times: np.ndarray, model: CostModel) -> None:
    """``found`` is a partition with the objective it claims, and that is the best one."""
    if found is None:
        assert np.isinf(best)
        return
    assert [i for group in found.groups for i in group] == list(range(len(times)))
    costs = [float(times[group[0], group[-1] + 1]) for group in found.groups]
    np.testing.assert_allclose(found.times_ms, costs, rtol=1e-12)
    factor = (model.parallelism.pipeline - 1) / model.parallelism.num_chunks
    assert found.objective_ms == pytest.approx(oracles.objective(costs, factor, model.parallelism.data), rel=1e-9)
    assert found.objective_ms == pytest.approx(best, rel=1e-9)


@pytest.mark.native
@pytest.mark.parametrize("seed", range(60))
def test_partition_is_the_best_of_all(architecture: Architecture, seed: int) -> None:
    rng = np.random.default_rng(seed)
    model, limits = random_problem(rng, architecture)
    samples = random_samples(rng, architecture, int(rng.integers(1, 10)))
    for in_flight in (1, model.parallelism.pipeline):
        times = oracles.run_times(model, "none", limits, in_flight, samples.encoder_len, samples.decoder_len)
        factor = (model.parallelism.pipeline - 1) / model.parallelism.num_chunks
        best = oracles.best_partition_by_trying_all(times, factor, model.parallelism.data)
        check_against(best, solve(samples, model, limits, in_flight), times, model)


@pytest.mark.native
@pytest.mark.parametrize("seed", range(12))
def test_partition_equals_the_program_over_every_maximum(architecture: Architecture, seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    model, limits = random_problem(rng, architecture)
    samples = random_samples(rng, architecture, int(rng.integers(15, 41)))
    if seed % 2:
        order = np.lexsort((samples.decoder_len, samples.encoder_len))
        samples = samples.select(order)
    times = oracles.run_times(model, "none", limits, 1, samples.encoder_len, samples.decoder_len)
    factor = (model.parallelism.pipeline - 1) / model.parallelism.num_chunks
    best = oracles.best_partition_by_every_maximum(times, factor, model.parallelism.data)
    check_against(best, solve(samples, model, limits, 1), times, model)


@pytest.mark.native
@pytest.mark.parametrize("seed", [*range(8), 112, 244, 272])
def test_samples_shorter_than_the_profile_may_lie_beside_a_hole(architecture: Architecture, seed: int) -> None:
    # Below the smallest length both its neighbours are needed, at it only one is: longer may fit where shorter do not.
    rng = np.random.default_rng(seed)
    random_problem(rng, architecture)
    profile = random_profile(rng, architecture, hole_rate=0.4)
    model = toy_cost_model(architecture, profile=profile, num_layers=3, pipeline=int(rng.integers(1, 3)))
    limits = tuple((model.state_mb("none") + 10.0 ** rng.uniform(1, 4)).tolist())
    n = int(rng.integers(3, 10))
    short = np.sort(rng.integers(2, 10, n)) if model.encoder_decoder else np.zeros(n, dtype=np.int64)
    samples = Samples(encoder_len=short, decoder_len=np.sort(rng.integers(2, 10, n)))
    times = oracles.run_times(model, "none", limits, 1, samples.encoder_len, samples.decoder_len)
    factor = model.parallelism.pipeline - 1
    best = oracles.best_partition_by_trying_all(times, factor, model.parallelism.data)
    check_against(best, solve(samples, model, limits, 1), times, model)


def as_runs(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the finite beginnings of ``times[i, i + 1:]``, one after the other."""
    rows = [row[i + 1 :] for i, row in enumerate(times)]
    kept = [row[: 1 + int(np.flatnonzero(np.isfinite(row)).max(initial=-1))] for row in rows]
    return np.cumsum([0, *map(len, kept)]).astype(np.int64), np.concatenate(kept)


@pytest.mark.native
@pytest.mark.parametrize("seed", range(40))
def test_partition_of_given_times_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, factor, replicas = int(rng.integers(1, 10)), float(rng.choice([0.0, 0.5, 3.0])), float(rng.integers(1, 4))
    # Whole numbers make ties; falling times and holes are allowed.
    times = np.where(rng.random((n, n + 1)) < 0.3, np.inf, rng.integers(0, 12, (n, n + 1)).astype(np.float64))
    found = _C.partition_runs(*as_runs(times), factor, replicas)
    best = oracles.best_partition_by_trying_all(times, factor, replicas)
    assert found["feasible"] == np.isfinite(best)
    if found["feasible"]:
        assert found["objective_ms"] == pytest.approx(best, rel=1e-9)
        costs = [times[begin, end] for begin, end in zip([0, *found["ends"][:-1]], found["ends"], strict=True)]
        assert found["times_ms"].tolist() == costs and found["t_max_ms"] == max(costs)
        assert oracles.objective(costs, factor, replicas) == pytest.approx(best, rel=1e-9)


@pytest.mark.native
@pytest.mark.parametrize(
    ("offset", "times", "message"),
    [
        ([0, 1], [1.0, 2.0], "cover all 2 times"),
        ([1, 2], [1.0, 2.0], "cover all 2 times"),
        ([], [], "cover all 0 times"),
        ([0, 2, 1, 3], [1.0, 1.0, 1.0], "in order"),
        ([0, 2], [1.0, 2.0], "reaches past the last sample"),
        ([0, 1], [-1.0], "must not be negative, got -1"),
        ([0, 1], [np.nan], "must not be negative"),
        ([0], [], "no samples"),
    ],
)
def test_bad_runs_are_refused(offset: list[int], times: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.partition_runs(np.array(offset, dtype=np.int64), np.array(times, dtype=np.float64), 1.0, 1.0)


@pytest.mark.native
def test_both_oracles_agree() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        n = int(rng.integers(1, 8))
        times = np.where(rng.random((n, n + 1)) < 0.2, np.inf, rng.uniform(1, 9, (n, n + 1)))
        for factor, replicas in ((0.0, 1.0), (3.0, 2.0)):
            by_all = oracles.best_partition_by_trying_all(times, factor, replicas)
            assert oracles.best_partition_by_every_maximum(times, factor, replicas) == pytest.approx(by_all)


def linear_times(overhead_ms: float, per_token_ms: float) -> _C.CostTable:
    lengths, sizes = np.array([1.0, 4096.0]), np.array([1.0, 4096.0])
    tokens = np.outer(lengths, sizes).reshape(-1)
    return _C.CostTable([lengths, sizes], [overhead_ms + per_token_ms * tokens, *[np.zeros(4)] * 3])


@pytest.mark.native
@pytest.mark.parametrize("scale", [1.0, 0.25, 1e-3, 1e-6])
def test_partition_does_not_depend_on_the_unit_of_time(architecture: Architecture, scale: float) -> None:
    rng = np.random.default_rng(5)
    samples = random_samples(rng, architecture, 60, 16, 400)
    results = []
    for time_scale in (1.0, scale):
        model = toy_cost_model(architecture, profile=toy_profile(architecture, time_scale=time_scale), pipeline=4)
        padded = PaddedLengths.of(samples, encoder_decoder=model.encoder_decoder, config=EXACT)
        order = np.lexsort((padded.decoder_len, padded.encoder_len))
        found = partition(padded, order, model, EXACT, "none", 1)
        assert found is not None
        results.append(found)
    assert results[0].groups == results[1].groups and len(results[0].groups) > 4
    assert results[1].objective_ms == pytest.approx(scale * results[0].objective_ms, rel=1e-9)


@pytest.mark.native
def test_times_of_zero_end() -> None:
    zero = linear_times(0.0, 0.0)
    loads = np.array([[0.0, 1.0, 1.0, np.inf, np.inf]])
    lengths = np.array([5, 6, 7])
    found = _C.partition_samples(None, zero, zero, loads, lengths, lengths, 3.0, 2.0, 8)
    assert found["feasible"] and found["objective_ms"] == 0.0 and found["ends"][-1] == 3


@pytest.mark.native
def test_negative_lengths_are_refused() -> None:
    table = linear_times(1.0, 1.0)
    loads, lengths = np.array([[0.0, 1.0, 1.0, np.inf, np.inf]]), np.array([-1])
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        _C.micro_batch_times(None, table, table, loads, lengths, lengths, np.array([1]))


@pytest.mark.native
def test_identical_samples_and_a_single_sample() -> None:
    table = linear_times(1.0, 0.01)
    loads = np.array([[0.0, 2.0, 0.0, np.inf, np.inf]])
    lengths = np.full(16, 100)
    found = _C.partition_samples(None, table, table, loads, lengths, lengths, 3.0, 1.0, 16)
    sizes = np.diff([0, *found["ends"]])
    # 16 equal samples in k equal micro-batches: 3 * t + k * t with t = 2 (1 + 16 / k) is least at k = 7 or so.
    choices = [3 * max(part) + sum(part) for part in ([2 + 2 * s for s in split] for split in _even_splits(16))]
    assert sizes.sum() == 16 and found["objective_ms"] == pytest.approx(min(choices))
    alone = _C.partition_samples(None, table, table, loads, lengths[:1], lengths[:1], 3.0, 1.0, 16)
    assert alone["ends"].tolist() == [1] and alone["objective_ms"] == pytest.approx(4 * 4.0)


def _even_splits(n: int) -> list[list[int]]:
    return [[n // k + (i < n % k) for i in range(k)] for k in range(1, n + 1)]


@pytest.mark.native
def test_search_tries_few_of_the_candidates() -> None:
    rng = np.random.default_rng(1)
    table = linear_times(3.0, 0.002)
    loads = np.array([[0.0, 8.0, 1.0, np.inf, np.inf]])
    lengths = np.sort(rng.integers(8, 1000, 400))[::-1].copy()
    found = _C.partition_samples(None, table, table, loads, lengths, lengths, 3.0, 2.0, 64)
    assert found["num_runs"] > 20_000 and found["num_evaluations"] < 200


def test_each_recompute_kind_may_have_micro_batch_sizes_of_its_own() -> None:
    # The profile of "none" ends at 4 samples, since more ran out of memory; "full" was measured up to 64.
    profile = toy_profile("decoder_only", sizes={"none": (1, 2, 4), "selective": (1, 2, 4), "full": (1, 8, 64)})
    model = toy_cost_model("decoder_only", profile=profile, pipeline=1)
    samples = Samples.decoder_only(np.full(32, 8), np.full(32, 8))
    padded = PaddedLengths.of(samples, encoder_decoder=False, config=EXACT)
    made = partition(padded, np.arange(32), model, EXACT, "full", 1)
    assert made is not None and max(len(group) for group in made.groups) > 4


def test_padded_lengths_round_up_and_count_extra_tokens() -> None:
    samples = Samples.encoder_decoder([1, 8, 9], [6, 7, 14])
    config = PlannerConfig(length_multiple=8, decoder_extra_tokens=2)
    padded = PaddedLengths.of(samples, encoder_decoder=True, config=config)
    assert padded.encoder_len.tolist() == [8, 8, 16] and padded.decoder_len.tolist() == [8, 16, 16]
    plain = PaddedLengths.of(Samples.decoder_only([1, 8], [7, 1]), encoder_decoder=False, config=config)
    assert plain.decoder_len.tolist() == [8, 16] and not plain.encoder_len.any()


def test_group_shapes_pad_to_the_longest() -> None:
    padded = PaddedLengths(encoder_len=np.array([8, 24, 16]), decoder_len=np.array([32, 8, 8]))
    assert group_shapes(((0, 2), (1,)), padded).tolist() == [[2, 16, 32], [1, 24, 8]]
    assert group_shapes((), padded).shape == (0, 3)


@pytest.mark.native
def test_fits_in_flight_agrees_with_the_partition(architecture: Architecture) -> None:
    rng = np.random.default_rng(2)
    answers = set()
    for _ in range(30):
        model, limits = random_problem(rng, architecture)
        config = PlannerConfig(length_multiple=1, decoder_extra_tokens=0, memory_limit_mb=limits)
        samples = random_samples(rng, architecture, 12)
        padded = PaddedLengths.of(samples, encoder_decoder=model.encoder_decoder, config=config)
        made = partition(padded, np.arange(12), model, config, "none", 1)
        depth = model.parallelism.pipeline
        if made is None:
            continue
        times = oracles.run_times(model, "none", limits, depth, samples.encoder_len, samples.decoder_len)
        expected = all(np.isfinite(times[group[0], group[-1] + 1]) for group in made.groups)
        assert fits_in_flight(made, padded, model, config, depth) == expected
        if expected:
            again = partition(padded, np.arange(12), model, config, "none", depth)
            assert again is not None and again.groups == made.groups
        answers.add(expected)
    assert answers == {True, False}


def explain(samples: Samples, model: CostModel, config: PlannerConfig) -> InfeasibleError:
    padded = PaddedLengths.of(samples, encoder_decoder=model.encoder_decoder, config=config)
    return explain_infeasible(samples, padded, model, config)


def test_infeasible_batches_are_explained(architecture: Architecture) -> None:
    model = toy_cost_model(architecture, pipeline=2)
    samples = toy_samples(np.random.default_rng(0), architecture, 5, max_len=300)
    lengths = samples.decoder_len.copy()
    lengths[3] = 2000
    too_long = Samples(encoder_len=samples.encoder_len, decoder_len=lengths)
    error = explain(too_long, model, PlannerConfig())
    assert error.summary == "sample 3 fits no micro-batch"
    assert "2000" in error.found and "1 such" in error.found and "512" in error.expected and error.fix
    state = float(model.state_mb("none").max())
    error = explain(samples, model, PlannerConfig(memory_limit_mb=state - 1))
    assert error.summary == "the model itself does not fit" and f"{state:.0f}" in error.found
    error = explain(samples, model, PlannerConfig(memory_limit_mb=state + 1))
    assert "fits no micro-batch" in error.summary and f"{state + 1:.0f}" in error.expected


def test_device_loads_keep_the_tightest_device_of_each_kind() -> None:
    profile: LayerProfile = toy_profile("decoder_only")
    model = CostModel(
        profile=profile,
        model=toy_model("decoder_only", 8),
        cluster=toy_cluster(),
        parallelism=Parallelism(pipeline=4),
    )
    limits = (5000.0, 4500.0, 4600.0, 5000.0)
    loads = model.device_loads("none", limits, 2)
    state = model.state_mb("none")
    # Devices 0 to 2 have two layers, device 3 the head as well.
    assert sorted(loads[:, :3].tolist()) == [[0, 2, 0], [0, 2, 1]]
    free = min(limits[d] - state[d] for d in range(3))
    assert loads[loads[:, 2] == 0, 3:].tolist() == [[2, free]]
    assert RECOMPUTES == ("none", "selective", "full")
