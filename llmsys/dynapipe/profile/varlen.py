"""Costs of packed sequences under variable-length attention, derived from a layer profile.

A pack concatenates samples and runs every layer once over all tokens, but attention only inside each sample
(the FlashAttention varlen interface), so no cost of cross-sample attention and no padding are paid. The
profile has measured neither; this model takes its parts from the fit of ``formulas`` to the profile:

- time = max(constant, constant' + token coefficient * tokens + attention coefficient * sum of squared
  lengths), where the decoder of an encoder-decoder model has two kinds of tokens and, for cross-attention, a
  sum of products;
- memory = only the part linear in tokens: fused attention keeps no score matrix.

Checked on the authors' profile: packs of equal samples cost what the profile says of the padded micro-batch
with a median error of 1 to 5% by table. Larger errors are near the launch-bound constant (either way) and for
single samples of 6144 and more (up to 20% too cheap: their measured cost grows faster than the square of the
length).

The profiled attention kernels are not fused. ``attention_speedup`` divides their time; 1 (the default)
charges the profiled kernels' speed, which makes the model pessimistic about today's varlen packing by what
fusing saves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmsys.core.costs import GridTable
from llmsys.core.errors import InputError
from llmsys.core.specs import Architecture
from llmsys.dynapipe.config import Recompute
from llmsys.dynapipe.profile.formulas import Kind, fit, layer_terms
from llmsys.dynapipe.profile.sources import formula_kind
from llmsys.dynapipe.profile.tables import LayerProfile, measured_points, rising_peaks

FloatArray = NDArray[np.float64]
Packs = Sequence[ArrayLike]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackSums:
    """What the cost of a pack depends on, shape (packs,) each; sums over its samples.

    ``tokens``: of lengths; ``squares``: of their squares; ``cross_tokens``: of the input lengths that a decoder
    attends to; ``products``: of length times input length.
    """

    tokens: FloatArray
    squares: FloatArray
    cross_tokens: FloatArray
    products: FloatArray

    @classmethod
    def of(cls, packs: Packs, cross: Packs | None = None) -> PackSums:
        sums = np.zeros((4, len(packs)))
        for i, pack in enumerate(packs):
            own = _pack_lengths("pack", pack)
            sums[:2, i] = own.sum(), own @ own
            if cross is None:
                continue
            inputs = _pack_lengths("cross", cross[i])
            if inputs.shape != own.shape:
                raise InputError(
                    "a pack and its cross lengths differ in size",
                    expected="one input length for each target",
                    found=f"{len(own)} targets, {len(inputs)} inputs",
                    fix=f"give cross[{i}] one length for each of packs[{i}]",
                )
            sums[2:, i] = inputs.sum(), own @ inputs
        return cls(tokens=sums[0], squares=sums[1], cross_tokens=sums[2], products=sums[3])

    @classmethod
    def of_runs(cls, lengths: ArrayLike, cross: ArrayLike, begins: ArrayLike, ends: ArrayLike) -> PackSums:
        """Of the runs [begin, end) of one sequence of samples."""
        own, inputs = _pack_lengths("lengths", lengths), _pack_lengths("cross", cross)
        first, last = np.asarray(begins), np.asarray(ends)

        def over_runs(values: FloatArray) -> FloatArray:
            total = np.concatenate([[0.0], np.cumsum(values)])
            difference: FloatArray = total[last] - total[first]
            return difference

        return cls(
            tokens=over_runs(own),
            squares=over_runs(own * own),
            cross_tokens=over_runs(inputs),
            products=over_runs(own * inputs),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VarlenLayer:
    """Costs of one layer (or of the head) on packs, one pack being one micro-batch on one device.

    A pack is a list of sample lengths. ``cross`` arguments are the input lengths that a decoder layer of an
    encoder-decoder model attends to, and are given for such a layer only.
    """

    kind: Kind
    time_planes: tuple[FloatArray, FloatArray]
    stored_mb_per_token: FloatArray
    peak_mb_per_token: FloatArray
    attention_speedup: float

    def time_ms(self, packs: Packs, cross: Packs | None = None) -> tuple[FloatArray, FloatArray]:
        """Forward and backward time of each pack, two arrays of shape (number of packs,).

        ``packs[i]`` holds the lengths of the samples of pack i, ``cross[i]`` their input lengths in the same
        order. Raises InputError for negative lengths or if ``cross`` does not fit.
        """
        self._check_cross(cross is not None)
        if cross is not None and len(cross) != len(packs):
            raise InputError(
                "packs and cross differ in number",
                expected="the input lengths of each pack in cross",
                found=f"{len(packs)} packs, {len(cross)} in cross",
                fix="pass as many entries in cross as in packs",
            )
        return self.time_of_sums_ms(PackSums.of(packs, cross))

    def time_of_sums_ms(self, sums: PackSums) -> tuple[FloatArray, FloatArray]:
        """``time_ms`` of packs of which only the sums are known."""
        one = np.ones(len(sums.tokens))
        if self.kind == "head":
            terms = np.stack([one, sums.tokens], axis=1)
        else:
            columns = [one, 0.0 * one, sums.tokens, sums.squares / self.attention_speedup]
            if self.kind == "cross_layer":
                columns += [sums.cross_tokens, sums.products / self.attention_speedup]
            terms = np.stack(columns, axis=1)
        forward, backward = (self._largest(terms, planes) for planes in self.time_planes)
        return forward, backward

    def stored_mb(self, num_tokens: ArrayLike, num_cross_tokens: ArrayLike | None = None) -> FloatArray:
        """Activations kept for the backward pass by packs of ``num_tokens`` tokens in total (any shape)."""
        return self._memory_mb(self.stored_mb_per_token, num_tokens, num_cross_tokens)

    def peak_mb(self, num_tokens: ArrayLike, num_cross_tokens: ArrayLike | None = None) -> FloatArray:
        """Highest use inside the forward pass by packs of ``num_tokens`` tokens in total (any shape)."""
        return self._memory_mb(self.peak_mb_per_token, num_tokens, num_cross_tokens)

    def padded_costs(self, points: FloatArray) -> dict[str, FloatArray]:
        """Table columns for padded micro-batches: ``points`` are rows of the part's table axes (see tables.AXES)."""
        terms = layer_terms(self.kind, points)
        if self.kind != "head":
            terms[:, 1] = 0.0
        for attention in (3, 5):
            if attention < terms.shape[1]:
                terms[:, attention] /= self.attention_speedup
        forward, backward = (self._largest(terms, planes) for planes in self.time_planes)
        columns = {"fw_ms": forward, "bw_ms": backward}
        if self.kind != "head":
            tokens = (terms[:, 2],) if self.kind == "layer" else (terms[:, 2], terms[:, 4])
            columns |= {"stored_mb": self.stored_mb(*tokens), "peak_mb": self.peak_mb(*tokens)}
        return columns

    def _largest(self, terms: FloatArray, planes: FloatArray) -> FloatArray:
        # Term by term: a matrix product rounds differently with the number of rows, and a pack must cost the same
        # whatever it is priced with.
        planes_ms = np.zeros((len(terms), len(planes)))
        for k in range(terms.shape[1]):
            planes_ms += terms[:, k, None] * planes[None, :, k]
        times: FloatArray = planes_ms.max(axis=1)
        return times

    def _memory_mb(self, per_token: FloatArray, own: ArrayLike, cross: ArrayLike | None) -> FloatArray:
        if self.kind == "head":
            raise InputError(
                "the profile has no memory of the head",
                expected="kind 'layer' or 'cross_layer'",
                found=f"kind {self.kind!r}",
                fix="ask the encoder or decoder layer",
            )
        self._check_cross(cross is not None)
        tokens = [_token_counts(own)] if cross is None else [_token_counts(own), _token_counts(cross)]
        sums = [sum(float(rate) * count for rate, count in zip(plane, tokens, strict=True)) for plane in per_token]
        largest: FloatArray = np.maximum.reduce([np.asarray(total, dtype=np.float64) for total in sums])
        return largest

    def _check_cross(self, is_given: bool) -> None:
        if is_given != (self.kind == "cross_layer"):
            raise InputError(
                "input lengths are needed by, and only by, a decoder layer with cross-attention",
                expected="cross lengths or tokens" if not is_given else "none",
                found=f"a layer of kind {self.kind!r}",
                fix="pass cross (num_cross_tokens) for the decoder of an encoder-decoder model only",
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VarlenCosts:
    """Each part of a model, like LayerTables: ``encoder`` is None for a decoder-only model."""

    architecture: Architecture
    encoder: VarlenLayer | None
    decoder: VarlenLayer
    head: VarlenLayer


def varlen_terms(
    profile: LayerProfile, tp: int, recompute: Recompute, *, attention_speedup: float = 1.0
) -> VarlenCosts:
    """Derive the costs of variable-length packing from ``profile`` (the first time up to half a second).

    Raises InfeasibleError if the profile lacks (tp, recompute), InputError if ``attention_speedup`` is below
    1 or a table is too small to fit.
    """
    if not attention_speedup >= 1:
        raise InputError(
            "attention_speedup is not a speedup",
            expected="at least 1",
            found=str(attention_speedup),
            fix="set attention_speedup",
        )
    layers = {
        part: dataclasses.replace(layer, attention_speedup=attention_speedup)
        for part, layer in _fitted_layers(profile, tp, recompute).items()
    }
    return VarlenCosts(
        architecture=profile.architecture,
        encoder=layers.get("encoder"),
        decoder=layers["decoder"],
        head=layers["head"],
    )


# A fit takes up to half a second and is asked for again by every cost model of a grid search. Profiles are compared
# by identity.
@lru_cache(maxsize=64)
def _fitted_layers(profile: LayerProfile, tp: int, recompute: Recompute) -> dict[str, VarlenLayer]:
    tables = profile.layer_tables(tp, recompute)
    parts = {"encoder": tables.encoder, "decoder": tables.decoder, "head": tables.head}
    return {
        part: _varlen_layer(formula_kind(profile.architecture, part), grid)
        for part, grid in parts.items()
        if grid is not None
    }


def _varlen_layer(kind: Kind, grid: GridTable) -> VarlenLayer:
    points, feasible = measured_points(grid)
    terms = layer_terms(kind, points)
    if len(points) < 2 * terms.shape[1]:
        raise InputError(
            "too few measured points to derive costs of packing",
            expected=f"at least {2 * terms.shape[1]} in each table",
            found=f"{len(points)} in a table of shape {grid.shape}",
            fix="use a fuller profile",
        )
    # A pack has no rows: what the profile charges per row of a micro-batch is left to the other terms.
    time_terms = terms if kind == "head" else np.where(np.arange(terms.shape[1]) == 1, 0.0, terms)
    forward, backward = (
        fit(kind, column, time_terms, grid.columns[column][feasible]).coefficients for column in ("fw_ms", "bw_ms")
    )
    stored, peak = np.zeros((1, 1)), np.zeros((1, 1))
    if kind != "head":
        token_terms = [2] if kind == "layer" else [2, 4]
        stored = fit(kind, "stored_mb", terms, grid.columns["stored_mb"][feasible]).coefficients[:, token_terms]
        kept = rising_peaks(grid.columns["peak_mb"], grid.axes[-1], feasible)
        peaks = grid.columns["peak_mb"][feasible][kept]
        peak = fit(kind, "peak_mb", terms[kept], peaks).coefficients[:, token_terms]
    return VarlenLayer(
        kind=kind,
        time_planes=(forward, backward),
        stored_mb_per_token=stored,
        peak_mb_per_token=peak,
        attention_speedup=1.0,
    )


def _pack_lengths(name: str, lengths: ArrayLike) -> FloatArray:
    array = np.asarray(lengths, dtype=np.float64).reshape(-1)
    if (array < 0).any() or np.isnan(array).any():
        raise InputError(
            f"{name} holds a length that is no token count",
            expected="at least 0",
            found=str(array.min()),
            fix=f"correct or drop such lengths of {name}",
        )
    return array


def _token_counts(counts: ArrayLike) -> FloatArray:
    array = np.asarray(counts, dtype=np.float64)
    if (array < 0).any():
        raise InputError(
            "a token count is negative",
            expected="at least 0",
            found=str(array.min()),
            fix="set num_tokens (num_cross_tokens)",
        )
    return array
