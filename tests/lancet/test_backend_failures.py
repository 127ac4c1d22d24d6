"""What users of overlap report to fail, on two gloo ranks that are started once; and one process without a group."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import llmsys.lancet.runtime.backend as backend_module
from llmsys.comm.launch import launch
from llmsys.core.errors import InputError
from llmsys.lancet.runtime import optimize
from tests.lancet import ranks_failures as ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    cache: Path = tmp_path_factory.mktemp("cache")
    env = {"XDG_CACHE_HOME": str(cache)}
    return launch(ranks.run_checks, ranks.NUM_RANKS, tuple(ranks.CHECKS), timeout_s=280.0, env=env)


@pytest.mark.parametrize("name", ranks.CHECKS)
def test_on_two_ranks(name: str, found: list[dict[str, str | None]]) -> None:
    failures = [f"rank {rank}: {of_rank[name]}" for rank, of_rank in enumerate(found) if of_rank[name] is not None]
    assert not failures, "\n".join(failures)


def test_without_a_group_code_runs_as_it_is_and_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "_said", set())
    x = torch.ones(4, requires_grad=True)
    with caplog.at_level(logging.WARNING, logger=backend_module.__name__):
        for factor in (2.0, 3.0):
            step = optimize(lambda x, factor=factor: (x * factor).sum())
            step(x).backward()
    assert x.grad is not None and x.grad.eq(5).all()
    mine = [r for r in caplog.records if r.name == backend_module.__name__]
    assert [r.getMessage() for r in mine] == ["lancet: there is no process group, so it runs as it was captured"]
    assert "there is no process group" in step.describe()
    with pytest.raises(InputError, match="there is no plan"):
        _ = step.plan


def test_the_backend_has_a_name() -> None:
    torch._dynamo.reset()
    assert torch.compile(lambda x: x + 1, backend="lancet")(torch.ones(2)).eq(2).all()
