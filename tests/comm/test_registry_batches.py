"""Batches of a local and a remote view against torch, on plain memory and through a transport."""

from __future__ import annotations

import contextlib
import itertools
import queue
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from llmsys.comm.registry import (
    DTYPE_BYTES,
    Assembler,
    LocalTensor,
    RemoteRegistry,
    TensorRegistry,
    View,
    block_copies,
    copies,
)
from llmsys.comm.registry.batches import Side
from llmsys.comm.transports.base import Notification, Peer, Transport, TransportConfig
from llmsys.comm.transports.loopback import LoopbackTransport
from llmsys.core.errors import DescriptorError, InputError
from tests.comm.registry_memory import make_registry, move, random_tensor, seen_by_peer, storage_bytes

DTYPES = [getattr(torch, name) for name in DTYPE_BYTES]
SIDES: tuple[Side, ...] = ("local", "remote")
TIMEOUT_S = 60.0


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


def test_gathered_blocks_go_to_and_from_a_plain_range() -> None:
    rng = np.random.default_rng(10)
    book, registry = make_registry()
    for into, gathered in itertools.product(SIDES, SIDES):
        here, there = (torch.from_numpy(rng.integers(0, 1 << 30, size=[8, 3])) for _ in range(2))
        registry.register("here", here)
        registry.register("there", there)
        local, remote = registry["here"].slice(0, 2, 7), seen_by_peer(registry, book)["there"].slice(0, 1, 6)
        mine, yours = here[2:7], there[1:6]
        ids = rng.permutation(8)[:5]
        if gathered == "local":
            local, mine = registry["here"].blocks(0, ids), here[ids]
        else:
            remote, yours = seen_by_peer(registry, book)["there"].blocks(0, ids), there[ids]
        expected = yours.clone() if into == "local" else mine.clone()
        move(copies(local, remote, into=into), into)
        rows = (
            torch.from_numpy(ids) if into == gathered else torch.arange(2, 7) if into == "local" else torch.arange(1, 6)
        )
        assert torch.equal((here if into == "local" else there)[rows], expected)
        registry.close()


def test_backwards_on_both_sides_is_one_run() -> None:
    book, registry = make_registry()
    arrays = {"here": np.zeros(40, dtype=np.int16), "there": np.arange(40, dtype=np.int16)}
    for name, array in arrays.items():
        registry.register_memory(
            name,
            array.ctypes.data,
            80,
            shape=[30],
            dtype="int16",
            strides_bytes=[-2],
            offset_bytes=70 if name == "here" else 60,
            owner=array,
        )
    batch = copies(registry["here"], seen_by_peer(registry, book)["there"])
    move(batch, "local")
    assert batch[0].lengths.tolist() == [60]
    assert arrays["here"].tolist() == [0] * 6 + list(range(1, 31)) + [0] * 4


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


def test_block_copies_of_layers_that_lie_differently() -> None:
    rng = np.random.default_rng(11)
    book, registry = make_registry()
    here = [random_tensor(rng, torch.int64, shape=[6, 4, 3]) for _ in range(5)]
    there = [random_tensor(rng, torch.int64, shape=[9, 4, 3]) for _ in range(5)]
    for i in range(5):
        registry.register(f"here{i}", here[i])
        registry.register(f"there{i}", there[i])
    remote, ids, others = seen_by_peer(registry, book), rng.permutation(6), rng.permutation(9)[:6]
    pairs = [registry[f"here{i}"] for i in range(5)], [remote[f"there{i}"] for i in range(5)]
    move(block_copies(*pairs, ids, others), "local")
    assert all(torch.equal(a[ids], b[others]) for a, b in zip(here, there, strict=True))


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
    """On quiet cores 1.3 and 3.3 ms; the limits, of CPU time, leave room for slow ones, not for loops over blocks."""
    rng = np.random.default_rng(7)
    book, registry = make_registry()
    for i in range(num_tensors):
        registry.register(f"{i}", torch.empty(num_blocks + 100, 4))
    remote = seen_by_peer(registry, book)
    here, there = [registry[name] for name in registry], [remote[name] for name in remote]
    ids, others = (rng.permutation(num_blocks + 100)[:num_blocks] for _ in range(2))
    times_ms = []
    for _ in range(15):
        start_s = time.process_time()
        batch = block_copies(here, there, ids, others)
        times_ms.append((time.process_time() - start_s) * 1e3)
    assert sum(int(group.lengths.sum()) for group in batch) == num_tensors * num_blocks * 16
    assert min(times_ms) < limit_ms


