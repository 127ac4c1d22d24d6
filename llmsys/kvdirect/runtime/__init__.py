"""KVDirect's runtime: endpoints that hold blocks and pull or push them, over any transport of `llmsys.comm`."""

from __future__ import annotations

from .completion import Completion
from .connection import Connection
from .endpoint import KvEndpoint
from .listener import Listener

__all__ = ["Completion", "Connection", "KvEndpoint", "Listener"]
