from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest

from llmsys.core.costs import GridTable, alpha_beta_ms, ring_all_reduce_ms, roofline_ms
from llmsys.core.errors import InputError
from llmsys.core.specs import DEVICES, LinkSpec

NAN, INF = math.nan, math.inf


def one_point(table: GridTable, column: str, point: tuple[float, ...]) -> float:
    """The interpolation rule written as the docstring has it: scalars, one corner after the other."""
    if any(x > axis[-1] for x, axis in zip(point, table.axes, strict=True)):
        return INF
    cells, weights = [], []
    for x, axis in zip(point, table.axes, strict=True):
        cell = max([i for i in range(len(axis)) if axis[i] <= x], default=0)
        cell = max(0, min(cell, len(axis) - 2))
        cells.append(cell)
        last = len(axis) == 1
        weights.append(0.0 if last else (x - float(axis[cell])) / float(axis[cell + 1] - axis[cell]))
    total = 0.0
    for bits in itertools.product((0, 1), repeat=len(point)):
        weight = 1.0
        for w, bit in zip(weights, bits, strict=True):
            weight = weight * (w if bit else 1.0 - w)
        if weight == 0.0:
            continue
        value = float(table.columns[column][tuple(c + b for c, b in zip(cells, bits, strict=True))])
        if value == INF:
            return INF
        total = total + weight * value
    return total


def column(table: GridTable, points: object, name: str = "t") -> list[float]:
    return table.query(np.array(points, dtype=float))[name].tolist()


LINE = GridTable([[1, 2, 4, 8]], {"t": [10.0, 12.0, 20.0, NAN]})


def test_one_axis_inside_on_the_points_below_and_above() -> None:
    assert column(LINE, [[1], [2], [4], [1.5], [3]]) == [10.0, 12.0, 20.0, 11.0, 16.0]
    assert column(LINE, [[0.5], [0]]) == [9.0, 8.0], "linear from the first cell"
    assert column(LINE, [[8.01], [1e9], [INF]]) == [INF] * 3


def test_a_hole_matters_only_with_weight() -> None:
    assert column(LINE, [[4]]) == [20.0], "the unmeasured corner has weight 0"
    assert column(LINE, [[4.0001], [8]]) == [INF, INF]
    plane = GridTable([[1, 2], [10, 20]], {"t": [[1.0, 2.0], [3.0, NAN]]})
    assert column(plane, [[1, 15], [1.5, 10], [1.5, 15], [2, 20]]) == [1.5, 2.0, INF, INF]


def test_the_last_axis_value_uses_the_last_cell_with_weight_one() -> None:
    table = GridTable([[1, 3, 7]], {"t": [NAN, NAN, 0.1]})
    assert column(table, [[7]]) == [0.1]


def test_axis_of_one_value_is_constant_up_to_it() -> None:
    table = GridTable([[4], [1, 2]], {"t": [[5.0, 7.0]]})
    assert column(table, [[4, 1], [2, 1.5], [0, 2]]) == [5.0, 6.0, 7.0]
    assert column(table, [[4.1, 1]]) == [INF]
    assert column(GridTable([[4]], {"t": [5.0]}), [[4], [1], [5]]) == [5.0, 5.0, INF]


