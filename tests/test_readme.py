"""The README files are true: their Python runs, and what they name exists."""

from __future__ import annotations

import ast
import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import catalog
from llmsys.comm.transports import available_transports

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llmsys" / "dynapipe"
KVDIRECT = ROOT / "llmsys" / "kvdirect"
LANCET = ROOT / "llmsys" / "lancet"
DOCUMENTS = (
    ROOT / "README.md",
    PACKAGE / "README.md",
    KVDIRECT / "README.md",
    LANCET / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
)
READMES = DOCUMENTS[:2]

# `file`: `symbol`, `symbol`
_REFERENCE = re.compile(r"`([\w/]+\.(?:py|cpp))`((?:(?:: |, )`\w+`)+)")


def _names(paths: tuple[Path, ...]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


_BLOCK = re.compile(r"^```python\n(?:# (\w+\.py)\n)?(.*?)^```", re.MULTILINE | re.DOTALL)


def _python(document: Path) -> str:
    """All Python of a document, as one program, but for the blocks that begin with the name of a file of their own."""
    return "\n".join(text for name, text in _BLOCK.findall(document.read_text()) if not name)


def _scripts(document: Path, folder: Path) -> list[str]:
    """Writes the blocks that are files of their own to `folder`; their names."""
    found = [(name, text) for name, text in _BLOCK.findall(document.read_text()) if name]
    for name, text in found:
        (folder / name).write_text(text)
    return [name for name, _ in found]


def _run(document: Path, folder: Path, data_root: Path | None) -> str:
    """What the document's program prints, run in ``folder`` as a user would."""
    program = folder / "program.py"
    program.write_text(_python(document))
    environment = {name: value for name, value in os.environ.items() if name != "LLMSYS_DATA_ROOT"}
    if data_root is not None:
        environment["LLMSYS_DATA_ROOT"] = str(data_root)
    done = subprocess.run(
        [sys.executable, str(program)], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("document", READMES, ids=_names(READMES))
def test_python_runs_on_the_shipped_tables(document: Path, tmp_path: Path) -> None:
    printed = _run(document, tmp_path, None)
    assert "dynapipe plan: " in printed and "micro-batches" in printed
    if document == READMES[0]:
        assert (tmp_path / "trace.json").stat().st_size > 0
        assert "replica 0/device 3" in printed and "packing takes" in printed


@pytest.mark.data
@pytest.mark.parametrize("document", READMES, ids=_names(READMES))
def test_python_runs_on_the_real_files(document: Path, tmp_path: Path) -> None:
    root = Path(os.environ.get("LLMSYS_DATA_ROOT") or ROOT.parent / "shared" / "data").absolute()
    if not (root / "multitask_lengths.parquet").is_file():
        pytest.skip(f"no multitask_lengths.parquet in {root}: set LLMSYS_DATA_ROOT to the directory of the real files")
    assert "dynapipe plan: " in _run(document, tmp_path, root)


def test_kvdirect_example_moves_blocks_between_two_processes(tmp_path: Path) -> None:
    """Run as the README says: prefill.py piped into decode.py, with a secret in the environment."""
    assert _scripts(READMES[0], tmp_path) == ["prefill.py", "decode.py", "train.py"]
    code = [line for name in ("prefill.py", "decode.py") for line in (tmp_path / name).read_text().splitlines()]
    assert len([line for line in code if line and not line.startswith(("import", "from"))]) <= 20
    if reason := available_transports()["ucx"]:
        pytest.skip(reason)
    environment = os.environ | {"LLMSYS_JOB_SECRET": secrets.token_hex(16)}
    done = subprocess.run(
        f"{sys.executable} prefill.py | {sys.executable} decode.py",
        shell=True,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0.0, 1.0, 2.0]"


def test_lancet_example_overlaps_a_model_of_ones_own(tmp_path: Path) -> None:
    """Run as the README says: by torchrun, with two ranks."""
    assert "train.py" in _scripts(READMES[0], tmp_path)
    code = (tmp_path / "train.py").read_text().splitlines()
    assert len([line for line in code if line and not line.startswith(("#", "import", "from"))]) <= 15
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "lancet plan of step0" in done.stdout and "all_to_all_single_1" in done.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=_names(DOCUMENTS))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=_names(DOCUMENTS))
def test_experiments_exist(document: Path) -> None:
    named = re.findall(
        r"\bexperiment=([a-z][\w/*]+)|(?<![\w/])(dynapipe/(?:fig|plan|sched|var)\w*)", document.read_text()
    )
    for words in named:
        assert catalog.names("".join(words)), words


@pytest.mark.parametrize("document", DOCUMENTS, ids=_names(DOCUMENTS))
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^    |`)make ([a-z]+)\b", document.read_text(), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=_names(DOCUMENTS))
def test_files_exist(document: Path) -> None:
    """Paths in backquotes; those of a README are relative to it or to the repository."""
    named = re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|cpp|h|yaml|ipynb|toml|lock|pyi|md))`", document.read_text())
    made = {"report.md"}  # by a run
    bases = (document.parent, ROOT, ROOT / "experiments", PACKAGE, ROOT / "llmsys" / "comm" / "transports")
    missing = [name for name in named if name not in made and not any((base / name).exists() for base in bases)]
    assert not missing


def _defines(path: Path, symbol: str) -> bool:
    if path.suffix == ".py":
        body = ast.parse(path.read_text()).body
        return any(isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == symbol for node in body)
    # A function begins its line with its type, a method's name follows its class.
    pattern = rf"^\S.*\b{symbol}\(|\b{symbol}::"
    return re.search(pattern, path.read_text(), re.MULTILINE) is not None


@pytest.mark.parametrize("package", [PACKAGE, KVDIRECT, LANCET], ids=lambda package: package.name)
def test_symbols_are_where_the_table_says(package: Path) -> None:
    references = _REFERENCE.findall((package / "README.md").read_text())
    assert len(references) > 20
    for file, symbols in references:
        path = (ROOT if file.startswith(("csrc/", "tests/", "llmsys/")) else package) / file
        for symbol in re.findall(r"`(\w+)`", symbols):
            assert _defines(path, symbol), f"{file}: {symbol}"
