"""English text to train small models on, as bytes: the reference topics that Python ships for its ``help``.

Nothing is downloaded. The text is about 700 kB, and differs a little between versions of Python.
"""

from __future__ import annotations

from functools import cache

import torch

from llmsys.core.errors import DataNotFoundError, InputError
from llmsys.models.seeds import seeded_generator

VOCAB_SIZE = 256


@cache
def english_bytes() -> torch.Tensor:
    """All of the text as one uint8 tensor, not to be written to. Raises DataNotFoundError."""
    try:
        from pydoc_data.topics import topics
    except ImportError as missing:
        raise DataNotFoundError(
            "this Python has no reference topics",
            expected="the module pydoc_data.topics of Python's standard library",
            found=str(missing),
            fix="install all of the standard library",
        ) from missing
    text = "\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def text_batch(
    step: int, *, batch_size: int, seq_len: int, rank: int = 0, num_ranks: int = 1, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, targets) of a step, both int64 (batch_size, seq_len) on the CPU; targets are the next bytes.

    Passages begin at random places that depend on ``seed``, ``step`` and their number among the ``num_ranks`` *
    ``batch_size`` passages of the step only. So the batches of all ranks, one after another, are the batch of one rank
    with ``batch_size`` times as many.
    """
    text = english_bytes()
    if not (0 <= rank < num_ranks and batch_size > 0 and 0 < seq_len < len(text)):
        raise InputError(
            "no such batch of text",
            expected=f"rank below num_ranks, batch_size of at least 1, seq_len from 1 to {len(text) - 1}",
            found=f"rank={rank}, num_ranks={num_ranks}, batch_size={batch_size}, seq_len={seq_len}",
            fix="set these to a batch that the text can give",
        )
    generator = seeded_generator("text", seed, step)
    starts = torch.randint(0, len(text) - seq_len, (num_ranks * batch_size,), generator=generator)
    mine = starts[rank * batch_size : (rank + 1) * batch_size]
    passages = text[mine[:, None] + torch.arange(seq_len + 1)].long()
    return passages[:, :-1], passages[:, 1:]
