"""The native interpolation gives what GridTable does, which defines it; what extrapolates below 0 costs nothing."""

from __future__ import annotations

import numpy as np
import pytest

from llmsys import _C
from llmsys.core.costs import GridTable
from llmsys.core.specs import Architecture
from tests.dynapipe.synthetic import FloatArray, random_profile

pytestmark = pytest.mark.native

NO_LIMIT = np.inf
COLUMNS = ("fw_ms", "bw_ms", "stored_mb", "peak_mb")


def native(table: GridTable, *columns: str) -> _C.CostTable:
    empty = np.zeros(int(np.prod(table.shape)))
    flat = [table.columns[name].reshape(-1) if name in columns else empty for name in COLUMNS]
    return _C.CostTable(list(table.axes), flat)


def device(*, encoder: int = 0, decoder: int = 0, head: bool = False) -> FloatArray:
    return np.array([[encoder, decoder, head, 1, NO_LIMIT]], dtype=np.float64)


def points_of(table: GridTable, rng: np.random.Generator, number: int = 400) -> FloatArray:
    """On the grid, inside, below the smallest and above the largest value of every axis; whole numbers."""
    columns = []
    for axis in table.axes:
        inside = rng.integers(1, int(axis[-1]) + 3, number).astype(np.float64)
        columns.append(np.where(rng.random(number) < 0.4, rng.choice(axis, number), inside))
    return np.stack(columns, axis=1)


def assert_same(got: FloatArray, expected: FloatArray, largest: float) -> None:
    assert (np.isinf(got) == np.isinf(expected)).all()
    finite = np.isfinite(expected)
    # Below the smallest length values of opposite sign cancel: compare with the size of what went in.
    np.testing.assert_allclose(got[finite], expected[finite], rtol=1e-12, atol=1e-12 * largest)


