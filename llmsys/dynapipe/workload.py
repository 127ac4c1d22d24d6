"""Multi-task training samples of varying length, and the global batches that a planner splits.

A ``LengthTable`` holds input and target lengths of many samples, real (``load_multitask_lengths``) or drawn
from the table shipped with the project (``shipped_lengths``). ``global_batches`` turns it into ``Samples``,
one per training iteration. Lengths are token counts; no text is involved anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmsys.core.errors import ConfigError, InputError
from llmsys.core.specs import Architecture
from llmsys.dynapipe.data import find_data_file, read_columns, read_shipped

IntArray = NDArray[np.int64]
Tokenizer = Literal["t5", "cl100k"]

LENGTHS_FILE = "multitask_lengths.parquet"
_SHIPPED_LENGTHS = "length_quantiles.json"
_COLUMN_SUFFIX: dict[str, str] = {"t5": "", "cl100k": "_cl100k"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """Lengths of n training samples: ``encoder_len``, ``decoder_len``, read-only int64 arrays of shape (n,).

    A decoder-only model sees input and target as one sequence: its length is in ``decoder_len`` and every
    ``encoder_len`` is 0. An encoder-decoder model has the input in ``encoder_len`` and the target in
    ``decoder_len``, all above 0. n may be 0, but no planner accepts that. Raises InputError for anything
    else, naming the first bad sample. Make one with ``of``, ``decoder_only`` or ``encoder_decoder``.
    """

    encoder_len: IntArray
    decoder_len: IntArray

    def __post_init__(self) -> None:
        encoder, decoder = (
            _lengths("encoder_len", self.encoder_len),
            _lengths("decoder_len", self.decoder_len),
        )
        if encoder.shape != decoder.shape:
            raise InputError(
                "encoder_len and decoder_len differ in size",
                expected="one length of each per sample",
                found=f"{len(encoder)} and {len(decoder)}",
                fix="pass arrays of one size (zeros in encoder_len for a decoder-only model)",
            )
        _require_positive("decoder_len", decoder)
        if encoder.any():
            _require_positive("encoder_len", encoder)
        object.__setattr__(self, "encoder_len", encoder)
        object.__setattr__(self, "decoder_len", decoder)

    @classmethod
    def decoder_only(cls, input_len: ArrayLike, target_len: ArrayLike) -> Samples:
        """Samples of a decoder-only model: the length of one is its input plus its target."""
        inputs, targets = _pair(input_len, target_len)
        _require_positive("input_len", inputs)
        _require_positive("target_len", targets)
        return cls(encoder_len=np.zeros_like(inputs), decoder_len=inputs + targets)

    @classmethod
    def encoder_decoder(cls, input_len: ArrayLike, target_len: ArrayLike) -> Samples:
        """Samples of an encoder-decoder model: inputs go to the encoder, targets to the decoder."""
        inputs, targets = _pair(input_len, target_len)
        _require_positive("input_len", inputs)
        _require_positive("target_len", targets)
        return cls(encoder_len=inputs, decoder_len=targets)

    @classmethod
    def of(cls, architecture: Architecture, input_len: ArrayLike, target_len: ArrayLike) -> Samples:
        """Samples of ``architecture``; raises ConfigError for an unknown one."""
        if architecture == "decoder_only":
            return cls.decoder_only(input_len, target_len)
        if architecture == "encoder_decoder":
            return cls.encoder_decoder(input_len, target_len)
        raise ConfigError(
            "unknown architecture",
            expected="'decoder_only' or 'encoder_decoder'",
            found=repr(architecture),
            fix="set model.architecture",
        )

    def __len__(self) -> int:
        return len(self.decoder_len)

    @property
    def num_tokens(self) -> int:
        """All real tokens, without padding: what the paper's throughput counts."""
        return int(self.encoder_len.sum() + self.decoder_len.sum())

    def select(self, indices: ArrayLike) -> Samples:
        """The samples at ``indices``, in that order."""
        index = np.asarray(indices, dtype=np.int64)
        return Samples(encoder_len=self.encoder_len[index], decoder_len=self.decoder_len[index])

    def truncate(self, max_len: int) -> Samples:
        """Cut encoder and decoder lengths to ``max_len`` each (for decoder-only models: input + target)."""
        _require_count("max_len", max_len)
        return Samples(
            encoder_len=np.minimum(self.encoder_len, max_len),
            decoder_len=np.minimum(self.decoder_len, max_len),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LengthTable:
    """Lengths of n samples of several tasks.

    ``input_tokens``, ``target_tokens``: int64 arrays of shape (n,), all above 0. ``task_ids``: int64 (n,),
    index into ``task_names``. ``num_dropped``: rows left out because their input or target was empty.
    ``origin``: where the lengths come from, for figures and reports.
    """

    input_tokens: IntArray
    target_tokens: IntArray
    task_ids: IntArray
    task_names: tuple[str, ...]
    num_dropped: int
    origin: str

    @classmethod
    def of(
        cls,
        input_tokens: ArrayLike,
        target_tokens: ArrayLike,
        *,
        task_ids: ArrayLike | None = None,
        task_names: tuple[str, ...] = ("all",),
        origin: str,
    ) -> LengthTable:
        """Check the lengths (InputError for negative ones) and drop samples with an empty input or target."""
        inputs, targets = _pair(input_tokens, target_tokens)
        tasks = np.zeros(len(inputs), dtype=np.int64) if task_ids is None else _lengths("task_ids", task_ids)
        if tasks.shape != inputs.shape or (len(tasks) and int(tasks.max()) >= len(task_names)):
            raise InputError(
                "task_ids do not fit",
                expected=f"{len(inputs)} numbers below {len(task_names)}",
                found=f"{len(tasks)} numbers up to {tasks.max(initial=0)}",
                fix="set task_ids to one index into task_names for each sample",
            )
        kept = (inputs > 0) & (targets > 0)
        return cls(
            input_tokens=inputs[kept],
            target_tokens=targets[kept],
            task_ids=tasks[kept],
            task_names=task_names,
            num_dropped=int(len(kept) - kept.sum()),
            origin=origin,
        )

    def __len__(self) -> int:
        return len(self.input_tokens)


def load_multitask_lengths(
    root: Path, *, max_rows_per_task: int = 2000, seed: int = 0, tokenizer: Tokenizer = "t5"
) -> LengthTable:
    """Real lengths from ``multitask_lengths.parquet`` in ``root``, at most ``max_rows_per_task`` of a task.

    A task with more rows is subsampled without replacement; which rows are kept depends on ``seed`` but not
    on ``tokenizer``. Rows stay in the order of the file. Raises DataNotFoundError or InputError, both naming
    data.root.
    """
    _require_count("max_rows_per_task", max_rows_per_task)
    suffix = _column_suffix(tokenizer)
    input_name, target_name = f"input_tokens{suffix}", f"target_tokens{suffix}"
    columns = read_columns(find_data_file(root, LENGTHS_FILE), ["source", "task", input_name, target_name])
    labels = np.char.add(np.char.add(columns["source"].astype(str), ": "), columns["task"].astype(str))
    names, task_ids = np.unique(labels, return_inverse=True)
    kept = np.sort(_at_most_per_task(task_ids, max_rows_per_task, np.random.default_rng(seed)))
    return LengthTable.of(
        columns[input_name][kept],
        columns[target_name][kept],
        task_ids=task_ids[kept],
        task_names=tuple(str(name) for name in names),
        origin=f"real lengths: {LENGTHS_FILE}, at most {max_rows_per_task} rows of each of "
        f"{len(names)} tasks, {tokenizer} tokenizer",
    )


def shipped_lengths(num_rows: int, seed: int, *, tokenizer: Tokenizer = "t5") -> LengthTable:
    """``num_rows`` samples drawn from the quantile table that ships with the project.

    The table was made by ``experiments/make_shipped_tables.py`` from the real lengths (public samples of the
    FLAN v2 family, listed in the file itself) with at most 2,000 rows a task. It holds quantiles of the input
    length and, for each of several equally filled ranges of input length, quantiles of the target length.
    Drawing is inverse-CDF sampling with linear interpolation between quantiles, rounded to whole tokens:
    input first, then the target from the row of its range, so that the two stay correlated. Task identities
    are lost.
    """
    _require_count("num_rows", num_rows)
    _column_suffix(tokenizer)
    table = read_shipped(_SHIPPED_LENGTHS)
    quantiles: dict[str, Any] = table["tokenizers"][tokenizer]
    rng = np.random.default_rng(seed)
    input_level, target_level = rng.random(num_rows), rng.random(num_rows)
    inputs = np.interp(input_level, table["input_levels"], quantiles["input_quantiles"])
    rows = np.asarray(quantiles["target_quantiles"], dtype=np.float64)
    bucket = np.minimum((input_level * len(rows)).astype(np.int64), len(rows) - 1)
    targets = np.empty(num_rows)
    for number, row in enumerate(rows):
        chosen = bucket == number
        targets[chosen] = np.interp(target_level[chosen], table["target_levels"], row)
    return LengthTable.of(
        np.maximum(np.rint(inputs).astype(np.int64), 1),
        np.maximum(np.rint(targets).astype(np.int64), 1),
        origin=f"shipped quantile table, {tokenizer} tokenizer",
    )


def open_lengths(
    root: Path | None,
    *,
    max_rows_per_task: int = 2000,
    seed: int = 0,
    tokenizer: Tokenizer = "t5",
    num_shipped_rows: int = 100_000,
) -> LengthTable:
    """Real lengths if ``root`` (the setting data.root) is given, else ``num_shipped_rows`` shipped ones.

    100,000 is the number of samples the paper trains on. A ``root`` without the file is an error, not a
    fallback.
    """
    if root is None:
        return shipped_lengths(num_shipped_rows, seed, tokenizer=tokenizer)
    return load_multitask_lengths(root, max_rows_per_task=max_rows_per_task, seed=seed, tokenizer=tokenizer)


def global_batches(
    table: LengthTable,
    *,
    architecture: Architecture,
    tokens_per_batch: int,
    max_len: int,
    num_batches: int,
    seed: int,
) -> list[Samples]:
    """``num_batches`` global batches of at most ``tokens_per_batch`` real tokens each.

    Samples are shuffled and truncated to ``max_len`` (see ``Samples.truncate``); a batch is the longest run
    of consecutive ones whose real tokens do not exceed ``tokens_per_batch``, and the next batch starts with
    the next sample. When the table is used up it is shuffled anew and goes on, so a batch may span two passes
    and rarely holds a sample twice. Equal arguments give equal batches, and the first k batches do not depend
    on ``num_batches``.

    Raises InputError if an argument is not positive, if the whole table has fewer than ``tokens_per_batch``
    tokens, or if one truncated sample has more.
    """
    for name, value in (
        ("tokens_per_batch", tokens_per_batch),
        ("max_len", max_len),
        ("num_batches", num_batches),
    ):
        _require_count(name, value)
    pool = Samples.of(architecture, table.input_tokens, table.target_tokens).truncate(max_len)
    tokens = pool.encoder_len + pool.decoder_len
    _require_batchable(tokens, tokens_per_batch, max_len)
    stream = _endless_order(len(pool), np.random.default_rng(seed))
    batches: list[Samples] = []
    chosen: list[int] = []
    filled = 0
    while len(batches) < num_batches:
        index = next(stream)
        if filled + tokens[index] > tokens_per_batch:
            batches.append(pool.select(chosen))
            chosen, filled = [], 0
        chosen.append(index)
        filled += int(tokens[index])
    return batches


def _endless_order(size: int, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(size).tolist()


def _at_most_per_task(task_ids: IntArray, limit: int, rng: np.random.Generator) -> IntArray:
    """Row numbers of at most ``limit`` random rows of each task."""
    by_task = np.argsort(task_ids, kind="stable")
    groups = np.split(by_task, np.flatnonzero(np.diff(task_ids[by_task])) + 1)
    picked = [rows if len(rows) <= limit else rng.choice(rows, limit, replace=False) for rows in groups]
    return np.concatenate(picked).astype(np.int64)


def _lengths(name: str, values: ArrayLike) -> IntArray:
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise InputError(
            f"{name} is not a list of token counts",
            expected="a one-dimensional array of integers",
            found=f"shape {array.shape}, type {array.dtype}",
            fix=f"convert {name}, for example with .astype(int) or .reshape(-1)",
        )
    if (array < 0).any():
        raise _bad_length(name, array, int(np.flatnonzero(array < 0)[0]), "at least 0")
    lengths: IntArray = array.astype(np.int64)  # a copy: the caller's array stays writable and unshared
    lengths.setflags(write=False)
    return lengths


def _pair(input_len: ArrayLike, target_len: ArrayLike) -> tuple[IntArray, IntArray]:
    inputs, targets = _lengths("input_len", input_len), _lengths("target_len", target_len)
    if inputs.shape != targets.shape:
        raise InputError(
            "input and target lengths differ in number",
            expected="one input and one target length per sample",
            found=f"{len(inputs)} inputs, {len(targets)} targets",
            fix="pass as many input as target lengths",
        )
    return inputs, targets


def _require_positive(name: str, lengths: IntArray) -> None:
    bad = np.flatnonzero(lengths <= 0)
    if len(bad):
        raise _bad_length(name, lengths, int(bad[0]), "above 0")


def _bad_length(name: str, lengths: NDArray[Any], index: int, rule: str) -> InputError:
    return InputError(
        f"sample {index} has {name} {lengths[index]}",
        expected=f"{name} {rule}",
        found=f"{name}[{index}] = {lengths[index]}",
        fix="drop such samples from the workload (LengthTable.of drops empty ones)",
    )


def _require_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(
            f"{name} is not a positive whole number",
            expected=f"{name} >= 1",
            found=repr(value),
            fix=f"set {name}",
        )


def _require_batchable(tokens: IntArray, tokens_per_batch: int, max_len: int) -> None:
    if int(tokens.sum()) < tokens_per_batch:
        raise InputError(
            "the length table is smaller than one global batch",
            expected=f"at least tokens_per_batch = {tokens_per_batch} tokens after truncation to {max_len}",
            found=f"{int(tokens.sum())} tokens in {len(tokens)} samples",
            fix="lower tokens_per_batch, or raise max_rows_per_task or num_shipped_rows",
        )
    if int(tokens.max()) > tokens_per_batch:
        raise InputError(
            "one sample is larger than a global batch",
            expected=f"at most tokens_per_batch = {tokens_per_batch} tokens",
            found=f"sample {int(tokens.argmax())} of the table has {int(tokens.max())} (max_len = {max_len})",
            fix="raise tokens_per_batch or lower max_len",
        )


def _column_suffix(tokenizer: str) -> str:
    if tokenizer not in _COLUMN_SUFFIX:
        raise ConfigError(
            "unknown tokenizer",
            expected=f"of {list(_COLUMN_SUFFIX)}",
            found=repr(tokenizer),
            fix="set tokenizer",
        )
    return _COLUMN_SUFFIX[tokenizer]