class Inbox:
    """Keeps what arrives for a test to take."""

    def __init__(self) -> None:
        self.messages: queue.Queue[Notification] = queue.Queue()

    def peer_joined(self, peer: Peer) -> None: ...

    def peer_lost(self, peer: Peer, reason: str, left: bool) -> None: ...

    def notified(self, notification: Notification) -> None:
        self.messages.put(notification)


@contextlib.contextmanager
def endpoint(name: str) -> Iterator[tuple[Transport, TensorRegistry, Inbox]]:
    inbox = Inbox()
    with LoopbackTransport(TransportConfig(secret="s", name=name)) as transport, TensorRegistry(transport) as registry:
        transport.set_events(inbox)
        yield transport, registry, inbox


def test_decode_reads_and_writes_blocks_of_prefill() -> None:
    """KVDirect's steps: connect, exchange tables once, then any block without asking its owner."""
    with endpoint("registry-prefill") as (prefill, theirs, _), endpoint("registry-decode") as (decode, ours, inbox):
        there = [theirs.allocate(f"{i}", (24, 16, 8), torch.bfloat16).normal_() for i in range(3)]
        here = [torch.zeros(10, 16, 8, dtype=torch.bfloat16) for _ in range(3)]
        mine = [ours.register(f"{i}", tensor) for i, tensor in enumerate(here)]
        to_decode = prefill.connect(decode.local.address)
        sent = [prefill.notify(to_decode, chunk) for chunk in theirs.export_chunks(80)]
        assembler, table, peer = Assembler(), None, None
        while table is None:
            message = inbox.messages.get(timeout=TIMEOUT_S)
            table, peer = assembler.add(message.payload), message.peer
        for request in sent:
            request.wait(TIMEOUT_S)
        assert peer is not None and len(sent) > 2
        remote = RemoteRegistry.import_(peer, table, decode)
        ids, others = [9, 0, 1, 5], [3, 20, 21, 7]
        yours = [remote[f"{i}"] for i in range(3)]
        decode.read(peer, block_copies(mine, yours, ids, others)).wait(TIMEOUT_S)
        assert all(torch.equal(a[ids], b[others]) for a, b in zip(here, there, strict=True))
        heads = block_copies(
            [t.slice(2, 0, 4) for t in mine], [t.slice(2, 4, 8) for t in yours], [2], [0], into="remote"
        )
        decode.write(peer, heads).wait(TIMEOUT_S)
        assert all(torch.equal(a[2, :, :4], b[0, :, 4:]) for a, b in zip(here, there, strict=True))
        remote.close()
        for name in list(theirs):
            theirs.unregister(name)
        assert all(tensor.shape == (0,) for tensor in there)


def test_a_restarted_peer_refuses_its_old_table() -> None:
    with endpoint("registry-decode") as (decode, _, _):
        with endpoint("registry-prefill") as (prefill, theirs, _):
            theirs.register("k", torch.zeros(4))
            table = theirs.export()
            old = prefill.local.generation
        with endpoint("registry-prefill") as (again, _, _):
            peer = decode.connect(again.local.address, timeout_s=TIMEOUT_S)
            with pytest.raises(DescriptorError, match="stale") as caught:
                RemoteRegistry.import_(peer, table, decode)
            assert caught.value.found == f"generation {old}"
            assert caught.value.expected == f"generation {again.local.generation}"
