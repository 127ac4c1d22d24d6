"""A plan written back as FX graphs, whose nodes are in the order of its instructions.

The signatures of both graphs stay as they were. What runs whole is a copy of the captured nodes. Parts along regular
axes are copies on slices; parts along irregular ones call `runtime.irregular`. All-to-alls of parts that are dense are
functional collectives on the part. Every node of an instruction has it in ``meta["instruction"]``.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import fx

from llmsys.core.errors import PlanError
from llmsys.lancet.graph import LAST, PARTIAL, REPLICATED, Graph, Op, Phase, Split, dimension_of, is_irregular
from llmsys.lancet.passes.calls import Call, operands, outputs_of, place_of
from llmsys.lancet.passes.capture import Captured
from llmsys.lancet.passes.layout import irregular_order
from llmsys.lancet.passes.pieces import (
    cat_parts,
    cut_in,
    part_bounds,
    part_length,
    region_units,
    slice_parts,
    sum_parts,
    with_strides,
)
from llmsys.lancet.passes.rules import CHAINED, SQUEEZES, VIEWS_BY_SIZE, squeezed
from llmsys.lancet.plan import WHOLE, Instruction, Join, Plan, Run, Slice, Start, Wait

_aten = torch.ops.aten
_SIZES_AT = dict.fromkeys((*VIEWS_BY_SIZE, "aten.expand.default", "aten.slice_backward.default"), 1) | {
    "aten.select_backward.default": 1
}


def rewrite(captured: Captured, plan: Plan, irregular: ModuleType) -> tuple[fx.GraphModule, fx.GraphModule | None]:
    """The forward and the backward module that execute ``plan``; those of ``captured`` are left as they are.

    ``irregular``: the module whose functions run parts of a size that only the run knows, `runtime.irregular`.

    Raises PlanError for a plan of another graph, and for an instruction whose inputs are not there yet.
    """
    if plan.fingerprint != captured.graph.fingerprint:
        raise PlanError(
            f"the plan is for another graph than {captured.graph.name!r}",
            expected=f"fingerprint {captured.graph.fingerprint}",
            found=f"{plan.fingerprint}, of graph {plan.graph_name!r}",
            fix="plan the captured graph again",
        )
    phases = _phases(captured.graph, plan)
    if "backward" in phases and "forward" in phases[phases.index("backward") :]:
        late = len(phases) - 1 - phases[::-1].index("forward")
        raise _refused(plan, plan.instructions[late], "all of the forward before the backward", "it comes after some")
    first_backward = phases.index("backward") if "backward" in phases else len(phases)
    halves = plan.instructions[:first_backward], plan.instructions[first_backward:]
    forward = _Writer(captured, plan, irregular, "forward").write(captured.forward, halves[0])
    if captured.backward is None:
        return forward, None
    return forward, _Writer(captured, plan, irregular, "backward").write(captured.backward, halves[1])


def _phases(graph: Graph, plan: Plan) -> list[Phase]:
    """Of each instruction: a join is where the tensor is made, a slice where it is used, which is what comes next."""
    phases: list[Phase] = []
    following: Phase = "backward"
    for instruction in reversed(plan.instructions):
        if not isinstance(instruction, Slice | Join):
            following = graph.ops[instruction.op].phase
        elif isinstance(instruction, Join):
            following = graph.ops[graph.producers[instruction.tensor]].phase
        phases.append(following)
    return phases[::-1]


def _refused(plan: Plan, instruction: Instruction, expected: str, found: str) -> PlanError:
    return PlanError(
        f"{instruction} of a plan of {plan.planner!r} cannot be executed",
        expected=expected,
        found=found,
        fix="correct the planner; llmsys.lancet.plan checks plans",
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rows:
    """The `irregular.PartRows` of a part's buffer; ``sent``: at a receiver, those that its sender had."""

    rows: fx.Node
    sent: fx.Node | None = None


