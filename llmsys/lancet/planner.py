"""Lancet's planner: weight gradients under all-to-alls, and ranges of the forward pass in parts.

Every planner has the signature of `Planner`, and so has every baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from llmsys.lancet.assignment import UNASSIGNED, Assignment, assign_exact, assign_greedy
from llmsys.lancet.config import PlannerConfig
from llmsys.lancet.costs import CostModel
from llmsys.lancet.drafting import Decisions, Draft, Drafter
from llmsys.lancet.graph import Graph
from llmsys.lancet.labelling import Candidates, Unit, find_candidates
from llmsys.lancet.partition import choose_regions
from llmsys.lancet.plan import Plan

EXACT_GAP = 1e-3
"""Share of the hidden time that "exact" may leave: far below what estimates are worth, and much faster than none."""

MAX_ROUNDS = 4
"""Times that units left over are dealt to what is still exposed; each round needs to gain something."""


class Planner(Protocol):
    """Makes the plan of one step.

    ``make`` raises InfeasibleError where no order keeps ``config.memory_limit_mb``. The plan has passed `check_plan`.
    Same input, same plan, on every rank.
    """

    @property
    def name(self) -> str: ...

    def make(self, graph: Graph, costs: CostModel, config: PlannerConfig) -> Plan: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Lancet:
    """The paper's planner, as far as ``config`` lets it: both passes, one, or none.

    The fastest by the planner's own estimate of: the captured order, that with starts raised and waits sunk, weight
    gradients moved, ranges in parts, and both. Weight gradients are dealt to all-to-alls once by the whole time of each
    all-to-all, which is the paper's, and once by what the order without moves leaves exposed of it.
    """

    name: str = "lancet"

    def make(self, graph: Graph, costs: CostModel, config: PlannerConfig) -> Plan:
        drafter = Drafter(graph, costs)
        plain = drafter.draft(Decisions(units={}))
        moved = move_weight_gradients(drafter, plain, config)
        drafts = [drafter.captured, plain, *moved]
        if config.partition == "dp":
            regions, notes = choose_regions(graph, costs, config)
            if regions:
                drafts += [drafter.draft(replace(draft.decisions, regions=regions)) for draft in (plain, *moved)]
            drafts = [_noted(draft, notes) for draft in drafts]
        return drafter.plan(self.name, drafts, config)


def _noted(draft: Draft, notes: Sequence[str]) -> Draft:
    return replace(draft, decisions=replace(draft.decisions, notes=(*draft.decisions.notes, *notes)))


def move_weight_gradients(drafter: Drafter, plain: Draft, config: PlannerConfig) -> list[Draft]:
    """Drafts of ``plain`` with weight gradients moved under all-to-alls; none if there is nothing to move."""
    if config.weight_gradients == "none":
        return []
    whole_ms = drafter.pricer.whole_ms
    candidates = find_candidates(drafter.graph, whole_ms)
    if not any(candidates.movable):
        return []
    pinned = _pinned_note(candidates)
    exposed = plain.times.exposed_at
    drafts = []
    for available_ms in (
        [whole_ms[op] for op in candidates.all_to_alls],
        [exposed.get(op, 0.0) for op in candidates.all_to_alls],
    ):
        found = _assign(available_ms, candidates, config)
        decisions = replace(
            plain.decisions,
            units=_by_all_to_all(candidates, found.targets),
            notes=(*pinned, *_limit_note(found, config)),
        )
        draft = drafter.draft(decisions)
        drafts.append(_use_leftovers(drafter, draft, candidates, list(found.targets)))
    return drafts


def _assign(available_ms: Sequence[float], candidates: Candidates, config: PlannerConfig) -> Assignment:
    unit_ms = [unit.duration_ms for unit in candidates.units]
    if config.weight_gradients == "greedy":
        return assign_greedy(available_ms, unit_ms, candidates.movable)
    return assign_exact(
        available_ms,
        unit_ms,
        candidates.movable,
        solver_limit=config.solver_limit,
        gap=EXACT_GAP,
        seed=config.seed,
    )


def _use_leftovers(drafter: Drafter, draft: Draft, candidates: Candidates, targets: list[int]) -> Draft:
    """Deal units that went nowhere to what is still exposed, best fit, as long as that makes the step shorter.

    There is something left where an all-to-all waits behind others of its group, or where a unit brought other ops.
    """
    unit_ms = [unit.duration_ms for unit in candidates.units]
    for _ in range(MAX_ROUNDS):
        exposed = [draft.times.exposed_at.get(op, 0.0) for op in candidates.all_to_alls]
        free = [[unit for unit in units if targets[unit] == UNASSIGNED] for units in candidates.movable]
        extra = assign_greedy(exposed, unit_ms, free).targets
        if all(target == UNASSIGNED for target in extra):
            break
        targets = [new if new != UNASSIGNED else old for old, new in zip(targets, extra, strict=True)]
        units = _by_all_to_all(candidates, targets)
        better = drafter.draft(replace(draft.decisions, units=units))
        if better.times.step_ms >= draft.times.step_ms:
            break
        draft = better
    return draft


def _by_all_to_all(candidates: Candidates, targets: Sequence[int]) -> dict[int, tuple[Unit, ...]]:
    """The units under each all-to-all that has some, by its index in the graph."""
    found: dict[int, list[Unit]] = {}
    for unit, target in zip(candidates.units, targets, strict=True):
        if target != UNASSIGNED:
            found.setdefault(candidates.all_to_alls[target], []).append(unit)
    return {op: tuple(found[op]) for op in sorted(found)}


def _pinned_note(candidates: Candidates) -> tuple[str, ...]:
    movable = {unit for units in candidates.movable for unit in units}
    pinned = {unit for units in candidates.labelled for unit in units} - movable
    if not pinned:
        return ()
    return (
        f"{len(pinned)} of {len(candidates.units)} independent units cannot run directly after any all-to-all: other "
        "communication or a random op is in the way",
    )


def _limit_note(found: Assignment, config: PlannerConfig) -> tuple[str, ...]:
    if config.weight_gradients != "exact" or found.proven:
        return ()
    return (
        f"the assignment of weight gradients is not proven best: {found.hidden_ms:.3f} ms hidden, at most "
        f"{found.bound_ms:.3f} ms possible, solver_limit={config.solver_limit:g} reached",
    )
