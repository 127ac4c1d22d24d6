"""What an FX node is: a collective, a wait, a view, random, ordered; its cost key, operations and layer."""

from __future__ import annotations

import math
import operator
import re
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # registers torch.ops._c10d_functional
from torch import fx
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state
from torch.utils.flop_counter import flop_registry

from llmsys.lancet.graph import Kind, Tensor
from llmsys.lancet.passes.calls import has_symbols, operands, outputs_of

UNKNOWN_SIZE = 1024
"""What counts as a size of which tracing has not even an example."""

_FUNCTIONAL = ("_c10d_functional", "_c10d_functional_autograd")
_COMMUNICATING = (*_FUNCTIONAL, "c10d", "_dtensor", "symm_mem")
_ALL_TO_ALL = "all_to_all_single"
_COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "all_gather_into_tensor",
    "all_gather_into_tensor_coalesced",
    "reduce_scatter_tensor",
    "reduce_scatter_tensor_coalesced",
    "broadcast",
)
_WAIT = "wait_tensor"
_HIDDEN_VIEWS = ("aten._unsafe_view.default",)
_COUNTED_AS = {  # torch counts these by other names only
    "aten._scaled_dot_product_flash_attention_for_cpu.default": torch.ops.aten._scaled_dot_product_flash_attention,
}
_LAYER = re.compile(r"(?:layers?|h|blocks?|layer_list)\W+(\d+)")


def _operator(node: fx.Node) -> tuple[str, str]:
    """(namespace, name) of an operator call; ("", "") for anything else."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return "", ""
    namespace, _, name = node.target._schema.name.partition("::")
    return namespace, name


def collective_kind(node: fx.Node) -> Kind:
    namespace, name = _operator(node)
    if namespace in _FUNCTIONAL:
        if name == _ALL_TO_ALL:
            return "all_to_all"
        if name in _COLLECTIVES:
            return "collective"
    return "compute"


def is_wait(node: fx.Node) -> bool:
    namespace, name = _operator(node)
    return namespace in _FUNCTIONAL and name == _WAIT


def reads_sizes(node: fx.Node) -> bool:
    """Whether the node asks for a tensor's shape only, which is there before its contents."""
    return _operator(node)[1].startswith("sym_")


def is_ordered(node: fx.Node) -> bool:
    """Whether the node communicates in another way than a functional collective, or has an effect without a result.

    A wait counts if what it waits for is no functional collective. Checks of sizes have no effect on others.
    """
    namespace, _ = _operator(node)
    if is_wait(node):
        source = node.args[0]
        while isinstance(source, fx.Node) and source.target is operator.getitem:
            source = source.args[0]
        return not isinstance(source, fx.Node) or collective_kind(source) == "compute"
    if namespace in _COMMUNICATING:
        return collective_kind(node) == "compute"
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.is_impure()


def in_place_reason(node: fx.Node) -> str:
    """Why the node cannot be moved at all, "" if it can: it writes to a tensor that other nodes may hold."""
    if node.op != "call_function":
        return f"a node of kind {node.op}"
    namespace, _ = _operator(node)
    if namespace in _COMMUNICATING or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return "whose schema says that it does" if node.target._schema.is_mutable else ""


def is_view(node: fx.Node) -> bool:
    """Whether the results share the memory of the first input."""
    if not isinstance(node.target, torch._ops.OpOverload) or not operands(node):
        return False
    return bool(node.target.is_view) or str(node.target) in _HIDDEN_VIEWS


def is_random(node: fx.Node) -> bool:
    if node.target is run_and_save_rng_state:
        return True
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    assert isinstance(node.target, torch._ops.OpOverload)
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.name in ("dropout_p", "p", "train", "training"):
            given = node.kwargs.get(argument.name, argument.default_value)
            given = node.args[place] if place < len(node.args) else given
            if given in (0, 0.0, False):
                return False
    return True


