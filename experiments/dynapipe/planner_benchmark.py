"""Our planner against the public one on the same inputs: plan quality and planning time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import pandas as pd

from experiments import style
from experiments.dynapipe._reference import REFERENCE_FILE, ReferenceCase, load_cases
from experiments.dynapipe._setup import MEMORY_LIMIT_MB, batches, simulated_device, timed_plans
from experiments.record import Comparison, Row, RunContext, require_positive
from llmsys.core.errors import ConfigError, DataNotFoundError
from llmsys.dynapipe.config import Parallelism, PlannerConfig
from llmsys.dynapipe.costs import CostModel
from llmsys.dynapipe.plan import to_bytes
from llmsys.dynapipe.simulator import simulate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Planner benchmark: ours and the public DynaPipe planner on the same inputs"
CLAIM = """No figure of the paper: a comparison with its public planner, run unmodified on one CPU core.

Both get the same samples, layer profile, interpolation (a point next to an unmeasured one is infeasible), memory limit
and memory rules; ours is also shown with the workspace of backward passes counted, which the public planner leaves out.
Targets: iterations at most as long, planning at least 40 times faster. The public planner's iteration time is the
median of its runs (it shuffles unseeded) in its own simulator; its recorded plan is also replayed with our costs. For
GPT the two simulators agree; for T5 the public planner takes the largest and our profile the median of repeated
measurements, so only the replayed time compares like with like."""

OURS, OURS_FULL, PUBLIC, REPLAYED = (
    "ours",
    "ours, backward workspace counted",
    "public planner",
    "public planner's plan, our costs",
)
REFERENCE_CPU = "one CPU core, measured for the reference file"
MIN_SPEEDUP = 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """``cases``: names in the reference file; none means all of them."""

    cases: tuple[str, ...] = ()
    num_repeats: int = 5

    def __post_init__(self) -> None:
        require_positive(self, "num_repeats")


def run(cfg: Config, context: RunContext) -> list[Row]:
    rows: list[Row] = []
    for case in context.progress(_cases(cfg, context), "cases"):
        rows += _our_rows(case, cfg, context)
        rows += _reference_rows(case, context)
    print(_text_table(rows))
    return rows


def _cases(cfg: Config, context: RunContext) -> list[ReferenceCase]:
    """The chosen cases; without data.root and without a choice, a case of our own that has no reference."""
    if context.data_root is None:
        if cfg.cases:
            raise DataNotFoundError(
                "the reference runs of the public planner are not part of the project",
                expected=f"data.root to name a directory with {REFERENCE_FILE}",
                found="no data.root",
                fix="set data.root, or leave settings.cases empty to run on shipped lengths without a reference",
            )
        return [_shipped_case(context.seed)]
    known = {case.name: case for case in load_cases(context.data_root)}
    for name in cfg.cases:
        if name not in known:
            raise ConfigError(
                f"there is no case {name!r}", expected="of " + ", ".join(known), found=name, fix="set settings.cases"
            )
    return [known[name] for name in cfg.cases or known]


def _shipped_case(seed: int) -> ReferenceCase:
    return ReferenceCase(
        name="gpt_shipped_cap2048",
        model="gpt_6.7b",
        samples=batches(None, "decoder_only", 65_536, 2048, 1, seed)[0],
        parallelism=Parallelism(data=2, pipeline=4, tensor=1, zero_stage=1),
        config=PlannerConfig(memory_limit_mb=MEMORY_LIMIT_MB),
        iteration_ms=float("nan"),
        cpu_s=None,
        peak_mb=float("nan"),
        num_micro_batches=0,
        replicas=(),
    )


def _our_rows(case: ReferenceCase, cfg: Config, context: RunContext) -> list[Row]:
    rows: list[Row] = []
    for method, counted in ((OURS, False), (OURS_FULL, True)):
        costs = case.costs(context.data_root, count_backward_extra=counted)
        config = dataclasses.replace(case.config, seed=context.seed)
        plans, cpu_s = timed_plans(case.samples, costs, config, max(2, cfg.num_repeats))
        plan, result = plans[0], simulate(plans[0], costs)
        shared = _shared(case, method, context) | {"identical_plans": len({to_bytes(p) for p in plans}) == 1}
        rows.append(
            shared
            | {
                "quantity": "iteration",
                "iteration_ms": result.iteration_ms,
                "peak_mb": result.peak_mb,
                "num_micro_batches": plan.num_micro_batches,
                "schedules": " ".join(replica.schedule for replica in plan.replicas),
                "recompute": " ".join(replica.recompute for replica in plan.replicas),
                "source": "simulated",
                "device": simulated_device(costs),
            }
        )
        rows.append(
            shared
            | {
                "quantity": "planning",
                "planning_cpu_s": median(cpu_s),
                "fastest_cpu_s": min(cpu_s),
                "source": "measured",
                "device": context.device,
            }
        )
    return rows


def _reference_rows(case: ReferenceCase, context: RunContext) -> list[Row]:
    if not case.replicas:
        return []
    costs: CostModel = case.costs(context.data_root, count_backward_extra=False)
    simulated: Row = {"quantity": "iteration", "source": "simulated", "device": simulated_device(costs)}
    return [
        _shared(case, PUBLIC, context)
        | simulated
        | {
            "iteration_ms": case.iteration_ms,
            "peak_mb": case.peak_mb,
            "num_micro_batches": case.num_micro_batches,
        },
        _shared(case, REPLAYED, context) | simulated | {"iteration_ms": case.replayed_ms(costs)},
        _shared(case, PUBLIC, context)
        | {
            "quantity": "planning",
            "planning_cpu_s": case.cpu_s,
            "source": "measured",
            "device": REFERENCE_CPU,
        },
    ]


def _shared(case: ReferenceCase, method: str, context: RunContext) -> Row:
    limit = case.config.memory_limit_mb
    assert isinstance(limit, float)
    return {
        "case": case.name,
        "method": method,
        "num_samples": len(case.samples),
        "parallelism": case.parallelism.label(),
        "limit_mb": limit,
        "note": "" if case.replicas else "no data.root: shipped lengths and fitted profile, no reference",
        "seed": context.seed,
    }


def _text_table(rows: list[Row]) -> str:
    """Both planners' columns side by side, one line a case."""
    table = pd.DataFrame(rows)
    columns = {"iteration_ms": ("ms", ".1f"), "peak_mb": ("MB", ".0f"), "planning_cpu_s": ("CPU s", ".3f")}
    short = {OURS: "ours", OURS_FULL: "ours+bw", PUBLIC: "public", REPLAYED: "replayed"}
    lines = []
    for case in dict.fromkeys(table["case"]):
        line = {"case": case}
        for method, name in short.items():
            for column, (unit, digits) in columns.items():
                number = value_of(table, case, method, column)
                line[f"{name} {unit}"] = "" if number is None else format(number, digits)
        public_cpu, cpu = (value_of(table, case, m, "planning_cpu_s") for m in (PUBLIC, OURS))
        times = public_cpu / cpu if public_cpu and cpu else None
        line["CPU ratio"] = "" if times is None else f"{times:.0f}x"
        line["targets"] = _verdict(table, case, times)
        lines.append(line)
    text = pd.DataFrame(lines)
    return str(text.loc[:, (text != "").any()].replace("", "-").to_string(index=False))


