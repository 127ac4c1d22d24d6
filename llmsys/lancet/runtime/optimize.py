"""One call for users: a model, or a function that computes a loss, whose steps are planned and overlapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import BackendCompilerFailed

from llmsys.core.errors import InputError, LlmsysError
from llmsys.lancet.graph import Graph
from llmsys.lancet.passes.planning import CostSource, Planning
from llmsys.lancet.plan import Plan, describe
from llmsys.lancet.runtime.backend import CompiledStep, LancetBackend, no_overlap_reason


class Optimized:
    """What `optimize` returns. Calling it runs the step; all other attributes are those of what was given.

    ``steps``: what was compiled so far. ``plan`` and ``graph``: of the newest step; InputError before the first call,
    and where nothing is overlapped.
    """

    def __init__(self, step: Callable[..., Any], backend: LancetBackend, *, fullgraph: bool) -> None:
        self._given = step
        self._backend = backend
        self._compiled = torch.compile(step, backend=backend, fullgraph=fullgraph, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._compiled(*args, **kwargs)
        except BackendCompilerFailed as error:  # torch's wrapping, with advice that does not help here
            if isinstance(error.inner_exception, LlmsysError):
                raise error.inner_exception from None
            raise

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._given, name)

    @property
    def steps(self) -> tuple[CompiledStep, ...]:
        return tuple(self._backend.steps)

    @property
    def plan(self) -> Plan:
        return self._newest().plan

    @property
    def graph(self) -> Graph:
        return self._newest().graph

    def describe(self) -> str:
        """What the newest step hides under what, for people; or why nothing is planned."""
        if not self.steps:
            return f"nothing is planned: {no_overlap_reason() or 'no step that communicates was run yet'}"
        return describe(self.plan, self.graph)

    def _newest(self) -> CompiledStep:
        if not self.steps:
            raise InputError(
                "there is no plan",
                expected="a step that was run, on more than one rank, and communicates",
                found=self.describe(),
                fix="call the optimized step once on all ranks before looking at its plan",
            )
        return self.steps[-1]


def optimize(
    step: Callable[..., Any],
    *,
    costs: CostSource | None = None,
    planning: Planning | None = None,
    fullgraph: bool = True,
) -> Optimized:
    """Make ``step``, a module or a function of its batch that returns the loss, overlap its all-to-alls.

        model = optimize(model)
        loss = model(tokens, targets)   # the first call captures, plans and compiles, on all ranks together
        loss.backward()
        optimizer.step()                # of torch.optim over model.parameters(), made as ever

    ``costs`` and ``planning``: see `LancetBackend`. ``fullgraph``: an error for what cannot be captured as one graph;
    False plans each piece for itself. Sizes are fixed: another shape is captured and planned anew, on all ranks.
    """
    return Optimized(step, LancetBackend(costs=costs, planning=planning), fullgraph=fullgraph)
