"""Descriptors, views, runs and batches against torch on the same memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmsys.comm.registry import DTYPE_BYTES, LocalTensor, TensorDescriptor, View, block_copies, copies, runs
from llmsys.comm.registry.batches import Side
from llmsys.core.errors import DescriptorError, InputError
from tests.comm.registry_memory import (
    bytes_at,
    bytes_of,
    element_offsets,
    make_registry,
    move,
    random_tensor,
    seen_by_peer,
    storage_bytes,
)

DTYPES = [getattr(torch, name) for name in DTYPE_BYTES]
SIDES: tuple[Side, ...] = ("local", "remote")


def run_bytes(view: View[object] | LocalTensor) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The number of every byte of the runs, in order; also checks that runs are as long as they can be."""
    found = view.runs()
    assert found.offsets.dtype == found.lengths.dtype == np.int64
    assert (found.lengths > 0).all()
    assert not (found.offsets[1:] == found.offsets[:-1] + found.lengths[:-1]).any()
    assert found.size_bytes == view.nbytes
    pieces = [np.arange(o, o + n) for o, n in zip(found.offsets, found.lengths, strict=True)]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)


def test_dtypes_are_all_of_torch_that_have_whole_bytes() -> None:
    known = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    below_a_byte = tuple(f"torch.{sign}int{bits}" for sign in ("u", "") for bits in range(1, 8))
    whole = {d for d in known if not str(d).startswith(("torch.q", "torch.bit")) and str(d) not in below_a_byte}
    assert {str(dtype).removeprefix("torch."): dtype.itemsize for dtype in whole} == DTYPE_BYTES


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_runs_hold_the_bytes_of_a_contiguous_copy() -> None:
    rng = np.random.default_rng(1)
    _, registry = make_registry()
    kinds = set()
    for case, dtype in zip(range(600), itertools.cycle(DTYPES), strict=False):
        tensor = random_tensor(rng, dtype)
        registered = registry.register(f"{case}", tensor)
        memory = np.frombuffer(storage_bytes(tensor), dtype=np.uint8)
        assert memory[run_bytes(registered)].tobytes() == bytes_of(tensor)
        assert registered.nbytes == tensor.numel() * tensor.element_size()
        assert registered.num_elements == tensor.numel()
        kinds.add((tensor.is_contiguous(), tensor.numel() == 0, tensor.dim() == 0, 0 in tensor.stride()))
    assert len(kinds) >= 5, "the random tensors are too alike"


def test_a_transposed_tensor_of_millions_of_elements() -> None:
    _, registry = make_registry()
    tensor = torch.empty(2048, 2048, dtype=torch.int16).t()
    assert np.array_equal(registry.register("big", tensor).runs().offsets, bytes_at(element_offsets(tensor), 2)[::2])


@pytest.mark.parametrize("step", [-1, -2])
def test_negative_strides_of_numpy(step: int) -> None:
    _, registry = make_registry()
    array = np.arange(60, dtype=np.int32).reshape(5, 12)
    turned = array[::step, ::step]
    here, base = turned.__array_interface__["data"][0], array.__array_interface__["data"][0]
    tensor = registry.register_memory(
        "turned",
        base,
        array.nbytes,
        shape=turned.shape,
        dtype="int32",
        strides_bytes=turned.strides,
        offset_bytes=here - base,
        owner=array,
    )
    assert array.reshape(-1).view(np.uint8)[run_bytes(tensor)].tobytes() == turned.tobytes()
    low, high = tensor.descriptor.element_range
    assert (low >= base, high) == (True, base + array.nbytes)


def test_views_follow_torch_indexing() -> None:
    rng = np.random.default_rng(2)
    _, registry = make_registry()
    for case in range(400):
        tensor = random_tensor(rng, torch.float16)
        view: View[object] = registry.register(f"{case}", tensor).view()
        expected = element_offsets(tensor)
        for _ in range(int(rng.integers(1, 5))):
            view, expected = random_step(rng, view, expected)
        assert view.shape == tuple(expected.shape)
        assert np.array_equal(run_bytes(view), bytes_at(expected, 2))


