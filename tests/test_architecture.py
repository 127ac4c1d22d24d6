"""The direction of imports and the shape of the tree, as CONTRIBUTING.md states them.

Every rule is a function from a `Tree` to a list of violations, so that each is also tested on small trees
that break it. The tables of the rules are at the top: a new kind of file in a paper gets a rank there.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

from llmsys.core import errors

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 500

PAPERS = ("kvdirect", "lancet", "dynapipe")
LAYERS = {"core": 0, "comm": 1, "models": 2, "kernels": 2} | dict.fromkeys(PAPERS, 3)
EXPERIMENTS_LAYER = 4

FILE_RANKS: dict[str, float] = {
    "config": 0,
    "workload": 0,
    "costs": 1,
    "plan": 2,
    "planner": 3,
    "baselines": 3,
    "simulator": 4,
    "runtime": 4,
}
EXTRA_RANKS: dict[str, dict[str, float]] = {
    "dynapipe": {"data": 0, "profile": 0.5, "grid": 3}
    | dict.fromkeys(("ordering", "balance", "microbatch", "schedule", "communication"), 2.5),
    "kvdirect": {"blocks": 0.5, "layout": 0.5, "holds": 0.6, "messages": 0.7, "tickets": 0.7},
    "lancet": {"graph": 0, "data": 0, "labelling": 2.3, "memory": 2.3, "estimate": 2.3, "axis_csp": 2.3, "cp_sat": 0.5}
    | {"assignment": 2.4, "axes": 2.4, "pipeline": 2.5, "regions": 2.6, "partition": 2.7, "ordering": 2.8}
    | {"drafting": 2.9, "passes": 4, "backend": 5},
}
# The plan is all that a planner and its executors share. Order and lifetimes of transfers are part of what a
# plan means, so executors may use `communication`.
NOT_FOR_EXECUTORS = (
    *("planner", "baselines", "grid", "ordering", "balance", "microbatch", "schedule"),
    *("labelling", "assignment", "estimate", "drafting", "axes", "axis_csp", "pipeline", "partition", "regions"),
)
EXECUTORS = ("simulator", "runtime")

TORCH = ("torch", "triton")
TORCH_ALLOWED = (
    "llmsys.models*",
    "llmsys.kernels*",
    "llmsys.comm*",
    *(f"llmsys.{paper}.runtime*" for paper in PAPERS),
    "llmsys.lancet.passes*",
    "llmsys.lancet.backend*",
    "experiments.kvdirect*",  # they measure a runtime
    "experiments.lancet*",
)
EXPERIMENT_LIBRARIES = ("hydra", "omegaconf", "matplotlib", "pandas")
FIGURE_CONTRACT = {"TITLE", "CLAIM", "Config", "run", "plot", "compare"}
FORBIDDEN_NAMES = ("utils", "util")
ERROR_CLASSES = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.LlmsysError)}
ERROR_TEXTS = ("expected", "found", "fix")


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One imported module, at its full dotted name; a name imported from a module counts as that module."""

    importer: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The Python modules below `root`, by dotted name."""

    root: Path
    modules: dict[str, Path]
    imports: tuple[Import, ...]


def read_tree(root: Path) -> Tree:
    modules = {}
    for path in sorted([*root.glob("llmsys/**/*.py"), *root.glob("experiments/**/*.py")]):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    imports = tuple(found for name in modules for found in _imports_of(name, modules))
    return Tree(root=root, modules=modules, imports=imports)


def _imports_of(name: str, modules: dict[str, Path]) -> Iterator[Import]:
    path = modules[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
            inner = [f"{base}.{alias.name}" for alias in node.names]
            targets = [n if n in modules or n == "llmsys._C" else base for n in inner]
        elif isinstance(node, ast.Call) and _is_dynamic_import(node):
            argument = node.args[0]
            assert isinstance(argument, ast.Constant)
            targets = [argument.value]
        else:
            continue
        yield from (Import(importer=name, target=t, line=node.lineno) for t in targets)


def _is_dynamic_import(node: ast.Call) -> bool:
    constant = bool(node.args) and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
    return _called_name(node) in ("import_module", "__import__") and constant


def _called_name(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _layer(module: str) -> int | None:
    """The layer of a module of ours; None for a part that has been given none."""
    top, *rest = module.split(".")
    if top == "experiments":
        return EXPERIMENTS_LAYER
    return LAYERS.get(rest[0]) if rest else -1


def _paper_and_part(module: str) -> tuple[str | None, str]:
    parts = module.split(".")
    if len(parts) > 1 and parts[0] == "llmsys" and parts[1] in PAPERS:
        return parts[1], parts[2] if len(parts) > 2 else "__init__"
    return None, ""


def _file_rank(paper: str, part: str) -> float | None:
    if part.startswith("runtime"):
        return FILE_RANKS["runtime"]
    return (FILE_RANKS | EXTRA_RANKS.get(paper, {})).get(part)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("llmsys", "experiments") and module != "llmsys._C"


def layer_violations(tree: Tree) -> list[str]:
    """Imports go down the layers, never up; `llmsys._C` may be used anywhere."""
    unknown = {m.split(".")[1] for m in tree.modules if _layer(m) is None}
    found = [f"llmsys/{part} has no layer: add it to LAYERS" for part in sorted(unknown)]
    for i in tree.imports:
        if not _is_ours(i.target) or _layer(i.importer) is None:
            continue
        target_layer = _layer(i.target)
        if target_layer is None or target_layer > (_layer(i.importer) or 0):
            found.append(f"{i}, a higher layer")
    return found


def paper_violations(tree: Tree) -> list[str]:
    """The papers never import each other."""
    found = []
    for i in tree.imports:
        importer, target = _paper_and_part(i.importer)[0], _paper_and_part(i.target)[0]
        if importer and target and importer != target:
            found.append(f"{i}, another paper")
    return found


def file_order_violations(tree: Tree) -> list[str]:
    """In a paper: config, workload < costs < plan < planner, baselines < simulator, runtime."""
    found = []
    for module in tree.modules:
        paper, part = _paper_and_part(module)
        if paper and part != "__init__" and _file_rank(paper, part) is None:
            found.append(f"{module} has no rank: add it to EXTRA_RANKS")
    for i in tree.imports:
        (paper, part), (target_paper, target_part) = _paper_and_part(i.importer), _paper_and_part(i.target)
        if not paper or paper != target_paper or part == target_part:
            continue
        problem = _file_order_problem(paper, part, target_part)
        if problem:
            found.append(f"{i}, {problem}")
    return found


def _file_order_problem(paper: str, part: str, target_part: str) -> str | None:
    if part == "__init__":
        executor = target_part.startswith("runtime")
        return "which every import of the paper would then load" if executor else None
    if target_part == "__init__":
        return "the package that contains it; import from the file"
    rank, target_rank = _file_rank(paper, part), _file_rank(paper, target_part)
    if rank is not None and target_rank is not None and target_rank > rank:
        return "a later file"
    if part.startswith(EXECUTORS):
        if target_part.startswith(EXECUTORS) and not (part.startswith("runtime") and target_part.startswith("runtime")):
            return "the other executor"
        if target_part in NOT_FOR_EXECUTORS:
            return "of which an executor sees only the plan"
    return None


def library_violations(tree: Tree) -> list[str]:
    """torch only where devices are driven; hydra, omegaconf, matplotlib and pandas only in experiments/."""
    found = []
    for i in tree.imports:
        library = i.target.partition(".")[0]
        if library in TORCH and not any(fnmatch(i.importer, pattern) for pattern in TORCH_ALLOWED):
            found.append(f"{i}, allowed only in {', '.join(TORCH_ALLOWED)}")
        if library in EXPERIMENT_LIBRARIES and not i.importer.startswith("experiments"):
            found.append(f"{i}, allowed only in experiments/")
    return found


def _source_files(root: Path) -> list[Path]:
    patterns = ("llmsys/**/*.py", "experiments/**/*.py", "tests/**/*.py", "csrc/**/*.cpp", "csrc/**/*.h")
    return sorted(path for pattern in patterns for path in root.glob(pattern))


def name_violations(tree: Tree) -> list[str]:
    """A file or folder is named for what it holds."""
    paths = [path.relative_to(tree.root) for path in _source_files(tree.root)]
    return [f"{p}: a name that says nothing" for p in paths if {*p.parts[:-1], p.stem} & set(FORBIDDEN_NAMES)]


def size_violations(tree: Tree) -> list[str]:
    """No source file is longer than MAX_LINES."""
    counts = {path.relative_to(tree.root): len(path.read_text().splitlines()) for path in _source_files(tree.root)}
    return [f"{path}: {lines} lines, at most {MAX_LINES}" for path, lines in counts.items() if lines > MAX_LINES]


def _top_level_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def figure_violations(tree: Tree) -> list[str]:
    """Every experiments/<paper>/<figure>.py has its conf/experiment/<paper>/<figure>.yaml, and the other way.

    A module there is a figure unless its name starts with an underscore, and defines the whole contract.
    """
    found = []
    figures = {}
    for path in sorted(tree.root.glob("experiments/*/*.py")):
        if path.parent.name in PAPERS and not path.stem.startswith("_"):
            figures[f"{path.parent.name}/{path.stem}"] = _top_level_names(path)
    configs = {f"{p.parent.name}/{p.stem}" for p in tree.root.glob("conf/experiment/*/*.yaml")}
    for name, names in figures.items():
        if missing := FIGURE_CONTRACT - names:
            found.append(f"experiments/{name}.py does not define {', '.join(sorted(missing))}")
    found += [f"experiments/{n}.py has no conf/experiment/{n}.yaml" for n in sorted(figures.keys() - configs)]
    found += [f"conf/experiment/{n}.yaml has no figure experiments/{n}.py" for n in sorted(configs - figures.keys())]
    return found


def error_violations(tree: Tree) -> list[str]:
    """Every error says what was expected, what was found and how to fix it, or is passed these as **keywords."""
    found = []
    for module, path in tree.modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and _called_name(node) in ERROR_CLASSES:
                given = {k.arg for k in node.keywords if not _may_be_empty(k.value)}
                missing = [] if None in given else [text for text in ERROR_TEXTS if text not in given]
                if missing:
                    found.append(f"{module}:{node.lineno} {_called_name(node)} without {', '.join(missing)}")
    return found


def _may_be_empty(value: ast.expr) -> bool:
    """Whether it is written as "", also in one arm of a conditional expression."""
    if isinstance(value, ast.IfExp):
        return _may_be_empty(value.body) or _may_be_empty(value.orelse)
    return isinstance(value, ast.Constant) and not value.value


IMPORT_WITH_HIDDEN = """
import importlib, json, sys
root, hidden, modules = json.load(sys.stdin)

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

