"""Which splits an operator has, by its name and shapes: the function F of Lancet's axis constraints.

A rule lists splits along every dimension, also those of size 1; `layout` drops what cannot be cut, and adds irregular
axes. An operator without a rule runs whole. Each rule is checked by running its parts in tests/lancet/test_rules.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch

from llmsys.kernels.moe import TOKEN_MAJOR_GATES
from llmsys.lancet.graph import LAST, PARTIAL, REPLICATED, Split, irregular
from llmsys.lancet.passes.calls import Call, Rule, Shape

VIEWS_BY_SIZE = ("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default")
"""Operators that keep the order of elements and take the new sizes."""

SQUEEZES = ("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims")

CHAINED = {"llmsys.moe_route.default": (1, 2)}
"""Of operators whose parts pass a state on: the input that takes it, and the output that gives it."""


def raw_splits(call: Call) -> list[Split]:
    """The splits of an operator along contiguous pieces of dimensions; none for an operator without a rule."""
    rule = RULES.get(str(call.node.target))
    if rule is None:
        tags = getattr(call.node.target, "tags", ())
        rule = pointwise if torch.Tag.pointwise in tags else None
    return [] if rule is None else list(rule(call))


def is_chained(target: object) -> bool:
    return str(target) in CHAINED


def pointwise(call: Call) -> Iterator[Split]:
    """Elementwise with broadcasting."""
    out = call.outputs[0]
    if any(shape != out for shape in call.outputs):
        return
    for axis, size in enumerate(out):
        cut = {}
        for place, shape in enumerate(call.inputs):
            own = axis - len(out) + len(shape)
            if own >= 0 and shape[own] == size:
                cut[place] = own
        yield call.split(cut, [axis] * len(call.outputs))


def along_others(call: Call, dims: set[int]) -> Iterator[Split]:
    """Splits along each dimension that all tensors have alike, but ``dims``, which the operator mixes."""
    shapes = (*call.inputs, *call.outputs)
    for axis in range(len(call.inputs[0])):
        if axis not in dims and all(axis < len(shape) and shape[axis] == shapes[0][axis] for shape in shapes):
            yield Split(inputs=(axis,) * len(call.inputs), outputs=(axis,) * len(call.outputs))


def mixing(place: int, default: int = -1) -> Rule:
    """An operator that works along the one dimension that is its argument ``place``, as softmax does."""

    def rule(call: Call) -> Iterator[Split]:
        yield from along_others(call, {_dim(call.argument(place, "dim", default), call.inputs[0])})

    return rule


def reduction(call: Call) -> Iterator[Split]:
    """Of dimensions that are argument 1, None for all; a sum of a cut dimension is the sum of the parts' sums."""
    shape = call.inputs[0]
    given = call.argument(1, "dim")
    given = [given] if isinstance(given, int) else given
    reduced = {_dim(d, shape) for d in given} if given else set(range(len(shape)))
    keeps = bool(call.argument(2, "keepdim", False))
    for axis in range(len(shape)):
        if axis in reduced:
            if str(call.node.target).startswith("aten.sum."):
                yield call.split({0: axis}, [PARTIAL])
        else:
            kept = axis if keeps else axis - sum(d < axis for d in reduced)
            yield call.split({0: axis}, [kept] * len(call.outputs))


def whole_sum(call: Call) -> Iterator[Split]:
    for axis in range(len(call.inputs[0])):
        yield call.split({0: axis}, [PARTIAL])


def norm(call: Call) -> Iterator[Split]:
    """Dimensions before the normalised ones."""
    for axis in range(len(call.inputs[0]) - len(call.argument(1, "normalized_shape"))):
        yield call.split({0: axis}, [axis] * len(call.outputs))


def layer_norm_backward(call: Call) -> Iterator[Split]:
    """(grad, x, shape, mean, rstd, weight, bias, mask): gradients of weight and bias are sums over the rest."""
    for axis in range(len(call.inputs[0]) - len(call.argument(2, "normalized_shape"))):
        yield call.split(dict.fromkeys(range(4), axis), [axis, PARTIAL, PARTIAL])


def mm(call: Call) -> Iterator[Split]:
    yield call.split({0: 0}, [0])
    yield call.split({1: 1}, [1])
    yield call.split({0: 1, 1: 0}, [PARTIAL])


