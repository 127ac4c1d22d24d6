"""What the ranks of test_agreement.py run."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import pytest
import torch.distributed as dist

from llmsys.core.errors import DeadlineError, InputError, LlmsysError, PlanError
from llmsys.lancet.passes.agreement import Deadlines, agree

NUM_RANKS = 3
LIMITS = Deadlines(compare_s=60.0, plan_s=60.0)
Check = Callable[[int], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def run_checks() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name, function in CHECKS.items():
        try:
            function(dist.get_rank())
            found[name] = None
        except BaseException:
            found[name] = traceback.format_exc()
        dist.barrier()
    return found


def refuses(kind: type[LlmsysError], lines: list[str], *, make: Callable[[], str] = str, **options: object) -> str:
    """The text of the error, which is the same on all ranks."""
    with pytest.raises(kind) as caught:
        agree(lines, make, **({"deadlines": LIMITS} | options))  # type: ignore[arg-type]
    texts: list[str] = [""] * NUM_RANKS
    dist.all_gather_object(texts, str(caught.value))
    assert len(set(texts)) == 1, texts
    return texts[0]


@check
def the_first_rank_decides(rank: int) -> None:
    calls = []

    def make() -> str:
        calls.append(rank)
        return f"plan of {rank}\n" * 1000

    for _ in range(2):
        assert agree(["a", "b"], make, deadlines=LIMITS) == "plan of 0\n" * 1000
    assert calls == ([0, 0] if rank == 0 else [])
    assert agree(["a"], lambda: "", deadlines=LIMITS) == ""


@check
def large_texts_pass(rank: int) -> None:
    text = str(list(range(1_500_000)))
    assert agree([text], lambda: text, deadlines=LIMITS) == text


@check
def graphs_that_differ_are_refused_everywhere(rank: int) -> None:
    text = refuses(InputError, ["same", "same", f"op of {0 if rank == 0 else 1}", "x"])
    assert "ranks 0 and 1 differ, first in line 3" in text
    assert "rank 0 has: op of 0" in text
    assert "rank 1 has: op of 1" in text
    assert "ranks 0 and 2 differ, first in line 2" in refuses(InputError, ["a", "b"] if rank == 2 else ["a"])


@check
def what_one_rank_refuses_all_refuse(rank: int) -> None:
    for culprit in range(NUM_RANKS):
        own = InputError("bad graph", expected="good", found="bad", fix="mend") if rank == culprit else None
        with pytest.raises(InputError, match="bad graph"):
            agree([], str, error=own, deadlines=LIMITS)


@check
def a_planner_that_fails_fails_everywhere(rank: int) -> None:
    def make() -> str:
        raise PlanError("no plan", expected="one", found="none", fix="plan")

    with pytest.raises(LlmsysError, match="no plan") as caught:
        agree(["a"], make, deadlines=LIMITS)
    assert isinstance(caught.value, PlanError) == (rank == 0)


@check
def groups_agree_by_themselves(rank: int) -> None:
    pair = dist.new_group([1, 2])
    if rank:
        assert agree(["pair"], lambda: str(rank), group=pair, deadlines=LIMITS) == "1"


@check
def a_rank_that_does_not_come_is_named(rank: int) -> None:
    pair = dist.new_group([0, 2])
    limits = Deadlines(compare_s=1.0, plan_s=1.0)
    if rank == 0:
        with pytest.raises(DeadlineError, match="rank 2 did not send their graphs"):
            agree(["a"], str, group=pair, deadlines=limits)


@check
def a_first_rank_that_does_not_come_is_named(rank: int) -> None:
    pair = dist.new_group([0, 1])
    if rank == 1:
        with pytest.raises(DeadlineError, match="rank 0 did not send its comparison"):
            agree(["a"], str, group=pair, deadlines=Deadlines(compare_s=1.0, plan_s=1.0))
