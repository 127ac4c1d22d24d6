"""From a captured step to the plan that all ranks run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch.distributed as dist

from llmsys.lancet.config import PlannerConfig
from llmsys.lancet.costs import CostModel
from llmsys.lancet.passes.agreement import Deadlines, agree
from llmsys.lancet.passes.capture import Captured
from llmsys.lancet.plan import Plan, check_plan, from_text, to_text
from llmsys.lancet.planner import Lancet, Planner


@runtime_checkable
class ModulePlanner(Protocol):
    """A planner that looks at the FX modules, not only at the graph."""

    @property
    def name(self) -> str: ...

    def make_from_modules(self, captured: Captured, costs: CostModel, config: PlannerConfig) -> Plan: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """How plans are made. ``group``: the ranks that run the step together, None for all.

    ``timeout_s`` bounds the wait for all ranks, ``planning_timeout_s`` that for the plan of the first.
    """

    planner: Planner | ModulePlanner = field(default_factory=Lancet)
    config: PlannerConfig = field(default_factory=PlannerConfig)
    group: dist.ProcessGroup | None = None
    timeout_s: float = 300.0
    planning_timeout_s: float = 3600.0

    @property
    def deadlines(self) -> Deadlines:
        return Deadlines(compare_s=self.timeout_s, plan_s=self.planning_timeout_s)


CostSource = CostModel | Callable[[Captured], CostModel]
"""Costs, or what makes them of a captured step: called on every rank, so that all can measure together."""


def plan_step(captured: Captured, costs: CostSource, planning: Planning) -> Plan:
    """The first rank's plan, by its ``costs``, for the step that all ranks have captured. All call it together.

    Blocks. Raises, on every rank alike, what `agreement.agree` lists, and PlanError for a plan that cannot run.
    """
    agree(captured.lines(), str, group=planning.group, deadlines=planning.deadlines)
    try:
        found = costs(captured) if callable(costs) else costs
    except Exception as error:
        refuse_step(error, planning)
        raise

    def make() -> str:
        planner = planning.planner
        if isinstance(planner, ModulePlanner):
            plan = planner.make_from_modules(captured, found, planning.config)
        else:
            plan = planner.make(captured.graph, found, planning.config)
        check_plan(plan, captured.graph)
        return to_text(plan)

    text = agree([captured.graph.name], make, group=planning.group, deadlines=planning.deadlines)
    plan = from_text(text)
    if captured.has_symbols:  # guesses of sizes are a rank's own; what agree compared does not hold them
        plan = replace(plan, fingerprint=captured.graph.fingerprint)
    check_plan(plan, captured.graph)
    return plan


def refuse_step(error: Exception, planning: Planning) -> None:
    """Tell the other ranks, which are in `plan_step`, that this one cannot go on; raises ``error``."""
    agree([], lambda: "", group=planning.group, deadlines=planning.deadlines, error=error)