def test_multilinear_functions_are_reproduced() -> None:
    rng = np.random.default_rng(0)
    axes = [np.cumsum(rng.uniform(0.5, 2, n)) for n in (3, 4, 5)]
    x, y, z = np.meshgrid(*axes, indexing="ij")

    def f(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return 3 + x + 2 * y + 5 * x * y + x * y * z

    table = GridTable(axes, {"t": f(x, y, z)})
    points = np.stack([rng.uniform(0, axis[-1], 200) for axis in axes], axis=1)
    np.testing.assert_allclose(table.query(points)["t"], f(*points.T), rtol=1e-12)


@pytest.mark.parametrize("hole", ["infeasible", "extrapolate"])
def test_bit_equal_to_the_rule_written_with_scalars(hole: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        num_axes = int(rng.integers(1, 4))
        axes = [np.cumsum(rng.uniform(0.1, 3, int(rng.integers(1, 5)))) for _ in range(num_axes)]
        values = rng.uniform(0, 100, tuple(map(len, axes)))
        values[rng.uniform(size=values.shape) < 0.2] = NAN
        values.reshape(-1)[0] = 1.0
        table = GridTable(axes, {"t": values, "m": values}, hole=hole, memory=["m"])  # type: ignore[arg-type]
        points = [[float(rng.uniform(0, 1.1 * axis[-1])) for axis in axes] for _ in range(40)]
        points += [[float(rng.choice(axis)) for axis in axes] for _ in range(20)]
        for name in ("t", "m"):
            wanted = [one_point(table, name, tuple(point)) for point in points]
            assert column(table, points, name) == wanted


def test_extrapolation_fills_one_point_of_each_line() -> None:
    nan_row = [NAN] * 5
    time = [
        [10.0, 14.0, NAN, NAN, NAN],  # slope 4 per 1, so 14 + 4 * 2
        [10.0, 8.0, NAN, NAN, NAN],  # falling: not below the last value
        [10.0, NAN, NAN, NAN, NAN],  # one point: in proportion
        [10.0, NAN, 30.0, NAN, NAN],  # a hole that is not at the end
        nan_row,
        [1.0, 2.0, 3.0, 4.0, 5.0],
        [NAN, 2.0, NAN, NAN, NAN],  # the line does not begin measured
        [1.0, 2.0, 3.0, 7.0, NAN],
    ]
    memory = [list(row) for row in time]
    memory[7] = [1.0, 2.0, 9.0, 7.0, NAN]
    axes = [list(range(8)), [1, 2, 4, 8, 16]]
    table = GridTable(axes, {"time": time, "memory": memory}, hole="extrapolate", memory=["memory"])
    assert table.columns["time"].tolist() == [
        [10.0, 14.0, 22.0, INF, INF],
        [10.0, 8.0, 8.0, INF, INF],
        [10.0, 20.0, INF, INF, INF],
        [10.0, INF, 30.0, INF, INF],
        [INF] * 5,
        [1.0, 2.0, 3.0, 4.0, 5.0],
        [INF, 2.0, INF, INF, INF],
        [1.0, 2.0, 3.0, 7.0, 7.0 + 4.0 * 8 / 4],
    ]
    assert table.columns["memory"].tolist() == [
        [10.0, 14.0, 28.0, INF, INF],
        [10.0, 8.0, 20.0, INF, INF],
        [10.0, 20.0, INF, INF, INF],
        [10.0, INF, 30.0, INF, INF],
        [INF] * 5,
        [1.0, 2.0, 3.0, 4.0, 5.0],
        [INF, 2.0, INF, INF, INF],
        [1.0, 2.0, 9.0, 7.0, 18.0],
    ]
    assert column(table, [[0, 3], [0, 5]], "time") == [18.0, INF]


def test_arrays_are_ready_for_a_native_reader() -> None:
    source = np.asfortranarray(np.ones((2, 3), dtype=np.float32))
    table = GridTable([[1, 2], [1, 2, 3]], {"a": source, "b": [[1, 2, 3], [4, 5, NAN]]})
    for array in (*table.axes, *table.columns.values()):
        assert array.dtype == np.float64 and array.flags.c_contiguous and not array.flags.writeable
    assert table.shape == (2, 3)
    assert table.columns["b"][1, 2] == INF
    source[:] = 7
    assert table.columns["a"].max() == 1, "the table keeps its own copy"
    assert list(table.query([[1, 1]], columns=["b"])) == ["b"]
    assert table.query(np.zeros((0, 2)))["a"].shape == (0,)
    copy = pickle.loads(pickle.dumps(table))
    assert copy.query([[1.5, 2.5]]) == table.query([[1.5, 2.5]]) and copy.axis_names == table.axis_names


@pytest.mark.parametrize(
    ("axes", "columns", "more", "match"),
    [
        ([], {"t": 1.0}, {}, "at least one axis"),
        ([[]], {"t": []}, {}, "not a list of values"),
        ([[[1, 2]]], {"t": [[1, 2]]}, {}, "not a list of values"),
        ([[1, 1]], {"t": [1, 2]}, {}, "not strictly increasing"),
        ([[2, 1]], {"t": [1, 2]}, {}, "mbs is not strictly increasing"),
        ([[1, NAN]], {"t": [1, 2]}, {}, "not strictly increasing"),
        ([[1, 2]], {"t": [1, 2, 3]}, {}, "does not fit the axes"),
        ([[1, 2]], {"t": [NAN, NAN]}, {}, "no measured point"),
        ([[1, 2]], {"t": [1, -2]}, {}, "no cost"),
        ([[1, 2]], {"t": [1, INF]}, {}, "no cost"),
        ([[1, 2]], {}, {}, "at least one column"),
        ([[1, 2]], {"t": [1, 2]}, {"memory": ["m"]}, "only names of columns in memory"),
        ([[0, 2]], {"t": [1, 2]}, {"hole": "extrapolate"}, "must be above 0"),
        ([[1, 2]], {"t": [1, 2]}, {"hole": "fill"}, "unknown rule"),
    ],
)
def test_bad_tables(axes: object, columns: object, more: dict[str, object], match: str) -> None:
    names = ["mbs"] if axes else []
    with pytest.raises(InputError, match=match):
        GridTable(axes, columns, axis_names=names, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("points", [[1.0], [[1.0, 2.0]], [[NAN]], 3.0])
def test_bad_points(points: object) -> None:
    with pytest.raises(InputError, match="do not fit the table"):
        LINE.query(points)  # type: ignore[arg-type]


def test_unknown_column() -> None:
    with pytest.raises(InputError, match="no such column"):
        LINE.query([[1.0]], columns=["u"])


def test_roofline() -> None:
    a100 = DEVICES["A100-40GB"]
    assert roofline_ms(312e12, 1.0, a100) == pytest.approx(1000.0), "compute bound: one second of peak"
    assert roofline_ms(1.0, 1555e9, a100) == pytest.approx(1000.0), "memory bound"
    assert roofline_ms(312e12, 1.0, a100, compute_efficiency=0.5) == pytest.approx(2000.0)
    assert roofline_ms(1.0, 1555e9, a100, memory_efficiency=0.25) == pytest.approx(4000.0)
    for bad in (0.0, 1.5, NAN):
        with pytest.raises(InputError, match="not a fraction"):
            roofline_ms(1.0, 1.0, a100, compute_efficiency=bad)
    with pytest.raises(InputError, match="flops"):
        roofline_ms(-1.0, 1.0, a100)


def test_alpha_beta_is_the_dynapipe_formula() -> None:
    link = LinkSpec(name="net", bandwidth_gbps=100.0, latency_us=4000.0)
    # 4000 us + 1e6 * (25 * 8 / 1000) / 100 us
    assert alpha_beta_ms(25.0, link) == pytest.approx(4.0 + 2.0)
    assert alpha_beta_ms(0.0, link) == pytest.approx(4.0)
    assert alpha_beta_ms(25.0, None) == 0.0
    with pytest.raises(InputError, match="size_mb"):
        alpha_beta_ms(NAN, link)


def test_ring_all_reduce() -> None:
    link = LinkSpec(name="net", bandwidth_gbps=8.0, latency_us=10.0)  # 1 MB a millisecond
    assert ring_all_reduce_ms(100.0, 1, link) == 0.0
    assert ring_all_reduce_ms(100.0, 4, link) == pytest.approx(2 * 3 / 4 * 100 + 2 * 3 * 0.01)
    with pytest.raises(InputError, match="needs a rank"):
        ring_all_reduce_ms(1.0, 0, link)