class _Writer:
    """Writes the instructions of one phase."""

    def __init__(self, captured: Captured, plan: Plan, irregular: ModuleType, phase: Phase) -> None:
        self._captured = captured
        self._plan = plan
        self._irregular = irregular
        self._phase: Phase = phase
        self._graph = fx.Graph()
        self._whole: dict[str, fx.Node] = {}
        self._parts: dict[tuple[int, str, int, int], fx.Node] = {}
        self._rows: dict[tuple[int, str, int], _Rows] = {}
        self._started: dict[tuple[int, int], fx.Node] = {}
        self._copies: dict[fx.Node, fx.Node] = {}
        self._states: dict[tuple[int, int], fx.Node] = {}
        self._values = {name: outputs_of(node)[0] for node, name in captured.names.items()}
        self._units = [region_units(captured, number, region) for number, region in enumerate(plan.regions)]
        self._region_of = {
            op: (number, captured.graph.ops[op].splits[place])
            for number, region in enumerate(plan.regions)
            for op, place in zip(region.ops, region.splits, strict=True)
        }

    def write(self, module: fx.GraphModule, instructions: Sequence[Instruction]) -> fx.GraphModule:
        for node in module.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._whole[self._captured.names[node]] = self._copy(node)
        for instruction in instructions:
            first = next(reversed(self._graph.nodes), None)
            self._write(instruction)
            self._mark(first, instruction)
        self._join_saved(module)
        self._copy(module.graph.output_node())
        self._graph.lint()
        return fx.GraphModule(module, self._graph)

    def _join_saved(self, module: fx.GraphModule) -> None:
        """What the backward uses in the parts that the forward made passes between the two as a whole."""
        for node in operands(module.graph.output_node()):
            name = self._captured.names[node]
            made = {key[:3] for key in self._parts if key[1] == name}
            if name not in self._whole and made:
                number, _, axis = made.pop()
                self._join(Join(region=number, tensor=name, axis=axis))

    def _mark(self, first: fx.Node | None, instruction: Instruction) -> None:
        for node in reversed(self._graph.nodes):
            if node is first:
                break
            node.meta["instruction"] = instruction

    def _copy(self, node: fx.Node) -> fx.Node:
        def source(used: fx.Node) -> fx.Node:
            return self._copies.get(used) or self._whole_of(self._captured.names[used], node)

        copy = self._copies[node] = self._graph.node_copy(node, source)
        return copy

    def _whole_of(self, tensor: str, user: object) -> fx.Node:
        if tensor not in self._whole:
            raise PlanError(
                f"tensor {tensor!r} is used whole by {user} before it is there, in a plan of {self._plan.planner!r}",
                expected="an earlier instruction that makes it, or joins its parts",
                found="none",
                fix="correct the planner; llmsys.lancet.plan checks plans",
            )
        return self._whole[tensor]

    def _write(self, instruction: Instruction) -> None:
        if isinstance(instruction, Slice):
            self._slice(instruction)
        elif isinstance(instruction, Join):
            self._join(instruction)
        elif instruction.part == WHOLE:
            self._write_whole(instruction)
        elif instruction.op not in self._region_of:
            raise _refused(self._plan, instruction, "an op of a region", "an op of none")
        elif isinstance(instruction, Run):
            self._run_part(instruction)
        elif isinstance(instruction, Start):
            self._start_part(instruction)
        else:
            self._wait_part(instruction)

    def _write_whole(self, instruction: Run | Start | Wait) -> None:
        op, nodes = self._captured.graph.ops[instruction.op], self._captured.nodes[instruction.op]
        if op.is_comm == isinstance(instruction, Run):
            raise _refused(self._plan, instruction, "Start and Wait of communication, Run of all else", op.kind)
        if not isinstance(instruction, Wait):
            for name in op.inputs:
                self._whole_of(name, instruction)
            self._copy(nodes.node)
        elif nodes.node not in self._copies:
            raise _refused(self._plan, instruction, "an earlier Start", "none")
        if not isinstance(instruction, Start):
            for node in nodes.results:
                self._copy(node)
            for node in (nodes.node, *nodes.results):
                if node in self._captured.names:
                    self._whole[self._captured.names[node]] = self._copies[node]
            for tensor in op.outputs:  # what only orders ops has no node
                self._whole.setdefault(tensor.name, self._copies[nodes.node])

    def _run_part(self, instruction: Run) -> None:
        op, nodes = self._captured.graph.ops[instruction.op], self._captured.nodes[instruction.op]
        number, split = self._region_of[instruction.op]
        inputs = self._part_inputs(instruction, op, number, split)
        rows = self._rows_of(number, op, split, instruction.part)
        if op.target in ("llmsys.moe_dispatch.default", "llmsys.moe_combine.default"):
            made, rows = self._run_buffer_op(op, nodes.node, inputs, rows)
        else:
            made = self._run_operator(instruction, op, nodes.node, inputs)
        places = {self._captured.names[n]: place_of(n) for n in nodes.results}
        for tensor, axis in zip(op.outputs, split.outputs, strict=True):
            part = self._graph.call_function(operator.getitem, (made, places[tensor.name])) if places else made
            self._keep(number, tensor.name, axis, instruction.part, part, rows)
        if op.chained:
            state = self._graph.call_function(operator.getitem, (made, CHAINED[op.target][1]))
            self._states[instruction.op, instruction.part] = state

    def _part_inputs(self, instruction: Run | Start, op: Op, number: int, split: Split) -> list[fx.Node]:
        found = []
        for place, (name, axis) in enumerate(zip(op.inputs, split.inputs, strict=True)):
            if op.chained and place == CHAINED[op.target][0] and instruction.part > 0:
                part = self._states.get((instruction.op, instruction.part - 1))
            elif axis == REPLICATED:
                part = self._whole_of(name, instruction)
            else:
                part = self._parts.get((number, name, axis, instruction.part))
            if part is None and axis >= 0 and self._phase == "backward" and name in self._whole:
                self._slice(Slice(region=number, tensor=name, axis=axis))  # see _join_saved
                part = self._parts[number, name, axis, instruction.part]
            if part is None:
                found_text = f"none of its input {name!r}"
                raise _refused(self._plan, instruction, "an earlier instruction that makes the part", found_text)
            found.append(part)
        return found

    def _rows_of(self, number: int, op: Op, split: Split, part: int) -> _Rows | None:
        buffers = [name for name, axis in zip(op.inputs, split.inputs, strict=True) if is_irregular(axis)]
        return self._rows[number, buffers[0], part] if buffers else None

    def _run_buffer_op(
        self, op: Op, node: fx.Node, inputs: list[fx.Node], rows: _Rows | None
    ) -> tuple[fx.Node, _Rows | None]:
        if rows is None:
            made = self._graph.call_function(self._irregular.dispatch, (*inputs, node.args[3]))
            buffer, sent = (self._graph.call_function(operator.getitem, (made, place)) for place in (0, 1))
            return buffer, _Rows(rows=sent)
        return self._graph.call_function(self._irregular.combine, (*inputs, rows.rows)), None

    def _run_operator(self, instruction: Run, op: Op, node: fx.Node, inputs: list[fx.Node]) -> fx.Node:
        """The captured call with a part's inputs, and with its sizes where sizes are an argument."""
        number, split = self._region_of[instruction.op]
        if op.target in SQUEEZES:
            return self._graph.call_function(_aten.squeeze.dims, (*inputs, squeezed(Call.of(node))))
        remaining = iter(inputs)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: next(remaining))
        place = _SIZES_AT.get(op.target)
        if place is not None and split.outputs[0] not in (PARTIAL, LAST, REPLICATED):
            axis = split.outputs[0]
            sizes = [int(n) for n in outputs_of(node)[0].shape]
            cut = cut_in(self._captured, op.outputs[0].name, dimension_of(axis))
            num_parts = self._plan.regions[number].num_parts
            length = part_length(cut, num_parts, self._units[number], instruction.part)
            sizes[dimension_of(axis)] = -1 if is_irregular(axis) else length
            args = (*args[:place], sizes, *args[place + 1 :])
        target = _aten.reshape.default if op.target in VIEWS_BY_SIZE else node.target
        assert callable(target)
        return self._graph.call_function(target, tuple(args), dict(kwargs))

    def _start_part(self, instruction: Start) -> None:
        op, node = self._captured.graph.ops[instruction.op], self._captured.nodes[instruction.op].node
        number, split = self._region_of[instruction.op]
        (part,) = self._part_inputs(instruction, op, number, split)
        rows = self._rows_of(number, op, split, instruction.part)
        group, name = node.args[-1], f"{op.name} part {instruction.part}"
        if rows is None:
            dense = self._graph.call_function(_aten.contiguous.default, (part,))
            assert callable(node.target)
            started = self._graph.call_function(node.target, (dense, *node.args[1:]))
        elif rows.sent is None:
            started = self._graph.call_function(self._irregular.start, (part, rows.rows, group, name))
        else:
            started = self._graph.call_function(self._irregular.start_back, (part, rows.rows, rows.sent, group, name))
        self._started[instruction.op, instruction.part] = started

    def _wait_part(self, instruction: Wait) -> None:
        op = self._captured.graph.ops[instruction.op]
        number, split = self._region_of[instruction.op]
        started = self._started.get((instruction.op, instruction.part))
        if started is None:
            raise _refused(self._plan, instruction, "an earlier Start", "none")
        rows = self._rows_of(number, op, split, instruction.part)
        call = self._graph.call_function
        if rows is None:
            part = call(torch.ops._c10d_functional.wait_tensor.default, (started,))
        elif rows.sent is None:
            made = call(self._irregular.wait, (started,))
            part = call(operator.getitem, (made, 0))
            rows = _Rows(rows=call(operator.getitem, (made, 1)), sent=rows.rows)
        else:
            part = call(self._irregular.wait_back, (started,))
            rows = _Rows(rows=rows.sent)
        self._keep(number, op.outputs[0].name, split.outputs[0], instruction.part, part, rows)

    def _keep(self, number: int, tensor: str, axis: int, part: int, node: fx.Node, rows: _Rows | None = None) -> None:
        self._parts[number, tensor, axis, part] = node
        if rows is not None:
            self._rows[number, tensor, part] = rows

    def _slice(self, instruction: Slice) -> None:
        number, name, axis = instruction.region, instruction.tensor, instruction.axis
        if axis < 0:
            raise _refused(self._plan, instruction, "an axis of at least 0", f"axis {axis}")
        cut = cut_in(self._captured, name, axis)
        bounds = part_bounds(cut, self._plan.regions[number].num_parts, self._units[number])
        whole = self._whole_of(name, instruction)
        parts = slice_parts(self._graph, whole, self._values[name], axis, cut, bounds)
        for part, node in enumerate(parts):
            self._keep(number, name, axis, part, node)

    def _join(self, instruction: Join) -> None:
        number, name, axis = instruction.region, instruction.tensor, instruction.axis
        num_parts = self._plan.regions[number].num_parts
        keys = [(number, name, axis, part) for part in range(num_parts)]
        if missing := [key[-1] for key in keys if key not in self._parts]:
            raise _refused(self._plan, instruction, f"{num_parts} parts of {name!r}", f"none of part {missing[0]}")
        parts, value = [self._parts[key] for key in keys], self._values[name]
        if axis == PARTIAL:
            whole = sum_parts(self._graph, parts)
        elif axis == LAST:
            whole = parts[-1]
        elif is_irregular(axis):
            whole = self._join_rows(
                name, parts, [self._rows[number, name, part].rows for part in range(num_parts)], value
            )
        else:
            cut = cut_in(self._captured, name, axis)
            bounds = part_bounds(cut, num_parts, self._units[number])
            whole = cat_parts(self._graph, parts, value, axis, cut, bounds)
        whole.meta["val"] = value
        self._whole[name] = whole

    def _join_rows(self, name: str, parts: list[fx.Node], rows: list[fx.Node], value: torch.Tensor) -> fx.Node:
        layout, shape = self._captured.layouts[name], tuple(int(n) for n in value.shape)
        capacity = next(factor.size for factor in layout if factor.name == "c")
        order = irregular_order(shape, layout)
        joined = self._graph.call_function(self._irregular.join, (parts, rows, capacity, order), {"shape": shape})
        return with_strides(self._graph, joined, value)
