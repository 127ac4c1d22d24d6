"""Descriptors, views and runs against torch on the same memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from llmsys.comm.registry import DTYPE_BYTES, LocalTensor, TensorDescriptor, View, runs
from llmsys.core.errors import DescriptorError, InputError
from tests.comm.registry_memory import (
    bytes_at,
    bytes_of,
    element_offsets,
    make_registry,
    random_tensor,
    storage_bytes,
)

DTYPES = [getattr(torch, name) for name in DTYPE_BYTES]


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
