"""Finds the UCX library that the native engine loads: the system's, or the one of the wheel `libucx-cu12`.

The wheel is built without verbs: on a cluster with RDMA the system's UCX (of the fabric's vendor, a distribution, or
conda) must be the one in use, so it is preferred where it is new enough.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from llmsys.core.errors import ConfigError

LIBRARY_VARIABLE = "LLMSYS_UCX_LIBRARY"
MIN_VERSION = (1, 14)
_SONAME = "libucp.so.0"
_ASK_VERSION = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
numbers = [ctypes.c_uint() for _ in range(3)]
library.ucp_get_version(*map(ctypes.byref, numbers))
print(*(n.value for n in numbers), sep=".")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class UcxLibrary:
    """A libucp and where it comes from: "setting", "system" or "wheel"."""

    path: str
    origin: str


def find_ucx_library(choice: str = "auto") -> UcxLibrary:
    """The library to load.

    choice: "auto" (the system's if it is new enough, else the wheel's), "system", "wheel", or a path. The environment
    variable LLMSYS_UCX_LIBRARY takes the place of "auto".

    Raises:
        ConfigError: there is none; says what was looked at.
    """
    if choice == "auto":
        choice = os.environ.get(LIBRARY_VARIABLE, "") or "auto"
    if choice not in ("auto", "system", "wheel"):
        if not Path(choice).is_file():
            raise _not_found(f"the file {choice}, which does not exist")
        return UcxLibrary(path=choice, origin="setting")
    looked_at = []
    if choice in ("auto", "system"):
        path = _system_path()
        version = _version(path) if path else None
        if path and version and version >= MIN_VERSION:
            return UcxLibrary(path=path, origin="system")
        looked_at.append(f"the system's ({f'{path}, version {_text(version)}' if path else 'none'})")
    if choice in ("auto", "wheel"):
        path = _wheel_path()
        if path:
            return UcxLibrary(path=path, origin="wheel")
        looked_at.append("the wheel libucx-cu12 (not installed)")
    raise _not_found(" and ".join(looked_at))


def _not_found(found: str) -> ConfigError:
    return ConfigError(
        "no usable UCX library",
        expected=f"{_SONAME} of UCX {_text(MIN_VERSION)} or newer",
        found=found,
        fix=f"pip install libucx-cu12, or set {LIBRARY_VARIABLE} to the path of another {_SONAME}",
    )


def _text(version: tuple[int, ...] | None) -> str:
    return "unknown" if version is None else ".".join(map(str, version))


def _system_path() -> str | None:
    name = ctypes.util.find_library("ucp")
    return name if name is None or "/" in name else _full_path(name)


def _full_path(name: str) -> str:
    """The dynamic linker's answer as a path, where its cache knows it, so that rows can say which file it was."""
    try:
        listing = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return name
    paths = [line.split("=> ")[1] for line in listing.stdout.splitlines() if line.strip().startswith(f"{name} (")]
    return paths[0] if paths else name


@lru_cache
def _version(path: str) -> tuple[int, ...] | None:
    # In a process of its own: a library that turns out too old would stay loaded here and satisfy the other's needs.
    try:
        asked = subprocess.run(
            [sys.executable, "-S", "-c", _ASK_VERSION, path], capture_output=True, text=True, timeout=30, check=True
        )
        return tuple(map(int, asked.stdout.strip().split(".")))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _wheel_path() -> str | None:
    spec = importlib.util.find_spec("libucx")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / "lib" / _SONAME
    return str(path) if path.is_file() else None
