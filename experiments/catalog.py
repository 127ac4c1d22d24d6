"""Which experiments exist, and the contract that each of their modules keeps."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import experiments
from experiments.record import Comparison, Row, RunContext
from llmsys.core.errors import ConfigError

REQUIRED = ("TITLE", "CLAIM", "Config", "run", "plot", "compare")


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One loaded figure module; the fields are the parts of the contract in ``experiments``."""

    name: str
    title: str
    claim: str
    config_type: type[Any]
    run: Callable[[Any, RunContext], list[Row]]
    plot: Callable[[Any], Any]
    compare: Callable[[Any], list[Comparison]]


def names(pattern: str = "*") -> tuple[str, ...]:
    """Names ``<paper>/<figure>`` of the experiments that match the wildcards of ``pattern``, sorted."""
    found = {
        f"{file.parent.name}/{file.stem}"
        for root in experiments.__path__
        for file in Path(root).glob("*/*.py")
        if not file.name.startswith("_") and file.parent.name != "notebooks"
    }
    return tuple(sorted((name for name in found if fnmatch.fnmatchcase(name, pattern)), key=natural_key))


def expand(choice: str) -> tuple[str, ...]:
    """The experiments that ``choice`` (a comma-separated list of names or wildcard patterns) stands for.

    Raises ConfigError, with the valid names, for a name that does not exist and a pattern that matches
    nothing.
    """
    chosen: list[str] = []
    for part in (text.strip() for text in choice.split(",")):
        matches = names(part)
        if not matches:
            raise _unknown(part)
        chosen += [name for name in matches if name not in chosen]
    return tuple(chosen)


def load(name: str) -> Experiment:
    """Import the module of experiment ``name``.

    Raises ConfigError for an unknown name and for a module that lacks a part of the contract.
    """
    if name not in names():
        raise _unknown(name)
    module = importlib.import_module("experiments." + name.replace("/", "."))
    missing = [part for part in REQUIRED if not hasattr(module, part)]
    if missing:
        raise ConfigError(
            f"experiment {name} is incomplete",
            expected="a module that defines " + ", ".join(REQUIRED),
            found="no " + ", no ".join(missing),
            fix="add them; if the file is a helper and no experiment, start its name with an underscore",
        )
    if not (isinstance(module.Config, type) and dataclasses.is_dataclass(module.Config)):
        raise ConfigError(
            f"experiment {name}: Config is not a dataclass",
            expected="a frozen, slotted, keyword-only dataclass",
            found=repr(module.Config),
            fix="decorate it with @dataclass(frozen=True, slots=True, kw_only=True)",
        )
    return Experiment(
        name=name,
        title=module.TITLE,
        claim=module.CLAIM,
        config_type=module.Config,
        run=module.run,
        plot=module.plot,
        compare=module.compare,
    )


def natural_key(name: str) -> tuple[tuple[str, int], ...]:
    """Sort key that puts fig9 before fig13."""
    return tuple((text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name))


def _unknown(name: str) -> ConfigError:
    valid = names()
    near = difflib.get_close_matches(name, valid, n=1)
    return ConfigError(
        f"there is no experiment {name!r}",
        expected="one of " + (", ".join(valid) or "(no experiment found)"),
        found=repr(name),
        fix=f"did you mean experiment={near[0]}?" if near else "set experiment= to one of these",
    )