def random_step(
    rng: np.random.Generator, view: View[object], numbers: torch.Tensor
) -> tuple[View[object], torch.Tensor]:
    if not view.shape:
        return view, numbers
    dim = int(rng.integers(-len(view.shape), len(view.shape)))
    size = view.shape[dim]
    kind = rng.integers(4)
    if kind == 0:
        start, stop = sorted(rng.integers(0, size + 1, size=2).tolist())
        return view.slice(dim, start, stop), numbers.narrow(dim, start, stop - start)
    if kind == 1 and size:
        index = int(rng.integers(size))
        return view.block(dim, index), numbers.select(dim, index)
    if kind == 2 and size:
        ids = rng.integers(0, size, size=rng.integers(0, 6))
        return view.blocks(dim, ids), numbers.index_select(dim, torch.from_numpy(ids))
    order = rng.permutation(len(view.shape)).tolist()
    return view.permute(order), numbers.permute(order)


def test_dimensions_can_be_named() -> None:
    _, registry = make_registry()
    tensor = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    kv = registry.register("kv", tensor, dims=("block", "token", "head", "size"))
    heads = kv.slice("head", 1, 3).block("block", 1)
    assert heads.dims == ("token", "head", "size")
    assert np.array_equal(run_bytes(heads), bytes_at(element_offsets(tensor)[1, :, 1:3], 8))


Step = Callable[[TensorDescriptor], object]
OUT_OF_BOUNDS: list[tuple[Step, str]] = [
    (lambda t: t.block(0, 4), "index 4 is out of bounds for dimension 0 (block) of size 4"),
    (lambda t: t.block(0, -1), "index -1 is out of bounds"),
    (
        lambda t: t.blocks("block", [0, 3, 9]),
        "index 9 at position 2 is out of bounds for dimension 0 (block) of size 4",
    ),
    (lambda t: t.blocks(0, [-1]), "index -1 at position 0"),
    (lambda t: t.blocks(0, [0.5]), "not a 1-d array of integers"),
    (lambda t: t.blocks(0, [[1]]), "not a 1-d array of integers"),
    (lambda t: t.blocks(0, np.array([2**64 - 1], dtype=np.uint64)), "index 18446744073709551615 at position 0"),
    (lambda t: t.slice("head", 2, 9), "slice 2:9 is out of bounds for dimension 1 (head) of size 8"),
    (lambda t: t.slice(1, 3, 2), "slice 3:2"),
    (lambda t: t.slice("token", 0, 1), "one of block, head"),
    (lambda t: t.slice(2, 0, 1), "-2 <= dim < 2"),
    (lambda t: t.permute([0, 0]), "does not name each dimension once"),
]


@pytest.mark.parametrize(("step", "text"), OUT_OF_BOUNDS)
def test_out_of_bounds_says_index_and_size(step: Step, text: str) -> None:
    _, registry = make_registry()
    registered = registry.register("kv", torch.zeros(4, 8), dims=("block", "head"))
    with pytest.raises(InputError) as caught:
        step(registered.descriptor)
    assert text in str(caught.value)


def test_too_many_runs_are_refused_before_memory_is_taken() -> None:
    size = runs.MAX_RUNS + 1
    _, registry = make_registry()
    wide = registry.register_memory("wide", 1 << 40, 4 * size, shape=[size], dtype="int16", strides_bytes=[4])
    with pytest.raises(InputError, match="too many separate runs"):
        wide.runs()


