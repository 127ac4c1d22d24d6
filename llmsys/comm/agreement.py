"""The first phase of an exchange: ranks tell each other what they are about to do, and refuse together if they differ.

A size that gloo does not expect ends the process when it is too large and leaves garbage when it is too small. So
before rows move, every rank sends each peer one small message: a text of all that must be equal, and its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from llmsys.comm.messenger import Messenger, Operation, Turn
from llmsys.comm.row_parts import IntArray
from llmsys.core.errors import InputError

_TEXT_BYTES = 256
_INLINE_NUMBERS = 32  # more follow in a second message
_REFUSED = "refused: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What all ranks of an operation must have in common."""

    kind: str
    name: str
    dtype: torch.dtype
    row_shape: tuple[int, ...]
    num_buckets: int = 1
    num_chunks: int = 1
    capacity: int | None = None
    num_rows: int | None = None

    def text(self) -> str:
        parts = [f"{self.kind} {self.name[:64]!r}", f"rows of {str(self.dtype).removeprefix('torch.')}{self.row_shape}"]
        if self.num_rows is not None:
            parts.append(f"{self.num_rows} to each rank")
        if self.num_buckets > 1:
            parts.append(f"{self.num_buckets} buckets a rank")
        if self.num_chunks > 1:
            parts.append(f"{self.num_chunks} chunks")
        if self.capacity is not None:
            parts.append(f"capacity {self.capacity}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parties:
    """Who meets in one phase of an operation: ``members`` are ranks of the messenger's group, this one among them."""

    messenger: Messenger
    operation: Operation
    turn: Turn
    members: tuple[int, ...]
    device: torch.device


def agree(parties: Parties, phase: int, terms: Terms, numbers: Sequence[IntArray]) -> list[IntArray]:
    """Exchange terms and ``numbers[i]`` (equally long) with each member; what each member sent, in that order.

    Blocks, and uses the tags ``phase`` and ``phase + 1``. Raises InputError naming both sides on every member if one
    has other terms, or has refused its input; then no message is left under way.
    """
    messenger = parties.messenger
    received = _exchange(parties, phase, terms.text(), numbers)
    differing, refused = [], []
    for member, (text, _) in zip(parties.members, received, strict=True):
        if text.startswith(_REFUSED):
            refused.append(f"{messenger.ranks_text([member])} {text}")
        elif text != _shortened(terms.text()):
            differing.append(f"{messenger.ranks_text([member])} has {text}")
    if refused:
        raise InputError(
            f"{parties.operation.what}: a peer refused its input",
            expected="usable input on every rank",
            found="; ".join(refused),
            fix="see the error on that rank; no rows were moved",
        )
    if differing:
        raise InputError(
            f"{parties.operation.what}: the ranks disagree",
            expected=f"all as on {messenger.ranks_text([messenger.rank])}, which has {terms.text()}",
            found="; ".join(differing),
            fix="make all ranks call the same operations in the same order with equal dtype and trailing shape",
        )
    length = len(numbers[0])
    if length <= _INLINE_NUMBERS:
        return [found[:length] for _, found in received]
    packed = np.stack(numbers).view(np.uint8)
    return list(_swap(parties, phase + 1, packed, "sizes").view(np.int64))


def refuse(parties: Parties, phase: int, reason: str) -> None:
    """Take this rank's part in `agree` only to tell the others that it will not go on. Blocks."""
    _exchange(parties, phase, _REFUSED + reason, [np.zeros(0, dtype=np.int64)] * len(parties.members))


def _shortened(text: str) -> str:
    return text.encode()[:_TEXT_BYTES].decode(errors="ignore")


def _exchange(parties: Parties, phase: int, text: str, numbers: Sequence[IntArray]) -> list[tuple[str, IntArray]]:
    packed = np.zeros((len(parties.members), _TEXT_BYTES + 8 * _INLINE_NUMBERS), dtype=np.uint8)
    encoded = np.frombuffer(_shortened(text).encode(), dtype=np.uint8)
    packed[:, : len(encoded)] = encoded
    inline = packed[:, _TEXT_BYTES:].view(np.int64)
    for row, values in zip(inline, numbers, strict=True):
        row[: min(len(values), _INLINE_NUMBERS)] = values[:_INLINE_NUMBERS]
    received = _swap(parties, phase, packed, "word")
    texts = [bytes(row[:_TEXT_BYTES]).rstrip(b"\0").decode() for row in received]
    return list(zip(texts, received[:, _TEXT_BYTES:].view(np.int64), strict=True))


def _swap(parties: Parties, phase: int, packed: NDArray[np.uint8], what: str) -> NDArray[np.uint8]:
    """Send row i of ``packed`` to member i and receive as much; this rank's own row is copied."""
    messenger = parties.messenger
    outgoing = torch.from_numpy(packed).to(parties.device)
    incoming = outgoing.clone()
    others = [(index, member) for index, member in enumerate(parties.members) if member != messenger.rank]
    posted = messenger.post(
        parties.operation,
        parties.turn.tag(phase),
        receives=[(member, incoming[index]) for index, member in others],
        sends=[(member, outgoing[index]) for index, member in others],
    )
    messenger.wait(parties.operation, what, posted)
    received: NDArray[np.uint8] = incoming.cpu().numpy()
    return received