def bmm(call: Call) -> Iterator[Split]:
    yield call.split({0: 0, 1: 0}, [0])
    yield call.split({0: 1}, [1])
    yield call.split({1: 2}, [2])
    yield call.split({0: 2, 1: 1}, [PARTIAL])


def with_addend(rule: Rule) -> Rule:
    """addmm and baddbmm: the addend broadcasts. The contraction is not cut: the addend would count several times."""

    def with_first(call: Call) -> Iterator[Split]:
        addend, out = call.inputs[0], call.outputs[0]
        product = Call(node=call.node, inputs=call.inputs[1:], outputs=call.outputs)
        for split in rule(product):
            axis = split.outputs[0]
            if axis != PARTIAL:
                own = axis - len(out) + len(addend)
                cut = own if own >= 0 and addend[own] == out[axis] else REPLICATED
                yield Split(inputs=(cut, *split.inputs), outputs=split.outputs)

    return with_first


def view(call: Call) -> Iterator[Split]:
    """A dimension and the one that begins and ends where it does, cut where both can be; others hold whole."""
    shape, out = call.inputs[0], call.outputs[0]
    for axis, size in enumerate(shape):
        for made, made_size in enumerate(out):
            if not size or not made_size or prod(shape[:axis]) != prod(out[:made]):
                continue
            if size % made_size == 0 or made_size % size == 0:
                yield call.split({0: axis}, [made])


def permutation(dims: Rule | None = None, *, kind: str) -> Rule:
    """permute, transpose and t: output dimension i is input dimension order[i]."""

    def rule(call: Call) -> Iterator[Split]:
        order = list(range(len(call.inputs[0])))
        if kind == "permute":
            order = [_dim(d, call.inputs[0]) for d in call.argument(1, "dims")]
        elif kind == "transpose":
            first, second = (_dim(call.argument(p, f"dim{p - 1}"), call.inputs[0]) for p in (1, 2))
            order[first], order[second] = order[second], order[first]
        else:
            order.reverse()
        for made, axis in enumerate(order):
            yield call.split({0: axis}, [made])

    return rule


def unsqueeze(call: Call) -> Iterator[Split]:
    new = call.argument(1, "dim") % len(call.outputs[0])
    for axis in range(len(call.inputs[0])):
        yield call.split({0: axis}, [axis + (axis >= new)])


def squeezed(call: Call) -> list[int]:
    """The dimensions that a squeeze removes: of a part, which may have others of size 1, the same ones."""
    shape = call.inputs[0]
    given = call.argument(1, "dim", tuple(range(len(shape))))
    given = (given,) if isinstance(given, int) else given
    return sorted({_dim(d, shape) for d in given if shape[_dim(d, shape)] == 1})


def squeeze(call: Call) -> Iterator[Split]:
    gone = squeezed(call)
    for axis in range(len(call.inputs[0])):
        if axis not in gone:
            yield call.split({0: axis}, [axis - sum(d < axis for d in gone)])


def select(call: Call) -> Iterator[Split]:
    """select and unbind: the dimension that is argument 1 goes."""
    gone = _dim(call.argument(1, "dim", 0), call.inputs[0])
    for axis in range(len(call.inputs[0])):
        if axis != gone:
            yield call.split({0: axis}, [axis - (axis > gone)] * len(call.outputs))


def pieces(place: int) -> Rule:
    """slice, split, cat and the like, along a dimension that is argument ``place``: the others."""

    def rule(call: Call) -> Iterator[Split]:
        mixed = _dim(call.argument(place, "dim", 0), call.inputs[0])
        for axis in range(len(call.inputs[0])):
            if axis != mixed:
                yield Split(inputs=(axis,) * len(call.inputs), outputs=(axis,) * len(call.outputs))

    return rule


def stack(call: Call) -> Iterator[Split]:
    new = call.argument(1, "dim", 0) % len(call.outputs[0])
    for axis in range(len(call.inputs[0])):
        yield Split(inputs=(axis,) * len(call.inputs), outputs=(axis + (axis >= new),))


def select_backward(call: Call) -> Iterator[Split]:
    new = call.argument(2, "dim") % len(call.outputs[0])
    for axis in range(len(call.inputs[0])):
        yield call.split({0: axis}, [axis + (axis >= new)])


