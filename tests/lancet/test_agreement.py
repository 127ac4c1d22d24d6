"""The exchange of graphs and plans, on three gloo ranks that are started once."""

from __future__ import annotations

import pytest

from llmsys.comm.launch import launch
from tests.lancet import ranks_agreement as ranks


@pytest.fixture(scope="module")
def found() -> list[dict[str, str | None]]:
    return launch(ranks.run_checks, ranks.NUM_RANKS, timeout_s=240.0)


@pytest.mark.parametrize("name", ranks.CHECKS)
def test_on_three_ranks(name: str, found: list[dict[str, str | None]]) -> None:
    failures = [f"rank {rank}: {of_rank[name]}" for rank, of_rank in enumerate(found) if of_rank[name] is not None]
    assert not failures, "\n".join(failures)
