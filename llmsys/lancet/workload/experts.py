"""The mixture-of-experts block of a synthetic step: gate, dispatch, two all-to-alls around the experts, combine.

The way of a row: [B, S, H] to the buffer [E, C, H] by ``moe_dispatch``, to the experts' devices by an all-to-all,
to [E_l, G, C, H] by a permutation, through the experts, and back. Between dispatch and combine every op can be split
along the capacity, regularly (Tutel's way) or irregularly (a slice of the batch, Lancet's way).
"""

from __future__ import annotations

from llmsys.lancet.graph import LAST, PARTIAL, REPLICATED, Split, Tensor, irregular
from llmsys.lancet.workload.model import TOKEN_MAJOR_GATES, StepConfig
from llmsys.lancet.workload.tape import Tape, activation, add, batch_split, feed_forward, linear, product_flops, softmax

_CAPACITY_OF_BUFFER, _CAPACITY_OF_EXPERTS = 1, 2  # its dimension in [E, C, H] and in [E_l, G, C, H]


def mixture(tape: Tape, config: StepConfig, x: Tensor) -> Tensor:
    """x [B, S, H] to [B, S, H], without norm and residual."""
    probabilities = softmax(tape, "moe.gate", linear(tape, "moe.scores", x, config.num_experts, bias=False))
    experts, slots = _route(tape, config, probabilities)
    weights = _weights_of(tape, probabilities, experts)
    sent = _dispatch(tape, config, x, experts, slots)
    received = _all_to_all(tape, config, "moe.to_experts", sent, "dispatch")
    returned = _all_to_all(tape, config, "moe.from_experts", _experts(tape, config, received), "combine")
    y = _combine(tape, config, returned, weights, experts, slots)
    model = config.model
    if model.shared_experts:
        inner = model.shared_experts * model.expert_hidden
        y = add(tape, "moe.with_shared", y, feed_forward(tape, "moe.shared", x, inner, gated=model.gated))
    return y


