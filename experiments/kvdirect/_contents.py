"""What stands in the blocks of the fault rounds: every byte tells whose it is.

The contents of a block follow from a key: a hash of the holder's generation, the request, the block, its tag, and the
tensor. So bytes of another request, another block, an earlier life, or a freed block cannot pass for the right ones.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from llmsys.kvdirect.tickets import Ticket

WORD_BYTES = 8
POISON = np.uint64(0xDEAD_DEAD_DEAD_DEAD)
_ODD = np.uint64(0x9E37_79B9_7F4A_7C15)


def block_keys(ticket: Ticket, tensor: int) -> NDArray[np.uint64]:
    """One key for each block of the ticket, for one of its tensors; shape (n,)."""
    start = f"{ticket.holder}/{ticket.generation}/{ticket.request_id}/{tensor}".encode()
    keys = [
        hashlib.blake2b(start + f"/{block}/{tag}".encode(), digest_size=WORD_BYTES).digest()
        for block, tag in zip(ticket.blocks.ids.tolist(), ticket.blocks.tags.tolist(), strict=True)
    ]
    return np.frombuffer(b"".join(keys), dtype=np.uint64)


class BlockMemory:
    """The words of one tensor of blocks.

    words: uint64 array of shape (num_blocks, block_bytes / 8), over memory that transports read and write.
    """

    def __init__(self, words: NDArray[np.uint64]) -> None:
        self._words = words
        self._pattern = np.arange(words.shape[1], dtype=np.uint64) * _ODD

    def fill(self, block_ids: NDArray[np.int64], keys: NDArray[np.uint64]) -> None:
        self._words[block_ids] = self._pattern ^ keys[:, None]

    def poison(self, block_ids: NDArray[np.int64]) -> None:
        self._words[block_ids] = POISON

    def num_wrong(self, block_ids: NDArray[np.int64], keys: NDArray[np.uint64]) -> tuple[int, int]:
        """How many of these blocks have at least one wrong byte, and how many of them are poisoned somewhere."""
        found = self._words[block_ids]
        wrong = (found != self._pattern ^ keys[:, None]).any(axis=1)
        poisoned = (found == POISON).any(axis=1)
        return int(wrong.sum()), int((wrong & poisoned).sum())

    def num_wrong_words(self, block_ids: NDArray[np.int64], keys: NDArray[np.uint64]) -> int:
        """How many of these blocks have a wrong last word: a check that costs next to nothing."""
        return int((self._words[block_ids, -1] != self._pattern[-1] ^ keys).sum())
