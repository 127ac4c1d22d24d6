"""Sequences between workers that lay their caches out differently: every element arrives, nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from llmsys.core.errors import DeadlineError, InputError, PeerLostError, TransportError
from llmsys.kvdirect.holds import Access
from llmsys.kvdirect.layout import FLOWKV_ORDER, HEAD_MAJOR_ORDER, VLLM_ORDER, RelayoutCosts, source_ranks
from llmsys.kvdirect.runtime.sequence import LocalCache, SequenceTransfer, transfer_sequence
from llmsys.kvdirect.tickets import Ticket
from tests.kvdirect.endpoints import WAIT_S, Job
from tests.kvdirect.ranks import (
    DIRECT,
    FETCH,
    NUM_LAYERS,
    UNTOUCHED,
    Rank,
    check,
    hold,
    move,
    new_ranks,
    new_values,
    pull,
    take,
)

CASES = [
    # source: TP, tokens a block, order; destination: the same; tokens, of which the destination has the first
    ((1, 16, VLLM_ORDER), (2, 16, VLLM_ORDER), 90, 0),
    ((4, 16, VLLM_ORDER), (2, 16, VLLM_ORDER), 90, 0),
    ((2, 16, VLLM_ORDER), (4, 16, VLLM_ORDER), 33, 16),
    ((1, 16, VLLM_ORDER), (1, 32, VLLM_ORDER), 117, 0),
    ((1, 32, VLLM_ORDER), (1, 16, VLLM_ORDER), 117, 48),
    ((2, 16, FLOWKV_ORDER), (1, 32, HEAD_MAJOR_ORDER), 77, 0),
    ((8, 16, HEAD_MAJOR_ORDER), (2, 8, VLLM_ORDER), 41, 8),
    ((1, 16, VLLM_ORDER), (1, 16, VLLM_ORDER), 1, 0),
    ((2, 16, VLLM_ORDER), (1, 16, VLLM_ORDER), 40, 40),
]
IDS = [f"TP{s[0]}x{s[1]} to TP{d[0]}x{d[1]}, {first} to {n}" for s, d, n, first in CASES]


@pytest.mark.parametrize("costs", [DIRECT, FETCH], ids=["direct", "fetch"])
@pytest.mark.parametrize(("source", "destination", "num_tokens", "first"), CASES, ids=IDS)
def test_pull(loopback: Job, source: Any, destination: Any, num_tokens: int, first: int, costs: RelayoutCosts) -> None:
    pull(loopback, source, destination, num_tokens, first, costs)


def test_pull_over_every_transport(job: Job) -> None:
    pull(job, (1, 16, VLLM_ORDER), (1, 32, VLLM_ORDER), 90, 16, FETCH)


def test_prefix_that_only_the_destination_has(loopback: Job) -> None:
    """Its blocks are unknown to the holder's table, and stay as they are."""
    (prefill,), (decode,) = new_ranks(loopback, "prefill", 1, 16), new_ranks(loopback, "decode", 1, 16)
    values = new_values(50)
    blocks = take(prefill, 50, 1)
    prefill.put(blocks.ids.tolist(), 0, values)
    table = take(decode, 50, 2).ids.tolist()
    decode.put(table, 0, values[:, :, :32] + 0.5)
    move(decode, prefill, hold(prefill, blocks, decode), table, 50, first_token=32)
    assert torch.equal(decode.tokens(table, 32, 50), values[:, :, 32:])
    assert torch.equal(decode.tokens(table, 0, 32), values[:, :, :32] + 0.5)


@pytest.mark.parametrize(("source", "destination", "num_tokens", "first"), CASES, ids=IDS)
def test_push(loopback: Job, source: Any, destination: Any, num_tokens: int, first: int) -> None:
    """Each destination rank holds its blocks once for every rank that writes to them."""
    prefill, decode = new_ranks(loopback, "prefill", *source), new_ranks(loopback, "decode", *destination)
    values = new_values(num_tokens)
    tables = []
    for seed, rank in enumerate(prefill):
        tables.append(take(rank, num_tokens, seed).ids.tolist())
        rank.put(tables[-1], 0, values)
    for seed, rank in enumerate(decode):
        blocks = take(rank, num_tokens, 100 + seed)
        sources = source_ranks(len(prefill), rank.cache.layout)
        tickets = [hold(rank, blocks, prefill[one.rank], Access.WRITE) for one in sources]
        for one, ticket in zip(sources, tickets, strict=True):
            assert move(prefill[one.rank], rank, ticket, tables[one.rank], num_tokens, first_token=first) == "push"
        check(rank, blocks.ids.tolist(), values, first, num_tokens)
        assert rank.pool.is_current(blocks)


