"""What a registry holds, what it exports, and what a peer refuses to import."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from llmsys.comm.registry import Assembler, RemoteRegistry, TensorRegistry, table
from llmsys.comm.registry.chunks import CHUNK_HEADER_BYTES
from llmsys.comm.transports.base import Peer
from llmsys.core.errors import DescriptorError, InputError
from tests.comm.registry_memory import PEER, BookTransport, as_transport, make_registry, seen_by_peer

TOP = (1 << 64) - 64


def small_registry() -> tuple[BookTransport, TensorRegistry]:
    book, registry = make_registry()
    kv = torch.zeros(2, 6, 4, dtype=torch.bfloat16)
    registry.register("layer0.k", kv[0], dims=("block", "size"))
    registry.register("layer0.v", kv[1], dims=("block", "size"))
    registry.register("turned", torch.zeros(3, 5, dtype=torch.complex64).t())
    registry.register("none", torch.zeros(0, 4))
    registry.register("one", torch.tensor(3.0))
    return book, registry


def fields(data: bytes) -> list[Any]:
    unpacked: list[Any] = msgpack.unpackb(data[table.HEADER_BYTES :])
    return unpacked


def sealed(body: bytes, version: int = table.VERSION) -> bytes:
    """A table with the right length and checksum around any body."""
    prefix = table._PREFIX.pack(table.MAGIC, version, len(body))
    return prefix + table._checksum(prefix, body) + body


def importing(data: bytes, book: BookTransport) -> RemoteRegistry:
    return RemoteRegistry.import_(PEER, data, as_transport(book))


def test_a_table_says_everything_about_its_tensors() -> None:
    book, registry = small_registry()
    remote = seen_by_peer(registry, book)
    assert list(remote) == list(registry) and len(remote) == 5 and "one" in remote
    for name in registry:
        here = registry[name]
        assert remote.descriptor(name) == here.descriptor
        there = remote[name].region
        assert (there is None) == (here.region is None) == (name == "none")
        if there is not None and here.region is not None:
            assert (there.address, there.size_bytes) == (here.region.address, here.region.size_bytes)
    assert (registry["turned"].descriptor.owner, registry["turned"].descriptor.generation) == ("prefill-0", 17)


def test_regions_are_imported_at_first_use_and_once() -> None:
    book, registry = small_registry()
    remote = seen_by_peer(registry, book)
    assert remote.descriptor("layer0.k") and book.imported == []
    book.crowd, start = threading.Barrier(2), threading.Barrier(4)

    def use() -> None:
        start.wait(timeout=30)
        for name in ("layer0.k", "layer0.v", "none"):
            remote[name].block(1, 0)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(book.imported) == 1, "two views of one storage are one region"
    remote.close()
    remote.close()
    assert book.forgotten == book.imported
    with pytest.raises(InputError, match="closed"):
        remote["layer0.k"]


def test_some_tensors_can_be_exported() -> None:
    book, registry = small_registry()
    data = registry.export(["turned"])
    assert list(importing(data, book)) == ["turned"] and len(fields(data)[2]) == 1
    assert list(importing(registry.export([]), book)) == []
    with pytest.raises(InputError, match="twice"):
        registry.export(["turned", "turned"])
    with pytest.raises(InputError, match=r"use 'layer0\.k'"):
        registry.export(["layer0_k"])
    with pytest.raises(InputError, match=r"table of prefill-0 at .* has no tensor 'trned'"):
        importing(data, book)["trned"]


def test_every_truncation_is_refused() -> None:
    book, registry = small_registry()
    data = registry.export()
    for length in range(len(data)):
        with pytest.raises(DescriptorError):
            importing(data[:length], book)
    with pytest.raises(DescriptorError, match="followed by other bytes"):
        importing(data + b"\0", book)


def test_every_damaged_byte_is_refused() -> None:
    book, registry = small_registry()
    data = registry.export()
    for position, flip in itertools.product(range(len(data)), (0x01, 0x80, 0xFF)):
        damaged = bytearray(data)
        damaged[position] ^= flip
        with pytest.raises(DescriptorError):
            importing(bytes(damaged), book)


def test_another_version_stale_or_strange_is_named() -> None:
    book, registry = small_registry()
    data = registry.export()
    with pytest.raises(DescriptorError) as caught:
        importing(sealed(data[table.HEADER_BYTES :], version=2), book)
    assert "version 2" in str(caught.value) and "version 1" in str(caught.value)
    restarted = Peer(peer_id=4, name="prefill-0", generation=18, address="127.0.0.1:9")
    with pytest.raises(DescriptorError) as caught:
        RemoteRegistry.import_(restarted, data, as_transport(book))
    assert "stale" in str(caught.value)
    assert (caught.value.expected, caught.value.found) == ("generation 18", "generation 17")
    stranger = Peer(peer_id=5, name="prefill-1", generation=17, address="127.0.0.1:9")
    with pytest.raises(DescriptorError) as caught:
        RemoteRegistry.import_(stranger, data, as_transport(book))
    assert (caught.value.expected, caught.value.found) == ("owner 'prefill-1'", "owner 'prefill-0'")


REGION = [1, 4096, 64, "cpu", b"key"]
LAYOUT = ["bfloat16", "cpu", [], [4, 8], None]
TENSOR = ["k", 0, 0, 0]


def body(**change: object) -> list[object]:
    whole: dict[str, object] = {
        "owner": "prefill-0",
        "generation": 17,
        "regions": [REGION],
        "layouts": [LAYOUT],
        "tensors": [TENSOR],
    }
    return list((whole | change).values())


WRONG: dict[str, object] = {
    "no list": {"owner": "prefill-0"},
    "a field too few": body()[:4],
    "owner is a number": body(owner=3),
    "no owner": body(owner=""),
    "generation is text": body(generation="17"),
    "generation is true": body(generation=True),
    "generation is negative": body(generation=-1),
    "region is no list": body(regions=[3]),
    "region key is text": body(regions=[[1, 4096, 64, "cpu", "key"]]),
    "region size 0": body(regions=[[1, 4096, 0, "cpu", b"key"]]),
    "region size 2**63": body(regions=[[1, 4096, 1 << 63, "cpu", b"key"]]),
    "region id negative": body(regions=[[-1, 4096, 64, "cpu", b"key"]]),
    "region address negative": body(regions=[[1, -64, 64, "cpu", b"key"]]),
    "region passes the last address": body(regions=[[1, TOP + 1, 64, "cpu", b"key"]], tensors=[]),
    "region without device": body(regions=[[1, 4096, 64, "", b"key"]]),
    "one region twice": body(regions=[REGION, REGION]),
    "one id for two regions": body(regions=[REGION, [1, 8192, 64, "cpu", b"other"]]),
    "two regions for one range": body(regions=[REGION, [2, 4096, 64, "cpu", b"other"]]),
    "overlap on another device": body(regions=[REGION, [2, 4159, 64, "cuda", b"other"]]),
    "overlap within a larger one": body(
        regions=[REGION, [2, 4100, 4, "cpu", b"b"], [3, 4150, 4, "cuda", b"c"]],
    ),
    "tensor behind its region": body(tensors=[["k", 0, 1, 0]]),
    "tensor before its region": body(tensors=[["k", 0, -1, 0]]),
    "tensor wraps around": body(regions=[[1, TOP, 64, "cpu", b"key"]], tensors=[["k", 0, 64, 0]]),
    "offset 2**64 - 1": body(tensors=[["k", 0, (1 << 64) - 1, 0]]),
    "stride 2**63 - 1": body(layouts=[["bfloat16", "cpu", [], [4, 8], [(1 << 63) - 1, 2]]]),
    "stride 2**64 - 1": body(layouts=[["bfloat16", "cpu", [], [4, 8], [(1 << 64) - 1, 2]]]),
    "stride before the region": body(layouts=[["bfloat16", "cpu", [], [4, 8], [-16, 2]]]),
    "stride is text": body(layouts=[["bfloat16", "cpu", [], [4, 8], ["16", 2]]]),
    "sizes overflow": body(layouts=[["bfloat16", "cpu", [], [1 << 63, 1 << 63], [0, 0]]]),
    "sizes overflow when contiguous": body(layouts=[["bfloat16", "cpu", [], [(1 << 64) - 1] * 64, None]]),
    "too many sizes": body(layouts=[["bfloat16", "cpu", [], [(1 << 64) - 1] * 100_000, None]]),
    "size is negative": body(layouts=[["bfloat16", "cpu", [], [4, -8], [16, 2]]]),
    "size is true": body(layouts=[["bfloat16", "cpu", [], [4, True], None]]),
    "unknown dtype": body(layouts=[["float15", "cpu", [], [4, 8], None]]),
    "one name of two dimensions": body(layouts=[["bfloat16", "cpu", ["block"], [4, 8], None]]),
    "dimension names are lists": body(layouts=[["bfloat16", "cpu", [[], []], [4, 8], None]]),
    "tensor on another device": body(layouts=[["bfloat16", "cuda:0", [], [4, 8], None]]),
    "no such region": body(tensors=[["k", 1, 0, 0]]),
    "region is false": body(tensors=[["k", False, 0, 0]]),
    "no such layout": body(tensors=[["k", 0, 0, 1]]),
    "layout from the end": body(tensors=[["k", 0, 0, -1]]),
    "no region for elements": body(tensors=[["k", None, 0, 0]]),
    "region for no elements": body(layouts=[["bfloat16", "cpu", [], [4, 0], None]]),
    "a name twice": body(tensors=[TENSOR, TENSOR]),
    "no name": body(tensors=[["", 0, 0, 0]]),
    "name is bytes": body(tensors=[[b"k", 0, 0, 0]]),
}


def test_a_body_of_our_own_is_accepted() -> None:
    book, _ = make_registry()
    assert importing(sealed(msgpack.packb(body())), book).descriptor("k").element_range == (4096, 4160)
    last = body(regions=[[1, TOP, 64, "cpu", b"key"]])
    assert importing(sealed(msgpack.packb(last)), book).descriptor("k").element_range == (TOP, 1 << 64)
    apart = body(regions=[REGION, [2, 4160, 64, "cuda", b"b"], [3, 4128, 32, "cpu", b"c"]])
    assert len(importing(sealed(msgpack.packb(apart)), book)) == 1


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_body_is_refused(wrong: object) -> None:
    book, _ = make_registry()
    with pytest.raises(DescriptorError) as caught:
        importing(sealed(msgpack.packb(wrong)), book)
    assert len(str(caught.value)) < 2000
    assert book.imported == []


def test_random_bytes_raise_only_descriptor_errors() -> None:
    rng = np.random.default_rng(8)
    book, registry = small_registry()
    good = registry.export()[table.HEADER_BYTES :]
    accepted = 0
    for case in range(6000):
        if case % 3 == 0:
            data = rng.bytes(int(rng.integers(0, 80)))
        elif case % 3 == 1:
            data = sealed(rng.bytes(int(rng.integers(0, 80))))
        else:
            # The right checksum around a body with a few other bytes: gets past msgpack to the fields.
            changed = bytearray(good)
            for position in rng.integers(0, len(good), size=rng.integers(1, 4)).tolist():
                changed[position] = int(rng.integers(256))
            data = sealed(bytes(changed))
        try:
            importing(data, book)
            accepted += 1
        except DescriptorError:
            pass
    assert accepted < 2000, "other names and keys are fine, but most changes are not"
    for depth in (600, 100_000):
        with pytest.raises(DescriptorError):
            importing(sealed(b"\x91" * depth), book)


@pytest.mark.parametrize(("shared", "limit_bytes"), [(True, 40), (False, 70)], ids=["one region", "a region each"])
def test_a_table_of_5000_tensors(shared: bool, limit_bytes: int) -> None:
    """About 34 bytes a tensor in one region, 62 with a region each and keys of 8 bytes, 22 of them the name; 0.1 s."""
    book, registry = make_registry()
    storage = torch.empty(5000, 16, 2)
    for i in range(5000):
        registry.register(f"model.layers.{i}.k_cache", storage[i] if shared else torch.empty(16, 2))
    start_s = time.process_time()
    data = registry.export()
    remote = importing(data, book)
    cpu_s = time.process_time() - start_s
    assert len(remote) == 5000 and all(remote.descriptor(name) == registry[name].descriptor for name in registry)
    assert len(data) / 5000 < limit_bytes
    assert cpu_s < 1.0


def test_chunks_come_together_in_any_order() -> None:
    _, registry = small_registry()
    data = registry.export()
    assert registry.export_chunks(1 << 20)[0].endswith(data) and len(registry.export_chunks(1 << 20)) == 1
    for max_bytes in (CHUNK_HEADER_BYTES + 1, 50, 64, len(data) + CHUNK_HEADER_BYTES - 1):
        pieces = registry.export_chunks(max_bytes)
        assert len(pieces) == -(-len(data) // (max_bytes - CHUNK_HEADER_BYTES)) and max(map(len, pieces)) <= max_bytes
        order = np.random.default_rng(9).permutation(len(pieces)).tolist()
        assembler = Assembler(max_table_bytes=len(data))  # what comes again does not count
        for left, i in zip(range(len(pieces) - 1, 0, -1), order, strict=False):
            assert assembler.add(pieces[i]) is None and assembler.add(pieces[i]) is None
            assert assembler.num_missing == left
        assert assembler.add(pieces[order[-1]]) == data


def test_bad_chunks_are_refused_and_change_nothing() -> None:
    book, registry = small_registry()
    pieces = registry.export_chunks(64)
    assembler = Assembler()
    assembler.add(pieces[0])
    for position in range(len(pieces[1])):
        damaged = bytearray(pieces[1])
        damaged[position] ^= 0x10
        for bad in (bytes(damaged), pieces[1][:position]):
            with pytest.raises(DescriptorError):
                assembler.add(bad)
    registry.register("more", torch.zeros(3))
    with pytest.raises(DescriptorError, match="another table"):
        assembler.add(registry.export_chunks(64)[1])
    with pytest.raises(DescriptorError, match="at most 40 bytes"):
        small = Assembler(max_table_bytes=40)
        for piece in pieces:
            small.add(piece)
    results = [assembler.add(piece) for piece in pieces[1:]]
    assert importing(results[-1] or b"", book)["one"]
    with pytest.raises(InputError, match=f"max_bytes > {CHUNK_HEADER_BYTES}"):
        registry.export_chunks(CHUNK_HEADER_BYTES)


def test_views_of_one_storage_share_a_region_until_the_last_is_gone() -> None:
    book, registry = make_registry()
    kv = torch.zeros(2, 6, 4)
    alive = weakref.ref(kv.untyped_storage())
    first, second = registry.register("k", kv[0]), registry.register("v", kv[1])
    assert first.region == second.region and len(book.registered) == 1
    assert first.region is not None and first.region.size_bytes == kv.numel() * 4
    del kv, first, second
    registry.unregister("k")
    gc.collect()
    assert len(book.registered) == 1 and alive() is not None and "k" not in registry
    registry.unregister("v")
    gc.collect()
    assert book.registered == {} and alive() is None
    with pytest.raises(InputError, match="has no tensor 'v'"):
        registry.unregister("v")


def test_memory_registered_twice_keeps_every_owner() -> None:
    class Owner: ...

    book, registry = make_registry()
    owners = [Owner(), Owner()]
    alive = [weakref.ref(owner) for owner in owners]
    for i, owner in enumerate(owners):
        registry.register_memory(f"{i}", 4096, 64, shape=[16], dtype="float32", owner=owner)
    owners.clear()
    del owner
    registry.unregister("0")
    gc.collect()
    assert len(book.registered) == 1 and alive[1]() is not None
    registry.close()
    gc.collect()
    assert book.registered == {} and [a() for a in alive] == [None, None]


def test_a_name_is_registered_once_also_by_threads() -> None:
    book, registry = make_registry()
    book.crowd, start = threading.Barrier(2), threading.Barrier(8)
    refused = []

    def register(number: int) -> None:
        start.wait(timeout=30)
        for i in range(50):
            try:
                registry.register(f"{i}", torch.full((4,), number))
            except InputError:
                refused.append(i)

    threads = [threading.Thread(target=register, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert (len(registry), len(book.registered), len(refused)) == (50, 50, 350)
    with pytest.raises(InputError, match="a tensor '7' already"):
        registry.register("7", torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64, "int64"])
def test_allocated_tensors_are_in_the_transports_memory(dtype: torch.dtype | str) -> None:
    book, registry = make_registry()
    tensor = registry.allocate("kv", (3, 4), dtype, dims=("block", "size"))
    ((region, memory),) = book.registered.values()
    assert tensor.shape == (3, 4) and tensor.data_ptr() == region.address and tensor.is_contiguous()
    assert f"torch.{registry['kv'].descriptor.dtype}" == str(tensor.dtype)
    tensor.view(torch.uint8).fill_(1)
    assert bytes(memory) == b"\1" * tensor.nbytes  # type: ignore[call-overload]
    registry.register("row", tensor[1])
    assert registry["row"].region == region
    registry.unregister("kv")
    assert tensor.shape == (3, 4), "the row still holds the memory"
    registry.unregister("row")
    assert book.registered == {} and tensor.shape == (0,), "an error from now on, not a crash"


def test_allocated_memory_is_not_lost_or_freed_early() -> None:
    book, registry = make_registry()
    tensor = registry.allocate("kv", (4,), torch.int32)
    other = torch.ones(5, dtype=torch.int32)
    tensor.set_(other)
    for shape, dtype in (((-1,), torch.int32), ((1 << 62,), torch.int32), ((4,), torch.quint8)):
        with pytest.raises(InputError):
            registry.allocate("bad", shape, dtype)
    with pytest.raises(InputError, match="already"):
        registry.allocate("kv", (4,), torch.int32)
    assert len(book.registered) == 1
    registry.close()
    assert torch.equal(tensor, other), "a tensor that was given other memory keeps it"
    assert registry.allocate("none", (0, 4), torch.int32).shape == (0, 4) and registry["none"].region is None
    with pytest.raises(InputError, match="cannot allocate"):
        make_registry(allocates=False)[1].allocate("kv", (4,), torch.int32)


def test_memory_in_use_stays_registered() -> None:
    book, registry = make_registry()
    tensor = registry.allocate("busy", (4,), torch.int32)
    registry.register("idle", torch.zeros(4))
    region = registry["busy"].region
    assert region is not None
    book.busy.add(region.region_id)
    with pytest.raises(InputError, match="in use"):
        registry.unregister("busy")
    assert registry["busy"].region == region and tensor.shape == (4,)
    with pytest.raises(InputError, match="in use"), registry:
        pass
    assert list(registry) == ["busy"]
    book.busy.clear()
    registry.close()
    registry.close()
    assert book.registered == {} and len(registry) == 0


UNUSABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "list": (lambda: [1, 2], "a list"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
    "meta": (lambda: torch.empty(3, device="meta"), "on meta without memory"),
    "conjugate": (lambda: torch.zeros(3, dtype=torch.complex64).conj(), "lazy conjugate"),
    "negation": (lambda: torch.zeros(3, dtype=torch.complex64).conj().imag, "lazy conjugate or negation"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8), "quantised"),
    "bits": (lambda: torch.zeros(3, dtype=torch.uint8).view(torch.bits8), "dtype bits8"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("make", "text"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_what_has_no_plain_memory_is_refused(make: Callable[[], Any], text: str) -> None:
    book, registry = make_registry()
    with pytest.raises(InputError, match=text):
        registry.register("x", make())
    assert book.registered == {} and len(registry) == 0


def test_gradients_do_not_matter() -> None:
    _, registry = make_registry()
    weight = torch.nn.Parameter(torch.zeros(4))
    assert registry.register("weight", weight).descriptor.address == weight.data_ptr()
    assert registry.register("double", weight * 2).nbytes == 16


def test_memory_arguments_are_checked() -> None:
    book, registry = make_registry()
    for change, text in (
        ({"shape": [17]}, "elements within the region"),
        ({"offset_bytes": -4}, "elements within the region"),
        ({"dtype": "float15"}, "no dtype 'float15'"),
        ({"dims": ["a", "b"]}, "dims: 1 different names"),
        ({"strides_bytes": [-4]}, "elements within the region"),
    ):
        with pytest.raises(InputError, match=text):
            registry.register_memory("x", 4096, 64, **({"shape": [16], "dtype": "float32"} | change))  # type: ignore[arg-type]
    assert book.registered == {}


def test_the_transport_must_reach_the_device() -> None:
    _, registry = make_registry()
    with pytest.raises(InputError) as caught:
        registry.register_memory("k", 4096, 64, shape=[16], dtype="float32", device="cuda:1")
    assert (caught.value.expected, caught.value.found) == ("a tensor on cpu", "a tensor on cuda:1")
    book, registry = make_registry(devices=("cpu", "cuda"))
    on_gpu = registry.register_memory("k", 4096, 64, shape=[16], dtype="float32", device="cuda:1")
    assert on_gpu.region is not None and on_gpu.region.device == "cuda"
    assert seen_by_peer(registry, book).descriptor("k").device == "cuda:1"
