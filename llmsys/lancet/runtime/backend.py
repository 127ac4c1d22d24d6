"""The backend "lancet" of torch.compile: capture a step, plan it, and run its operators in the order of the plan.

AOTAutograd makes the joint graph of forward and backward; it is parted as torch does by default, both parts are read as
one `Graph`, planned, and written back. They run operator by operator, as eager code does, so a plan that only reorders
gives bit-equal gradients. A step without gradients is planned by its forward graph alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import fx
from torch._dynamo import register_backend
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import default_partition
from torch.utils._python_dispatch import _disable_current_modes

from llmsys.lancet.graph import Graph
from llmsys.lancet.passes.capture import Captured, capture
from llmsys.lancet.passes.planning import CostSource, Planning, plan_step, refuse_step
from llmsys.lancet.passes.rewrite import rewrite
from llmsys.lancet.plan import Plan
from llmsys.lancet.runtime import irregular
from llmsys.lancet.runtime.step_costs import measured_step_costs

_log = logging.getLogger(__name__)
_said: set[str] = set()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CompiledStep:
    """One planned step: what was captured, the plan, and the modules that run it (the backward's is None without)."""

    captured: Captured
    plan: Plan
    forward: fx.GraphModule
    backward: fx.GraphModule | None

    @property
    def graph(self) -> Graph:
        return self.captured.graph


class LancetBackend:
    """A backend for ``torch.compile(model, backend=LancetBackend(...))``. All ranks compile the same steps together.

    ``costs``: a `CostModel`, or a function that makes one of a `Captured` step; None measures the operators and the
    all-to-alls on this machine (`step_costs`). ``planning``: planner, its settings, ranks, deadlines.
    ``steps``: what was compiled so far, oldest first; a new shape of inputs makes a new one.

    Without a process group, with one rank, and for a step that communicates nothing, code runs as it was captured; a
    warning says so, once for each reason.
    """

    def __init__(self, *, costs: CostSource | None = None, planning: Planning | None = None) -> None:
        self.steps: list[CompiledStep] = []
        self._planning = planning or Planning()
        self._costs = costs or partial(measured_step_costs, group=self._planning.group)
        self._compile = aot_autograd(
            fw_compiler=_as_it_is, inference_compiler=self._compile_inference, partition_fn=self._partition
        )

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        return self._compile(module, inputs)

    def _partition(
        self, joint: fx.GraphModule, inputs: Sequence[Any], **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        forward, backward = default_partition(joint, inputs, **options)
        step = self._planned(forward, backward)
        if step is None:
            return forward, backward
        assert step.backward is not None
        return step.forward, step.backward

    def _compile_inference(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        step = self._planned(module, None)
        return _as_it_is(module if step is None else step.forward, inputs)

    def _planned(self, forward: fx.GraphModule, backward: fx.GraphModule | None) -> CompiledStep | None:
        if reason := no_overlap_reason(self._planning.group):
            _say_once(reason)
            return None
        try:
            captured = capture(forward, backward, name=f"step{len(self.steps)}")
        except Exception as error:
            refuse_step(error, self._planning)
            raise
        if not captured.graph.comm_ops():
            _say_once("a step communicates nothing")
            return None
        # Under the modes of tracing nothing can be measured. With the dispatcher in Python, a collective keeps Python's
        # lock while it waits for one of gloo's, whose holder may wait for Python's: a deadlock.
        with _disable_current_modes(), torch._C._DisablePythonDispatcher():
            plan = plan_step(captured, self._costs, self._planning)
        made = rewrite(captured, plan, irregular)
        step = CompiledStep(captured=captured, plan=plan, forward=made[0], backward=made[1])
        self.steps.append(step)
        return step


def no_overlap_reason(group: dist.ProcessGroup | None = None) -> str:
    """Why there is nothing to overlap in this process; "" if there may be."""
    if not dist.is_available() or not dist.is_initialized():
        return "there is no process group"
    return "the process group has one rank" if dist.get_world_size(group) == 1 else ""


def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        _log.warning("lancet: %s, so it runs as it was captured", reason)


def _as_it_is(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    run: Callable[..., Any] = make_boxed_func(module)
    return run


@register_backend(name="lancet")
def lancet(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """The backend with its default settings, as ``torch.compile(model, backend="lancet")``."""
    return LancetBackend()(module, inputs, **options)
