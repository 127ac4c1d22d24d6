"""What the ranks of test_p2p.py run. Every rank draws the transfers of all ranks from one seed."""

from __future__ import annotations

import gc
import traceback
import weakref
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from llmsys.comm.launch import current_rank
from llmsys.comm.messenger import Handle
from llmsys.comm.p2p import Channels, PlannedTransfer, PlannedTransfers
from llmsys.core.errors import DeadlineError, InputError, PeerLostError, PlanError

Check = Callable[[int, Channels], None]
Edge = tuple[int, int, PlannedTransfer]

NUM_RANKS = 3
LIMIT_S = 60.0
NAMES = ("activation", "gradient")
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def run_checks() -> dict[str, str | None]:
    """The traceback of each check that failed on this rank, by name."""
    rank = current_rank().rank
    channels = Channels(NAMES, timeout_s=LIMIT_S)
    found: dict[str, str | None] = {}
    for name, function in CHECKS.items():
        try:
            function(rank, channels)
            found[name] = None
        except BaseException:  # also that of pytest.raises
            found[name] = traceback.format_exc()
    return found


def signal_to(other: int) -> None:
    dist.send(torch.ones(1), other, tag=3)


def wait_for_signal(source: int) -> None:
    work = dist.irecv(torch.ones(1), source, tag=3)
    assert work is not None
    work.wait(timedelta(seconds=LIMIT_S))


def draw_edges(seed: int, num_transfers: int) -> list[Edge]:
    """Transfers (source, target, as the source plans it) in one global order."""
    rng = np.random.default_rng(seed)
    edges = []
    for number in range(num_transfers):
        source, target = rng.choice(NUM_RANKS, size=2, replace=False).tolist()
        transfer = PlannedTransfer(
            direction="send",
            peer=target,
            name=f"transfer {number}",
            shape=tuple(rng.integers(0, 60, size=rng.integers(0, 4)).tolist()),
            dtype=DTYPES[rng.integers(len(DTYPES))],
            channel=NAMES[rng.integers(len(NAMES))],
        )
        edges.append((source, target, transfer))
    return edges


def plan_of(rank: int, edges: list[Edge]) -> list[PlannedTransfer]:
    plan = []
    for source, target, transfer in edges:
        if rank == source:
            plan.append(transfer)
        elif rank == target:
            plan.append(replace(transfer, direction="receive", peer=source))
    return plan


def content_of(transfer: PlannedTransfer, seed: int) -> torch.Tensor:
    number = int(transfer.name.split()[-1])
    generator = torch.Generator().manual_seed(seed * 1000 + number)
    return (torch.rand(transfer.shape, generator=generator) * 200 - 100).to(transfer.dtype)


def post_all(transfers: PlannedTransfers, plan: list[PlannedTransfer], seed: int) -> list[Handle[torch.Tensor]]:
    handles = []
    for transfer in plan:
        if transfer.direction == "send":
            tensor = content_of(transfer, seed)
            if tensor.ndim > 1:  # the same values at other strides
                tensor = tensor.transpose(0, 1).contiguous().transpose(0, 1)
            handles.append(transfers.send(transfer.name, tensor))
        else:
            handles.append(transfers.receive(transfer.name))
    return handles


@check
def random_plans_arrive_whole(rank: int, channels: Channels) -> None:
    for seed in range(4):
        plan = plan_of(rank, draw_edges(seed, 40))
        transfers = channels.open(plan)
        handles = post_all(transfers, plan, seed)
        for place in np.random.default_rng(seed).permutation(len(plan)).tolist():
            found = handles[place].wait()
            if plan[place].direction == "receive":
                expected = content_of(plan[place], seed)
                assert found.dtype == expected.dtype and found.equal(expected), plan[place]
        transfers.finish()
        assert all(handle.done() for handle in handles)


