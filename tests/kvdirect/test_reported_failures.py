"""What users of KV transfer report elsewhere, each as a short test that it does not happen here.

Docstrings name the issues. Failures of one machine's stack (drivers, fabrics, launchers) are not among them.
"""

from __future__ import annotations

import mmap
import queue
import threading
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
    LlmsysError,
    PeerLostError,
    TransportError,
)
from llmsys.kvdirect.blocks import BlockPool
from llmsys.kvdirect.config import KvConfig
from llmsys.kvdirect.holds import Access, Outcome
from llmsys.kvdirect.layout import VLLM_ORDER
from llmsys.kvdirect.runtime import Listener
from tests.kvdirect.endpoints import BLOCK_SHAPE, WAIT_S, Job, run_threads, transfer
from tests.kvdirect.holder import Holder
from tests.kvdirect.ranks import DIRECT, FETCH, pull

READ, WRITE = Access.READ, Access.WRITE
# The last is Linux's MAP_NORESERVE, which Python does not name.
UNRESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000


# -- silent corruption -----------------------------------------------------------------------------------------------


def test_a_stale_read_is_not_acknowledged(loopback: Job) -> None:
    """vllm#52234: a stale read returned other tokens with success. Here the tags of the ticket are not current."""
    prefill, decode, connection = loopback.pair(kv=KvConfig(unclaimed_timeout_s=0.05))
    ticket, _, _ = prefill.hold("late", "decode", 2)
    decode_ticket = replace(ticket, request_id="late")
    prefill.endpoint.cancel("late")
    assert prefill.endpoint.wait_held("late", WAIT_S) is Outcome.ABORTED
    prefill.hold("next", decode, 2, seed=5)  # has the same blocks now
    with pytest.raises(LeaseExpiredError):
        decode.endpoint.transfer(connection, ["kv"], decode_ticket, decode.pool.allocate(2))
        decode.endpoint.complete(connection, decode_ticket).wait(WAIT_S)


def test_a_read_out_of_range_is_refused(loopback: Job) -> None:
    """vllm#52234: an out-of-range read."""
    prefill, decode, connection = loopback.pair()
    ticket, _, _ = prefill.hold("r", decode, 2)
    for local, remote in [(0, 31), (32, int(ticket.blocks.ids[0])), (0, -1), (0, 1 << 40)]:
        with pytest.raises(InputError):
            decode.endpoint.transfer(connection, ["kv"], ticket, [(local, remote)])


def test_blocks_are_not_reused_before_the_writer_has_finished(loopback: Job) -> None:
    """sglang#24527: pages were reused while they were still written."""
    decode, prefill, connection = loopback.pair()
    ticket, blocks, _ = decode.hold("r", prefill, 2, access=WRITE)
    prefill.transport.pause()
    prefill.endpoint.transfer(connection, ["kv"], ticket, prefill.pool.allocate(2))
    with pytest.raises(InputError):
        decode.pool.release(blocks)
    assert decode.endpoint.cancel("r") is None
    assert not set(decode.pool.allocate(30).ids.tolist()) & set(blocks.ids.tolist())
    prefill.transport.resume()
    assert decode.endpoint.wait_held("r", WAIT_S) is Outcome.ABORTED


def test_transfers_at_once_do_not_mix(job: Job) -> None:
    """vllm#44238: concurrent transfers got each other's blocks."""
    prefill, decode, connection = job.pair(num_blocks=64)
    requests = []
    for index in range(8):
        ticket, _, values = prefill.hold(f"{index}", decode, 6, seed=index)
        mine = decode.pool.allocate(6)
        requests.append((ticket, values, mine, ticket.pairs_with(mine)))
    for part in range(3):
        for ticket, _, _, pairs in requests:
            decode.endpoint.transfer(connection, ["kv"], ticket, pairs[2 * part : 2 * part + 2])
    for ticket, values, mine, _ in requests:
        decode.endpoint.complete(connection, ticket).wait(WAIT_S)
        assert np.array_equal(decode.read(mine), values)


