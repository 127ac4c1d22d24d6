"""From the words of the command line to one experiment's ``Config``."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments import catalog
from llmsys.core.config import build
from llmsys.core.errors import ConfigError

SCALES = ("tiny", "small", "paper")
# Overrides that do not make a result a different point of a sweep.
_PLACE_ONLY = ("experiment", "scale", "output_dir", "data.root", "debug")
_MAX_VARIANT_LENGTH = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    root: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What conf/config.yaml sets for every experiment."""

    scale: str
    seed: int
    data: DataOptions
    output_dir: str
    debug: bool


def prepare_overrides(words: Sequence[str]) -> list[str]:
    """Command-line words as Hydra takes them.

    ``settings.NAME=VALUE`` becomes ``++settings.NAME=VALUE``, since the defaults that it overrides are in
    code and unknown to Hydra. Wildcards in ``experiment=`` are expanded to a sweep. Raises ConfigError for an
    unknown experiment, which Hydra would report as a missing file.
    """
    prepared = []
    for word in words:
        if word.startswith("settings."):
            word = "++" + word
        # Hydra's own sweep functions, as glob(...), are left to Hydra.
        elif word.startswith("experiment=") and "(" not in word:
            word = "experiment=" + ",".join(catalog.expand(word.removeprefix("experiment=").strip("'\"")))
        prepared.append(word)
    return prepared


def composition_error(error: Exception) -> ConfigError:
    """Hydra's or OmegaConf's error in the form of ours."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, ConfigError):
        inner = inner.__cause__ or inner.__context__
    if inner is not None:  # one of our resolvers refused a value
        return inner
    reasons = [str(error)] + ([str(error.__cause__)] if error.__cause__ else [])
    # Left out: details of Hydra's inside, and its advice to append the key, which would only move the error.
    noise = ("full_key", "object_type", "To append to your config")
    lines = [line for reason in reasons for line in reason.splitlines() if not line.strip().startswith(noise)]
    return ConfigError(
        "the configuration cannot be composed",
        expected="words KEY=VALUE of keys in conf/config.yaml",
        found=" ".join(dict.fromkeys(line.strip() for line in lines if line.strip())),
        fix="see python -m experiments.run --help; an experiment's own settings are settings.NAME=VALUE",
    )


def run_options(cfg: DictConfig) -> RunOptions:
    """The options shared by all experiments.

    Raises ConfigError for a wrong type, an unknown scale and a negative seed.
    """
    names = list(RunOptions.__dataclass_fields__)
    options = build(RunOptions, _plain(OmegaConf.masked_copy(cfg, names)))
    if options.scale not in SCALES:
        near = difflib.get_close_matches(options.scale, SCALES, n=1)
        raise ConfigError(
            f"there is no scale {options.scale!r}",
            expected="one of " + ", ".join(SCALES),
            found=repr(options.scale),
            fix=f"set scale={near[0] if near else SCALES[0]}",
        )
    if options.seed < 0:
        raise ConfigError(
            "seed is out of range", expected="a whole number, at least 0", found=str(options.seed), fix="set seed=0"
        )
    return options


def checked_output_dir(text: str) -> str:
    """``text`` if results can be written below that directory, which need not exist; ConfigError otherwise."""
    path = Path(text).absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    problem = ""
    if not text.strip():
        problem = "no text"
    elif not existing.is_dir():
        problem = f"{existing} is a file"
    elif not os.access(existing, os.W_OK | os.X_OK):
        problem = f"{existing} cannot be written to"
    if problem:
        raise ConfigError(
            "results cannot be written below output_dir",
            expected="a directory, or a path at which one can be made",
            found=problem,
            fix="set output_dir to another directory",
        )
    return text


def build_config(experiment: catalog.Experiment, cfg: DictConfig, scale: str) -> Any:
    """The experiment's ``Config``: settings of its YAML, then of the scale, then of the command line.

    Raises ConfigError for unknown keys, naming the nearest valid one.
    """
    parts = yaml_parts(experiment.name, _plain(cfg.get("experiment") or {}))
    merged = OmegaConf.merge(parts["settings"], parts["scales"].get(scale) or {}, cfg.get("settings") or {})
    return build(experiment.config_type, _plain(merged), "settings")


def yaml_parts(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` and ``scales`` of an experiment's YAML file; ConfigError for any other key or scale."""
    file = f"conf/experiment/{name}.yaml"
    parts = {"settings": content.get("settings") or {}, "scales": content.get("scales") or {}}
    for owner, valid, given in ((file, tuple(parts), content), (f"{file}, scales", SCALES, parts["scales"])):
        for key in given:
            if key not in valid:
                near = difflib.get_close_matches(str(key), valid, n=1)
                raise ConfigError(
                    f"{owner}: unknown key {key!r}",
                    expected="only " + ", ".join(valid),
                    found=repr(key),
                    fix=f"did you mean {near[0]!r}?" if near else "put settings of the experiment below settings:",
                )
    return parts


def variant_name(overrides: Sequence[str]) -> str:
    """A directory name for one point of a sweep, from its overrides; empty when only the place differs."""
    words = [word.lstrip("+~") for word in overrides]
    telling = sorted(word for word in words if word.split("=")[0] not in _PLACE_ONLY)
    name = ",".join(word.removeprefix("settings.") for word in telling)
    safe = re.sub(r"[^\w.,=+-]+", "_", name)
    if len(safe) > _MAX_VARIANT_LENGTH or safe != name:
        # Cut or replaced characters could make two points share a name.
        safe = f"{safe[:_MAX_VARIANT_LENGTH]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return safe


def _plain(cfg: Any) -> dict[str, Any]:
    container = OmegaConf.to_container(cfg if OmegaConf.is_config(cfg) else OmegaConf.create(cfg), resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
