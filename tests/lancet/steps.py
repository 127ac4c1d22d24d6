"""Small steps for tests of planning: random ones with every kind of op, and a hand-made MoE backward pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from llmsys.core.specs import NODES
from llmsys.lancet.costs import CostModel, TableCosts, cluster_costs
from llmsys.lancet.graph import Graph, Kind, Op, Phase, Tensor
from llmsys.lancet.workload import Gate, StepConfig, build_step, moe_model


def op(
    name: str,
    *inputs: str,
    kind: Kind = "compute",
    phase: Phase = "backward",
    rows: int = 25,
    view: bool = False,
    random: bool = False,
    group: str = "",
) -> Op:
    """An op that makes tensor ``name`` of 40 bytes a row, or one byte for each 0.01 MB in tests of memory."""
    return Op(
        name=name,
        kind=kind,
        target=kind,
        inputs=inputs,
        outputs=(Tensor(name=name, shape=(rows, 10)),),
        phase=phase,
        is_view=view,
        random=random,
        group=group or ("ep" if kind == "all_to_all" else "dp" if kind == "collective" else ""),
    )


def all_to_all(name: str, *inputs: str, phase: Phase = "backward", group: str = "ep") -> Op:
    return op(name, *inputs, kind="all_to_all", phase=phase, group=group)


def moe_backward() -> tuple[Graph, TableCosts]:
    """Two layers' worth of backward pass with weight gradients, their casts, and a sum over data parallelism.

    Both weight gradients come before the op that makes what the next all-to-all sends, so it cannot start before them.
    """
    ops = (
        op("h1", "x", phase="forward"),
        op("loss", "h1", phase="forward"),
        op("d2", "loss"),
        op("view2", "h1", view=True),
        op("dw2", "d2", "view2"),
        op("cast2", "dw2"),
        op("sum2", "cast2", kind="collective"),
        op("e1", "d2"),
        all_to_all("a1", "e1"),
        op("d1", "a1"),
        op("dw1", "d1", "h1"),
        op("cast1", "dw1"),
        op("e0", "d1"),
        all_to_all("a0", "e0"),
        op("d0", "a0"),
    )
    inputs = (Tensor(name="x", shape=(25, 10)),)
    graph = Graph(name="moe_backward", inputs=inputs, ops=ops, outputs=("d0", "sum2", "cast1"))
    times = {"dw2": 4.0, "dw1": 3.0, "cast2": 1.0, "cast1": 0.5, "a1": 5.0, "a0": 3.5}
    return graph, TableCosts(ops_ms={o.name: times.get(o.name, 1.0) for o in ops})


def random_step(rng: np.random.Generator, num_ops: int = 40, *, with_random: bool = True) -> tuple[Graph, TableCosts]:
    """Ops of both phases, mixed in the graph's order, with views, random ops, two groups and two outputs an op."""
    inputs = tuple(Tensor(name=f"in{i}", shape=(int(rng.integers(1, 9)), 10)) for i in range(3))
    ops: list[Op] = []
    forward = [tensor.name for tensor in inputs]
    everything = list(forward)
    for number in range(num_ops):
        phase: Phase = "forward" if rng.random() < 0.4 else "backward"
        known = forward if phase == "forward" else everything
        kind: Kind = "compute"
        if (draw := rng.random()) < 0.15:
            kind = "all_to_all"
        elif draw < 0.25:
            kind = "collective"
        # Recent tensors are likelier, so that there are chains.
        many = 1 if kind != "compute" else int(rng.integers(1, 4))
        picks = {known[-1 - min(int(rng.exponential(4)), len(known) - 1)] for _ in range(many)}
        view = kind == "compute" and len(picks) == 1 and rng.random() < 0.2
        made = tuple(
            Tensor(name=f"t{number}.{i}", shape=(int(rng.integers(1, 9)), 10)) for i in range(int(rng.integers(1, 3)))
        )
        ops.append(
            Op(
                name=f"op{number}",
                kind=kind,
                target=kind,
                inputs=tuple(sorted(picks)),
                outputs=made,
                phase=phase,
                is_view=view,
                random=with_random and kind == "compute" and not view and rng.random() < 0.05,
                group="" if kind == "compute" else str(rng.choice(["ep", "dp"])),
            )
        )
        names = [tensor.name for tensor in made]
        everything += names
        if phase == "forward":
            forward += names
    outputs = tuple(name for name in everything[len(inputs) :] if rng.random() < 0.1)
    graph = Graph(name="random", inputs=inputs, ops=tuple(ops), outputs=outputs)
    # Whole numbers of quarters add up without rounding.
    return graph, TableCosts(ops_ms={o.name: float(rng.integers(1, 30)) / 4 for o in ops})


def gpt_step(
    num_layers: int = 4, *, gate: Gate = "switch", data_parallel: bool = False, data_group: str = "dp"
) -> tuple[Graph, CostModel]:
    """A small GPT-2 with a mixture in every other layer, on 16 GPUs of the paper's first cluster."""
    step = StepConfig(
        model=replace(moe_model("gpt2_s_moe"), num_layers=num_layers),
        num_gpus=16,
        batch_per_gpu=8,
        gate=gate,
        data_parallel=data_parallel,
        data_group=data_group,
    )
    return build_step(step), cluster_costs(NODES["p4de"], 16, arithmetic="tf32")
