"""Fault rounds in short, and that they notice when a rule is broken."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.kvdirect import fault_rounds
from experiments.kvdirect._contents import BlockMemory, block_keys
from experiments.kvdirect._fault_rounds import (
    AFTER_COMPLETION,
    BEFORE_CONNECT,
    CASES,
    CONNECTING,
    HOLDER,
    INITIATOR,
    KILL,
    MID_BATCH,
    STOP,
    Outcome,
    Round,
    case_of,
    make_plan,
)
from experiments.kvdirect._workers import Nursery
from llmsys import _C
from llmsys.core.errors import DeadlineError, PeerLostError, TransportError
from llmsys.kvdirect.blocks import Blocks
from llmsys.kvdirect.holds import Access
from llmsys.kvdirect.tickets import Ticket

pytestmark = [
    pytest.mark.skipif(not _C.engine_built(), reason="llmsys._C was built without UCX's headers"),
    pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc as on Linux"),
    pytest.mark.timeout(280),
]
SEED = 7


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery(fault_rounds.MODULE) as one:
        yield one


def indices_of(case: tuple[str, str, str], access: str) -> list[int]:
    """Rounds of a case whose request reads, or writes, as they come in the default fleet."""
    limits = fault_rounds.limits_of(fault_rounds.Config())
    names = {"holders": ("h0", "h1"), "initiators": ("i0", "i1")}
    mine = [index for index in range(12 * len(CASES)) if case_of(SEED, index) == case]
    return [index for index in mine if make_plan(SEED, index, limits, **names).access == access]


@pytest.fixture(scope="module")
def outcomes(nursery: Nursery) -> list[Outcome]:
    """Every case once."""
    cfg = fault_rounds.Config(num_rounds=len(CASES))
    return list(fault_rounds.rounds(cfg, SEED, range(len(CASES)), nursery=nursery))


@pytest.mark.slow
def test_no_round_breaks_a_rule(outcomes: list[Outcome]) -> None:
    played = {(outcome.plan.fault, outcome.plan.moment, outcome.plan.side) for outcome in outcomes}
    assert played == set(CASES)
    assert all(outcome.num_served == 2 for outcome in outcomes)
    # A machine under load may make a few leases run out; a fault that reaches others would do so in every round.
    assert sum(outcome.num_retries for outcome in outcomes) < len(outcomes) / 2
    # Those of the others, the one after the fault, and that of the round if it was acknowledged.
    assert all(outcome.num_checked == 3 + (outcome.acknowledged is True) for outcome in outcomes)
    assert not any(outcome.num_corrupted or outcome.num_lost for outcome in outcomes)
    # A request that was over before the fault is whole; one whose holder was not there cannot be.
    for outcome in outcomes:
        if outcome.plan.moment == AFTER_COMPLETION:
            assert outcome.acknowledged is True
        if outcome.plan.moment == BEFORE_CONNECT and outcome.plan.side == HOLDER:
            assert outcome.acknowledged is False


@pytest.mark.slow
def test_faults_come_in_the_middle_of_batches(outcomes: list[Outcome]) -> None:
    in_batch = [outcome for outcome in outcomes if outcome.plan.moment == MID_BATCH]
    assert any(outcome.in_time for outcome in in_batch)
    assert any(outcome.acknowledged is False for outcome in in_batch)


@pytest.mark.slow
def test_a_killed_peer_is_noticed_before_its_lease_and_a_stopped_one_at_its_end(outcomes: list[Outcome]) -> None:
    lease_s = fault_rounds.Config().lease_s
    connected = [o for o in outcomes if o.plan.moment not in (BEFORE_CONNECT, CONNECTING)]
    killed = [outcome.detection_s for outcome in connected if outcome.plan.fault == KILL]
    stopped = [outcome.detection_s for outcome in connected if outcome.plan.fault == STOP]
    assert float(np.median(killed)) < lease_s / 2 < min(stopped)


@pytest.mark.slow
def test_rounds_go_over_all_paths_both_ways(outcomes: list[Outcome]) -> None:
    assert {outcome.path for outcome in outcomes} == {"shm", "cma", "ucx"}
    assert {outcome.plan.access for outcome in outcomes} == {"read", "write"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotage", "case", "access", "complaint"),
    [
        # Blocks are read while they have another owner.
        ("frees_early", (KILL, AFTER_COMPLETION, HOLDER), "read", "acknowledged with wrong bytes.*overwritten after"),
        ("never_frees", (KILL, MID_BATCH, INITIATOR), "read", "still holds the blocks"),
        # A reader that comes too late is told that all was well.
        ("forgets_loss", (STOP, BEFORE_CONNECT, INITIATOR), "read", "acknowledged with wrong bytes.*overwritten after"),
        ("takes_stale_tickets", (KILL, AFTER_COMPLETION, HOLDER), "read", "ticket of h[01]'s former life"),
        ("leaks", (KILL, MID_BATCH, INITIATOR), "write", "leaks: num_fds grew"),
    ],
)
def test_a_broken_rule_is_noticed(
    sabotage: str, case: tuple[str, str, str], access: str, complaint: str, nursery: Nursery
) -> None:
    played = fault_rounds.rounds(
        fault_rounds.Config(slack_s=2.0), SEED, indices_of(case, access), sabotage=sabotage, nursery=nursery
    )
    with pytest.raises(TransportError) as caught:
        list(played)
    text = str(caught.value)
    assert re.search(complaint, text, re.DOTALL), text
    assert re.search(rf"seed={SEED} settings.first_round=\d+ settings.num_rounds=1", text)


def test_a_round_that_hangs_says_how_to_play_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(_: Round) -> None:
        raise DeadlineError("command 'transfer' of worker 'i0' did not end in time")

    limits = fault_rounds.limits_of(fault_rounds.Config())
    plan = make_plan(3, 41, limits, holders=("h0", "h1"), initiators=("i0", "i1"))
    fleet = SimpleNamespace(uses_tcp=lambda initiator: False)
    monkeypatch.setattr(Round, "_prepare", hang)
    with pytest.raises(TransportError, match=r"(?s)round 41 of seed 3.*'i0' did not end.*seed=3 .*first_round=41 "):
        Round(plan, fleet, limits).run()  # type: ignore[arg-type]


def ticket(**changes: object) -> Ticket:
    blocks = Blocks(ids=np.array([3, 1]), tags=np.array([5, 7]))
    values = {"request_id": "r", "address": "a:1", "holder": "h", "generation": 4, "peer_name": "i"}
    return Ticket(**values | {"access": Access.READ, "tensors": ("t",), "blocks": blocks} | changes)  # type: ignore[arg-type]


def test_contents_tell_owner_block_and_tensor_apart() -> None:
    words = np.zeros((4, 16), dtype=np.uint64)
    memory = BlockMemory(words)
    right = ticket()
    ids, keys = right.blocks.ids, block_keys(right, 0)
    memory.fill(ids, keys)
    assert memory.num_wrong(ids, keys) == (0, 0)
    others = [
        block_keys(right, 1),
        block_keys(ticket(generation=5), 0),
        block_keys(ticket(request_id="s"), 0),
        block_keys(ticket(blocks=Blocks(ids=ids, tags=np.array([6, 8]))), 0),
    ]
    assert all(memory.num_wrong(ids, other) == (2, 0) for other in others)
    assert memory.num_wrong(ids[::-1], keys) == (2, 0)

    words[1].view(np.uint8)[77] ^= 1
    assert memory.num_wrong(ids, keys) == (1, 0)
    memory.poison(np.array([3]))
    assert memory.num_wrong(ids, keys) == (2, 1)


def test_a_worker_that_ends_or_fails_is_named(nursery: Nursery) -> None:
    worker = nursery.spawn("w")
    with pytest.raises(TransportError, match=r"(?s)'hold' of worker 'w' failed.*unexpected keyword|missing"):
        worker.ask("hold")
    with pytest.raises(DeadlineError, match=r"(?s)'x' of worker 'w' did not end in time"):
        worker.stop()
        worker.ask("x", 0.2)
    worker.kill()
    worker.join()
    with pytest.raises(PeerLostError, match="'census' of worker 'w' has no result: the worker ended"):
        worker.ask("census")


def test_a_nursery_whose_module_is_broken_says_why() -> None:
    with pytest.raises(PeerLostError, match=r"(?s)could import its modules.*No module named 'experiments.nowhere'"):
        Nursery("experiments.nowhere")


def test_a_process_that_got_the_number_of_an_ended_worker_is_left_alone(nursery: Nursery) -> None:
    worker = nursery.spawn("short-lived")
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        worker.pid = bystander.pid  # as if the kernel had given the number out again
        worker.kill()
        worker.join(5.0)
        worker.kill()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
