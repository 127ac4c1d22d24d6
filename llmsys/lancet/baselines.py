"""What Lancet is compared with: no overlap, overlap by reordering alone, and pipelining of all-to-alls with experts.

Every baseline is a planner: same signature, same plan, same simulator and runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from llmsys.core.errors import ConfigError
from llmsys.lancet.config import PlannerConfig
from llmsys.lancet.costs import CostModel
from llmsys.lancet.drafting import PHASES, Block, Decisions, Drafter
from llmsys.lancet.graph import Graph, Phase
from llmsys.lancet.partition import capacity_region
from llmsys.lancet.plan import Instruction, Join, Plan, Region, Slice
from llmsys.lancet.planner import Lancet, Planner
from llmsys.lancet.regions import emit, span

DEGREES = (1, 2, 4, 8)
"""The overlap degrees that the paper tries for Tutel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AsCaptured:
    """The graph's order, each communication waited for where it starts: no overlap."""

    name: str = "as_captured"

    def make(self, graph: Graph, costs: CostModel, config: PlannerConfig) -> Plan:
        drafter = Drafter(graph, costs)
        return drafter.plan(self.name, [drafter.captured], config)


@dataclass(frozen=True, slots=True, kw_only=True)
class RaiseSink:
    """The graph's order of computation; communication starts as early and is waited for as late as that allows."""

    name: str = "raise_sink"

    def make(self, graph: Graph, costs: CostModel, config: PlannerConfig) -> Plan:
        drafter = Drafter(graph, costs)
        return drafter.plan(self.name, [drafter.draft(Decisions(units={}))], config)


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityPipelining:
    """All-to-all, experts and all-to-all in ``degree`` parts of the capacity, in both passes, as Tutel does.

    ``degree`` None: the fastest of `DEGREES` by the estimate. Degrees that the capacity has no units for are left out;
    a note says where. Parts of a layer's forward pass are those of its backward pass, so what the experts saved is
    neither joined nor cut again. Outside these ranges it is `RaiseSink`.
    """

    degree: int | None = None
    name: str = "capacity_pipelining"

    def __post_init__(self) -> None:
        if self.degree is not None and (type(self.degree) is not int or self.degree < 1):
            raise ConfigError(
                "degree is out of range",
                expected="a whole number of at least 1, or None for the fastest",
                found=repr(self.degree),
                fix="set degree",
            )

    def make(self, graph: Graph, costs: CostModel, config: PlannerConfig) -> Plan:
        blocks = _Blocks(graph, costs)
        drafter = Drafter(graph, costs, emit=blocks.emit)
        drafts = []
        for degree in DEGREES if self.degree is None else (self.degree,):
            regions = tuple(blocks.regions(degree)) if degree > 1 else ()
            note = f"overlap degree {degree}: {len(regions)} layers in parts"
            drafts.append(drafter.draft(Decisions(regions=regions, units={}, notes=(note,))))
        return drafter.plan(self.name, drafts, config)


class _Blocks:
    """The ranges between the two all-to-alls of each layer, a forward and a backward one in one region."""

    def __init__(self, graph: Graph, costs: CostModel) -> None:
        self.graph, self.costs = graph, costs

    def regions(self, degree: int) -> list[Region]:
        forward, backward = (self._ranges(phase, degree) for phase in PHASES)
        found = []
        for region in forward:
            made = {tensor.name for op in region.ops for tensor in self.graph.ops[op].outputs}
            partner = next((other for other in backward if self._uses(other, made)), None)
            if partner is not None:
                backward.remove(partner)
                ops, splits = (*region.ops, *partner.ops), (*region.splits, *partner.splits)
                region = replace(region, ops=ops, splits=splits)
            found.append(region)
        return [*found, *backward]

    def _uses(self, region: Region, names: set[str]) -> bool:
        return any(not names.isdisjoint(self.graph.ops[op].inputs) for op in region.ops)

    def _ranges(self, phase: Phase, degree: int) -> list[Region]:
        """The first all-to-all that has a range to the next one takes it, and so on."""
        all_to_alls = [op for op in self.graph.comm_ops("all_to_all") if self.graph.ops[op].phase == phase]
        found, at = [], 0
        while at + 1 < len(all_to_alls):
            region = capacity_region(self.graph, all_to_alls[at], all_to_alls[at + 1], degree)
            at += 1 if region is None else 2
            if region is not None:
                found.append(region)
        return found

    def emit(self, regions: Sequence[Region]) -> list[Block]:
        """Blocks of the phases of each region, without copies of tensors that exist in the right parts already."""
        blocks = []
        for number, region in enumerate(regions):
            parts = self._parts(region)
            for phase in PHASES:
                part = _of_phase(self.graph, region, phase)
                if part is None:
                    continue
                first, last = span(self.graph, part)
                made = emit(self.graph, number, part, self.costs)
                kept = tuple(i for i in made if not self._needless(i, region, part, parts))
                blocks.append(Block(first=first, last=last, instructions=kept))
        return blocks

    def _parts(self, region: Region) -> dict[tuple[str, int], int]:
        """The op that makes each tensor in parts, by tensor and axis."""
        return {
            (tensor.name, axis): op
            for op, split in zip(region.ops, region.splits, strict=True)
            for tensor, axis in zip(self.graph.ops[op].outputs, self.graph.ops[op].splits[split].outputs, strict=True)
        }

    def _needless(
        self, instruction: Instruction, region: Region, part: Region, parts: Mapping[tuple[str, int], int]
    ) -> bool:
        if isinstance(instruction, Slice):
            return (instruction.tensor, instruction.axis) in parts
        if not isinstance(instruction, Join) or len(part.ops) == len(region.ops):
            return False
        name = instruction.tensor
        if name in self.graph.outputs:
            return False
        splits = dict(zip(region.ops, region.splits, strict=True))
        return all(
            user in splits and self._axis(user, splits[user], name) == {instruction.axis}
            for user in self.graph.consumers[name]
        )

    def _axis(self, op: int, split: int, name: str) -> set[int]:
        """The axes along which a split op takes a tensor."""
        found = self.graph.ops[op]
        return {axis for other, axis in zip(found.inputs, found.splits[split].inputs, strict=True) if other == name}


def _of_phase(graph: Graph, region: Region, phase: Phase) -> Region | None:
    pairs = [(op, split) for op, split in zip(region.ops, region.splits, strict=True) if graph.ops[op].phase == phase]
    if not pairs:
        return None
    return replace(region, ops=tuple(op for op, _ in pairs), splits=tuple(split for _, split in pairs))


def planner_named(name: str) -> Planner:
    """A planner of `PLANNERS` with its defaults; ConfigError names the known ones."""
    if name not in PLANNERS:
        raise ConfigError(
            "unknown planner",
            expected="one of " + ", ".join(PLANNERS),
            found=repr(name),
            fix="set planner",
        )
    return PLANNERS[name]()


PLANNERS: dict[str, Callable[[], Planner]] = {
    "as_captured": AsCaptured,
    "raise_sink": RaiseSink,
    "capacity_pipelining": CapacityPipelining,
    "lancet": Lancet,
}
"""All planners by name; what each does with weight gradients and partitions is in the config."""
