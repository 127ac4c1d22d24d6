"""A made-up paper with two figures in a temporary directory, to try the experiment framework on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import experiments
import experiments.style  # the demo figures import it, when the package's path is another

FIGURE = """
from __future__ import annotations
from dataclasses import dataclass, field
from experiments import style
from experiments.record import Comparison

TITLE = "A demo & its <title>"
CLAIM = "The paper says <b>twice</b>.\\n\\nOurs is made up."

@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    num_nodes: int = 1
    name: str = "small"

@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    num_points: int = 4
    factor: float = 2.0
    fail: str = ""
    cluster: Cluster = field(default_factory=Cluster)

def run(cfg, context):
    if cfg.fail == "run":
        raise RuntimeError("broken <on> purpose")
    return [
        {"length": 512 * point, "method": method, "tokens_per_s": factor * point + context.seed,
         "out_of_memory": False, "source": "simulated", "device": "8 x demo", "seed": context.seed}
        for point in context.progress(range(1, cfg.num_points + 1), "points")
        for method, factor in (("packing", 1.0), ("DynaPipe", cfg.factor))
    ]

def plot(rows):
    if rows["tokens_per_s"].max() > 1e6:
        raise RuntimeError("cannot draw that")
    figure, axes = style.subplots()
    style.grouped_bars(axes[0, 0], rows, category="length", value="tokens_per_s")
    style.legend(figure, rows)
    return figure

def compare(rows):
    means = rows.groupby("method").tokens_per_s.mean()
    return [
        Comparison(name="speed-up", paper=4.0, ours=means["DynaPipe"] / means["packing"], unit="x", note="|",
                   source="measured"),
        Comparison(name="not in the paper", paper=None, ours=float("nan"), unit="s"),
    ]
"""
FIGURE_YAML = "settings: {factor: 3.0}\nscales:\n  tiny: {num_points: 2}\n  small: {factor: 5.0}\n"


@pytest.fixture(scope="module")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    package = root / "experiments" / "demo"
    package.mkdir(parents=True)
    for init in (package.parent / "__init__.py", package / "__init__.py"):
        init.touch()
    conf = root / "conf" / "experiment"
    for name, yaml in (("fig2", FIGURE_YAML), ("fig10", "settings: {fail: run}\n")):
        (package / f"{name}.py").write_text(FIGURE)
        (conf / "demo").mkdir(parents=True, exist_ok=True)
        (conf / "demo" / f"{name}.yaml").write_text(yaml)
    (package / "fig3.py").write_text("TITLE = 'half a figure'\n")
    (package / "_helper.py").touch()
    # A sweep also composes the default experiment; ours must not depend on that one.
    (conf / "dynapipe").mkdir()
    (conf / "dynapipe" / "fig13.yaml").touch()
    return root


@pytest.fixture
def demo(demo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Makes the demo figures importable; gives the override that lets Hydra find their YAML."""
    monkeypatch.setattr(experiments, "__path__", [str(demo_root / "experiments")])
    yield [f"hydra.searchpath=[file://{demo_root / 'conf'}]"]
    for name in [name for name in sys.modules if name.startswith("experiments.demo")]:
        del sys.modules[name]
    vars(experiments).pop("demo", None)
