"""Segments against an oracle that knows only where an element lies: every element arrives, nothing else changes."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmsys.core.errors import ConfigError, InputError
from llmsys.kvdirect.layout import (
    FLOWKV_ORDER,
    HEAD_MAJOR_ORDER,
    VLLM_ORDER,
    HeadRange,
    KvLayout,
    Order,
    RelayoutCosts,
    RelayoutPlan,
    Segments,
    plan_relayout,
    source_ranks,
    transfer_segments,
)

Cache = list[NDArray[np.uint32]]  # one array a layer, as it lies in memory
DIMS: Order = ("kv", "block", "token", "head", "dim")
ORDERS: tuple[Order, ...] = (VLLM_ORDER, FLOWKV_ORDER, HEAD_MAJOR_ORDER)
UNTOUCHED = 0xFFFFFFFF
SOURCE_ELSEWHERE = 0xEEEEEEEE
BASE = KvLayout(num_layers=2, num_blocks=12, block_tokens=8, num_kv_heads=4, head_dim=3, itemsize=4)


def filled(layout: KvLayout, value: int) -> Cache:
    return [np.full(layout.shape, value, dtype=np.uint32) for _ in range(layout.num_layers)]


def by_dims(array: NDArray[np.uint32], order: Order) -> NDArray[np.uint32]:
    return array.transpose([order.index(dim) for dim in DIMS])


def put_tokens(cache: Cache, layout: KvLayout, table: Sequence[int], tokens: range, heads: HeadRange) -> None:
    """Give every (layer, K or V, token, head, dim) of a sequence a value that occurs once."""
    for layer, array in enumerate(cache):
        view = by_dims(array, layout.order)
        for kv, token, head, dim in itertools.product(
            range(2), tokens, range(heads.begin, heads.end), range(layout.head_dim)
        ):
            value = ((((layer * 2 + kv) << 12) + token) * layout.num_kv_heads + head) * layout.head_dim + dim
            block, slot = table[token // layout.block_tokens], token % layout.block_tokens
            view[kv, block, slot, head - layout.heads.begin, dim] = value


def source_cache(layout: KvLayout, table: Sequence[int], num_tokens: int) -> Cache:
    cache = filled(layout, SOURCE_ELSEWHERE)
    put_tokens(cache, layout, table, range(num_tokens), layout.heads)
    return cache


def copy_bytes(segments: Segments, source: Cache, destination: Cache) -> None:
    ours = [memoryview(array).cast("B") for array in source]
    theirs = [memoryview(array).cast("B") for array in destination]
    for layer, begin, to, size in zip(
        segments.layer.tolist(),
        segments.source_offset_bytes.tolist(),
        segments.destination_offset_bytes.tolist(),
        segments.length_bytes.tolist(),
        strict=True,
    ):
        assert size > 0 and begin >= 0 and to >= 0
        theirs[layer][to : to + size] = ours[layer][begin : begin + size]  # raises where either ends too early


def fewest_ranges(
    source: KvLayout, destination: KvLayout, tables: tuple[Sequence[int], Sequence[int]], tokens: range
) -> int:
    """Ranges of one layer, counted element by element: an element that does not follow another begins a range."""
    heads = source.heads.common(destination.heads)
    places: list[list[int]] = [[], []]
    for side, (layout, table) in enumerate(zip((source, destination), tables, strict=True)):
        stride = layout.strides_bytes
        for kv, token, head, dim in itertools.product(
            range(2), tokens, range(heads.begin, heads.end), range(layout.head_dim)
        ):
            block, slot = table[token // layout.block_tokens], token % layout.block_tokens
            index = {"kv": kv, "block": block, "token": slot, "head": head - layout.heads.begin, "dim": dim}
            places[side].append(sum(index[d] * stride[d] for d in DIMS))
    pairs = set(zip(*places, strict=True))
    return sum((a - source.itemsize, b - source.itemsize) not in pairs for a, b in pairs)


def random_order(rng: np.random.Generator) -> Order:
    if rng.random() < 0.8:
        return ORDERS[rng.integers(len(ORDERS))]
    return tuple(DIMS[i] for i in rng.permutation(5))


def random_table(rng: np.random.Generator, layout: KvLayout, num_tokens: int) -> list[int]:
    """Some blocks next to each other, some not, and up to one more than needed."""
    needed = -(-num_tokens // layout.block_tokens)
    ids = rng.permutation(layout.num_blocks)[: needed + 1].tolist()
    return sorted(ids) if rng.random() < 0.4 else ids


def random_case(seed: int) -> tuple[np.random.Generator, KvLayout, KvLayout, range]:
    rng = np.random.default_rng(seed)
    num_kv_heads = int(rng.choice([1, 2, 4, 8]))
    end = int(rng.integers(1, 130))
    start = 0 if rng.random() < 0.5 else int(rng.integers(0, end + 1))
    sides = []
    for _ in range(2):
        block_tokens = int(rng.choice([8, 16, 32, 64]))
        sides.append(
            replace(
                BASE,
                num_layers=1 + seed % 2,
                num_blocks=-(-end // block_tokens) + int(rng.integers(1, 4)),
                block_tokens=block_tokens,
                num_kv_heads=num_kv_heads,
                head_dim=1 + seed % 3,
                tp_size=(tp := int(rng.choice([1, 2, 4, 8]))),
                tp_rank=int(rng.integers(tp)),
                order=random_order(rng),
            )
        )
    return rng, sides[0], sides[1], range(start, end)


@pytest.mark.parametrize("seed", range(120))
def test_every_element_arrives_and_nothing_else_changes(seed: int) -> None:
    rng, source, destination, tokens = random_case(seed)
    table = random_table(rng, destination, tokens.stop)
    received, expected = filled(destination, UNTOUCHED), filled(destination, UNTOUCHED)
    put_tokens(expected, destination, table, tokens, destination.heads)
    for part in source_ranks(source.tp_size, destination):
        ours = replace(source, tp_rank=part.rank)
        source_table = random_table(rng, ours, tokens.stop)
        segments = transfer_segments(ours, destination, source_table, table, tokens.stop, first_token=tokens.start)
        copy_bytes(segments, source_cache(ours, source_table, tokens.stop), received)
        assert ours.heads.common(destination.heads) == part.heads
        num_elements = len(tokens) * 2 * len(part.heads) * ours.head_dim * ours.num_layers
        assert segments.total_bytes == num_elements * ours.itemsize
        assert len(segments) == ours.num_layers * fewest_ranges(ours, destination, (source_table, table), tokens)
        at = segments.layer * destination.layer_bytes + segments.destination_offset_bytes
        assert (np.diff(at) > 0).all()
    for got, wanted in zip(received, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_layout_of_a_rank() -> None:
    layout = KvLayout(
        num_layers=3, num_blocks=10, block_tokens=16, num_kv_heads=8, head_dim=128, itemsize=2, tp_size=4, tp_rank=3
    )
    assert layout.heads == HeadRange(begin=6, end=8) and layout.shape == (2, 10, 16, 2, 128)
    assert layout.strides_bytes == {"dim": 2, "head": 256, "token": 512, "block": 8192, "kv": 81920}
    assert layout.layer_bytes == 163840 and layout.token_bytes == 1024
    flow = replace(layout, order=FLOWKV_ORDER)
    assert flow.shape == (10, 2, 16, 2, 128) and flow.strides_bytes["kv"] == 8192 and flow.layer_bytes == 163840
    heads = [replace(layout, num_kv_heads=2, tp_size=8, tp_rank=rank).heads.begin for rank in range(8)]
    assert heads == [rank * 2 // 8 for rank in range(8)]
    assert all(len(replace(layout, num_kv_heads=2, tp_size=8, tp_rank=rank).heads) == 1 for rank in range(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": 0}, "num_blocks"),
        ({"head_dim": -1}, "head_dim"),
        ({"tp_size": 3}, "a divisor or a multiple of the 4 KV heads"),
        ({"tp_size": 6}, "a divisor or a multiple of the 4 KV heads"),
        ({"tp_size": 0}, "tp_size"),
        ({"tp_size": 2, "tp_rank": 2}, r"in \[0, 2\)"),
        ({"order": ("kv", "block", "token", "head")}, "a permutation"),
        ({"order": ("kv", "kv", "token", "head", "dim")}, "a permutation"),
    ],
)
def test_layouts_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(BASE, **change)


@pytest.mark.parametrize(
    ("source_blocks", "destination_blocks", "num_ranges"),
    [
        ([4, 5, 6, 7], [1, 2, 3, 4], 2),  # KVDirect: one for K, one for V
        ([4, 5, 7, 8], [1, 2, 3, 4], 4),
        ([4, 5, 7, 8], [0, 1, 2, 9], 6),
        ([7, 5, 3, 1], [1, 2, 3, 4], 8),
        ([11, 0, 1, 2], [11, 0, 1, 2], 3),  # block 11 of K lies before block 0 of V
    ],
)
def test_neighbours_on_both_sides_are_one_range(
    source_blocks: list[int], destination_blocks: list[int], num_ranges: int
) -> None:
    segments = transfer_segments(BASE, BASE, source_blocks, destination_blocks, 32)
    assert len(segments) == num_ranges * BASE.num_layers
    np.testing.assert_array_equal(segments.layer, np.repeat([0, 1], num_ranges))


def test_block_outermost_joins_k_and_v() -> None:
    flow = replace(BASE, order=FLOWKV_ORDER)
    assert len(transfer_segments(flow, flow, [4, 5, 6], [1, 2, 3], 24)) == 2
    assert len(transfer_segments(flow, flow, [4, 6, 9], [1, 2, 3], 24)) == 2 * 3
    # Between the orders K and V part; a head slice parts every token.
    assert len(transfer_segments(flow, BASE, [4, 5, 6], [1, 2, 3], 24)) == 2 * 2 * 3
    assert len(transfer_segments(BASE, replace(BASE, tp_size=2), [4, 5, 6], [1, 2, 3], 24)) == 2 * 2 * 24


def test_only_the_tokens_of_a_partial_block_move() -> None:
    segments = transfer_segments(BASE, BASE, [3], [5], 1)
    assert segments.length_bytes.tolist() == [4 * 3 * 4] * 4
    row, block = 4 * 3 * 4, 8 * 4 * 3 * 4
    assert segments.source_offset_bytes.tolist() == [3 * block, 15 * block] * 2
    later = transfer_segments(BASE, BASE, [-1, -1, 3], [-1, -1, 5], 20, first_token=19)
    assert later.source_offset_bytes.tolist() == [3 * block + 3 * row, 15 * block + 3 * row] * 2
    assert later.destination_offset_bytes.tolist() == [5 * block + 3 * row, 17 * block + 3 * row] * 2


def test_nothing_to_move() -> None:
    other_head = replace(BASE, tp_size=4, tp_rank=3)
    for segments in (
        transfer_segments(BASE, BASE, [], [], 0),
        transfer_segments(BASE, BASE, [1], [2], 8, first_token=8),
        transfer_segments(BASE, BASE, [1, 1], [-1, -1], 12, first_token=12),
        transfer_segments(replace(BASE, tp_size=2), other_head, [1], [2], 8),
    ):
        assert len(segments) == 0 and segments.total_bytes == 0 and segments.length_bytes.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        transfer_segments(BASE, BASE, [1], [2], 8).length_bytes[0] = 1


def test_offsets_and_lengths_above_four_gib() -> None:
    big = KvLayout(num_layers=1, num_blocks=1 << 20, block_tokens=64, num_kv_heads=8, head_dim=128, itemsize=2)
    table = np.arange(1 << 19, (1 << 19) + (1 << 14), dtype=np.int32)
    segments = transfer_segments(big, big, table, table[::-1].copy()[::-1], (1 << 20) - 3)
    block_bytes = 64 * 8 * 128 * 2
    assert segments.source_offset_bytes.tolist() == [block_bytes << 19, (block_bytes << 20) + (block_bytes << 19)]
    assert segments.length_bytes.tolist() == [((1 << 20) - 3) * 2048] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_blocks": [1, 12]}, "source_blocks has block ids out of range"),
        ({"source_blocks": [-1, 2]}, "the first is -1 at index 0"),
        ({"destination_blocks": [1, 2, 1]}, "occurs|overwritten"),
        ({"destination_blocks": [1, 2, 99]}, r"ids in \[0, 12\)"),
        ({"destination_blocks": [1, 2]}, "at least 3 blocks for 12 tokens in blocks of 4"),
        ({"source_blocks": [1]}, "source_blocks has too few blocks"),
        ({"source_blocks": [1.0, 2.0]}, "not a block table"),
        ({"source_blocks": [[1, 2]]}, "not a block table"),
        ({"first_token": 13}, "first_token = 13"),
        ({"first_token": -1}, "first_token = -1"),
        ({"destination_blocks": [5, 2, 5], "first_token": 8}, r"block 5 at indices \[0, 2\]"),
        ({"destination": replace(BASE, head_dim=4)}, "expected: equal head_dim"),
        ({"destination": replace(BASE, num_layers=4)}, "2 at the source, 4 at the destination"),
        ({"destination": replace(BASE, itemsize=2)}, "itemsize"),
    ],
)
def test_bad_tables_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {
        "source": BASE,
        "destination": replace(BASE, block_tokens=4),
        "source_blocks": [1, 2],
        "destination_blocks": [1, 2, 3],
        "num_tokens": 12,
    }
    transfer_segments(**arguments)
    with pytest.raises(InputError, match=message):
        transfer_segments(**(arguments | change))


@pytest.mark.parametrize(
    ("num_kv_heads", "source_tp", "destination_tp"),
    [*itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), (6, 3, 2), (6, 2, 3), (2, 8, 6), (1, 3, 5)],
)
def test_source_ranks_cover_the_heads_and_share_the_load(
    num_kv_heads: int, source_tp: int, destination_tp: int
) -> None:
    source = replace(BASE, num_kv_heads=num_kv_heads, tp_size=source_tp)
    reads: Counter[tuple[int, int]] = Counter()
    for rank in range(destination_tp):
        destination = replace(source, tp_size=destination_tp, tp_rank=rank)
        parts = source_ranks(source_tp, destination)
        wanted = range(destination.heads.begin, destination.heads.end)
        assert [h for part in parts for h in range(part.heads.begin, part.heads.end)] == list(wanted)
        for part in parts:
            assert part.heads.common(replace(source, tp_rank=part.rank).heads) == part.heads
            reads.update((part.rank, head) for head in range(part.heads.begin, part.heads.end))
        if source_tp == destination_tp:
            assert [part.rank for part in parts] == [rank]
    for head in range(num_kv_heads):
        holders = [
            r for r in range(source_tp) if replace(source, tp_rank=r).heads.common(HeadRange(begin=head, end=head + 1))
        ]
        loads = [reads[rank, head] for rank in holders]
        assert max(loads) - min(loads) <= 1 and sum(loads) == max(1, destination_tp // num_kv_heads)


def test_a_source_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="source_tp"):
        source_ranks(3, BASE)


FREE = RelayoutCosts(segment_overhead_us=0, link_gb_per_s=10, copy_gb_per_s=100, kernel_launch_us=1)
DEAR = replace(FREE, segment_overhead_us=1000)


def execute(
    plan: RelayoutPlan, source: KvLayout, destination: KvLayout, tables: Sequence[Sequence[int]], tokens: range
) -> Cache:
    """The plan carried out, the kernels' part element by element."""
    cache, received = source_cache(source, tables[0], tokens.stop), filled(destination, UNTOUCHED)
    if plan.staging is None:
        copy_bytes(plan.segments, cache, received)
        return received
    near, far = filled(plan.staging, UNTOUCHED), filled(plan.staging, UNTOUCHED)
    place = plan.staging, range(plan.staging.num_blocks), plan.staging_first_token, plan.staging_first_head
    ours = source, tables[0], tokens.start, plan.heads.begin - source.heads.begin
    theirs = destination, tables[1], tokens.start, plan.heads.begin - destination.heads.begin
    if plan.method == "gather":
        move_elements(cache, ours, near, place, len(tokens), len(plan.heads))
    copy_bytes(plan.segments, near if plan.method == "gather" else cache, far)
    move_elements(far, place, received, theirs, len(tokens), len(plan.heads))
    return received