@pytest.mark.parametrize("seed", range(6))
def test_layer_times_equal_the_grid_tables(architecture: Architecture, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables = random_profile(rng, architecture, hole_rate=0.2).layer_tables(1, "none")
    encoder = native(tables.encoder, "fw_ms", "bw_ms") if tables.encoder else None
    decoder, head = native(tables.decoder, "fw_ms", "bw_ms"), native(tables.head, "fw_ms", "bw_ms")
    kinds = [(device(decoder=1), tables.decoder), (device(head=True), tables.head)]
    if tables.encoder:
        kinds.append((device(encoder=1), tables.encoder))
    for load, table in kinds:
        points = points_of(table, rng)
        lengths = points[:, :-1].astype(np.int64)
        # A table with one length knows the encoder's or the decoder's; giving both is as good.
        encoder_len, decoder_len = (np.ascontiguousarray(lengths[:, i]) for i in (0, -1))
        counts = points[:, -1].astype(np.int64)
        got = _C.micro_batch_times(encoder, decoder, head, load, encoder_len, decoder_len, counts)
        values = {name: np.maximum(0.0, value) for name, value in table.query(points).items()}
        largest = max(float(c[np.isfinite(c)].max()) for c in table.columns.values())
        assert np.isinf(got).any() and np.isfinite(got).any()
        assert_same(got, values["fw_ms"] + values["bw_ms"], largest)


@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_is_interpolated_alike(column: str) -> None:
    rng = np.random.default_rng(3)
    table = random_profile(rng, "decoder_only").layer_tables(1, "none").decoder
    points = points_of(table, rng)
    values = table.columns[column].reshape(-1)
    empty = np.zeros_like(values)
    as_time = _C.CostTable(list(table.axes), [values, empty, empty, empty])
    lengths, counts = (np.ascontiguousarray(points[:, i].astype(np.int64)) for i in (0, 1))
    got = _C.micro_batch_times(None, as_time, as_time, device(decoder=1), lengths, lengths, counts)
    expected = np.maximum(0.0, table.query(points, [column])[column])
    assert (expected == 0.0).any() == (column in ("fw_ms", "peak_mb"))  # this seed extrapolates two below 0
    assert_same(got, expected, float(values[np.isfinite(values)].max()))


def test_limits_cut_off_what_does_not_fit() -> None:
    axes = [np.array([8.0, 16.0]), np.array([1.0, 2.0])]
    ones, stored, peak = np.ones(4), np.array([1.0, 2.0, 2.0, 4.0]), np.array([3.0, 6.0, 6.0, 12.0])
    table = _C.CostTable(axes, [ones, ones, stored, peak])
    lengths, counts = np.array([8, 8, 16, 16]), np.array([1, 2, 1, 2])

    def fits(available: float, in_flight: int = 1, layers: int = 3) -> list[bool]:
        load = np.array([[0.0, layers, 0.0, in_flight, available]])
        return np.isfinite(_C.micro_batch_times(None, table, table, load, lengths, lengths, counts)).tolist()

    assert fits(NO_LIMIT) == [True] * 4
    assert fits(10.0) == [True, True, True, False]  # two layers store, the third peaks: 5, 10, 10, 20
    assert fits(9.9) == [True, False, False, False]
    assert fits(16.0, in_flight=2) == [True, True, True, False]  # three more layers stored: 8, 16, 16, 32
    assert fits(15.9, in_flight=2) == [True, False, False, False]


def test_stored_activations_count_where_the_peak_was_measured_below_them() -> None:
    axes = [np.array([8.0, 16.0]), np.array([1.0, 2.0])]
    table = _C.CostTable(axes, [np.ones(4), np.ones(4), np.full(4, 2.0), np.ones(4)])
    one = np.array([1])
    for available, fits in ((5.9, False), (6.0, True)):
        load = np.array([[0.0, 3.0, 0.0, 1.0, available]])
        assert np.isfinite(_C.micro_batch_times(None, table, table, load, 8 * one, 8 * one, one))[0] == fits


def test_an_axis_of_one_value_is_constant() -> None:
    rng = np.random.default_rng(0)
    table = (
        random_profile(rng, "decoder_only", lengths=(16,), sizes=(2,), hole_rate=0.0).layer_tables(1, "none").decoder
    )
    one = native(table, "fw_ms")
    lengths, counts = np.array([1, 16, 17, 16]), np.array([1, 2, 1, 3])
    got = _C.micro_batch_times(None, one, one, device(decoder=1), lengths, lengths, counts)
    value = table.columns["fw_ms"][0, 0]
    assert got.tolist() == [value, value, np.inf, np.inf]


@pytest.mark.parametrize(
    ("axes", "columns", "message"),
    [
        ([[1.0]], 4, "2 or 3 axes"),
        ([[1.0], []], 4, "axis is empty"),
        ([[2.0, 1.0], [1.0]], 4, "increase strictly"),
        ([[1.0, 1.0], [1.0]], 4, "increase strictly"),
        ([[1.0], [1.0]], 3, "4 columns"),
        ([[1.0, 2.0], [1.0]], 4, "must have 2 points, got 1"),
    ],
)
def test_bad_tables_are_refused(axes: list[list[float]], columns: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.CostTable([np.array(axis) for axis in axes], [np.ones(1)] * columns)


def test_bad_arguments_are_refused() -> None:
    table = _C.CostTable([np.array([8.0]), np.array([1.0])], [np.ones(1)] * 4)
    one = np.array([8])
    with pytest.raises(ValueError, match="5 values"):
        _C.micro_batch_times(None, table, table, np.ones((1, 4)), one, one, one)
    with pytest.raises(ValueError, match="one entry a micro-batch"):
        _C.micro_batch_times(None, table, table, device(decoder=1), one, one, np.array([1, 2]))
    with pytest.raises(ValueError, match=r"axes \(encoder length, decoder length, micro-batch size\)"):
        _C.micro_batch_times(table, table, table, device(decoder=1), one, one, one)
    with pytest.raises(ValueError, match="no samples"):
        empty = np.array([], dtype=np.int64)
        _C.partition_samples(None, table, table, device(decoder=1), empty, empty, 1.0, 1.0, 1)
