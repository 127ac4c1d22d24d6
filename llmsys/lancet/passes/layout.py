"""Where ranks, experts and capacity stand in the buffers of a mixture-of-experts layer, through the ops that move them.

A buffer (experts, capacity, hidden) has its experts as (rank, local expert), and between the all-to-alls becomes
(local experts, ranks * capacity, hidden): the capacity is then an inner factor of a dimension. Cutting that dimension
by capacity takes some rows of each rank, no contiguous piece. So an axis of a tensor whose dimension holds the
capacity within an outer factor always means the capacity, for Slice, Join and every split; `Cut` says which rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from llmsys.lancet.graph import REPLICATED, Split, dimension_of, irregular, is_irregular
from llmsys.lancet.passes.calls import Call, Shape
from llmsys.lancet.passes.rules import VIEWS_BY_SIZE

_BUFFER_MAKERS = ("llmsys.moe_dispatch.default", "llmsys.moe_combine_buffer_grad.default")
_ALL_TO_ALL = "_c10d_functional.all_to_all_single.default"
# Their sizes are arguments that cannot be left open, so they take no part of a size that only the run knows.
_FIXED_SIZES = ("aten.slice_backward.default", "aten.select_backward.default")


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """ "g" (ranks), "e" (experts of a rank) or "c" (capacity): a factor of dimension ``dim``, ``inner`` inside it."""

    name: str
    size: int
    dim: int
    inner: int = 1


Layout = tuple[Factor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What an axis cuts: a dimension of outer * size * inner elements along ``size``."""

    outer: int
    size: int
    inner: int


def cut_of(shape: Shape, layout: Layout, axis: int) -> Cut:
    for factor in layout:
        if factor.name == "c" and factor.dim == axis and factor.size > 1:
            outer = shape[axis] // (factor.size * factor.inner)
            if outer > 1:
                return Cut(outer=outer, size=factor.size, inner=factor.inner)
    return Cut(outer=1, size=shape[axis], inner=1)


def seed(shape: Shape, num_ranks: int) -> Layout:
    """The layout of a buffer at an all-to-all over ``num_ranks``: (ranks * local experts, capacity, ...)."""
    if len(shape) < 3 or num_ranks < 1 or shape[0] % num_ranks:
        return ()
    local = shape[0] // num_ranks
    return (
        Factor(name="g", size=num_ranks, dim=0, inner=local),
        Factor(name="e", size=local, dim=0),
        Factor(name="c", size=shape[1], dim=1),
    )


def irregular_order(shape: Shape, layout: Layout) -> tuple[str, ...]:
    """The factors in the order in which they make the leading dimensions; () unless they do, with capacity last."""
    capacity = next((f for f in layout if f.name == "c"), None)
    if len(layout) != 3 or capacity is None or capacity.inner != 1:
        return ()
    if prod(shape[: capacity.dim + 1]) != prod(f.size for f in layout):
        return ()
    others = sorted((f for f in layout if f.name != "c"), key=lambda f: (f.size > 1, f.dim, -f.inner))
    inside = [f for f in others if f.size > 1 and (f.dim, -f.inner) > (capacity.dim, -capacity.inner)]
    return () if inside else (*(f.name for f in others), "c")


def made_layouts(call: Call, raw: Sequence[Split], layouts: Sequence[Layout], num_ranks: int) -> list[Layout]:
    """The layouts of the results of a call on inputs of ``layouts``. ``num_ranks``: of the layer's all-to-alls."""
    target = str(call.node.target)
    if target in _BUFFER_MAKERS or target == _ALL_TO_ALL:
        return [seed(shape, num_ranks) for shape in call.outputs]
    if target in VIEWS_BY_SIZE:
        return [_viewed(call.inputs[0], call.outputs[0], layouts[0])]
    return [_carried(raw, layouts, place) for place in range(len(call.outputs))]


def _carried(raw: Sequence[Split], layouts: Sequence[Layout], place: int) -> Layout:
    """Factors go where the splits of their dimension go; the first input that has a layout decides."""
    for number, layout in enumerate(layouts):
        if not layout:
            continue
        targets = {s.inputs[number]: s.outputs[place] for s in raw if s.inputs[number] >= 0 and s.outputs[place] >= 0}
        return tuple(replace(f, dim=targets[f.dim]) for f in layout if f.dim in targets)
    return ()


