"""Random numbers that depend on what they are for, never on what was drawn before.

So a rank that holds a part of a model has the values that the whole model has there, whatever else it holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def seeded_generator(*key: object) -> torch.Generator:
    """A CPU generator that depends on the parts of ``key`` as text. Torch looks at 32 bits of a seed only."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def seeded_normal(shape: Sequence[int], std: float, *key: object) -> torch.Tensor:
    """Normal float32 numbers on the CPU that depend on ``shape``, ``std`` and ``key`` only."""
    return torch.randn(tuple(shape), generator=seeded_generator(*key)).mul_(std)
