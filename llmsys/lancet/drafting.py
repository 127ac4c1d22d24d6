"""From decisions to a plan: which regions run in parts, what hides each all-to-all, how communication is placed.

Planners decide; a `Drafter` makes the instructions, prices them, keeps them within the memory limit and checks the
plan. Several drafts of one graph share the times that were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from llmsys.core.errors import InfeasibleError
from llmsys.lancet.config import PlannerConfig
from llmsys.lancet.costs import CostModel
from llmsys.lancet.estimate import Pricer, Times
from llmsys.lancet.graph import Graph, Phase
from llmsys.lancet.labelling import Unit
from llmsys.lancet.memory import MB, Peak, alive_at, find_peak, kept_alive
from llmsys.lancet.ordering import Communication, Emitter, defer
from llmsys.lancet.plan import Estimate, Instruction, Plan, Region, check_plan
from llmsys.lancet.regions import emit, span

PHASES: tuple[Phase, ...] = ("forward", "backward")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Instructions of all ops from ``first`` to ``last``, which are of one phase."""

    first: int
    last: int
    instructions: tuple[Instruction, ...]


Emit = Callable[[Sequence[Region]], Sequence[Block]]
"""Makes the blocks of regions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """``units``: of each all-to-all of the backward pass, what is to hide it. ``regions``: what runs in parts."""

    communication: Communication = "raise_sink"
    regions: tuple[Region, ...] = ()
    units: Mapping[int, tuple[Unit, ...]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Instructions for some decisions, what they take, and what in fact runs under each all-to-all."""

    decisions: Decisions
    instructions: tuple[Instruction, ...]
    hidden_under: Mapping[int, tuple[int, ...]]
    times: Times
    peak: Peak


