"""Forward time by how much around an MoE layer is pipelined with its all-to-alls (paper Fig. 6)."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from experiments import style
from experiments.record import Comparison, Row, RunContext, require_positive
from llmsys.core.specs import NODES
from llmsys.lancet.axes import infer_splits
from llmsys.lancet.config import AxisSolver
from llmsys.lancet.costs import RooflineCosts, cluster_costs
from llmsys.lancet.costs.roofline import Arithmetic
from llmsys.lancet.graph import Graph
from llmsys.lancet.partition import part_counts, region_ms
from llmsys.lancet.plan import Region
from llmsys.lancet.workload import MoEModel, StepConfig, build_step

TITLE = "Fig. 6: forward time against the partition range"
CLAIM = """The paper's forward time falls and then rises again with the range that is pipelined, for few layers with a
large batch and for many with a small one, on 16 A100: the best range is neither the all-to-alls with the experts
(Tutel) nor everything. Its layers, batches and values are not public. Ours sweeps the same share of the computation
between two MoE layers before and after each, in the best number of parts for each range. With matmuls in plain fp32
the curve has the paper's shape: what is beyond the point at which communication is hidden only adds launches and
copies. With TF32, which fits the paper's speed-ups better (Fig. 11), communication is never hidden whole on 16 A100,
and the widest range is the best. The curves have steps because an op is in a range whole or not at all."""

WHOLE = -1.0
"""The range of a row without parts, to the left of all others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A GPT-2 with every other block a mixture, on A100 GPUs."""

    num_layers: int
    batch_per_gpu: int
    hidden: int = 768

    @property
    def name(self) -> str:
        return f"{self.num_layers} layers, {self.batch_per_gpu} sequences a GPU"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """``ranges``: share of the computation between two MoE layers that is pipelined, half before and half after.

    The paper has fewer layers with a large batch, and more layers with a small one; their numbers are not public.
    """

    cases: tuple[Case, ...] = (Case(num_layers=12, batch_per_gpu=48), Case(num_layers=24, batch_per_gpu=8))
    ranges: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    num_gpus: int = 16
    arithmetics: tuple[Arithmetic, ...] = ("tf32", "fp32")
    max_parts: int = 8
    axis_solver: AxisSolver = "cp_sat"

    def __post_init__(self) -> None:
        require_positive(self, "num_gpus", "max_parts")
        require_positive(self, "ranges", or_zero=True)


def run(cfg: Config, context: RunContext) -> list[Row]:
    rows: list[Row] = []
    grid = [(case, arithmetic) for case in cfg.cases for arithmetic in cfg.arithmetics]
    for case, arithmetic in context.progress(grid, "sweeps"):
        rows += _rows(case, arithmetic, cfg, context.seed)
    return rows


def _rows(case: Case, arithmetic: Arithmetic, cfg: Config, seed: int) -> list[Row]:
    model = MoEModel(
        name=case.name,
        num_layers=case.num_layers,
        hidden=case.hidden,
        num_heads=16,
        ffn_hidden=4 * case.hidden,
        expert_hidden=4 * case.hidden,
        vocab_size=50_257,
        head_dim=case.hidden // 16,
    )
    graph = build_step(StepConfig(model=model, num_gpus=cfg.num_gpus, batch_per_gpu=case.batch_per_gpu))
    costs = cluster_costs(NODES["p4de"], cfg.num_gpus, arithmetic=arithmetic)
    sweep = _Sweep(graph, costs, cfg)
    whole_ms, _ = sweep.forward(WHOLE)
    rows: list[Row] = []
    for share in (WHOLE, *cfg.ranges):
        forward_ms, counts = sweep.forward(share)
        rows.append(
            {
                "case": case.name,
                "method": f"matmuls in {arithmetic}",
                "range_percent": 100 * share if share != WHOLE else WHOLE,
                "forward_ms": forward_ms,
                "relative": forward_ms / whole_ms,
                "num_regions": len(counts),
                "most_parts": max(counts, default=1),
                "source": "simulated",
                "device": f"{cfg.num_gpus} x {costs.device.name} (fitted kernel and all-to-all times)",
                "seed": seed,
            }
        )
    return rows


class _Sweep:
    """The forward pass of one graph, with the same range around each MoE layer in parts."""

    def __init__(self, graph: Graph, costs: RooflineCosts, cfg: Config) -> None:
        self.graph, self.costs, self.cfg = graph, costs, cfg
        self.forward_ops = graph.select("forward")
        self.whole_ms = [costs.op_ms(graph, graph.ops[op]) for op in self.forward_ops]
        comm = [op for op in graph.comm_ops("all_to_all") if graph.ops[op].phase == "forward"]
        self.layers = list(zip(comm[::2], comm[1::2], strict=True))
        between = [(self.layers[i][1], self.layers[i + 1][0]) for i in range(len(self.layers) - 1)]
        self.between_ms = max(sum(self.whole_ms[a + 1 : b]) for a, b in between)

    def forward(self, share: float) -> tuple[float, list[int]]:
        """Time of the forward pass, and the number of parts of each layer's range."""
        total, counts = sum(self.whole_ms), list[int]()
        if share == WHOLE:
            return total, counts
        edge = 0
        for number, (first, second) in enumerate(self.layers):
            last = self.layers[number + 1][0] - 1 if number + 1 < len(self.layers) else len(self.forward_ops) - 1
            half_ms = share * self.between_ms / 2
            span = self._reach(first, -1, edge, half_ms), self._reach(second, 1, last, half_ms)
            found = self._best(*span)
            edge = span[1] + 1
            if found is not None:
                part_ms, count, (begin, end) = found
                total += part_ms - sum(self.whole_ms[begin : end + 1])
                counts.append(count)
        return total, counts

    def _reach(self, op: int, step: int, limit: int, budget_ms: float) -> int:
        """How far from ``op`` the range goes: as many ops as take ``budget_ms``, up to ``limit``."""
        while op != limit and self.whole_ms[op + step] <= budget_ms:
            op += step
            budget_ms -= self.whole_ms[op]
        return op

    def _best(self, first: int, last: int) -> tuple[float, int, tuple[int, int]] | None:
        """Time, number of parts and span of the fastest way to run a range in parts, even where whole is faster."""
        found = infer_splits(self.graph, first, last, solver=self.cfg.axis_solver)
        counts = part_counts(found.units, self.cfg.max_parts) if found.ops else []
        times = [
            (region_ms(self.graph, Region(num_parts=k, ops=found.ops, splits=found.splits), self.costs), k)
            for k in counts
        ]
        return (*min(times), (found.ops[0], found.ops[-1])) if times else None