def test_preemption_does_not_free_blocks_that_are_read(loopback: Job) -> None:
    """vllm#52360: a preempted request's blocks were freed under its reader."""
    prefill, decode, _ = loopback.pair()
    _, blocks, _ = prefill.hold("r", decode, 2)
    with pytest.raises(InputError, match="cancel"):
        prefill.pool.release(blocks)
    assert prefill.endpoint.cancel("r") is None
    assert prefill.endpoint.wait_held("r", WAIT_S) is Outcome.ABORTED


def test_tp2_and_tp1_agree(loopback: Job) -> None:
    """TensorRT-LLM#6507: other output with TP2 than with TP1."""
    pull(loopback, (2, 16, VLLM_ORDER), (1, 16, VLLM_ORDER), 50, 0, DIRECT)


def test_every_block_lands_at_its_place(loopback: Job) -> None:
    """DistServe#16: a wrong token after the transfer."""
    prefill, decode, connection = loopback.pair()
    ticket, _, values = prefill.hold("r", decode, 12)
    mine = decode.pool.allocate(12)
    order = np.random.default_rng(1).permutation(12)
    decode.endpoint.transfer(connection, ["kv"], ticket, ticket.pairs_with(mine)[order])
    decode.endpoint.complete(connection, ticket).wait(WAIT_S)
    assert np.array_equal(decode.read(mine), values)


# -- leaks -----------------------------------------------------------------------------------------------------------


def test_a_load_from_a_silent_prefill_is_given_up(loopback: Job) -> None:
    """vllm#46283: decode's blocks were never reclaimed when prefill went silent."""
    prefill, decode, connection = loopback.pair(lease_s=0.3)
    ticket, _, _ = prefill.hold("r", decode, 2)
    prefill.transport.pause()
    mine = decode.pool.allocate(2)
    request = decode.endpoint.transfer(connection, ["kv"], ticket, mine)
    with pytest.raises((PeerLostError, LeaseExpiredError)):
        decode.endpoint.complete(connection, ticket).wait(WAIT_S)
    assert request.done()  # so nothing is written any more
    decode.pool.release(mine)


@pytest.mark.parametrize("way", ["never connects", "aborts", "says nothing"])
def test_a_request_that_decode_rejects_does_not_strand_blocks(loopback: Job, way: str) -> None:
    """vllm#41269: decode rejected a request before admission, and prefill kept its blocks."""
    prefill = loopback.worker("prefill", kv=KvConfig(unclaimed_timeout_s=0.1))
    decode = loopback.worker("decode")
    connection = None if way == "never connects" else decode.connect(prefill)
    ticket, _, _ = prefill.hold("r", decode, 4)
    if connection is not None and way == "aborts":
        decode.endpoint.abort(connection, ticket).wait(WAIT_S)
    elif way == "says nothing":
        assert prefill.endpoint.cancel("r") is None
    outcome = Outcome.UNCLAIMED if way == "never connects" else Outcome.ABORTED
    assert prefill.endpoint.wait_held("r", WAIT_S) is outcome
    assert prefill.pool.num_free == 32


def test_a_dead_peers_memory_is_let_go(loopback: Job) -> None:
    """vllm#58063: a dead peer's memory stayed mapped."""
    decode, prefill = loopback.worker("decode"), loopback.worker("prefill")
    transfer(prefill, decode, "r", 2)
    assert decode.transport._memory._remote
    prefill.transport.crash()
    decode.heard.wait("lost", "prefill")
    assert not decode.transport._memory._remote and not decode.endpoint._dialler._alive


def test_allocated_tensors_cannot_be_used_after_their_memory_is_gone(job: Job) -> None:
    """vllm#58063 from the other side: a tensor of a closed endpoint would point to memory that is unmapped."""
    prefill = job.worker("prefill")
    allocated = prefill.endpoint.tensors.allocate("more", (4, 64), "float32")
    prefill.endpoint.close()
    assert allocated.numel() == 0


# -- hangs -----------------------------------------------------------------------------------------------------------


def test_tp1_to_tp2_ends(loopback: Job) -> None:
    """vllm#14952: TP1 to TP2 hung."""
    pull(loopback, (1, 16, VLLM_ORDER), (2, 16, VLLM_ORDER), 50, 0, FETCH)


