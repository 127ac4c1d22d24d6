"""Moves of KV blocks: the torch reference against loops, the kernel against the reference bit for bit.

The kernel runs in Triton's interpreter here, in a second copy of the package, since Triton decides when it decorates.
It is also compiled for a GPU, with the arguments of real launches, and run where there is one.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import llmsys.kernels
from llmsys.core.errors import InputError
from llmsys.kernels import kv_blocks
from llmsys.kvdirect.layout import KvLayout, RelayoutCosts, plan_relayout, transfer_segments

PACKAGE = "llmsys.kernels.kv_blocks"
VLLM = ("kv", "block", "token", "head", "dim")
ORDERS = (VLLM, ("block", "kv", "token", "head", "dim"), ("kv", "block", "head", "token", "dim"))
DTYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.float64, torch.bool)
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Implementation = Literal["torch", "triton"]


def fresh_package(*, interpret: bool) -> ModuleType:
    """Another copy of the package, decorated with or without TRITON_INTERPRET; sys.modules stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llmsys.kernels, "kv_blocks", kv_blocks)
        for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
            patch.delitem(sys.modules, name)
        if interpret:
            patch.setenv("TRITON_INTERPRET", "1")
        else:
            patch.delenv("TRITON_INTERPRET", raising=False)
        return importlib.import_module(PACKAGE)


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    return fresh_package(interpret=True)


@pytest.fixture(scope="module")
def compiled() -> ModuleType:
    return fresh_package(interpret=False)


@pytest.fixture(params=["torch", "triton"])
def implementation(request: pytest.FixtureRequest) -> Implementation:
    chosen: Implementation = request.param
    return chosen


