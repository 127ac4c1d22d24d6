"""llmsys: planners, simulators and runtimes of three LLM systems papers (KVDirect, Lancet, DynaPipe).

Importing this package imports neither torch nor the native module, so planners and simulators stay usable
where torch is not installed.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
