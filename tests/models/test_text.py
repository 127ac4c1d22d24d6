"""Batches of text."""

from __future__ import annotations

import sys

import pytest
import torch

from llmsys.core.errors import DataNotFoundError, InputError
from llmsys.models.text import english_bytes, text_batch


def test_the_text_is_english() -> None:
    text = bytes(english_bytes().tolist())
    assert len(text) > 300_000
    assert text.count(b" the ") > 2000 and max(text) < 256


def test_targets_are_the_next_bytes_of_the_text() -> None:
    tokens, targets = text_batch(3, batch_size=4, seq_len=50)
    assert tokens.shape == targets.shape == (4, 50) and tokens.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    text = bytes(english_bytes().tolist())
    for row, last in zip(tokens.tolist(), targets[:, -1:].tolist(), strict=True):
        assert bytes(row + last) in text


def test_batches_of_ranks_make_up_the_whole_one() -> None:
    whole = text_batch(7, batch_size=6, seq_len=9, seed=2)
    parts = [text_batch(7, batch_size=2, seq_len=9, rank=rank, num_ranks=3, seed=2) for rank in range(3)]
    for ours, theirs in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(ours), theirs)


def test_steps_and_seeds_differ_and_repeat() -> None:
    batches = [text_batch(step, batch_size=2, seq_len=9, seed=seed)[0] for step in (0, 1) for seed in (0, 1)]
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 4
    assert torch.equal(text_batch(1, batch_size=2, seq_len=9, seed=1)[0], batches[3])


@pytest.mark.parametrize(
    "wrong", [{"rank": 2}, {"rank": -1}, {"batch_size": 0}, {"seq_len": 0}, {"seq_len": 1 << 40}, {"num_ranks": 0}]
)
def test_batches_that_cannot_be(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        text_batch(0, **({"batch_size": 2, "seq_len": 8, "num_ranks": 2} | wrong))


def test_python_without_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataNotFoundError, match="no reference topics"):
        english_bytes.__wrapped__()