GOOD = TensorDescriptor(
    name="k",
    address=1000,
    shape=(4, 8),
    strides_bytes=(16, 2),
    dtype="bfloat16",
    itemsize=2,
    device="cpu",
    owner="prefill-0",
    generation=17,
    region_id=1,
    region_address=1000,
    region_bytes=64,
)
BAD: list[tuple[dict[str, object], str]] = [
    ({"name": ""}, "name: text"),
    ({"shape": [4, 8]}, "shape: a tuple"),
    ({"shape": (4, True)}, "shape: a tuple"),
    ({"shape": (1,) * 65, "strides_bytes": (2,) * 65}, "at most 64"),
    ({"shape": (4, -8)}, "sizes of dimensions >= 0"),
    ({"strides_bytes": (16,)}, "one stride for each"),
    ({"strides_bytes": (16, 1 << 63)}, "strides within 63 bits"),
    ({"shape": (1 << 40, 1 << 40), "strides_bytes": (0, 0)}, "fewer than 2**63"),
    ({"dtype": "float15"}, "dtype: one of"),
    ({"itemsize": 4}, "itemsize 2 for bfloat16"),
    ({"dims": ("block",)}, "dims: 2 different names"),
    ({"dims": ("a", "a")}, "dims: 2 different names"),
    ({"region_bytes": 63}, "elements within the region"),
    ({"address": 999}, "elements within the region"),
    ({"address": 1002}, "elements within the region"),
    ({"strides_bytes": (16, -2)}, "elements within the region"),
    ({"strides_bytes": ((1 << 63) - 1, 2)}, "elements within the region"),
    ({"region_address": 1 << 64, "address": 1 << 64}, "within 64-bit addresses"),
    ({"region_address": (1 << 64) - 63, "address": (1 << 64) - 63}, "within 64-bit addresses"),
    ({"region_address": -1000, "address": -1000}, "within 64-bit addresses"),
    ({"region_bytes": 1 << 63}, "region_bytes < 2**63"),
    ({"region_id": -1}, "no region"),
    ({"shape": (0, 8)}, "no region"),
    ({"generation": -1}, "generation >= 0"),
    ({"generation": 1.0}, "generation: a whole number"),
]


@pytest.mark.parametrize(("change", "text"), BAD, ids=[f"{c}"[:60] for c, _ in BAD])
def test_a_bad_descriptor_is_refused(change: dict[str, object], text: str) -> None:
    with pytest.raises(DescriptorError) as caught:
        replace(GOOD, **change)  # type: ignore[arg-type]
    assert text in str(caught.value)


def test_a_region_may_end_at_the_last_address() -> None:
    top = (1 << 64) - 64
    assert replace(GOOD, region_address=top, address=top).element_range == (top, 1 << 64)


@pytest.mark.parametrize("into", SIDES)
def test_copies_move_what_torch_copies(into: Side) -> None:
    rng = np.random.default_rng(3)
    book, registry = make_registry()
    for dtype, _ in itertools.product(DTYPES, range(12)):
        shape = rng.integers(0 if rng.random() < 0.1 else 1, 6, size=rng.integers(0, 5)).tolist()
        here, there = random_tensor(rng, dtype, shape=shape), random_tensor(rng, dtype, shape=shape)
        local = registry.register("here", here)
        registry.register("there", there)
        remote = seen_by_peer(registry, book)["there"]
        target, source = (here, there) if into == "local" else (there, here)
        # The same view of a copy of the whole storage, so that bytes which must not change are compared too.
        expected = target.clone().set_(
            target.untyped_storage().clone(), target.storage_offset(), shape, target.stride()
        )
        expected.copy_(source)
        move(copies(local, remote, into=into), into)
        assert storage_bytes(target) == storage_bytes(expected)
        registry.close()


def test_copies_between_gathered_views() -> None:
    rng = np.random.default_rng(4)
    book, registry = make_registry()
    for _ in range(200):
        here = random_tensor(rng, torch.int32, shape=[7, 3, 4])
        there = random_tensor(rng, torch.int32, shape=[9, 3, 4])
        local = registry.register("here", here).blocks(0, ids := rng.permutation(7)[:5]).permute([1, 0, 2])
        registry.register("there", there)
        remote = (
            seen_by_peer(registry, book)["there"].blocks(0, others := rng.integers(0, 9, size=5)).permute([1, 0, 2])
        )
        expected = here.clone()
        expected[torch.from_numpy(ids)] = there[torch.from_numpy(others)]
        move(copies(local, remote), "local")
        assert torch.equal(here, expected)
        registry.close()


