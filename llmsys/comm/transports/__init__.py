"""Transports by name. Nothing is imported before it is asked for, so optional packages may be missing."""

from __future__ import annotations

import difflib
import importlib

from llmsys.comm.transports.base import Transport
from llmsys.core.errors import ConfigError

TRANSPORTS: dict[str, str] = {
    "ucx": "llmsys.comm.transports.ucx:UcxTransport",
    "loopback": "llmsys.comm.transports.loopback:LoopbackTransport",
    "ucx_py": "llmsys.comm.transports.ucx_py:UcxPyTransport",
    "nixl": "llmsys.comm.transports.nixl:NixlTransport",
    "gloo": "llmsys.comm.transports.gloo:GlooTransport",
}
"""Name in configurations -> "module:class"; the class is made by `Class(config, ...)` and says if it can be used."""


def transport_class(name: str) -> type[Transport]:
    """The class of a transport that can be used here.

    Raises:
        ConfigError: no such transport, or it cannot be used here, and why.
    """
    if name not in TRANSPORTS:
        near = difflib.get_close_matches(name, TRANSPORTS, n=1)
        raise ConfigError(
            "not a transport",
            expected=f"one of {', '.join(TRANSPORTS)}",
            found=repr(name),
            fix=f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(TRANSPORTS)}",
        )
    found, problem = _load(name)
    if found is None:
        raise ConfigError(
            f"transport {name} cannot be used here",
            expected="its library",
            found=problem,
            fix="do what the line above says, or choose one that available_transports() says can be used",
        )
    return found


def available_transports() -> dict[str, str | None]:
    """Every transport, with None if it can be used here, else why not."""
    return {name: None if found else problem for name in TRANSPORTS for found, problem in [_load(name)]}


def _load(name: str) -> tuple[type[Transport] | None, str]:
    module, _, attribute = TRANSPORTS[name].partition(":")
    try:
        found: type[Transport] = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # A package that is half installed raises anything.
        return None, f"{module} cannot be imported: {type(error).__name__}: {error}"
    problem = found.available()
    return (found, "") if problem is None else (None, problem)
