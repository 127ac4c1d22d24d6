"""Against the public planner on its own measurements: its plans in our simulator, and ours next to its results.

``dynapipe_reference.json`` holds four cases of that planner's output. Replaying them separates the simulator from the
planner: GPT plans take here exactly what they took there. T5 plans take 2.7% less, because the public planner keeps
the LARGEST of repeated measurements of one profile cell while our table holds the medians. Its T5 encoder was measured
once for each decoder length, GPT cells were measured once. So T5's makespan is bounded to within 4% below the
reference, and memory to 1%.
"""

from __future__ import annotations

import json
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsys import _C
from llmsys.core.specs import DEVICES, ClusterSpec, LinkSpec, ModelSpec
from llmsys.dynapipe.communication import PassTimes, plan_instructions
from llmsys.dynapipe.config import Parallelism, PlannerConfig, Recompute
from llmsys.dynapipe.costs import CostModel
from llmsys.dynapipe.microbatch import PaddedLengths, partition
from llmsys.dynapipe.ordering import order_samples
from llmsys.dynapipe.plan import Estimate, MicroBatch, Plan, ReplicaPlan, check_plan
from llmsys.dynapipe.planner import plan_iteration
from llmsys.dynapipe.profile import LayerProfile, load_profile
from llmsys.dynapipe.simulator import simulate
from llmsys.dynapipe.workload import Samples

pytestmark = pytest.mark.data

Case = dict[str, Any]
CASES = ("gpt_n512_cap2048", "gpt_tok65536_cap2048", "gpt_tok65536_cap512", "t5_tok65536_cap2048")
GPT_CASES = CASES[:3]
THINNING_MS = 5.0  # the public planner's steps between the longest micro-batches that it tries


@cache
def cases_in(root: Path) -> dict[str, Case]:
    content = json.loads((root / "dynapipe_reference.json").read_text())
    return {case["name"]: case for case in content["cases"]}


@cache
def profile_of(root: Path, name: str) -> LayerProfile:
    return load_profile(root, name, hole="infeasible")


@pytest.fixture
def case(request: pytest.FixtureRequest, real_data_root: Path) -> Case:
    return cases_in(real_data_root)[request.param] | {"root": real_data_root}


def cost_model_of(case: Case, *, count_backward_extra: bool = False) -> CostModel:
    given = case["case"]
    gpt = given["model"] == "gpt"
    links = [
        LinkSpec(name=name, bandwidth_gbps=given[f"{name}_bw_gbps"], latency_us=given["lat_us"])
        for name in ("intra", "inter")
    ]
    return CostModel(
        profile=profile_of(case["root"], given["profile"]),
        model=ModelSpec(
            name=given["profile"],
            architecture="decoder_only" if gpt else "encoder_decoder",
            hidden=given["hidden"],
            num_heads=given["heads"],
            kv_channels=given["kv"],
            ffn_hidden=given["ffn"],
            num_encoder_layers=0 if gpt else given["enc_layers"],
            num_decoder_layers=given["enc_layers"] if gpt else given["dec_layers"],
            vocab_size=32128,
        ),
        cluster=ClusterSpec(
            name="one node",
            device=DEVICES["A100-40GB"],
            num_nodes=1,
            devices_per_node=given["pp"] * given["dp"] * given["tp"],
            intra_link=links[0],
            inter_link=links[1],
        ),
        parallelism=Parallelism(data=given["dp"], pipeline=given["pp"], tensor=given["tp"], zero_stage=given["zero"]),
        count_backward_extra=count_backward_extra,
    )


def samples_of(case: Case) -> Samples:
    lengths = np.array(case["case"]["lens"], dtype=np.int64)
    if lengths.ndim == 1:
        return Samples(encoder_len=np.zeros_like(lengths), decoder_len=lengths)
    return Samples(encoder_len=lengths[:, 0], decoder_len=lengths[:, 1])


def reference_shapes(case: Case, replica: dict[str, Any]) -> np.ndarray:
    """Rows (samples, encoder length, decoder length); the one length of GPT is the decoder's here."""
    shapes = np.array(replica["shapes"], dtype=np.int64)
    return shapes[:, [0, 2, 1]] if case["case"]["model"] == "gpt" else shapes


def reference_plan(case: Case, model: CostModel) -> Plan:
    """The reference's micro-batches, in its order of passes, as one of our plans."""
    num_stages = model.parallelism.pipeline
    replicas = []
    for given in case["plan"]["replicas"]:
        # Executed micro-batch i is the one that the partition listed as number order[i].
        order = given["micro_batch_order"]
        shapes = reference_shapes(case, given)[order]
        micro_batches = tuple(
            MicroBatch(
                rows=tuple(tuple(row) for row in given["samples"][number]), encoder_len=int(enc), decoder_len=int(dec)
            )
            for number, (_, enc, dec) in zip(order, shapes.tolist(), strict=True)
        )
        costs = model.micro_batch_costs(shapes, given["recompute"])
        orders = []
        for stage, instructions in enumerate(given["instructions"]):
            passes = [op for op in instructions if op[0] in ("ForwardPass", "BackwardPass")]
            # A backward pass of stage v is numbered 2S - 1 - v there.
            assert {op[2] for op in passes} == {stage, 2 * num_stages - 1 - stage}
            rows = [(m, stage, kind == "BackwardPass") for kind, m, _ in passes]
            orders.append(np.array(rows, dtype=np.int32))
        run = _C.replay(costs.columns(), num_stages, orders)
        times = PassTimes(start_ms=run["start_ms"], send_start_ms=run["send_start_ms"])
        first_decoder = next(v for v, layers in enumerate(model.stages) if layers.num_decoder)
        replicas.append(
            ReplicaPlan(
                micro_batches=micro_batches,
                recompute=given["recompute"],
                schedule="1f1b" if given["schedule"] == "1F1B" else "adaptive",
                estimate=Estimate(makespan_ms=given["makespan_ms"], peak_mb=(given["peak_memory_mb"],) * num_stages),
                instructions=plan_instructions(orders, times, costs, frozenset({0, first_decoder})),
            )
        )
    plan = Plan(
        planner="reference",
        num_samples=len(case["case"]["lens"]),
        parallelism=model.parallelism,
        stages=model.stages,
        memory_limit_mb=(float(case["case"]["mem_mb"]),) * num_stages,
        replicas=tuple(replicas),
    )
    check_plan(plan)
    return plan


