"""All-to-all on four gloo ranks, started once; and the arithmetic of rows in one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmsys.comm.all_to_all import all_to_all, pack_capacity, unpack_capacity
from llmsys.comm.launch import launch
from llmsys.comm.row_parts import part_bounds, transposed_rows, unchunked_rows
from llmsys.core.errors import InputError
from tests.comm import ranks_all_to_all as ranks


@pytest.fixture(scope="module")
def found() -> list[dict[str, str | None]]:
    return launch(ranks.run_checks, ranks.NUM_RANKS, timeout_s=240.0)


@pytest.mark.parametrize("name", ranks.CHECKS)
def test_on_four_ranks(name: str, found: list[dict[str, str | None]]) -> None:
    failures = [f"rank {rank}: {of_rank[name]}" for rank, of_rank in enumerate(found) if of_rank[name] is not None]
    assert not failures, "\n".join(failures)


def test_without_a_group_there_is_an_error() -> None:
    with pytest.raises(InputError, match="there is no process group"):
        all_to_all(torch.ones(4))


def test_parts_of_segments_are_whole_and_even() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(0, 20, size=(3, 2))
        num_parts = int(rng.integers(1, 8))
        parts = np.diff(part_bounds(sizes, num_parts, None), axis=0)
        assert (parts.sum(axis=0) == sizes).all()
        assert (parts.max(axis=0) - parts.min(axis=0) <= 1).all()
        capacity = 20
        parts = np.diff(part_bounds(sizes, num_parts, capacity), axis=0)
        slots = np.arange(capacity)
        for part in range(num_parts):
            inside = (part * capacity // num_parts <= slots) & (slots < (part + 1) * capacity // num_parts)
            assert (parts[part] == (inside & (slots < sizes[..., None])).sum(axis=-1)).all()


def test_transposition_moves_whole_segments() -> None:
    rng = np.random.default_rng(1)
    for shape in ((2, 3), (3, 2, 2), (1, 4), (4, 1, 3)):
        sizes = rng.integers(0, 5, size=shape)
        labels = np.repeat(np.arange(sizes.size), sizes.ravel())
        moved = labels[transposed_rows(sizes)]
        expected = np.arange(sizes.size).reshape(shape).swapaxes(0, 1)
        assert moved.tolist() == np.repeat(expected.ravel(), sizes.swapaxes(0, 1).ravel()).tolist()
        back = transposed_rows(sizes.swapaxes(0, 1))
        assert labels[transposed_rows(sizes)][back].tolist() == labels.tolist()


def test_chunks_are_put_back_in_order() -> None:
    rng = np.random.default_rng(2)
    sizes = rng.integers(0, 9, size=(3, 2))
    parts = np.diff(part_bounds(sizes, 4, None), axis=0)
    labels = [
        (rank, bucket, chunk, row)
        for chunk, rank, bucket in np.ndindex(*parts.shape)
        for row in range(int(parts[chunk, rank, bucket]))
    ]
    assert [labels[row] for row in unchunked_rows(parts)] == sorted(labels)


def test_capacity_buffers_are_packed_and_unpacked() -> None:
    rng = np.random.default_rng(3)
    buffers = torch.from_numpy(rng.random((4, 5, 2)))
    sizes = [5, 0, 2, 3]
    rows = pack_capacity(buffers, sizes)
    assert rows.tolist() == [row for buffer, size in zip(buffers.tolist(), sizes, strict=True) for row in buffer[:size]]
    unpacked = unpack_capacity(rows, sizes, 5)
    filled = torch.arange(5)[None, :] < torch.tensor(sizes)[:, None]
    assert unpacked[filled].equal(buffers[filled]) and not unpacked[~filled].any()
    assert pack_capacity(buffers[:, :0], [0] * 4).shape == (0, 2)
    assert unpack_capacity(rows[:0], [[0, 0], [0, 0]], 3).shape == (4, 3, 2)
