"""Sample ordering: micro-batches are runs of neighbours, so neighbours should be alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmsys import _C
from llmsys.dynapipe.config import PlannerConfig

IntArray = NDArray[np.int64]


def sort_order(encoder_len: IntArray, decoder_len: IntArray) -> IntArray:
    """Longest first: by encoder length, then decoder length, then sample number."""
    return np.lexsort((np.arange(len(decoder_len)), -decoder_len, -encoder_len)).astype(np.int64)


def tour_order(encoder_len: IntArray, decoder_len: IntArray, max_kicks: int, seed: int) -> IntArray:
    """A short open path through the points (encoder length, decoder length) under the L1 distance.

    Samples of equal lengths stay together, in their original order. The solver is our own (csrc/solvers/tour): the
    libraries for it either take longer than all other planning for their first answer (LKH through elkai, OR-Tools), or
    stop by the clock, so that a loaded machine would get another plan (fast-tsp).
    """
    points, index = np.unique(np.stack([encoder_len, decoder_len], axis=1), axis=0, return_inverse=True)
    path = _C.open_path(np.ascontiguousarray(points[:, 0]), np.ascontiguousarray(points[:, 1]), max_kicks, seed)
    rank = np.empty(len(points), dtype=np.int64)
    rank[path] = np.arange(len(points))
    return np.argsort(rank[index.reshape(-1)], kind="stable").astype(np.int64)


def order_samples(encoder_len: IntArray, decoder_len: IntArray, config: PlannerConfig) -> IntArray:
    """The order to partition, a permutation of the samples.

    Takes padded lengths: samples that are padded alike are alike to every cost. With one length alone (decoder-only)
    sorting is the shortest path.
    """
    if not encoder_len.any():
        return sort_order(encoder_len, decoder_len)
    if config.order == "sort":
        return sort_order(encoder_len, decoder_len)
    return tour_order(encoder_len, decoder_len, config.max_tour_kicks, config.seed)
