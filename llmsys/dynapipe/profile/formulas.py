"""Cost formulas fitted to a layer profile: the largest of a few sums, each linear in the micro-batch size.

A cost is ``max_p sum_j coefficients[p, j] * term_j``. Terms of a layer with sequences of length L in a
micro-batch of b: 1, b, bL and bL^2; of a decoder layer with cross-attention to E tokens: 1, b, bD, bD^2, bE
and bDE; of the head: 1 and bL. Times have two planes: a constant (a small kernel costs its launch, however
little work it holds) and the sum of all terms. Stored memory has one. Peak memory has up to three, since it
is reached in one of the feed-forward block (linear), self-attention and cross-attention (products of
lengths).

Coefficients are not negative and minimise the relative error, by least squares with points far off weighted
down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Kind = Literal["layer", "cross_layer", "head"]

TERMS: dict[Kind, tuple[str, ...]] = {
    "layer": ("1", "b", "bL", "bLL"),
    "cross_layer": ("1", "b", "bD", "bDD", "bE", "bDE"),
    "head": ("1", "bL"),
}
# Which terms each plane may use, in the order of TERMS.
_PLANES: dict[tuple[Kind, str], tuple[str, ...]] = {
    ("layer", "time"): ("1000", "1111"),
    ("cross_layer", "time"): ("100000", "111111"),
    ("head", "time"): ("10", "11"),
    ("layer", "stored"): ("1111",),
    ("cross_layer", "stored"): ("111111",),
    ("layer", "peak"): ("1010", "0011"),
    ("cross_layer", "peak"): ("101010", "001111", "001111"),
}
_QUANTITY = {"fw_ms": "time", "bw_ms": "time", "stored_mb": "stored", "peak_mb": "peak"}
_RELATIVE_TOLERANCE = 0.01
_ROUNDS = 12


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Formula:
    """``coefficients``: shape (planes, terms). ``median_error``, ``p95_error``: of the fit, relative."""

    coefficients: FloatArray
    median_error: float
    p95_error: float

    def __call__(self, terms: FloatArray) -> FloatArray:
        """Costs, shape (n,), for ``terms`` of shape (n, terms)."""
        costs: FloatArray = (terms @ self.coefficients.T).max(axis=1)
        return costs


def layer_terms(kind: Kind, points: FloatArray) -> FloatArray:
    """Terms, shape (n, len(TERMS[kind])), of padded micro-batches at ``points``: rows of axis values."""
    b = points[:, -1]
    one = np.ones(len(points))
    if kind == "head":
        return np.stack([one, b * points[:, 0]], axis=1)
    if kind == "layer":
        length = points[:, 0]
        return np.stack([one, b, b * length, b * length**2], axis=1)
    encoder, decoder = points[:, 0], points[:, 1]
    return np.stack([one, b, b * decoder, b * decoder**2, b * encoder, b * decoder * encoder], axis=1)


def fit(kind: Kind, column: str, terms: FloatArray, costs: FloatArray) -> Formula:
    """Fit the formula of ``column`` to ``costs`` > 0, shape (n,), at ``terms``, shape (n, terms).

    Alternates between giving each point to its largest plane and fitting each plane to its points, from
    several starts; the result with the smallest mean relative error wins.
    """
    masks = [np.array([flag == "1" for flag in flags]) for flags in _PLANES[kind, _QUANTITY[column]]]
    best, best_error = np.zeros((len(masks), terms.shape[1])), np.full(len(costs), np.inf)
    for owner in _starts(masks, terms, costs):
        coefficients = _alternate(masks, owner, terms, costs)
        error = np.abs((terms @ coefficients.T).max(axis=1) / costs - 1)
        if error.mean() < best_error.mean():
            best, best_error = coefficients, error
    return Formula(
        coefficients=best,
        median_error=float(np.median(best_error)),
        p95_error=float(np.percentile(best_error, 95)),
    )


def capacity_terms(points: FloatArray) -> FloatArray:
    """Terms of the memory capacity at ``points``, shape (n, axes): b, then bL and bL^2 for each length L."""
    b, lengths = points[:, -1:], points[:, :-1]
    return np.concatenate([b, b * lengths, b * lengths**2], axis=1)


def fit_capacity(points: FloatArray) -> FloatArray:
    """Coefficients c >= 0, one per term: a micro-batch fits, by estimate, if ``capacity_terms @ c <= 1``.

    ``points``, shape (n, axes), are the profiled ones: for given lengths all powers of two up to the largest
    micro-batch that fits. Its true limit is taken to be sqrt(2) times that. Lengths whose largest micro-batch
    is the largest of all say nothing about memory and are left out, unless no others are left.
    """
    lengths, group = np.unique(points[:, :-1], axis=0, return_inverse=True)
    largest = np.zeros(len(lengths))
    np.maximum.at(largest, group.reshape(-1), points[:, -1])
    limited = largest < largest.max()
    if not limited.any():
        limited[:] = True
    terms = capacity_terms(np.column_stack([lengths, np.ones(len(lengths))]))[limited]
    target = 1 / (np.sqrt(2) * largest[limited])
    return _fit_plane(terms, target, np.ones(terms.shape[1], dtype=np.bool_))


def _alternate(
    masks: list[NDArray[np.bool_]], owner: NDArray[np.intp], terms: FloatArray, costs: FloatArray
) -> FloatArray:
    coefficients = np.zeros((len(masks), terms.shape[1]))
    for _ in range(_ROUNDS):
        for number, mask in enumerate(masks):
            own = owner == number
            if own.sum() > mask.sum():
                coefficients[number] = _fit_plane(terms[own], costs[own], mask)
        new_owner = (terms @ coefficients.T).argmax(axis=1)
        if (new_owner == owner).all():
            break
        owner = new_owner
    return coefficients


def _starts(masks: list[NDArray[np.bool_]], terms: FloatArray, costs: FloatArray) -> Iterator[NDArray[np.intp]]:
    """Guesses of which plane explains each point."""
    if len(masks) == 1:
        yield np.zeros(len(costs), dtype=np.intp)
    elif masks[0].sum() == 1:
        # A time: what costs about as much as the cheapest quarter of all points is bound by its constant.
        floor = np.median(costs[costs <= np.quantile(costs, 0.25)])
        yield (costs > 1.35 * floor).astype(np.intp)
    else:
        # A peak: products of lengths win from some length on (bLL / bL, or bDD / bD and bDE / bD).
        products = terms[:, [3]] if len(masks) == 2 else terms[:, [3, 5]]
        lengths = products / terms[:, [2]]
        yield np.ones(len(costs), dtype=np.intp)
        for threshold in (128, 256, 512, 1024, 2048):
            yield np.where(lengths.max(axis=1) < threshold, 0, 1 + lengths.argmax(axis=1))


def _fit_plane(terms: FloatArray, costs: FloatArray, mask: NDArray[np.bool_]) -> FloatArray:
    """Non-negative coefficients with the least weighted relative error; terms outside ``mask`` get 0."""
    relative = terms / costs[:, None]
    scale = np.linalg.norm(relative, axis=0)
    scale[scale == 0] = 1
    relative = relative / scale
    weight = np.ones(len(costs))
    solution = np.zeros(terms.shape[1])
    for _ in range(_ROUNDS):
        solution = _nonnegative_least_squares(relative * weight[:, None], weight, mask)
        residual = np.abs(relative @ solution - 1)
        weight = 1 / np.sqrt(np.maximum(residual, _RELATIVE_TOLERANCE))
    coefficients: FloatArray = solution / scale
    return coefficients


def _nonnegative_least_squares(a: FloatArray, target: FloatArray, mask: NDArray[np.bool_]) -> FloatArray:
    """Least squares that drops the terms whose coefficients come out negative, until none does."""
    active = mask.copy()
    while True:
        solution = np.zeros(a.shape[1])
        solution[active] = np.linalg.lstsq(a[:, active], target, rcond=None)[0]
        if (solution >= 0).all():
            return solution
        active &= solution > 0
