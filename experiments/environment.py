"""What a run depends on beyond its settings: machine, code version, packages and data directory."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

from llmsys.core.errors import DataNotFoundError

REPOSITORY = Path(__file__).resolve().parent.parent
DATA_ROOT_VARIABLE = "LLMSYS_DATA_ROOT"
PACKAGES = ("llmsys", "numpy", "torch", "pandas", "matplotlib")


def resolve_data_root(setting: str | None, beside: Path = REPOSITORY) -> Path | None:
    """The directory of the real workload files, or None for the quantile tables shipped with the project.

    ``auto`` means the environment variable LLMSYS_DATA_ROOT, else ``shared/data`` next to the directory
    ``beside`` (the repository) when that is there, else None. Any other text is a directory, relative to the
    current one.
    Raises DataNotFoundError when a directory that was asked for is not there.
    """
    if setting is None:
        return None
    if not setting.strip():
        # An empty path is the current directory, which nobody means by it.
        raise DataNotFoundError(
            "data.root is empty",
            expected="a directory, auto, or null",
            found=repr(setting),
            fix="set data.root to the right directory, or data.root=null to use the shipped quantile tables",
        )
    if setting != "auto":
        return _existing(Path(setting), "data.root")
    from_environment = os.environ.get(DATA_ROOT_VARIABLE)
    if from_environment:
        return _existing(Path(from_environment), f"the environment variable {DATA_ROOT_VARIABLE}")
    shared = beside.parent / "shared" / "data"
    return shared if shared.is_dir() else None


def _existing(directory: Path, setting: str) -> Path:
    path = directory.expanduser().absolute()
    if path.is_dir():
        return path
    raise DataNotFoundError(
        "the directory of workload data is not there",
        expected=f"{setting} to name a directory that exists",
        found=f"{path} is {'a file' if path.exists() else 'missing'}",
        fix="set data.root to the right directory, or data.root=null to use the shipped quantile tables",
    )


@cache
def describe_device() -> str:
    """The CPU of this machine in words: model name, cores and threads that this process may use."""
    model, cores = _read_cpuinfo(Path("/proc/cpuinfo"))
    affinity = getattr(os, "sched_getaffinity", None)
    num_threads = len(affinity(0)) if affinity else os.cpu_count() or 1
    num_cores = min(cores or num_threads, num_threads)
    name = model or platform.processor() or platform.machine() or "unknown CPU"
    return f"{name} CPU ({_count(num_cores, 'core')}, {_count(num_threads, 'thread')})"


def _read_cpuinfo(file: Path) -> tuple[str, int]:
    """Model name and number of physical cores; an empty name and 0 where the system does not tell."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", 0
    model, cores = "", set()
    for block in text.split("\n\n"):
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        model = model or fields.get("model name", "")
        if "core id" in fields:
            cores.add((fields.get("physical id", "0"), fields["core id"]))
    return " ".join(model.replace("(R)", "").replace("(TM)", "").removesuffix("CPU").split()), len(cores)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def git_state(repository: Path = REPOSITORY) -> dict[str, str | bool]:
    """``commit`` of ``repository`` and ``dirty`` (uncommitted changes); "unknown" and False without git."""
    top = _git(repository, "rev-parse", "--show-toplevel")
    commit = _git(repository, "rev-parse", "HEAD")
    # An unpacked archive inside some other repository must not report that repository's commit as its own.
    if not top or not commit or Path(top).resolve() != repository.resolve():
        return {"commit": "unknown", "dirty": False}
    return {"commit": commit, "dirty": bool(_git(repository, "status", "--porcelain"))}


def _git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Installed version of each package, read from its metadata: nothing is imported."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
