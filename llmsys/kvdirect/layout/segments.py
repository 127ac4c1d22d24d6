"""Which bytes move between two caches that lie differently in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmsys.core.errors import InputError
from llmsys.kvdirect.layout.cache import Dim, KvLayout

IntArray = NDArray[np.int64]
BlockIds = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Segments:
    """Byte ranges to copy, read-only int64 arrays of equal length; offsets are relative to the layer's tensor.

    Ordered by layer, then by destination offset; no two overlap at the destination. Every layer has the same ranges.
    """

    layer: IntArray
    source_offset_bytes: IntArray
    destination_offset_bytes: IntArray
    length_bytes: IntArray

    def __len__(self) -> int:
        return len(self.layer)

    @property
    def total_bytes(self) -> int:
        return int(self.length_bytes.sum())


def transfer_segments(
    source: KvLayout,
    destination: KvLayout,
    source_blocks: BlockIds,
    destination_blocks: BlockIds,
    num_tokens: int,
    *,
    first_token: int = 0,
) -> Segments:
    """The bytes to copy for tokens [first_token, num_tokens) of one sequence, of the heads that both ranks hold.

    Token t lies in entry t // block_tokens of its side's block table, also where ``first_token`` is above 0 because
    the destination has a prefix already. Table entries of blocks in which no token moves are not looked at, so the
    unknown blocks of a prefix may be -1; entries after the last token are ignored. A source block may occur twice.
    Ranges are as few as possible: two that are adjacent on both sides are one, also across heads, blocks and K and V.
    Empty when no token moves or the ranks have no head in common.

    Raises InputError when the layouts are not of one model, a table is too short, an id is out of range, or a
    destination block that is written occurs elsewhere in its table as well.
    """
    ranges = layer_ranges(source, destination, source_blocks, destination_blocks, num_tokens, first_token)
    return tiled_over_layers(*ranges, num_layers=source.num_layers)


def tiled_over_layers(source: IntArray, destination: IntArray, length: IntArray, *, num_layers: int) -> Segments:
    layer = np.repeat(np.arange(num_layers, dtype=np.int64), len(length))
    arrays = [layer, *(np.tile(array, num_layers) for array in (source, destination, length))]
    for array in arrays:
        array.setflags(write=False)
    return Segments(
        layer=arrays[0], source_offset_bytes=arrays[1], destination_offset_bytes=arrays[2], length_bytes=arrays[3]
    )


def layer_ranges(
    source: KvLayout,
    destination: KvLayout,
    source_blocks: BlockIds,
    destination_blocks: BlockIds,
    num_tokens: int,
    first_token: int,
) -> tuple[IntArray, IntArray, IntArray]:
    """(source offset, destination offset, length) of ``transfer_segments`` for one layer."""
    _require_same_model(source, destination)
    if not 0 <= first_token <= num_tokens:
        raise InputError(
            "the tokens to move are not a range",
            expected="0 <= first_token <= num_tokens",
            found=f"first_token = {first_token}, num_tokens = {num_tokens}",
            fix="set first_token to the length of the prefix that the destination has",
        )
    from_table = _checked_table("source_blocks", source, source_blocks, first_token, num_tokens)
    to_table = _checked_table("destination_blocks", destination, destination_blocks, first_token, num_tokens)
    heads = source.heads.common(destination.heads)
    if first_token == num_tokens or not heads:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, empty
    _require_written_once(to_table, first_token // destination.block_tokens)
    run_bytes, tokens_in_run, walked = _contiguous_run(source, destination, len(heads))
    cuts = _cuts((source.block_tokens, destination.block_tokens), first_token, num_tokens, whole=tokens_in_run)
    return _merged(
        _offsets(source, from_table, cuts[:-1], heads.begin, walked),
        _offsets(destination, to_table, cuts[:-1], heads.begin, walked),
        np.repeat(np.diff(cuts) * run_bytes, math.prod(walked.values())),
    )


def _contiguous_run(source: KvLayout, destination: KvLayout, num_heads: int) -> tuple[int, bool, dict[Dim, int]]:
    """What moves at a time: the longest run that is contiguous on both sides wherever the blocks lie.

    Its bytes for one token, whether it goes on over the tokens of a block, and the sizes of the dimensions outside it.
    """
    ours, theirs = source.strides_bytes, destination.strides_bytes
    walked: dict[Dim, int] = {"kv": 2, "head": num_heads, "dim": source.head_dim}
    run_bytes = source.itemsize
    while not ours["token"] == theirs["token"] == run_bytes:
        inner = [dim for dim in walked if ours[dim] == theirs[dim] == run_bytes]
        if not inner:
            return run_bytes, False, walked
        run_bytes *= walked.pop(inner[0])
    return run_bytes, True, walked


def _cuts(block_tokens: Iterable[int], first_token: int, num_tokens: int, *, whole: bool) -> IntArray:
    """Token positions at which a new run begins, and the end: where a block of either side begins, or everywhere."""
    if not whole:
        return np.arange(first_token, num_tokens + 1, dtype=np.int64)
    starts = [np.arange(-(-first_token // size) * size, num_tokens, size) for size in block_tokens]
    return np.unique(np.concatenate([[first_token, num_tokens], *starts])).astype(np.int64)


def _offsets(layout: KvLayout, table: IntArray, tokens: IntArray, head: int, walked: dict[Dim, int]) -> IntArray:
    """Where the runs that begin at ``tokens`` lie: for each, one offset for each index of the ``walked`` dimensions."""
    strides = layout.strides_bytes
    offsets = table[tokens // layout.block_tokens] * strides["block"] + tokens % layout.block_tokens * strides["token"]
    offsets += (head - layout.heads.begin) * strides["head"]
    for dim, size in walked.items():
        offsets = np.add.outer(offsets, np.arange(size) * strides[dim])
    return offsets.ravel()


def _merged(source: IntArray, destination: IntArray, length: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Sorted by destination, with ranges that are adjacent on both sides joined."""
    if (np.diff(destination) < 0).any():
        order = np.argsort(destination, kind="stable")
        source, destination, length = source[order], destination[order], length[order]
    split = (source[1:] != source[:-1] + length[:-1]) | (destination[1:] != destination[:-1] + length[:-1])
    starts = np.concatenate([[0], np.flatnonzero(split) + 1])
    return source[starts], destination[starts], np.add.reduceat(length, starts)


