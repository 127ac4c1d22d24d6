"""The backend on two gloo ranks, started once, and in one process."""

from __future__ import annotations

import pytest

from llmsys.comm.launch import launch
from tests.lancet import ranks_backend as ranks


@pytest.fixture(scope="module")
def found() -> list[dict[str, str | None]]:
    return launch(ranks.run_checks, ranks.NUM_RANKS, tuple(ranks.CHECKS), timeout_s=280.0)


@pytest.mark.parametrize("name", ranks.CHECKS)
def test_on_two_ranks(name: str, found: list[dict[str, str | None]]) -> None:
    failures = [f"rank {rank}: {of_rank[name]}" for rank, of_rank in enumerate(found) if of_rank[name] is not None]
    assert not failures, "\n".join(failures)