def random_cache(
    rng: np.random.Generator, sizes: Sequence[int], order: Sequence[str] = VLLM, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Random bits, so that NaNs of every kind are among them; ``sizes`` are of (kv, block, token, head, dim)."""
    shape = [sizes[VLLM.index(dim)] for dim in order]
    top = 2 if dtype is torch.bool else 256
    data = rng.integers(0, top, (*shape, dtype.itemsize), dtype=np.uint8)
    cache = torch.from_numpy(data).view(dtype).reshape(shape)
    return kv_blocks.logical_view(cache, order)


def bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The same memory as integers."""
    return tensor.view(INTEGERS[tensor.dtype.itemsize]).numpy()


def assert_same_bits(found: torch.Tensor, expected: np.ndarray[Any, Any]) -> None:
    np.testing.assert_array_equal(bits(found), expected)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [*itertools.product((64, 80, 96, 112), DTYPES[:2]), *itertools.product((7, 128), DTYPES)]
)
def test_gather_and_scatter(
    interpreted: ModuleType, implementation: Implementation, order: Sequence[str], head_dim: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(head_dim)
    cache = random_cache(rng, (2, 6, 4, 3, head_dim), order, dtype)
    ids = [4, 0, 5]
    staging = interpreted.gather_blocks(cache, ids, implementation=implementation)
    assert staging.dtype == dtype
    assert_same_bits(staging, bits(cache)[:, ids])
    outer_to_inner = sorted(range(5), key=lambda dim: -staging.stride(dim))
    assert outer_to_inner == [1, *(VLLM.index(dim) for dim in order if dim != "block")]
    for number in range(len(ids)):
        block = staging[:, number]
        assert block.storage_offset() == number * block.numel()
        assert block.numel() == 1 + sum((n - 1) * s for n, s in zip(block.shape, block.stride(), strict=True))

    target = random_cache(rng, (2, 6, 4, 3, head_dim), order, dtype)
    expected = bits(target).copy()
    expected[:, [1, 3, 2]] = bits(staging)
    interpreted.scatter_blocks(staging, target, np.array([1, 3, 2]), implementation=implementation)
    assert_same_bits(target, expected)


def odd_views(rng: np.random.Generator, sizes: Sequence[int]) -> Iterator[torch.Tensor]:
    """The same size with strides of many kinds, each within a larger tensor."""
    kv, block, token, head, dim = sizes
    yield random_cache(rng, (kv, block * 2, token, head, dim))[:, ::2]
    yield random_cache(rng, (kv, block, token + 1, head + 2, dim + 3))[:, :, 1:, 1:-1, 3:]
    yield random_cache(rng, (kv, block, token, head, dim * 3))[..., ::3]
    yield random_cache(rng, sizes, ("dim", "token", "head", "kv", "block"))
    yield random_cache(rng, (kv, block, token, head, dim + 4), ("block", "kv", "head", "token", "dim"))[..., 2:-2]


def test_odd_strides(interpreted: ModuleType, implementation: Implementation) -> None:
    rng = np.random.default_rng(0)
    sizes, ids = (2, 5, 3, 2, 8), [3, 0, 4]
    staged = (2, 3, 3, 2, 8)
    for cache, out in itertools.product(odd_views(rng, sizes), odd_views(rng, staged)):
        wanted = whole(out).clone()
        as_view(wanted, out).copy_(cache[:, ids])
        assert interpreted.gather_blocks(cache, ids, out, implementation=implementation) is out
        assert_same_bits(whole(out), bits(wanted))

        out.copy_(random_cache(rng, staged))
        wanted = whole(cache).clone()
        as_view(wanted, cache)[:, ids] = out
        interpreted.scatter_blocks(out, cache, ids, implementation=implementation)
        assert_same_bits(whole(cache), bits(wanted))


def whole(view: torch.Tensor) -> torch.Tensor:
    """All of the memory behind a view, as one dimension."""
    size = view.untyped_storage().nbytes() // view.dtype.itemsize
    return view.as_strided((size,), (1,), 0)


def as_view(memory: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return memory.as_strided(like.shape, like.stride(), like.storage_offset())


@pytest.mark.parametrize(
    "ids", [[], [2], [1, 1, 1, 0], torch.tensor([3, 2], dtype=torch.int32), np.array([0], np.uint8)]
)
def test_lists_of_ids(interpreted: ModuleType, implementation: Implementation, ids: Any) -> None:
    cache = random_cache(np.random.default_rng(1), (2, 4, 1, 1, 5))
    staging = interpreted.gather_blocks(cache, ids, implementation=implementation)
    assert_same_bits(staging, bits(cache)[:, np.asarray(ids, dtype=np.int64)])
    if len(set(np.asarray(ids).tolist())) == len(ids):
        interpreted.scatter_blocks(staging.clone(), cache, ids, implementation=implementation)


def move_by_loops(
    source: torch.Tensor,
    destination: torch.Tensor,
    tables: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
    firsts: tuple[Sequence[int], Sequence[int]],
    num_tokens: Sequence[int],
    heads: tuple[int, int, int],
) -> None:
    ours, theirs = bits(source), bits(destination)
    source_head, destination_head, num_heads = heads
    for sequence, count in enumerate(num_tokens):
        for token in range(count):
            (a, s), (b, d) = (
                (table[sequence][position // size], position % size)
                for table, position, size in (
                    (tables[0], firsts[0][sequence] + token, source.shape[2]),
                    (tables[1], firsts[1][sequence] + token, destination.shape[2]),
                )
            )
            moved = ours[:, a, s, source_head : source_head + num_heads]
            theirs[:, b, d, destination_head : destination_head + num_heads] = moved


def random_tables(
    rng: np.random.Generator, num_blocks: int, block_tokens: int, firsts: Sequence[int], num_tokens: Sequence[int]
) -> list[list[int]]:
    free = rng.permutation(num_blocks).tolist()
    needs = [-(-(first + count) // block_tokens) for first, count in zip(firsts, num_tokens, strict=True)]
    return [[free.pop() for _ in range(need)] for need in needs]


@pytest.mark.parametrize("seed", range(24))
def test_relayout(interpreted: ModuleType, implementation: Implementation, seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_tokens = rng.integers(0, 40, int(rng.integers(0, 4))).tolist()
    firsts = tuple(rng.integers(0, 9, len(num_tokens)).tolist() for _ in range(2))
    dtype, head_dim = DTYPES[seed % len(DTYPES)], int(rng.choice([5, 16, 80, 96]))
    sides, tables = [], []
    for side in range(2):
        block_tokens, heads = int(rng.choice([1, 8, 16, 32])), int(rng.integers(1, 5))
        blocks = 1 + sum(-(-(first + n) // block_tokens) for first, n in zip(firsts[side], num_tokens, strict=True))
        order = ORDERS[rng.integers(3)] if seed % 4 else tuple(VLLM[i] for i in rng.permutation(5))
        sides.append(random_cache(rng, (2, blocks, block_tokens, heads, head_dim), order, dtype))
        tables.append(random_tables(rng, blocks, block_tokens, firsts[side], num_tokens))
    source, destination = sides
    num_heads = int(rng.integers(1, min(source.shape[3], destination.shape[3]) + 1))
    heads = tuple(int(rng.integers(side.shape[3] - num_heads + 1)) for side in sides)
    expected = destination.clone(memory_format=torch.preserve_format)
    move_by_loops(source, expected, (tables[0], tables[1]), firsts, num_tokens, (*heads, num_heads))
    tokens = interpreted.map_tokens(
        source, destination, *tables, num_tokens, source_first_tokens=firsts[0], destination_first_tokens=firsts[1]
    )
    assert len(tokens) == sum(num_tokens)
    interpreted.relayout_blocks(
        source,
        destination,
        tokens,
        source_head=heads[0],
        destination_head=heads[1],
        num_heads=num_heads,
        implementation=implementation,
    )
    assert_same_bits(destination, bits(expected))


def test_one_token_between_equal_caches(interpreted: ModuleType, implementation: Implementation) -> None:
    rng = np.random.default_rng(2)
    source, destination = (random_cache(rng, (2, 3, 16, 8, 128)) for _ in range(2))
    expected = bits(destination).copy()
    expected[:, 0, 0] = bits(source)[:, 2, 0]
    tokens = interpreted.map_tokens(source, destination, [[2]], [[0]], [1])
    interpreted.relayout_blocks(source, destination, tokens, implementation=implementation)
    assert_same_bits(destination, expected)


@pytest.mark.parametrize("far_dim", [0, 1, 2, 3])
def test_caches_of_more_than_2_31_elements(
    interpreted: ModuleType, implementation: Implementation, far_dim: int
) -> None:
    """Two indices along one dimension are 2^30 elements apart, a third 2^31; memory in between is never touched."""
    memory = torch.empty((1 << 31) + 4096, dtype=torch.int8)
    sizes, strides = [2, 2, 2, 2, 7], [7, 14, 28, 56, 1]  # odd, so that elements move as they are
    sizes[far_dim], strides[far_dim] = 3, 1 << 30
    cache = memory.as_strided(sizes, strides)
    rng = np.random.default_rng(far_dim)
    cache.copy_(torch.from_numpy(rng.integers(-128, 128, sizes, dtype=np.int8)))
    original = cache.clone()
    ids = [sizes[1] - 1, 0]
    staging = interpreted.gather_blocks(cache, ids, implementation=implementation)
    assert torch.equal(staging, original[:, ids])
    interpreted.scatter_blocks(staging.flip(0), cache, ids, implementation=implementation)
    assert torch.equal(cache[:, ids], original[:, ids].flip(0))
    small = torch.zeros([sizes[0], 3, 4, *sizes[3:]], dtype=torch.int8)
    count = len(ids) * sizes[2]
    tokens = interpreted.map_tokens(cache, small, [ids], [[2, 0]], [count])
    interpreted.relayout_blocks(cache, small, tokens, implementation=implementation)
    assert torch.equal(small[:, [2, 0]].flatten(1, 2)[:, :count], cache[:, ids].flatten(1, 2))


COSTS = RelayoutCosts(segment_overhead_us=1000, link_gb_per_s=10, copy_gb_per_s=100, kernel_launch_us=0)


@pytest.mark.parametrize("orders", list(itertools.product(ORDERS, ORDERS[1:])), ids=str)
@pytest.mark.parametrize("gathers", [False, True])
def test_a_staged_plan_gives_what_the_segments_give(
    interpreted: ModuleType, implementation: Implementation, orders: Any, gathers: bool
) -> None:
    layout = KvLayout(num_layers=1, num_blocks=9, block_tokens=8, num_kv_heads=4, head_dim=16, itemsize=2)
    source = replace(layout, tp_size=2, tp_rank=1, order=orders[0])
    destination = replace(layout, block_tokens=16, order=orders[1])
    tables, num_tokens, first = ([7, 3, 1, 4, 8], [2, 6, 5]), 37, 11
    rng = np.random.default_rng(5)

    def tensor_of(one: KvLayout) -> torch.Tensor:
        return torch.from_numpy(rng.integers(-(2**15), 2**15, one.shape, dtype=np.int16))

    cache, received = tensor_of(source), tensor_of(destination)
    expected = received.clone()
    copy_bytes(transfer_segments(source, destination, *tables, num_tokens, first_token=first), cache, expected)

    costs = replace(COSTS, source_gathers=gathers)
    plan = plan_relayout(source, destination, *tables, num_tokens, first_token=first, costs=costs)
    assert plan.staging is not None and plan.method == ("gather" if gathers else "fetch")
    near, far = tensor_of(plan.staging), tensor_of(plan.staging)
    ours, theirs, packed, staged = (
        kv_blocks.logical_view(tensor, one.order)
        for tensor, one in ((cache, source), (received, destination), (near, plan.staging), (far, plan.staging))
    )
    table, at, count = range(plan.staging.num_blocks), [plan.staging_first_token], [num_tokens - first]
    if gathers:
        tokens = interpreted.map_tokens(ours, packed, tables[:1], [table], count, source_first_tokens=[first])
        head = plan.heads.begin - source.heads.begin
        interpreted.relayout_blocks(ours, packed, tokens, source_head=head, implementation=implementation)
    copy_bytes(plan.segments, near if gathers else cache, far)
    tokens = interpreted.map_tokens(
        staged, theirs, [table], tables[1:], count, source_first_tokens=at, destination_first_tokens=[first]
    )
    interpreted.relayout_blocks(
        staged,
        theirs,
        tokens,
        source_head=plan.staging_first_head,
        destination_head=plan.heads.begin - destination.heads.begin,
        num_heads=len(plan.heads),
        implementation=implementation,
    )
    assert torch.equal(received, expected)


def copy_bytes(segments: Any, source: torch.Tensor, destination: torch.Tensor) -> None:
    ours, theirs = (tensor.view(torch.uint8).flatten().numpy() for tensor in (source, destination))
    columns = (segments.source_offset_bytes, segments.destination_offset_bytes, segments.length_bytes)
    for begin, to, size in zip(*(column.tolist() for column in columns), strict=True):
        theirs[to : to + size] = ours[begin : begin + size]


CACHE = torch.zeros(2, 4, 8, 2, 16)
WIDE = torch.zeros(2, 3, 16, 4, 16)


def relayout(
    tables: Any = ([[0, 1]], [[2]]), num_tokens: Any = (9,), destination: Any = WIDE, **arguments: Any
) -> None:
    tokens = kv_blocks.map_tokens(CACHE, WIDE, *tables, num_tokens, **arguments.pop("firsts", {}))
    kv_blocks.relayout_blocks(CACHE, destination, tokens, **arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kv_blocks.gather_blocks(CACHE, [0, 4]), r"ids in \[0, 4\)"),
        (lambda: kv_blocks.gather_blocks(CACHE, torch.tensor([-1]), check_ids=False), "the first is -1"),
        (lambda: kv_blocks.gather_blocks(CACHE, torch.tensor(1)), "one-dimensional"),
        (lambda: kv_blocks.gather_blocks(CACHE, [0.5]), "whole numbers"),
        (lambda: kv_blocks.gather_blocks(CACHE, torch.tensor([1.0])), "whole numbers"),
        (lambda: kv_blocks.gather_blocks(CACHE[0], [1]), "not a KV cache"),
        (lambda: kv_blocks.gather_blocks(CACHE.to(torch.complex128), [1]), "at most 8 bytes"),
        (lambda: kv_blocks.gather_blocks(CACHE, [1], CACHE), r"expected: shape \(2, 1, 8, 2, 16\)"),
        (lambda: kv_blocks.gather_blocks(CACHE, [1], CACHE[:, :1].half()), "torch.float16"),
        (lambda: kv_blocks.gather_blocks(CACHE, [1, 2], CACHE[:, :1].expand(-1, 2, -1, -1, -1)), "not expanded"),
        (lambda: kv_blocks.gather_blocks(CACHE, [1], implementation="cuda"), "'auto', 'torch' or 'triton'"),
        (lambda: kv_blocks.scatter_blocks(CACHE[:, :2], CACHE, [1, 1]), "block 1 2 times"),
        (lambda: kv_blocks.scatter_blocks(CACHE[:, :2], CACHE, [1]), r"\(2, 2, 8, 2, 16\)"),
        (lambda: kv_blocks.scatter_blocks(CACHE[:, :1], CACHE[:1].expand(2, -1, -1, -1, -1), [1]), "not expanded"),
        (lambda: kv_blocks.logical_view(CACHE, ("kv", "block", "head", "dim")), "a permutation"),
        (lambda: kv_blocks.logical_view(CACHE[0], VLLM), "five dimensions"),
        (lambda: relayout(([[0, 4]], [[2]])), r"source_blocks\[0\] has ids out of range"),
        (lambda: relayout(([[0, 1]], [[3]])), r"destination_blocks\[0\] has ids out of range"),
        (lambda: relayout(([[0]], [[2]])), r"at most 8 in 1 blocks of 8"),
        (lambda: relayout(num_tokens=[-1]), "-1 tokens"),
        (lambda: relayout(firsts={"destination_first_tokens": [8]}), "9 tokens from token 8 on"),
        (lambda: relayout(num_tokens=[9, 0]), "not of one batch"),
        (lambda: relayout(([[0, 1], [2, 3]], [[2], [2]]), [9, 9]), "block 2 2 times"),
        (lambda: relayout(source_head=1, num_heads=2), r"found: \[1, 3\)"),
        (lambda: relayout(destination_head=3), r"heads in \[0, 4\)"),
        (lambda: relayout(source_head=-1), r"found: \[-1, 2\)"),
        (lambda: relayout(destination=CACHE), "other caches"),
        (lambda: relayout(destination=WIDE[:1].expand(2, -1, -1, -1, -1)), "not expanded"),
        (lambda: relayout(destination=WIDE[..., :8]), "does not fit"),
        (lambda: relayout(destination=WIDE.double()), "torch.float64"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(call: Callable[[], object], message: str) -> None:
    CACHE.fill_(1)
    WIDE.fill_(2)
    with pytest.raises(InputError, match=message):
        call()
    assert (CACHE == 1).all() and (WIDE == 2).all()


def test_unused_entries_of_a_table_are_not_looked_at() -> None:
    CACHE.fill_(1)
    WIDE.fill_(2)
    firsts = {"source_first_tokens": [8], "destination_first_tokens": [16]}
    relayout(([[-1, 3, 99]], [[-7, 1, 99]]), [3], firsts=firsts)
    assert (WIDE[:, 1, :3, :2] == 1).all() and (WIDE == 1).sum() == 2 * 3 * 2 * 16


def test_triton_needs_a_gpu_or_the_interpreter(compiled: ModuleType, interpreted: ModuleType) -> None:
    with pytest.raises(InputError, match="TRITON_INTERPRET=1"):
        compiled.gather_blocks(CACHE, [1], implementation="triton")
    assert not compiled.move.use_triton("auto", CACHE) and interpreted.move.use_triton("auto", CACHE)
    assert not interpreted.move.use_triton("torch", CACHE)


@pytest.mark.parametrize(
    ("shift_bytes", "unit"), [(0, torch.int64), (8, torch.int64), (4, torch.int32), (2, torch.int16)]
)
def test_units_are_as_wide_as_addresses_allow(shift_bytes: int, unit: torch.dtype) -> None:
    memory = bytearray(4096)
    aligned = -torch.frombuffer(memory, dtype=torch.int8).data_ptr() % 8
    shifted = torch.frombuffer(memory, dtype=torch.bfloat16, count=512, offset=aligned + shift_bytes)
    for units in kv_blocks.move.as_units(
        shifted.view(2, 1, 4, 2, 32), torch.zeros(2, 1, 4, 2, 32, dtype=torch.bfloat16)
    ):
        assert units.dtype == unit and units.shape[-1] * unit.itemsize == 64


class NoGpu:
    """Stands for a Hopper GPU, which compiling does not need."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


class CompileOnly:
    """Takes the kernel's place: compiles for the arguments of a launch, as a launch would, and stops there."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.ptx: list[str] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.ptx.append(self.kernel.warmup(*arguments, grid=grid, **options).asm["ptx"])

        return launch


@pytest.fixture
def compile_only(compiled: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompileOnly:
    try:
        assert triton.knobs.nvidia.ptxas.path
    except RuntimeError as missing:
        pytest.skip(f"this triton has no ptxas: {missing}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    stand_in = CompileOnly(compiled.move._move_kernel)
    monkeypatch.setattr(compiled.move, "_move_kernel", stand_in)
    monkeypatch.setattr(compiled.blocks, "use_triton", lambda *_: True)
    monkeypatch.setattr(driver, "_active", NoGpu())
    return stand_in


def test_the_kernel_compiles_for_a_gpu(compiled: ModuleType, compile_only: CompileOnly) -> None:
    cache, target = (torch.empty(2, 64, 16, 8, 128, dtype=torch.bfloat16) for _ in range(2))
    compiled.gather_blocks(cache, range(5))
    compiled.scatter_blocks(cache[:, :5], target, range(5))
    wide = torch.empty(2, 64, 64, 4, 128, dtype=torch.bfloat16)
    tokens = compiled.map_tokens(cache, wide, [range(5)], [range(2)], [75])
    compiled.relayout_blocks(cache, wide, tokens, source_head=4)
    assert len(compile_only.ptx) == 3
    for ptx in compile_only.ptx:
        assert ".target sm_90" in ptx
        # 16 bytes a thread, the widest access there is, in both directions.
        assert "ld.global.v2.b64" in ptx and "st.global.v2.b64" in ptx
    bytes_only = torch.empty(2, 9, 3, 2, 7, dtype=torch.int8)
    compiled.gather_blocks(bytes_only, [1])
    assert "ld.global.b8" in compile_only.ptx[-1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_on_a_gpu(compiled: ModuleType, order: Sequence[str]) -> None:
    rng = np.random.default_rng(3)
    cache = random_cache(rng, (2, 40, 16, 4, 80), order).cuda()
    ids = torch.from_numpy(rng.permutation(40)[:11]).cuda()
    staging = compiled.gather_blocks(cache, ids)
    assert_same_bits(staging.cpu(), bits(cache[:, ids].cpu()))
    with pytest.raises(InputError, match="out of range"):
        compiled.gather_blocks(cache, ids + 40)
    with pytest.raises(InputError, match="twice"):
        compiled.scatter_blocks(staging, cache, ids * 0)
    other, wide = torch.zeros_like(cache), torch.zeros(2, 9, 64, 6, 80, dtype=cache.dtype, device="cuda")
    compiled.scatter_blocks(staging, other, ids)
    assert_same_bits(other[:, ids].cpu(), bits(staging.cpu()))
    tokens = compiled.map_tokens(cache, wide, [ids], [range(3)], [170])
    expected = wide.clone()
    compiled.relayout_blocks(cache, expected, tokens, source_head=1, num_heads=2, implementation="torch")
    compiled.relayout_blocks(cache, wide, tokens, source_head=1, num_heads=2)
    assert_same_bits(wide.cpu(), bits(expected.cpu()))
