"""The order of instructions: where each op goes, when communication starts, and when it is waited for.

It has two steps. `defer` lines up ops, with the weight gradients behind the all-to-alls they were assigned to (section
4). `Emitter` makes instructions of them: where communication starts and ends between the ops that it was given.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Literal

from llmsys.lancet.graph import REPLICATED, Graph, Phase
from llmsys.lancet.labelling import find_successors
from llmsys.lancet.plan import WHOLE, Instruction, Join, Region, Run, Slice, Start, Wait

Communication = Literal["blocking", "raise_sink"]


def defer(
    graph: Graph, phase: Phase, assigned: Mapping[int, Sequence[int]]
) -> tuple[list[int], dict[int, tuple[int, ...]]]:
    """The ops of ``phase`` in a valid order in which the ops of ``assigned[a]`` come directly after all-to-all a.

    What they need and has not run yet goes before them, there. Everything else keeps the graph's order, except that
    what uses a deferred op runs as soon as that has run. Each op may be assigned once, under an all-to-all that
    `labelling` calls movable for it. Returned too: what in fact runs under each all-to-all of ``assigned``, in order.
    """
    return _Deferral(graph, graph.select(phase), assigned).run()


class _Deferral:
    """``late``: ops that were passed because they miss an input."""

    def __init__(self, graph: Graph, ops: Sequence[int], assigned: Mapping[int, Sequence[int]]) -> None:
        self.graph, self.ops, self.assigned = graph, ops, assigned
        self.deferred = {op for hidden in assigned.values() for op in hidden}
        self.successors = find_successors(graph)
        self.done = [True] * len(graph.ops)
        for op in ops:
            self.done[op] = False
        # A phase needs nothing of a later one, and an earlier one is over.
        self.missing = [sum(not self.done[earlier] for earlier in before) for before in graph.predecessors]
        self.late: set[int] = set()
        self.order: list[int] = []

    def run(self) -> tuple[list[int], dict[int, tuple[int, ...]]]:
        hidden: dict[int, tuple[int, ...]] = {}
        for op in self.ops:
            if self.done[op] or op in self.deferred:
                continue
            if self.missing[op]:
                self.late.add(op)
                continue
            self._emit(op)
            if op in self.assigned:
                hidden[op] = self._hide(self.assigned[op])
        # Only what was assigned where it cannot run is left.
        for op in self.ops:
            self._pull(op)
        return self.order, {op: under for op, under in hidden.items() if under}

    def _hide(self, wanted: Sequence[int]) -> tuple[int, ...]:
        """Emit ``wanted``, and with it what it sets free; the computation of all that."""
        first = len(self.order)
        for op in sorted(wanted):
            self._pull(op)
        return tuple(op for op in self.order[first:] if not self.graph.ops[op].is_comm)

    def _pull(self, wanted: int) -> None:
        """Emit ``wanted`` after all that it needs."""
        if self.done[wanted]:
            return
        needed, stack = {wanted}, [wanted]
        while stack:
            for earlier in self.graph.predecessors[stack.pop()]:
                if not self.done[earlier] and earlier not in needed:
                    needed.add(earlier)
                    stack.append(earlier)
        for op in sorted(needed):
            if not self.done[op]:
                self._emit(op)

    def _emit(self, first: int) -> None:
        """Emit an op, and then what is late and missed only this, in the graph's order."""
        ready = [first]
        while ready:
            op = heapq.heappop(ready)
            self.order.append(op)
            self.done[op] = True
            self.late.discard(op)
            for later in self.successors[op]:
                self.missing[later] -= 1
                if self.missing[later] == 0 and later in self.late:
                    heapq.heappush(ready, later)


