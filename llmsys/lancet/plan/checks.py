"""Whether a plan can run: every op once, tensors that exist in the form they are used in, communication in order.

`check_plan` runs whenever a plan is made and whenever one is about to be executed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict

from llmsys.core.errors import PlanError
from llmsys.lancet.graph import REPLICATED, Graph, Op, Split, Tensor
from llmsys.lancet.plan.model import WHOLE, Instruction, Join, Plan, Region, Run, Slice, Start, Wait
from llmsys.lancet.plan.text import axis_text, instruction_text, listing


def check_plan(plan: Plan, graph: Graph) -> None:
    """Raise PlanError, with the instructions around the bad place, at the first broken rule of ``plan`` for ``graph``.

    Rules: the plan was made for this graph. Each op runs once, or once for each part of the region that it is in. What
    an instruction uses exists: a whole tensor where it is used whole, its parts along the right axis in a region. Each
    start has one wait, after it. The phases do not mix. Taking whole ops and the parts of one number, the starts of a
    group's all-to-alls are in the graph's order, and random ops are, and chained parts. Ops that hide an all-to-all are
    between its start and its wait. At the end every output is whole.
    """
    check_form(plan, graph)
    checker = _Checker(plan, graph)
    for place, instruction in enumerate(plan.instructions):
        checker.step(place, instruction)
    checker.finish()


def check_form(plan: Plan, graph: Graph) -> None:
    """PlanError unless ``plan`` is of ``graph`` and its regions and estimate make sense."""
    if plan.fingerprint != graph.fingerprint:
        raise PlanError(
            f"the plan was made for another graph than {graph.name!r}",
            expected=f"fingerprint {graph.fingerprint}",
            found=f"fingerprint {plan.fingerprint} of graph {plan.graph_name!r}",
            fix="make the plan anew from this graph; on several ranks, look for what differs between their models",
        )
    for name, value in asdict(plan.estimate).items():
        if not 0 <= value < math.inf:
            raise PlanError(
                "the plan's estimate makes no sense",
                expected=f"a finite {name} of at least 0",
                found=str(value),
                fix="mend the cost model that the plan was made with",
            )
    taken: set[int] = set()
    for number, region in enumerate(plan.regions):
        _check_region(graph, number, region, taken)
        taken.update(region.ops)


def _check_region(graph: Graph, number: int, region: Region, taken: set[int]) -> None:
    def broken(expected: str, found: str) -> PlanError:
        return PlanError(f"region {number} is broken", expected=expected, found=found, fix="make the plan anew")

    if region.num_parts < 2:
        raise broken("at least 2 parts", str(region.num_parts))
    if not region.ops or list(region.ops) != sorted(set(region.ops)):
        raise broken("ops in the graph's order, at least one", str(region.ops))
    if not 0 <= region.ops[0] <= region.ops[-1] < len(graph.ops):
        raise broken(f"ops below {len(graph.ops)}", f"op {region.ops[-1]}")
    if taken.intersection(region.ops):
        raise broken("ops of no other region", f"op {min(taken.intersection(region.ops))} is in two")
    if len(region.splits) != len(region.ops):
        raise broken(f"a split for each of its {len(region.ops)} ops", f"{len(region.splits)} splits")
    for op, split in zip(region.ops, region.splits, strict=True):
        if not 0 <= split < len(graph.ops[op].splits):
            many = len(graph.ops[op].splits)
            raise broken(f"one of the {many} splits of op {graph.ops[op].name!r}", f"split {split}")
    sizes = cut_sizes(graph, region)
    units = min(sizes, default=region.num_parts)
    if region.num_parts > units or any(size % units for size in sizes):
        raise broken(
            "cut dimensions that are multiples of the smallest one, which has a unit for each part",
            f"{region.num_parts} parts of dimensions {sorted(set(sizes))}",
        )


def cut_sizes(graph: Graph, region: Region) -> list[int]:
    """The sizes of the regular dimensions that a region cuts, with repeats."""
    return [tensor.shape[axis] for op, split in _split_ops(graph, region) for tensor, axis in _cut(graph, op, split)]


def _split_ops(graph: Graph, region: Region) -> Iterable[tuple[Op, Split]]:
    for index, split in zip(region.ops, region.splits, strict=True):
        yield graph.ops[index], graph.ops[index].splits[split]


def _cut(graph: Graph, op: Op, split: Split) -> Iterable[tuple[Tensor, int]]:
    tensors = [*(graph.tensors[name] for name in op.inputs), *op.outputs]
    for tensor, axis in zip(tensors, (*split.inputs, *split.outputs), strict=True):
        if axis >= 0:
            yield tensor, axis


class _Checker:
    """The state of a run: which tensors exist, which communication is pending, which ops have run."""

    def __init__(self, plan: Plan, graph: Graph) -> None:
        self.plan, self.graph = plan, graph
        self.place = 0
        self.whole = {tensor.name for tensor in graph.inputs}
        self.parts: dict[tuple[int, str, int], set[int]] = {}
        self.region_of = {
            op: (number, graph.ops[op].splits[split])
            for number, region in enumerate(plan.regions)
            for op, split in zip(region.ops, region.splits, strict=True)
        }
        self.done: dict[int, set[int]] = {}
        self.pending: dict[tuple[int, int], int] = {}
        self.backward = False
        self.last_in_order: dict[tuple[str, int], int] = {}
        self.starts: dict[int, int] = {}
        self.hides = {op: target for target, ops in plan.hidden_under.items() for op in ops}
        self.hidden: dict[int, list[int]] = {target: [] for target in plan.hidden_under}

    def broken(self, summary: str, expected: str, found: str) -> PlanError:
        return PlanError(
            f"instruction {self.place} breaks a rule: {summary}",
            expected=expected,
            found=found,
            fix="make the plan anew; if this version of llmsys made it for this graph, report a defect of its planner",
            grid=listing(self.graph, self.plan, self.place),
        )

    def step(self, place: int, instruction: Instruction) -> None:
        self.place = place
        if isinstance(instruction, Slice | Join):
            self._move(instruction)
            return
        if not 0 <= instruction.op < len(self.graph.ops):
            raise self.broken("unknown op", f"an op below {len(self.graph.ops)}", str(instruction.op))
        op = self.graph.ops[instruction.op]
        if isinstance(instruction, Run) == op.is_comm:
            form = "a start and a wait" if op.is_comm else "a run"
            raise self.broken("wrong kind of instruction", f"{form} of op {op.name!r}", instruction_text(instruction))
        self._check_phase(op)
        if isinstance(instruction, Wait):
            self._wait(instruction, op)
        else:
            self._begin(instruction, op)

    def _check_phase(self, op: Op) -> None:
        if op.phase == "forward" and self.backward:
            raise self.broken("the phases mix", "all of the forward pass before the backward pass", f"op {op.name!r}")
        self.backward = op.phase == "backward"

    def _begin(self, instruction: Run | Start, op: Op) -> None:
        """Check a run or a start, and what it uses; note what a run makes."""
        index, part = instruction.op, instruction.part
        region = self.region_of.get(index)
        count = self.plan.regions[region[0]].num_parts if region else 1
        if not (0 <= part < count if region else part == WHOLE):
            expected = f"parts 0 to {count - 1} of op {op.name!r}" if region else f"op {op.name!r} whole"
            raise self.broken("wrong part", expected, "the whole" if part == WHOLE else f"part {part}")
        done = self.done.setdefault(index, set())
        if part in done:
            raise self.broken("run twice", f"op {op.name!r} once, or once a part", "it was run before")
        if op.chained and part > 0 and part - 1 not in done:
            raise self.broken("a chained part is too early", f"part {part - 1} of {op.name!r} first", f"part {part}")
        done.add(part)
        for place, name in enumerate(op.inputs):
            self._need(op, name, region and region[0], REPLICATED if region is None else region[1].inputs[place], part)
        self._check_order(op, index, part)
        if isinstance(instruction, Start):
            self.pending[index, part] = self.place
            self.starts.setdefault(index, self.place)
        else:
            self._make(op, region, part, len(done) == count)
            self._check_hiding(index, op)

    def _check_order(self, op: Op, index: int, part: int) -> None:
        """All-to-alls of a group keep their order, and random ops do."""
        if op.kind != "all_to_all" and not op.random:
            return
        kind = f"all-to-alls of group {op.group!r}" if op.is_comm else "random ops"
        # A whole op is ordered with the parts of every number, and so has to be after all of them.
        keys = [key for key in self.last_in_order if key[0] == kind] if part == WHOLE else [(kind, part), (kind, WHOLE)]
        for key in keys:
            before = self.last_in_order.get(key, -1)
            if before > index and self.graph.ops[before].phase == op.phase:
                name = self.graph.ops[before].name
                raise self.broken(f"{kind} change their order", f"{op.name!r} before {name!r}", "it comes after")
        self.last_in_order[kind, part] = index

    def _check_hiding(self, index: int, op: Op) -> None:
        target = self.hides.get(index)
        if target is None:
            return
        if (target, WHOLE) not in self.pending:
            where = repr(self.graph.ops[target].name) if 0 <= target < len(self.graph.ops) else f"op {target}"
            raise self.broken("an op does not hide what it should", f"{op.name!r} between start and wait of {where}",
                              "no such all-to-all is on its way")  # fmt: skip
        self.hidden[target].append(index)

    def _need(self, op: Op, name: str, region: int | None, axis: int, part: int) -> None:
        """Raise unless tensor ``name`` exists in the form that (a part of) ``op`` takes."""
        if region is None or axis == REPLICATED:
            if name in self.whole:
                return
            joined = sum(key[1] == name for key in self.parts)
            found = "it exists only in parts: a join is missing" if joined else "it does not exist yet"
            raise self.broken("an input is missing", f"tensor {name!r} whole, for {op.name!r}", found)
        if part in self.parts.get((region, name, axis), ()):
            return
        found = "it exists only whole: a slice is missing" if name in self.whole else "it does not exist yet"
        expected = f"part {part} of tensor {name!r} along axis {axis_text(axis)}, for {op.name!r}"
        raise self.broken("an input is missing", expected, found)

    def _make(self, op: Op, region: tuple[int, Split] | None, part: int, complete: bool) -> None:
        for place, tensor in enumerate(op.outputs):
            axis = REPLICATED if region is None else region[1].outputs[place]
            if region is not None and axis != REPLICATED:
                self.parts.setdefault((region[0], tensor.name, axis), set()).add(part)
            elif complete:
                self.whole.add(tensor.name)

    def _wait(self, instruction: Wait, op: Op) -> None:
        if self.pending.pop((instruction.op, instruction.part), None) is None:
            raise self.broken(
                "a wait without its start", f"a start of {op.name!r} before, and one wait", "none pending"
            )
        region = self.region_of.get(instruction.op)
        count = self.plan.regions[region[0]].num_parts if region else 1
        waited = sum((instruction.op, part) not in self.pending for part in self.done[instruction.op])
        self._make(op, region, instruction.part, waited == count)

    def _move(self, instruction: Slice | Join) -> None:
        """A slice or a join."""
        name, axis = instruction.tensor, instruction.axis
        tensor = self.graph.tensors.get(name)
        if tensor is None or not 0 <= instruction.region < len(self.plan.regions):
            raise self.broken("unknown tensor or region", "those of the graph and the plan", repr(instruction))
        count = self.plan.regions[instruction.region].num_parts
        present = self.parts.setdefault((instruction.region, name, axis), set())
        if isinstance(instruction, Slice):
            if not 0 <= axis < len(tensor.shape):
                raise self.broken("a slice along no dimension", f"0 to {len(tensor.shape) - 1}", axis_text(axis))
            if name not in self.whole or present:
                found = "its parts exist already" if present else "it does not exist whole"
                raise self.broken("a slice that cannot be", f"tensor {name!r} whole, sliced once", found)
            present.update(range(count))
            return
        if len(present) < count or name in self.whole:
            found = "it is whole already" if name in self.whole else f"{len(present)} of {count} parts"
            raise self.broken("a join that cannot be", f"all parts of {name!r} along {axis_text(axis)}", found)
        if self.graph.ops[self.graph.producers[name]].phase == "forward" and self.backward:
            raise self.broken("the phases mix", "joins of the forward pass before the backward pass", f"of {name!r}")
        self.whole.add(name)

    def finish(self) -> None:
        """What must be true after the last instruction."""
        self.place = len(self.plan.instructions) - 1
        for index, op in enumerate(self.graph.ops):
            region = self.region_of.get(index)
            count = self.plan.regions[region[0]].num_parts if region else 1
            if len(self.done.get(index, ())) != count:
                found = f"{len(self.done.get(index, ()))} of {count} parts" if region else "no instruction of it"
                raise self.broken("an op is missing", f"op {op.name!r} to run", found)
        for (index, part), place in self.pending.items():
            self.place = place
            part_text = "" if part == WHOLE else f", part {part}"
            raise self.broken("a start without a wait", f"a wait for {self.graph.ops[index].name!r}{part_text}", "none")
        for name in self.graph.outputs:
            if name not in self.whole:
                raise self.broken("an output is not whole", f"a join of tensor {name!r}", "only parts of it")
        for target, ops in self.plan.hidden_under.items():
            if self.hidden[target] != list(ops):
                raise self.broken("hidden_under is not the order of execution", str(self.hidden[target]), str(ops))
