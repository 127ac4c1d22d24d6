"""Endpoints that work: pull, push, abort, cancel, refresh; from threads and from asyncio. Contents are checked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from llmsys.core.errors import (
    DeadlineError,
    DescriptorError,
    InputError,
    LeaseExpiredError,
    TransportError,
)
from llmsys.kvdirect.blocks import Blocks
from llmsys.kvdirect.config import KvConfig
from llmsys.kvdirect.holds import Access, Outcome
from llmsys.kvdirect.tickets import Ticket
from tests.kvdirect.endpoints import WAIT_S, Job, run_threads, transfer

WRITE = Access.WRITE


def test_pull(job: Job) -> None:
    prefill, decode, connection = job.pair()
    ticket, blocks, values = prefill.hold("r", decode, 5)
    mine = decode.pool.allocate(5)
    decode.endpoint.transfer(connection, ["kv"], ticket, mine)
    decode.endpoint.complete(connection, ticket).wait(WAIT_S)
    assert np.array_equal(decode.read(mine), values)
    assert not decode.cache[[i for i in range(32) if i not in mine.ids]].any()
    assert prefill.endpoint.wait_held("r", WAIT_S) is Outcome.COMPLETED
    assert prefill.pool.num_free == 32 and not prefill.pool.is_current(blocks)
    prefill.heard.wait("ended", "r")
    assert prefill.heard.of("ended") == [("r", Outcome.COMPLETED)]


def test_a_ticket_that_was_made_before_the_peer_is_there(job: Job) -> None:
    prefill = job.worker("prefill")
    ticket, _, values = prefill.hold("r", "decode", 5)
    decode = job.worker("decode")
    mine = decode.pool.allocate(5)
    connection = decode.endpoint.connect(ticket.address, timeout_s=WAIT_S)
    decode.endpoint.transfer(connection, ["kv"], ticket, mine)
    decode.endpoint.complete(connection, ticket).wait(WAIT_S)
    assert np.array_equal(decode.read(mine), values)


def test_push(job: Job) -> None:
    decode, prefill, connection = job.pair()
    ticket, blocks, _ = decode.hold("r", prefill, 4, access=WRITE)
    mine = prefill.pool.allocate(4)
    values = prefill.fill(mine, 9)
    prefill.endpoint.transfer(connection, "kv", ticket, mine)
    prefill.endpoint.complete(connection, ticket).wait(WAIT_S)
    assert decode.endpoint.wait_held("r", WAIT_S) is Outcome.COMPLETED
    assert np.array_equal(decode.read(blocks), values)
    # What was asked for stays the holder's, until it has used it.
    assert decode.pool.is_current(blocks) and decode.pool.num_free == 28
    decode.pool.release(blocks)


def test_a_push_in_parts_as_layers_are_computed(job: Job) -> None:
    decode, prefill, connection = job.pair()
    ticket, blocks, _ = decode.hold("r", prefill, 6, access=WRITE)
    mine = prefill.pool.allocate(6)
    values = prefill.fill(mine, 9)
    pairs = np.stack([mine.ids, blocks.ids], axis=1)
    for part in (pairs[4:], pairs[:1], pairs[1:4]):
        prefill.endpoint.transfer(connection, ["kv"], ticket, part)
    prefill.endpoint.complete(connection, ticket).wait(WAIT_S)
    assert np.array_equal(decode.read(blocks), values)


def test_no_blocks(loopback: Job) -> None:
    prefill, decode, connection = loopback.pair()
    ticket, _, _ = prefill.hold("r", decode, 0)
    decode.endpoint.transfer(connection, ["kv"], ticket, []).wait(WAIT_S)
    decode.endpoint.complete(connection, ticket).wait(WAIT_S)
    assert prefill.endpoint.wait_held("r", WAIT_S) is Outcome.COMPLETED


def test_a_request_that_reads_nothing_can_be_completed(loopback: Job) -> None:
    """All of it was found in the prefix cache."""
    prefill, decode, connection = loopback.pair()
    ticket, _, _ = prefill.hold("r", decode, 3)
    decode.endpoint.complete(connection, ticket).wait(WAIT_S)
    assert prefill.pool.num_free == 32


def test_the_completion_never_overtakes_the_data(job: Job) -> None:
    """The holder overwrites blocks the moment they are free; nobody who was acknowledged sees that."""
    prefill, decode, connection = job.pair(num_blocks=256)
    for round_ in range(15):
        ticket, blocks, values = prefill.hold(f"{round_}", decode, 200, seed=round_)
        mine = decode.pool.allocate(200)
        decode.endpoint.transfer(connection, ["kv"], ticket, mine)
        completion = decode.endpoint.complete(connection, ticket)
        assert prefill.endpoint.wait_held(f"{round_}", WAIT_S) is Outcome.COMPLETED
        prefill.cache[blocks.ids] = -1.0
        completion.wait(WAIT_S)
        assert np.array_equal(decode.read(mine), values)
        decode.pool.release(mine)


def test_many_requests_at_once_from_threads(job: Job) -> None:
    """Pulls and pushes in both directions between three workers; connections are made on the way."""
    workers = [job.worker(f"worker {i}", num_blocks=128) for i in range(3)]

    def work(me: int) -> None:
        rng = np.random.default_rng(me)
        for index in range(12):
            holder, initiator = (workers[i] for i in rng.permutation(3)[:2])
            access = WRITE if rng.integers(2) else Access.READ
            transfer(holder, initiator, f"{me}.{index}", int(rng.integers(0, 9)), access, 1000 * me + index)

    run_threads([lambda me=me: work(me) for me in range(6)])  # type: ignore[misc]
    assert [worker.pool.num_free for worker in workers] == [128] * 3
    assert all(worker.endpoint.num_held == 0 for worker in workers)


def test_many_requests_at_once_from_asyncio(job: Job) -> None:
    prefill, decode, connection = job.pair(num_blocks=256)

    async def pull(index: int) -> None:
        ticket, _, values = prefill.hold(f"{index}", decode, 1 + index % 4, seed=index)
        mine = decode.pool.allocate(1 + index % 4)
        request = decode.endpoint.transfer(connection, ["kv"], ticket, mine)
        if index % 2:
            await request
        await decode.endpoint.complete(connection, ticket)
        assert np.array_equal(decode.read(mine), values)
        decode.pool.release(mine)

    async def all_of_them() -> None:
        await asyncio.wait_for(asyncio.gather(*(pull(index) for index in range(48))), WAIT_S)

    asyncio.run(all_of_them())
    for index in range(48):
        assert prefill.endpoint.wait_held(f"{index}", WAIT_S) is Outcome.COMPLETED
    assert prefill.pool.num_free == decode.pool.num_free == 256


def test_who_stops_waiting_takes_the_answer_from_nobody(loopback: Job) -> None:
    prefill, decode, connection = loopback.pair()
    ticket, _, _ = prefill.hold("r", decode, 1)
    prefill.transport.pause()
    completion = decode.endpoint.complete(connection, ticket)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(completion, 0.01)

    asyncio.run(give_up())
    with pytest.raises(DeadlineError, match="prefill"):
        completion.wait(0.01)
    assert not completion.done()
    prefill.transport.resume()
    completion.wait(WAIT_S)


def test_a_table_that_needs_several_messages(job: Job) -> None:
    prefill, decode = job.worker("prefill"), job.worker("decode")
    names = [f"{index}-{'x' * 900}" for index in range(2500)]
    storage = torch.arange(2500 * 4, dtype=torch.float32).reshape(2500, 2, 2)
    for index, name in enumerate(names):
        prefill.endpoint.tensors.register(name, storage[index])
    asked = len(prefill.endpoint.tensors.export_chunks(prefill.transport.max_message_bytes))
    assert asked > 1
    connection = decode.connect(prefill)
    assert len(connection.tensors) == 2501
    mine = torch.zeros(2500, 2, 2)
    for index, name in enumerate(names):
        decode.endpoint.tensors.register(name, mine[index])
    blocks = prefill.pool.allocate(2)
    ticket = prefill.endpoint.hold("r", prefill.pool, blocks, peer_name="decode", tensors=names)
    decode.endpoint.transfer(connection, names, ticket, [(i, i) for i in blocks.ids])
    decode.endpoint.complete(connection, ticket).wait(WAIT_S)
    assert torch.equal(mine, storage)


def test_refresh_brings_new_tensors_and_disturbs_nothing(job: Job) -> None:
    prefill, decode, connection = job.pair()
    stop = threading.Event()

    def pull() -> None:
        index = 0
        while not stop.is_set():
            index += 1
            transfer(prefill, decode, f"r{index}", 3, Access.READ, index)

    def refresh() -> None:
        try:
            for index in range(12):
                prefill.endpoint.tensors.register(f"more {index}", torch.zeros(8))
                decode.endpoint.refresh(connection, timeout_s=WAIT_S)
                assert f"more {index}" in connection.tensors
        finally:
            stop.set()

    run_threads([pull, refresh])


def test_a_refreshed_table_is_closed_when_its_transfers_have_ended(loopback: Job) -> None:
    prefill, decode, connection = loopback.pair()
    tables = [connection.tensors]
    ticket, _, values = prefill.hold("r", decode, 2)
    mine = decode.pool.allocate(2)
    decode.transport.pause()
    request = decode.endpoint.transfer(connection, ["kv"], ticket, mine)
    connection.replace_tensors(type(tables[0])(connection.peer, tables[0]._table, decode.transport))
    assert tables[0]["kv"] is not None  # the transfer needs it
    decode.transport.resume()
    request.wait(WAIT_S)
    decode.endpoint.complete(connection, ticket).wait(WAIT_S)
    assert np.array_equal(decode.read(mine), values)
    with pytest.raises(InputError, match="closed"):
        tables[0]["kv"]
    assert connection.tensors["kv"] is not None


def test_completing_again_gives_the_same_end(job: Job) -> None:
    prefill, decode, connection = job.pair()
    ticket, _, _ = prefill.hold("r", decode, 2)
    first = decode.endpoint.complete(connection, ticket)
    second = decode.endpoint.complete(connection, ticket)
    for completion in (first, second, decode.endpoint.complete(connection, ticket)):
        completion.wait(WAIT_S)
    decode.endpoint.abort(connection, ticket).wait(WAIT_S)  # too late, and all is well
    prefill.heard.wait("ended", "r")
    assert prefill.heard.of("ended") == [("r", Outcome.COMPLETED)]
    with pytest.raises(InputError, match="it was completed"):
        decode.endpoint.transfer(connection, ["kv"], ticket, [(0, ticket.blocks.ids[0])])


@pytest.mark.parametrize("access", Access)
def test_abort(job: Job, access: Access) -> None:
    prefill, decode, connection = job.pair()
    ticket, _, _ = prefill.hold("r", decode, 2, access=access)
    decode.endpoint.transfer(connection, ["kv"], ticket, decode.pool.allocate(2))
    decode.endpoint.abort(connection, ticket).wait(WAIT_S)
    assert prefill.endpoint.wait_held("r", WAIT_S) is Outcome.ABORTED
    assert prefill.pool.num_free == 32
    with pytest.raises(InputError, match="it was aborted"):
        decode.endpoint.transfer(connection, ["kv"], ticket, [(0, ticket.blocks.ids[0])])
    with pytest.raises(LeaseExpiredError):
        decode.endpoint.complete(connection, ticket).wait(WAIT_S)


def test_cancel_before_the_peer_is_there(loopback: Job) -> None:
    prefill = loopback.worker("prefill")
    prefill.hold("r", "decode", 3)
    assert prefill.endpoint.cancel("r") is Outcome.ABORTED
    assert prefill.pool.num_free == 32 and prefill.endpoint.wait_held("r", 0.0) is Outcome.ABORTED
    assert prefill.endpoint.cancel("r") is Outcome.ABORTED
    assert prefill.endpoint.cancel("never") is Outcome.UNKNOWN


@pytest.mark.parametrize("access", Access)
def test_cancel_with_a_connected_peer_needs_no_help_of_its_program(job: Job, access: Access) -> None:
    prefill, decode, connection = job.pair()
    ticket, _, _ = prefill.hold("r", decode, 3, access=access)
    decode.endpoint.transfer(connection, ["kv"], ticket, decode.pool.allocate(3))
    assert prefill.endpoint.cancel("r") is None
    assert prefill.endpoint.wait_held("r", WAIT_S) is Outcome.ABORTED
    assert prefill.pool.num_free == 32
    decode.heard.wait("cancelled", "prefill", "r")
    with pytest.raises(LeaseExpiredError, match="taken it back"):
        decode.endpoint.transfer(connection, ["kv"], ticket, [(0, ticket.blocks.ids[0])])
    with pytest.raises(LeaseExpiredError):
        decode.endpoint.complete(connection, ticket).wait(WAIT_S)


def test_cancel_waits_for_the_transfers_under_way(loopback: Job) -> None:
    prefill, decode, connection = loopback.pair()
    ticket, blocks, _ = prefill.hold("r", decode, 3, access=WRITE)
    decode.transport.pause()
    decode.endpoint.transfer(connection, ["kv"], ticket, decode.pool.allocate(3))
    assert prefill.endpoint.cancel("r") is None
    with pytest.raises(DeadlineError):
        prefill.endpoint.wait_held("r", 0.1)
    assert prefill.pool.is_current(blocks)
    decode.transport.resume()
    assert prefill.endpoint.wait_held("r", WAIT_S) is Outcome.ABORTED


def test_a_ticket_is_for_one_endpoint(loopback: Job) -> None:
    prefill, decode, connection = loopback.pair()
    other = loopback.worker("other")
    ticket, _, _ = prefill.hold("r", decode, 2)
    theirs = other.connect(prefill)
    uses: list[Callable[[Ticket], Any]] = [
        lambda ticket: other.endpoint.transfer(theirs, ["kv"], ticket, [(0, ticket.blocks.ids[0])]),
        lambda ticket: other.endpoint.complete(theirs, ticket),
        lambda ticket: other.endpoint.abort(theirs, ticket),
    ]
    for use in uses:
        with pytest.raises(DescriptorError, match="for another endpoint"):
            use(ticket)
    # One that lies about whom it is for is found out by the holder.
    forged = replace(ticket, peer_name="other")
    with pytest.raises(TransportError, match="foreign"):
        other.endpoint.complete(theirs, forged).wait(WAIT_S)
    assert prefill.endpoint.num_held == 1
    decode.endpoint.complete(connection, ticket).wait(WAIT_S)


def test_tags_of_another_time_are_refused(loopback: Job) -> None:
    prefill, decode, connection = loopback.pair()
    ticket, _, _ = prefill.hold("r", decode, 2)
    stale = replace(ticket, blocks=Blocks(ids=ticket.blocks.ids, tags=ticket.blocks.tags - 1))
    with pytest.raises(TransportError, match="stale"):
        decode.endpoint.complete(connection, stale).wait(WAIT_S)
    assert prefill.endpoint.num_held == 1


def test_a_peer_that_never_comes(job: Job) -> None:
    prefill = job.worker("prefill", kv=KvConfig(unclaimed_timeout_s=0.2))
    ticket, _, _ = prefill.hold("r", "decode", 3)
    assert prefill.endpoint.wait_held("r", WAIT_S) is Outcome.UNCLAIMED
    assert prefill.pool.num_free == 32
    decode = job.worker("decode")
    connection = decode.connect(prefill)
    decode.endpoint.transfer(connection, ["kv"], ticket, decode.pool.allocate(3))
    with pytest.raises(LeaseExpiredError, match="unclaimed"):
        decode.endpoint.complete(connection, ticket).wait(WAIT_S)


def test_waiting_for_what_is_held_unknown_or_closed(job: Job) -> None:
    prefill = job.worker("prefill")
    prefill.hold("r", "decode", 1)
    assert prefill.endpoint.wait_held("never held", WAIT_S) is Outcome.UNKNOWN
    with pytest.raises(DeadlineError, match="still held"):
        prefill.endpoint.wait_held("r", 0.05)
    found: list[Outcome] = []
    waiting = threading.Thread(target=lambda: found.append(prefill.endpoint.wait_held("r", WAIT_S)))
    waiting.start()
    prefill.endpoint.close()
    waiting.join(WAIT_S)
    assert found == [Outcome.ABORTED] and prefill.pool.num_free == 32
    prefill.endpoint.close()
    with pytest.raises(InputError, match="closed"):
        prefill.hold("late", "decode", 1)
    with pytest.raises(InputError, match="closed"):
        prefill.endpoint.connect("loopback:nobody")


def test_the_peer_is_acknowledged_even_if_the_holder_closes_at_once(job: Job) -> None:
    decode = job.worker("decode")
    for round_ in range(6):
        prefill = job.worker("prefill")
        connection = decode.connect(prefill)
        ticket, _, _ = prefill.hold("r", decode, 1)
        completion = decode.endpoint.complete(connection, ticket)
        assert prefill.endpoint.wait_held("r", WAIT_S) is Outcome.COMPLETED, round_
        prefill.endpoint.close()
        completion.wait(WAIT_S)


def test_closing_while_a_peer_may_write_keeps_the_blocks_back(job: Job) -> None:
    decode, prefill, _ = job.pair()
    decode.hold("read", prefill, 2)
    decode.hold("written", prefill, 3, access=WRITE)
    decode.endpoint.close()
    assert decode.pool.num_free == 29


def test_what_hold_refuses(loopback: Job) -> None:
    prefill = loopback.worker("prefill")
    blocks = prefill.pool.allocate(32)
    prefill.endpoint.tensors.register("small", torch.zeros(8, 4))
    for tensors, text in [(["kv", "small"], "small"), (["none"], "none")]:
        with pytest.raises(InputError, match=text):
            prefill.endpoint.hold("r", prefill.pool, blocks, peer_name="decode", tensors=tensors)
    assert prefill.endpoint.num_held == 0
    ticket = prefill.endpoint.hold("r", prefill.pool, blocks, peer_name="decode", tensors="kv")
    assert ticket.tensors == ("kv",)
    with pytest.raises(InputError, match="exists already"):
        prefill.endpoint.hold("r", prefill.pool, blocks, peer_name="decode", tensors=["kv"])


def test_what_transfer_refuses_moves_nothing(loopback: Job) -> None:
    prefill, decode, connection = loopback.pair()
    ticket, _, _ = prefill.hold("r", decode, 2)
    remote = int(ticket.blocks.ids[0])
    wrong: list[tuple[Any, Any]] = [
        (["kv", "kv"], [(0, remote)]),
        (["none"], [(0, remote)]),
        (["kv"], [(32, remote)]),
        (["kv"], [(-1, remote)]),
        (["kv"], [(0, 31)]),
        (["kv"], [0, remote]),
        (["kv"], [(0, remote), (0, int(ticket.blocks.ids[1]))]),
    ]
    for local, pairs in wrong:
        with pytest.raises(InputError):
            decode.endpoint.transfer(connection, local, ticket, pairs)
    with pytest.raises(InputError):
        decode.endpoint.transfer(connection, ["kv"], replace(ticket, tensors=("none",)), [(0, remote)])
    assert not decode.cache.any()
    decode.endpoint.complete(connection, ticket).wait(WAIT_S)
