"""The training step of one device as a graph: forward, loss, backward with separate weight gradients."""

from __future__ import annotations

from llmsys.lancet.graph import REPLICATED, Graph, Tensor
from llmsys.lancet.workload.attention import attention
from llmsys.lancet.workload.experts import mixture
from llmsys.lancet.workload.model import StepConfig
from llmsys.lancet.workload.tape import Tape, add, batch_split, feed_forward, layer_norm, product_flops


def build_step(config: StepConfig) -> Graph:
    """The graph of ``config``. Equal configs give equal graphs.

    Its inputs are the batch and the parameters, its outputs the loss (if the model has a head) and the gradient of
    every parameter. Activations are [B, S, H], so that whole sequences are what the batch can be cut into. Ops are as
    fine as kernels. Weight gradients follow the gradient of their op's input, as autograd
    runs them. Neither dropout nor the optimizer is in it.
    """
    model = config.model
    tape = Tape(name=f"{model.name}, {config.num_gpus} GPUs, {config.gate}", dtype=config.dtype)
    hidden = (config.batch_per_gpu, config.seq_len, model.hidden)
    x = _embedding(tape, config) if model.vocab_size else tape.given("hidden", hidden)
    for layer in range(model.num_layers):
        tape.layer = layer
        x = add(tape, "attn.residual", x, attention(tape, config, layer_norm(tape, "norm1", x)))
        normed = layer_norm(tape, "norm2", x)
        block = (
            mixture(tape, config, normed)
            if model.is_moe(layer)
            else feed_forward(tape, "ffn", normed, model.ffn_hidden, gated=model.gated)
        )
        x = add(tape, "ffn.residual", x, block)
    tape.layer = -1
    x = layer_norm(tape, "final_norm", x)
    if model.vocab_size:
        _loss(tape, config, x)
    else:
        tape.results.append(x.name)
        tape.give(x, tape.given("hidden_grad", hidden))
    tape.backward()
    if config.data_parallel:
        _all_reduce_gradients(tape, config)
    return tape.graph()


def _embedding(tape: Tape, config: StepConfig) -> Tensor:
    model = config.model
    ids = tape.given("tokens", (config.batch_per_gpu, config.seq_len), "int64")
    shape = (*ids.shape, model.hidden)
    embedded = []
    for name, rows in (("embedding", model.vocab_size), ("positions", config.seq_len)):
        table = tape.given(f"{name}.weight", (rows, model.hidden))
        (y,) = tape.emit("embedding", name, (ids, table), (shape,), batch_split((0, REPLICATED), (0,)))

        def gradients(dy: Tensor, name: str = name, table: Tensor = table) -> None:
            (dw,) = tape.emit("embedding_grad", f"{name}.dw", (dy, ids), (table.shape,))
            tape.owe(dw)

        tape.then(y, gradients)
        embedded.append(y)
    return add(tape, "embedding.sum", embedded[0], embedded[1])


def _loss(tape: Tape, config: StepConfig, x: Tensor) -> None:
    """Head and loss, with the head's weight that of the embedding, so that its gradient is added to that one's."""
    labels = tape.given("labels", (config.batch_per_gpu, config.seq_len), "int64")
    logits = _head(tape, config, x)
    (loss,) = tape.emit("cross_entropy", "loss", (logits, labels), ((),))
    tape.results.append(loss.name)
    tape.phase = "backward"
    both = batch_split((0, 0), (0,))
    (dlogits,) = tape.emit("cross_entropy_grad", "loss.dx", (logits, labels), (logits.shape,), both)
    tape.give(logits, dlogits)


def _head(tape: Tape, config: StepConfig, x: Tensor) -> Tensor:
    vocab = config.model.vocab_size
    table = next(tensor for tensor in tape.inputs if tensor.name == "embedding.weight")
    shape = (config.batch_per_gpu, config.seq_len, vocab)
    flops = product_flops(shape, config.model.hidden)
    (y,) = tape.emit("mm", "head", (x, table), (shape,), batch_split((0, REPLICATED), (0,)), flops=flops)

    def gradients(dy: Tensor) -> None:
        split = batch_split((0, REPLICATED), (0,))
        (dx,) = tape.emit("mm", "head.dx", (dy, table), (x.shape,), split, flops=flops)
        tape.give(x, dx)
        (dw,) = tape.emit("mm", "head.dw", (x, dy), (table.shape,), flops=flops)
        tape.owe(dw)

    tape.then(y, gradients)
    return y


def _all_reduce_gradients(tape: Tape, config: StepConfig) -> None:
    """Each dense matrix's gradient, right after the op that makes it; experts have no replicas."""
    recorded, tape.ops = tape.ops, []
    wanted = set(tape.results)
    for op in recorded:
        tape.ops.append(op)
        made = op.outputs[0]
        if op.phase == "forward" or made.name not in wanted or ".experts." in op.name or len(made.shape) != 2:
            continue
        tape.layer, tape.phase = op.layer, "backward"
        reduced = tape.emit("all_reduce", "reduced", (made,), (made.shape,), kind="collective", group=config.data_group)
        tape.results[tape.results.index(made.name)] = reduced[0].name
