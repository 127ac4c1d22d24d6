"""Sorting and merging of a batch's entries, against a short Python version."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from llmsys import _C

pytestmark = pytest.mark.native

Entry = tuple[int, int, int]


def oracle(entries: list[Entry], write: bool) -> list[Entry]:
    merged: list[list[int]] = []
    for local, remote, length in sorted((e for e in entries if e[2]), key=lambda e: e[1 if write else 0]):
        if merged and merged[-1][0] + merged[-1][2] == local and merged[-1][1] + merged[-1][2] == remote:
            merged[-1][2] += length
        else:
            merged.append([local, remote, length])
    return [(local, remote, length) for local, remote, length in merged]


def native(entries: list[Entry], write: bool) -> list[Entry]:
    columns: list[NDArray[np.int64]] = [np.array([e[i] for e in entries], dtype=np.int64) for i in range(3)]
    found = _C.coalesce(*columns, write)
    return list(zip(*(column.tolist() for column in found), strict=True))


def random_entries(rng: np.random.Generator) -> list[Entry]:
    """Entries that do not overlap on either side; many are adjacent, some are empty, the order is shuffled."""
    unit = int(rng.choice([1, 7, 4096, 1 << 33]))
    count = int(rng.integers(1, 60))
    lengths = rng.integers(0, 4, count)
    local = np.cumsum(lengths * 1) + np.cumsum(rng.integers(0, 2, count))
    remote = np.empty(count, np.int64)
    runs = np.array_split(np.arange(count), int(rng.integers(1, count + 1)))
    position = 0
    for run in (runs[i] for i in rng.permutation(len(runs))):
        for i in run:
            remote[i] = position
            position += int(lengths[i])
        position += int(rng.integers(0, 2))
    first = int(rng.integers(0, 1000))
    table = [
        (first + int(b - n) * unit, int(r) * unit, int(n) * unit)
        for b, r, n in zip(local, remote, lengths, strict=True)
    ]
    return [table[i] for i in rng.permutation(count)]


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_equals_the_oracle(write: bool) -> None:
    rng = np.random.default_rng(0)
    num_merged = 0
    for _ in range(400):
        entries = random_entries(rng)
        expected = oracle(entries, write)
        assert native(entries, write) == expected
        num_merged += len(expected) < sum(1 for e in entries if e[2])
    assert num_merged > 100


def test_many_shuffled_blocks() -> None:
    blocks = np.random.default_rng(1).permutation(32768) * 4096
    local, remote, lengths = _C.coalesce(blocks, blocks + 64, np.full(blocks.size, 4096), False)
    assert (local.tolist(), remote.tolist(), lengths.tolist()) == ([0], [64], [32768 * 4096])


def test_nothing_gives_nothing() -> None:
    assert native([], False) == [] and native([(5, 6, 0), (5, 6, 0)], True) == []


@pytest.mark.parametrize(
    ("entries", "write", "expected"),
    [
        ([(0, 0, 8), (100, 200, 8), (7, 300, 8)], False, "entries 0 and 2 .* local bytes .*: 0 to 8 and 7 to 15"),
        ([(0, 200, 8), (100, 200, 8)], True, "entries 0 and 1 .* remote bytes .*: 200 to 208 and 200 to 208"),
        ([(0, 0, 1 << 40), (1 << 39, 0, 1)], False, "local bytes"),
        ([(-1, 0, 8)], False, "entry 0 is out of bounds: local offset -1"),
        ([(0, 0, 8), (8, 8, -8)], False, "entry 1 is out of bounds.*length -8"),
    ],
)
def test_bad_entries_are_refused(entries: list[Entry], write: bool, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        native(entries, write)


def test_same_source_for_many_destinations_is_no_overlap() -> None:
    assert native([(0, 0, 8), (8, 0, 8)], False) == [(0, 0, 8), (8, 0, 8)]
    with pytest.raises(ValueError, match="remote bytes"):
        native([(0, 0, 8), (8, 0, 8)], True)


def test_arrays_of_different_length_are_refused() -> None:
    one, two = np.zeros(1, np.int64), np.zeros(2, np.int64)
    with pytest.raises(ValueError, match="got 1, 2 and 1"):
        _C.coalesce(one, two, one, False)
