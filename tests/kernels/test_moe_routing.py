"""Gates against plain Python, and the capacity passing that lets a gate run in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from llmsys.core.errors import InputError
from llmsys.kernels.moe import GATES, TOKEN_MAJOR_GATES, moe_route

Routes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def route_by_loops(scores: torch.Tensor, used: torch.Tensor, gate: str, top_k: int, capacity: int) -> Routes:
    """The definition of each gate, one decision at a time."""
    table, taken = scores.tolist(), used.tolist()
    num_tokens, num_experts = scores.shape
    best = [sorted(range(num_experts), key=lambda e: (-row[e], e))[:top_k] for row in table]
    slots: dict[tuple[int, int], int] = {}

    def take(expert: int) -> int:
        if taken[expert] >= capacity:
            return -1
        taken[expert] += 1
        return taken[expert] - 1

    if gate == "expert_choice":
        best = [list(range(num_experts)) for _ in range(num_tokens)]
        for expert in range(num_experts):
            for token in sorted(range(num_tokens), key=lambda t: (-table[t][expert], t)):
                slots[token, expert] = take(expert)
    elif gate == "batch_prioritized":
        for k in range(top_k):
            for token in sorted(range(num_tokens), key=lambda t: (-max(table[t]), t)):
                slots[token, k] = take(best[token][k])
    else:
        for token in range(num_tokens):
            for k in range(top_k):
                slots[token, k] = take(best[token][k])
    width = num_experts if gate == "expert_choice" else top_k
    by_token = [[slots[token, k] for k in range(width)] for token in range(num_tokens)]
    shape = (num_tokens, width)
    whole = [torch.tensor(rows, dtype=torch.int64).reshape(shape) for rows in (best, by_token)]
    return whole[0], whole[1], torch.tensor(taken)


def assert_same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.int64 and torch.equal(ours, theirs)


def random_case(seed: int, gate: str) -> tuple[torch.Tensor, torch.Tensor, str, int, int]:
    """Scores with many ties, some slots used already, a capacity between tight and loose."""
    rng = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=rng))

    num_tokens, num_experts = draw(0, 40), draw(1, 9)
    top_k = 1 if gate == "switch" else draw(1, num_experts + 1)
    capacity = draw(1, 2 + 2 * num_tokens * top_k // num_experts)
    scores = torch.randn(num_tokens, num_experts, generator=rng).mul(2).round()
    scores += torch.randn(num_experts, generator=rng)  # some experts are liked better
    used = torch.randint(0, capacity + 1, (num_experts,), generator=rng) * (seed % 2)
    return scores, used, gate, top_k, capacity


@pytest.mark.parametrize("gate", GATES)
def test_gates_follow_their_definitions(gate: str) -> None:
    dropped = 0
    for seed in range(60):
        case = random_case(seed, gate)
        found = moe_route(*case)
        assert_same(found, route_by_loops(*case))
        dropped += int((found[1] < 0).sum())
    assert dropped > 100


@pytest.mark.parametrize("gate", GATES)
def test_every_slot_is_given_once_and_without_holes(gate: str) -> None:
    for seed in range(20):
        scores, used, _, top_k, capacity = random_case(seed, gate)
        experts, slots, after = moe_route(scores, used, gate, top_k, capacity)
        for expert in range(scores.shape[1]):
            given = slots[(experts == expert) & (slots >= 0)].sort().values
            assert torch.equal(given, torch.arange(int(used[expert]), int(after[expert])))


def in_slices(case: tuple[torch.Tensor, torch.Tensor, str, int, int], cuts: Sequence[int], *, passing: bool) -> Routes:
    scores, used, gate, top_k, capacity = case
    parts = []
    state = used
    for part in scores.tensor_split(cuts):
        *choices, after = moe_route(part, state, gate, top_k, capacity)
        parts.append(choices)
        state = after if passing else used
    experts, slots = (torch.cat(column) for column in zip(*parts, strict=True))
    return experts, slots, state


@pytest.mark.parametrize("gate", TOKEN_MAJOR_GATES)
def test_slices_with_capacity_passing_equal_the_whole(gate: str) -> None:
    """Section 4 of Lancet: passing the used capacity keeps the map of tokens to experts, and the drops."""
    changed = []
    for seed in range(100):
        case = random_case(seed, gate)
        cuts = sorted(torch.randint(0, 41, (seed % 5,), generator=torch.Generator().manual_seed(seed)).tolist())
        whole = moe_route(*case)
        assert_same(in_slices(case, cuts, passing=True), whole)
        apart = in_slices(case, cuts, passing=False)
        changed.append(int(((apart[1] < 0) != (whole[1] < 0)).sum()))
    assert sum(count > 0 for count in changed) > 20, "without passing, drops change"


def test_a_gate_of_the_whole_batch_cannot_be_cut() -> None:
    changed = 0
    for seed in range(20):
        case = random_case(seed, "batch_prioritized")
        changed += not torch.equal(in_slices(case, [10], passing=True)[1], moe_route(*case)[1])
    assert changed > 5


def test_priority_is_what_decides_who_is_dropped() -> None:
    scores = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3]])
    used = torch.zeros(2, dtype=torch.int64)
    assert moe_route(scores, used, "switch", 1, 2)[1].tolist() == [[0], [1], [-1]]
    assert moe_route(scores, used, "batch_prioritized", 1, 2)[1].tolist() == [[-1], [0], [1]]
    # Two rounds: every first choice comes before any second one.
    assert moe_route(scores.flip(1), used, "batch_prioritized", 2, 2)[1].tolist() == [[-1, -1], [0, 0], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_other_types(dtype: torch.dtype) -> None:
    case = random_case(3, "top_k")
    scores = case[0].to(dtype)
    assert_same(moe_route(scores, *case[1:]), route_by_loops(scores, *case[1:]))


def test_scores_that_are_no_numbers_still_give_valid_routes() -> None:
    scores = torch.full((4, 3), -torch.inf)
    scores[1], scores[2, 1] = torch.nan, torch.inf
    experts, slots, after = moe_route(scores, torch.zeros(3, dtype=torch.int64), "top_k", 3, 4)
    assert [sorted(row) for row in experts.tolist()] == [[0, 1, 2]] * 4
    assert experts[2, 0] == 1 and (slots >= 0).all() and after.tolist() == [4, 4, 4]


SCORES = torch.rand(4, 3)
USED = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moe_route(SCORES, USED, "hash", 1, 2), "'hash'"),
        (lambda: moe_route(SCORES, USED, "switch", 2, 2), "top_k from 1 to 1"),
        (lambda: moe_route(SCORES, USED, "top_k", 4, 2), "top_k=4"),
        (lambda: moe_route(SCORES, USED, "top_k", 0, 2), "top_k=0"),
        (lambda: moe_route(SCORES, USED, "top_k", 1, 0), "capacity=0"),
        (lambda: moe_route(SCORES[0], USED, "top_k", 1, 2), r"\(tokens, experts\)"),
        (lambda: moe_route(USED[None], USED, "top_k", 1, 2), "torch.int64 of shape"),
        (lambda: moe_route(SCORES, USED[:2], "top_k", 1, 2), r"shape \(3,\)"),
        (lambda: moe_route(SCORES, USED.int(), "top_k", 1, 2), "torch.int32"),
        (lambda: moe_route(SCORES, USED - 1, "top_k", 1, 2), "from -1 to -1"),
        (lambda: moe_route(SCORES, USED + 3, "top_k", 1, 2), "the capacity 2"),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
