"""What a layer profile is: one set of tables per tensor-parallel degree and kind of recomputation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmsys.core.costs import GridTable, Hole
from llmsys.core.errors import InfeasibleError, InputError
from llmsys.core.specs import Architecture
from llmsys.dynapipe.config import Recompute

FloatArray = NDArray[np.float64]
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")

TIME_COLUMNS = ("fw_ms", "bw_ms")
MEMORY_COLUMNS = ("stored_mb", "peak_mb")

AXES: dict[tuple[Architecture, str], tuple[str, ...]] = {
    ("decoder_only", "decoder"): ("seq_len", "micro_batch_size"),
    ("decoder_only", "head"): ("seq_len", "micro_batch_size"),
    ("encoder_decoder", "encoder"): ("enc_len", "micro_batch_size"),
    ("encoder_decoder", "decoder"): ("enc_len", "dec_len", "micro_batch_size"),
    ("encoder_decoder", "head"): ("dec_len", "micro_batch_size"),
}
"""The axes of each table, in order; all count tokens except the last, which counts samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTables:
    """Costs of one micro-batch in one layer, on one of the tp devices, by padded length and micro-batch size.

    ``encoder`` (None for a decoder-only model) and ``decoder`` have the columns ``fw_ms``, ``bw_ms``,
    ``stored_mb`` (activations kept from forward to backward) and ``peak_mb`` (highest use inside the
    forward). ``head`` is the work after the last layer (final norm, vocabulary projection, loss) with
    ``fw_ms`` and ``bw_ms`` only. Axes: see AXES.
    """

    encoder: GridTable | None
    decoder: GridTable
    head: GridTable


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerProfile:
    """All tables of one model on one device.

    ``tables`` is keyed (tp, recompute). ``params_mb`` is keyed (tp, recompute, component) with component one
    of "embedding", "encoder", "decoder" and holds the 16-bit parameters of the embedding or of ONE layer on
    one device. ``origin`` says where the numbers come from. In the authors' profile and in the fit to it, an
    MB is 10^6 bytes for parameters and activations alike.
    ``layer_shape``: (hidden, num_heads, kv_channels, ffn_hidden) of the profiled layers, None if not known.
    """

    name: str
    architecture: Architecture
    device: str
    origin: str
    tables: Mapping[tuple[int, Recompute], LayerTables]
    params_mb: Mapping[tuple[int, Recompute, str], float]
    layer_shape: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        layers = (
            ("embedding", "decoder") if self.architecture == "decoder_only" else ("embedding", "encoder", "decoder")
        )
        needed = [(tp, recompute, part) for tp, recompute in self.tables for part in layers]
        missing = [key for key in needed if key not in self.params_mb]
        if missing:
            raise InputError(
                f"profile {self.name!r} lacks parameter sizes",
                expected="a size for each (tp, recompute) of its tables and each of " + ", ".join(layers),
                found=f"nothing for {missing[:4]}",
                fix="complete the model state file in data.root",
            )

    def layer_tables(self, tp: int, recompute: Recompute) -> LayerTables:
        """The tables for one (tp, recompute); raises InfeasibleError that lists what there is."""
        found = self.tables.get((tp, recompute))
        if found is None:
            raise InfeasibleError(
                f"profile {self.name!r} has no tables for tp={tp}, recompute={recompute!r}",
                expected="(tp, recompute) of " + ", ".join(f"({t}, {r})" for t, r in sorted(self.tables)),
                found=f"({tp}, {recompute})",
                fix="set tensor parallelism and recomputation to values that were profiled",
            )
        return found


def grid_from_points(
    axis_names: tuple[str, ...],
    coordinates: NDArray[np.int64],
    columns: Mapping[str, FloatArray],
    hole: Hole,
    *,
    label: str,
) -> GridTable:
    """A GridTable from scattered points: axes are the union of the coordinates, missing points stay NaN.

    ``coordinates`` has shape (n, len(axis_names)), each column shape (n,). Raises InputError, naming
    ``label``, for a point that occurs twice or a value that is no cost.
    """
    axes = [np.unique(coordinates[:, number]) for number in range(len(axis_names))]
    position = tuple(np.searchsorted(axis, coordinates[:, number]) for number, axis in enumerate(axes))
    shape = tuple(len(axis) for axis in axes)
    counts = np.bincount(np.ravel_multi_index(position, shape), minlength=1)
    if counts.max() > 1:
        where = np.unravel_index(int(counts.argmax()), shape)
        point = {name: int(axes[number][where[number]]) for number, name in enumerate(axis_names)}
        raise InputError(
            f"{label}: one point is given more than once",
            expected="one row per point (the median of repeated measurements)",
            found=f"{counts.max()} rows at {point}",
            fix="aggregate the profile in data.root",
        )
    grids = {}
    for name, values in columns.items():
        grids[name] = np.full(shape, np.nan)
        grids[name][position] = values
    try:
        return GridTable(
            axes,
            grids,
            hole=hole,
            memory=[name for name in columns if name in MEMORY_COLUMNS],
            axis_names=axis_names,
        )
    except InputError as error:
        raise InputError(
            f"{label}: {error.summary}", expected=error.expected, found=error.found, fix=error.fix
        ) from error


def measured_points(grid: GridTable) -> tuple[FloatArray, NDArray[np.bool_]]:
    """The axis values of all feasible points, shape (n, axes), and the mask of them, shape of the grid."""
    feasible = np.logical_and.reduce([np.isfinite(values) & (values > 0) for values in grid.columns.values()])
    index = np.nonzero(feasible)
    points = np.stack([axis[position] for axis, position in zip(grid.axes, index, strict=True)], axis=1)
    return points, feasible


def rising_peaks(peaks: FloatArray, sizes: FloatArray, feasible: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which feasible points have a peak per sample of at least 0.9 times that of any smaller micro-batch.

    ``peaks`` has the shape of a grid whose last axis is ``sizes``. The peak of some large micro-batches was
    measured below that of smaller ones (allocator effects in the source); these tell nothing about what a
    micro-batch needs.
    """
    per_sample = np.where(feasible, peaks / sizes, 0.0)
    kept: NDArray[np.bool_] = per_sample >= 0.9 * np.maximum.accumulate(per_sample, axis=-1)
    return kept[feasible]