def embedding(call: Call) -> Iterator[Split]:
    for axis in range(len(call.inputs[1])):
        yield call.split({1: axis}, [axis])


def embedding_backward(call: Call) -> Iterator[Split]:
    for axis in range(len(call.inputs[1])):
        yield call.split({0: axis, 1: axis}, [PARTIAL])


def attention(num_tensors: int) -> Rule:
    """Attention by batch, dimension 0, and by head, dimension 1; a mask broadcasts to (batch, heads, ...)."""

    def rule(call: Call) -> Iterator[Split]:
        for axis in (0, 1):
            sizes = {shape[axis] for shape in (*call.inputs[:num_tensors], *call.outputs)}
            if len(sizes) != 1:
                continue
            cut = dict.fromkeys(range(num_tensors), axis)
            for place, shape in enumerate(call.inputs[num_tensors:], num_tensors):
                own = axis - 4 + len(shape)
                if own >= 0 and shape[own] > 1:
                    cut[place] = own
            yield call.split(cut, [axis] * len(call.outputs))

    return rule


def moe_route(call: Call) -> Iterator[Split]:
    """By tokens, if the gate serves them in their order: then parts pass the used capacity on."""
    if call.argument(2, "gate") in TOKEN_MAJOR_GATES:
        yield call.split({0: 0}, [0, 0, LAST])


def moe_dispatch(call: Call) -> Iterator[Split]:
    yield call.split(dict.fromkeys(range(3), 0), [irregular(1)])


def moe_combine(call: Call) -> Iterator[Split]:
    yield call.split({0: irregular(1), 1: 0, 2: 0, 3: 0}, [0])


def all_to_all(call: Call) -> Iterator[Split]:
    """By a dimension inside the rows; dimension 0 is that of the ranks."""
    if len(call.inputs) == 1 and len(call.inputs[0]) >= 3:
        yield call.split({0: 1}, [1])


def _dim(dim: int, shape: Shape) -> int:
    return dim % max(1, len(shape))


_VIEWS: dict[str, Rule] = {
    **dict.fromkeys(VIEWS_BY_SIZE, view),
    "aten.permute.default": permutation(kind="permute"),
    "aten.transpose.int": permutation(kind="transpose"),
    "aten.t.default": permutation(kind="t"),
    "aten.unsqueeze.default": unsqueeze,
    **dict.fromkeys(SQUEEZES, squeeze),
    "aten.expand.default": pointwise,
    **dict.fromkeys(("aten.detach.default", "aten.alias.default"), pointwise),
    **dict.fromkeys(("aten.select.int", "aten.unbind.int"), select),
    "aten.slice.Tensor": pieces(1),
    **dict.fromkeys(("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default"), pieces(2)),
}

RULES: dict[str, Rule] = {
    **_VIEWS,
    "aten._to_copy.default": pointwise,
    "aten.cat.default": pieces(1),
    "aten.stack.default": stack,
    "aten.slice_backward.default": pieces(2),
    "aten.select_backward.default": select_backward,
    **dict.fromkeys(("aten._softmax.default", "aten._log_softmax.default", "aten.cumsum.default"), mixing(1)),
    **dict.fromkeys(("aten._softmax_backward_data.default", "aten._log_softmax_backward_data.default"), mixing(2)),
    "aten.topk.default": mixing(2),
    "aten.sort.default": mixing(1),
    "aten.gather.default": mixing(1),
    **dict.fromkeys(("aten.sum.dim_IntList", "aten.mean.dim", "aten.amax.default", "aten.argmax.default"), reduction),
    "aten.sum.default": whole_sum,
    "aten.native_layer_norm.default": norm,
    "aten.native_layer_norm_backward.default": layer_norm_backward,
    "aten.mm.default": mm,
    "aten.bmm.default": bmm,
    "aten.addmm.default": with_addend(mm),
    "aten.baddbmm.default": with_addend(bmm),
    "aten.embedding.default": embedding,
    "aten.embedding_dense_backward.default": embedding_backward,
    "aten._scaled_dot_product_flash_attention_for_cpu.default": attention(3),
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": attention(6),
    "llmsys.moe_route.default": moe_route,
    "llmsys.moe_dispatch.default": moe_dispatch,
    "llmsys.moe_combine.default": moe_combine,
    "_c10d_functional.all_to_all_single.default": all_to_all,
}
