"""The irregular all-to-all of parts, on two and four gloo ranks, and its arithmetic in one process."""

from __future__ import annotations

import pytest
import torch

from llmsys.comm.launch import launch
from llmsys.core.errors import InputError
from llmsys.lancet.runtime import irregular
from tests.lancet import ranks_irregular as ranks


@pytest.fixture(scope="module", params=(2, 4))
def found(request: pytest.FixtureRequest) -> list[dict[str, str | None]]:
    return launch(ranks.run_checks, request.param, timeout_s=240.0)


@pytest.mark.parametrize("name", ranks.CHECKS)
def test_on_ranks(name: str, found: list[dict[str, str | None]]) -> None:
    failures = [f"rank {rank}: {of_rank[name]}" for rank, of_rank in enumerate(found) if of_rank[name] is not None]
    assert not failures, "\n".join(failures)


def dispatched() -> tuple[torch.Tensor, irregular.PartRows]:
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    experts = torch.tensor([[1], [1], [0], [1]])
    slots = torch.tensor([[7], [3], [2], [-1]])
    return irregular.dispatch(x, experts, slots, 3)


def test_rows_of_a_bucket_are_in_the_order_of_their_slots() -> None:
    buffer, rows = dispatched()
    assert buffer.squeeze(2).tolist() == [[3.0, 0.0], [2.0, 1.0], [0.0, 0.0]]
    assert rows.counts.tolist() == [1, 2, 0]
    assert rows.slots.tolist() == [2, 3, 7]
    assert rows.local_slots is not None and rows.local_slots.flatten().tolist() == [1, 0, 0, -1]


def test_joined_rows_are_at_their_slots() -> None:
    buffer, rows = dispatched()
    whole = irregular.join([buffer], [rows], 8, ("g", "e", "c"), shape=(3, 8, 1))
    expected = torch.zeros(3, 8, 1)
    expected[0, 2], expected[1, 3], expected[1, 7] = 3.0, 2.0, 1.0
    assert torch.equal(whole, expected)


def test_unusable_input_is_refused() -> None:
    buffer, rows = dispatched()
    join = irregular.join
    with pytest.raises(InputError, match="experts cannot be used"):
        irregular.dispatch(torch.ones(1, 1), torch.tensor([[5]]), torch.tensor([[0]]), 3)
    with pytest.raises(InputError, match="experts and slots"):
        irregular.dispatch(torch.ones(1, 1), torch.tensor([[0]]), torch.tensor([0]), 3)
    with pytest.raises(InputError, match="capacity cannot be used"):
        join([buffer], [rows], 7, ("g", "e", "c"), shape=(3, 7, 1))
    with pytest.raises(InputError, match="order cannot be used"):
        join([buffer], [rows], 8, ("g", "c", "e"), shape=(3, 8, 1))
    with pytest.raises(InputError, match="shape cannot be used"):
        join([buffer], [rows], 8, ("g", "e", "c"), shape=(4, 8, 1))
    with pytest.raises(InputError, match="parts cannot be used"):
        join([buffer[:, :1]], [rows], 8, ("g", "e", "c"), shape=(3, 8, 1))
    with pytest.raises(InputError, match="rows cannot be used"):
        join([buffer, buffer], [rows], 8, ("g", "e", "c"), shape=(3, 8, 1))