@check
def two_plans_may_be_under_way(rank: int, channels: Channels) -> None:
    """The later one's transfers are not taken for the earlier one's, though names and shapes are the same."""
    edges = [(0, 1, _transfer("number 0", 1)), (0, 1, _transfer("number 1", 1))]
    plan = plan_of(rank, edges)
    first, second = channels.open(plan), channels.open(plan)
    if rank == 0:
        # The other way round than the receiver posts them.
        later = [second.send("number 0", torch.tensor([3.0])), second.send("number 1", torch.tensor([4.0]))]
        wait_for_signal(1)
        earlier = [first.send("number 0", torch.tensor([1.0])), first.send("number 1", torch.tensor([2.0]))]
        for handle in earlier + later:
            handle.wait()
    elif rank == 1:
        handles = [opened.receive(f"number {number}") for opened in (first, second) for number in range(2)]
        signal_to(0)
        assert [handle.wait().item() for handle in handles] == [1.0, 2.0, 3.0, 4.0]


def _transfer(name: str, *shape: int, peer: int = 1, channel: str = "activation") -> PlannedTransfer:
    return PlannedTransfer(direction="send", peer=peer, name=name, shape=shape, dtype=torch.float32, channel=channel)


@check
def posting_returns_before_the_peer_has_posted(rank: int, channels: Channels) -> None:
    """Also for more than sockets hold; and what goes the other way, or on another channel, is not held up by it."""
    size = 4 << 20
    edges = [
        (0, 1, _transfer("large", size)),
        (1, 0, _transfer("back", 1, peer=0, channel="gradient")),
        (0, 1, _transfer("aside", 1, channel="gradient")),
    ]
    transfers = channels.open(plan_of(rank, edges))
    if rank == 0:
        large = transfers.send("large", torch.arange(size, dtype=torch.float32))
        assert not large.done()
        with pytest.raises(DeadlineError, match="send of 'large' to rank 1 on channel 'activation' did not end"):
            large.wait(timeout_s=0.05)
        back = transfers.receive("back")
        aside = transfers.send("aside", torch.ones(1))
        signal_to(1)
        assert back.wait().tolist() == [7.0]
        assert large.wait().shape == (size,)
        assert aside.wait().tolist() == [1.0]
    elif rank == 1:
        wait_for_signal(0)
        handles = [transfers.receive("large"), transfers.send("back", torch.full((1,), 7.0))]
        handles.append(transfers.receive("aside", out=torch.zeros(1)))
        assert handles[0].wait().equal(torch.arange(size, dtype=torch.float32))
        assert handles[2].wait().tolist() == [1.0]
        handles[1].wait()


@check
def plans_that_do_not_go_together_are_refused_by_all(rank: int, channels: Channels) -> None:
    edges = draw_edges(9, 30)
    plan = plan_of(rank, edges)
    places = [number for number, transfer in enumerate(plan_of(1, edges)) if transfer.peer == 0]
    first, second = places[3:5]
    given = plan_of(1, edges)[first]

    def swapped(plan: list[PlannedTransfer]) -> list[PlannedTransfer]:
        changed = list(plan)
        changed[first], changed[second] = changed[second], changed[first]
        return changed

    def changed(**values: object) -> list[PlannedTransfer]:
        return [replace(t, **values) if n == first else t for n, t in enumerate(plan)]  # type: ignore[arg-type]

    cases: list[tuple[Callable[[], list[PlannedTransfer]], tuple[str, ...]]] = [
        (lambda: swapped(plan), ("transfer 3 of those with rank 0", given.name, plan_of(1, edges)[second].name)),
        (lambda: changed(shape=(77,)), ("transfer 3 of those with rank 0", "[77]", str(list(given.shape)))),
        (lambda: changed(dtype=torch.int8), ("int8", str(given.dtype).removeprefix("torch."))),
        (lambda: changed(name="another"), ("'another'", repr(given.name))),
        (lambda: changed(peer=2), ("transfer 3 of those with rank 0",)),
        (lambda: [t for t in plan if t.peer != 0], ("missing",)),
        (lambda: changed(channel="none"), (f"transfer {first} of its plan has channel 'none'",)),
        (lambda: changed(peer=5), (f"transfer {first} of its plan has peer 5",)),
        (lambda: changed(direction="give"), ("has direction 'give'",)),
    ]
    for make, texts in cases:
        with pytest.raises(PlanError, match="do not go together") as caught:
            channels.open(make() if rank == 1 else plan)
        assert all(text in caught.value.found for text in texts), (texts, caught.value.found)
        assert "rank 1: " in caught.value.found
    transfers = channels.open(plan)  # and the channels are as good as before
    post_all(transfers, plan, 9)
    transfers.finish()


