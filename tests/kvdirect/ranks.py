"""Tensor-parallel ranks with caches of any layout, and sequences that move between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmsys.kvdirect.blocks import BlockPool, Blocks
from llmsys.kvdirect.holds import Access, Outcome
from llmsys.kvdirect.layout import VLLM_ORDER, KvLayout, Order, RelayoutCosts, source_ranks
from llmsys.kvdirect.runtime import KvEndpoint
from llmsys.kvdirect.runtime.sequence import LocalCache, transfer_sequence
from llmsys.kvdirect.tickets import Ticket
from tests.kvdirect.endpoints import WAIT_S, Job

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 3, 4, 8
UNTOUCHED = -7.0
DIMS: Order = ("kv", "block", "token", "head", "dim")
DIRECT = RelayoutCosts(segment_overhead_us=0.0, link_gb_per_s=1.0, copy_gb_per_s=1.0, kernel_launch_us=1e6)
FETCH = RelayoutCosts(segment_overhead_us=1e6, link_gb_per_s=1e3, copy_gb_per_s=1e3, kernel_launch_us=0.0)


@dataclass
class Rank:
    """A tensor-parallel rank: an endpoint, its cache, and a pool of its blocks."""

    endpoint: KvEndpoint
    cache: LocalCache
    pool: BlockPool

    @property
    def name(self) -> str:
        return self.endpoint.transport.local.name

    def tokens(self, table: Sequence[int], begin: int, end: int) -> torch.Tensor:
        """A copy of [layer, K or V, token, head of this rank, dim] of a sequence."""
        return torch.stack([view[self._places(table, begin, end)] for view in self._views()]).clone()

    def put(self, table: Sequence[int], begin: int, values: torch.Tensor) -> None:
        """Sets tokens from `begin` on; values are those of all heads of the model."""
        heads = self.cache.layout.heads
        places = self._places(table, begin, begin + values.shape[2])
        for view, layer in zip(self._views(), values, strict=True):
            view[places] = layer[:, :, heads.begin : heads.end]

    def _views(self) -> list[torch.Tensor]:
        order = self.cache.layout.order
        return [layer.permute([order.index(dim) for dim in DIMS]) for layer in self.cache.memory]

    def _places(self, table: Sequence[int], begin: int, end: int) -> tuple[Any, ...]:
        size = self.cache.layout.block_tokens
        tokens = torch.arange(begin, end)
        return slice(None), torch.as_tensor(np.array(table))[tokens // size], tokens % size


def new_ranks(job: Job, side: str, tp_size: int, block_tokens: int, order: Order = VLLM_ORDER) -> list[Rank]:
    ranks = []
    for rank in range(tp_size):
        layout = KvLayout(
            num_layers=NUM_LAYERS,
            num_blocks=24,
            block_tokens=block_tokens,
            num_kv_heads=NUM_HEADS,
            head_dim=HEAD_DIM,
            itemsize=4,
            tp_size=tp_size,
            tp_rank=rank,
            order=order,
        )
        worker = job.worker(f"{side} {rank}")
        names = tuple(f"layer {i}" for i in range(NUM_LAYERS))
        memory = tuple(torch.full(layout.shape, UNTOUCHED) for _ in names)
        for name, tensor in zip(names, memory, strict=True):
            worker.endpoint.tensors.register(name, tensor)
        cache = LocalCache(tensors=names, memory=memory, layout=layout)
        ranks.append(Rank(worker.endpoint, cache, BlockPool(24)))
    return ranks


def new_values(num_tokens: int, seed: int = 0) -> torch.Tensor:
    """[layer, K or V, token, head of the model, dim], all different from each other and from what was there."""
    count = NUM_LAYERS * 2 * num_tokens * NUM_HEADS * HEAD_DIM
    values = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).float()
    return values.view(NUM_LAYERS, 2, num_tokens, NUM_HEADS, HEAD_DIM)


def take(rank: Rank, num_tokens: int, seed: int) -> Blocks:
    """Scattered blocks for a sequence."""
    every = rank.pool.allocate(24)
    chosen = np.random.default_rng(seed).permutation(24)[: -(-num_tokens // rank.cache.layout.block_tokens)]
    rest = np.setdiff1d(np.arange(24), chosen)
    rank.pool.release(Blocks(ids=every.ids[rest], tags=every.tags[rest]))
    return Blocks(ids=every.ids[chosen], tags=every.tags[chosen])


def hold(rank: Rank, blocks: Blocks, peer: Rank, access: Access = Access.READ) -> Ticket:
    ticket = rank.endpoint.hold(
        f"for {peer.name}",
        rank.pool,
        blocks,
        peer_name=peer.name,
        tensors=rank.cache.tensors,
        access=access,
        layout=rank.cache.layout,
    )
    return Ticket.from_bytes(ticket.to_bytes())


def move(here: Rank, there: Rank, ticket: Ticket, table: Sequence[int], num_tokens: int, **options: Any) -> str:
    """A whole transfer; which method was taken."""
    connection = here.endpoint.connect(ticket.address, timeout_s=WAIT_S)
    sent = transfer_sequence(here.endpoint, connection, here.cache, ticket, table, num_tokens, **options)
    completion = here.endpoint.complete(connection, ticket)
    sent.finish(WAIT_S)
    sent.finish(WAIT_S)
    completion.wait(WAIT_S)
    assert there.endpoint.wait_held(ticket.request_id, WAIT_S) is Outcome.COMPLETED
    assert list(here.endpoint.tensors) == ["kv", *here.cache.tensors]
    return "push" if sent.plan is None else sent.plan.method


def check(rank: Rank, table: Sequence[int], values: torch.Tensor, begin: int, end: int) -> None:
    """Tokens [begin, end) are there, and nothing else was written."""
    heads = rank.cache.layout.heads
    expected = values[:, :, begin:end, heads.begin : heads.end]
    assert torch.equal(rank.tokens(table, begin, end), expected)
    written = sum(int((layer != UNTOUCHED).sum()) for layer in rank.cache.memory)
    assert written == expected.numel()


def pull(job: Job, source: Any, destination: Any, num_tokens: int, first: int, costs: RelayoutCosts) -> None:
    """A sequence from all ranks of a source, (TP, tokens a block, order), to all of a destination; checked."""
    prefill, decode = new_ranks(job, "prefill", *source), new_ranks(job, "decode", *destination)
    values = new_values(num_tokens)
    held = [take(rank, num_tokens, seed) for seed, rank in enumerate(prefill)]
    for rank, blocks in zip(prefill, held, strict=True):
        rank.put(blocks.ids.tolist(), 0, values)
    # Every rank is held once for each of its readers, before any of them reads.
    readers = {rank.name: source_ranks(len(prefill), rank.cache.layout) for rank in decode}
    tickets = {
        (reader.name, one.rank): hold(prefill[one.rank], held[one.rank], reader)
        for reader in decode
        for one in readers[reader.name]
    }
    methods = set()
    for seed, rank in enumerate(decode):
        table = take(rank, num_tokens, 100 + seed).ids.tolist()
        for one in readers[rank.name]:
            ticket = tickets[rank.name, one.rank]
            methods.add(move(rank, prefill[one.rank], ticket, table, num_tokens, first_token=first, costs=costs))
        check(rank, table, values, first, num_tokens)
    used = [prefill[index] for index in {index for _, index in tickets}]
    assert all(rank.pool.num_free == 24 for rank in used)
    if first < num_tokens and costs is FETCH and source[0] != destination[0]:
        assert methods == {"fetch"}
    if costs is DIRECT:
        assert methods == {"direct"}
