"""Models and steps that users have, optimized and eager, on two gloo ranks that are started once."""

from __future__ import annotations

import pytest

from llmsys.comm.launch import launch
from tests.lancet import ranks_odd_models as ranks


@pytest.fixture(scope="module")
def found() -> list[dict[str, str | None]]:
    return launch(ranks.run_checks, ranks.NUM_RANKS, tuple(ranks.CHECKS), timeout_s=280.0)


@pytest.mark.parametrize("name", ranks.CHECKS)
def test_on_two_ranks(name: str, found: list[dict[str, str | None]]) -> None:
    failures = [f"rank {rank}: {of_rank[name]}" for rank, of_rank in enumerate(found) if of_rank[name] is not None]
    assert not failures, "\n".join(failures)
