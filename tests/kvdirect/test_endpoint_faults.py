"""Endpoints whose peers stop, die, restart, or lose their connection: no block is used twice, nobody hangs or leaks."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmsys.comm.transports.base import Peer
from llmsys.core.errors import (
    DeadlineError,
    DescriptorError,
    InfeasibleError,
    LeaseExpiredError,
    LlmsysError,
    PeerLostError,
    TransportError,
)
from llmsys.kvdirect import messages
from llmsys.kvdirect.config import KvConfig
from llmsys.kvdirect.holds import Access, Outcome
from llmsys.kvdirect.runtime import Connection
from tests.kvdirect.endpoints import WAIT_S, Job, Worker, run_threads, transfer, until

READ, WRITE = Access.READ, Access.WRITE
LEASE_S = 0.3


def lose_lease(stopped: Worker, others: list[Worker]) -> None:
    """Stops a worker until the others have given it up, and lets it go on."""
    stopped.transport.pause()
    for other in others:
        other.heard.wait("lost", stopped.name)
    stopped.transport.resume()
    for other in others:
        stopped.heard.wait("lost", other.name)


@pytest.mark.parametrize("moved", [False, True], ids=["before the data", "after the data"])
def test_a_reader_that_was_stopped_beyond_its_lease_is_not_acknowledged(loopback: Job, moved: bool) -> None:
    prefill, decode, connection = loopback.pair(lease_s=LEASE_S)
    ticket, blocks, _ = prefill.hold("r", decode, 3)
    mine = decode.pool.allocate(3)
    if moved:
        decode.endpoint.transfer(connection, ["kv"], ticket, mine).wait(WAIT_S)
    lose_lease(decode, [prefill])
    assert prefill.endpoint.wait_held("r", WAIT_S) is Outcome.PEER_LOST
    assert prefill.pool.num_free == 32 and not prefill.pool.is_current(blocks)
    with pytest.raises(PeerLostError):
        decode.endpoint.complete(connection, ticket).wait(WAIT_S)
    with pytest.raises(PeerLostError, match="connect"):
        decode.endpoint.transfer(connection, ["kv"], ticket, mine)
    # Over a new connection the holder says what became of it.
    again = decode.connect(prefill)
    assert again is not connection and not connection.alive
    with pytest.raises(LeaseExpiredError, match="peer_lost"):
        decode.endpoint.complete(again, ticket).wait(WAIT_S)


def test_a_lost_writer_cannot_begin_again_and_its_blocks_rest(loopback: Job) -> None:
    decode, prefill, _ = loopback.pair(lease_s=LEASE_S, kv=KvConfig(quarantine_s=1.0))
    ticket, blocks, before = decode.hold("r", prefill, 3, access=WRITE)
    mine = prefill.pool.allocate(3)
    prefill.fill(mine, 7)
    prefill.transport.pause()
    assert decode.endpoint.wait_held("r", WAIT_S) is Outcome.PEER_LOST
    assert decode.endpoint.num_quarantined_blocks == 3 and decode.pool.num_free == 29
    prefill.transport.resume()
    prefill.heard.wait("lost", decode.name)
    again = prefill.connect(decode)
    with pytest.raises(LeaseExpiredError, match="taken it back"):
        prefill.endpoint.transfer(again, ["kv"], ticket, mine)
    assert np.array_equal(decode.read(blocks), before)
    until(lambda: decode.pool.num_free == 32, "the end of the quarantine")
    assert decode.endpoint.num_quarantined_blocks == 0


def test_a_writer_that_comes_too_late_cannot_begin(job: Job) -> None:
    decode = job.worker("decode", kv=KvConfig(unclaimed_timeout_s=0.1))
    ticket, blocks, before = decode.hold("r", "prefill", 3, access=WRITE)
    assert decode.endpoint.wait_held("r", WAIT_S) is Outcome.UNCLAIMED
    prefill = job.worker("prefill")
    mine = prefill.pool.allocate(3)
    prefill.fill(mine, 7)
    with pytest.raises(LeaseExpiredError, match="taken it back"):
        prefill.endpoint.transfer(prefill.connect(decode), ["kv"], ticket, mine)
    assert np.array_equal(decode.read(blocks), before)


def test_an_answer_that_was_lost_can_be_asked_for_again(loopback: Job) -> None:
    """The holder has completed the request; the connection ends before the answer arrives."""
    prefill, decode, connection = loopback.pair()
    ticket, _, values = prefill.hold("r", decode, 3)
    mine = decode.pool.allocate(3)
    send = prefill.endpoint._outbox.send

    def lose_the_answer(peer: Peer, message: messages.Message) -> None:
        if isinstance(message, messages.Ended):
            prefill.transport.disconnect(peer)
        send(peer, message)

    prefill.endpoint._outbox.send = lose_the_answer  # type: ignore[method-assign]
    decode.endpoint.transfer(connection, ["kv"], ticket, mine)
    with pytest.raises(PeerLostError):
        decode.endpoint.complete(connection, ticket).wait(WAIT_S)
    prefill.endpoint._outbox.send = send  # type: ignore[method-assign]
    decode.endpoint.complete(decode.connect(prefill), ticket).wait(WAIT_S)
    assert np.array_equal(decode.read(mine), values)
    prefill.heard.wait("ended", "r")
    assert prefill.heard.of("ended") == [("r", Outcome.COMPLETED)]


@pytest.mark.parametrize("access", Access)
def test_a_failed_transfer_is_never_acknowledged(loopback: Job, access: Access) -> None:
    """The holder takes the memory away; complete, also repeated, says that the transfer failed."""
    holder, initiator, connection = loopback.pair()
    ticket, _, _ = holder.hold("r", initiator, 3, access=access)
    mine = initiator.pool.allocate(3)
    initiator.endpoint.transfer(connection, ["kv"], ticket, [(mine.ids[0], ticket.blocks.ids[0])]).wait(WAIT_S)
    holder.endpoint.tensors.unregister("kv")
    failing = initiator.endpoint.transfer(connection, ["kv"], ticket, [(mine.ids[1], ticket.blocks.ids[1])])
    for _ in range(3):
        with pytest.raises(TransportError, match="released the memory"):
            initiator.endpoint.complete(connection, ticket).wait(WAIT_S)
    assert failing.exception() is not None
    # A reader has finished all the same; what was written in part is not announced, and is freed.
    outcome = Outcome.COMPLETED if access is READ else Outcome.ABORTED
    assert holder.endpoint.wait_held("r", WAIT_S) is outcome
    assert holder.pool.num_free == 32


def restart(job: Job, worker: Worker) -> Worker:
    worker.transport.crash()
    return job.worker(worker.name)


def test_tickets_and_connections_of_a_former_life(loopback: Job) -> None:
    prefill, decode, connection = loopback.pair()
    ticket, _, _ = prefill.hold("r", decode, 2)
    prefill = restart(loopback, prefill)
    decode.heard.wait("lost", "prefill")
    again = decode.connect(prefill)
    assert again.peer.generation != connection.peer.generation
    for use in uses_of(decode, again, ticket):
        with pytest.raises(DescriptorError, match="generation"):
            use()
    with pytest.raises(PeerLostError):
        decode.endpoint.transfer(connection, ["kv"], ticket, decode.pool.allocate(2))
    with pytest.raises(PeerLostError):
        decode.endpoint.complete(connection, ticket).wait(WAIT_S)
    transfer(prefill, decode, "r", 2)  # its ids begin anew


def uses_of(worker: Worker, connection: Connection, ticket: Any) -> list[Callable[[], Any]]:
    return [
        lambda: worker.endpoint.transfer(connection, ["kv"], ticket, [(0, ticket.blocks.ids[0])]),
        lambda: worker.endpoint.complete(connection, ticket),
        lambda: worker.endpoint.abort(connection, ticket),
    ]


def test_a_restarted_reader_does_not_inherit_what_was_held_for_it(loopback: Job) -> None:
    prefill, decode, _ = loopback.pair()
    ticket, _, _ = prefill.hold("r", decode, 2)
    decode = restart(loopback, decode)
    assert prefill.endpoint.wait_held("r", WAIT_S) is Outcome.PEER_LOST
    with pytest.raises(LeaseExpiredError):
        decode.endpoint.complete(decode.connect(prefill), ticket).wait(WAIT_S)
    transfer(prefill, decode, "another", 2)


@pytest.mark.parametrize("round_", range(8))
def test_a_peer_that_dies_while_many_connect(loopback: Job, round_: int) -> None:
    """Every call ends, well or with an error that says why; afterwards the restarted peer can be used."""
    prefills = [loopback.worker(f"prefill {i}", lease_s=LEASE_S) for i in range(2)]
    decode = loopback.worker("decode", lease_s=LEASE_S)
    start = threading.Barrier(7)
    ends: list[Connection | LlmsysError] = []

    def connect(prefill: Worker) -> None:
        start.wait(WAIT_S)
        try:
            ends.append(decode.connect(prefill))
        except LlmsysError as error:
            ends.append(error)

    def kill() -> None:
        start.wait(WAIT_S)
        prefills[0].transport.crash()

    run_threads([kill, *(lambda i=i: connect(prefills[i % 2]) for i in range(6))])  # type: ignore[misc]
    assert len(ends) == 6
    connected = [end for end in ends if isinstance(end, Connection) and end.peer.name == "prefill 1"]
    assert len(connected) == 3 and len(set(connected)) == 1
    transfer(loopback.worker("prefill 0"), decode, "r", 1)


def test_a_peer_that_is_stopped_while_it_is_connected_to(loopback: Job) -> None:
    prefill, decode = loopback.worker("prefill"), loopback.worker("decode")
    prefill.transport.pause()
    with pytest.raises(DeadlineError, match="prefill"):
        decode.endpoint.connect(prefill.transport.local.address, timeout_s=0.2)
    # A short try of one thread does not shorten that of another.
    short_error: list[LlmsysError] = []

    def short() -> None:
        with pytest.raises(DeadlineError) as caught:
            decode.endpoint.connect(prefill.transport.local.address, timeout_s=0.2)
        short_error.append(caught.value)
        prefill.transport.resume()

    run_threads([short, lambda: decode.connect(prefill) and None])
    assert short_error
    transfer(prefill, decode, "r", 1)


def test_a_peer_that_accepts_but_never_answers(loopback: Job) -> None:
    """A transport without an endpoint on top."""
    decode = loopback.worker("decode")
    with loopback.new_transport("bare") as bare, pytest.raises(DeadlineError, match="table of tensors"):
        decode.endpoint.connect(bare.local.address, timeout_s=0.3)


def test_a_peer_that_dies_before_it_answers(loopback: Job) -> None:
    """Whoever connects hears of it at once, not when its time is over."""
    decode = loopback.worker("decode")
    bare: Any = loopback.new_transport("bare")

    def die() -> None:
        decode.heard.wait("joined", "bare")
        bare.crash()

    def connect() -> None:
        with pytest.raises(TransportError) as caught:
            decode.endpoint.connect(bare.local.address, timeout_s=WAIT_S)
        assert not isinstance(caught.value, DeadlineError)

    run_threads([connect, die])


def test_closing_ends_what_waits(loopback: Job) -> None:
    prefill, decode, connection = loopback.pair()
    ticket, _, _ = prefill.hold("r", decode, 2)
    prefill.transport.pause()
    completion = decode.endpoint.complete(connection, ticket)
    ends: list[LlmsysError] = []
    begun = threading.Barrier(3)

    def wait_for(call: Callable[[], Any]) -> None:
        begun.wait(WAIT_S)
        with pytest.raises(LlmsysError) as caught:
            call()
        ends.append(caught.value)

    def close() -> None:
        begun.wait(WAIT_S)
        decode.endpoint.close()

    run_threads(
        [
            lambda: wait_for(lambda: completion.wait(WAIT_S)),
            lambda: wait_for(lambda: decode.endpoint.refresh(connection, timeout_s=WAIT_S)),
            close,
        ]
    )
    assert len(ends) == 2 and not any(isinstance(error, DeadlineError) for error in ends)


@pytest.mark.parametrize("seed", [1, 2])
def test_workers_come_and_go_while_others_transfer(loopback: Job, seed: int) -> None:
    """Requests of those that stay all succeed; of those that die each ends, and what was acknowledged is right."""
    stay = [loopback.worker(f"stays {i}", num_blocks=64) for i in range(3)]
    stop = threading.Event()
    num_acknowledged = [0, 0]

    def serve(me: int) -> None:
        rng = np.random.default_rng([seed, me])
        index = 0
        while not stop.is_set():
            index += 1
            holder, initiator = (stay[i] for i in rng.permutation(3)[:2])
            access = WRITE if rng.integers(2) else READ
            transfer(holder, initiator, f"{me}.{index}", int(rng.integers(1, 5)), access, seed=index)
            num_acknowledged[0] += 1

    def churn() -> None:
        rng = random.Random(seed)
        try:
            for life in range(15):
                goes = loopback.worker(f"goes {life % 2}", num_blocks=64)
                one_request(goes, stay[0], f"{seed}.{life}", rng, num_acknowledged)
                (goes.transport.crash if rng.random() < 0.7 else goes.endpoint.close)()
                loopback.workers.remove(goes)
        finally:
            stop.set()

    run_threads([churn, *(lambda me=me: serve(me) for me in range(3))])  # type: ignore[misc]
    assert num_acknowledged[0] > 15
    until(lambda: not any(worker.endpoint.num_held for worker in stay), "the end of all holds")
    assert all(worker.pool.num_free + worker.endpoint.num_quarantined_blocks == 64 for worker in stay)


def one_request(goes: Worker, stays: Worker, name: str, rng: random.Random, num_acknowledged: list[int]) -> None:
    """From or to a worker that is about to die, perhaps in the middle of it."""
    holder, initiator = rng.choice([(goes, stays), (stays, goes)])
    try:
        ticket, _, values = holder.hold(f"doomed {name}", initiator, rng.randint(1, 8))
        mine = initiator.pool.allocate(len(ticket.blocks))
    except InfeasibleError:
        return
    try:
        connection = initiator.connect(holder)
        initiator.endpoint.transfer(connection, ["kv"], ticket, mine)
        completion = initiator.endpoint.complete(connection, ticket)
        if rng.random() < 0.5:
            completion.wait(WAIT_S)
            assert np.array_equal(initiator.read(mine), values)
            num_acknowledged[1] += 1
        else:
            goes.transport.crash()
            with pytest.raises(LlmsysError):
                completion.wait(WAIT_S)
                raise PeerLostError("it was quicker", expected="-", found="-", fix="-")
    finally:
        initiator.pool.release(mine)


def test_memory_of_a_dead_peer_is_let_go(loopback: Job) -> None:
    decode = loopback.worker("decode")
    for life in range(3):
        prefill = loopback.worker("prefill")
        transfer(prefill, decode, f"{life}", 2)
        prefill.transport.crash()
        decode.heard.wait("lost", "prefill", prefill.transport.local.generation)
        assert not decode.transport._memory._remote
        assert not decode.endpoint._dialler._alive
    assert torch.isfinite(decode.cache).all()
