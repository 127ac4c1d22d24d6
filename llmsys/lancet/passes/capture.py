"""The forward and the backward FX graph of a step, as AOTAutograd makes them, read as one `Graph`.

A functional collective and the wait for it become one op. What the forward saves is an edge to the backward. Views,
random operators and operators of several results are marked or folded; sizes that only the run knows count as
`UNKNOWN_SIZE`, and what depends on them runs whole.

Order beside data: an operator that communicates and is no functional collective (point-to-point, symmetric memory,
collectives in place), or that has another effect, stays in its place among all such operators and all collectives. For
this it gets tensors of no bytes from those before it, and the graph's all-to-alls then run whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, count

from torch import fx

from llmsys.core.errors import InputError
from llmsys.lancet.graph import Graph, Kind, Op, Phase, Split, Tensor
from llmsys.lancet.passes.calls import Call, has_symbols, is_getitem, operands, outputs_of, place_of
from llmsys.lancet.passes.free_slots import keep_safe_splits
from llmsys.lancet.passes.layout import Layout, made_layouts, splits_of
from llmsys.lancet.passes.operators import (
    collective_kind,
    cost_key,
    flops_of,
    group_name_of,
    group_size_of,
    in_place_reason,
    is_ordered,
    is_random,
    is_view,
    is_wait,
    layer_of,
    note_random_results,
    reads_sizes,
    remove_dead,
    target_name,
    tensor_of,
)
from llmsys.lancet.passes.rules import is_chained, raw_splits


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpNodes:
    """The FX nodes of an op: what computes or starts it, then in their order the getitems and waits of its results."""

    node: fx.Node
    results: tuple[fx.Node, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Captured:
    """A graph and where it is from. The modules are those given to `capture`, with dead code removed.

    ``nodes``: of each op, by index. ``names``: the tensor of each FX node of both modules that holds one (or a size).
    ``layouts``: of the tensors that are buffers of experts. ``groups``: the process group of each lane of the graph.
    ``has_symbols``: some size is known only at run time; the graph then shows it as a guess.
    """

    graph: Graph
    forward: fx.GraphModule
    backward: fx.GraphModule | None
    nodes: tuple[OpNodes, ...]
    names: Mapping[fx.Node, str]
    layouts: Mapping[str, Layout]
    groups: Mapping[str, str]
    has_symbols: bool

    def module_of(self, phase: Phase) -> fx.GraphModule | None:
        return self.forward if phase == "forward" else self.backward

    def lines(self) -> list[str]:
        """What must be equal on all ranks: the graph, or where sizes are guesses, the operators with their symbols."""
        if not self.has_symbols:
            return list(self.graph.lines())
        return [f"{op.name}: {op.cost_key} of {', '.join(op.inputs)} {op.kind} {op.group}" for op in self.graph.ops]


def capture(forward: fx.GraphModule, backward: fx.GraphModule | None = None, *, name: str = "step") -> Captured:
    """Read the modules, whose dead code is removed in place. ``backward`` takes the values that ``forward`` saves.

    Raises InputError that names the node for a collective that is used before it was waited for, and for an operator
    that writes to its inputs.
    """
    reader = _Reader()
    reader.read(forward, "forward")
    if backward is not None:
        reader.read(backward, "backward")
    outputs = [n for module in (forward, backward) if module is not None for n in _returned(module)]
    results = {reader.names[n] for n in outputs} - _saved(forward, backward, reader.names)
    ops = keep_safe_splits(reader.ops, [nodes.node for nodes in reader.nodes], reader.layouts, results)
    graph = Graph(
        name=name,
        inputs=tuple(reader.inputs),
        ops=tuple(ops),
        outputs=tuple(dict.fromkeys(reader.names[n] for n in outputs)),
    )
    return Captured(
        graph=graph,
        forward=forward,
        backward=backward,
        nodes=tuple(reader.nodes),
        names=reader.names,
        layouts=reader.layouts,
        groups={lane: group for group, lane in reader.lanes.items()},
        has_symbols=reader.has_symbols,
    )


def _saved(forward: fx.GraphModule, backward: fx.GraphModule | None, names: Mapping[fx.Node, str]) -> set[str]:
    """The tensors that the forward returns for the backward only."""
    if backward is None:
        return set()
    taken = {node.name for node in backward.graph.find_nodes(op="placeholder")}
    times = Counter(_returned(forward))
    return {names[node] for node, number in times.items() if number == 1 and node.name in taken}


def _returned(module: fx.GraphModule) -> Iterable[fx.Node]:
    return operands(module.graph.output_node())


class _Reader:
    """What `capture` has found so far; the parts of `Captured`."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.ops: list[Op] = []
        self.nodes: list[OpNodes] = []
        self.names: dict[fx.Node, str] = {}
        self.layouts: dict[str, Layout] = {}
        self.lanes: dict[str, str] = {}
        self.has_symbols = False
        self._taken: set[str] = set()
        self._op_names: set[str] = set()
        self._folded: set[fx.Node] = set()  # results of ops that were read
        self._phase: Phase = "forward"
        self._saved: dict[str, str] = {}
        self._num_ranks: dict[fx.Node, int] = {}
        self._is_ordered_graph = False
        self._tokens: list[str] = []  # of the communication since the last ordered op
        self._last_ordered: str | None = None

    def read(self, module: fx.GraphModule, phase: Phase) -> None:
        self._phase = phase
        note_random_results(module)
        remove_dead(module)
        nodes = list(module.graph.nodes)
        self._num_ranks = _ranks_of_layers(nodes)
        self._is_ordered_graph = self._is_ordered_graph or any(map(is_ordered, nodes))
        for node in nodes:
            if node.op in ("placeholder", "get_attr"):
                self._read_input(node)
            elif node.op != "output" and node not in self._folded:
                self._read_op(node)
        if phase == "forward":
            self._saved = {n.name: self.names[n] for n in _returned(module)}

    def _read_input(self, node: fx.Node) -> None:
        if self._phase == "backward" and node.op == "placeholder" and node.name in self._saved:
            self.names[node] = self._saved[node.name]
            return
        tensor = tensor_of(node, self._new_name(node.name), outputs_of(node)[0])
        self.has_symbols |= has_symbols(outputs_of(node)[0])
        self.inputs.append(tensor)
        self.names[node] = tensor.name

    def _new_name(self, wanted: str, taken: set[str] | None = None) -> str:
        """``wanted``, or a like name if another tensor has it: of both passes, a node may have the same name."""
        taken = self._taken if taken is None else taken
        others = (f"{wanted}_{'bw' if self._phase == 'backward' else 'fw'}{number or ''}" for number in count())
        name = next(name for name in chain([wanted], others) if name not in taken)
        taken.add(name)
        return name

    def _read_op(self, node: fx.Node) -> None:
        if reason := in_place_reason(node):
            raise InputError(
                f"node {node.name!r} of the {self._phase} graph writes to its inputs",
                expected="a functional graph, as AOTAutograd makes it",
                found=f"{node.target}, {reason}",
                fix="write the operator without mutation, or compile this model with another backend",
            )
        kind = collective_kind(node)
        results, made = self._results(node, waited=kind != "compute")
        self._folded.update(results)
        outputs = []
        for place, holders in made.items():
            tensor = tensor_of(node, self._new_name(holders[-1].name), outputs_of(node)[place])
            outputs.append(tensor)
            self.names.update(dict.fromkeys(holders, tensor.name))
        self._append(node, kind, results, tuple(made), tuple(outputs))

    def _results(self, node: fx.Node, *, waited: bool) -> tuple[tuple[fx.Node, ...], dict[int, list[fx.Node]]]:
        """The getitems and waits of a node in order, and of each used result the nodes that hold it.

        A result is held by the node itself where it has one, else by its getitems; if ``waited``, also by their waits.
        The latter have it last, so a result of communication is named after its wait.
        """
        values = node.meta.get("val")
        several = isinstance(values, tuple | list)
        if values is None and not waited:
            return (), {}
        starts = [(place_of(user), user) for user in node.users if is_getitem(user)] if several else [(0, node)]
        results: list[fx.Node] = [user for _, user in starts if user is not node]
        made: dict[int, list[fx.Node]] = {}
        for place, start in starts:
            waits = [user for user in start.users if is_wait(user)] if waited else []
            if waited and (not waits or not all(is_wait(user) or reads_sizes(user) for user in start.users)):
                raise self._never_waited(node, start)
            made.setdefault(place, []).extend([start, *waits])
            results += waits
        return tuple(results), dict(sorted(made.items()))

    def _never_waited(self, node: fx.Node, start: fx.Node) -> InputError:
        users = [user.name for user in start.users if not is_wait(user)]
        return InputError(
            f"collective {node.name!r} of the {self._phase} graph is used before it was waited for",
            expected="wait_tensor as the only user of a functional collective",
            found=f"{node.target}, used by {', '.join(users) or 'nothing, with other results in use'}",
            fix="call it through torch.distributed._functional_collectives, and use what wait_tensor returns",
        )

    def _append(
        self, node: fx.Node, kind: Kind, results: tuple[fx.Node, ...], places: tuple[int, ...], made: tuple[Tensor, ...]
    ) -> None:
        inputs = tuple(self._name_of(n, node) for n in operands(node))
        symbolic = any(map(has_symbols, (v for n in (node, *operands(node)) for v in outputs_of(n))))
        self.has_symbols |= symbolic
        op = Op(
            name=self._new_name(node.name, self._op_names),
            kind=kind,
            target=target_name(node),
            inputs=inputs,
            outputs=made,
            phase=self._phase,
            splits=() if symbolic or is_random(node) else self._splits(Call.of(node), inputs, places, made),
            chained=is_chained(node.target),
            is_view=is_view(node),
            random=is_random(node),
            group=self._lane(node) if kind != "compute" else "",
            cost_key=cost_key(node),
            flops=0.0 if symbolic else flops_of(node),
            layer=layer_of(node),
        )
        self.ops.append(self._ordered(op, node))
        self.nodes.append(OpNodes(node=node, results=results))

    def _name_of(self, used: fx.Node, user: fx.Node) -> str:
        if used not in self.names:
            raise InputError(
                f"node {user.name!r} of the {self._phase} graph uses a result that tracing did not describe",
                expected="operators whose results are tensors",
                found=f"{used.name!r}, made by {used.target}",
                fix="compile this model with another backend",
            )
        return self.names[used]

    def _splits(
        self, call: Call, inputs: tuple[str, ...], places: tuple[int, ...], made: tuple[Tensor, ...]
    ) -> tuple[Split, ...]:
        raw = raw_splits(call)
        layouts = [self.layouts.get(name, ()) for name in inputs]
        made_here = made_layouts(call, raw, layouts, self._num_ranks.get(call.node, 0)) if raw else []
        if not raw:
            return ()
        for place, tensor in zip(places, made, strict=True):
            if made_here[place]:
                self.layouts[tensor.name] = made_here[place]
        found = splits_of(call, raw, layouts, made_here)
        kept = (replace(s, outputs=tuple(s.outputs[place] for place in places)) for s in found)
        return tuple(dict.fromkeys(kept)) if made else ()

    def _lane(self, node: fx.Node) -> str:
        """Groups are numbered as they appear: their own names differ on ranks of different groups."""
        group = group_name_of(node)
        return self.lanes.setdefault(group, f"group{len(self.lanes)}")

    def _ordered(self, op: Op, node: fx.Node) -> Op:
        if not self._is_ordered_graph or (op.kind == "compute" and not is_ordered(node)):
            return op
        token = Tensor(name=self._new_name(f"after_{op.name}"), shape=(0,), dtype="uint8")
        before = [self._last_ordered] if self._last_ordered else []
        if is_ordered(node):
            before += self._tokens
            self._tokens, self._last_ordered = [], token.name
        else:
            self._tokens.append(token.name)
        return replace(op, inputs=(*op.inputs, *before), outputs=(*op.outputs, token), splits=())


def _ranks_of_layers(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """Of each node the ranks of the next all-to-all, or of the last one after that."""
    found: dict[fx.Node, int] = {}
    ranks = 0
    for node in reversed(nodes):
        if collective_kind(node) == "all_to_all":
            ranks = group_size_of(node)
        found[node] = ranks
    for node in nodes:
        if found[node]:
            ranks = found[node]
        found[node] = found[node] or ranks
    return found
