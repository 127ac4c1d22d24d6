"""Samples, length tables (real and shipped) and global batches."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmsys.core.errors import ConfigError, DataNotFoundError, InputError
from llmsys.dynapipe.workload import (
    LENGTHS_FILE,
    LengthTable,
    Samples,
    global_batches,
    load_multitask_lengths,
    open_lengths,
    shipped_lengths,
)


@pytest.fixture(scope="module")
def data_root() -> Path:
    root = Path(os.environ.get("LLMSYS_DATA_ROOT", Path(__file__).resolve().parents[2] / "../shared/data"))
    if not (root / LENGTHS_FILE).is_file():
        pytest.skip(f"no {LENGTHS_FILE} in {root}: set LLMSYS_DATA_ROOT to the directory of the real files")
    return root


@pytest.fixture(scope="module")
def table() -> LengthTable:
    rng = np.random.default_rng(5)
    return LengthTable.of(rng.integers(1, 900, 300), rng.integers(1, 60, 300), origin="random")


def test_decoder_only_adds_input_and_target() -> None:
    samples = Samples.decoder_only([3, 10], [2, 1])
    assert samples.decoder_len.tolist() == [5, 11]
    assert samples.encoder_len.tolist() == [0, 0]
    assert samples.num_tokens == 16 and len(samples) == 2


def test_encoder_decoder_keeps_both() -> None:
    samples = Samples.of("encoder_decoder", [3, 10], [2, 1])
    assert samples.encoder_len.tolist() == [3, 10] and samples.decoder_len.tolist() == [2, 1]


def test_truncate_caps_the_total_or_each_side() -> None:
    assert Samples.decoder_only([7, 1], [5, 1]).truncate(8).decoder_len.tolist() == [8, 2]
    both = Samples.encoder_decoder([7, 30], [9, 1]).truncate(8)
    assert both.encoder_len.tolist() == [7, 8] and both.decoder_len.tolist() == [8, 1]
    with pytest.raises(InputError, match="max_len"):
        both.truncate(0)


def test_select_keeps_the_order_asked_for() -> None:
    samples = Samples.encoder_decoder([1, 2, 3], [4, 5, 6]).select([2, 0])
    assert samples.encoder_len.tolist() == [3, 1] and samples.decoder_len.tolist() == [6, 4]


def test_samples_do_not_share_memory_with_the_caller() -> None:
    lengths = np.array([4, 5])
    samples = Samples.encoder_decoder(lengths, lengths)
    lengths[0] = 99
    assert samples.encoder_len.tolist() == [4, 5]
    with pytest.raises(ValueError, match="read-only"):
        samples.decoder_len[0] = 1


def test_no_samples_can_be_made() -> None:
    assert len(Samples.decoder_only([], [])) == 0


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        ([4, 0], [1, 1], "sample 1 has input_len 0"),
        ([4, 4, 4], [1, 1, -3], "sample 2 has target_len -3"),
        ([4], [1, 1], "1 inputs, 2 targets"),
        ([4.0], [1], "float64"),
        ([[4]], [[1]], r"shape \(1, 1\)"),
    ],
)
@pytest.mark.parametrize("make", [Samples.decoder_only, Samples.encoder_decoder])
def test_bad_lengths_are_named(make: object, inputs: object, targets: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(inputs, targets)  # type: ignore[operator]


def test_an_empty_input_among_others_is_an_error() -> None:
    with pytest.raises(InputError, match="sample 1 has encoder_len 0"):
        Samples(encoder_len=np.array([3, 0]), decoder_len=np.array([3, 3]))


def test_unknown_architecture() -> None:
    with pytest.raises(ConfigError, match=r"model\.architecture"):
        Samples.of("encoder_only", [1], [1])  # type: ignore[arg-type]


def test_empty_samples_of_a_table_are_dropped_and_counted() -> None:
    table = LengthTable.of([5, 0, 7], [1, 1, 0], task_ids=[1, 0, 0], task_names=("a", "b"), origin="hand-written")
    assert table.input_tokens.tolist() == [5] and table.task_ids.tolist() == [1] and table.num_dropped == 2
    with pytest.raises(InputError, match="sample 0 has input_len -1"):
        LengthTable.of([-1], [1], origin="hand-written")


@pytest.mark.parametrize("architecture", ["decoder_only", "encoder_decoder"])
def test_batches_are_maximal_runs_of_one_shuffle(table: LengthTable, architecture: str) -> None:
    arguments = {"architecture": architecture, "tokens_per_batch": 4000, "max_len": 512, "seed": 7}
    batches = global_batches(table, num_batches=70, **arguments)  # type: ignore[arg-type]
    assert len(batches) == 70
    sizes = [batch.num_tokens for batch in batches]
    firsts = [int(batch.encoder_len[0] + batch.decoder_len[0]) for batch in batches]
    assert max(sizes) <= 4000
    # A batch ends only where the first sample of the next one no longer fits.
    assert all(size + first > 4000 for size, first in zip(sizes, firsts[1:], strict=False))
    assert all(int(batch.decoder_len.max()) <= 512 for batch in batches)
    # The first pass over the table holds every sample once, in whatever order.
    pool = Samples.of(architecture, table.input_tokens, table.target_tokens).truncate(512)  # type: ignore[arg-type]
    stream = np.concatenate([batch.decoder_len + 1000 * batch.encoder_len for batch in batches])
    assert len(stream) > 2 * len(table)
    expected = sorted((pool.decoder_len + 1000 * pool.encoder_len).tolist())
    assert sorted(stream[: len(table)].tolist()) == expected
    assert sorted(stream[len(table) : 2 * len(table)].tolist()) == expected
    assert stream[: len(table)].tolist() != stream[len(table) : 2 * len(table)].tolist()


def test_batches_depend_on_the_seed_alone(table: LengthTable) -> None:
    def decoder_lengths(seed: int, num_batches: int) -> list[list[int]]:
        batches = global_batches(
            table,
            architecture="decoder_only",
            tokens_per_batch=3000,
            max_len=1024,
            num_batches=num_batches,
            seed=seed,
        )
        return [batch.decoder_len.tolist() for batch in batches]

    assert decoder_lengths(1, 6)[:3] == decoder_lengths(1, 3)
    assert decoder_lengths(1, 3) != decoder_lengths(2, 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens_per_batch": 0}, "tokens_per_batch"),
        ({"max_len": -5}, "max_len"),
        ({"num_batches": 0}, "num_batches"),
        ({"tokens_per_batch": 10**7}, "smaller than one global batch"),
        (
            {"tokens_per_batch": 100},
            r"larger than a global batch(.|\n)*raise tokens_per_batch or lower max_len",
        ),
    ],
)
def test_bad_batch_arguments(table: LengthTable, changed: dict[str, int], message: str) -> None:
    arguments = {"tokens_per_batch": 4000, "max_len": 512, "num_batches": 2, "seed": 0} | changed
    with pytest.raises(InputError, match=message):
        global_batches(table, architecture="decoder_only", **arguments)  # type: ignore[arg-type]


def _write_lengths(root: Path, **changed: object) -> Path:
    columns = {
        "source": ["x"] * 50 + ["y"] * 10,
        "task": ["long"] * 50 + ["short"] * 10,
        "input_tokens": list(range(1, 61)),
        "target_tokens": [2] * 59 + [0],
        "input_tokens_cl100k": [n + 100 for n in range(1, 61)],
        "target_tokens_cl100k": [3] * 60,
    } | changed
    kept = {name: values for name, values in columns.items() if values is not None}
    pq.write_table(pa.table(kept), root / LENGTHS_FILE)
    return root


def test_tasks_are_capped(tmp_path: Path) -> None:
    root = _write_lengths(tmp_path)
    table = load_multitask_lengths(root, max_rows_per_task=20)
    assert np.bincount(table.task_ids).tolist() == [20, 9] and table.num_dropped == 1
    assert table.task_names == ("x: long", "y: short") and table.origin.startswith("real lengths")
    assert (np.diff(table.input_tokens) > 0).all()
    again = load_multitask_lengths(root, max_rows_per_task=20)
    assert again.input_tokens.tolist() == table.input_tokens.tolist()
    other = load_multitask_lengths(root, max_rows_per_task=20, seed=1)
    assert other.input_tokens.tolist() != table.input_tokens.tolist()
    cl100k = load_multitask_lengths(root, max_rows_per_task=20, tokenizer="cl100k")
    assert cl100k.input_tokens[:20].tolist() == (table.input_tokens[:20] + 100).tolist()


def test_open_lengths_picks_the_source(tmp_path: Path) -> None:
    assert open_lengths(None, num_shipped_rows=10).origin.startswith("shipped quantile table")
    assert open_lengths(_write_lengths(tmp_path)).origin.startswith("real lengths")


def test_missing_files_and_columns_name_the_setting(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"data\.root is not a directory"):
        open_lengths(tmp_path / "absent")
    with pytest.raises(DataNotFoundError, match=rf"data\.root has no file {LENGTHS_FILE}"):
        open_lengths(tmp_path)
    with pytest.raises(InputError, match=r"data\.root lacks columns(.|\n)*missing \['target_tokens'\]"):
        open_lengths(_write_lengths(tmp_path, target_tokens=None))
    (tmp_path / LENGTHS_FILE).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"data\.root is not a readable parquet file"):
        open_lengths(tmp_path)
    with pytest.raises(ConfigError, match="set tokenizer"):
        open_lengths(None, tokenizer="gpt2")  # type: ignore[arg-type]


def test_shipped_lengths_are_reproducible() -> None:
    first, second = shipped_lengths(500, 3), shipped_lengths(500, 3)
    assert first.input_tokens.tolist() == second.input_tokens.tolist()
    assert first.target_tokens.tolist() == second.target_tokens.tolist()
    assert first.input_tokens.tolist() != shipped_lengths(500, 4).input_tokens.tolist()
    assert len(first) == 500 and first.num_dropped == 0


def test_shipped_lengths_look_like_the_documented_ones() -> None:
    # data/README of the real files: with 2,000 rows a task, input p50/p95/p99 = 109/525/1072.
    table = shipped_lengths(1_000_000, 0)
    assert np.percentile(table.input_tokens, [50, 95, 99]) == pytest.approx([109, 525, 1072], rel=0.05)
    assert int(table.input_tokens.max()) <= 6672 and int(table.target_tokens.max()) <= 724


@pytest.mark.data
@pytest.mark.parametrize("tokenizer", ["t5", "cl100k"])
def test_shipped_lengths_match_the_real_ones(data_root: Path, tokenizer: str) -> None:
    real = load_multitask_lengths(data_root, tokenizer=tokenizer)  # type: ignore[arg-type]
    shipped = shipped_lengths(1_000_000, 1, tokenizer=tokenizer)  # type: ignore[arg-type]
    levels = [50, 95, 99]
    for name, tolerance in (("input_tokens", 0.03), ("target_tokens", 0.08)):
        expected = np.percentile(getattr(real, name), levels)
        assert np.percentile(getattr(shipped, name), levels) == pytest.approx(expected, rel=tolerance, abs=1)
        assert getattr(shipped, name).mean() == pytest.approx(getattr(real, name).mean(), rel=0.03)
    correlation = [np.corrcoef(t.input_tokens, t.target_tokens)[0, 1] for t in (real, shipped)]
    assert correlation[0] > 0.1
    assert correlation[1] == pytest.approx(correlation[0], abs=0.05)
