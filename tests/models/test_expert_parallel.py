"""Experts spread over ranks compute what one process computes."""

from __future__ import annotations

from typing import Any

import pytest

from llmsys.comm.launch import launch
from tests.models import ranks_moe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 4])
def checks(request: pytest.FixtureRequest) -> list[Any]:
    return launch(ranks_moe.run_checks, request.param, timeout_s=240.0)


def test_outputs_and_gradients_equal_those_of_one_process(checks: list[Any]) -> None:
    """Among the gradients are those of experts, which are off by the number of ranks if a sum is taken for a mean."""
    for errors, _, _ in checks:
        assert len(errors) == 9
        assert {name: error for name, error in errors.items() if error > 1e-11} == {}


def test_compiled_is_equal_to_eager(checks: list[Any]) -> None:
    assert all(equal for _, _, equal in checks)


def test_ranks_of_different_capacity_are_refused_on_all_ranks(checks: list[Any]) -> None:
    for _, (agreed, message), _ in checks:
        assert agreed == 6
        assert "rank 0 has 6 for 64 tokens" in message
        assert f"rank {len(checks) - 1} has 4 for 40 tokens" in message