def note_random_results(module: fx.GraphModule) -> None:
    """Add what tracing would have noted to the calls by which torch draws the same numbers again in the backward.

    They replace random operators that activation checkpointing recomputes, after tracing.
    """
    for node in module.graph.nodes:
        if node.target is run_and_save_rng_state:
            found = {user.args[1]: user.meta.get("val") for user in node.users}
            node.meta["val"] = (found.get(0), found.get(1))
        elif node.target is run_with_rng_state and "val" not in node.meta:
            _, drawn, *args = fx.map_arg(node.args, lambda n: n.meta["val"])
            node.meta["val"] = drawn(*args, **fx.map_arg(node.kwargs, lambda n: n.meta["val"]))


def remove_dead(module: fx.GraphModule) -> None:
    """Remove what no result depends on, collectives too, but neither random operators nor ordered ones.

    The result depends on the graph alone, so ranks with equal graphs stay equal.
    """

    def has_effect(node: fx.Node) -> bool:
        if collective_kind(node) != "compute" or (is_wait(node) and not is_ordered(node)):
            return False
        return is_ordered(node) or is_random(node) or node.is_impure()

    module.graph.eliminate_dead_code(is_impure_node=has_effect)
    module.recompile()


def group_name_of(node: fx.Node) -> str:
    return str(node.args[-1] if node.args else node.kwargs.get("group_name", ""))


def group_size_of(node: fx.Node) -> int:
    sizes = node.args[1] if len(node.args) > 1 else None
    if isinstance(sizes, list | tuple):
        return len(sizes)
    return dist.get_world_size() if dist.is_initialized() else 1


def target_name(node: fx.Node) -> str:
    """What a node calls, the same text in every process."""
    if node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload):
        return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', node.target)}"
    return str(node.target)


def tensor_of(node: fx.Node, name: str, value: Any) -> Tensor:
    if isinstance(value, torch.Tensor):
        shape = tuple(size_of(n) for n in value.shape)
        return Tensor(name=name, shape=shape, dtype=str(value.dtype).removeprefix("torch."))
    return Tensor(name=name, shape=(), dtype="int64")


def size_of(size: Any) -> int:
    """A size as a number: of a symbol, the value that tracing saw, or `UNKNOWN_SIZE`."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else UNKNOWN_SIZE


def cost_key(node: fx.Node) -> str:
    """The operator, and of its arguments the shapes, strides and types of tensors and the values of all others."""

    def shown(argument: Any) -> Any:
        return _Shown(outputs_of(argument)[0])

    args, kwargs = fx.map_arg(node.args, shown), fx.map_arg(node.kwargs, shown)
    if collective_kind(node) != "compute":
        args = args[:-1]  # the group's own name: it is no cost
    text = ", ".join([*map(str, args), *(f"{name}={value}" for name, value in kwargs.items())])
    return f"{target_name(node)}({text})"


class _Shown:
    def __init__(self, value: Any) -> None:
        self._value = value

    def __repr__(self) -> str:
        value = self._value
        if not isinstance(value, torch.Tensor):
            return str(value)
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}{list(value.shape)}{list(value.stride())}@{value.device.type}".replace(" ", "")


def flops_of(node: fx.Node) -> float:
    """Floating-point operations by torch's own formulas; 0 for an operator without one."""
    packet = _COUNTED_AS.get(str(node.target), getattr(node.target, "overloadpacket", None))
    if packet not in flop_registry or any(map(has_symbols, outputs_of(node))):
        return 0.0

    def value_of(n: fx.Node) -> Any:
        return outputs_of(n)[0] if len(outputs_of(n)) == 1 else outputs_of(n)

    args, kwargs = fx.map_arg(node.args, value_of), fx.map_arg(node.kwargs, value_of)
    found = flop_registry[packet](*args, **kwargs, out_val=node.meta.get("val"))
    return float(found) if math.isfinite(found) else 0.0


def layer_of(node: fx.Node) -> int:
    """The number in the module path that traced the node, -1 if there is none."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    for path, *_ in reversed(list(stack.values())):
        if found := _LAYER.search(str(path)):
            return int(found.group(1))
    return -1
