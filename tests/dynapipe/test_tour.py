"""Sample orders: sorting, and the tour against shortest paths and, where it is installed, LKH."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llmsys import _C
from llmsys.dynapipe.config import PlannerConfig
from llmsys.dynapipe.ordering import order_samples, sort_order, tour_order
from tests.dynapipe import oracles
from tests.dynapipe.synthetic import IntArray, Rng, toy_samples

KICKS = PlannerConfig().max_tour_kicks


def random_points(rng: Rng, n: int) -> tuple[IntArray, IntArray]:
    """Dense or sparse, square or flat; often with equal points."""
    width = int(rng.choice([3, 20, 1000]))
    height = width if rng.random() < 0.5 else max(2, width // 10)
    return rng.integers(0, width, n), rng.integers(0, height, n)


def lengths(x: IntArray, y: IntArray, path: IntArray) -> int:
    return oracles.path_length(x.tolist(), y.tolist(), path.tolist())


@pytest.mark.native
@pytest.mark.parametrize("n", range(1, 9))
def test_path_is_nearly_the_shortest(n: int) -> None:
    rng = np.random.default_rng(n)
    for seed in range(25):
        x, y = random_points(rng, n)
        path = _C.open_path(x, y, KICKS, seed)
        assert sorted(path.tolist()) == list(range(n))
        assert lengths(x, y, path) <= 1.03 * oracles.shortest_path_length(x.tolist(), y.tolist())


def test_the_oracle_finds_shortest_paths() -> None:
    rng = np.random.default_rng(0)
    for n in range(1, 7):
        x, y = (axis.tolist() for axis in random_points(rng, n))
        by_all = min(oracles.path_length(x, y, path) for path in itertools.permutations(range(n)))
        assert oracles.shortest_path_length(x, y) == by_all


@pytest.mark.native
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5])
def test_few_points_and_equal_points(n: int) -> None:
    for x in (np.zeros(n, dtype=np.int64), np.arange(n)):
        for kicks in (0, 5):
            path = _C.open_path(x, np.zeros(n, dtype=np.int64), kicks, 0)
            assert sorted(path.tolist()) == list(range(n))
    on_a_line = np.array([5, 1, 9, 3, 7][:n], dtype=np.int64)
    path = _C.open_path(on_a_line, on_a_line, KICKS, 0)
    assert abs(np.diff(on_a_line[path])).sum() == (np.ptp(on_a_line) if n else 0)


@pytest.mark.native
@pytest.mark.parametrize("n", [30, 200])
def test_many_points(n: int) -> None:
    rng = np.random.default_rng(n)
    x, y = rng.integers(0, 2000, n), rng.integers(0, 300, n)
    path = _C.open_path(x, y, KICKS, 1)
    assert sorted(path.tolist()) == list(range(n))
    assert (path == _C.open_path(x, y, KICKS, 1)).all()
    greedy = _C.open_path(x, y, 0, 1)
    assert lengths(x, y, path) <= lengths(x, y, greedy) < 0.9 * lengths(x, y, np.lexsort((y, x)))
    with pytest.raises(ValueError, match="got 1 x and 2 y"):
        _C.open_path(x[:1].copy(), y[:2].copy(), 1, 1)


@pytest.mark.native
def test_many_equal_points_end() -> None:
    x = np.repeat([3, 1, 2], 40)
    path = _C.open_path(x, np.zeros_like(x), 50, 0)
    assert sorted(path.tolist()) == list(range(120))


def spread_points() -> tuple[IntArray, IntArray]:
    """165 points of whole-number arithmetic, dense near the origin as lengths are."""
    i = np.arange(1, 400)
    a, b = i * 48271 % 2147483647 % 1009, i * i * 69621 % 2147483647 % 997
    points = np.unique(np.stack([8 + a**3 // (1009**3 // 2000), 8 + b**2 // (997**2 // 300)], axis=1), axis=0)
    chosen = points[:: len(points) // 165][:165]
    return np.ascontiguousarray(chosen[:, 0]), np.ascontiguousarray(chosen[:, 1])


@pytest.mark.native
def test_path_is_as_short_as_lkh_found() -> None:
    x, y = spread_points()
    assert len(x) == 165
    by_lkh = 6294  # LKH 3 through elkai, best of 30 runs
    paths = [lengths(x, y, _C.open_path(x, y, KICKS, seed)) for seed in range(5)]
    assert by_lkh <= min(paths) and max(paths) <= 1.03 * by_lkh
    assert np.mean(paths) <= 1.02 * by_lkh
    assert lengths(x, y, _C.open_path(x, y, 0, 0)) <= 1.06 * by_lkh


@pytest.mark.native
def test_path_is_as_short_as_lkhs() -> None:
    elkai = pytest.importorskip("elkai", reason="LKH (pip install elkai) is not installed: nothing to compare with")
    samples = toy_samples(np.random.default_rng(3), "encoder_decoder", 400, max_len=2000)
    points = np.unique(np.stack([samples.encoder_len, samples.decoder_len], axis=1), axis=0)[:165]
    assert len(points) == 165
    # A city at distance 0 from all others makes the tour an open path.
    distances = np.zeros((166, 166), dtype=int)
    distances[1:, 1:] = np.abs(points[:, None] - points[None]).sum(axis=2)
    tour = elkai.DistanceMatrix(distances.tolist()).solve_tsp(runs=1)[:-1]
    at = tour.index(0)
    lkh = np.array(tour[at + 1 :] + tour[:at]) - 1
    x, y = (np.ascontiguousarray(points[:, i]) for i in (0, 1))
    ours = [lengths(x, y, _C.open_path(x, y, KICKS, seed)) for seed in range(3)]
    assert max(ours) <= 1.03 * lengths(x, y, lkh)


def test_sorting_is_longest_first_and_stable() -> None:
    encoder, decoder = np.array([5, 9, 5, 9, 5]), np.array([1, 2, 3, 2, 1])
    assert sort_order(encoder, decoder).tolist() == [1, 3, 2, 0, 4]
    assert sort_order(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)).tolist() == []


def test_tour_keeps_equal_samples_together() -> None:
    rng = np.random.default_rng(0)
    for n in (0, 1, 2, 3, 50):
        encoder, decoder = 8 * rng.integers(1, 5, n), 8 * rng.integers(1, 3, n)
        order = tour_order(encoder, decoder, KICKS, 0)
        assert sorted(order.tolist()) == list(range(n))
        pairs = [(int(encoder[i]), int(decoder[i])) for i in order]
        runs = [(key, [int(i) for i, _ in group]) for key, group in _runs(order, pairs)]
        assert len({key for key, _ in runs}) == len(runs)  # each pair of lengths once
        assert all(members == sorted(members) for _, members in runs)


def _runs(order: IntArray, pairs: list[tuple[int, int]]) -> list[tuple[tuple[int, int], list[tuple[int, int]]]]:
    together = zip(order.tolist(), pairs, strict=True)
    return [(key, list(group)) for key, group in itertools.groupby(together, key=lambda entry: entry[1])]


def test_order_follows_the_setting() -> None:
    encoder, decoder = np.array([8, 64, 16, 64]), np.array([8, 8, 32, 16])
    none = np.zeros_like(encoder)
    by_sort, by_tour = PlannerConfig(order="sort"), PlannerConfig(order="tour")
    assert order_samples(encoder, decoder, by_sort).tolist() == [3, 1, 2, 0]
    assert order_samples(none, decoder, by_tour).tolist() == sort_order(none, decoder).tolist()
    tour = order_samples(encoder, decoder, by_tour)
    assert tour.tolist() == tour_order(encoder, decoder, KICKS, 0).tolist()
    assert sorted(tour.tolist()) == [0, 1, 2, 3]


def test_tour_is_shorter_than_sorting_on_pairs_of_lengths() -> None:
    samples = toy_samples(np.random.default_rng(1), "encoder_decoder", 200)
    tour = tour_order(samples.encoder_len, samples.decoder_len, KICKS, 0)
    by_sort = sort_order(samples.encoder_len, samples.decoder_len)
    encoder, decoder = samples.encoder_len, samples.decoder_len
    assert lengths(encoder, decoder, tour) < 0.6 * lengths(encoder, decoder, by_sort)
