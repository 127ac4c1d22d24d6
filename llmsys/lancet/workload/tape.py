"""A tape that records operations and, backwards, their gradients: how a synthetic step becomes a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmsys.lancet.graph import PARTIAL, REPLICATED, Graph, Kind, Op, Phase, Split, Tensor

Gradients = Callable[[Tensor], None]


def batch_split(inputs: Sequence[int], outputs: Sequence[int]) -> tuple[Split, ...]:
    """The one split of an op with these axes."""
    return (Split(inputs=tuple(inputs), outputs=tuple(outputs)),)


@dataclass(slots=True, kw_only=True)
class Tape:
    """Records ops in order. Not thread-safe; one tape makes one graph.

    ``emit`` appends an op and returns its outputs. ``then`` says what follows backwards once the gradient of a tensor
    is known: a function that gets that gradient and passes gradients on with ``give``. ``backward`` runs these
    functions in the reverse order; where several gradients of one tensor meet, adds sum them up. ``owe`` marks a tensor
    as a gradient of a parameter, which the graph must make.
    """

    name: str
    dtype: str
    layer: int = -1
    phase: Phase = "forward"
    inputs: list[Tensor] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    _rules: list[tuple[Tensor, Gradients, int]] = field(default_factory=list)
    _gradients: dict[str, list[Tensor]] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def given(self, name: str, shape: Sequence[int], dtype: str = "") -> Tensor:
        """A new input of the graph, named after the layer."""
        tensor = Tensor(name=self._unique(self._placed(name)), shape=tuple(shape), dtype=dtype or self.dtype)
        self.inputs.append(tensor)
        return tensor

    def emit(
        self,
        target: str,
        name: str,
        inputs: Sequence[Tensor],
        shapes: Sequence[Sequence[int]],
        splits: tuple[Split, ...] = (),
        *,
        dtypes: Sequence[str] = (),
        flops: float = 0.0,
        kind: Kind = "compute",
        group: str = "",
        chained: bool = False,
        cost_key: str = "",
    ) -> tuple[Tensor, ...]:
        """Append an op; its outputs are named after it. ``cost_key`` gets the shapes appended."""
        unique = self._unique(self._placed(name))
        marks = [unique] if len(shapes) == 1 else [f"{unique}.{number}" for number in range(len(shapes))]
        types = list(dtypes) or [self.dtype] * len(shapes)
        made = zip(marks, shapes, types, strict=True)
        outputs = tuple(Tensor(name=mark, shape=tuple(shape), dtype=dtype) for mark, shape, dtype in made)
        described = ";".join(f"{t.dtype}{list(t.shape)}" for t in (*inputs, *outputs))
        self.ops.append(
            Op(
                name=unique,
                kind=kind,
                target=target,
                inputs=tuple(tensor.name for tensor in inputs),
                outputs=outputs,
                phase=self.phase,
                splits=splits,
                chained=chained,
                group=group,
                cost_key=f"{cost_key or target}:{described}",
                flops=flops,
                layer=self.layer,
            )
        )
        return outputs

    def then(self, output: Tensor, rule: Gradients) -> None:
        self._rules.append((output, rule, self.layer))

    def give(self, tensor: Tensor, gradient: Tensor) -> None:
        self._gradients.setdefault(tensor.name, []).append(gradient)

    def owe(self, gradient: Tensor) -> None:
        self.results.append(gradient.name)

    def backward(self) -> None:
        self.phase = "backward"
        for output, rule, layer in reversed(self._rules):
            self.layer = layer
            found = self._gradients.pop(output.name, [])
            if not found:
                continue
            total = found[0]
            for other in found[1:]:
                both = batch_split((0, 0), (0,))
                (total,) = self.emit("add", "sum_grad", (total, other), (total.shape,), both)
            rule(total)

    def graph(self) -> Graph:
        return Graph(name=self.name, inputs=tuple(self.inputs), ops=tuple(self.ops), outputs=tuple(self.results))

    def _placed(self, name: str) -> str:
        return f"l{self.layer}.{name}" if self.layer >= 0 else name

    def _unique(self, name: str) -> str:
        name = f"{name}.{self.phase}" if self.phase == "backward" else name
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        return f"{name}_{count}" if count else name


def linear(tape: Tape, name: str, x: Tensor, num_out: int, *, bias: bool) -> Tensor:
    """``x`` [B, S, I] times a new weight [I, O]: forward, dX, and separate dW and bias gradient."""
    *leading, num_in = x.shape
    weight = tape.given(f"{name}.weight", (num_in, num_out))
    operands = [x, weight, *([tape.given(f"{name}.bias", (num_out,))] if bias else [])]
    splits = batch_split((0, *[REPLICATED] * (len(operands) - 1)), (0,))
    shape = (*leading, num_out)
    flops = product_flops(shape, num_in)
    (y,) = tape.emit("addmm" if bias else "mm", name, operands, (shape,), splits, flops=flops)

    def gradients(dy: Tensor) -> None:
        (dx,) = tape.emit("mm", f"{name}.dx", (dy, weight), (x.shape,), batch_split((0, -1), (0,)), flops=flops)
        tape.give(x, dx)
        dw_split = batch_split((0, 0), (PARTIAL,))
        (dw,) = tape.emit("mm", f"{name}.dw", (x, dy), (weight.shape,), dw_split, flops=flops)
        tape.owe(dw)
        if bias:
            (db,) = tape.emit("sum", f"{name}.db", (dy,), ((num_out,),), batch_split((0,), (PARTIAL,)))
            tape.owe(db)

    tape.then(y, gradients)
    return y


def layer_norm(tape: Tape, name: str, x: Tensor) -> Tensor:
    """With weight and bias in one tensor [2, H], and the statistics saved."""
    weight = tape.given(f"{name}.weight", (2, x.shape[-1]))
    split = batch_split((0, REPLICATED), (0, 0))
    y, stats = tape.emit("layer_norm", name, (x, weight), (x.shape, (*x.shape[:-1], 2)), split)

    def gradients(dy: Tensor) -> None:
        dx_split = batch_split((0, 0, 0, REPLICATED), (0,))
        (dx,) = tape.emit("layer_norm_grad", f"{name}.dx", (dy, x, stats, weight), (x.shape,), dx_split)
        tape.give(x, dx)
        dw_split = batch_split((0, 0, 0), (PARTIAL,))
        (dw,) = tape.emit("layer_norm_weight_grad", f"{name}.dw", (dy, x, stats), (weight.shape,), dw_split)
        tape.owe(dw)

    tape.then(y, gradients)
    return y


def add(tape: Tape, name: str, a: Tensor, b: Tensor) -> Tensor:
    (y,) = tape.emit("add", name, (a, b), (a.shape,), batch_split((0, 0), (0,)))

    def gradients(dy: Tensor) -> None:
        tape.give(a, dy)
        tape.give(b, dy)

    tape.then(y, gradients)
    return y


def activation(tape: Tape, name: str, x: Tensor, *, gated: bool, axes: Sequence[int] = (0,)) -> Tensor:
    """GELU, or SiLU of one half of the last dimension times the other half; ``axes``: along which it can be split."""
    target = "silu_mul" if gated else "gelu"
    shape = (*x.shape[:-1], x.shape[-1] // 2) if gated else x.shape
    splits = tuple(Split(inputs=(axis,), outputs=(axis,)) for axis in axes)
    (y,) = tape.emit(target, name, (x,), (shape,), splits)

    def gradients(dy: Tensor) -> None:
        both = tuple(Split(inputs=(axis, axis), outputs=(axis,)) for axis in axes)
        (dx,) = tape.emit(f"{target}_grad", f"{name}.dx", (dy, x), (x.shape,), both)
        tape.give(x, dx)

    tape.then(y, gradients)
    return y


def softmax(tape: Tape, name: str, x: Tensor) -> Tensor:
    (y,) = tape.emit("softmax", name, (x,), (x.shape,), batch_split((0,), (0,)))

    def gradients(dy: Tensor) -> None:
        (dx,) = tape.emit("softmax_grad", f"{name}.dx", (dy, y), (x.shape,), batch_split((0, 0), (0,)))
        tape.give(x, dx)

    tape.then(y, gradients)
    return y


def feed_forward(tape: Tape, name: str, x: Tensor, inner: int, *, gated: bool) -> Tensor:
    up = linear(tape, f"{name}.up", x, inner * (2 if gated else 1), bias=not gated)
    hidden = activation(tape, f"{name}.act", up, gated=gated)
    return linear(tape, f"{name}.down", hidden, x.shape[-1], bias=not gated)


def product_flops(shape: Sequence[int], inner: int) -> float:
    """Of a matrix product, or many, of shape ``shape`` whose factors share a dimension ``inner``."""
    return 2.0 * math.prod(shape) * inner
