"""What the ranks of test_all_to_all.py run: every check against a NumPy reference that one process can compute.

All ranks draw the input of all ranks from one seed, so each knows what it must receive.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from llmsys.comm.all_to_all import (
    all_to_all,
    all_to_all_autograd,
    all_to_all_chunked,
    all_to_all_hierarchical,
    all_to_all_known,
    all_to_all_uneven,
)
from llmsys.comm.launch import current_rank
from llmsys.core.errors import ConfigError, DeadlineError, InputError, PeerLostError

Check = Callable[[int, int], None]
Rng = np.random.Generator

NUM_RANKS = 4
LIMIT_S = 60.0
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def run_checks() -> dict[str, str | None]:
    """The traceback of each check that failed on this rank, by name."""
    info = current_rank()
    found: dict[str, str | None] = {}
    for name, function in CHECKS.items():
        try:
            function(info.rank, info.world_size)
            found[name] = None
        except BaseException:  # also that of pytest.raises
            found[name] = traceback.format_exc()
    return found


def draw_sizes(rng: Rng, num_ranks: int, num_buckets: int, kind: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Sizes of all ranks, shape (from, to, bucket)."""
    sizes = rng.integers(0, 9, size=(num_ranks, num_ranks, num_buckets))
    if kind == "sparse":
        sizes *= rng.random(sizes.shape) < 0.3
    elif kind == "idle":
        sizes[rng.integers(num_ranks)] = 0  # a rank without tokens
        sizes[:, rng.integers(num_ranks)] = 0  # and one that gets none
    elif kind == "empty":
        sizes[:] = 0
    return sizes