class Emitter:
    """Makes instructions of ops and of ready-made blocks of instructions, in the order in which they are given.

    "blocking": each start is directly followed by its wait. "raise_sink": communication starts as soon as the ops given
    before have made what it moves, behind what comes before it in its group, and is waited for where it is used first.
    Waits for all of a phase are at its end, so that a phase can be a function of its own.
    """

    def __init__(self, graph: Graph, communication: Communication) -> None:
        self.graph = graph
        self.communication = communication
        self.instructions: list[Instruction] = []
        self.made = {tensor.name for tensor in graph.inputs}
        self.pending: dict[str, int] = {}
        self.queues: dict[str, deque[int]] = {}
        self.in_blocks: Container[int] = ()
        # The groups to look at when a tensor is made: those whose next communication moves it.
        self.wanted: dict[str, set[str]] = {}

    def begin_phase(self, sequence: Iterable[int], in_blocks: Container[int] = ()) -> None:
        """What will be given, in that order; the ops ``in_blocks`` as parts of blocks, which nothing overtakes."""
        self.queues, self.in_blocks = {}, in_blocks
        for index in sequence:
            if self.graph.ops[index].is_comm:
                self.queues.setdefault(self.graph.ops[index].group, deque()).append(index)
        for group in self.queues:
            self._advance(group)

    def end_phase(self) -> None:
        """Wait for all that is on its way, in order of the starts."""
        for index in dict.fromkeys(self.pending.values()):
            self._wait(index)

    def op(self, index: int) -> None:
        """A whole op. Communication that is on its way already is passed over."""
        op = self.graph.ops[index]
        if op.is_comm and index not in self.queues[op.group]:
            return
        # The waits may start this very op, or others behind it.
        self._use(op.inputs)
        if not op.is_comm:
            self.instructions.append(Run(op=index))
            self._made(tensor.name for tensor in op.outputs)
        elif index in self.queues[op.group]:
            # Those before it in the queue were given before it, so they have started.
            self.queues[op.group].popleft()
            self._start(index)
            self._advance(op.group)

    def block(self, block: Iterable[Instruction], regions: Sequence[Region]) -> None:
        """Ready-made instructions; waits for earlier communication go in where they use what it brings."""
        splits = {
            op: self.graph.ops[op].splits[split]
            for region in regions
            for op, split in zip(region.ops, region.splits, strict=True)
        }
        for instruction in block:
            if isinstance(instruction, Slice):
                self._use([instruction.tensor])
            elif isinstance(instruction, Run | Start):
                names = self.graph.ops[instruction.op].inputs
                if instruction.part != WHOLE:
                    axes = splits[instruction.op].inputs
                    names = tuple(n for n, axis in zip(names, axes, strict=True) if axis == REPLICATED)
                self._use(names)
            self.instructions.append(instruction)
            if isinstance(instruction, Start):
                queue = self.queues[self.graph.ops[instruction.op].group]
                if instruction.op in queue:
                    queue.remove(instruction.op)
            elif isinstance(instruction, Join):
                self.made.add(instruction.tensor)
            elif isinstance(instruction, Run | Wait) and instruction.part == WHOLE:
                self.made.update(tensor.name for tensor in self.graph.ops[instruction.op].outputs)
        for group in self.queues:
            self._advance(group)

    def _use(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self.pending:
                self._wait(self.pending[name])

    def _made(self, names: Iterable[str]) -> None:
        for name in names:
            self.made.add(name)
            for group in sorted(self.wanted.pop(name, ())):
                self._advance(group)

    def _advance(self, group: str) -> None:
        """Start what the group can start now, and note which tensor its next communication is missing."""
        queue = self.queues.get(group, deque())
        while self.communication == "raise_sink" and queue and queue[0] not in self.in_blocks:
            missing = [name for name in self.graph.ops[queue[0]].inputs if name not in self.made]
            if missing:
                self.wanted.setdefault(missing[0], set()).add(group)
                return
            self._start(queue.popleft())

    def _start(self, index: int) -> None:
        self.instructions.append(Start(op=index))
        for tensor in self.graph.ops[index].outputs:
            self.pending[tensor.name] = index
        if self.communication == "blocking":
            self._wait(index)

    def _wait(self, index: int) -> None:
        self.instructions.append(Wait(op=index))
        names = [tensor.name for tensor in self.graph.ops[index].outputs]
        for name in names:
            del self.pending[name]
        self._made(names)
