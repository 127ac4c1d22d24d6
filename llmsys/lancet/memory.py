"""Peak memory of a list of instructions, from which tensors are alive together.

A tensor is alive from the instruction that makes it to the last one that uses it; what a communication reads and
writes, until its wait. Graph inputs are alive throughout, graph outputs from when they are made to the end. A view
shares the memory of its input. A part has its share of the tensor; parts of partial sums and of chained states have the
size of the whole each. A slice along the first dimension shares memory, other slices and joins take new memory.
Allocators add to this what they round up, and kernels their scratch memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from llmsys.lancet.graph import LAST, PARTIAL, REPLICATED, Graph
from llmsys.lancet.plan import WHOLE, Instruction, Join, Region, Run, Slice, Start

MB = 1e6
_Block: TypeAlias = tuple[str, int, int, int]
"""A tensor or a part of it: (name, region, axis, part); a whole one has -1, -1 and WHOLE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The most memory in use, and the first instruction at which it is."""

    peak_mb: float
    place: int


def find_peak(graph: Graph, instructions: Sequence[Instruction], regions: Sequence[Region]) -> Peak:
    """Peak memory of a device that executes ``instructions``. Linear in their number."""
    lives = _Lives(graph, regions)
    for place, instruction in enumerate(instructions):
        lives.step(place, instruction)
    return lives.peak(len(instructions))


def _whole(name: str) -> _Block:
    return name, -1, REPLICATED, WHOLE


class _Lives:
    """Collects when each block of memory is made and last used; ``root`` maps a block to the one it shares."""

    def __init__(self, graph: Graph, regions: Sequence[Region]) -> None:
        self.graph = graph
        self.num_parts = [region.num_parts for region in regions]
        self.region_of = {
            op: (number, graph.ops[op].splits[split])
            for number, region in enumerate(regions)
            for op, split in zip(region.ops, region.splits, strict=True)
        }
        self.root: dict[_Block, _Block] = {_whole(tensor.name): _whole(tensor.name) for tensor in graph.inputs}
        self.size: dict[_Block, float] = {}
        self.made: dict[_Block, int] = {}
        self.used: dict[_Block, int] = {}

    def step(self, place: int, instruction: Instruction) -> None:
        if isinstance(instruction, Slice):
            self._slice(place, instruction)
        elif isinstance(instruction, Join):
            self._join(place, instruction)
        else:
            self._op(place, instruction.op, instruction.part, makes=isinstance(instruction, Run | Start))

    def _op(self, place: int, index: int, part: int, *, makes: bool) -> None:
        op = self.graph.ops[index]
        inputs = [self._block(index, name, i, part, output=False) for i, name in enumerate(op.inputs)]
        outputs = [self._block(index, tensor.name, i, part, output=True) for i, tensor in enumerate(op.outputs)]
        for block in inputs:
            self._use(place, block)
        for block, tensor in zip(outputs, op.outputs, strict=True):
            if op.chained and block[2] == LAST and part > 0:
                self._use(place, (*block[:3], part - 1))
            if makes:
                shares = inputs[0] if op.is_view and inputs else None
                self._make(place, block, self._share(tensor.size_bytes, block), shares)
            self._use(place, block)

    def _block(self, index: int, name: str, place: int, part: int, *, output: bool) -> _Block:
        found = self.region_of.get(index)
        if found is None or part == WHOLE:
            return _whole(name)
        number, split = found
        axis = (split.outputs if output else split.inputs)[place]
        return _whole(name) if axis == REPLICATED else (name, number, axis, part)

    def _share(self, size_bytes: int, block: _Block) -> float:
        _, region, axis, _ = block
        return float(size_bytes) if axis in (REPLICATED, PARTIAL, LAST) else size_bytes / self.num_parts[region]

    def _slice(self, place: int, instruction: Slice) -> None:
        whole = _whole(instruction.tensor)
        size = self.graph.tensors[instruction.tensor].size_bytes
        self._use(place, whole)
        for part in range(self.num_parts[instruction.region]):
            block = (instruction.tensor, instruction.region, instruction.axis, part)
            self._make(place, block, self._share(size, block), whole if instruction.axis == 0 else None)

    def _join(self, place: int, instruction: Join) -> None:
        parts = self.num_parts[instruction.region]
        blocks = [(instruction.tensor, instruction.region, instruction.axis, part) for part in range(parts)]
        for block in blocks[-1:] if instruction.axis == LAST else blocks:
            self._use(place, block)
        size = float(self.graph.tensors[instruction.tensor].size_bytes)
        self._make(place, _whole(instruction.tensor), size, blocks[-1] if instruction.axis == LAST else None)

    def _make(self, place: int, block: _Block, size: float, shares: _Block | None) -> None:
        if block in self.root:
            return
        if shares is not None:
            self.root[block] = self.root[shares]
            return
        self.root[block] = block
        self.size[block] = size
        self.made[block] = place
        self.used[block] = place

    def _use(self, place: int, block: _Block) -> None:
        root = self.root[block]
        if root in self.size:
            self.used[root] = place

    def peak(self, stop: int) -> Peak:
        for name in self.graph.outputs:
            self._use(stop, _whole(name))
        change = [0.0] * (stop + 1)
        for block, size in self.size.items():
            change[self.made[block]] += size
            if self.used[block] < stop:
                change[self.used[block] + 1] -= size
        held = float(sum(tensor.size_bytes for tensor in self.graph.inputs))
        best, at = held, 0
        for place, difference in enumerate(change):
            held += difference
            if held > best:
                best, at = held, place
        return Peak(peak_mb=best / MB, place=at)


def alive_at(graph: Graph, instructions: Sequence[Instruction], regions: Sequence[Region], place: int) -> Iterator[str]:
    """Names of the tensors that are alive at instruction ``place``, largest first; views under the name they share."""
    lives = _Lives(graph, regions)
    for number, instruction in enumerate(instructions):
        lives.step(number, instruction)
    lives.peak(len(instructions))
    alive = [block for block in lives.size if lives.made[block] <= place <= lives.used[block]]
    yield from dict.fromkeys(block[0] for block in sorted(alive, key=lambda block: -lives.size[block]))


def kept_alive(
    graph: Graph, instructions: Sequence[Instruction], units: Mapping[int, Sequence[int]], place: int
) -> dict[int, float]:
    """Bytes alive at instruction ``place`` only because units of ops come after it; units without any are left out.

    ``units``: the ops of each, by any number. What several units keep together is divided among them. Looks at whole
    ops only, which is all that weight gradients are.
    """
    position = {i.op: number for number, i in enumerate(instructions) if isinstance(i, Run | Start)}
    unit_of = {op: number for number, ops in units.items() for op in ops if position[op] > place}
    roots = _shared_roots(graph)
    users: dict[str, set[int]] = {}
    for op in unit_of:
        for name in graph.ops[op].inputs:
            users.setdefault(roots[name], set())
    for name, consumers in graph.consumers.items():
        if roots[name] in users:
            users[roots[name]].update(consumers)
    never_freed = {tensor.name for tensor in graph.inputs} | {roots[name] for name in graph.outputs}
    kept: dict[int, float] = {}
    for name, ops in users.items():
        after = [op for op in ops if position[op] > place]
        maker = graph.producers.get(name)
        if name in never_freed or maker is None or position[maker] > place or any(op not in unit_of for op in after):
            continue
        sharers = {unit_of[op] for op in after}
        for unit in sharers:
            kept[unit] = kept.get(unit, 0.0) + graph.tensors[name].size_bytes / len(sharers)
    return kept


def _shared_roots(graph: Graph) -> dict[str, str]:
    """Of each tensor, the one whose memory it shares."""
    roots = {tensor.name: tensor.name for tensor in graph.inputs}
    for op in graph.ops:
        for tensor in op.outputs:
            roots[tensor.name] = roots[op.inputs[0]] if op.is_view and op.inputs else tensor.name
    return roots