def _route(tape: Tape, config: StepConfig, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    used = tape.given("moe.used", (config.num_experts,), "int64")
    chosen = (*probabilities.shape[:2], config.model.top_k)
    chained = config.gate in TOKEN_MAJOR_GATES
    splits = batch_split((0, REPLICATED), (0, 0, LAST)) if chained else ()
    experts, slots, _ = tape.emit(
        "moe_route",
        "moe.route",
        (probabilities, used),
        (chosen, chosen, used.shape),
        splits,
        dtypes=("int64",) * 3,
        chained=chained,
    )
    return experts, slots


def _weights_of(tape: Tape, probabilities: Tensor, experts: Tensor) -> Tensor:
    (y,) = tape.emit("gather", "moe.weights", (probabilities, experts), (experts.shape,), batch_split((0, 0), (0,)))

    def gradients(dy: Tensor) -> None:
        both = batch_split((0, 0), (0,))
        (dx,) = tape.emit("scatter", "moe.weights.dx", (dy, experts), (probabilities.shape,), both)
        tape.give(probabilities, dx)

    tape.then(y, gradients)
    return y


def _buffer_shape(config: StepConfig) -> tuple[int, int, int]:
    return config.num_experts, config.capacity, config.model.hidden


def _dispatch(tape: Tape, config: StepConfig, x: Tensor, experts: Tensor, slots: Tensor) -> Tensor:
    rows = irregular(_CAPACITY_OF_BUFFER)
    split = batch_split((0, 0, 0), (rows,))
    (y,) = tape.emit("moe_dispatch", "moe.dispatch", (x, experts, slots), (_buffer_shape(config),), split)

    def gradients(dy: Tensor) -> None:
        back = batch_split((rows, 0, 0), (0,))
        (dx,) = tape.emit("moe_gather", "moe.dispatch.dx", (dy, experts, slots), (x.shape,), back)
        tape.give(x, dx)

    tape.then(y, gradients)
    return y


def _combine(tape: Tape, config: StepConfig, buffer: Tensor, weights: Tensor, experts: Tensor, slots: Tensor) -> Tensor:
    rows = irregular(_CAPACITY_OF_BUFFER)
    split = batch_split((rows, 0, 0, 0), (0,))
    shape = (config.batch_per_gpu, config.seq_len, config.model.hidden)
    (y,) = tape.emit("moe_combine", "moe.combine", (buffer, weights, experts, slots), (shape,), split)

    def gradients(dy: Tensor) -> None:
        scattered = (dy, weights, experts, slots)
        to_rows = batch_split((0, 0, 0, 0), (rows,))
        (dbuffer,) = tape.emit("moe_dispatch", "moe.combine.dx", scattered, (buffer.shape,), to_rows)
        tape.give(buffer, dbuffer)
        of_rows = batch_split((0, rows, 0, 0), (0,))
        used = (dy, buffer, experts, slots)
        (dweights,) = tape.emit("moe_weights_grad", "moe.combine.dweights", used, (weights.shape,), of_rows)
        tape.give(weights, dweights)

    tape.then(y, gradients)
    return y


def _all_to_all(tape: Tape, config: StepConfig, name: str, x: Tensor, direction: str) -> Tensor:
    """Its gradient is the all-to-all the other way, and the first begins the name of its cost key."""
    axes = (irregular(_CAPACITY_OF_BUFFER), _CAPACITY_OF_BUFFER)
    splits = tuple(Split(inputs=(axis,), outputs=(axis,)) for axis in axes)

    def exchange(value: Tensor, op_name: str, way: str) -> Tensor:
        (made,) = tape.emit(
            "all_to_all",
            op_name,
            (value,),
            (value.shape,),
            splits,
            kind="all_to_all",
            group=config.expert_group,
            cost_key=way,
        )
        return made

    y = exchange(x, name, direction)
    back = "combine" if direction == "dispatch" else "dispatch"
    tape.then(y, lambda dy: tape.give(x, exchange(dy, f"{name}.dx", back)))
    return y


def _experts(tape: Tape, config: StepConfig, received: Tensor) -> Tensor:
    model, capacity = config.model, config.capacity
    local = (config.experts_per_gpu, config.num_gpus, capacity, model.hidden)
    factor = 2 if model.gated else 1
    rows = _permuted(tape, "moe.to_local", received, local, _CAPACITY_OF_BUFFER, _CAPACITY_OF_EXPERTS)
    inner = _expert_linear(tape, "moe.experts.up", rows, factor * model.expert_hidden)
    axes = (irregular(_CAPACITY_OF_EXPERTS), _CAPACITY_OF_EXPERTS)
    inner = activation(tape, "moe.experts.act", inner, gated=model.gated, axes=axes)
    rows = _expert_linear(tape, "moe.experts.down", inner, model.hidden)
    return _permuted(tape, "moe.to_senders", rows, received.shape, _CAPACITY_OF_EXPERTS, _CAPACITY_OF_BUFFER)


def _permuted(tape: Tape, name: str, x: Tensor, shape: tuple[int, ...], before: int, after: int) -> Tensor:
    """The same rows in another order of dimensions; the capacity moves from dimension ``before`` to ``after``."""
    there = tuple(Split(inputs=(a,), outputs=(b,)) for a, b in ((irregular(before), irregular(after)), (before, after)))
    back = tuple(Split(inputs=split.outputs, outputs=split.inputs) for split in there)
    (y,) = tape.emit("permute", name, (x,), (shape,), there)

    def gradients(dy: Tensor) -> None:
        (dx,) = tape.emit("permute", f"{name}.dx", (dy,), (x.shape,), back)
        tape.give(x, dx)

    tape.then(y, gradients)
    return y


def _expert_linear(tape: Tape, name: str, x: Tensor, num_out: int) -> Tensor:
    """x [E_l, G, C, I] times a weight [E_l, I, O] of each expert, without bias."""
    local, num_in = x.shape[0], x.shape[3]
    weight = tape.given(f"{name}.weight", (local, num_in, num_out))
    shape = (*x.shape[:3], num_out)
    axes = (irregular(_CAPACITY_OF_EXPERTS), _CAPACITY_OF_EXPERTS)
    flops = product_flops(shape, num_in)
    splits = tuple(Split(inputs=(axis, REPLICATED), outputs=(axis,)) for axis in axes)
    (y,) = tape.emit("bmm", name, (x, weight), (shape,), splits, flops=flops)

    def gradients(dy: Tensor) -> None:
        (dx,) = tape.emit("bmm", f"{name}.dx", (dy, weight), (x.shape,), splits, flops=flops)
        tape.give(x, dx)
        sums = tuple(Split(inputs=(axis, axis), outputs=(PARTIAL,)) for axis in axes)
        (dw,) = tape.emit("bmm", f"{name}.dw", (x, dy), (weight.shape,), sums, flops=flops)
        tape.owe(dw)

    tape.then(y, gradients)
    return y