def test_connecting_has_a_deadline(loopback: Job) -> None:
    """sglang#39367: stuck in bootstrap."""
    prefill, decode = loopback.worker("prefill"), loopback.worker("decode")
    prefill.transport.pause()
    with pytest.raises(DeadlineError, match="prefill"):
        decode.endpoint.connect(prefill.transport.local.address, timeout_s=0.1)


def test_the_first_transfer_is_like_any_other(loopback: Job) -> None:
    """sglang#6320: the first transfer hung."""
    for index in range(4):
        prefill, decode = loopback.worker(f"prefill {index}"), loopback.worker(f"decode {index}")
        transfer(prefill, decode, "first", 2)


def test_heartbeats_renew_the_lease(job: Job) -> None:
    """vllm#53095: a request in progress lost its lease although its peer was alive."""
    prefill, decode, connection = job.pair(lease_s=0.4, kv=KvConfig(unclaimed_timeout_s=0.2))
    ticket, _, _ = prefill.hold("r", decode, 2)
    with pytest.raises(DeadlineError):
        prefill.endpoint.wait_held("r", 1.5)
    decode.endpoint.transfer(connection, ["kv"], ticket, decode.pool.allocate(2))
    decode.endpoint.complete(connection, ticket).wait(WAIT_S)


def test_a_hold_that_does_not_expire_keeps_no_other_from_it() -> None:
    """vllm#58222: the lease reaper stopped at its first entry."""
    holder = Holder()
    holder.open("claimed", peer="other", now_s=0.0)
    holder.open("late", now_s=0.0)
    holder.table.peer_joined(1, "other", 7)
    holder.table.expire(60.0)
    holder.table.tell()
    assert holder.ended == [("late", Outcome.UNCLAIMED)]


# -- restarts and membership -----------------------------------------------------------------------------------------


def test_a_restarted_peer_is_used_again_and_its_old_tickets_are_not(loopback: Job) -> None:
    """vllm#49238, nixl#1986: a crash after the restart of a peer."""
    prefill, decode, _ = loopback.pair()
    ticket, _, _ = prefill.hold("r", decode, 2)
    prefill.transport.crash()
    prefill = loopback.worker("prefill")
    connection = decode.connect(prefill)
    with pytest.raises(DescriptorError):
        decode.endpoint.transfer(connection, ["kv"], ticket, decode.pool.allocate(2))
    transfer(prefill, decode, "r", 2)


def test_disconnecting_while_others_connect(job: Job) -> None:
    """nixl#2109: a race of close and reconnect."""
    prefill, decode = job.worker("prefill"), job.worker("decode")
    stop = threading.Event()

    def connect() -> None:
        try:
            for _ in range(12):
                try:
                    connection = decode.connect(prefill)
                    decode.endpoint.refresh(connection, timeout_s=WAIT_S)
                except TransportError:
                    continue
        finally:
            stop.set()

    def disconnect() -> None:
        while not stop.wait(0.005):
            for peer in decode.endpoint.members():
                decode.transport.disconnect(peer)

    run_threads([connect, disconnect])
    transfer(prefill, decode, "r", 2)


def test_adding_one_peer_many_times_at_once(loopback: Job) -> None:
    """LightLLM#1470: concurrent add of one peer aborted."""
    prefill, decode = loopback.worker("prefill"), loopback.worker("decode")
    found: list[Any] = []
    run_threads([lambda: found.append(decode.connect(prefill))] * 8)
    assert len(found) == 8 and len(set(found)) == 1 and len(prefill.endpoint.members()) == 1


def test_a_tensor_that_came_later_is_found_after_a_refresh(loopback: Job) -> None:
    """Mooncake#2177: a descriptor was missing."""
    prefill, decode, connection = loopback.pair()
    prefill.endpoint.tensors.register("later", torch.ones(8, 4))
    mine = torch.zeros(8, 4)
    decode.endpoint.tensors.register("later", mine)
    blocks = prefill.pool.allocate(2)
    ticket = prefill.endpoint.hold("r", prefill.pool, blocks, peer_name="decode", tensors=["later"])
    with pytest.raises(InputError, match="no tensor 'later'"):
        decode.endpoint.transfer(connection, ["later"], ticket, [(i, i) for i in blocks.ids])
    decode.endpoint.refresh(connection)
    decode.endpoint.transfer(connection, ["later"], ticket, [(i, i) for i in blocks.ids])
    decode.endpoint.complete(connection, ticket).wait(WAIT_S)
    assert mine.sum() == 8


