"""Default costs of a step with two expert-parallel groups and other collectives, on four gloo ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmsys.comm.launch import launch
from tests.lancet import ranks_groups as ranks


@pytest.mark.slow
def test_every_collective_is_measured_on_its_own_group(tmp_path: Path) -> None:
    found = launch(ranks.plan_and_run, ranks.NUM_RANKS, timeout_s=280.0, env={"XDG_CACHE_HOME": str(tmp_path)})
    lanes = found[0]["lanes"]
    forward = ["all_to_all", "all_to_all", "collective", "collective", "collective"]
    assert [kind for kind, _ in lanes[:5]] == forward and [kind for kind, _ in lanes[5:]] == ["all_to_all"] * 2
    names = [lane for _, lane in lanes]
    assert names == ["group0", "group1", "group2", "group0", "group0", "group1", "group0"]
    assert found[0]["links"] == {"group0": 2, "group1": ranks.NUM_RANKS}
    for of_rank in found:
        assert of_rank["ms"] == found[0]["ms"]
        assert of_rank["lanes"] == lanes
        assert of_rank["apart"] < 1e-5
    assert all(lane_ms > 0 and start_ms > 0 for lane_ms, (start_ms, _) in found[0]["ms"])
