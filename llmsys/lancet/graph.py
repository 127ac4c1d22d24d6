"""A training step as planners see it: operations, the tensors between them, and how each operation can be split.

Neither torch nor a cost is in it. Two makers exist: `workload` builds the steps of the paper's models, and `passes`
reads one from a captured FX graph. Lancet (MLSys'24) calls an operation an instruction, and the list its IR.

A split runs an operation as equal parts, each on a slice of some inputs. It is written as one axis for each input and
output (the paper: the function F over axes):

- ``d >= 0``: the tensor is cut along dimension d;
- ``REPLICATED``: every part uses the whole tensor;
- ``irregular(d)``: the part holds some rows of capacity dimension d, a number that only the run knows, and that differs
  by expert and by device (the axis A_irr of the paper): what a gate makes of a slice of the batch;
- ``PARTIAL`` (outputs only): the parts' sum is the tensor, as for the weight gradient of a slice of the batch;
- ``LAST`` (outputs only): each part's value follows from that of the part before, and the last one is the tensor, as
  for the used capacity of the experts, which a chained gate passes on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from llmsys.core.errors import InputError

Phase = Literal["forward", "backward"]
Kind = Literal["compute", "all_to_all", "collective"]

REPLICATED = -1
PARTIAL = -1000
LAST = -1001

_ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


def irregular(dimension: int) -> int:
    """The axis "some rows of capacity dimension ``dimension``, by a number that only the run knows"."""
    return -2 - dimension


def is_irregular(axis: int) -> bool:
    return PARTIAL < axis <= -2


def dimension_of(axis: int) -> int:
    """The dimension that an axis cuts; only for axes >= 0 and irregular ones."""
    return axis if axis >= 0 else -2 - axis


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A value between operations, or an input of the graph. ``dtype`` is torch's name without "torch."."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES.get(self.dtype, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One way to run an op in parts: the axis of each input, then of each output, in their order."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation.

    ``kind``: "compute" runs on the device; "all_to_all" and "collective" (any other) move bytes of ``inputs[0]`` on
    the communication lane ``group``, asynchronously, from their start to their wait.
    ``target``: what it computes, for people and for costs. ``splits``: empty if it can only run whole.
    ``chained``: its parts run in order, and each gets a state from the one before (capacity passing of a gate).
    ``is_view``: costs nothing, and its outputs share the memory of ``inputs[0]``.
    ``random``: draws random numbers; its order among random ops must stay.
    ``cost_key``: ops of equal keys cost the same. ``flops``: of the whole op, 0 where unknown.
    ``layer``: of the model, -1 for none; for people only.
    """

    name: str
    kind: Kind
    target: str
    inputs: tuple[str, ...]
    outputs: tuple[Tensor, ...]
    phase: Phase
    splits: tuple[Split, ...] = ()
    chained: bool = False
    is_view: bool = False
    random: bool = False
    group: str = ""
    cost_key: str = ""
    flops: float = 0.0
    layer: int = -1

    @property
    def is_comm(self) -> bool:
        return self.kind != "compute"


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A step in the order in which it was captured, which is a valid one. Raises InputError if it is not.

    ``inputs``: parameters, the batch, and what else is there before; ``outputs``: names of tensors that must exist
    after. Indices of ops, where other modules use them, are places in ``ops``.
    """

    name: str
    inputs: tuple[Tensor, ...]
    ops: tuple[Op, ...]
    outputs: tuple[str, ...]

    def __post_init__(self) -> None:
        known = {tensor.name for tensor in self.inputs}
        names: set[str] = set()
        for op in self.ops:
            missing = [name for name in op.inputs if name not in known]
            if missing:
                raise _broken(self.name, f"op {op.name!r} uses {missing[0]!r}", "no input, and made by no earlier op")
            if op.name in names:
                raise _broken(self.name, f"op {op.name!r}", "two ops of that name")
            names.add(op.name)
            for tensor in op.outputs:
                if tensor.name in known:
                    raise _broken(self.name, f"tensor {tensor.name!r}", "made twice")
                known.add(tensor.name)
            for split in op.splits:
                if (len(split.inputs), len(split.outputs)) != (len(op.inputs), len(op.outputs)):
                    raise _broken(self.name, f"op {op.name!r}", f"a split of other numbers of axes: {split}")
            if op.is_comm and not op.inputs:
                raise _broken(self.name, f"op {op.name!r}", "communication without an input")
        for name in self.outputs:
            if name not in known:
                raise _broken(self.name, f"output {name!r}", "made by no op")

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors by name."""
        return {t.name: t for t in (*self.inputs, *(t for op in self.ops for t in op.outputs))}

    @cached_property
    def producers(self) -> Mapping[str, int]:
        """The index of the op that makes a tensor; inputs of the graph are not in it."""
        return {tensor.name: index for index, op in enumerate(self.ops) for tensor in op.outputs}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[int, ...]]:
        """The indices of the ops that use a tensor, increasing; every tensor is in it."""
        found: dict[str, list[int]] = {name: [] for name in self.tensors}
        for index, op in enumerate(self.ops):
            for name in dict.fromkeys(op.inputs):
                found[name].append(index)
        return {name: tuple(indices) for name, indices in found.items()}

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        """Of each op, the ops it takes tensors from, increasing."""
        return tuple(
            tuple(sorted({self.producers[name] for name in op.inputs if name in self.producers})) for op in self.ops
        )

    @cached_property
    def index_of(self) -> Mapping[str, int]:
        return {op.name: index for index, op in enumerate(self.ops)}

    @cached_property
    def ancestors(self) -> tuple[int, ...]:
        """Of each op, the set of ops with a directed path to it, as the bits of an int (bit i: op i)."""
        found: list[int] = []
        for before in self.predecessors:
            bits = 0
            for index in before:
                bits |= found[index] | (1 << index)
            found.append(bits)
        return tuple(found)

    def independent(self, first: int, second: int) -> bool:
        """Whether no directed path joins two different ops, in either direction."""
        return not (self.ancestors[first] >> second & 1 or self.ancestors[second] >> first & 1)

    def comm_ops(self, kind: Kind | None = None) -> tuple[int, ...]:
        """Indices of the communication ops, or of those of one kind, in order."""
        return tuple(i for i, op in enumerate(self.ops) if op.is_comm and (kind is None or op.kind == kind))

    def select(self, phase: Phase) -> tuple[int, ...]:
        return tuple(index for index, op in enumerate(self.ops) if op.phase == phase)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that a plan depends on: 32 hexadecimal digits, equal on ranks with equal graphs."""
        digest = hashlib.blake2b(digest_size=16)
        for line in self.lines():
            digest.update(line.encode() + b"\n")
        return digest.hexdigest()

    def lines(self) -> Iterable[str]:
        """One line for each input, op and output; two graphs differ where their lines first differ."""
        for tensor in self.inputs:
            yield f"input {_described(tensor)}"
        for op in self.ops:
            marks = [op.kind, op.phase, *(m for m in ("chained", "is_view", "random") if getattr(op, m)), op.group]
            made = ", ".join(_described(tensor) for tensor in op.outputs)
            yield f"{made} = {op.target}({', '.join(op.inputs)}) [{' '.join(filter(None, marks))}] {op.name}"
        yield f"output {', '.join(self.outputs)}"


def _described(tensor: Tensor) -> str:
    return f"{tensor.name}: {tensor.dtype}[{','.join(map(str, tensor.shape))}]"


def _broken(graph: str, where: str, found: str) -> InputError:
    return InputError(
        f"graph {graph!r} is broken at {where}",
        expected="ops in an order in which each one's inputs exist, with a different name for every op and tensor",
        found=found,
        fix="mend what made the graph; one read from torch should not be changed by hand",
    )
