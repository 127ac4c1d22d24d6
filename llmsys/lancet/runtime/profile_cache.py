"""A file of measured times, so that an operation is measured once on a machine and not once in every run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

from llmsys.core.errors import InputError

_VERSION = 1
_log = logging.getLogger(__name__)


def default_cache_file() -> Path:
    """Below XDG_CACHE_HOME, or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "llmsys" / "lancet_costs.json"


class ProfileCache:
    """Times in ms by key; a key says all that a time depends on. ``path`` None keeps them in memory only.

    `save` merges what other processes have saved meanwhile and replaces the file in one step, so that readers see the
    old or the new one. A file that is damaged, or of another version, is not used: it is kept beside the new one, under
    a name that ends in ".unusable", what it held is measured again, and a warning says so. Raises InputError where the
    path is no file or cannot be read or written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._ms: dict[str, float] = {}
        self._is_saved = True
        self._dropped: list[str] = []
        if path is not None:
            self._ms = self._read(path)

    def __len__(self) -> int:
        return len(self._ms)

    def get(self, key: str) -> float | None:
        return self._ms.get(key)

    def put(self, key: str, ms: float) -> None:
        if not 0 <= ms < math.inf:
            raise InputError("a measured time is no time", expected="finite ms", found=f"{ms}", fix="measure again")
        self._ms[key] = ms
        self._is_saved = False

    def drop(self, prefix: str) -> int:
        """Forget all times whose key begins with ``prefix``, in the file too once it is saved; how many there were."""
        self._dropped.append(prefix)
        keys = [key for key in self._ms if key.startswith(prefix)]
        for key in keys:
            del self._ms[key]
        self._is_saved = self._is_saved and not keys
        return len(keys)

    def save(self) -> None:
        if self.path is None or self._is_saved:
            return
        kept = {k: ms for k, ms in self._read(self.path).items() if not k.startswith(tuple(self._dropped))}
        self._ms = kept | self._ms
        content = _encoded(self._ms)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(content, encoding="utf-8")
            temporary.replace(self.path)
        except OSError as error:
            raise _unusable(self.path, error) from error
        finally:
            temporary.unlink(missing_ok=True)
        self._is_saved = True

    def _read(self, path: Path) -> dict[str, float]:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise _unusable(path, error) from error
        found = _decoded(text)
        if found is None:
            aside = path.with_name(f"{path.name}.unusable")
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                path.replace(aside)
            _log.warning("%s is damaged or of another version: kept as %s, and measured again", path, aside.name)
            return {}
        return found


def _encoded(ms: Mapping[str, float]) -> str:
    return json.dumps({"version": _VERSION, "digest": _digest(ms), "ms": dict(sorted(ms.items()))}, indent=1) + "\n"


def _decoded(text: str) -> dict[str, float] | None:
    """None unless it is, in every number, what `_encoded` wrote."""
    try:
        content = json.loads(text)
        ms = {str(key): float(value) for key, value in content["ms"].items()}
        intact = content["version"] == _VERSION and content["digest"] == _digest(ms)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return ms if intact else None


def _digest(ms: Mapping[str, float]) -> str:
    return hashlib.blake2b(json.dumps(sorted(ms.items())).encode(), digest_size=16).hexdigest()


def _unusable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"the file of measured times {path} cannot be used",
        expected="a file that can be read and replaced, in a directory that can be written to",
        found=f"{type(error).__name__}: {error}",
        fix="choose another file, or None for no file",
    )