@check
def only_the_next_transfer_of_the_plan_is_posted(rank: int, channels: Channels) -> None:
    edges = [(0, 1, _transfer("one", 2)), (0, 1, _transfer("two", 2))]
    transfers = channels.open(plan_of(rank, edges))
    if rank == 2:
        transfers.finish()
        with pytest.raises(PlanError, match="does not come next") as caught:
            transfers.receive("one")
        assert "the end of the plan" in caught.value.expected
    elif rank == 1:
        with pytest.raises(PlanError, match="receive of 'two' does not come next") as caught:
            transfers.receive("two")
        assert "receive of 'one' from rank 0" in caught.value.expected
        with pytest.raises(PlanError, match="send of 'one' does not come next"):
            transfers.send("one", torch.ones(2))
        with pytest.raises(InputError, match="out cannot be written to"):
            transfers.receive("one", out=torch.ones(2, 2)[:, 0])
        handles = [transfers.receive("one"), transfers.receive("two")]
        assert [handle.wait().tolist() for handle in handles] == [[1.0, 1.0], [2.0, 2.0]]
    else:
        with pytest.raises(InputError, match="the tensor is not as planned") as caught:
            transfers.send("one", torch.ones(3))
        assert "(2,)" in caught.value.expected and "(3,)" in caught.value.found
        with pytest.raises(InputError, match="the tensor is not as planned"):
            transfers.send("one", torch.ones(2, dtype=torch.float64))
        transfers.send("one", torch.full((2,), 1.0))
        with pytest.raises(PlanError, match="1 transfers of the plan were not posted") as caught:
            transfers.finish()
        assert "send of 'two' to rank 1" in caught.value.found
        transfers.send("two", torch.full((2,), 2.0))
        transfers.finish()


@check
def a_change_of_the_tensor_under_way_is_found(rank: int, channels: Channels) -> None:
    transfers = channels.open(plan_of(rank, [(0, 1, _transfer("changed", 2))]))
    if rank == 0:
        tensor = torch.ones(2)
        transfers.send("changed", tensor)
        tensor.zero_()
        signal_to(1)
        with pytest.raises(InputError, match=r"send of 'changed' to rank 1 .*written to while it was sent"):
            transfers.finish()
    elif rank == 1:
        wait_for_signal(0)
        transfers.receive("changed")
        transfers.finish()


@check
def an_open_plan_does_not_hold_what_has_arrived(rank: int, channels: Channels) -> None:
    edges = [(0, 1, _transfer("one", 2)), (0, 1, _transfer("two", 2))]
    transfers = channels.open(plan_of(rank, edges))
    if rank == 0:
        for name in ("one", "two"):
            transfers.send(name, torch.ones(2))
        transfers.finish()
    elif rank == 1:
        arrived = weakref.ref(transfers.receive("one").wait())
        transfers.receive("two").wait()
        gc.collect()
        assert arrived() is None


@check
def names_that_differ_are_refused(rank: int, channels: Channels) -> None:
    with pytest.raises(InputError, match="the ranks disagree") as caught:
        Channels([*NAMES, "extra"] if rank == 2 else NAMES, timeout_s=LIMIT_S)
    assert ("extra" in caught.value.found) != (rank == 2)


@check
def a_peer_that_does_not_post_is_named(rank: int, channels: Channels) -> None:
    """In a group of its own without rank 1: gloo closes a channel at a deadline."""
    group = dist.new_group([0, 2])
    if rank == 1:
        return
    apart = Channels(["late"], group=group, timeout_s=LIMIT_S)
    edge = (0, 1, _transfer("activation 5", 2, channel="late"))
    transfers = apart.open(plan_of(0 if rank == 0 else 1, [edge]))
    if rank == 2:
        handle = transfers.receive("activation 5", timeout_s=1.0)
        text = "receive of 'activation 5' from rank 0 on channel 'late' did not end within 1 s: no part of rank 0"
        with pytest.raises(DeadlineError, match=text):
            handle.wait()
        signal_to(0)
    else:
        wait_for_signal(2)
        with pytest.raises(PeerLostError, match=r"send of 'activation 5' to rank 2 .* lost rank 2"):
            transfers.send("activation 5", torch.ones(2)).wait()
