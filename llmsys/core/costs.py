"""Cost primitives: interpolation of measured tables, the roofline, and the alpha-beta model of messages."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmsys.core.errors import InputError
from llmsys.core.specs import DeviceSpec, LinkSpec

FloatArray = NDArray[np.float64]
Hole = Literal["infeasible", "extrapolate"]


@dataclass(frozen=True, slots=True, init=False, eq=False)
class GridTable:
    """Multilinear interpolation of several columns over one grid; infinity means infeasible.

    Arguments
        ``axes``: d >= 1 strictly increasing sequences of n_0, ..., n_(d-1) finite values.
        ``columns``: name -> array of shape (n_0, ..., n_(d-1)), values >= 0; NaN marks an unmeasured point.
        ``hole``: what to do about unmeasured points, see below.
        ``memory``: the names of the columns that are memory-like; only ``hole="extrapolate"`` looks at it.
        ``axis_names``: for errors only.
    After construction ``axes`` and ``columns`` hold read-only, C-contiguous float64 arrays; ``columns`` is
    completed as ``hole`` asks, and every point still unmeasured is +inf. Raises InputError for bad arguments.

    Holes
        "infeasible": an unmeasured point stays so. This is the public DynaPipe planner's rule, where one
        out-of-memory corner makes its whole cell infeasible.
        "extrapolate": first, in each grid line along the LAST axis (the micro-batch size), whose first k >= 1
        points are measured and all later ones are not, point k alone is filled, with axis values x and
        values v: a time-like column gets max(v[k-1], v[k-1] + (v[k-1] - v[k-2]) * (x[k] - x[k-1]) / (x[k-1]
        - x[k-2])); a memory-like column gets max(v[0..k-1]) * x[k] / x[k-1], since measured peaks can fall
        from one size to the next (allocator effects); with k = 1 both kinds get v[0] * x[1] / x[0]. Other
        holes stay as they are.

    Interpolation of a point p. A C++ reader of the same arrays gives equal bits if it follows this order in
    float64, without fused multiply-add.
        1. If p[a] > axes[a][-1] for any axis a, the result is +inf.
        2. Cell of axis a: i_a = the last i with axes[a][i] <= p[a], clipped to [0, n_a - 2]. Below the
           smallest value this is cell 0, whose line is extended (a result far below can come out negative).
        3. w_a = (p[a] - lo) / (hi - lo) with lo = axes[a][i_a], hi = axes[a][i_a + 1]. An axis of one value
           is constant: i_a = 0, w_a = 0.
        4. total = 0. The 2^d corners are visited in binary order, axis 0 being the most significant bit; a
           set bit means i_a + 1. Corner weight: f_0 * f_1 * ... from left to right, with f_a = w_a for a
           set bit and 1 - w_a otherwise. A corner of weight exactly 0 is skipped, whatever its value. If
           any other corner is +inf the result is +inf; else total = total + weight * value.
    """

    axes: tuple[FloatArray, ...]
    columns: dict[str, FloatArray]
    hole: Hole = "infeasible"
    memory: frozenset[str] = frozenset()
    axis_names: tuple[str, ...] = ()

    def __init__(
        self,
        axes: Sequence[ArrayLike],
        columns: Mapping[str, ArrayLike],
        *,
        hole: Hole = "infeasible",
        memory: Collection[str] = (),
        axis_names: Sequence[str] = (),
    ) -> None:
        names = tuple(axis_names) or tuple(f"axis {number}" for number in range(len(axes)))
        if not axes or len(names) != len(axes):
            raise InputError(
                "axes and axis_names do not fit",
                expected="at least one axis, and one name for each if names are given",
                found=f"{len(axes)} axes, names {names}",
                fix="set axes, and axis_names to as many names or to none",
            )
        clean_axes = tuple(_checked_axis(axis, name) for axis, name in zip(axes, names, strict=True))
        shape = tuple(len(axis) for axis in clean_axes)
        if not columns or not set(memory) <= set(columns):
            raise InputError(
                "columns and memory do not fit",
                expected="at least one column, and only names of columns in memory",
                found=f"columns {sorted(columns)}, memory {sorted(memory)}",
                fix="add the columns, or take the unknown names out of memory",
            )
        if hole not in ("infeasible", "extrapolate"):
            raise InputError(
                "unknown rule for holes", expected="'infeasible' or 'extrapolate'", found=repr(hole), fix="set hole"
            )
        if hole == "extrapolate" and clean_axes[-1][0] <= 0:
            raise InputError(
                f"{names[-1]} must be above 0 to extrapolate in proportion to it",
                expected=f"values of {names[-1]} above 0",
                found=f"smallest value {clean_axes[-1][0]}",
                fix="use hole='infeasible' or drop that value",
            )
        clean_columns = {}
        for name, values in columns.items():
            grid = _checked_column(values, name, shape)
            if hole == "extrapolate":
                _fill_one_step(grid, clean_axes[-1], proportional=name in memory)
            grid[np.isnan(grid)] = np.inf
            grid.setflags(write=False)
            clean_columns[name] = grid
        object.__setattr__(self, "axes", clean_axes)
        object.__setattr__(self, "columns", clean_columns)
        object.__setattr__(self, "hole", hole)
        object.__setattr__(self, "memory", frozenset(memory))
        object.__setattr__(self, "axis_names", names)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis) for axis in self.axes)

    def query(self, points: ArrayLike, columns: Sequence[str] | None = None) -> dict[str, FloatArray]:
        """Values at ``points`` of shape (n, d), one array of shape (n,) per column (all of them by default).

        +inf means infeasible. Raises InputError for another shape, a NaN coordinate, or an unknown column.
        """
        coordinates = np.asarray(points, dtype=np.float64)
        if coordinates.ndim != 2 or coordinates.shape[1] != len(self.axes) or np.isnan(coordinates).any():
            raise InputError(
                "query points do not fit the table",
                expected=f"an array of shape (n, {len(self.axes)}) of numbers: {', '.join(self.axis_names)}",
                found=f"shape {coordinates.shape}, {int(np.isnan(coordinates).sum())} NaN",
                fix=f"pass points with {len(self.axes)} columns and no NaN",
            )
        names = list(self.columns) if columns is None else list(columns)
        unknown = [name for name in names if name not in self.columns]
        if unknown:
            raise InputError(
                "the table has no such column",
                expected=f"of {list(self.columns)}",
                found=str(unknown),
                fix="take these names out of the argument columns",
            )
        above = np.zeros(len(coordinates), dtype=np.bool_)
        for number, axis in enumerate(self.axes):
            above |= coordinates[:, number] > axis[-1]
        # Points above the table are answered with inf; any position inside keeps their arithmetic finite.
        inside = np.where(above[:, None], [axis[0] for axis in self.axes], coordinates)
        corners = self._corners(inside)
        return {name: _weighted_sum(self.columns[name].reshape(-1), corners, above) for name in names}

    def _corners(self, points: FloatArray) -> list[tuple[NDArray[np.intp], FloatArray]]:
        """The flat index and the weight of each of the 2^d corners, in the order that the class fixes."""
        low, weight = [], []
        for number, axis in enumerate(self.axes):
            x = points[:, number]
            if len(axis) == 1:
                low.append(np.zeros(len(x), dtype=np.intp))
                weight.append(np.zeros(len(x)))
                continue
            cell = np.clip(np.searchsorted(axis, x, side="right") - 1, 0, len(axis) - 2)
            low.append(cell)
            weight.append((x - axis[cell]) / (axis[cell + 1] - axis[cell]))
        corners = []
        for bits in itertools.product((0, 1), repeat=len(self.axes)):
            flat = np.zeros(len(points), dtype=np.intp)
            product = np.ones(len(points))
            for number, bit in enumerate(bits):
                length = len(self.axes[number])
                # The clip only matters on an axis of one value, where the upper corner has weight 0.
                flat = flat * length + np.minimum(low[number] + bit, length - 1)
                product = product * (weight[number] if bit else 1.0 - weight[number])
            corners.append((flat, product))
        return corners


def roofline_ms(
    flops: float,
    num_bytes: float,
    device: DeviceSpec,
    *,
    compute_efficiency: float = 1.0,
    memory_efficiency: float = 1.0,
) -> float:
    """Time of one kernel: the longer of its 16-bit arithmetic and its memory traffic, in milliseconds.

    The efficiencies are the reachable fractions, in (0, 1], of the device's peak compute and bandwidth.
    """
    for name, value in (("compute_efficiency", compute_efficiency), ("memory_efficiency", memory_efficiency)):
        if not 0 < value <= 1:
            raise InputError(
                f"{name} is not a fraction", expected="above 0, at most 1", found=str(value), fix=f"set {name}"
            )
    _require_amount("flops", flops)
    _require_amount("num_bytes", num_bytes)
    compute_s = flops / (device.peak_16bit_tflops * 1e12 * compute_efficiency)
    memory_s = num_bytes / (device.memory_bandwidth_gb_per_s * 1e9 * memory_efficiency)
    return 1e3 * max(compute_s, memory_s)


@overload
def alpha_beta_ms(size_mb: float, link: LinkSpec | None) -> float: ...
@overload
def alpha_beta_ms(size_mb: FloatArray, link: LinkSpec | None) -> FloatArray: ...
def alpha_beta_ms(size_mb: float | FloatArray, link: LinkSpec | None) -> float | FloatArray:
    """Time of a message (or of each of an array) in milliseconds; 0 over ``None``, the link of a device with itself.

    ``size_mb`` counts MB of 10^6 bytes, as network rates do (memory sizes elsewhere count 2^20). The formula is
    latency + size * 8 / bandwidth, which the public DynaPipe planner uses as well.
    """
    _require_amount("size_mb", size_mb)
    if link is None:
        return 0.0 * size_mb
    return (link.latency_us + 1e6 * (size_mb * 8 / 1000) / link.bandwidth_gbps) / 1000


def ring_all_reduce_ms(size_mb: float, num_ranks: int, link: LinkSpec) -> float:
    """Time of a ring all-reduce of ``size_mb`` per rank: 2 (n - 1) steps that each move 1/n of it."""
    if num_ranks < 1:
        raise InputError(
            "an all-reduce needs a rank", expected="num_ranks >= 1", found=str(num_ranks), fix="set num_ranks"
        )
    return 2 * (num_ranks - 1) * alpha_beta_ms(size_mb / num_ranks, link)


def _checked_axis(values: ArrayLike, name: str) -> FloatArray:
    axis = np.array(values, dtype=np.float64, order="C")
    if axis.ndim != 1 or len(axis) == 0:
        raise InputError(
            f"{name} is not a list of values",
            expected="a one-dimensional list of at least one value",
            found=f"shape {axis.shape}",
            fix=f"change the values of {name} in axes",
        )
    if not np.isfinite(axis).all() or (np.diff(axis) <= 0).any():
        raise InputError(
            f"{name} is not strictly increasing",
            expected="finite, increasing values",
            found=str(axis.tolist()),
            fix=f"sort the values of {name} in axes and drop repeated ones",
        )
    axis.setflags(write=False)
    return axis


def _checked_column(values: ArrayLike, name: str, shape: tuple[int, ...]) -> FloatArray:
    grid = np.array(values, dtype=np.float64, order="C")
    if grid.shape != shape:
        raise InputError(
            f"column {name!r} does not fit the axes",
            expected=f"shape {shape}",
            found=f"shape {grid.shape}",
            fix="give the column one value for each point of the axes, NaN where nothing was measured",
        )
    if np.isnan(grid).all():
        raise InputError(
            f"column {name!r} has no measured point",
            expected="at least one number",
            found=f"NaN at all {grid.size} points",
            fix="leave the column out, or measure it",
        )
    if (grid < 0).any() or np.isinf(grid).any():
        bad = grid[(grid < 0) | np.isinf(grid)]
        raise InputError(
            f"column {name!r} has values that are no cost",
            expected="finite values of at least 0, and NaN where nothing was measured",
            found=f"{len(bad)} other values, the first is {bad[0]}",
            fix="correct them, or write NaN in their place",
        )
    return grid


def _fill_one_step(grid: FloatArray, axis: FloatArray, *, proportional: bool) -> None:
    """Fill, in place, the first unmeasured point of each line along the last axis (see GridTable)."""
    lines = grid.reshape(-1, len(axis))
    for line in lines:
        measured = ~np.isnan(line)
        k = int(measured.sum())
        if k == 0 or k == len(axis) or not measured[:k].all():
            continue
        if proportional or k == 1:
            line[k] = line[:k].max() * axis[k] / axis[k - 1]
        else:
            slope_step = (line[k - 1] - line[k - 2]) * (axis[k] - axis[k - 1]) / (axis[k - 1] - axis[k - 2])
            line[k] = max(line[k - 1], line[k - 1] + slope_step)


def _weighted_sum(
    values: FloatArray, corners: list[tuple[NDArray[np.intp], FloatArray]], above: NDArray[np.bool_]
) -> FloatArray:
    total = np.zeros(len(above))
    infeasible = above.copy()
    for flat, weight in corners:
        value = values[flat]
        used, hole = weight != 0, np.isinf(value)
        infeasible |= used & hole
        # Adding +0 for a skipped corner leaves the bits as they are: total is never -0.
        total = total + np.where(used & ~hole, weight * np.where(hole, 0.0, value), 0.0)
    total[infeasible] = np.inf
    return total


def _require_amount(name: str, value: float | FloatArray) -> None:
    if not np.all(np.isfinite(value) & (np.asarray(value) >= 0)):
        raise InputError(f"{name} is not an amount", expected="finite, at least 0", found=str(value), fix=f"set {name}")
