"""Grid search: the best of a plain loop over all options, and what rules an option out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmsys.core.errors import ConfigError, InfeasibleError, InputError, LlmsysError
from llmsys.core.specs import Architecture
from llmsys.dynapipe.baselines import FixedSize, Packing, TokenBased
from llmsys.dynapipe.config import Parallelism, PlannerConfig, Recompute
from llmsys.dynapipe.costs import CostModel
from llmsys.dynapipe.grid import Choice, Option, search_grid
from llmsys.dynapipe.planner import DynaPipe, Planner, make_plan
from llmsys.dynapipe.simulator import simulate
from llmsys.dynapipe.workload import Samples
from tests.dynapipe.synthetic import shared_toy_profile, toy_cluster, toy_model, toy_samples

CONFIG = PlannerConfig(memory_limit_mb=2500.0, reorder="none")
PLANNERS: tuple[Planner, ...] = (
    Packing(max_len=460),
    Packing(max_len=500, micro_batch_size=4, attention="varlen"),
    FixedSize(micro_batch_size=4),
    FixedSize(micro_batch_size=16),
    TokenBased(tokens_per_micro_batch=256),
    DynaPipe(),
)
KINDS: tuple[tuple[Recompute, ...], ...] = (("none",), ("none", "full"))
# Five stages are more than four layers give, three tensor-parallel devices were not profiled.
IMPOSSIBLE = (Parallelism(pipeline=5), Parallelism(tensor=3))
SPLITS = (
    Parallelism(data=2, pipeline=2),
    *IMPOSSIBLE,
    Parallelism(pipeline=4),
    Parallelism(data=4, zero_stage=1),
)
OPTIONS = [
    Option(parallelism=split, planner=planner, recompute=kinds)
    for split, planner, kinds in itertools.product(SPLITS, PLANNERS, KINDS)
]
CostModelOf = Callable[[Parallelism], CostModel]


def cost_model_of(architecture: Architecture) -> CostModelOf:
    def make(parallelism: Parallelism) -> CostModel:
        return CostModel(
            profile=shared_toy_profile(architecture),
            model=toy_model(architecture, 4),
            cluster=toy_cluster(),
            parallelism=parallelism,
        )

    return make


def batches(architecture: Architecture, seed: int = 0, number: int = 2) -> list[Samples]:
    rng = np.random.default_rng(seed)
    return [toy_samples(rng, architecture, 18, max_len=300) for _ in range(number)]


def mean_simulated_ms(
    option: Option, given: Sequence[Samples], make: CostModelOf, config: PlannerConfig
) -> float | None:
    """Plan and simulate every batch; None when anything is in the way."""
    times = []
    for samples in given:
        try:
            model = make(option.parallelism)
            plan = make_plan(option.planner, samples, model, replace(config, recompute=option.recompute))
        except (ConfigError, InfeasibleError, InputError):
            return None
        times.append(simulate(plan, model, samples=samples, grad_sync=True).iteration_ms)
    return float(np.mean(times))


@pytest.mark.parametrize("limit_mb", [1100.0, 2500.0])
def test_best_of_a_plain_loop(architecture: Architecture, limit_mb: float) -> None:
    make, given = cost_model_of(architecture), batches(architecture)
    config = replace(CONFIG, memory_limit_mb=limit_mb)
    times = {option: mean_simulated_ms(option, given, make, config) for option in OPTIONS}
    grids = [OPTIONS, *([option for option in OPTIONS if option.planner is planner] for planner in PLANNERS)]
    for options in grids:
        feasible = [time for option in options if (time := times[option]) is not None]
        choice = search_grid(iter(options), given, make, config)
        if not feasible:
            assert choice is None
            continue
        assert choice is not None and (choice.num_tried, choice.num_feasible) == (len(options), len(feasible))
        assert choice.iteration_ms == pytest.approx(min(feasible), rel=1e-12)
        assert times[choice.option] == pytest.approx(min(feasible), rel=1e-12)
    possible = [times[option] for option in OPTIONS if option.parallelism not in IMPOSSIBLE]
    assert 0 < sum(time is not None for time in possible) < len(possible)
    assert all(times[option] is None for option in OPTIONS if option.parallelism in IMPOSSIBLE)


def test_gradients_count(architecture: Architecture) -> None:
    # Replicas without any work between them would be fastest, were it not for their all-reduce.
    make, given = cost_model_of(architecture), batches(architecture, 2)
    option = Option(parallelism=Parallelism(data=4), planner=FixedSize(micro_batch_size=2), recompute=("none",))
    choice = search_grid([option], given, make, CONFIG)
    assert choice is not None
    model = make(option.parallelism)
    plans = [make_plan(option.planner, samples, model, replace(CONFIG, recompute=("none",))) for samples in given]
    assert model.grad_sync_ms("none") > 0
    mean = float(np.mean([plan.estimated_ms for plan in plans]))
    assert choice.iteration_ms == pytest.approx(mean + model.grad_sync_ms("none"), rel=1e-12)


def test_the_first_of_equals_wins(architecture: Architecture) -> None:
    make, given = cost_model_of(architecture), batches(architecture, 3)
    twins = [
        Option(parallelism=Parallelism(zero_stage=stage), planner=FixedSize(micro_batch_size=4), recompute=("none",))
        for stage in (1, 0, 2)
    ]
    choice = search_grid(twins, given, make, CONFIG)
    assert choice is not None and choice.option is twins[0] and choice.num_feasible == 3


def test_none_when_nothing_fits(architecture: Architecture) -> None:
    make, given = cost_model_of(architecture), batches(architecture, 4)
    assert search_grid(OPTIONS, given, make, replace(CONFIG, memory_limit_mb=10.0)) is None
    assert search_grid([], given, make, CONFIG) is None


def test_an_option_must_carry_every_batch(architecture: Architecture) -> None:
    make, rng = cost_model_of(architecture), np.random.default_rng(5)
    large, small = (toy_samples(rng, architecture, number, max_len=150) for number in (90, 8))
    kinds: tuple[Recompute, ...] = ("none", "full")
    options = [
        Option(parallelism=Parallelism(data=4), planner=planner, recompute=kinds)
        for planner in (Packing(max_len=460), DynaPipe())
    ]
    assert choose(options, [large], make).num_feasible == 2
    # The small one does not fill a row for each replica.
    for given in ([large, small], [small, large]):
        choice = choose(options, given, make)
        assert (choice.option, choice.num_feasible, choice.num_tried) == (options[1], 1, 2)
    # Two samples cannot be shared by four replicas.
    assert search_grid(options, [large, large.select([0, 1])], make, CONFIG) is None
    two = Option(parallelism=Parallelism(data=2), planner=DynaPipe(), recompute=kinds)
    assert choose([*options, two], [large, large.select([0, 1])], make).option == two


def test_samples_longer_than_a_row_are_no_matter_of_the_option(architecture: Architecture) -> None:
    long = Samples.of(architecture, [480] * 12, [20] * 12)
    with pytest.raises(InputError, match="sample 0 is longer than a row"):
        search_grid(OPTIONS, [long], cost_model_of(architecture), CONFIG)


def choose(options: Sequence[Option], given: Sequence[Samples], make: CostModelOf) -> Choice:
    choice = search_grid(options, given, make, CONFIG)
    assert choice is not None
    return choice


@pytest.mark.parametrize("error", [ConfigError, InfeasibleError])
def test_parallelisms_without_a_cost_model_are_ruled_out(error: type[LlmsysError]) -> None:
    make, given = cost_model_of("decoder_only"), batches("decoder_only", 6)
    asked: Counter[Parallelism] = Counter()

    def partly(parallelism: Parallelism) -> CostModel:
        asked[parallelism] += 1
        if parallelism.pipeline == 2:
            raise error("not this one")
        return make(parallelism)

    choice = search_grid(OPTIONS, given, partly, CONFIG)
    others = [option for option in OPTIONS if option.parallelism.pipeline != 2]
    assert choice is not None and choice == replace(choose(others, given, make), num_tried=len(OPTIONS))
    # Each is asked for once, the impossible ones too.
    assert asked == dict.fromkeys(SPLITS, 1)


def test_other_errors_are_not_hidden() -> None:
    def broken(parallelism: Parallelism) -> CostModel:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        search_grid(OPTIONS, batches("decoder_only"), broken, CONFIG)
    # Nor are batches for another kind of model, which no option could serve.
    with pytest.raises(ConfigError, match="another kind than the model"):
        search_grid(OPTIONS, batches("encoder_decoder"), cost_model_of("decoder_only"), CONFIG)


def test_a_search_needs_batches() -> None:
    with pytest.raises(InputError, match=r"without batches(.|\n)*at least one(.|\n)*none"):
        search_grid(OPTIONS, [], cost_model_of("decoder_only"), CONFIG)


@pytest.mark.parametrize("change", [{}, {"order": "sort"}, {"schedules": ("1f1b",)}])
def test_other_settings_stay(architecture: Architecture, change: dict[str, Any]) -> None:
    make, given, config = cost_model_of(architecture), batches(architecture, 7), replace(CONFIG, **change)
    options = [Option(parallelism=Parallelism(pipeline=4), planner=DynaPipe(), recompute=("none",))]
    choice = search_grid(options, given, make, config)
    assert choice is not None
    assert choice.iteration_ms == pytest.approx(mean_simulated_ms(options[0], given, make, config), rel=1e-12)
