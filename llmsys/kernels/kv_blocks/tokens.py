"""Which slot of a source cache goes to which slot of a destination cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from llmsys.core.errors import InputError
from llmsys.kernels.kv_blocks.checks import BlockIds, host_ids, require_cache, require_in_range, require_unique

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenMap:
    """Where each moved token lies: a slot is block * block_tokens + token in the block; int64 tensors of equal length.

    Made by ``map_tokens`` for one pair of caches, and good for all layers of it. ``*_blocks`` and ``*_block_tokens``
    are those of the caches.
    """

    source_slots: torch.Tensor
    destination_slots: torch.Tensor
    source_blocks: int
    source_block_tokens: int
    destination_blocks: int
    destination_block_tokens: int

    def __len__(self) -> int:
        return len(self.source_slots)


def map_tokens(
    source: torch.Tensor,
    destination: torch.Tensor,
    source_blocks: Sequence[BlockIds],
    destination_blocks: Sequence[BlockIds],
    num_tokens: Sequence[int],
    *,
    source_first_tokens: Sequence[int] | None = None,
    destination_first_tokens: Sequence[int] | None = None,
) -> TokenMap:
    """The map for a batch of sequences: one block table a side and one number of tokens to move for each.

    Token i of a sequence's ``num_tokens`` is read at position source_first_token + i of its source table and written
    at position destination_first_token + i of its destination table; both begin at 0 by default. Table entries
    of blocks in which no token moves are not looked at. ``source`` and ``destination`` are caches of any layer. Made
    on the host: tables on a device are copied from it, for which the host waits. Raises InputError for tables that are
    too short, ids out of range, and a destination block that is written occurring twice in the batch.
    """
    require_cache("source", source)
    require_cache("destination", destination)
    zeros = [0] * len(num_tokens)
    ours, _ = _slots("source_blocks", source, source_blocks, source_first_tokens or zeros, num_tokens)
    theirs, written = _slots(
        "destination_blocks", destination, destination_blocks, destination_first_tokens or zeros, num_tokens
    )
    require_unique("destination_blocks", written)
    return TokenMap(
        source_slots=torch.from_numpy(ours).to(source.device),
        destination_slots=torch.from_numpy(theirs).to(destination.device),
        source_blocks=source.shape[1],
        source_block_tokens=source.shape[2],
        destination_blocks=destination.shape[1],
        destination_block_tokens=destination.shape[2],
    )


def _slots(
    name: str, cache: torch.Tensor, tables: Sequence[BlockIds], first_tokens: Sequence[int], num_tokens: Sequence[int]
) -> tuple[IntArray, IntArray]:
    """Slots of all tokens of a batch, and the blocks they lie in, one for each table entry."""
    if not len(tables) == len(first_tokens) == len(num_tokens):
        raise InputError(
            f"{name} and num_tokens are not of one batch",
            expected=f"a table and a first token for each of {len(num_tokens)} sequences",
            found=f"{len(tables)} tables, {len(first_tokens)} first tokens",
            fix="pass lists of equal length",
        )
    size = cache.shape[2]
    slots, used = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for number, (table, first, count) in enumerate(zip(tables, first_tokens, num_tokens, strict=True)):
        ids = host_ids(f"{name}[{number}]", table)
        if first < 0 or count < 0 or -(-(first + count) // size) > len(ids):
            raise InputError(
                f"{name}[{number}] does not hold the tokens",
                expected=f"0 or more tokens, and at most {len(ids) * size} in {len(ids)} blocks of {size}",
                found=f"{count} tokens from token {first} on",
                fix=f"add blocks to {name}[{number}], or correct num_tokens or the first token",
            )
        position = np.arange(first, first + count)
        entries = ids[first // size : -(-(first + count) // size)] if count else ids[:0]
        require_in_range(f"{name}[{number}]", entries, cache.shape[1])
        slots.append(ids[position // size] * size + position % size)
        used.append(entries)
    return np.concatenate(slots), np.concatenate(used)
