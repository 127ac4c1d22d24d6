"""Settings shared by all tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


def _load_native_from(directory: Path) -> None:
    """Put the `_C` module found in `directory` in place of the installed one (see `make sanitize`)."""
    (path,) = directory.glob("_C*.so")
    spec = importlib.util.spec_from_file_location("llmsys._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["llmsys._C"] = module
    spec.loader.exec_module(module)


# Before any test module is collected, so that no module has bound the installed one yet.
if native_dir := os.environ.get("LLMSYS_NATIVE_DIR"):
    _load_native_from(Path(native_dir))
