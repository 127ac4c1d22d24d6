"""Self-attention of a synthetic step: as separate products, as one kernel, or with low-rank projections."""

from __future__ import annotations

from llmsys.lancet.graph import Tensor
from llmsys.lancet.workload.model import StepConfig
from llmsys.lancet.workload.tape import Tape, batch_split, layer_norm, linear, product_flops, softmax

# DeepSeek-V3: ranks of the query and the key-value projections, and the width of a value head. The rotary part of the
# key (64 of 576 columns of the key-value projection) is left out.
_QUERY_RANK, _KEY_VALUE_RANK, _VALUE_DIM = 1536, 512, 128


def attention(tape: Tape, config: StepConfig, x: Tensor) -> Tensor:
    """x [B, S, H] to [B, S, H], with its projections and without the residual."""
    model = config.model
    if model.attention == "latent":
        return _latent(tape, config, x)
    qkv = linear(tape, "attn.qkv", x, 3 * model.num_heads * model.head_dim, bias=True)
    if model.attention == "fused":
        inner = _fused(tape, config, (qkv,), model.head_dim, model.head_dim)
    else:
        inner = _merge_heads(tape, config, _scores_times_values(tape, *_split_heads(tape, config, qkv)))
    return linear(tape, "attn.out", inner, model.hidden, bias=True)


def _latent(tape: Tape, config: StepConfig, x: Tensor) -> Tensor:
    model = config.model
    query = layer_norm(tape, "attn.q_norm", linear(tape, "attn.q_down", x, _QUERY_RANK, bias=False))
    query = linear(tape, "attn.q_up", query, model.num_heads * model.head_dim, bias=False)
    key_value = layer_norm(tape, "attn.kv_norm", linear(tape, "attn.kv_down", x, _KEY_VALUE_RANK, bias=False))
    key_value = linear(tape, "attn.kv_up", key_value, 2 * model.num_heads * _VALUE_DIM, bias=False)
    inner = _fused(tape, config, (query, key_value), model.head_dim, _VALUE_DIM)
    return linear(tape, "attn.out", inner, model.hidden, bias=False)


def _fused(tape: Tape, config: StepConfig, sources: tuple[Tensor, ...], key_dim: int, value_dim: int) -> Tensor:
    """One kernel; its backward has five products of the forward's two, as it computes the scores again."""
    model, num_in = config.model, len(sources)
    # A causal kernel skips half of the products; it also reaches about half of the peak that plain ones do.
    flops = 2.0 * config.num_tokens * config.seq_len * model.num_heads * (key_dim + value_dim)
    shape = (*sources[0].shape[:2], model.num_heads * value_dim)
    (y,) = tape.emit("attention", "attn.core", sources, (shape,), batch_split((0,) * num_in, (0,)), flops=flops)

    def gradients(dy: Tensor) -> None:
        split = batch_split((0,) * (num_in + 2), (0,) * num_in)
        shapes = [source.shape for source in sources]
        made = tape.emit("attention_grad", "attn.core.dx", (dy, y, *sources), shapes, split, flops=2.5 * flops)
        for source, gradient in zip(sources, made, strict=True):
            tape.give(source, gradient)

    tape.then(y, gradients)
    return y


def _split_heads(tape: Tape, config: StepConfig, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, 3 h d] to three [B, h, S, d]."""
    model = config.model
    shape = (config.batch_per_gpu, model.num_heads, config.seq_len, model.head_dim)
    q, k, v = tape.emit("permute", "attn.heads", (qkv,), (shape,) * 3, batch_split((0,), (0, 0, 0)))
    arrived: dict[str, Tensor] = {}

    def gradients_of(source: Tensor) -> None:
        def collect(gradient: Tensor) -> None:
            arrived[source.name] = gradient
            if len(arrived) == 3:
                three = (arrived[q.name], arrived[k.name], arrived[v.name])
                split = batch_split((0, 0, 0), (0,))
                (dqkv,) = tape.emit("permute", "attn.heads.dx", three, (qkv.shape,), split)
                tape.give(qkv, dqkv)

        tape.then(source, collect)

    for source in (q, k, v):
        gradients_of(source)
    return q, k, v


def _scores_times_values(tape: Tape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, seq_len, head_dim = q.shape
    scores = _batched(tape, "attn.scores", q, k, (batch, heads, seq_len, seq_len), head_dim)
    return _batched(tape, "attn.context", softmax(tape, "attn.softmax", scores), v, v.shape, seq_len)


def _batched(tape: Tape, name: str, a: Tensor, b: Tensor, shape: tuple[int, ...], inner: int) -> Tensor:
    """A batched product of two activations: two gradients of them, none of a weight."""
    flops, both = product_flops(shape, inner), batch_split((0, 0), (0,))
    (y,) = tape.emit("bmm", name, (a, b), (shape,), both, flops=flops)

    def gradients(dy: Tensor) -> None:
        (da,) = tape.emit("bmm", f"{name}.da", (dy, b), (a.shape,), both, flops=flops)
        tape.give(a, da)
        (db,) = tape.emit("bmm", f"{name}.db", (a, dy), (b.shape,), both, flops=flops)
        tape.give(b, db)

    tape.then(y, gradients)
    return y


def _merge_heads(tape: Tape, config: StepConfig, context: Tensor) -> Tensor:
    shape = (config.batch_per_gpu, config.seq_len, config.model.num_heads * config.model.head_dim)
    (y,) = tape.emit("permute", "attn.merge", (context,), (shape,), batch_split((0,), (0,)))

    def gradients(dy: Tensor) -> None:
        (dx,) = tape.emit("permute", "attn.merge.dx", (dy,), (context.shape,), batch_split((0,), (0,)))
        tape.give(context, dx)

    tape.then(y, gradients)
    return y
