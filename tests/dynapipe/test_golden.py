"""Plans of small toy batches, kept as text: a change of any planner's decisions shows as a diff.

After a change on purpose, ``LLMSYS_WRITE_GOLDEN=1 pytest tests/dynapipe/test_golden.py`` writes them anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from llmsys.core.specs import Architecture
from llmsys.dynapipe.baselines import FixedSize, Packing, TokenBased
from llmsys.dynapipe.config import PlannerConfig
from llmsys.dynapipe.plan import from_text, to_text
from llmsys.dynapipe.planner import DynaPipe, Planner, make_plan
from tests.dynapipe.synthetic import toy_cost_model, toy_samples

GOLDEN = Path(__file__).parents[1] / "golden"
PLANNERS: dict[str, Planner] = {
    "dynapipe": DynaPipe(),
    "packing": Packing(max_len=384),
    "fixed_size": FixedSize(micro_batch_size=4),
    "token_based": TokenBased(tokens_per_micro_batch=1024),
}


@pytest.mark.parametrize("name", PLANNERS)
def test_plan_is_the_golden_one(architecture: Architecture, name: str) -> None:
    model = toy_cost_model(architecture, data=2, pipeline=2)
    samples = toy_samples(np.random.default_rng(7), architecture, 24, max_len=300)
    config = PlannerConfig(memory_limit_mb=6000.0, max_moves=20)
    text = to_text(make_plan(PLANNERS[name], samples, model, config))
    file = GOLDEN / f"{name}_{architecture}.txt"
    if os.environ.get("LLMSYS_WRITE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    kept = file.read_text(encoding="utf-8")
    # Times and memory may differ in the last digits between compilers; decisions may not.
    assert _without_estimates(text) == _without_estimates(kept)
    for mine, theirs in zip(from_text(text).replicas, from_text(kept).replicas, strict=True):
        assert mine.estimate.makespan_ms == pytest.approx(theirs.estimate.makespan_ms, rel=1e-9)
        assert mine.estimate.peak_mb == pytest.approx(theirs.estimate.peak_mb, rel=1e-9)


def _without_estimates(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("estimate")]