def _viewed(shape: Shape, made: Shape, layout: Layout) -> Layout:
    """A view keeps the order of elements, so a factor keeps the number of elements inside it."""
    if prod(shape) != prod(made):
        return ()
    found = []
    for factor in layout:
        inside = factor.inner * prod(shape[factor.dim + 1 :])
        for dim, size in enumerate(made):
            inner, rest = divmod(inside, prod(made[dim + 1 :]) or 1)
            if not rest and inner and size % (factor.size * inner) == 0:
                found.append(replace(factor, dim=dim, inner=inner))
                break
    return tuple(found)


def splits_of(call: Call, raw: Sequence[Split], inputs: Sequence[Layout], outputs: Sequence[Layout]) -> list[Split]:
    """The splits that hold: those that cut every tensor by the same rows, and irregular ones of buffers."""
    by_capacity = _capacity_views(call, inputs, outputs)
    sides = ((call.inputs, inputs), (call.outputs, outputs))
    dims = tuple([_capacity_dim(call, *pair) for pair in zip(*side, strict=True)] for side in sides)
    found = []
    for split in [*raw, *by_capacity]:
        cuts = set(_cuts(call, split, inputs, outputs))
        strided = {cut for cut in cuts if cut.outer > 1}
        alike = not strided or split in by_capacity or (cuts == strided and len(strided) == 1)
        if alike and all(cut.size > 1 for cut in cuts) and _has_layouts(split, *dims):
            found.append(split)
    return list(dict.fromkeys([*found, *_irregular(call, [*raw, *by_capacity], *dims)]))


def _has_layouts(split: Split, inputs: Sequence[int | None], outputs: Sequence[int | None]) -> bool:
    """Whether what an operator's own rule cuts irregularly is a buffer whose capacity is there."""
    pairs = (*zip(split.inputs, inputs, strict=True), *zip(split.outputs, outputs, strict=True))
    return all(dimension_of(axis) == dim for axis, dim in pairs if is_irregular(axis))


def _cuts(call: Call, split: Split, inputs: Sequence[Layout], outputs: Sequence[Layout]) -> Iterable[Cut]:
    sides = ((split.inputs, call.inputs, inputs), (split.outputs, call.outputs, outputs))
    for axes, shapes, layouts in sides:
        for axis, shape, layout in zip(axes, shapes, layouts, strict=True):
            if axis >= 0 and axis < len(shape):
                yield cut_of(shape, layout, axis)


def _capacity_views(call: Call, inputs: Sequence[Layout], outputs: Sequence[Layout]) -> list[Split]:
    if str(call.node.target) not in VIEWS_BY_SIZE:
        return []
    before, after = (next((f for f in layout if f.name == "c"), None) for layout in (inputs[0], outputs[0]))
    if before is None or after is None:
        return []
    whole = all(
        f.size > 1 and (cut_of(shape, layout, f.dim).outer > 1 or shape[f.dim] == f.size)
        for f, shape, layout in ((before, call.inputs[0], inputs[0]), (after, call.outputs[0], outputs[0]))
    )
    return [Split(inputs=(before.dim,), outputs=(after.dim,))] if whole else []


def _irregular(
    call: Call, splits: Sequence[Split], inputs: Sequence[int | None], outputs: Sequence[int | None]
) -> Iterable[Split]:
    """What cuts all its tensors along their capacity can also take some rows of it, a number that the run knows."""
    if str(call.node.target) in _FIXED_SIZES:
        return
    for split in splits:
        cut = [place for place, axis in enumerate(split.inputs) if axis >= 0]
        if cut and all(split.inputs[p] == inputs[p] for p in cut) and split.outputs == tuple(outputs):
            yield Split(
                inputs=tuple(a if a == REPLICATED else irregular(a) for a in split.inputs),
                outputs=tuple(irregular(a) for a in split.outputs),
            )


def _capacity_dim(call: Call, shape: Shape, layout: Layout) -> int | None:
    """The dimension that an irregular part cuts; the operators that know of ranks want them outermost."""
    order = irregular_order(shape, layout)
    own = str(call.node.target) == _ALL_TO_ALL or str(call.node.target).startswith("llmsys.moe_")
    if not order or (own and order[0] != "g"):
        return None
    return next(f.dim for f in layout if f.name == "c")