def test_copies_are_as_long_as_both_sides_allow() -> None:
    book, registry = make_registry()
    whole = torch.empty(2, 8, 6, 4, dtype=torch.uint8)
    rows = torch.empty(2, 8, 6, 8, dtype=torch.uint8)[..., :4]
    for name, tensor in {"whole": whole, "rows": rows}.items():
        registry.register(name, tensor)
    remote = seen_by_peer(registry, book)

    def lengths(local: View[object] | LocalTensor, other: View[object]) -> list[int]:
        return [n for group in copies(local, other) for n in group.lengths.tolist()]  # type: ignore[arg-type]

    assert lengths(registry["whole"], remote["whole"].view()) == [2 * 8 * 6 * 4]
    assert lengths(registry["rows"], remote["whole"].view()) == [4] * 96
    turned = [2, 3, 0, 1]
    assert lengths(registry["whole"].permute(turned), remote["whole"].permute(turned)) == [2 * 8 * 6 * 4]
    assert lengths(registry["whole"].slice(1, 2, 5), remote["whole"].slice(1, 0, 3)) == [3 * 6 * 4] * 2


def test_copies_refuse_what_does_not_fit() -> None:
    book, registry = make_registry()
    registry.register("k", torch.zeros(4, 6), dims=("block", "size"))
    registry.register("ints", torch.zeros(4, 6, dtype=torch.int32))
    registry.register("turned", torch.zeros(4, 6), dims=("size", "block"))
    registry.register("short", torch.zeros(3, 6))
    registry.register("expanded", torch.zeros(1, 6).expand(4, 6))
    remote, k = seen_by_peer(registry, book), registry["k"]
    for name, text in {"ints": "dtypes", "turned": "dimensions", "short": "shapes"}.items():
        with pytest.raises(InputError, match=f"{text} of local tensor 'k' and remote tensor '{name}' differ"):
            copies(k, remote[name])
    assert len(copies(k, remote["expanded"])[0].lengths) == 4, "an expanded tensor can be read"
    with pytest.raises(InputError, match="remote tensor 'expanded' overlap"):
        copies(k, remote["expanded"], into="remote")
    with pytest.raises(InputError, match="local tensor 'k' overlap"):
        copies(k.blocks(0, [1, 1]), remote["k"].blocks(0, [2, 3]))
    with pytest.raises(InputError, match="no target"):
        copies(k, remote["k"], into="both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no region at hand"):
        copies(k.descriptor, remote["k"])


def test_overlap_is_found_exactly() -> None:
    rng = np.random.default_rng(5)
    seen = {True: 0, False: 0}
    for _ in range(500):
        shape = tuple(rng.integers(1, 5, size=rng.integers(1, 4)).tolist())
        strides = tuple((rng.choice([-1, 1]) * rng.integers(0, 30)).item() for _ in shape)
        middle = 1 << 20
        view: View[object] = replace(
            GOOD, shape=shape, strides_bytes=strides, region_bytes=1 << 21, address=1000 + middle
        ).view()
        dim = int(rng.integers(len(shape)))
        ids = rng.integers(0, shape[dim], size=rng.integers(1, 4))
        view = view.blocks(dim, ids) if rng.random() < 0.5 else view
        numbers = np.zeros(1, dtype=np.int64)
        for size, stride, indices in zip(view.shape, view.strides_bytes, view.indices, strict=True):
            numbers = np.add.outer(numbers, stride * (np.arange(size) if indices is None else indices)).reshape(-1)
        touched = np.concatenate([numbers, numbers + 1])
        expected = len(set(touched.tolist())) < touched.size
        assert view.overlaps_itself() is expected
        seen[expected] += 1
    assert min(seen.values()) > 50


@pytest.mark.parametrize("into", SIDES)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shared", [False, True], ids=["own regions", "one region"])
def test_block_copies_move_blocks_of_every_layer(into: Side, dim: int, shared: bool) -> None:
    rng = np.random.default_rng(6)
    book, registry = make_registry()
    shapes = ([12, 5, 8], [20, 5, 8]) if dim == 0 else ([2, 12, 8], [2, 20, 8])
    here, there = (make_layers(rng, shape, shared) for shape in shapes)
    for name, layers in {"here": here, "there": there}.items():
        for i, layer in enumerate(layers):
            registry.register(f"{name}{i}", layer)
    remote = seen_by_peer(registry, book)
    ids, others = rng.permutation(12)[:9], rng.permutation(20)[:9]
    before = [layer.clone() for layer in (here if into == "local" else there)]
    batch = block_copies(
        [registry[f"here{i}"] for i in range(4)],
        [remote[f"there{i}"] for i in range(4)],
        ids,
        others.tolist(),
        dim=dim,
        into=into,
    )
    assert len(batch) == (1 if shared else 4)
    source = there if into == "local" else here
    mine, yours = (torch.from_numpy(i) for i in ((ids, others) if into == "local" else (others, ids)))
    for expected, layer in zip(before, source, strict=True):
        expected.index_copy_(dim, mine, layer.index_select(dim, yours))
    move(batch, into)
    assert all(torch.equal(a, b) for a, b in zip(before, here if into == "local" else there, strict=True))