# -- load ------------------------------------------------------------------------------------------------------------


def test_sustained_load(job: Job) -> None:
    """sglang#23272, sglang#9266, sglang#15674: failures under sustained or high concurrency."""
    prefill, decode, _ = job.pair(num_blocks=256)

    def work(me: int) -> None:
        for index in range(20):
            transfer(prefill, decode, f"{me}.{index}", 1 + index % 5, WRITE if index % 2 else READ, 100 * me + index)

    run_threads([lambda me=me: work(me) for me in range(8)])  # type: ignore[misc]
    assert prefill.pool.num_free == decode.pool.num_free == 256


def test_completions_of_unknown_and_ended_requests_are_answered(loopback: Job) -> None:
    """vllm#25562: KeyError on completion."""
    prefill, decode, connection = loopback.pair()
    ticket, _, _ = prefill.hold("r", decode, 2)
    with pytest.raises(LeaseExpiredError, match="unknown"):
        decode.endpoint.complete(connection, replace(ticket, request_id="unheard of")).wait(WAIT_S)
    for _ in range(2):
        decode.endpoint.complete(connection, ticket).wait(WAIT_S)


def test_other_block_sizes_are_laid_out_anew_or_refused(loopback: Job) -> None:
    """vllm#42895: block sizes that differ between prefill (TP4) and decode."""
    prefill, decode, connection = loopback.pair()
    decode.endpoint.tensors.register("other", torch.zeros(32, 2 * BLOCK_SHAPE[0], BLOCK_SHAPE[1]))
    ticket, _, _ = prefill.hold("r", decode, 2)
    with pytest.raises(InputError, match="shapes"):
        decode.endpoint.transfer(connection, ["other"], ticket, decode.pool.allocate(2))
    pull(loopback, (4, 16, VLLM_ORDER), (2, 32, VLLM_ORDER), 70, 0, FETCH)


def test_a_bad_block_count_harms_only_its_request(loopback: Job) -> None:
    """lmdeploy#4965: a bad block count killed the decode loop."""
    prefill, decode, connection = loopback.pair()
    ticket, _, _ = prefill.hold("r", decode, 3)
    with pytest.raises(InputError, match="3 local blocks"):
        decode.endpoint.transfer(connection, ["kv"], ticket, decode.pool.allocate(2))
    transfer(prefill, decode, "another", 3)
    decode.endpoint.complete(connection, ticket).wait(WAIT_S)


def test_what_was_pushed_is_there_when_the_holder_hears_of_it(job: Job) -> None:
    """LMCache#1547: a cache miss right after a transfer."""
    found: queue.Queue[torch.Tensor] = queue.Queue()

    class Reader(Listener):
        def ended(self, request_id: str, outcome: Outcome) -> None:
            found.put(decode.cache.clone())

    decode, prefill = job.worker("decode", listener=Reader()), job.worker("prefill")
    connection = prefill.connect(decode)
    ticket, blocks, _ = decode.hold("r", prefill, 3, access=WRITE)
    mine = prefill.pool.allocate(3)
    values = prefill.fill(mine, 3)
    prefill.endpoint.transfer(connection, ["kv"], ticket, mine)
    prefill.endpoint.complete(connection, ticket).wait(WAIT_S)
    assert np.array_equal(found.get(timeout=WAIT_S)[blocks.ids].numpy(), values)


# -- without an issue ------------------------------------------------------------------------------------------------


def test_completions_at_once_are_all_acknowledged(loopback: Job) -> None:
    """Two completions shared one slot, and one was lost (KVDirect's public code)."""
    prefill, decode, connection = loopback.pair(num_blocks=128)
    tickets = [prefill.hold(f"{index}", decode, 1)[0] for index in range(100)]
    completions = [decode.endpoint.complete(connection, ticket) for ticket in tickets]
    for completion in completions:
        completion.wait(WAIT_S)
    assert prefill.pool.num_free == 128


