"""Layer profiles: loading, holes, the shipped fit, and costs of variable-length packing."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmsys.core.errors import DataNotFoundError, InfeasibleError, InputError
from llmsys.dynapipe.data import read_shipped
from llmsys.dynapipe.profile import (
    MODEL_STATE_FILE,
    PROFILE_FILE,
    PROFILE_NAMES,
    RECOMPUTES,
    LayerProfile,
    LayerTables,
    fitted_profile,
    load_profile,
    open_profile,
    varlen_terms,
)
from llmsys.dynapipe.profile.formulas import Kind, fit, fit_capacity, layer_terms
from llmsys.dynapipe.profile.tables import measured_points, rising_peaks

LENGTHS = [16, 32, 64, 128, 256, 512, 1024, 2048]
SIZES = [1, 2, 4, 8, 16]
COLUMNS = ("fw_ms", "bw_ms", "stored_mb", "peak_mb")


@pytest.fixture(scope="module")
def data_root() -> Path:
    root = Path(os.environ.get("LLMSYS_DATA_ROOT", Path(__file__).resolve().parents[2] / "../shared/data"))
    if not (root / PROFILE_FILE).is_file():
        pytest.skip(f"no {PROFILE_FILE} in {root}: set LLMSYS_DATA_ROOT to the directory of the real files")
    return root


def _layer_costs(length: int, size: int, cross_ms: float = 0.0) -> tuple[float, float, float, float]:
    """A made-up layer: launch-bound below 1 ms, linear work and quadratic attention above it."""
    tokens, pairs = length * size, length**2 * size
    forward = max(1.0, 2e-3 * tokens + 4e-7 * pairs + cross_ms)
    stored = 0.14 * tokens + 1.6e-4 * pairs
    peak = max(0.7 * tokens, 0.05 * tokens + 4.8e-4 * pairs)
    return forward, 2 * forward, stored, peak


Row = dict[str, object]


def _row(component: str, enc_len: int, dec_len: int, size: int, costs: Iterable[float | None]) -> Row:
    key: Row = {"model": "toy", "tp": 1, "recompute": "none", "component": component}
    lengths: Row = {"enc_len": enc_len, "dec_len": dec_len, "micro_batch_size": size}
    return key | lengths | dict(zip(COLUMNS, costs, strict=True))


def _decoder_only_rows() -> list[Row]:
    rows = []
    for length, size in itertools.product(LENGTHS, SIZES):
        rows.append(_row("encoder", length, 0, size, _layer_costs(length, size)))
        head = 0.3 + 1e-3 * length * size
        rows.append(_row("postprocess", length, 0, size, (head, head, None, None)))
    return rows


def _encoder_decoder_rows() -> list[Row]:
    lengths = LENGTHS[::2]
    rows = []
    for length, size in itertools.product(lengths, SIZES):
        rows.append(_row("encoder", length, 0, size, _layer_costs(length, size)))
        rows.append(_row("postprocess", 0, length, size, (1e-3 * length * size, 1.0, None, None)))
    for enc_len, dec_len, size in itertools.product(lengths, lengths, SIZES):
        cross_ms = size * (1e-3 * enc_len + 4e-7 * enc_len * dec_len)
        rows.append(_row("decoder", enc_len, dec_len, size, _layer_costs(dec_len, size, cross_ms)))
    return rows


def _write(root: Path, rows: list[Row], components: tuple[str, ...] = ("embedding", "encoder")) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), root / PROFILE_FILE)
    lines = [f"toy,1,none,{component},{10.0 + i}" for i, component in enumerate(components)]
    header = "model,tp,recompute,component,params_mb_16bit"
    (root / MODEL_STATE_FILE).write_text("\n".join([header, *lines]) + "\n")
    return root


def test_decoder_only_profile_reads_back(tmp_path: Path) -> None:
    profile = load_profile(_write(tmp_path, _decoder_only_rows()), "toy")
    tables = profile.layer_tables(1, "none")
    assert profile.architecture == "decoder_only" and tables.encoder is None
    assert [axis.tolist() for axis in tables.decoder.axes] == [LENGTHS, SIZES]
    assert tables.decoder.axis_names == ("seq_len", "micro_batch_size")
    assert set(tables.decoder.columns) == set(COLUMNS) and set(tables.head.columns) == {"fw_ms", "bw_ms"}
    point = tables.decoder.query([[512, 4]])
    assert [point[name][0] for name in COLUMNS] == pytest.approx(_layer_costs(512, 4))
    assert dict(profile.params_mb) == {(1, "none", "embedding"): 10.0, (1, "none", "decoder"): 11.0}


def test_encoder_decoder_profile_reads_back(tmp_path: Path) -> None:
    root = _write(tmp_path, _encoder_decoder_rows(), ("embedding", "encoder", "decoder"))
    profile = load_profile(root, "toy")
    tables = profile.layer_tables(1, "none")
    assert profile.architecture == "encoder_decoder" and tables.encoder is not None
    assert tables.decoder.axis_names == ("enc_len", "dec_len", "micro_batch_size")
    assert tables.head.axis_names == ("dec_len", "micro_batch_size")
    value = tables.decoder.query([[1024, 64, 16]], ["stored_mb"])["stored_mb"][0]
    assert value == pytest.approx(_layer_costs(64, 16)[2])
    assert profile.params_mb[1, "none", "decoder"] == 12.0


def test_unprofiled_combination_lists_the_profiled_ones(tmp_path: Path) -> None:
    profile = load_profile(_write(tmp_path, _decoder_only_rows()), "toy")
    with pytest.raises(InfeasibleError, match=r"tp=2, recompute='full'(.|\n)*\(1, none\)"):
        profile.layer_tables(2, "full")


@pytest.mark.parametrize("hole", ["infeasible", "extrapolate"])
def test_hole_inside_the_measured_region_stays_infeasible(tmp_path: Path, hole: str) -> None:
    missing = {(256, 4), (2048, 16)}
    rows = [row for row in _decoder_only_rows() if (row["enc_len"], row["micro_batch_size"]) not in missing]
    profile = load_profile(_write(tmp_path, rows), "toy", hole=hole)  # type: ignore[arg-type]
    decoder = profile.layer_tables(1, "none").decoder
    times = decoder.query([[256, 4], [256, 3], [200, 4], [256, 8], [256, 2], [128, 4]])["fw_ms"]
    assert np.isinf(times).tolist() == [True, True, True, False, False, False]
    # At the end of a line of sizes a hole means out of memory: a time there may be extrapolated.
    edge = decoder.query([[2048, 16]])["fw_ms"][0]
    assert np.isinf(edge) if hole == "infeasible" else edge == pytest.approx(_layer_costs(2048, 16)[0])


def _drop_columns(rows: list[Row]) -> list[Row]:
    return [{key: value for key, value in row.items() if key != "peak_mb"} for row in rows]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_columns, r"data\.root lacks columns(.|\n)*missing \['peak_mb'\]"),
        (lambda rows: [*rows, rows[0]], r"more than once(.|\n)*'seq_len': 16, 'micro_batch_size': 1"),
        (lambda rows: [row for row in rows if row["component"] == "encoder"], "no rows of component 'postp"),
        (lambda rows: [rows[0] | {"micro_batch_size": 0}, *rows[1:]], "size is not positive"),
        (lambda rows: [rows[0] | {"fw_ms": -1.0}, *rows[1:]], "encoder: column 'fw_ms' has values"),
        (lambda rows: [row | {"model": "other"} for row in rows], r"no model 'toy'(.|\n)*'other'"),
        (lambda rows: [row | {"tp": 2} for row in rows], r"lacks parameter sizes(.|\n)*\(2, 'none'"),
    ],
)
def test_bad_profiles_are_explained(tmp_path: Path, change: Callable[[list[Row]], list[Row]], message: str) -> None:
    root = _write(tmp_path, change(_decoder_only_rows()))
    with pytest.raises(InputError, match=message):
        load_profile(root, "toy")


def test_missing_files_name_the_setting(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"data\.root is not a directory"):
        open_profile(tmp_path / "absent", "toy")
    _write(tmp_path, _decoder_only_rows())
    (tmp_path / MODEL_STATE_FILE).write_text("model,tp\n")
    with pytest.raises(InputError, match=r"lacks columns(.|\n)*'recompute'"):
        open_profile(tmp_path, "toy")
    (tmp_path / MODEL_STATE_FILE).unlink()
    with pytest.raises(DataNotFoundError, match=rf"data\.root has no file {MODEL_STATE_FILE}"):
        open_profile(tmp_path, "toy")
    with pytest.raises(InputError, match=r"no fitted profile 'toy'(.|\n)*gpt_6\.7b"):
        open_profile(None, "toy")


@pytest.mark.parametrize("kind", ["layer", "cross_layer"])
def test_fit_finds_known_formulas(kind: Kind) -> None:
    axes = [LENGTHS] * (1 if kind == "layer" else 2) + [SIZES]
    points = np.array(list(itertools.product(*axes)), dtype=np.float64)
    terms = layer_terms(kind, points)
    coefficients = [0.2, 0.0, 2e-3, 4e-7] + ([1e-3, 3e-7] if kind == "cross_layer" else [])
    formula = fit(kind, "fw_ms", terms, np.maximum(1.6, terms @ coefficients))
    assert formula.p95_error < 1e-6
    assert formula.coefficients[1] == pytest.approx(coefficients, rel=1e-3, abs=1e-9)
    assert formula.coefficients[0][0] == pytest.approx(1.6)
    linear, attention = 0.7 * terms[:, 2], 0.05 * terms[:, 2] + 4.8e-4 * terms[:, 3]
    assert fit(kind, "peak_mb", terms, np.maximum(linear, attention)).p95_error < 1e-3


def test_fit_ignores_a_few_wild_points() -> None:
    points = np.array(list(itertools.product(LENGTHS, SIZES)), dtype=np.float64)
    terms = layer_terms("layer", points)
    costs = terms @ [0.0, 0.0, 0.14, 1.6e-4]
    costs[[3, 17, 30]] *= 0.5
    formula = fit("layer", "stored_mb", terms, costs)
    assert formula.coefficients[0][2:] == pytest.approx([0.14, 1.6e-4], rel=0.02)


def test_capacity_finds_the_largest_micro_batches() -> None:
    all_points = np.array(list(itertools.product(LENGTHS, [2**k for k in range(12)])), dtype=np.float64)
    needed = all_points[:, 1] * (2e-5 * all_points[:, 0] + 6e-9 * all_points[:, 0] ** 2)
    coefficients = fit_capacity(all_points[needed <= 1])
    estimate = all_points[:, 1:] * np.stack([all_points[:, 0] ** k for k in range(3)], axis=1) @ coefficients
    wrong = (estimate <= 1) != (needed <= 1)
    assert wrong.sum() <= 2


def test_falling_peaks_are_left_out() -> None:
    sizes, feasible = (
        np.array([1.0, 2, 4, 8]),
        np.array([[True, True, True, True], [True, True, False, False]]),
    )
    peaks = np.array([[10.0, 20, 25, 78], [5, 10, np.inf, np.inf]])
    assert rising_peaks(peaks, sizes, feasible).tolist() == [True, True, False, True, True, True]


def _parts(tables: LayerTables) -> list[str]:
    return ["encoder", "decoder", "head"] if tables.encoder is not None else ["decoder", "head"]


@pytest.mark.parametrize("name", PROFILE_NAMES)
def test_fitted_profile_is_complete(name: str) -> None:
    profile = open_profile(None, name)
    assert set(profile.tables) == set(itertools.product((1, 2, 4, 8), RECOMPUTES))
    assert profile.origin.startswith("fit to the authors' A100-40GB layer profile (median error")
    for tables in profile.tables.values():
        for part in _parts(tables):
            grid = getattr(tables, part)
            times = grid.columns["fw_ms"]
            assert np.isfinite(times[..., 0]).all() or part == "decoder"
            assert (times[np.isfinite(times)] > 0).all()
            # Out of memory at the far corner, even with one extrapolated step.
            assert np.isinf(times.reshape(-1)[-1])
    holes = [
        int(np.isinf(fitted_profile(name, hole=hole).layer_tables(1, "none").decoder.columns["fw_ms"]).sum())
        for hole in ("infeasible", "extrapolate")  # type: ignore[arg-type]
    ]
    assert holes[0] > holes[1] > 0


def test_fitted_costs_are_the_documented_ones() -> None:
    # A few measured values of the authors' profile: one GPT layer, tp=1, no recomputation, one sample.
    decoder = fitted_profile("gpt_6.7b").layer_tables(1, "none").decoder
    costs = decoder.query([[512, 1], [1024, 1], [2048, 1], [4096, 1], [8192, 1]])
    assert costs["fw_ms"] == pytest.approx([1.66, 2.63, 5.78, 15.24, 44.23], rel=0.06)
    assert costs["stored_mb"][2:4] == pytest.approx([966, 3284], rel=0.02)
    # Eight samples of 2048 were the most that fit.
    exact = fitted_profile("gpt_6.7b", hole="infeasible").layer_tables(1, "none").decoder
    assert np.isinf(exact.query([[2048, 8], [2048, 16]])["fw_ms"]).tolist() == [False, True]


@pytest.mark.data
@pytest.mark.parametrize("name", PROFILE_NAMES)
def test_fitted_profile_matches_the_real_one(data_root: Path, name: str) -> None:
    real, fitted = load_profile(data_root, name, hole="infeasible"), fitted_profile(name, hole="infeasible")
    errors = {column: [] for column in COLUMNS}  # type: dict[str, list[float]]
    agreements = []
    for key, tables in real.tables.items():
        assert fitted.params_mb[(*key, "decoder")] == pytest.approx(real.params_mb[(*key, "decoder")], abs=0.01)
        for part in _parts(tables):
            measured, ours = getattr(tables, part), getattr(fitted.tables[key], part)
            assert [axis.tolist() for axis in measured.axes[:-1]] == [axis.tolist() for axis in ours.axes[:-1]]
            feasible = [np.isfinite(grid.columns["fw_ms"]).sum(axis=-1) for grid in (measured, ours)]
            assert np.abs(feasible[0] - feasible[1]).max() <= 1
            agreements.append((feasible[0] == feasible[1]).mean())
            points, mask = measured_points(measured)
            values = ours.query(points)
            for column in measured.columns:
                truth = measured.columns[column][mask]
                error = np.abs(values[column] / truth - 1)
                errors[column].append(float(np.median(error[np.isfinite(error)])))
    assert min(agreements) > 0.6 and np.mean(agreements) > 0.8
    assert max(errors["fw_ms"] + errors["bw_ms"]) < 0.05
    assert max(errors["stored_mb"]) < 0.07 and max(errors["peak_mb"]) < 0.02


@pytest.mark.data
def test_real_profile_has_the_documented_values(data_root: Path) -> None:
    profile = load_profile(data_root, "gpt_6.7b", hole="infeasible")
    assert profile.architecture == "decoder_only" and profile.origin == "authors' A100-40GB layer profile"
    decoder = profile.layer_tables(1, "none").decoder
    costs = decoder.query([[512, 1], [1024, 1], [2048, 1], [4096, 1], [8192, 1], [2048, 8], [2048, 9]])
    expected = [1.66, 2.63, 5.78, 15.24, 44.23, 44.43, np.inf]
    assert costs["fw_ms"] == pytest.approx(expected, abs=0.006)
    assert costs["stored_mb"][2:4] == pytest.approx([966.55, 3284.08], abs=0.01)
    # 12 hidden^2 weights of two bytes and some biases: the unit is 10^6 bytes.
    assert profile.params_mb[1, "none", "decoder"] == pytest.approx(12 * 4096**2 * 2 / 1e6, rel=1e-3)
    t5 = load_profile(data_root, "t5_11b").layer_tables(8, "full")
    assert t5.encoder is not None and t5.decoder.shape == (10, 10, 12)


@pytest.mark.data
def test_shipped_fit_is_what_the_script_makes(data_root: Path) -> None:
    make = pytest.importorskip("experiments.make_shipped_tables")
    profile = load_profile(data_root, "gpt_6.7b", hole="infeasible")
    content = make.table_fit(profile, "decoder", profile.layer_tables(4, "none").decoder)
    shipped = read_shipped("profile_fit.json")["profiles"]["gpt_6.7b"]["entries"]
    (entry,) = [e for e in shipped if (e["tp"], e["recompute"]) == (4, "none")]
    assert content["fw_ms"]["planes"][1] == pytest.approx(entry["tables"]["decoder"]["fw_ms"]["planes"][1], rel=1e-3)
    assert content["capacity"] == pytest.approx(entry["tables"]["decoder"]["capacity"], rel=1e-3)


def test_pack_of_one_sample_costs_what_the_profile_says(tmp_path: Path) -> None:
    profile = load_profile(_write(tmp_path, _decoder_only_rows()), "toy")
    decoder = varlen_terms(profile, 1, "none").decoder
    forward, backward = decoder.time_ms([[length] for length in LENGTHS])
    expected = [_layer_costs(length, 1) for length in LENGTHS]
    assert forward == pytest.approx([cost[0] for cost in expected], rel=0.01)
    assert backward == pytest.approx([cost[1] for cost in expected], rel=0.01)


def test_pack_pays_for_no_pairs_across_samples(tmp_path: Path) -> None:
    profile = load_profile(_write(tmp_path, _decoder_only_rows()), "toy")
    decoder = varlen_terms(profile, 1, "none").decoder
    packs = [[2048], [1024, 1024], [512] * 4, [100, 900, 1048]]
    forward, _ = decoder.time_ms(packs)
    tokens, pairs = 2048, [sum(length**2 for length in pack) for pack in packs]
    assert forward == pytest.approx([2e-3 * tokens + 4e-7 * pair for pair in pairs], rel=0.01)
    faster, _ = varlen_terms(profile, 1, "none", attention_speedup=4.0).decoder.time_ms(packs)
    assert forward - faster == pytest.approx([0.75 * 4e-7 * pair for pair in pairs], rel=0.02)
    # No score matrices: only the linear parts, and only the linear plane of the peak.
    assert decoder.stored_mb([1000, 0]) == pytest.approx([140.0, 0.0], rel=0.01)
    assert decoder.peak_mb(1000) == pytest.approx(700.0, rel=0.01)
    head, _ = varlen_terms(profile, 1, "none").head.time_ms([[1000, 500]])
    assert head == pytest.approx([1.8], rel=0.01)


def test_decoder_pack_pays_for_its_own_inputs_only(tmp_path: Path) -> None:
    root = _write(tmp_path, _encoder_decoder_rows(), ("embedding", "encoder", "decoder"))
    costs = varlen_terms(load_profile(root, "toy"), 1, "none")
    assert costs.encoder is not None
    targets, inputs = [[256, 1024], [64, 800]], [[1024, 256], [500, 100]]
    forward, _ = costs.decoder.time_ms(targets, inputs)
    expected = [
        2e-3 * sum(t)
        + 4e-7 * sum(x * x for x in t)
        + 1e-3 * sum(i)
        + 4e-7 * sum(x * y for x, y in zip(t, i, strict=True))
        for t, i in zip(targets, inputs, strict=True)
    ]
    assert forward == pytest.approx(expected, rel=0.02)
    with pytest.raises(InputError, match="cross-attention"):
        costs.decoder.time_ms(targets)
    with pytest.raises(InputError, match="cross-attention"):
        costs.encoder.time_ms(inputs, targets)
    with pytest.raises(InputError, match="2 targets, 1 inputs"):
        costs.decoder.time_ms([[5, 5]], [[5]])
    with pytest.raises(InputError, match="length"):
        costs.encoder.time_ms([[5, -1]])


def test_varlen_rejects_what_it_cannot_use(tmp_path: Path) -> None:
    profile = fitted_profile("gpt_6.7b")
    with pytest.raises(InputError, match="set attention_speedup"):
        varlen_terms(profile, 1, "none", attention_speedup=0.5)
    with pytest.raises(InfeasibleError, match="tp=3"):
        varlen_terms(profile, 3, "none")
    tiny = [row for row in _decoder_only_rows() if row["enc_len"] == 16]
    with pytest.raises(InputError, match="too few measured points"):
        varlen_terms(load_profile(_write(tmp_path, tiny), "toy"), 1, "none")
    with pytest.raises(InputError, match="no memory of the head"):
        varlen_terms(profile, 1, "none").head.stored_mb(10)


def _check_against_profile(profile: LayerProfile, tp: int, recompute: str, part: str) -> None:
    """Packs of equal samples against padded micro-batches; then one split against one long sample."""
    grid = getattr(profile.layer_tables(tp, recompute), part)  # type: ignore[arg-type]
    layer = getattr(varlen_terms(profile, tp, recompute), part)  # type: ignore[arg-type]
    points, mask = measured_points(grid)
    packs = [np.full(int(size), length) for length, size in points]
    for column, times in zip(("fw_ms", "bw_ms"), layer.time_ms(packs), strict=True):
        measured = grid.columns[column][mask]
        error = np.abs(times / measured - 1)
        assert np.median(error) < 0.06
        # One sample, away from the launch-bound constant. Above 4096 the measured cost grows faster than the
        # square of the length, which the formulas do not follow.
        single = (points[:, 1] == 1) & (measured > 1.5 * measured.min())
        assert single.any() and error[single].max() < 0.25
        assert error[single & (points[:, 0] <= 4096)].max() < 0.13
    for length in (4096, 8192):
        whole = grid.query([[length, 1]])["fw_ms"][0]
        assert layer.time_ms([[length // 8] * 8])[0][0] < 0.8 * whole


@pytest.mark.data
@pytest.mark.parametrize(("tp", "recompute"), [(1, "none"), (4, "selective"), (1, "full")])
def test_varlen_agrees_with_the_real_gpt_profile(data_root: Path, tp: int, recompute: str) -> None:
    _check_against_profile(load_profile(data_root, "gpt_6.7b", hole="infeasible"), tp, recompute, "decoder")


@pytest.mark.data
def test_varlen_agrees_with_the_real_t5_encoder(data_root: Path) -> None:
    _check_against_profile(load_profile(data_root, "t5_11b", hole="infeasible"), 8, "none", "encoder")


def test_varlen_agrees_with_the_fitted_profile() -> None:
    _check_against_profile(fitted_profile("gpt_6.7b", hole="infeasible"), 1, "none", "decoder")
