"""The profile with fused attention: padded micro-batches at the price of variable-length ones."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest

from llmsys.core.costs import GridTable
from llmsys.core.errors import InputError
from llmsys.core.specs import Architecture
from llmsys.dynapipe.config import PlannerConfig
from llmsys.dynapipe.costs import CostModel
from llmsys.dynapipe.planner import plan_iteration
from llmsys.dynapipe.profile import LayerProfile, LayerTables, fused_profile
from llmsys.dynapipe.simulator import simulate
from tests.dynapipe.synthetic import (
    LENGTHS,
    MEMORY,
    RECOMPUTES,
    SIZES,
    shared_toy_profile,
    toy_cost_model,
    toy_profile,
    toy_samples,
)

SPEEDUP = 3.0


@cache
def fused(architecture: Architecture, attention_speedup: float = 1.0) -> LayerProfile:
    return fused_profile(shared_toy_profile(architecture), attention_speedup=attention_speedup)


def grids(tables: LayerTables) -> dict[str, GridTable]:
    parts = {"encoder": tables.encoder, "decoder": tables.decoder, "head": tables.head}
    return {part: grid for part, grid in parts.items() if grid is not None}


@pytest.mark.parametrize("speedup", [1.0, SPEEDUP])
@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_padded_costs_are_those_of_equal_samples(architecture: Architecture, recompute: str, speedup: float) -> None:
    """Memory and transfers too, on every stage."""
    plain = toy_cost_model(architecture, pipeline=3)
    model = dataclasses.replace(plain, padded_profile=fused(architecture, speedup), attention_speedup=speedup)
    shapes = [
        (size, encoder if model.encoder_decoder else 0, decoder)
        for size in SIZES
        for decoder in LENGTHS
        for encoder in (LENGTHS if model.encoder_decoder else (0,))
    ]
    padded = model.micro_batch_costs(np.array(shapes), recompute)  # type: ignore[arg-type]
    encoder_len = [np.full(size, encoder) for size, encoder, _ in shapes]
    decoder_len = [np.full(size, decoder) for size, _, decoder in shapes]
    varlen = model.varlen_costs(encoder_len, decoder_len, recompute)  # type: ignore[arg-type]
    for got, expected in zip(padded.columns(), varlen.columns(), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)
    # Samples of one length, but not one of the grid's: a straight line lies above the square.
    between = np.array([(4, 48 if model.encoder_decoder else 0, 200), (6, 300 if model.encoder_decoder else 0, 100)])
    got = model.micro_batch_costs(between, "none").forward_ms
    exact = model.varlen_costs([np.full(n, e) for n, e, _ in between], [np.full(n, d) for n, _, d in between], "none")
    assert (got >= exact.forward_ms * (1 - 1e-9)).all() and (got <= exact.forward_ms * 1.2).all()


def test_memory_is_linear_in_tokens(architecture: Architecture) -> None:
    for tables in fused(architecture).tables.values():
        for part, grid in grids(tables).items():
            if part == "head":
                continue
            for name in MEMORY:
                values, sizes = grid.columns[name], grid.axes[-1]
                # In proportion to the number of samples, and to all lengths together.
                np.testing.assert_allclose(values / sizes, np.broadcast_to(values[..., :1], values.shape), rtol=1e-9)
                twice = values[(slice(1, None),) * (values.ndim - 1)]
                np.testing.assert_allclose(twice, 2 * values[(slice(-1),) * (values.ndim - 1)], rtol=1e-9)
    # The linear part is the profile's own: 0.14 MB a token are stored, and 0.6 of that when selectively recomputed.
    for recompute, factor in (("none", 1.0), ("selective", 0.6)):
        table = grids(fused(architecture).tables[1, recompute])  # type: ignore[index]
        layer = table.get("encoder", table["decoder"])
        assert layer.query([[256, 4]])["stored_mb"] == pytest.approx(factor * 0.14 * 1024, rel=0.02)


def test_feasible_everywhere(architecture: Architecture) -> None:
    measured, made = shared_toy_profile(architecture), fused(architecture)
    holes = 0
    for key, tables in made.tables.items():
        for part, grid in grids(tables).items():
            before = grids(measured.tables[key])[part]
            holes += int((~np.isfinite(before.columns["fw_ms"])).sum())
            assert set(grid.columns) == set(before.columns) and grid.axis_names == before.axis_names
            for one, other in zip(grid.axes, before.axes, strict=True):
                np.testing.assert_array_equal(one, other)
            for values in grid.columns.values():
                assert np.isfinite(values).all() and (values >= 0).all()
    assert holes > 0


def test_all_else_stays(architecture: Architecture) -> None:
    measured, made = shared_toy_profile(architecture), fused(architecture, SPEEDUP)
    assert set(made.tables) == set(measured.tables) and made.params_mb == measured.params_mb
    assert (made.name, made.architecture, made.device) == (measured.name, measured.architecture, measured.device)
    assert made.origin == "made up, attention as if fused and 3 times as fast"
    with pytest.raises(InputError, match="set attention_speedup"):
        fused_profile(measured, attention_speedup=0.5)


def test_no_score_matrices(architecture: Architecture) -> None:
    """Where attention is most of the work, less memory than measured, and never more by much."""
    for key, tables in shared_toy_profile(architecture).tables.items():
        for part, grid in grids(tables).items():
            if part == "head":
                continue
            made = grids(fused(architecture).tables[key])[part]
            for name in MEMORY:
                before, after = grid.columns[name], made.columns[name]
                assert (after[np.isfinite(before)] <= before[np.isfinite(before)] * 1.05).all()
                longest = (-1,) * (before.ndim - 1) + (0,)
                assert after[longest] < before[longest] * (0.7 if name == "stored_mb" else 1.0)


def test_a_speedup_of_attention_only_lowers_times(architecture: Architecture) -> None:
    slow, fast = fused(architecture), fused(architecture, SPEEDUP)
    for key, tables in slow.tables.items():
        for part, grid in grids(tables).items():
            other = grids(fast.tables[key])[part]
            for name, values in grid.columns.items():
                if part == "head" or name in MEMORY:
                    np.testing.assert_array_equal(other.columns[name], values)
                    continue
                assert (other.columns[name] <= values).all()
                # Long samples gain, by no more than the speedup; a launch-bound one gains nothing.
                ratio = other.columns[name] / values
                assert 1 / SPEEDUP <= ratio.min() == ratio[..., -1].min() < 0.95
                assert ratio[(0,) * ratio.ndim] == 1.0


def test_plans_with_fused_attention(architecture: Architecture) -> None:
    """Padded plans use the fused profile alone: more samples fit, and the simulator agrees."""
    samples = toy_samples(np.random.default_rng(0), architecture, 40, max_len=300)
    profile = toy_profile(architecture, capacity_mb=200.0)
    measured = toy_cost_model(architecture, profile=profile, data=2, pipeline=2)
    model: CostModel = dataclasses.replace(measured, padded_profile=fused(architecture))
    config = PlannerConfig(memory_limit_mb=6000.0, max_moves=20, recompute=("none",))
    plans = [plan_iteration(samples, chosen, config) for chosen in (measured, model)]
    for plan, chosen in zip(plans, (measured, model), strict=True):
        assert simulate(plan, chosen).makespan_ms == plan.estimated_ms
    largest = [max(n * (e + d) for r in plan.replicas for n, e, d in r.shapes().tolist()) for plan in plans]
    assert largest[1] > largest[0] and plans[1].estimated_ms < plans[0].estimated_ms
    # Nothing but layers comes from it: model state and gradients are the measured profile's.
    np.testing.assert_array_equal(model.state_mb("none"), measured.state_mb("none"))
    assert model.grad_sync_ms("none") == measured.grad_sync_ms("none")
