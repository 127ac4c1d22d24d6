"""One fault round: a request, a fault of one of its sides at a chosen moment, and everything that must hold afterwards.

The rules (any breach is an error that says how to play the round again):

1. A request that was acknowledged has exactly the right bytes, and its holder counts it as completed.
2. A request that fails says which peer it is about, within the lease and a slack after the fault.
3. Survivors free what they held in that time. Freed blocks are overwritten at once, so a block that was given out
   while somebody could still read it shows as wrong bytes in an acknowledged request.
4. Survivors serve others meanwhile: requests of unaffected pairs complete.
5. The victim is of use again after its restart, or after it went on. Tickets and connections of its former life are
   refused.
6. Nothing is held, missing or leaked in the end: blocks, file descriptors, threads, mappings, memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.kvdirect._fleet import Exchange, Fleet
from experiments.kvdirect._workers import Worker
from llmsys.core.errors import LlmsysError, TransportError

BEFORE_CONNECT, CONNECTING, MID_BATCH = "before connect", "connecting", "mid-batch"
BEFORE_COMPLETION, COMPLETING, AFTER_COMPLETION = "before completion", "completing", "after completion"
MOMENTS = (BEFORE_CONNECT, CONNECTING, MID_BATCH, BEFORE_COMPLETION, COMPLETING, AFTER_COMPLETION)
KILL, STOP = "kill", "stop"
HOLDER, INITIATOR = "holder", "initiator"
CASES = tuple((fault, moment, side) for moment in MOMENTS for fault in (KILL, STOP) for side in (HOLDER, INITIATOR))

# moment: the stage that the driver waits for, and the longest random time between it and the fault.
_STAGES = {
    CONNECTING: ("connecting", 0.008),
    MID_BATCH: ("posted", 0.012),
    BEFORE_COMPLETION: ("moved", 0.0),
    COMPLETING: ("completing", 0.001),
}
MAX_EARLY_FAILURES = 3
# The stage whose absence shows that the fault came in time.
_NEXT_STAGE = {CONNECTING: "posted", MID_BATCH: "moved", COMPLETING: "acknowledged"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """lease_s: of every worker. slack_s: what a slow machine may add to any deadline. unclaimed_timeout_s: as KvConfig.

    max_request_blocks: a request has at most so many blocks.
    """

    lease_s: float
    slack_s: float
    unclaimed_timeout_s: float
    max_request_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a round does; follows from seed and index alone.

    delay_s: between the stage of the moment and the fault. stop_s: how long a stopped victim stays so at least.
    """

    seed: int
    index: int
    fault: str
    moment: str
    side: str
    access: str
    kind: str
    holder: str
    initiator: str
    other_holder: str
    other_initiator: str
    num_blocks: int
    delay_s: float
    stop_s: float
    pipelined: bool

    @property
    def victim(self) -> str:
        return self.holder if self.side == HOLDER else self.initiator

    @property
    def survivor(self) -> str:
        return self.initiator if self.side == HOLDER else self.holder


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a round saw.

    acknowledged: whether the request was; None if its initiator was killed before it could say.
    in_time: the fault came before the request had got further. detection_s: from the fault until the survivor knew.
    recovery_s: from the restart or the going on until a request with the victim was acknowledged.
    num_served: requests that others completed during the fault, after num_retries that failed. path: of the bytes.
    num_checked: acknowledged requests of which every byte was compared, and num_corrupted of them had wrong ones.
    num_lost: requests that neither succeeded nor failed, although their initiator lives.
    """

    plan: Plan
    acknowledged: bool | None
    in_time: bool
    detection_s: float
    recovery_s: float
    num_attempts: int
    num_served: int
    num_retries: int
    num_checked: int
    num_corrupted: int
    num_lost: int
    path: str
    duration_s: float


def case_of(seed: int, index: int) -> tuple[str, str, str]:
    """Fault, moment and side of a round: each len(CASES) rounds go through all cases in an order of their own."""
    cycle, place = divmod(index, len(CASES))
    return CASES[int(np.random.default_rng([seed, cycle]).permutation(len(CASES))[place])]


def make_plan(seed: int, index: int, limits: Limits, *, holders: tuple[str, ...], initiators: tuple[str, ...]) -> Plan:
    """In each cycle of all cases one holder and one initiator are never the victim, so that leaks in them add up."""
    fault, moment, side = case_of(seed, index)
    cycle, place = divmod(index, len(CASES))
    rng = np.random.default_rng([seed, cycle, place])
    spared_holder = holders[cycle % len(holders)]
    count = len(initiators)
    spared_initiator = initiators[(cycle + cycle // count + 1) % count]
    holder = _choose(rng, holders, spared_holder if side == HOLDER else "")
    initiator = _choose(rng, initiators, spared_initiator if side == INITIATOR else "")
    return Plan(
        seed=seed,
        index=index,
        fault=fault,
        moment=moment,
        side=side,
        access=("read", "write")[rng.integers(2)],
        kind=("shm", "cma")[rng.integers(2)],
        holder=holder,
        initiator=initiator,
        other_holder=_choose(rng, holders, holder),
        other_initiator=_choose(rng, initiators, initiator),
        num_blocks=int(rng.integers(limits.max_request_blocks // 4, limits.max_request_blocks + 1)),
        delay_s=float(rng.random()) * _STAGES.get(moment, ("", 0.0))[1],
        stop_s=limits.lease_s * float(rng.uniform(1.2, 1.7)),
        pipelined=moment == MID_BATCH and bool(rng.integers(2)),
    )


def _choose(rng: np.random.Generator, names: tuple[str, ...], never: str) -> str:
    allowed = [name for name in names if name != never]
    return allowed[rng.integers(len(allowed))]


class _Breach(TransportError):
    """A broken rule, with the words to play the round again."""


class Round:
    """Runs one plan on a fleet, which it leaves whole."""

    def __init__(self, plan: Plan, fleet: Fleet, limits: Limits) -> None:
        self._plan, self._fleet, self._limits = plan, fleet, limits
        self._deadline_s = limits.lease_s + limits.slack_s
        self._num_early = 0
        self._num_requests = self._num_begun = self._num_ended = 0
        self._num_checked = self._num_corrupted = 0
        self._result: dict[str, Any] | None = None
        self._hold_outcome: str | None = None
        self._detected: list[float] = []

    def run(self) -> Outcome:
        """Raises TransportError: a rule was broken, a worker failed, or something did not come in its time."""
        try:
            return self._play()
        except _Breach:
            raise
        except LlmsysError as error:
            raise self._violation(
                "the round could not be played", "no error in driver and workers", f"{error}"
            ) from error

    def _play(self) -> Outcome:
        plan, begin_s = self._plan, time.monotonic()
        self._prepare()
        exchange, in_time = self._reach_the_moment()
        num_served, num_retries = self._others_are_served()
        self._judge_survivor(exchange)
        back_s = self._end_fault()
        self._judge_victim(exchange)
        result, num_attempts = self._succeed(
            plan.holder, plan.initiator, f"after {plan.victim} had come back", 2 * self._deadline_s
        )
        self._refuse_stale(exchange.ticket)
        problem = self._fleet.wait_nothing_held(self._limits.unclaimed_timeout_s + self._deadline_s)
        if problem:
            raise self._violation("after the round not all is as before", "nothing held, missing or leaked", problem)
        return Outcome(
            plan=plan,
            acknowledged=self._acknowledged(),
            in_time=in_time,
            detection_s=min(self._detected) - self._fault_s,
            recovery_s=result["at_s"] - back_s,
            num_attempts=num_attempts,
            num_served=num_served,
            num_retries=num_retries,
            num_checked=self._num_checked,
            num_corrupted=self._num_corrupted,
            num_lost=self._num_begun - self._num_ended,
            path=self._path(),
            duration_s=time.monotonic() - begin_s,
        )

    # -- up to the fault ---------------------------------------------------------------------------------------------

    def _worker(self, name: str) -> Worker:
        return self._fleet.workers[name]

    def _path(self) -> str:
        return "ucx" if self._fleet.uses_tcp(self._plan.initiator) else self._plan.kind

    def _prepare(self) -> None:
        """Not connected where the moment is before that, connected otherwise."""
        plan = self._plan
        address, initiator = self._fleet.addresses[plan.holder], self._worker(plan.initiator)
        since_s = time.monotonic()
        if plan.moment not in (BEFORE_CONNECT, CONNECTING):
            initiator.ask("connect", address=address, timeout_s=self._deadline_s)
        elif initiator.ask("disconnect", address=address):
            # Else the goodbye could end the hold of this round.
            self._worker(plan.holder).wait_event("lost", since_s, self._deadline_s, peer=plan.initiator)

    def _hold(self, holder: str, initiator: str) -> Exchange:
        self._num_requests += 1
        plan = self._plan
        return self._fleet.hold(
            # The time makes it unique: a holder remembers the ids of a round that was played before.
            f"{plan.seed}.{plan.index}.{self._num_requests}.{time.monotonic_ns()}",
            holder=holder,
            initiator=initiator,
            access=plan.access,
            kind=plan.kind,
            num_blocks=plan.num_blocks,
        )

    def _begin(self, exchange: Exchange, timeout_s: float, **options: Any) -> Exchange:
        self._num_begun += 1
        return self._fleet.begin(exchange, connect_timeout_s=timeout_s, seed=self._plan.index, **options)

    def _end(self, exchange: Exchange, timeout_s: float, when: str) -> dict[str, Any]:
        """The result of a request, whose bytes must be right if it was acknowledged."""
        result: dict[str, Any] = exchange.command.result(timeout_s)
        self._num_ended += 1
        if result["outcome"] == "acknowledged":
            num_wrong, num_poisoned = result["wrong"]
            self._num_checked += 1
            self._num_corrupted += num_wrong > 0
            if num_wrong:
                raise self._violation(
                    f"a request {when} was acknowledged with wrong bytes",
                    "every block as its holder filled it",
                    f"{num_wrong} wrong blocks, {num_poisoned} of them overwritten after they were freed",
                )
        return result

    def _reach_the_moment(self) -> tuple[Exchange, bool]:
        """The request that the fault hits, and whether the fault came before it had got further."""
        plan, lease_s = self._plan, self._limits.lease_s
        exchange = self._hold(plan.holder, plan.initiator)
        if plan.moment == BEFORE_CONNECT:
            self._inject()
            if plan.side == INITIATOR and plan.fault == KILL:
                return exchange, True
            return self._begin(exchange, lease_s), True
        pause_at = "moved" if plan.moment == BEFORE_COMPLETION else ""
        exchange = self._begin(exchange, lease_s, pause_at=pause_at, pipelined=plan.pipelined)
        if not self._is_there(exchange):
            return self._reach_the_moment()
        if plan.delay_s:
            time.sleep(plan.delay_s)
        next_stage = "acknowledged" if plan.pipelined else _NEXT_STAGE.get(plan.moment)
        in_time = next_stage is None or not exchange.command.poll_stage(next_stage)
        self._inject()
        if pause_at:
            exchange.command.go()
        return exchange, in_time

    def _is_there(self, exchange: Exchange) -> bool:
        """Whether the request has come to the moment of the fault; False if a slow machine made it fail before."""
        if self._plan.moment == AFTER_COMPLETION:
            self._take_result(exchange)
            if self._acknowledged():
                return True
        elif exchange.command.wait_stage(_STAGES[self._plan.moment][0], self._deadline_s):
            return True
        else:
            self._take_result(exchange)
        found, self._result = self._result, None
        self._num_early += 1
        if self._num_early > MAX_EARLY_FAILURES:
            raise self._violation("requests fail before any fault", "one that comes as far as the fault", f"{found}")
        self._give_up(exchange)
        self._prepare()
        return False

    def _inject(self) -> None:
        victim = self._worker(self._plan.victim)
        self._fault_s = time.monotonic()
        victim.kill() if self._plan.fault == KILL else victim.stop()

    # -- during the fault --------------------------------------------------------------------------------------------

    def _others_are_served(self) -> tuple[int, int]:
        """How many requests others completed, and how many further tries they needed."""
        plan = self._plan
        survivors_pair = (
            (plan.other_holder, plan.initiator) if plan.side == HOLDER else (plan.holder, plan.other_initiator)
        )
        pairs = [(plan.other_holder, plan.other_initiator), survivors_pair]
        attempts = [self._succeed(*pair, f"while {plan.victim} was away", self._deadline_s)[1] for pair in pairs]
        return len(pairs), sum(attempts) - len(pairs)

    def _succeed(self, holder: str, initiator: str, when: str, within_s: float) -> tuple[dict[str, Any], int]:
        """Requests of a pair that lives until one is acknowledged: its result, and how many it took.

        On an idle machine it is the first. One that keeps a process waiting for a whole lease makes its peers lose it.
        """
        deadline_s = time.monotonic() + within_s
        given_up: list[Exchange] = []
        worker = self._worker(initiator)
        while True:
            # First, so that a slow machine does not take it for a peer that never comes.
            worker.ask("connect", address=self._fleet.addresses[holder], timeout_s=self._deadline_s)
            exchange = self._begin(self._hold(holder, initiator), self._deadline_s)
            result = self._end(exchange, 2 * self._deadline_s, when)
            if result["outcome"] == "acknowledged":
                break
            given_up.append(exchange)
            if time.monotonic() > deadline_s:
                raise self._violation(f"{initiator} got nothing from {holder} {when}", "a success", f"{result}")
            time.sleep(0.02)
        self._settle(exchange, self._deadline_s)
        for other in given_up:
            self._give_up(other)
        return result, 1 + len(given_up)

    def _give_up(self, exchange: Exchange) -> None:
        """What is held for a peer that is connected stays held until it says that it does not want it."""
        self._worker(exchange.initiator).ask("abort", ticket=exchange.ticket, timeout_s=self._deadline_s)
        self._settle(exchange, self._limits.unclaimed_timeout_s + self._deadline_s)

    def _judge_survivor(self, exchange: Exchange) -> None:
        plan, limits = self._plan, self._limits
        was_connected = plan.moment not in (BEFORE_CONNECT, CONNECTING)
        if plan.side == INITIATOR:
            allowed_s = limits.lease_s if was_connected else max(limits.unclaimed_timeout_s, limits.lease_s)
            until_s = self._fault_s + allowed_s + limits.slack_s
            self._hold_outcome = self._settle(exchange, until_s - time.monotonic())
            was_connected |= self._hold_outcome in ("completed", "peer_lost")
        elif plan.moment != AFTER_COMPLETION:
            self._take_result(exchange)
            self._check_end(self._fault_s)
            was_connected |= bool(self._acknowledged())
        survivor = self._worker(plan.survivor)
        if was_connected:
            survivor.wait_event("lost", self._fault_s, self._deadline_s, peer=plan.victim)
        seen = [event for event in survivor.events("lost", self._fault_s) if event["peer"] == plan.victim]
        if self._hold_outcome != "completed":
            seen += [e for e in survivor.events("ended", self._fault_s) if e["request"] == exchange.request_id]
        self._detected += [event["at_s"] for event in seen]

    # -- after the fault ---------------------------------------------------------------------------------------------

    def _end_fault(self) -> float:
        """The moment at which the victim may begin to come back."""
        plan = self._plan
        if plan.fault == KILL:
            back_s = time.monotonic()
            self._fleet.restart(plan.victim)
            return back_s
        time.sleep(max(0.0, self._fault_s + plan.stop_s - time.monotonic()))
        self._back_s = time.monotonic()
        self._worker(plan.victim).resume()
        return self._back_s

    def _judge_victim(self, exchange: Exchange) -> None:
        plan = self._plan
        if plan.fault == KILL:
            # A request that ended with its initiator is not lost; nobody is there to miss it.
            self._num_ended += plan.side == INITIATOR and self._result is None and exchange.call is not None
            return
        if plan.side == HOLDER:
            self._hold_outcome = self._settle(exchange, self._limits.unclaimed_timeout_s + self._deadline_s)
        elif plan.moment != AFTER_COMPLETION:
            self._take_result(exchange)
            self._check_end(self._back_s)
        if self._acknowledged() and self._hold_outcome != "completed":
            raise self._violation(
                "a request was acknowledged that its holder did not complete",
                "outcome completed at the holder",
                f"outcome {self._hold_outcome}",
            )

    def _refuse_stale(self, ticket: str) -> None:
        """The ticket of the round is of no use to anybody any more."""
        plan = self._plan
        new_generation = plan.fault == KILL and plan.side == HOLDER
        if self._hold_outcome == "completed" and not new_generation:
            return  # asking again gives the same answer, which is right
        users = self._fleet.initiators if new_generation else (plan.initiator,)
        for user in users:
            # To the same process nothing is sent: no holder can refuse a stale write that is on its way.
            tries = self._worker(user).ask(
                "use_stale", ticket=ticket, transfer=new_generation, timeout_s=self._deadline_s
            )
            wrong = tries["new"] != "DescriptorError" if new_generation else tries["new"] == "accepted"
            if wrong or tries.get("old") == "accepted":
                raise self._violation(
                    f"{user} could use a ticket of {plan.victim}'s former life",
                    "DescriptorError of a restarted holder, any error of a request that was given up",
                    f"{tries}",
                )

    # -- judging -----------------------------------------------------------------------------------------------------

    def _acknowledged(self) -> bool | None:
        return None if self._result is None else self._result["outcome"] == "acknowledged"

    def _take_result(self, exchange: Exchange) -> None:
        timeout_s = self._limits.unclaimed_timeout_s + 2 * self._deadline_s
        self._result = self._end(exchange, timeout_s, "of the pair with the fault")

    def _check_end(self, since_s: float) -> None:
        """The request of this round ended in time, and says why."""
        plan, result = self._plan, self._result
        assert result is not None
        if result["at_s"] - since_s > self._deadline_s:
            raise self._violation(
                "a request took too long to fail or complete",
                f"its end within {self._deadline_s:.3g} s",
                f"{result['at_s'] - since_s:.3f} s: {result}",
            )
        if result["outcome"] == "acknowledged":
            if plan.moment == BEFORE_CONNECT and plan.side == HOLDER:
                raise self._violation("a request without a holder succeeded", "an error", f"{result}")
            return
        if plan.side == HOLDER:
            self._detected.append(result["at_s"])
        names = (plan.holder, self._fleet.addresses[plan.holder])
        if not any(name in result["text"] for name in names):
            raise self._violation("an error does not name the peer", " or ".join(names), result["text"])

    def _settle(self, exchange: Exchange, timeout_s: float) -> str:
        """How the holder's side of a request ended; with the right bytes if it was a push that was completed."""
        timeout_s = max(timeout_s, 0.1)
        held = self._fleet.settle(exchange, timeout_s).result(timeout_s + 2 * self._deadline_s)
        if held["outcome"] == "held":
            raise self._violation(
                f"{exchange.holder} still holds the blocks of a request of {exchange.initiator}",
                f"them freed within {timeout_s:.3g} s",
                "num_held above 0",
            )
        self._num_corrupted += held["num_wrong"] > 0
        if held["num_wrong"]:
            raise self._violation(
                "a push was completed with wrong bytes",
                "every block as its initiator filled it",
                f"{held['num_wrong']} wrong blocks, {held['num_poisoned']} of them never written or overwritten",
            )
        return str(held["outcome"])

    def _violation(self, what: str, expected: str, found: str) -> _Breach:
        plan = self._plan
        return _Breach(
            f"fault round {plan.index} of seed {plan.seed} ({plan.fault} of the {plan.side} {plan.victim}, "
            f"{plan.moment}, {plan.access} from {plan.holder} by {plan.initiator}, {self._path()}): {what}",
            expected=expected,
            found=found,
            fix="play it again: python -m experiments.run experiment=kvdirect/fault_rounds "
            f"seed={plan.seed} settings.first_round={plan.index} settings.num_rounds=1",
        )