def begin(job: Job, **options: Any) -> tuple[SequenceTransfer, Rank, Rank]:
    (prefill,), (decode, _) = new_ranks(job, "prefill", 1, 16), new_ranks(job, "decode", 2, 16)
    ticket = hold(prefill, take(prefill, 60, 1), decode)
    connection = decode.endpoint.connect(ticket.address, timeout_s=WAIT_S)
    decode.endpoint.transport.pause()  # type: ignore[attr-defined]
    sent = transfer_sequence(
        decode.endpoint, connection, decode.cache, ticket, take(decode, 60, 2).ids, 60, costs=FETCH, **options
    )
    return sent, prefill, decode


def test_staging_is_freed_when_the_transfer_fails(loopback: Job) -> None:
    sent, prefill, decode = begin(loopback)
    assert len(decode.endpoint.tensors) == 2 + NUM_LAYERS
    with pytest.raises(DeadlineError):
        sent.finish(0.05)
    with pytest.raises(InputError):
        sent.discard()
    prefill.endpoint.transport.crash()  # type: ignore[attr-defined]
    decode.endpoint.transport.resume()  # type: ignore[attr-defined]
    with pytest.raises(PeerLostError):
        sent.finish(WAIT_S)
    assert len(decode.endpoint.tensors) == 1 + NUM_LAYERS
    sent.discard()
    assert all((layer == UNTOUCHED).all() for layer in decode.cache.memory)


def test_what_is_refused_leaves_nothing_registered(loopback: Job) -> None:
    (prefill,), (decode, other) = new_ranks(loopback, "prefill", 1, 16), new_ranks(loopback, "decode", 2, 16)
    ticket = hold(prefill, take(prefill, 60, 1), decode)
    layout = prefill.cache.layout
    connection = decode.endpoint.connect(ticket.address, timeout_s=WAIT_S)
    table = take(decode, 60, 2).ids.tolist()
    wrong: list[tuple[LocalCache, Ticket, list[int], int]] = [
        (decode.cache, replace(ticket, layout=None), table, 60),
        (decode.cache, replace(ticket, layout=replace(layout, num_layers=2)), table, 60),
        (decode.cache, replace(ticket, layout=replace(layout, num_blocks=25)), table, 60),
        (decode.cache, replace(ticket, layout=replace(layout, order=FLOWKV_ORDER)), table, 60),
        (decode.cache, replace(ticket, layout=replace(layout, head_dim=4)), table, 60),
        (decode.cache, replace(ticket, tensors=("layer 0", "layer 1", "none")), table, 60),
        (decode.cache, replace(ticket, tensors=("layer 0", "layer 1", "kv")), table, 60),
        (decode.cache, ticket, table[:-1], 60),
        (decode.cache, ticket, table, 70),
        (decode.cache, ticket, [*table[:-1], 24], 60),
        (other.cache, ticket, table, 60),
    ]
    for cache, bad, blocks, num_tokens in wrong:
        with pytest.raises(InputError):
            transfer_sequence(decode.endpoint, connection, cache, bad, blocks, num_tokens, costs=FETCH)
    assert list(decode.endpoint.tensors) == ["kv", *decode.cache.tensors]
    decode.endpoint.abort(connection, ticket).wait(WAIT_S)
    with pytest.raises((InputError, TransportError)):
        transfer_sequence(decode.endpoint, connection, decode.cache, ticket, table, 60, costs=FETCH)
    assert list(decode.endpoint.tensors) == ["kv", *decode.cache.tensors]


def test_a_cache_that_is_not_as_it_says(loopback: Job) -> None:
    (rank,) = new_ranks(loopback, "prefill", 1, 16)
    cache = rank.cache
    wrong: list[dict[str, Any]] = [
        {"tensors": cache.tensors[:-1]},
        {"memory": cache.memory[:-1]},
        {"memory": (*cache.memory[:-1], cache.memory[0][:1])},
        {"memory": (*cache.memory[:-1], cache.memory[0].double())},
        {"memory": (*cache.memory[:-1], torch.zeros(cache.layout.shape[::-1]).permute(4, 3, 2, 1, 0))},
    ]
    for change in wrong:
        with pytest.raises(InputError):
            replace(cache, **change)