def make_layers(rng: np.random.Generator, shape: list[int], shared: bool) -> list[torch.Tensor]:
    values = torch.from_numpy(rng.integers(0, 1 << 30, size=[4, *shape]))
    return [values[i] if shared else values[i].clone() for i in range(4)]


def test_block_copies_coalesce_as_the_paper_does() -> None:
    book, registry = make_registry()
    registry.register("kv", torch.empty(2, 40, 16))
    remote = seen_by_peer(registry, book)
    ids, others = [7, 3, 4, 5, 20, 8, 9], [31, 11, 12, 13, 0, 32, 34]
    (group,) = block_copies([registry["kv"]], [remote["kv"]], ids, others, dim=1)
    # Sorted by local block: 3-5, 7-8, then 9 (the remote side jumps from 32 to 34), 20; for K and for V.
    expected = [(3, 11, 3), (7, 31, 2), (9, 34, 1), (20, 0, 1)]
    segments = np.stack([group.local_offsets, group.remote_offsets, group.lengths], axis=1) // 64
    assert segments.tolist() == [[a + v, b + v, n] for v in (0, 40) for a, b, n in expected]


def test_block_copies_refuse_bad_ids() -> None:
    book, registry = make_registry()
    registry.register("k", torch.zeros(4, 6))
    remote, k = seen_by_peer(registry, book)["k"], registry["k"]
    assert block_copies([k], [remote], [], []) == []
    assert block_copies([], [], [0], [1]) == []
    for ids, others, text in (
        ([0, 1], [1], "as many remote_ids as local_ids"),
        ([0, 4], [1, 2], "index 4 at position 1"),
        ([0, 1], [1, -2], "index -2 at position 1"),
        ([1, 1], [1, 2], "overlap"),
    ):
        with pytest.raises(InputError, match=text):
            block_copies([k], [remote], ids, others)
    with pytest.raises(InputError, match="in pairs"):
        block_copies([k, k], [remote], [0], [1])


@pytest.mark.parametrize(("num_tensors", "num_blocks", "limit_ms"), [(1, 32_768, 8.0), (160, 512, 30.0)])
def test_block_copies_are_quick(num_tensors: int, num_blocks: int, limit_ms: float) -> None:
    """On two quiet cores 1.3 ms and 3.3 ms; the limits leave room for a slow machine, not for a loop over blocks."""
    rng = np.random.default_rng(7)
    book, registry = make_registry()
    for i in range(num_tensors):
        registry.register(f"{i}", torch.empty(num_blocks + 100, 4))
    remote = seen_by_peer(registry, book)
    here, there = [registry[name] for name in registry], [remote[name] for name in remote]
    ids, others = (rng.permutation(num_blocks + 100)[:num_blocks] for _ in range(2))
    times_ms = []
    for _ in range(15):
        start = time.perf_counter()
        batch = block_copies(here, there, ids, others)
        times_ms.append((time.perf_counter() - start) * 1e3)
    assert sum(int(group.lengths.sum()) for group in batch) == num_tensors * num_blocks * 16
    assert min(times_ms) < limit_ms


def test_addresses_need_no_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
from llmsys.comm.registry import TensorDescriptor, RemoteRegistry, copies
descriptor = TensorDescriptor(name="k", address=0, shape=(4, 8), strides_bytes=(16, 2), dtype="bfloat16", itemsize=2,
    device="cpu", owner="a", generation=1, region_id=1, region_address=0, region_bytes=64)
print(descriptor.slice(1, 2, 4).runs().offsets.tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[4, 20, 36, 52]"