# Python's own finders are classes, an editable install's is an object: it goes last, so that `root` decides
# what `llmsys` is and the installed `llmsys._C` is still found.
sys.meta_path = [Hide(), *sorted(sys.meta_path, key=lambda finder: not isinstance(finder, type))]
sys.path.insert(0, root)
failures = []
for name in modules:
    try:
        importlib.import_module(name)
    except Exception as error:
        failures.append(f"{name}: {type(error).__name__}: {error}")
json.dump(failures, sys.stdout)
"""


def hidden_import_violations(tree: Tree) -> list[str]:
    """With torch hidden, core and every planner and simulator still import."""
    ours = [m for m in tree.modules if m.startswith("llmsys") and not any(fnmatch(m, p) for p in TORCH_ALLOWED)]
    return _import_failures(tree.root, ours)


def _import_failures(root: Path, modules: list[str]) -> list[str]:
    hidden = [*TORCH, *EXPERIMENT_LIBRARIES]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITH_HIDDEN],
        input=json.dumps([str(root), hidden, modules]),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    failures: list[str] = json.loads(done.stdout)
    return failures


RULES: tuple[Callable[[Tree], list[str]], ...] = (
    layer_violations,
    paper_violations,
    file_order_violations,
    library_violations,
    name_violations,
    size_violations,
    figure_violations,
    error_violations,
    hidden_import_violations,
)


@pytest.fixture(scope="module")
def tree() -> Tree:
    return read_tree(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_tree_follows(rule: Callable[[Tree], list[str]], tree: Tree) -> None:
    assert rule(tree) == []


def test_the_tree_is_read(tree: Tree) -> None:
    assert {"llmsys", "llmsys.core"} <= tree.modules.keys()
    assert len(tree.imports) > 20


def _write(root: Path, files: dict[str, str]) -> Tree:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[name])
        for package in path.relative_to(root).parents:
            if package.parts and package.parts[0] in ("llmsys", "experiments"):
                (root / package / "__init__.py").touch()
    return read_tree(root)


FIGURE = "TITLE = CLAIM = ''\nclass Config: ...\ndef run(cfg): ...\ndef plot(rows): ...\ndef compare(rows): ...\n"
GOOD = {
    "llmsys/core/native.py": "from llmsys import _C\nimport llmsys._C\n",
    "llmsys/core/errors.py": "class E(Exception): ...\n",
    "llmsys/comm/p2p.py": "import torch\nfrom llmsys.core import errors\n",
    "llmsys/comm/tcp.py": "def f(e, **k):\n    g(PlanError('', expected=e, found=e, fix='x'), InputError('', **k))\n",
    "llmsys/dynapipe/workload.py": "from llmsys.core.errors import E\n",
    "llmsys/dynapipe/plan.py": "from . import workload\n",
    "llmsys/dynapipe/communication.py": "from .plan import __doc__\n",
    "llmsys/dynapipe/planner.py": "from llmsys.dynapipe import communication\nimport llmsys.dynapipe.plan\n",
    "llmsys/dynapipe/simulator.py": "from llmsys.dynapipe.plan import workload\n",
    "llmsys/dynapipe/runtime/worker.py": "from ..communication import plan\nfrom . import ranks\n",
    "llmsys/dynapipe/runtime/ranks.py": "",
    "llmsys/lancet/passes.py": "import torch.fx\n",
    "experiments/dynapipe/fig13.py": "import pandas\nfrom llmsys.dynapipe import simulator\n" + FIGURE,
    "experiments/dynapipe/_cases.py": "from llmsys.core.errors import E\n",
    "conf/experiment/dynapipe/fig13.yaml": "",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts_a_good_tree(rule: Callable[[Tree], list[str]], tmp_path: Path) -> None:
    assert rule(_write(tmp_path, GOOD)) == []


BROKEN: list[tuple[Callable[[Tree], list[str]], str, str, str]] = [
    (
        layer_violations,
        "llmsys/core/a.py",
        "from llmsys.comm import p2p\n",
        "core.a:1 imports llmsys.comm.p2p",
    ),
    (layer_violations, "llmsys/core/a.py", "def f():\n    from ..dynapipe import plan\n", "core.a:2 imports"),
    (layer_violations, "llmsys/comm/a.py", "import experiments.dynapipe.fig13\n", "a higher layer"),
    (
        layer_violations,
        "llmsys/comm/a.py",
        "importlib.import_module('llmsys.dynapipe.plan')\n",
        "a higher layer",
    ),
    (
        layer_violations,
        "llmsys/__init__.py",
        "from llmsys.core import errors\n",
        "llmsys:1 imports llmsys.core",
    ),
    (layer_violations, "llmsys/extra/a.py", "", "llmsys/extra has no layer"),
    (paper_violations, "llmsys/lancet/plan.py", "from llmsys.dynapipe.plan import x\n", "another paper"),
    (paper_violations, "llmsys/lancet/plan.py", "from ..dynapipe import plan\n", "another paper"),
    (file_order_violations, "llmsys/dynapipe/costs.py", "from .plan import x\n", "a later file"),
    (file_order_violations, "llmsys/dynapipe/plan.py", "from . import communication\n", "a later file"),
    (file_order_violations, "llmsys/dynapipe/ordering.py", "from .planner import x\n", "a later file"),
    (file_order_violations, "llmsys/dynapipe/simulator.py", "from .runtime import x\n", "the other executor"),
    (
        file_order_violations,
        "llmsys/dynapipe/runtime_cpu.py",
        "from . import simulator\n",
        "the other executor",
    ),
    (
        file_order_violations,
        "llmsys/dynapipe/simulator.py",
        "from .schedule import x\n",
        "sees only the plan",
    ),
    (file_order_violations, "llmsys/dynapipe/simulator.py", "from . import planner\n", "sees only the plan"),
    (file_order_violations, "llmsys/dynapipe/extra.py", "", "llmsys.dynapipe.extra has no rank"),
    (file_order_violations, "llmsys/lancet/odds.py", "", "llmsys.lancet.odds has no rank"),
    (file_order_violations, "llmsys/dynapipe/__init__.py", "from .runtime import x\n", "would then load"),
    (
        file_order_violations,
        "llmsys/dynapipe/costs.py",
        "from llmsys.dynapipe import x\n",
        "import from the file",
    ),
    (library_violations, "llmsys/core/a.py", "import torch.nn as nn\n", "core.a:1 imports torch.nn"),
    (
        library_violations,
        "llmsys/dynapipe/planner.py",
        "def f():\n    from torch import x\n",
        "imports torch",
    ),
    (library_violations, "experiments/dynapipe/fig13.py", "import torch\n", "imports torch"),
    (library_violations, "llmsys/kernels/a.py", "import pandas as pd\n", "only in experiments/"),
    (library_violations, "llmsys/core/a.py", "from omegaconf import x\n", "only in experiments/"),
    (name_violations, "llmsys/core/utils.py", "", "utils.py: a name"),
    (name_violations, "csrc/utils/a.cpp", "", "a.cpp: a name"),
    (size_violations, "llmsys/core/a.py", "x = 1\n" * (MAX_LINES + 1), f"{MAX_LINES + 1} lines"),
    (size_violations, "csrc/solvers/a.cpp", "\n" * (MAX_LINES + 1), f"{MAX_LINES + 1} lines"),
    (figure_violations, "experiments/dynapipe/fig14.py", FIGURE, "no conf/experiment/dynapipe/fig14.yaml"),
    (figure_violations, "conf/experiment/dynapipe/fig15.yaml", "", "no figure experiments/dynapipe/fig15.py"),
    (
        figure_violations,
        "experiments/dynapipe/fig13.py",
        "def run(cfg): ...\n",
        "does not define CLAIM, Config, TITLE, compare, plot",
    ),
    (error_violations, "llmsys/core/a.py", "raise InputError('', expected='', fix='x')\n", "without expected, found"),
    (
        error_violations,
        "experiments/a.py",
        "\ne = errors.ConfigError('', expected=x, found=x, fix='x' if x else '')\n",
        "experiments.a:2 ConfigError without fix",
    ),
    (hidden_import_violations, "llmsys/core/a.py", "import torch\n", "torch is hidden"),
    (
        hidden_import_violations,
        "llmsys/dynapipe/costs.py",
        "from llmsys.comm import p2p\n",
        "dynapipe.costs: ",
    ),
    (hidden_import_violations, "llmsys/core/a.py", "import matplotlib.pyplot\n", "matplotlib is hidden"),
]


@pytest.mark.parametrize(("rule", "name", "text", "expected"), BROKEN)
def test_rule_reports(rule: Callable[[Tree], list[str]], name: str, text: str, expected: str, tmp_path: Path) -> None:
    (violation,) = rule(_write(tmp_path, GOOD | {name: text}))
    assert expected in violation