def draw_rows(rng: Rng, num_rows: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bits: they include NaNs, which a comparison of bytes keeps apart."""
    return torch.from_numpy(rng.integers(0, 2**31, size=(num_rows, *shape), dtype=np.int32)).view(torch.float32)


def reference(rows: list[torch.Tensor], sizes: np.ndarray[Any, Any], rank: int) -> torch.Tensor:
    """What ``rank`` receives, when rank r sends rows[r] of sizes[r], shape (to, bucket)."""
    parts = []
    for source, counts in enumerate(sizes.sum(axis=-1)):
        first = counts[:rank].sum()
        parts.append(rows[source][first : first + counts[rank]])
    return torch.cat(parts)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert found.contiguous().view(torch.uint8).equal(expected.contiguous().view(torch.uint8))


def signal_to(others: list[int]) -> None:
    for other in others:
        dist.send(torch.ones(1), other, tag=3)


def wait_for_signal(source: int) -> None:
    work = dist.irecv(torch.ones(1), source, tag=3)
    assert work is not None
    work.wait(timedelta(seconds=LIMIT_S))


@check
def even_of_every_dtype_and_stride(rank: int, world: int) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int16, torch.bool, torch.complex64)
    for shape in ((), (3,), (2, 0), (2, 5)):
        for dtype in dtypes:
            rows = [
                (torch.rand(world * 3, *shape, generator=torch.Generator().manual_seed(r)) * 9).to(dtype)
                for r in range(world)
            ]
            received = all_to_all(rows[rank], timeout_s=LIMIT_S).wait()
            sizes = np.full((world, world, 1), 3)
            assert_same_bits(received.rows, reference(rows, sizes, rank))
            assert received.sizes.tolist() == [3] * world
    rows = [torch.arange(8 * 6).reshape(6, 8).t() * (r + 1) for r in range(world)]
    assert not rows[rank].is_contiguous()
    received = all_to_all(rows[rank], timeout_s=LIMIT_S).wait()
    assert_same_bits(received.rows, reference(rows, np.full((world, world, 1), 2), rank))
    conjugate = torch.complex(torch.arange(4.0), torch.arange(4.0) + rank).conj()
    received = all_to_all(conjugate, timeout_s=LIMIT_S).wait()
    assert received.rows.imag.tolist() == [-(rank + source) for source in range(world)]


@check
def uneven_with_sizes_found_or_known(rank: int, world: int) -> None:
    rng = np.random.default_rng(1)
    for kind in ("dense", "sparse", "idle", "empty") * 3:
        for num_buckets in (1, 3):
            sizes = draw_sizes(rng, world, num_buckets, kind)
            shape = ((), (5,), (2, 3))[rng.integers(3)]
            rows = [draw_rows(rng, int(counts.sum()), shape) for counts in sizes]
            send, expected = sizes[rank], sizes[:, rank]
            if num_buckets == 1:
                send, expected = send[:, 0], expected[:, 0]
            handles = [
                all_to_all_uneven(rows[rank], send, timeout_s=LIMIT_S),
                all_to_all_known(rows[rank], send, expected, timeout_s=LIMIT_S),
                all_to_all_known(rows[rank], send.tolist(), expected.tolist(), timeout_s=LIMIT_S, verify=False),
            ]
            for handle in reversed(handles):
                received = handle.wait()
                assert_same_bits(received.rows, reference(rows, sizes, rank))
                assert received.sizes.tolist() == expected.tolist()


@check
def more_sizes_than_the_first_message_holds(rank: int, world: int) -> None:
    rng = np.random.default_rng(2)
    sizes = draw_sizes(rng, world, 40, "sparse")
    rows = [draw_rows(rng, int(counts.sum()), (2,)) for counts in sizes]
    for handle in (
        all_to_all_uneven(rows[rank], sizes[rank], timeout_s=LIMIT_S),
        all_to_all_known(rows[rank], sizes[rank], sizes[:, rank], timeout_s=LIMIT_S),
    ):
        received = handle.wait()
        assert_same_bits(received.rows, reference(rows, sizes, rank))
        assert received.sizes.tolist() == sizes[:, rank].tolist()


@check
def chunked_equals_unchunked(rank: int, world: int) -> None:
    rng = np.random.default_rng(3)
    for kind in ("dense", "sparse", "idle", "empty"):
        for num_buckets, num_chunks in ((1, 1), (1, 3), (2, 4), (3, 12)):
            sizes = draw_sizes(rng, world, num_buckets, kind)
            rows = [draw_rows(rng, int(counts.sum()), (3,)) for counts in sizes]
            whole = all_to_all_uneven(rows[rank], sizes[rank], timeout_s=LIMIT_S).wait()
            for capacity in (None, 8, 11):
                handle = all_to_all_chunked(rows[rank], sizes[rank], num_chunks, capacity=capacity, timeout_s=LIMIT_S)
                assert len(handle.chunks) == num_chunks
                together = handle.wait()
                assert handle.done()
                assert_same_bits(together.rows, whole.rows)
                assert together.sizes.tolist() == whole.sizes.tolist()
                for number, chunk in enumerate(handle.chunks):
                    part_rows, part_sizes = _part(rows, sizes, number, num_chunks, capacity)
                    assert_same_bits(chunk.wait().rows, reference(part_rows, part_sizes, rank))
                    assert chunk.wait().sizes.tolist() == part_sizes[:, rank].tolist()


def _part(
    rows: list[torch.Tensor], sizes: np.ndarray[Any, Any], number: int, num_chunks: int, capacity: int | None
) -> tuple[list[torch.Tensor], np.ndarray[Any, Any]]:
    """What all ranks send in one chunk, row by row."""
    part_sizes = np.zeros_like(sizes)
    part_rows = []
    for source in range(len(sizes)):
        taken, row = [], 0
        for target, bucket in np.ndindex(*sizes.shape[1:]):
            size = int(sizes[source, target, bucket])
            for slot in range(size):
                of = size if capacity is None else capacity
                if number * of // num_chunks <= slot < (number + 1) * of // num_chunks:
                    taken.append(row)
                    part_sizes[source, target, bucket] += 1
                row += 1
        part_rows.append(rows[source][taken])
    return part_rows, part_sizes


@check
def hierarchical_equals_flat(rank: int, world: int) -> None:
    rng = np.random.default_rng(4)
    for kind in ("dense", "sparse", "idle", "empty"):
        for ranks_per_node in (1, 2, 4):
            for num_buckets in (1, 3):
                sizes = draw_sizes(rng, world, num_buckets, kind)
                rows = [draw_rows(rng, int(counts.sum()), (2,)) for counts in sizes]
                received = all_to_all_hierarchical(
                    rows[rank], sizes[rank], ranks_per_node=ranks_per_node, timeout_s=LIMIT_S
                ).wait()
                assert_same_bits(received.rows, reference(rows, sizes, rank))
                assert received.sizes.tolist() == sizes[:, rank].tolist()
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    rows_of_each = [torch.arange(world) + 10 * r for r in range(world)]
    received = all_to_all_hierarchical(rows_of_each[rank], [1] * world, timeout_s=LIMIT_S).wait()
    assert received.rows.tolist() == [10 * source + rank for source in range(world)]
    os.environ["LOCAL_WORLD_SIZE"] = "3"
    with pytest.raises(ConfigError, match="do not fill nodes") as caught:
        all_to_all_hierarchical(rows_of_each[rank], [1] * world, timeout_s=LIMIT_S)
    assert "divides 4" in caught.value.expected and "LOCAL_WORLD_SIZE=3" in caught.value.found
    os.environ["LOCAL_WORLD_SIZE"] = str(world)
    with pytest.raises(ConfigError, match="do not fill nodes"):
        all_to_all_hierarchical(rows_of_each[rank], [1] * world, ranks_per_node=3, timeout_s=LIMIT_S)


@check
def start_returns_before_the_peers_have_started(rank: int, world: int) -> None:
    if rank > 0:
        wait_for_signal(0)
    handle = all_to_all_uneven(torch.full((world,), rank), [1] * world, name="early", timeout_s=LIMIT_S)
    if rank == 0:
        assert not handle.done()
        with pytest.raises(DeadlineError, match="two-phase all-to-all 'early'") as caught:
            handle.wait(timeout_s=0.05)
        assert "[1, 2, 3]" in caught.value.found
        signal_to([1, 2, 3])
    assert handle.wait().rows.tolist() == list(range(world))
    assert handle.done()
    assert handle.wait() is handle.wait()


@check
def operations_overlap_each_other_and_other_collectives(rank: int, world: int) -> None:
    rng = np.random.default_rng(5)
    rounds = []
    for _ in range(6):
        sizes = draw_sizes(rng, world, 1, "dense")
        rows = [draw_rows(rng, int(counts.sum()), (4096,)) for counts in sizes]
        rounds.append((sizes, rows, all_to_all_uneven(rows[rank], sizes[rank], timeout_s=LIMIT_S)))
        total = torch.ones(1)
        dist.all_reduce(total)  # on the same group, while the rows travel
        assert total.item() == world
    for sizes, rows, handle in reversed(rounds):
        assert_same_bits(handle.wait().rows, reference(rows, sizes, rank))


@check
def subgroups_are_apart(rank: int, world: int) -> None:
    groups = [dist.new_group([3, 1]), dist.new_group([0, 2])]
    alone = [dist.new_group([r]) for r in range(world)]
    mine, members = (groups[0], [1, 3]) if rank in (1, 3) else (groups[1], [0, 2])
    members = dist.get_process_group_ranks(mine)
    sizes = [1, 2]
    rows = torch.tensor([rank, rank + 10, rank + 20])
    handle = all_to_all_uneven(rows, sizes, group=mine, timeout_s=LIMIT_S)
    first, second = members
    if rank == first:
        assert handle.wait().rows.tolist() == [first, second]
    else:
        assert handle.wait().rows.tolist() == [first + 10, first + 20, second + 10, second + 20]
    assert all_to_all(rows, group=alone[rank], timeout_s=LIMIT_S).wait().rows.tolist() == rows.tolist()
    with pytest.raises(InputError, match="not in the process group"):
        all_to_all(rows, group=groups[rank % 2], timeout_s=LIMIT_S)


@check
def ranks_that_disagree_all_learn_both_sides(rank: int, world: int) -> None:
    """Rank 2 differs; every rank gets the error with its own and the other value, and the group stays usable."""
    odd = rank == 2
    ones, sizes = torch.ones(world, 3), [1] * world
    cases: list[tuple[Callable[[], Any], str, str]] = [
        (lambda: all_to_all_uneven(ones.to(torch.bfloat16 if odd else torch.float32), sizes), "bfloat16", "float32"),
        (lambda: all_to_all_uneven(ones[:, :2] if odd else ones, sizes), "(2,)", "(3,)"),
        (lambda: all_to_all_uneven(ones, sizes, name="combine" if odd else "dispatch"), "combine", "dispatch"),
        (lambda: all_to_all(ones) if odd else all_to_all_uneven(ones, sizes), "even", "two-phase"),
        (lambda: all_to_all(ones.repeat(2 if odd else 1, 1)), "2 to each rank", "1 to each rank"),
        (
            lambda: all_to_all_uneven(ones, [[1, 0]] * world if odd else [[1, 0, 0]] * world),
            "2 buckets a rank",
            "3 buckets a rank",
        ),
        (lambda: all_to_all_chunked(ones, sizes, 3 if odd else 2), "3 chunks", "2 chunks"),
        (lambda: all_to_all_chunked(ones, sizes, 2, capacity=4 if odd else 8), "capacity 4", "capacity 8"),
        (
            lambda: all_to_all_hierarchical(ones[:, :2] if odd else ones, sizes, ranks_per_node=2),
            "(2,)" if rank >= 2 else "refused",
            "(3,)" if rank >= 2 else "",
        ),
    ]
    for call, of_odd, of_others in cases:
        with pytest.raises(InputError) as caught:
            call().wait(timeout_s=LIMIT_S)
        found, own = caught.value.found, caught.value.expected
        assert (of_others in found and of_odd in own) if odd else (of_odd in found and of_others in own), str(
            caught.value
        )
        received = all_to_all(ones, timeout_s=LIMIT_S).wait()
        assert received.rows.equal(ones)


@check
def known_sizes_that_do_not_match_are_found_by_all(rank: int, world: int) -> None:
    send = np.ones(world, dtype=np.int64)
    expected = send.copy()
    if rank == 3:
        expected[1] = 5
    with pytest.raises(InputError, match="sizes do not match") as caught:
        all_to_all_known(torch.ones(world), send, expected, timeout_s=LIMIT_S).wait()
    assert "rank 1 sends [1] rows, rank 3 expects [5]" in caught.value.found


@check
def a_rank_that_refuses_its_input_tells_the_others(rank: int, world: int) -> None:
    ones, odd = torch.ones(world), rank == 1
    sizes = [1] * world
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: all_to_all_uneven(ones, [2, *sizes[1:]] if odd else sizes), "(sum 5)"),
        (lambda: all_to_all_uneven(ones, [-1, 3, *sizes[2:]] if odd else sizes), "[-1, 3, 1, 1]"),
        (lambda: all_to_all_uneven(ones, sizes[1:] if odd else sizes), "shape (3,)"),
        (lambda: all_to_all_uneven(ones, [1.0] * world if odd else sizes), "float64"),  # type: ignore[list-item]
        (lambda: all_to_all(ones[1:] if odd else ones), "shape (3,)"),
        (lambda: all_to_all_chunked(ones, [4, 0, 0, 0], 2, capacity=3 if odd else 4), "a size of 4"),
        (lambda: all_to_all_chunked(ones, sizes, 0 if odd else 1), "0"),
        (lambda: all_to_all_known(ones, sizes, [[1]] * world if odd else sizes), "(4, 1)"),
        (lambda: all_to_all_hierarchical(ones, sizes[1:] if odd else sizes, ranks_per_node=2), "shape (3,)"),
    ]
    for call, text in cases:
        if odd:
            with pytest.raises(InputError) as caught:
                call()
        else:
            with pytest.raises(InputError, match="a peer refused its input") as caught:
                call().wait(timeout_s=LIMIT_S)
            assert "refused: " in caught.value.found and ("rank 1" in caught.value.found or rank > 1)
        assert text in caught.value.found, str(caught.value)
        assert all_to_all(ones, timeout_s=LIMIT_S).wait().rows.equal(ones)


@check
def a_change_of_the_rows_under_way_is_found(rank: int, world: int) -> None:
    rows = torch.ones(world)
    if rank > 0:
        wait_for_signal(0)
    strided = torch.ones(world, 2)[:, 0]  # is copied at the start, so it may be written to
    handles = [all_to_all(rows, timeout_s=LIMIT_S), all_to_all(strided, timeout_s=LIMIT_S)]
    if rank == 0:
        rows.zero_()
        strided.zero_()
        signal_to([1, 2, 3])
        with pytest.raises(InputError, match="written to while it was sent"):
            handles[0].wait()
    else:
        handles[0].wait()
    assert handles[1].wait().rows.tolist() == [1.0] * world


@check
def gradients_return_to_their_rows(rank: int, world: int) -> None:
    rng = np.random.default_rng(6)
    sizes = draw_sizes(rng, world, 1, "idle")[..., 0]
    rows = torch.arange(int(sizes[rank].sum()), dtype=torch.float64).reshape(-1, 1).repeat(1, 2).requires_grad_()
    found, found_sizes = all_to_all_autograd(rows, sizes[rank], timeout_s=LIMIT_S)
    assert found_sizes.tolist() == sizes[:, rank].tolist()
    (found * (rank + 1)).sum().backward()
    expected = np.repeat(np.arange(world) + 1.0, sizes[rank])
    assert rows.grad is not None
    assert rows.grad.tolist() == [[value, value] for value in expected.tolist()]


@check
def a_late_rank_is_named_at_the_deadline(rank: int, world: int) -> None:
    """In a group of its own, as gloo closes it at a deadline."""
    group = dist.new_group([0, 2, 3])
    if rank == 1:
        return
    if rank == 3:
        wait_for_signal(0)
        wait_for_signal(2)
        with pytest.raises(PeerLostError, match=r"two-phase all-to-all 'layer 7' .*lost rank"):
            all_to_all_uneven(torch.ones(3), [1, 1, 1], group=group, name="layer 7", timeout_s=LIMIT_S).wait()
        return
    handle = all_to_all_uneven(torch.ones(3), [1, 1, 1], group=group, name="layer 7", timeout_s=3.0)
    with pytest.raises(DeadlineError, match=r"two-phase all-to-all 'layer 7' .* within 3 s: no word of rank 3\n"):
        handle.wait()
    signal_to([3])


@check
def a_lost_peer_is_named(rank: int, world: int) -> None:
    group = dist.new_group([0, 2])
    if rank == 2:
        wait_for_signal(0)
        dist.destroy_process_group(group)
    elif rank == 0:
        handle = all_to_all(torch.ones(2), group=group, name="gone", timeout_s=LIMIT_S)
        signal_to([2])
        with pytest.raises(PeerLostError, match=r"even all-to-all 'gone' .*lost rank 2"):
            handle.wait()


@check
def a_missing_deadline_is_refused(rank: int, world: int) -> None:
    for timeout_s in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="needs a deadline"):
            all_to_all(torch.ones(world), timeout_s=timeout_s)