def plot(rows: pd.DataFrame) -> Figure:
    cases, methods = (list(dict.fromkeys(rows[column])) for column in ("case", "method"))
    figure, axes = style.subplots(1, len(cases), panel_height_in=3.0)
    for ax, case in zip(axes[0], cases, strict=True):
        mine = rows[(rows["case"] == case) & (rows["range_percent"] >= 0)]
        style.lines(ax, mine, x="range_percent", y="relative", methods=methods)
        ax.axhline(1.0, color=style.GREY, linewidth=1)
        ax.set(title=case, xlabel="range (% of the computation between two MoE layers)")
        ax.set_ylabel("forward time (no parts: 1)")
    style.legend(figure, rows, methods=methods)
    return figure


def compare(rows: pd.DataFrame) -> list[Comparison]:
    result = []
    for (case, method), mine in rows.groupby(["case", "method"], sort=False):
        times = mine[mine["range_percent"] >= 0].set_index("range_percent")["forward_ms"]
        whole = float(mine.loc[mine["range_percent"] == WHOLE, "forward_ms"].iloc[0])
        best = float(times.idxmin())
        shape = "inside, as in the paper" if 0 < best < times.index.max() else "at the end: the paper's is inside"
        note = (
            f"{shape}; {whole:.1f} ms without parts, {times.iloc[0]:.1f} with all-to-alls and experts alone, "
            f"{times.min():.1f} at best, {times.iloc[-1]:.1f} with everything"
        )
        name = f"{case}, {method}: best range"
        result.append(Comparison(name=name, paper=None, ours=best, unit="%", note=note))
    return result
