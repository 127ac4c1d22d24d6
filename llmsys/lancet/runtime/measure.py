"""Executes a step's forward and backward graph and records what each instruction of its plan took.

The recorder puts a call that reads the clock between the nodes of one instruction and those of the next; the rest of
the graph stays as it is. So the recorded times fill the step without a gap, and cost about a microsecond each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llmsys.core.errors import InputError
from llmsys.core.timeline import Span, Timeline
from llmsys.lancet.graph import Graph
from llmsys.lancet.plan import WHOLE, Join, Run, Slice, Start, Wait, instruction_text
from llmsys.lancet.runtime import irregular

Label = Hashable
_BETWEEN = "between"
_WAITS = (irregular.wait, irregular.wait_back)
_STARTS = (irregular.start, irregular.start_back)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """``label`` was executed from ``start_s`` to ``end_s``, on the clock of `time.perf_counter`."""

    label: Label
    start_s: float
    end_s: float

    @property
    def duration_ms(self) -> float:
        return (self.end_s - self.start_s) * 1e3


class Recorder:
    """Labels of the stretches of one graph, and when the last run reached each."""

    def __init__(self) -> None:
        self.labels: list[Label] = []
        self._times: list[float] = []

    def new_stretch(self, label: Label) -> Callable[[], None]:
        """The call that has to be executed before the stretch; stretches run in the order in which they were made."""
        self.labels.append(label)
        times = self._times

        def stamp() -> None:
            times.append(time.perf_counter())

        return stamp

    def take(self, end_s: float) -> list[Recorded]:
        """What the run that ended at ``end_s`` recorded, and forget it."""
        times, ends = list(self._times), [*self._times[1:], end_s]
        self._times.clear()
        if len(times) != len(self.labels):
            raise InputError(
                "the recorded run is not one whole run",
                expected=f"{len(self.labels)} stretches",
                found=f"{len(times)}",
                fix="call take after each run of the instrumented graph",
            )
        return [
            Recorded(label=label, start_s=start_s, end_s=stop_s)
            for label, start_s, stop_s in zip(self.labels, times, ends, strict=True)
        ]


def instrumented(module: fx.GraphModule, label_of: Callable[[fx.Node], Label]) -> tuple[fx.GraphModule, Recorder]:
    """A copy of the module that records a stretch for every run of nodes of one label; the copy owns its graph."""
    graph, recorder = fx.Graph(), Recorder()
    copies: dict[fx.Node, fx.Node] = {}
    last: Label = None
    for node in module.graph.nodes:
        if node.op in ("call_function", "call_method", "call_module"):
            label = label_of(node)
            if label != last or not recorder.labels:
                graph.call_function(recorder.new_stretch(label))
                last = label
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.lint()
    return fx.GraphModule(module, graph), recorder


def by_instruction(node: fx.Node) -> Label:
    """For graphs that `passes.rewrite` wrote: the plan's instruction."""
    label: Label = node.meta.get("instruction", _BETWEEN)
    return label