def test_a_message_does_not_overtake_the_data(job: Job) -> None:
    """A notification overtook the data that it announced."""
    seen: list[bool] = []

    class Reader(Listener):
        def received(self, peer: Any, payload: bytes) -> None:
            seen.append(bool((decode.cache[torch.from_numpy(blocks.ids)] == int(payload)).all()))

    decode = job.worker("decode", num_blocks=512, listener=Reader())
    prefill = job.worker("prefill", num_blocks=512)
    connection = prefill.connect(decode)
    ticket, blocks, _ = decode.hold("r", prefill, 400, access=WRITE)
    mine = prefill.pool.allocate(400)
    for number in range(1, 9):
        prefill.cache.fill_(number)
        prefill.endpoint.transfer(connection, ["kv"], ticket, mine)
        prefill.endpoint.send(connection.peer, b"%d" % number).wait(WAIT_S)
        # The receiver looks at the data while it handles the message; an answer that follows it says that it has.
        decode.endpoint.refresh(decode.connect(prefill))
        prefill.endpoint.refresh(connection)
    assert seen == [True] * 8


@pytest.mark.parametrize(("num_tokens", "first"), [(33, 0), (47, 32), (16, 16)], ids=["partial", "prefix", "nothing"])
def test_ends_of_sequences(loopback: Job, num_tokens: int, first: int) -> None:
    """The last, partial block was not sent; a prefix was known to one side only; zero blocks."""
    for costs in (DIRECT, FETCH):
        pull(loopback, (1, 16, VLLM_ORDER), (1, 16, VLLM_ORDER), num_tokens, first, costs)
        for worker in loopback.workers:
            worker.endpoint.close()


def test_offsets_beyond_4_gib(job: Job) -> None:
    """Sizes and offsets of 32 bits (KVDirect's public code). The memory is not touched but for one block."""
    num_blocks, block_bytes = 5 << 10, 1 << 20
    prefill, decode = job.worker("prefill"), job.worker("decode")
    with mmap.mmap(-1, num_blocks * block_bytes, flags=UNRESERVED) as big:
        array = np.frombuffer(big, dtype=np.uint8).reshape(num_blocks, block_bytes)
        array[-1] = 7
        prefill.endpoint.tensors.register_memory(
            "big", array.ctypes.data, array.nbytes, shape=array.shape, dtype="uint8", owner=array
        )
        mine = torch.zeros(2, block_bytes, dtype=torch.uint8)
        decode.endpoint.tensors.register("mine", mine)
        pool = BlockPool(num_blocks)
        blocks = pool.allocate(num_blocks)
        ticket = prefill.endpoint.hold("r", pool, blocks, peer_name="decode", tensors=["big"])
        connection = decode.connect(prefill)
        decode.endpoint.transfer(connection, ["mine"], ticket, [(1, num_blocks - 1)])
        decode.endpoint.complete(connection, ticket).wait(WAIT_S)
        assert (mine[1] == 7).all() and not mine[0].any()
        for worker in (prefill, decode):
            worker.endpoint.close()
        del array


def test_more_tensors_than_fit_one_message(loopback: Job) -> None:
    """The table of tensors had to fit 4 KiB (KVDirect's public code)."""
    prefill, decode = loopback.worker("prefill"), loopback.worker("decode")
    storage = torch.zeros(1400, 2)
    for index in range(1400):
        prefill.endpoint.tensors.register(f"{index}-{'x' * 900}", storage[index])
    assert len(decode.connect(prefill).tensors) == 1401


def test_an_error_says_what_to_do(loopback: Job) -> None:
    """Errors of this package name the peer or the request, what was found, and what to change."""
    prefill, decode, connection = loopback.pair()
    ticket, _, _ = prefill.hold("request 9", decode, 1)
    with pytest.raises(LlmsysError) as caught:
        decode.endpoint.transfer(connection, ["kv", "kv"], ticket, [])
    assert "request 9" in caught.value.summary and caught.value.expected and caught.value.found and caught.value.fix