def _verdict(rows: pd.DataFrame, case: str, cpu_ratio: float | None) -> str:
    """Whether a case meets its targets; nothing without a reference."""
    ours, public = (value_of(rows, case, method, "iteration_ms") for method in (OURS, PUBLIC))
    if ours is None or public is None:
        return ""
    missed = [] if ours <= public else ["iteration"]
    if cpu_ratio is not None and cpu_ratio < MIN_SPEEDUP:
        missed.append("CPU time")
    return "missed: " + ", ".join(missed) if missed else "met"


def value_of(rows: pd.DataFrame, case: str, method: str, column: str) -> float | None:
    """The one number of ``column`` for a case and method; None where there is none."""
    chosen = rows[(rows["case"] == case) & (rows["method"] == method)][column].dropna()
    return float(chosen.iloc[0]) if len(chosen) else None


def plot(rows: pd.DataFrame) -> Figure:
    figure, axes = style.subplots(1, 2, panel_width_in=5.2, panel_height_in=4.2)
    rows = rows.assign(label=[_case_label(case) for case in rows["case"]])
    methods = [method for method in (OURS, OURS_FULL, PUBLIC, REPLAYED) if (rows["method"] == method).any()]
    left, right = axes[0]
    iteration, planning = (rows[rows["quantity"] == quantity] for quantity in ("iteration", "planning"))
    style.grouped_bars(left, iteration, category="label", value="iteration_ms", methods=methods)
    left.set(title="Iteration", ylabel="simulated iteration time (ms)")
    timed = [method for method in methods if method != REPLAYED]
    style.grouped_bars(right, planning, category="label", value="planning_cpu_s", methods=timed)
    right.set(title="Planning", ylabel="CPU time of planning (s)", yscale="log")
    right.set_ylim(bottom=min(0.01, right.get_ylim()[0]))
    for ax in (left, right):
        ax.tick_params(axis="x", labelsize=8)
    style.legend(figure, rows, methods=methods, num_columns=2)
    return figure


def _case_label(case: str) -> str:
    model, size, cap = case.split("_")
    sizes = {"n": "samples", "tok": "tokens"}
    kind = next((key for key in sizes if size.startswith(key) and size != key), "")
    amount = f"{size.removeprefix(kind)} {sizes[kind]}" if kind else f"{size} lengths"
    return f"{model.upper()}\n{amount}\nup to {cap.removeprefix('cap')}"


def compare(rows: pd.DataFrame) -> list[Comparison]:
    result = []
    for case in dict.fromkeys(rows["case"]):
        ours, public, replayed = (value_of(rows, case, m, "iteration_ms") for m in (OURS, PUBLIC, REPLAYED))
        cpu, public_cpu = (value_of(rows, case, m, "planning_cpu_s") for m in (OURS, PUBLIC))
        counted = value_of(rows, case, OURS_FULL, "iteration_ms")
        result += [
            _ratio(f"{case}: iteration, ours / public", ours, public, "simulated", "target: at most 1"),
            _ratio(f"{case}: iteration, ours / public plan on our costs", ours, replayed, "simulated", "at most 1"),
            _ratio(
                f"{case}: iteration with backward workspace counted / public plan on our costs",
                counted,
                replayed,
                "simulated",
                "not like with like: ours keeps more memory free",
            ),
            _ratio(
                f"{case}: planning CPU time, public / ours",
                public_cpu,
                cpu,
                "measured",
                f"target: at least {MIN_SPEEDUP:.0f}; different times and machine loads",
            ),
        ]
    first = rows.iloc[0]["case"]
    seconds = value_of(rows, first, OURS, "planning_cpu_s")
    known = [item for item in result if item.ours is not None]
    return [*known, Comparison(name=f"{first}: planning, ours", paper=None, ours=seconds, unit="s", source="measured")]


def _ratio(name: str, above: float | None, below: float | None, source: str, note: str) -> Comparison:
    ratio = above / below if above is not None and below else None
    return Comparison(name=name, paper=None, ours=ratio, unit="x", note=note, source=source)
