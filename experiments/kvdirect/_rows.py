"""What the rows of all figures of transfers say about a pair of processes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from experiments.kvdirect._pairs import Pair
from experiments.record import RunContext, Scalar
from llmsys.core.errors import InputError


def check_ours_present(pairs: Sequence[Pair]) -> None:
    """Other systems are optional; without UCX nothing of ours could be shown. Raises InputError."""
    for pair in pairs:
        if pair.missing and pair.system.kind == "ucx":
            raise InputError(
                "the transport that this figure is about cannot be used",
                expected="llmsys._C built with the engine, and a UCX library",
                found=pair.missing,
                fix="pip install libucx-cu12, then build again",
            )


def shared_columns(pair: Pair, context: RunContext) -> dict[str, Scalar]:
    # Where libraries lie on this machine is nobody's business; their names and versions are.
    described = {key: re.sub(r"/\S*/", "", text) for key, text in pair.description.items()}
    return {
        "method": pair.system.name,
        "num_copying_threads": pair.system.num_copying_threads,
        "library": described.get("library", ""),
        "settings": ", ".join(f"{key}: {text}" for key, text in described.items() if key != "library"),
        "source": "measured",
        "device": context.device,
        "seed": context.seed,
    }