def by_communication(node: fx.Node) -> Label:
    """For any graph: ("start" or "wait", name of the node), and one label for all computation."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if node.target in _WAITS or name.startswith("wait_tensor"):
        return ("wait", node.name)
    if node.target in _STARTS or str(node.target).startswith("_c10d_functional."):
        return ("start", node.name)
    return "compute"


class Step:
    """A forward and a backward module as one step: the loss and the gradients of what the forward takes.

    ``forward`` returns the loss and then what it saves, under the names by which ``backward`` takes it, as AOTAutograd
    makes them; what else the backward takes is the gradient of the loss. ``signature``: the captured modules of a step
    that `passes.rewrite` wrote, since they have these names and the same places of inputs and outputs.
    """

    def __init__(
        self,
        forward: fx.GraphModule,
        backward: fx.GraphModule,
        *,
        label_of: Callable[[fx.Node], Label] | None = by_instruction,
        signature: tuple[fx.GraphModule, fx.GraphModule] | None = None,
    ) -> None:
        named_forward, named_backward = signature or (forward, backward)
        returned = _tuple(named_forward.graph.output_node().args[0])
        places = {n.name: place for place, n in enumerate(returned) if isinstance(n, fx.Node)}
        taken = [node.name for node in named_backward.graph.find_nodes(op="placeholder")]
        self._saved = [places.get(name) for name in taken]
        if self._saved.count(None) != 1:
            raise InputError(
                "the two graphs are not one step",
                expected="a backward that takes what the forward saves, by its name, and the gradient of one loss",
                found=f"the backward takes {taken}, of which {self._saved.count(None)} are unknown",
                fix="compile a module that returns one loss",
            )
        self._forward, self._backward = forward, backward
        self._recorders: list[Recorder] = []
        if label_of is not None:
            self._forward, first = instrumented(forward, label_of)
            self._backward, second = instrumented(backward, label_of)
            self._recorders = [first, second]

    def run(self, inputs: Sequence[Any]) -> Result:
        """One step on the forward's ``inputs``, on this thread."""
        with torch.no_grad():
            start_s = time.perf_counter()
            outputs = _tuple(self._forward(*inputs))
            middle_s = time.perf_counter()
            loss = outputs[0]
            gradient = torch.ones_like(loss)
            values = [gradient if place is None else outputs[place] for place in self._saved]
            del outputs
            gradients = _tuple(self._backward(*values))
            end_s = time.perf_counter()
        recorded = [
            r for recorder, at_s in zip(self._recorders, (middle_s, end_s), strict=False) for r in recorder.take(at_s)
        ]
        return Result(loss=loss, gradients=gradients, start_s=start_s, end_s=end_s, recorded=tuple(recorded))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Result:
    """``recorded``: all stretches in order, none if the step was not instrumented."""

    loss: torch.Tensor
    gradients: tuple[Any, ...]
    start_s: float
    end_s: float
    recorded: tuple[Recorded, ...]

    @property
    def step_ms(self) -> float:
        return (self.end_s - self.start_s) * 1e3

    @property
    def waited_ms(self) -> float:
        """In waits for communication, taking over what has arrived included: an upper bound of the exposed time."""
        return sum(r.duration_ms for r in self.recorded if _is_wait(r.label))


def _is_wait(label: Label) -> bool:
    return isinstance(label, Wait) or (isinstance(label, tuple) and label[:1] == ("wait",))


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def measured_timeline(graph: Graph, result: Result) -> Timeline:
    """What a step in the order of a plan did: lane "compute" with "forward", "backward", "copies", "launch" and "wait".

    A lane "comm <group>" shows each communication from its start to the end of the wait for it, or to the beginning of
    a wait that did not block: its own end is not known. So spans there may overlap.
    """
    origin_s = result.start_s
    spans, started = [], {}
    for r in result.recorded:
        start_ms, end_ms = (r.start_s - origin_s) * 1e3, (r.end_s - origin_s) * 1e3
        name, kind = _shown(graph, r.label)
        spans.append(Span(lane="compute", name=name, kind=kind, start_ms=start_ms, end_ms=end_ms))
        if isinstance(r.label, Start):
            started[r.label.op, r.label.part] = end_ms
        elif isinstance(r.label, Wait):
            op = graph.ops[r.label.op]
            begin_ms = started.pop((r.label.op, r.label.part))
            spans.append(Span(lane=f"comm {op.group}", name=name, kind=op.kind, start_ms=begin_ms, end_ms=end_ms))
    return Timeline(spans=tuple(spans), lanes=("compute",), allow_overlap=True)


def _shown(graph: Graph, label: Label) -> tuple[str, str]:
    if isinstance(label, Slice | Join):
        return instruction_text(label), "copies"
    if not isinstance(label, Run | Start | Wait):
        return str(label), "other"
    op = graph.ops[label.op]
    name = op.name if label.part == WHOLE else f"{op.name} part {label.part}"
    if isinstance(label, Run):
        return name, op.phase
    return name, "launch" if isinstance(label, Start) else "wait"
