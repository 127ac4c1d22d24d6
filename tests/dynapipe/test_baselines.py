"""The baselines: planners like DynaPipe, each with the rule that it is named for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmsys.core.errors import ConfigError, InfeasibleError, InputError
from llmsys.core.specs import Architecture
from llmsys.dynapipe.balance import karmarkar_karp
from llmsys.dynapipe.baselines import FixedSize, Packing, TokenBased, first_fit, static
from llmsys.dynapipe.config import PlannerConfig
from llmsys.dynapipe.costs import CostModel
from llmsys.dynapipe.microbatch import PaddedLengths, group_shapes
from llmsys.dynapipe.ordering import order_samples
from llmsys.dynapipe.plan import Plan, check_plan, from_bytes, from_text, to_bytes, to_text
from llmsys.dynapipe.planner import DynaPipe, Planner, Scheduled, make_plan, slowest_ms
from llmsys.dynapipe.simulator import simulate
from llmsys.dynapipe.workload import Samples
from tests.dynapipe import oracles
from tests.dynapipe.synthetic import ARCHITECTURES, SIZES, grids, toy_cost_model, toy_profile, toy_samples

FAST = PlannerConfig(memory_limit_mb=6000.0, max_moves=20)
# Whatever a static system makes of these, it is not the settings' doing.
NOT_STATIC = replace(FAST, schedules=("adaptive",), reorder="search", max_moves=50)
LONGEST = 300  # inputs and targets together stay within a row, and a row within the toy profile's 512
SYSTEMS: dict[str, Planner] = {
    "packing": Packing(max_len=500, micro_batch_size=2),
    "varlen_packing": Packing(max_len=500, micro_batch_size=3, attention="varlen"),
    "fixed_size": FixedSize(micro_batch_size=4),
    "token_based": TokenBased(tokens_per_micro_batch=700),
    "dynapipe_varlen": DynaPipe(attention="varlen"),
}
STATIC = ("packing", "varlen_packing", "fixed_size")
# Each system on some combinations of replicas, devices and chunks, and each pair of these with both architectures.
CASES = [
    (name, number)
    for seed, name in enumerate(SYSTEMS)
    for number in sorted(np.random.default_rng(seed).permutation(len(grids()))[:8].tolist())
]


def batch(architecture: Architecture, seed: int, num_samples: int = 60) -> Samples:
    return toy_samples(np.random.default_rng(seed), architecture, num_samples, max_len=LONGEST)


def targets(samples: Samples, config: PlannerConfig = FAST) -> np.ndarray:
    extra = config.decoder_extra_tokens if samples.encoder_len.any() else 0
    return samples.decoder_len + extra


# --- every baseline is a planner ---


@pytest.mark.parametrize(("name", "number"), CASES)
def test_plans_keep_their_promises(name: str, number: int) -> None:
    setting = grids()[number]
    architecture = ARCHITECTURES[sum(setting.values()) % 2]
    planner, model, samples = SYSTEMS[name], toy_cost_model(architecture, **setting), batch(architecture, number)
    plan = make_plan(planner, samples, model, FAST)
    check_plan(plan)
    assert (plan.planner, plan.attention) == (planner.name, planner.attention) and plan.planner == name
    assert plan.num_samples == len(samples) and plan.parallelism == model.parallelism and plan.stages == model.stages
    held = [sample for replica in plan.replicas for m in replica.micro_batches for sample in m.samples]
    assert sorted(held) == list(range(len(samples)))
    assert len(plan.replicas) == model.parallelism.data and all(replica.micro_batches for replica in plan.replicas)
    assert plan.decoder_extra_tokens == (2 if architecture == "encoder_decoder" else 0)
    check_room(plan, samples)
    check_estimate(plan, samples, model)


def check_room(plan: Plan, samples: Samples) -> None:
    """Each row has room for the samples that it holds; without padding there is no room left over."""
    for m in (m for replica in plan.replicas for m in replica.micro_batches):
        for row in m.rows:
            encoder, decoder = samples.encoder_len[list(row)].sum(), targets(samples)[list(row)].sum()
            assert encoder <= m.encoder_len and decoder <= m.decoder_len
            if plan.planner == "dynapipe_varlen":
                assert (len(m.rows), m.encoder_len, m.decoder_len) == (1, encoder, decoder)
            if plan.attention == "padded" and plan.planner != "packing":
                assert len(row) == 1


def check_estimate(plan: Plan, samples: Samples, model: CostModel) -> None:
    """The simulator gets what the planner expected; also from both stored forms, which keep all that matters."""
    for form in (plan, from_text(to_text(plan)), from_bytes(to_bytes(plan))):
        assert form == plan
        assert (form.attention, form.decoder_extra_tokens) == (plan.attention, plan.decoder_extra_tokens)
        result = simulate(form, model, samples=samples)
        assert result.makespan_ms == plan.estimated_ms
        for replica, expected in zip(result.replicas, plan.replicas, strict=True):
            assert replica.makespan_ms == expected.estimate.makespan_ms
            np.testing.assert_allclose(replica.peak_mb, expected.estimate.peak_mb, rtol=1e-9)
            assert (np.array(replica.peak_mb) <= np.array(plan.memory_limit_mb) * (1 + 1e-12)).all()


@pytest.mark.parametrize("name", SYSTEMS)
def test_same_arguments_give_the_same_plan(name: str, architecture: Architecture) -> None:
    model, samples = toy_cost_model(architecture, data=2, pipeline=2), batch(architecture, 0)
    assert make_plan(SYSTEMS[name], samples, model, FAST) == make_plan(SYSTEMS[name], samples, model, FAST)


@pytest.mark.parametrize("name", STATIC)
def test_static_systems_run_1f1b_in_the_given_order(name: str, architecture: Architecture) -> None:
    model, samples = toy_cost_model(architecture, data=2, pipeline=3), batch(architecture, 1, 240)
    for config in (FAST, NOT_STATIC, replace(NOT_STATIC, reorder="clusters"), static(FAST)):
        for replica in SYSTEMS[name].schedule(samples, model, config):
            number = len(replica.micro_batches)
            assert replica.schedule.kind == "1f1b" and replica.schedule.permutation == tuple(range(number))
            orders = [[tuple(op) for op in order.tolist()] for order in replica.schedule.orders]
            assert number > 3 and orders == oracles.one_f_one_b(number, 3)


def test_static_changes_nothing_else() -> None:
    config = replace(NOT_STATIC, order="sort", recompute=("full",), memory_limit_mb=5000.0, seed=3)
    assert static(config) == replace(config, schedules=("1f1b",), reorder="none")


@pytest.mark.parametrize("name", STATIC)
def test_static_systems_deal_micro_batches_in_turn(name: str, architecture: Architecture) -> None:
    model, samples = toy_cost_model(architecture, data=3), batch(architecture, 2, 120)
    replicas = SYSTEMS[name].schedule(samples, model, FAST)
    (alone,) = SYSTEMS[name].schedule(samples, toy_cost_model(architecture), FAST)
    assert len(alone.micro_batches) > 3
    for first, replica in enumerate(replicas):
        assert replica.micro_batches == alone.micro_batches[first::3]


@pytest.mark.parametrize("name", [*STATIC, "token_based"])
def test_what_does_not_fit_is_an_error(name: str, architecture: Architecture) -> None:
    model, samples = toy_cost_model(architecture, data=2, pipeline=2), batch(architecture, 3)
    limit = float(model.state_mb("none").max()) + 30.0
    with pytest.raises(InfeasibleError, match=rf"no schedule keeps(.|\n)*{limit:.0f} MB(.|\n)*raise memory_limit_mb"):
        make_plan(SYSTEMS[name], samples, model, replace(FAST, memory_limit_mb=limit))


@pytest.mark.parametrize("name", SYSTEMS)
def test_recompute_kinds_are_obeyed(name: str, architecture: Architecture) -> None:
    model, samples = toy_cost_model(architecture, data=2, pipeline=2), batch(architecture, 4)
    times = []
    for kind in ("none", "selective", "full"):
        plan = make_plan(SYSTEMS[name], samples, model, replace(FAST, recompute=(kind,)))
        assert {replica.recompute for replica in plan.replicas} == {kind}
        times.append(plan.estimated_ms)
    assert times == sorted(times)
    assert make_plan(SYSTEMS[name], samples, model, FAST).estimated_ms == pytest.approx(times[0], rel=0.02)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Packing(max_len=0), "max_len"),
        (lambda: Packing(max_len=8, micro_batch_size=0), "micro_batch_size"),
        (lambda: Packing(max_len=8, max_target_len=0), "max_target_len"),
        (lambda: FixedSize(micro_batch_size=0), "micro_batch_size"),
        (lambda: TokenBased(tokens_per_micro_batch=0), "tokens_per_micro_batch"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is out of range(.|\n)*at least 1(.|\n)*0(.|\n)*set {name}"):
        make()


@pytest.mark.parametrize("name", SYSTEMS)
def test_one_sample_for_each_replica(name: str, architecture: Architecture) -> None:
    model = toy_cost_model(architecture, data=3, pipeline=2)
    # A row would hold two of them.
    samples = Samples.of(architecture, [180, 190, 200], [80, 80, 80])
    planner: Planner = Packing(max_len=300) if name == "packing" else SYSTEMS[name]
    if name == "varlen_packing":
        planner = Packing(max_len=300, micro_batch_size=3, attention="varlen")
    plan = make_plan(planner, samples, model, FAST)
    assert [[len(m.samples) for m in replica.micro_batches] for replica in plan.replicas] == [[1]] * 3


# --- packing ---


def first_fit_by_definition(lengths: Sequence[tuple[int, int]], limits: tuple[int, int]) -> list[tuple[int, ...]]:
    rows: list[list[int]] = []
    for sample in range(len(lengths)):

        def fits(row: list[int], sample: int = sample) -> bool:
            together = [lengths[i] for i in [*row, sample]]
            return sum(e for e, _ in together) <= limits[0] and sum(d for _, d in together) <= limits[1]

        chosen = next((row for row in rows if fits(row)), None)
        if chosen is None:
            rows.append([sample])
        else:
            chosen.append(sample)
    return [tuple(row) for row in rows]


@pytest.mark.parametrize("seed", range(40))
def test_rows_are_filled_first_fit(architecture: Architecture, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, limits = int(rng.integers(1, 120)), (int(rng.integers(20, 60)), int(rng.integers(20, 60)))
    # Small whole numbers fill rows exactly, over and over.
    decoder = rng.integers(1, rng.choice([4, 12, limits[1] + 1]), n)
    encoder = rng.integers(1, rng.choice([4, 12, limits[0] + 1]), n)
    if architecture == "decoder_only":
        encoder, limits = np.zeros(n, dtype=np.int64), (0, limits[1])
    expected = first_fit_by_definition(list(zip(encoder.tolist(), decoder.tolist(), strict=True)), limits)
    assert first_fit(encoder, decoder, limits) == expected


def test_first_fit_looks_back_at_earlier_rows() -> None:
    decoder = np.array([60, 50, 40, 50, 1])
    assert first_fit(0 * decoder, decoder, (0, 100)) == [(0, 2), (1, 3), (4,)]
    assert first_fit(np.array([60, 10, 10]), np.array([10, 95, 5]), (100, 100)) == [(0, 2), (1,)]


def packed(planner: Packing, samples: Samples, model: CostModel, config: PlannerConfig = FAST) -> list[Scheduled]:
    replicas = planner.schedule(samples, model, config)
    assert sorted(i for r in replicas for m in r.micro_batches for i in m.samples) == list(range(len(samples)))
    return replicas


@pytest.mark.parametrize("attention", ["padded", "varlen"])
@pytest.mark.parametrize("max_target_len", [None, 120, 400])
def test_rows_never_exceed_their_length(architecture: Architecture, attention: Any, max_target_len: int | None) -> None:
    model = toy_cost_model(architecture, data=2, pipeline=2)
    samples = short_targets(batch(architecture, 5, 90))
    planner = Packing(max_len=480, micro_batch_size=2, max_target_len=max_target_len, attention=attention)
    limits = planner.row_lengths(model, 2)
    # Room for the extra tokens of a target that was cut to max_len; a decoder-only model has one length.
    assert limits == ((0, 480) if architecture == "decoder_only" else (480, max_target_len or 482))
    replicas = packed(planner, samples, model)
    rows = first_fit(samples.encoder_len, targets(samples), limits)
    for m in (m for replica in replicas for m in replica.micro_batches):
        assert (m.encoder_len, m.decoder_len) == limits and len(m.rows) <= 2 and set(m.rows) <= set(rows)
        for row in m.rows:
            assert samples.encoder_len[list(row)].sum() <= limits[0]
            assert targets(samples)[list(row)].sum() <= limits[1]


def short_targets(samples: Samples) -> Samples:
    """Decoder lengths that fit a row of 120 tokens, extra ones included."""
    return Samples(encoder_len=samples.encoder_len, decoder_len=np.minimum(samples.decoder_len, 100))


def test_shorter_targets_a_row_make_more_rows() -> None:
    model, samples = toy_cost_model("encoder_decoder"), short_targets(batch("encoder_decoder", 6, 80))
    counts = []
    for max_target_len in (110, 200, 400):
        (replica,) = packed(Packing(max_len=480, max_target_len=max_target_len), samples, model)
        counts.append(sum(len(m.rows) for m in replica.micro_batches))
    assert counts[0] > counts[1] >= counts[2]


def test_padded_rows_cost_the_same_whatever_they_hold(architecture: Architecture) -> None:
    model = toy_cost_model(architecture, data=2, pipeline=3)
    # Eight samples a row, and one.
    short = (30, 20) if architecture == "decoder_only" else (50, 42)
    many_short = Samples.of(architecture, [short[0]] * 64, [short[1]] * 64)
    few_long = Samples.of(architecture, [240] * 8, [160] * 8)
    planner = Packing(max_len=400, micro_batch_size=2, max_target_len=352)
    schedules = [packed(planner, samples, model) for samples in (many_short, few_long)]
    assert [[len(m.samples) for m in r.micro_batches] for r in schedules[0]] == [[16, 16]] * 2
    assert [[len(m.samples) for m in r.micro_batches] for r in schedules[1]] == [[2, 2]] * 2
    shape = [[2, *planner.row_lengths(model, 2)]]
    for replica in itertools.chain(*schedules):
        full = model.micro_batch_costs(np.array(shape * 2), replica.recompute)
        for got, expected in zip(replica.costs.columns(), full.columns(), strict=True):
            np.testing.assert_array_equal(got, expected)
    assert slowest_ms(schedules[0]) == slowest_ms(schedules[1])
    # The last row may hold a single token.
    nearly_empty = Samples.of(architecture, [*[240] * 7, 1], [*[160] * 7, 1])
    assert slowest_ms(packed(planner, nearly_empty, model)) == slowest_ms(schedules[1])


def test_varlen_rows_cost_what_they_hold(architecture: Architecture) -> None:
    model = toy_cost_model(architecture, data=2, pipeline=2)
    lone = Samples.of(architecture, [160, 170, 180, 190], [20, 30, 20, 10])
    found = set()
    for max_len in (210, 250, 300):  # always one sample a row
        replicas = packed(Packing(max_len=max_len, attention="varlen"), lone, model)
        assert [len(m.samples) for r in replicas for m in r.micro_batches] == [1] * 4
        found.add((slowest_ms(replicas), *(r.schedule.peak_mb for r in replicas)))
    assert len(found) == 1
    samples = short_targets(batch(architecture, 7, 50))
    replicas = packed(Packing(max_len=500, micro_batch_size=2, attention="varlen"), samples, model)
    for replica in replicas:
        index = [list(m.samples) for m in replica.micro_batches]
        encoder, decoder = [samples.encoder_len[i] for i in index], [targets(samples)[i] for i in index]
        expected = model.varlen_costs(encoder, decoder, replica.recompute)
        for got, column in zip(replica.costs.columns(), expected.columns(), strict=True):
            np.testing.assert_allclose(got, column, rtol=1e-12)


def test_varlen_packing_is_cheaper_for_many_short_samples(architecture: Architecture) -> None:
    # No attention across samples, and no work where a row is not full. Without either they cost about the same.
    model = toy_cost_model(architecture, data=2, pipeline=2)
    ratios = {}
    for length in (10, 250):
        number = 40 * (250 // length)
        samples = Samples.of(architecture, [length] * number, [length - 2] * number)
        plans = [
            make_plan(Packing(max_len=500, max_target_len=500, attention=kind), samples, model, FAST)
            for kind in ("padded", "varlen")
        ]
        ratios[length] = plans[1].estimated_ms / plans[0].estimated_ms
        assert plans[1].estimated_peak_mb < plans[0].estimated_peak_mb
    assert ratios[10] < ratios[250] < 1.02 and ratios[10] < 0.95


def test_a_sample_longer_than_a_row_is_named(architecture: Architecture) -> None:
    model, samples = toy_cost_model(architecture), batch(architecture, 8, 20)
    lengths = np.minimum(samples.decoder_len, 200)
    lengths[13] = 201
    inputs = np.minimum(samples.encoder_len, 200)
    too_long = Samples(encoder_len=inputs, decoder_len=lengths)
    config = replace(FAST, decoder_extra_tokens=0)
    for attention in ("padded", "varlen"):
        planner = Packing(max_len=200, max_target_len=200, attention=attention)
        with pytest.raises(InputError, match=r"sample 13 is longer than a row(.|\n)*200(.|\n)*201(.|\n)*truncate"):
            make_plan(planner, too_long, model, config)
    if architecture == "encoder_decoder":
        inputs, lengths = inputs.copy(), np.minimum(lengths, 200)
        inputs[4] = 300
        with pytest.raises(InputError, match=r"sample 4 is longer(.|\n)*encoder length up to 200(.|\n)*length 300"):
            make_plan(planner, Samples(encoder_len=inputs, decoder_len=lengths), model, config)


def test_a_sample_as_long_as_a_row_fits(architecture: Architecture) -> None:
    model = toy_cost_model(architecture)
    samples = Samples.of(architecture, [400, 399, 400], [100, 400, 1]).truncate(400)
    replicas = packed(Packing(max_len=400), samples, model)
    assert [len(m.rows) for m in replicas[0].micro_batches] == [1, 1, 1]


def test_fewer_rows_than_replicas_are_an_error(architecture: Architecture) -> None:
    model = toy_cost_model(architecture, data=3, pipeline=2)
    samples = Samples.of(architecture, [30] * 8, [10] * 8)
    with pytest.raises(InfeasibleError, match=r"without work(.|\n)*at least 3 rows(.|\n)*1 rows of up to 400"):
        make_plan(Packing(max_len=400), samples, model, FAST)


@pytest.mark.parametrize("data", [1, 2, 3, 5])
def test_no_replica_stays_idle_while_there_are_rows(architecture: Architecture, data: int) -> None:
    model = toy_cost_model(architecture, data=data)
    for num_rows, size in itertools.product(range(data, 10), (1, 3, 16)):
        samples = Samples.of(architecture, [60] * num_rows, [40] * num_rows)
        replicas = packed(Packing(max_len=100, micro_batch_size=size, max_target_len=100), samples, model)
        sizes = [[len(m.rows) for m in replica.micro_batches] for replica in replicas]
        assert all(sizes) and sum(map(sum, sizes)) == num_rows
        # As many rows a micro-batch as allowed, but for what is left over.
        expected = min(size, num_rows // data)
        assert sorted(itertools.chain(*sizes))[1:] == [expected] * (sum(map(len, sizes)) - 1)


# --- token-based ---


def padded_tokens(groups: Sequence[Sequence[int]], padded: PaddedLengths) -> list[int]:
    return [int(n * (e + d)) for n, e, d in group_shapes(tuple(tuple(g) for g in groups), padded).tolist()]


@pytest.mark.parametrize("order", ["sort", "tour"])
@pytest.mark.parametrize("limit", [1, 100, 512, 2048])
def test_6_token_counts_include_padding(architecture: Architecture, order: Any, limit: int) -> None:
    """Defect 6 of the public planner: 2856 padded tokens in a micro-batch for a limit of 2048."""
    config = replace(FAST, order=order)
    for seed in range(3):
        model, samples = toy_cost_model(architecture, data=2), batch(architecture, seed)
        padded = PaddedLengths.of(samples, encoder_decoder=model.encoder_decoder, config=config)
        line = order_samples(padded.encoder_len, padded.decoder_len, config)
        groups = TokenBased(tokens_per_micro_batch=limit).groups(padded, line)
        assert [i for group in groups for i in group] == line.tolist() and all(groups)
        tokens = padded_tokens(groups, padded)
        assert all(n <= limit or len(group) == 1 for n, group in zip(tokens, groups, strict=True))
        # And no smaller than need be: with the next sample each would pass the limit.
        grown = padded_tokens([[*a, b[0]] for a, b in itertools.pairwise(groups)], padded)
        assert all(n > limit for n in grown)
        if max(map(len, groups)) > SIZES[-1]:
            continue
        replicas = TokenBased(tokens_per_micro_batch=limit).schedule(samples, model, config)
        made = {m.samples: m for replica in replicas for m in replica.micro_batches}
        assert set(made) == set(groups)
        assert [len(m.rows) * (m.encoder_len + m.decoder_len) for m in map(made.__getitem__, groups)] == tokens


def test_6_one_long_sample_pads_all_the_others() -> None:
    # 480 real tokens, but 2000 once the short ones are as long as the first.
    model, samples = toy_cost_model("decoder_only"), Samples.decoder_only([300, 10, 10, 10, 10], [100, 10, 10, 10, 10])
    (replica,) = TokenBased(tokens_per_micro_batch=512).schedule(samples, model, replace(FAST, schedules=("1f1b",)))
    assert [m.shape for m in replica.micro_batches] == [(1, 0, 400), (4, 0, 24)]


@pytest.mark.parametrize("data", [2, 3, 4])
def test_6_real_times_are_balanced(architecture: Architecture, data: int) -> None:
    """The public planner balances with costs of zero."""
    model, samples = toy_cost_model(architecture, data=data, pipeline=2), batch(architecture, 9)
    planner = TokenBased(tokens_per_micro_batch=600)
    padded = PaddedLengths.of(samples, encoder_decoder=model.encoder_decoder, config=FAST)
    groups = planner.groups(padded, order_samples(padded.encoder_len, padded.decoder_len, FAST))
    costs = model.micro_batch_costs(group_shapes(tuple(groups), padded), "none")  # the cheapest kind, here of all
    times = (costs.forward_ms + costs.backward_ms).max(axis=1)
    assert len(groups) > 2 * data and np.ptp(times) > 0.2 * times.max()
    replicas = planner.schedule(samples, model, FAST)
    expected = [sorted(groups[i] for i in part) for part in karmarkar_karp(times.tolist(), data)]
    assert [sorted(m.samples for m in replica.micro_batches) for replica in replicas] == expected
    loads = [sum(times[groups.index(m.samples)] for m in replica.micro_batches) for replica in replicas]
    assert np.ptp(loads) <= times.max()


def test_token_based_schedules_as_the_settings_say(architecture: Architecture) -> None:
    model, samples = toy_cost_model(architecture, pipeline=3), batch(architecture, 10)
    planner = TokenBased(tokens_per_micro_batch=600)
    for kind in ("1f1b", "adaptive"):
        assert planner.schedule(samples, model, replace(FAST, schedules=(kind,)))[0].schedule.kind == kind


# --- fixed size ---


@pytest.mark.parametrize("size", [1, 4, 7, 32])
def test_fixed_sizes_of_sorted_samples(architecture: Architecture, size: int) -> None:
    # The order is by length even where the settings ask for a tour.
    model, samples = toy_cost_model(architecture), batch(architecture, 11)
    (replica,) = FixedSize(micro_batch_size=size).schedule(samples, model, replace(FAST, order="tour"))
    sizes = [len(m.rows) for m in replica.micro_batches]
    assert sum(sizes) == 60 and set(sizes[:-1]) == ({size} if size < 60 else set()) and 1 <= sizes[-1] <= size
    line = [i for m in replica.micro_batches for i in m.samples]
    padded = PaddedLengths.of(samples, encoder_decoder=model.encoder_decoder, config=FAST)
    lengths = list(zip(padded.encoder_len[line].tolist(), padded.decoder_len[line].tolist(), strict=True))
    assert lengths == sorted(lengths, reverse=True)
    shapes = group_shapes(tuple(m.samples for m in replica.micro_batches), padded)
    assert [list(m.shape) for m in replica.micro_batches] == shapes.tolist()


def test_5_fixed_sizes_for_decoder_only_models() -> None:
    """Defect 5: uniform micro-batches of a decoder-only model end in an assertion."""
    model = toy_cost_model("decoder_only", data=2, pipeline=2)
    plan = make_plan(FixedSize(micro_batch_size=8), batch("decoder_only", 12), model, FAST)
    assert sorted(len(m.rows) for r in plan.replicas for m in r.micro_batches) == [4, *[8] * 7]


def test_large_fixed_sizes_are_halved_for_idle_replicas(architecture: Architecture) -> None:
    model, samples = toy_cost_model(architecture, data=4), batch(architecture, 13, 32)
    replicas = FixedSize(micro_batch_size=32).schedule(samples, model, FAST)
    assert [[len(m.rows) for m in replica.micro_batches] for replica in replicas] == [[8]] * 4


def test_sizes_beyond_the_profile_are_infeasible(architecture: Architecture) -> None:
    profile = toy_profile(architecture, sizes={"none": (1, 2, 4), "selective": (1, 2, 4), "full": (1, 2, 4)})
    model, samples = toy_cost_model(architecture, profile=profile), batch(architecture, 14)
    with pytest.raises(InfeasibleError):
        make_plan(FixedSize(micro_batch_size=5), samples, model, FAST)
    assert make_plan(FixedSize(micro_batch_size=4), samples, model, FAST).num_micro_batches == 15