def _checked_table(name: str, layout: KvLayout, blocks: BlockIds, first_token: int, num_tokens: int) -> IntArray:
    """The entries up to the last token's; those of blocks that move are in range."""
    table = np.asarray(blocks)
    if table.ndim != 1 or (table.size and table.dtype.kind not in "iu"):
        raise InputError(
            f"{name} is not a block table",
            expected="a one-dimensional list of whole numbers",
            found=f"shape {table.shape} of {table.dtype}",
            fix=f"pass the ids of one sequence's blocks as {name}",
        )
    needed = -(-num_tokens // layout.block_tokens)
    if len(table) < needed:
        raise InputError(
            f"{name} has too few blocks",
            expected=f"at least {needed} blocks for {num_tokens} tokens in blocks of {layout.block_tokens}",
            found=f"{len(table)} blocks",
            fix=f"add blocks to {name}, or lower num_tokens",
        )
    table = table[:needed].astype(np.int64)
    begin = first_token // layout.block_tokens if first_token < num_tokens else needed
    bad = np.flatnonzero((table[begin:] < 0) | (table[begin:] >= layout.num_blocks)) + begin
    if bad.size:
        raise InputError(
            f"{name} has block ids out of range",
            expected=f"ids in [0, {layout.num_blocks})",
            found=f"{bad.size} others, the first is {table[bad[0]]} at index {bad[0]}",
            fix=f"correct {name}, or set num_blocks to what the cache has",
        )
    return table


def _require_written_once(table: IntArray, first_written: int) -> None:
    ids, counts = np.unique(table, return_counts=True)
    twice = np.intersect1d(ids[counts > 1], table[first_written:])
    if twice.size:
        raise InputError(
            "destination_blocks would be overwritten",
            expected="every block that is written once in the table",
            found=f"block {twice[0]} at indices {np.flatnonzero(table == twice[0]).tolist()}",
            fix="reserve a block of its own for every entry of destination_blocks",
        )


def _require_same_model(source: KvLayout, destination: KvLayout) -> None:
    for name in ("num_layers", "num_kv_heads", "head_dim", "itemsize"):
        ours, theirs = getattr(source, name), getattr(destination, name)
        if ours != theirs:
            raise InputError(
                "the two caches are not of one model",
                expected=f"equal {name}",
                found=f"{ours} at the source, {theirs} at the destination",
                fix=f"run both workers with the same model and cache data type, so that {name} is equal",
            )
