"""Lancet's simulated figures: what their rows add up to, what is compared with what, and names that do not exist."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest

from experiments.lancet import _setup, fig2, fig6, fig13
from experiments.lancet._iteration import speedups
from experiments.record import RunContext
from llmsys.core.errors import ConfigError, DataNotFoundError

CONTEXT = RunContext(seed=0, scale="tiny", data_root=None, device="test")
ASSUMED = _setup.Assumptions(axis_solver="propagate")
POINT = _setup.Point(model="gpt2_s_moe", cluster="V100", num_gpus=16, assumed=ASSUMED)


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    config = fig13.Config(models=("gpt2_s_moe",), clusters=("V100",), num_gpus=(16,), assumed=ASSUMED)
    return pd.DataFrame(fig13.run(config, CONTEXT))


def test_the_parts_of_an_iteration_add_up(rows: pd.DataFrame) -> None:
    total = rows[list(fig13.PARTS)].sum(axis=1)
    assert total.tolist() == pytest.approx(rows["iteration_ms"].tolist())


def test_plans_take_what_their_planners_expect_unless_experts_are_uneven(rows: pd.DataFrame) -> None:
    even = rows[rows["method"] != fig13.UNEVEN]
    assert even["iteration_ms"].tolist() == pytest.approx(even["estimated_ms"].tolist())
    uneven = rows[rows["method"] == fig13.UNEVEN].iloc[0]
    lancet = rows[rows["method"] == _setup.LANCET].iloc[0]
    assert uneven["estimated_ms"] == lancet["estimated_ms"] < uneven["iteration_ms"]
    assert uneven["comm_ms"] < lancet["comm_ms"] and uneven["compute_ms"] > lancet["compute_ms"]


def test_lancet_is_the_fastest(rows: pd.DataFrame) -> None:
    times = rows.set_index("method")["iteration_ms"]
    assert times[_setup.LANCET] == times.drop(fig13.UNEVEN).min()
    assert times[_setup.AS_CAPTURED] == times.max()


def test_the_cut_of_communication_is_measured_against_each_baseline(rows: pd.DataFrame) -> None:
    exposed = rows.set_index("method")["exposed_comm_ms"]
    found = {item.name: item for item in fig13.compare(rows)}
    for baseline, paper in ((_setup.AS_CAPTURED, 83), (_setup.TUTEL_STYLE, 77)):
        item = found[f"V100: communication alone, cut against {baseline}, up to"]
        assert item.ours == pytest.approx(100 * (1 - exposed[_setup.LANCET] / exposed[baseline]))
        assert item.paper == paper


def test_speedups_are_over_the_faster_baseline_of_each_point() -> None:
    times = {"as captured": (4.0, 6.0), "Tutel-style": (5.0, 3.0), "Lancet": (2.0, 2.0)}
    rows = pd.DataFrame(
        {"model": "m", "cluster": "A100", "num_gpus": gpus, "method": method, "iteration_ms": ms[i]}
        for i, gpus in enumerate((8, 16))
        for method, ms in times.items()
    )
    found = {item.name.split(", ")[-1]: item for item in speedups(rows, {"A100": (1.17, 1.21)}) if item.paper}
    assert {name: item.ours for name, item in found.items()} == {
        "mean": pytest.approx((2.0 + 1.5) / 2),
        "mean of 2 nodes and more": pytest.approx(1.5),
        "largest": pytest.approx(2.0),
    }


def test_bounds_leave_out_what_they_hide() -> None:
    config = fig2.Config(models=("gpt2_s_moe",), num_gpus=(16, 64))
    rows = pd.DataFrame(fig2.run(config, CONTEXT))
    for _, mine in rows.groupby("num_gpus"):
        times = mine.set_index("method")
        original = times.loc["original"]
        assert original["iteration_ms"] == pytest.approx(original[list(fig2._PARTS)].sum())
        hidden = original["iteration_ms"] - times["iteration_ms"]
        assert hidden["experts hidden"] == pytest.approx(min(original["experts_ms"], original["all_to_all_ms"]))
        assert hidden["all-to-all hidden"] == pytest.approx(original["all_to_all_ms"])


def test_a_range_of_nothing_but_experts_gains_less_than_a_wider_one_and_whole_is_the_sum() -> None:
    config = fig6.Config(
        cases=(fig6.Case(num_layers=4, batch_per_gpu=8),),
        ranges=(0.0, 1.0),
        arithmetics=("tf32",),
        axis_solver="propagate",
    )
    rows = pd.DataFrame(fig6.run(config, CONTEXT))
    times = rows.set_index("range_percent")["forward_ms"]
    assert times[100.0] < times[0.0] < times[fig6.WHOLE]
    assert rows.set_index("range_percent")["num_regions"].to_dict() == {fig6.WHOLE: 0, 0.0: 2, 100.0: 2}


def test_batches_are_the_texts_or_the_artifacts() -> None:
    point = dataclasses.replace(POINT, cluster="A100")
    assert point.batch == 24
    assert dataclasses.replace(point, assumed=_setup.Assumptions(batches="artifact")).batch == 48
    assert dataclasses.replace(point, batch_per_gpu=3).batch == 3


def test_planners_never_see_uneven_experts() -> None:
    uneven = dataclasses.replace(POINT, assumed=dataclasses.replace(ASSUMED, expert_load="mixtral-8x7b topk"))
    assert _setup.planned(uneven) == POINT
    assert _setup.costs_of(_setup.planned(uneven)).skew is None
    skew = _setup.executed_costs_of(uneven, None, 0).skew
    # Two nodes of 16 experts, each behind one network.
    assert skew is not None and (len(skew.loads), skew.experts_per_link) == (32, 16)


@pytest.mark.parametrize(
    ("find", "name", "near"), [(_setup.cluster, "A10", "A100"), (_setup.system, "lancet", "Lancet")]
)
def test_unknown_names_are_answered_with_the_nearest(find: object, name: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find(name)  # type: ignore[operator]
    assert near in caught.value.fix


def test_a_data_root_without_the_loads_is_an_error(tmp_path: object) -> None:
    assumed = dataclasses.replace(ASSUMED, expert_load="olmoe-1b-7b topk")
    with pytest.raises(DataNotFoundError, match="loads are missing"):
        _setup.expert_skew(assumed, 32, 2, tmp_path, 0)  # type: ignore[arg-type]
