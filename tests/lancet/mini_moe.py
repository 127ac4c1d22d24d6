"""Small hand-made steps: dense attention around mixture-of-experts layers, with the op tables of a captured graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmsys.lancet.graph import LAST, PARTIAL, REPLICATED, Graph, Op, Phase, Split, Tensor, irregular

BATCH, SEQUENCE, HIDDEN, EXPERTS, RANKS, CAPACITY = 8, 4, 16, 4, 2, 16
TOKENS = BATCH * SEQUENCE
FLAT, CUBE = (TOKENS, HIDDEN), (BATCH, SEQUENCE, HIDDEN)
BUFFER, LOCAL = (EXPERTS, CAPACITY, HIDDEN), (EXPERTS // RANKS, RANKS, CAPACITY, HIDDEN)
ROWS, LOCAL_ROWS = irregular(1), irregular(2)
BY_BATCH = (((0,), (0,)),)


@dataclass
class Builder:
    """Ops by name; an op's outputs have its name, with ".1", ".2" for the further ones."""

    phase: Phase = "forward"
    inputs: list[Tensor] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)

    def given(self, name: str, *shape: int) -> str:
        self.inputs.append(Tensor(name=name, shape=shape))
        return name

    def op(
        self,
        name: str,
        inputs: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
        splits: Sequence[tuple[tuple[int, ...], tuple[int, ...]]] = (),
        **options: object,
    ) -> str:
        made = tuple(Tensor(name=name if i == 0 else f"{name}.{i}", shape=shape) for i, shape in enumerate(shapes))
        described: dict[str, object] = {
            "name": name,
            "kind": "compute",
            "target": name.rpartition(".")[2],
            "inputs": tuple(inputs),
            "outputs": made,
            "phase": self.phase,
            "splits": tuple(Split(inputs=a, outputs=b) for a, b in splits),
        }
        self.ops.append(Op(**(described | options)))  # type: ignore[arg-type]
        return name

    def exchange(self, name: str, x: str) -> str:
        splits = (((ROWS,), (ROWS,)), ((1,), (1,)))
        return self.op(name, [x], [BUFFER], splits, kind="all_to_all", group="experts")

    def graph(self, *outputs: str) -> Graph:
        return Graph(name="mini", inputs=tuple(self.inputs), ops=tuple(self.ops), outputs=outputs)


def attention(b: Builder, layer: str, x: str) -> str:
    weight = b.given(f"{layer}.wo", HIDDEN, HIDDEN)
    norm = b.op(f"{layer}.norm", [x], [FLAT], BY_BATCH)
    cube = b.op(f"{layer}.cube", [norm], [CUBE], BY_BATCH, is_view=True)
    mixed = b.op(f"{layer}.attention", [cube], [CUBE], BY_BATCH)
    flat = b.op(f"{layer}.flat", [mixed], [FLAT], BY_BATCH, is_view=True)
    out = b.op(f"{layer}.out", [flat, weight], [FLAT], [((0, REPLICATED), (0,)), ((REPLICATED, 1), (1,))])
    return b.op(f"{layer}.residual", [x, out], [FLAT], [((0, 0), (0,)), ((1, 1), (1,))])


def mixture(b: Builder, layer: str, x: str, *, is_token_major: bool = True, has_loss: bool = True) -> str:
    """The layer's loss on the gate's scores is the tensor "<layer>.loss"."""
    up = b.op(f"{layer}.cast", [b.given(f"{layer}.w", EXPERTS // RANKS, HIDDEN, HIDDEN)], [(2, HIDDEN, HIDDEN)])
    used = b.given(f"{layer}.used", EXPERTS)
    scores = b.op(f"{layer}.scores", [x], [(TOKENS, EXPERTS)], BY_BATCH)
    routed = [((0, REPLICATED), (0, 0, LAST))] if is_token_major else []
    shapes = [(TOKENS, 1), (TOKENS, 1), (EXPERTS,)]
    gate = b.op(f"{layer}.gate", [scores, used], shapes, routed, chained=is_token_major)
    if has_loss:
        b.op(f"{layer}.loss", [scores, gate, f"{gate}.2"], [()])
    sent = b.op(f"{layer}.dispatch", [x, gate, f"{gate}.1"], [BUFFER], [((0, 0, 0), (ROWS,))])
    there = b.exchange(f"{layer}.to_experts", sent)
    local = b.op(f"{layer}.to_local", [there], [LOCAL], [((ROWS,), (LOCAL_ROWS,)), ((1,), (2,))])
    along = [((axis, REPLICATED), (axis,)) for axis in (LOCAL_ROWS, 2)]
    inner = b.op(f"{layer}.experts", [local, up], [LOCAL], along)
    back = b.op(f"{layer}.to_senders", [inner], [BUFFER], [((LOCAL_ROWS,), (ROWS,)), ((2,), (1,))])
    home = b.exchange(f"{layer}.from_experts", back)
    y = b.op(f"{layer}.combine", [home, gate, f"{gate}.1"], [FLAT], [((ROWS, 0, 0), (0,))])
    return b.op(f"{layer}.sum", [x, y], [FLAT], [((0, 0), (0,))])


def backward(b: Builder, layer: str, dy: str) -> str:
    """From the gradient of what the experts' all-to-all brings home to that of what was sent: an own phase."""
    b.phase = "backward"
    back = b.exchange(f"{layer}.from_experts.dx", dy)
    local = b.op(f"{layer}.to_senders.dx", [back], [LOCAL], [((ROWS,), (LOCAL_ROWS,)), ((1,), (2,))])
    along = [((axis, REPLICATED), (axis,)) for axis in (LOCAL_ROWS, 2)]
    grad = b.op(f"{layer}.experts.dx", [local, f"{layer}.cast"], [LOCAL], along)
    sums = [((axis, axis), (PARTIAL,)) for axis in (LOCAL_ROWS, 2)]
    b.op(f"{layer}.experts.dw", [f"{layer}.to_local", local], [(2, HIDDEN, HIDDEN)], sums)
    rows = b.op(f"{layer}.to_local.dx", [grad], [BUFFER], [((LOCAL_ROWS,), (ROWS,)), ((2,), (1,))])
    return b.exchange(f"{layer}.to_experts.dx", rows)


def mini_step(num_layers: int = 2, *, is_token_major: bool = True, has_backward: bool = False) -> Graph:
    """Layers of attention and mixture, "l0", "l1" and so on; with ``has_backward`` the start of the last one's."""
    b = Builder()
    x = b.given("x", *FLAT)
    losses = []
    for number in range(num_layers):
        layer = f"l{number}"
        x = mixture(b, layer, attention(b, layer, x), is_token_major=is_token_major)
        losses.append(f"{layer}.loss")
    y = b.op("head", [x], [FLAT], BY_BATCH)
    outputs = [y, *losses]
    if has_backward:
        last = f"l{num_layers - 1}"
        outputs += [backward(b, last, b.given("dy", *BUFFER)), f"{last}.experts.dw"]
    return b.graph(*outputs)


def places(
    graph: Graph, ops: Sequence[int], splits: Sequence[int]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Names of split ops and their axes."""
    chosen = ((graph.ops[op], place) for op, place in zip(ops, splits, strict=True))
    return {op.name: (op.splits[place].inputs, op.splits[place].outputs) for op, place in chosen}