def median_iteration_ms(case: Case) -> float:
    """Of the reference's full searches; runs with a part of it switched off are left out."""
    restricted = ("_1f1b", "_noperm", "_notsp")
    times = [run["iteration_ms"] for run in case["runs"] if not any(word in run["variant"] for word in restricted)]
    return statistics.median(times)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_reference_plans_take_here_what_they_took_there(case: Case) -> None:
    model = cost_model_of(case)
    plan = reference_plan(case, model)
    result = simulate(plan, model)
    for ours, given in zip(result.replicas, case["plan"]["replicas"], strict=True):
        ratio = ours.makespan_ms / given["makespan_ms"]
        if case["case"]["model"] == "gpt":
            assert ratio == pytest.approx(1.0, rel=1e-9)
        else:  # the rule of the module's docstring
            assert 0.96 < ratio < 1.0
        assert max(ours.peak_mb) == pytest.approx(given["peak_memory_mb"], rel=0.01)


def objective_of_reference(case: Case, model: CostModel) -> tuple[float, float]:
    """The reference's objective: what it reported, and that of its partition with our table."""
    (run,) = [run for run in case["runs"] if run["variant"] == case["plan"]["variant"]]
    recompute: Recompute = run["recompute_dp"]
    shapes = np.concatenate([reference_shapes(case, replica) for replica in case["plan"]["replicas"]])
    costs = model.micro_batch_costs(shapes, recompute)
    times = (costs.forward_ms + costs.backward_ms).max(axis=1)
    ours = (model.parallelism.pipeline - 1) * times.max() + times.sum() / model.parallelism.data
    return run["objective_ms"], float(ours)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_objective_of_the_reference_partition(case: Case) -> None:
    """The longest micro-batch counts there as the candidate tried, up to 5 ms more than it takes; T5: other table."""
    model = cost_model_of(case)
    reported, ours = objective_of_reference(case, model)
    if case["case"]["model"] == "gpt":
        slack = (model.parallelism.pipeline - 1) * THINNING_MS
        assert reported - slack < ours <= reported * (1 + 1e-6)  # reported in single precision
    else:
        assert 0.9 * reported < ours < reported - 1.0


@pytest.mark.parametrize("case", GPT_CASES, indirect=True)
def test_our_partition_is_at_least_as_good(case: Case) -> None:
    """Same order, same memory, same recomputation: every candidate is tried here, every 5 ms there."""
    model = cost_model_of(case)
    config = PlannerConfig(memory_limit_mb=float(case["case"]["mem_mb"]))
    (run,) = [run for run in case["runs"] if run["variant"] == case["plan"]["variant"]]
    padded = PaddedLengths.of(samples_of(case), encoder_decoder=False, config=config)
    order = order_samples(padded.encoder_len, padded.decoder_len, config)
    made = [partition(padded, order, model, config, run["recompute_dp"], number) for number in (1, 4)]
    best = min(found.objective_ms for found in made if found is not None)
    assert best <= objective_of_reference(case, model)[1] * (1 + 1e-9)


@pytest.mark.parametrize("count_backward_extra", [False, True])
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_our_plans_are_at_least_as_fast(case: Case, count_backward_extra: bool) -> None:
    limit = float(case["case"]["mem_mb"])
    model = cost_model_of(case, count_backward_extra=count_backward_extra)
    plan = plan_iteration(samples_of(case), model, PlannerConfig(memory_limit_mb=limit))
    result = simulate(plan, model)
    assert result.makespan_ms == plan.estimated_ms
    assert result.iteration_ms <= median_iteration_ms(case)
    assert result.peak_mb <= limit
    if case["case"]["model"] == "t5":
        # On one and the same table.
        same_table = cost_model_of(case)
        assert result.iteration_ms <= simulate(reference_plan(case, same_table), same_table).iteration_ms


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_padding_is_no_worse(case: Case) -> None:
    """Share of real tokens; the reference's is that of its whole batch."""
    plan = plan_iteration(samples_of(case), cost_model_of(case), PlannerConfig(memory_limit_mb=36_000.0))
    (run,) = [run for run in case["runs"] if run["variant"] == case["plan"]["variant"]]
    efficiency = samples_of(case).num_tokens / sum(plan.padded_tokens())
    assert efficiency > run["padding_efficiency"] - 0.03
