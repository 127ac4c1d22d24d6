"""Plans of two small steps, kept as text: a change of any planner's decisions shows as a diff.

After a change on purpose, ``LLMSYS_WRITE_GOLDEN=1 pytest tests/lancet/test_golden.py`` writes them anew.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from llmsys.lancet.baselines import AsCaptured, CapacityPipelining, RaiseSink
from llmsys.lancet.config import PlannerConfig
from llmsys.lancet.costs import CostModel, TableCosts
from llmsys.lancet.graph import Graph
from llmsys.lancet.plan import from_text, to_text
from llmsys.lancet.planner import Lancet, Planner
from tests.lancet.mini_moe import mini_step
from tests.lancet.steps import moe_backward

GOLDEN = Path(__file__).parents[1] / "golden"
PLANNERS: dict[str, Planner] = {
    "as_captured": AsCaptured(),
    "raise_sink": RaiseSink(),
    "capacity_pipelining": CapacityPipelining(),
    "lancet": Lancet(),
}
QUICK = PlannerConfig(axis_solver="propagate")


def mini() -> tuple[Graph, CostModel]:
    """Two layers forward, and the experts of the last backward; all-to-alls take four times an op."""
    graph = mini_step(2, has_backward=True)
    times = {op.name: 4.0 if op.is_comm else 1.0 for op in graph.ops}
    return graph, TableCosts(ops_ms=times, part_overhead_ms=0.0625)


STEPS = {"moe_backward": moe_backward, "mini": mini}


@pytest.mark.native
@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("step", STEPS)
def test_plan_is_the_golden_one(step: str, planner: str) -> None:
    graph, costs = STEPS[step]()
    plan = PLANNERS[planner].make(graph, costs, QUICK)
    file = GOLDEN / f"lancet_{planner}_{step}.txt"
    if os.environ.get("LLMSYS_WRITE_GOLDEN"):
        file.write_text(to_text(plan, graph), encoding="utf-8")
    kept = from_text(file.read_text(encoding="utf-8"))
    assert to_text(replace(plan, estimate=kept.estimate), graph) == file.read_text(encoding="utf-8")
    # Sums of times may differ in the last digits between versions of Python; decisions may not.
    for name in ("step_ms", "compute_ms", "comm_ms", "exposed_comm_ms", "peak_mb", "captured_peak_mb"):
        assert getattr(plan.estimate, name) == pytest.approx(getattr(kept.estimate, name), rel=1e-9), name
