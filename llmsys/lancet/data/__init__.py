"""The tables shipped in this folder, all made by ``experiments/make_lancet_tables.py`` from public measurements.

``device_fit.json``: times of kernels on A100 and H100; ``all_to_all_fit.json``: times of all-to-alls;
``load_quantiles.json``: how unevenly experts are chosen. Each begins with its source and how to read it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any


@cache
def read_shipped(name: str) -> dict[str, Any]:
    """The content of a JSON file of this folder; read once, not to be changed."""
    content: dict[str, Any] = json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))
    return content