Place = tuple[KvLayout, Sequence[int], int, int]  # layout, block table, first token, first of the tensor's heads


def move_elements(source: Cache, ours: Place, destination: Cache, theirs: Place, num_tokens: int, heads: int) -> None:
    for array, target in zip(source, destination, strict=True):
        views = []
        for side, (layout, table, first, head) in ((array, ours), (target, theirs)):
            token = first + np.arange(num_tokens)
            block = np.asarray(table)[token // layout.block_tokens]
            views.append(
                (by_dims(side, layout.order)[:, :, :, head : head + heads], block, token % layout.block_tokens)
            )
        (a, b, s), (to, to_b, to_s) = views
        to[:, to_b, to_s] = a[:, b, s]


@pytest.mark.parametrize("seed", range(40))
def test_every_method_gives_the_same_cache(seed: int) -> None:
    rng, source, destination, tokens = random_case(1000 + seed)
    source = replace(source, tp_rank=source_ranks(source.tp_size, destination)[0].rank)
    tables = random_table(rng, source, tokens.stop), random_table(rng, destination, tokens.stop)
    expected = filled(destination, UNTOUCHED)
    put_tokens(expected, destination, tables[1], tokens, source.heads.common(destination.heads))
    slow_copy = replace(DEAR, copy_gb_per_s=1e-9)
    for costs in (FREE, DEAR, replace(DEAR, source_gathers=True), replace(slow_copy, source_gathers=True)):
        plan = plan_relayout(source, destination, *tables, tokens.stop, first_token=tokens.start, costs=costs)
        for got, wanted in zip(execute(plan, source, destination, tables, tokens), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


def plan_of(source: KvLayout, destination: KvLayout, costs: RelayoutCosts) -> RelayoutPlan:
    return plan_relayout(source, destination, [5, 1, 2], [3, 9, 4], 20, costs=costs)


def test_the_method_follows_the_costs() -> None:
    whole, half = BASE, replace(BASE, tp_size=2, tp_rank=1)
    gathers = replace(DEAR, source_gathers=True)
    # A narrow source's blocks are whole runs there, and slices of every token at a wide destination.
    assert plan_of(half, whole, FREE).method == "direct" and len(plan_of(half, whole, FREE).segments) == 2 * 2 * 20
    assert plan_of(half, whole, DEAR).method == "fetch" and len(plan_of(half, whole, DEAR).segments) == 2 * 2 * 2
    assert plan_of(half, whole, gathers).method == "gather" and len(plan_of(half, whole, gathers).segments) == 2
    # A wide source can be fetched only with the heads that nobody wants, in runs as long.
    fetched = plan_of(whole, half, DEAR)
    assert (
        fetched.method == "fetch"
        and fetched.segments.total_bytes == 2 * plan_of(whole, half, FREE).segments.total_bytes
    )
    # Equal layouts: staging saves nothing, unless the blocks are scattered at the destination alone.
    assert plan_of(whole, whole, DEAR).method == "fetch"
    assert plan_relayout(whole, whole, [5, 1, 2], [9, 3, 4], 20, costs=DEAR).method == "direct"


def test_estimates_are_overhead_plus_wire_plus_copies() -> None:
    half = replace(BASE, tp_size=2)
    costs = RelayoutCosts(
        segment_overhead_us=3, link_gb_per_s=2, copy_gb_per_s=8, kernel_launch_us=7, source_gathers=True
    )
    moved = 2 * 20 * 2 * 2 * 3 * 4  # layers, tokens, K and V, heads, dim, itemsize
    plan = plan_of(BASE, half, costs)
    assert plan.direct_ms == pytest.approx(80 * 3e-3 + moved / 2e6)
    assert plan.fetch_ms == pytest.approx(8 * 3e-3 + 2 * moved / 2e6 + 2 * 7e-3 + moved / 8e6)
    assert plan.gather_ms == pytest.approx(2 * 3e-3 + moved / 2e6 + 4 * 7e-3 + 2 * moved / 8e6)
    assert plan_of(BASE, half, replace(costs, source_gathers=False)).gather_ms == math.inf
    nothing = plan_relayout(BASE, half, [], [], 0, costs=costs)
    assert nothing.method == "direct" and len(nothing.segments) == 0 and nothing.direct_ms == 0


@pytest.mark.parametrize("change", [{"link_gb_per_s": 0}, {"copy_gb_per_s": math.inf}, {"segment_overhead_us": -1}])
def test_costs_that_cannot_be(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(FREE, **change)
