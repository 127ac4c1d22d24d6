"""Balancing micro-batches over data-parallel replicas: Karmarkar-Karp number partitioning."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Any

from llmsys.core.errors import InputError

_Tree = tuple[Any, ...]


def karmarkar_karp(values: Sequence[float], num_parts: int) -> list[list[int]]:
    """Indices of ``values`` in ``num_parts`` parts of similar sums, each part sorted.

    The largest differencing method: the two most uneven partial solutions are merged, heaviest part with lightest,
    until one is left. With at least ``num_parts`` values no part is empty. InputError for no parts, or a value that
    is negative or not finite.
    """
    if num_parts < 1:
        raise InputError(
            "values need a part to go to", expected="num_parts >= 1", found=str(num_parts), fix="set num_parts"
        )
    bad = next((value for value in values if not 0 <= value < math.inf), None)
    if bad is not None:
        raise InputError(
            "a value cannot be balanced",
            expected="finite values of at least 0",
            found=str(bad),
            fix="take it out of values, or correct it",
        )
    # Entries (-spread, number, parts heaviest first); numbers break ties, so runs are repeatable. A part is its sum and
    # its members as a tree, () or (index,) or (tree, tree), so that merging copies nothing.
    heap: list[tuple[float, int, list[tuple[float, _Tree]]]] = []
    for index, value in enumerate(values):
        empty: list[tuple[float, _Tree]] = [(0.0, ())] * (num_parts - 1)
        heap.append((-value if num_parts > 1 else 0.0, index, [(value, (index,)), *empty]))
    heapq.heapify(heap)
    number = len(heap)
    if not heap:
        return [[] for _ in range(num_parts)]
    while len(heap) > 1:
        _, _, first = heapq.heappop(heap)
        _, _, second = heapq.heappop(heap)
        merged = [
            (a + b, (x, y) if x and y else x or y) for (a, x), (b, y) in zip(first, reversed(second), strict=True)
        ]
        # Empty parts last also beside parts of sum 0, so that the next merge fills them first.
        merged.sort(key=lambda part: (-part[0], not part[1]))
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], number, merged))
        number += 1
    return [sorted(_leaves(tree)) for _, tree in heap[0][2]]


def _leaves(tree: _Tree) -> Iterator[int]:
    pending: list[Any] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, int):
            yield node
        else:
            pending.extend(node)