class Drafter:
    """Makes drafts and plans of one graph under one cost model."""

    def __init__(self, graph: Graph, costs: CostModel, *, emit: Emit | None = None) -> None:
        self.graph = graph
        self.pricer = Pricer(graph, costs)
        self.emit = emit or (lambda regions: emit_blocks(graph, costs, regions))
        self.captured = self.draft(Decisions(communication="blocking", units={}))

    def draft(self, decisions: Decisions) -> Draft:
        emitter = Emitter(self.graph, decisions.communication)
        blocks = {block.first: block for block in self.emit(decisions.regions)} if decisions.regions else {}
        inside = {op: block.first for block in blocks.values() for op in range(block.first, block.last + 1)}
        hidden: dict[int, tuple[int, ...]] = {}
        for phase in PHASES:
            order: Sequence[int] = self.graph.select(phase)
            if phase == "backward" and decisions.units:
                assigned = {op: [i for unit in units for i in unit.ops] for op, units in decisions.units.items()}
                order, hidden = defer(self.graph, phase, assigned)
            emitter.begin_phase(order, inside)
            for op in order:
                if op not in inside:
                    emitter.op(op)
                elif inside[op] == op:
                    emitter.block(blocks[op].instructions, decisions.regions)
            emitter.end_phase()
        instructions = tuple(emitter.instructions)
        return Draft(
            decisions=decisions,
            instructions=instructions,
            hidden_under=hidden,
            times=self.pricer.run(instructions, decisions.regions),
            peak=find_peak(self.graph, instructions, decisions.regions),
        )

    def within(self, draft: Draft, limit_mb: float | None) -> Draft | None:
        """``draft`` if it keeps the memory limit, else one with fewer units and regions that does, else None.

        Units that hold memory at the peak go first, most bytes for each ms that they hide; then the regions at the
        peak; then all units and regions.
        """
        if limit_mb is None or draft.peak.peak_mb <= limit_mb:
            return draft
        before = draft.decisions
        while draft.peak.peak_mb > limit_mb:
            decisions = self._relieved(draft, (draft.peak.peak_mb - limit_mb) * MB)
            if decisions is None:
                return None
            draft = self.draft(decisions)
        dropped = _num_units(before) - _num_units(draft.decisions)
        note = (
            f"memory_limit_mb={limit_mb:g} keeps {dropped} of {_num_units(before)} weight-gradient moves and "
            f"{len(before.regions) - len(draft.decisions.regions)} of {len(before.regions)} regions out"
        )
        return replace(draft, decisions=replace(draft.decisions, notes=(*before.notes, note)))

    def _relieved(self, draft: Draft, excess_bytes: float) -> Decisions | None:
        """Fewer decisions, for less memory at the peak; None when nothing is left."""
        decisions = draft.decisions
        units = {unit.seed: unit for assigned in decisions.units.values() for unit in assigned}
        moved = {seed: unit.ops for seed, unit in units.items()}
        kept = kept_alive(self.graph, draft.instructions, moved, draft.peak.place)
        drop: set[int] = set()
        for seed in sorted(kept, key=lambda seed: (-kept[seed] / units[seed].duration_ms, seed)):
            drop.add(seed)
            excess_bytes -= kept[seed]
            if excess_bytes <= 0:
                break
        if drop:
            return replace(decisions, units=_without(decisions.units, drop))
        if decisions.regions:
            return replace(decisions, regions=self._without_region_at(draft))
        return replace(decisions, units={}) if units else None

    def _without_region_at(self, draft: Draft) -> tuple[Region, ...]:
        """The regions but the one that runs at or last before the peak, or without the first."""
        regions = draft.decisions.regions
        region_of = {op: number for number, region in enumerate(regions) for op in region.ops}
        dropped = 0
        for instruction in draft.instructions[: draft.peak.place + 1]:
            number = getattr(instruction, "region", region_of.get(getattr(instruction, "op", -1)))
            dropped = dropped if number is None else number
        return regions[:dropped] + regions[dropped + 1 :]

    def plan(self, planner: str, drafts: Sequence[Draft], config: PlannerConfig) -> Plan:
        """The fastest of ``drafts`` within the memory limit, as a checked plan; of equal ones the first.

        InfeasibleError, with the largest tensors alive at the peak, if none keeps the limit.
        """
        fitting = [found for d in drafts if (found := self.within(d, config.memory_limit_mb)) is not None]
        if not fitting:
            raise self._infeasible(planner, min(drafts, key=lambda d: d.peak.peak_mb), config)
        best = min(fitting, key=lambda d: d.times.step_ms)
        plan = Plan(
            planner=planner,
            graph_name=self.graph.name,
            fingerprint=self.graph.fingerprint,
            instructions=best.instructions,
            regions=best.decisions.regions,
            hidden_under=best.hidden_under,
            estimate=self._estimate(best),
            notes=best.decisions.notes,
        )
        check_plan(plan, self.graph)
        return plan

    def _estimate(self, draft: Draft) -> Estimate:
        return Estimate(
            step_ms=draft.times.step_ms,
            compute_ms=draft.times.compute_ms,
            comm_ms=draft.times.comm_ms,
            exposed_comm_ms=draft.times.exposed_comm_ms,
            peak_mb=draft.peak.peak_mb,
            captured_peak_mb=self.captured.peak.peak_mb,
        )

    def _infeasible(self, planner: str, least: Draft, config: PlannerConfig) -> InfeasibleError:
        captured = self.captured
        names = alive_at(self.graph, least.instructions, least.decisions.regions, least.peak.place)
        largest = [f"{name} {self.graph.tensors[name].size_bytes / MB:.4g} MB" for name in islice(names, 5)]
        inputs_mb = sum(tensor.size_bytes for tensor in self.graph.inputs) / MB
        return InfeasibleError(
            f"planner {planner!r} finds no order of graph {self.graph.name!r} within the memory limit",
            expected=f"a peak of at most memory_limit_mb={config.memory_limit_mb:g} MB"
            if config.memory_limit_mb is not None
            else "a peak within the limit",
            found=f"{least.peak.peak_mb:.6g} MB at the least, {captured.peak.peak_mb:.6g} MB as captured, of which "
            f"{inputs_mb:.6g} MB are graph inputs; largest tensors alive at the peak: {', '.join(largest)}",
            fix="raise memory_limit_mb, lower the batch size, or recompute activations before capture",
        )


def emit_blocks(graph: Graph, costs: CostModel, regions: Sequence[Region]) -> list[Block]:
    """A block for each region, by itself."""
    blocks = []
    for number, region in enumerate(regions):
        first, last = span(graph, region)
        blocks.append(Block(first=first, last=last, instructions=tuple(emit(graph, number, region, costs))))
    return blocks


def _num_units(decisions: Decisions) -> int:
    return sum(map(len, decisions.units.values()))


def _without(units: Mapping[int, tuple[Unit, ...]], seeds: set[int]) -> dict[int, tuple[Unit, ...]]:
    left = {op: tuple(unit for unit in assigned if unit.seed not in seeds) for op, assigned in units.items()}
    return {op: assigned for op, assigned in left.items() if assigned}
