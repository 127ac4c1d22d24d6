"""The native module: it is the one that was asked for, and its stub tells the truth."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from llmsys import _C

pytestmark = pytest.mark.native


def test_build_info_has_the_keys_of_the_stub() -> None:
    stub = ast.parse(Path(__file__).parents[1].joinpath("llmsys/_C.pyi").read_text())
    (build_info,) = (n for n in stub.body if isinstance(n, ast.ClassDef) and n.name == "BuildInfo")
    declared = {n.target.id for n in build_info.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert set(_C.build_info()) == declared


def test_stub_lists_every_public_name() -> None:
    stub = ast.parse(Path(__file__).parents[1].joinpath("llmsys/_C.pyi").read_text())
    stubbed = {n.name for n in stub.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    public = {name for name in vars(_C) if not name.startswith("_")}
    assert public - stubbed == set()


def test_sanitized_run_uses_the_sanitized_module() -> None:
    expected = "address,undefined" if os.environ.get("LLMSYS_NATIVE_DIR") else ""
    assert _C.build_info()["sanitize"] == expected


def test_module_is_built_as_cxx20() -> None:
    assert _C.build_info()["cxx_standard"] >= 202002
