"""Schedules: the native replay, orders and search against short Python versions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from llmsys import _C
from llmsys.dynapipe.config import PlannerConfig
from llmsys.dynapipe.costs import MicroBatchCosts
from llmsys.dynapipe.schedule import find_schedule, pass_times, starting_orders
from tests.dynapipe import oracles
from tests.dynapipe.oracles import Op, Orders
from tests.dynapipe.synthetic import FloatArray, Rng, random_costs

UNLIMITED = 1e9
MANY = 1_000_000


def search(
    costs: Sequence[FloatArray],
    num_devices: int,
    kinds: Sequence[str] = ("1f1b",),
    permutations: Sequence[Sequence[int]] | None = None,
    limit_mb: Sequence[float] | None = None,
    max_in_flight: int = MANY,
    max_moves: int = 0,
    seed: int = 0,
) -> _C.SearchResult:
    starts = permutations if permutations is not None else [range(len(costs[0]))]
    limits = [UNLIMITED] * num_devices if limit_mb is None else limit_mb
    return _C.search_schedule(
        costs,
        num_devices,
        kinds,
        np.array([list(start) for start in starts], dtype=np.int64),
        np.array(limits, dtype=np.float64),
        max_in_flight,
        max_moves,
        seed,
    )


def orders_of(result: _C.SearchResult) -> Orders:
    return [[(m, v, b) for m, v, b in order.tolist()] for order in result["orders"]]


def native_replay(costs: Sequence[FloatArray], orders: Orders) -> _C.ReplayResult:
    arrays = [np.array(order, dtype=np.int32).reshape(-1, 3) for order in orders]
    return _C.replay(costs, len(orders), arrays)


def random_orders(rng: Rng, num_micro_batches: int, num_stages: int, num_devices: int) -> Orders:
    """A random order of all passes that respects dependencies, dealt to the devices."""
    chains = {m: [(m, v, 0) for v in range(num_stages)] for m in range(num_micro_batches)}
    for m, chain in chains.items():
        chain += [(m, v, 1) for v in reversed(range(num_stages))]
    orders: Orders = [[] for _ in range(num_devices)]
    while chains:
        m = int(rng.choice(list(chains)))
        op = chains[m].pop(0)
        orders[op[1] % num_devices].append(op)
        if not chains[m]:
            del chains[m]
    return orders


def check_complete(orders: Orders, num_micro_batches: int, num_stages: int) -> None:
    """Every pass once, on its device."""
    for device, order in enumerate(orders):
        stages = range(device, num_stages, len(orders))
        every = set(itertools.product(range(num_micro_batches), stages, (0, 1)))
        assert len(order) == len(every) and set(order) == every


def check_dependencies(costs: Sequence[FloatArray], orders: Orders) -> None:
    """Passes of a device do not overlap, and start after their input has been computed and sent."""
    got = native_replay(costs, orders)
    num_micro_batches, num_stages = costs[0].shape
    start, sends = got["start_ms"], got["send_start_ms"]
    end = start + np.stack([costs[0], costs[1]], axis=2)
    for order in orders:
        for before, after in itertools.pairwise(order):
            assert start[after] >= end[before]
    for m, v in itertools.product(range(num_micro_batches), range(num_stages)):
        for source, target, duration in (
            ((m, v - 1, 0), (m, v, 0), costs[5][m, v - 1]),
            ((m, v + 1, 1), (m, v, 1), costs[6][m, v + 1] if v + 1 < num_stages else 0.0),
        ):
            if not 0 <= source[1] < num_stages:
                continue
            moved = (source[1] - target[1]) % len(orders) != 0
            assert start[target] >= (sends[source] + duration if moved else end[source])
            assert not moved or sends[source] >= end[source]
    assert (start[:, -1, 1] >= end[:, -1, 0]).all()


@pytest.mark.native
@pytest.mark.parametrize("seed", range(60))
def test_replay_equals_the_event_queue(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_devices, num_chunks, num_micro_batches = (
        int(rng.integers(1, 5)),
        int(rng.integers(1, 4)),
        int(rng.integers(1, 9)),
    )
    costs = random_costs(rng, num_micro_batches, num_devices * num_chunks, send=float(rng.choice([0.01, 1.0, 4.0])))
    orders = random_orders(rng, num_micro_batches, num_devices * num_chunks, num_devices)
    got, expected = native_replay(costs, orders), oracles.replay(costs, num_devices, orders)
    assert expected is not None and got["complete"]
    assert got["makespan_ms"] == expected["makespan_ms"]
    for name in ("peak_mb", "start_ms"):
        assert (got[name] == expected[name]).all()  # type: ignore[literal-required]
    moved = expected["send_start_ms"] > 0
    assert (got["send_start_ms"][moved] == expected["send_start_ms"][moved]).all()
    check_dependencies(costs, orders)


@pytest.mark.native
def test_replay_tells_when_orders_wait_for_each_other() -> None:
    rng = np.random.default_rng(0)
    num_stuck = 0
    for _ in range(40):
        costs = random_costs(rng, 3, 3)
        orders = random_orders(rng, 3, 3, 3)
        for order in orders:
            i, j = rng.choice(len(order), 2, replace=False)
            order[i], order[j] = order[j], order[i]
        expected = oracles.replay(costs, 3, orders)
        assert native_replay(costs, orders)["complete"] == (expected is not None)
        num_stuck += expected is None
    assert 5 < num_stuck < 40


@pytest.mark.native
@pytest.mark.parametrize("num_micro_batches", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("num_devices", [1, 2, 3, 5])
def test_one_f_one_b_is_the_textbook_order(num_micro_batches: int, num_devices: int) -> None:
    costs = random_costs(np.random.default_rng(0), num_micro_batches, num_devices)
    result = search(costs, num_devices)
    assert orders_of(result) == oracles.one_f_one_b(num_micro_batches, num_devices)
    assert result["kind"] == "1f1b" and result["feasible"] and result["overflow_mb"] == 0.0


@pytest.mark.native
def test_equal_passes_have_the_known_makespan() -> None:
    # 1F1B of M micro-batches on S devices without transfers takes (M + S - 1) (forward + backward).
    for num_micro_batches, num_devices in itertools.product((1, 4, 7), (1, 2, 4)):
        ones = np.ones((num_micro_batches, num_devices))
        costs = [ones, 2 * ones, ones, ones, 0 * ones, 0 * ones, 0 * ones]
        result = search(costs, num_devices)
        assert result["makespan_ms"] == 3 * (num_micro_batches + num_devices - 1)
        assert result["peak_mb"].tolist() == [min(num_devices - d, num_micro_batches) for d in range(num_devices)]


@pytest.mark.native
@pytest.mark.parametrize("num_chunks", [2, 3])
@pytest.mark.parametrize("num_devices", [1, 2, 3, 4])
def test_interleaved_completes_for_any_number_of_micro_batches(num_devices: int, num_chunks: int) -> None:
    rng = np.random.default_rng(0)
    for num_micro_batches in range(1, 3 * num_devices + 2):
        num_stages = num_devices * num_chunks
        costs = random_costs(rng, num_micro_batches, num_stages)
        result = search(costs, num_devices)
        assert result["feasible"]
        check_complete(orders_of(result), num_micro_batches, num_stages)
        check_dependencies(costs, orders_of(result))


@pytest.mark.native
def test_interleaved_order_is_megatrons_when_groups_are_full() -> None:
    # Two devices, two chunks, four micro-batches. Device 0 warms up with 2 * 1 + 2 passes.
    costs = random_costs(np.random.default_rng(0), 4, 4)
    first = orders_of(search(costs, 2))[0]
    forwards = [op for op in first if not op[2]]
    assert forwards == [(m, v, 0) for group in ((0, 1), (2, 3)) for v in (0, 2) for m in group]
    assert [op for op in first if op[2]] == [(m, v, 1) for group in ((0, 1), (2, 3)) for v in (2, 0) for m in group]
    assert first[:5] == forwards[:5] and first[5] == (0, 2, 1)


def shrink_bubbles(num_micro_batches: int, num_devices: int, num_chunks: int) -> float:
    num_stages = num_devices * num_chunks
    ones = np.ones((num_micro_batches, num_stages)) / num_chunks
    return search([ones, 2 * ones, ones, ones, 0 * ones, 0 * ones, 0 * ones], num_devices)["makespan_ms"]


@pytest.mark.native
def test_interleaving_divides_the_bubble() -> None:
    for num_chunks in (1, 2, 4):
        bubble = shrink_bubbles(8, 4, num_chunks) - 3 * 8
        assert bubble == pytest.approx(3 * 3 / num_chunks)


@pytest.mark.native
@pytest.mark.parametrize("seed", range(80))
def test_adaptive_order_follows_the_cyclic_rule(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_devices, num_chunks, num_micro_batches = (
        int(rng.integers(1, 5)),
        int(rng.integers(1, 4)),
        int(rng.integers(1, 13)),
    )
    num_stages = num_devices * num_chunks
    costs = random_costs(rng, num_micro_batches, num_stages)
    permutation = rng.permutation(num_micro_batches).tolist()
    one_mb = max(costs[2][:, d::num_devices].sum(axis=1).max() for d in range(num_devices))
    limits = (one_mb * rng.uniform(0.8, 5.0, num_devices)).tolist() if seed % 3 else [UNLIMITED] * num_devices
    in_flight = int(rng.integers(1, 6)) if seed % 2 else MANY
    expected = oracles.adaptive(costs, num_devices, permutation, limits, in_flight)
    result = search(costs, num_devices, ["adaptive"], [permutation], limits, in_flight)
    if expected is None:
        assert not result["feasible"] and result["orders"] == [] and np.isinf(result["overflow_mb"])
        return
    assert orders_of(result) == expected
    check_complete(expected, num_micro_batches, num_stages)
    check_dependencies(costs, expected)
    run = oracles.replay(costs, num_devices, expected)
    assert run is not None and (result["peak_mb"] == run["peak_mb"]).all()
    if num_chunks == 1:
        # Each device's memory is a matter of entering micro-batches alone, and those are held back.
        assert result["feasible"] and (result["peak_mb"] <= np.array(limits)).all()
        for order in expected:
            held = np.cumsum([-1 if backward else 1 for _, _, backward in order])
            assert held.max() <= in_flight


@pytest.mark.native
def test_adaptive_order_stops_when_nothing_fits() -> None:
    costs = random_costs(np.random.default_rng(0), 3, 2)
    result = search(costs, 2, ["adaptive"], limit_mb=[1.0, 1.0])
    assert not result["feasible"] and np.isinf(result["overflow_mb"]) and result["orders"] == []
    # 1F1B does not look at memory: it completes, and says by how much it passes the limit.
    result = search(costs, 2, ["adaptive", "1f1b"], limit_mb=[1.0, 1.0])
    assert not result["feasible"] and result["kind"] == "1f1b"
    assert result["overflow_mb"] == result["peak_mb"].max() - 1.0


@pytest.mark.native
@pytest.mark.parametrize("seed", range(20))
def test_search_is_never_worse_than_its_starts_and_repeats(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_devices, num_chunks, num_micro_batches = (
        int(rng.integers(1, 5)),
        int(rng.integers(1, 3)),
        int(rng.integers(1, 10)),
    )
    costs = random_costs(rng, num_micro_batches, num_devices * num_chunks)
    starts = [rng.permutation(num_micro_batches).tolist() for _ in range(4)]
    one_mb = costs[2].sum(axis=1).max()
    limits = (one_mb * rng.uniform(0.5, 3.0, num_devices)).tolist()
    kinds = ["1f1b", "adaptive"]
    found = search(costs, num_devices, kinds, starts, limits, max_moves=60, seed=seed)
    again = search(costs, num_devices, kinds, starts, limits, max_moves=60, seed=seed)
    assert found["permutation"].tolist() == again["permutation"].tolist()
    assert orders_of(found) == orders_of(again) and found["makespan_ms"] == again["makespan_ms"]
    # Every fixed schedule costs one evaluation, every move one more.
    assert found["num_evaluations"] == 8 + (60 if num_micro_batches > 1 else 0)
    for kind, start in itertools.product(kinds, starts):
        one = search(costs, num_devices, [kind], [start], limits)
        assert (found["overflow_mb"], found["makespan_ms"]) <= (one["overflow_mb"], one["makespan_ms"]) or (
            found["overflow_mb"] < one["overflow_mb"]
        )
    if found["orders"]:
        run = oracles.replay(costs, num_devices, orders_of(found))
        assert run is not None and run["makespan_ms"] == found["makespan_ms"]
        assert (run["peak_mb"] == found["peak_mb"]).all()
        assert found["overflow_mb"] == max(0.0, (found["peak_mb"] - limits).max())
        assert found["feasible"] == bool((found["peak_mb"] <= limits).all())
        check_complete(orders_of(found), num_micro_batches, num_devices * num_chunks)


@pytest.mark.native
def test_search_finds_the_best_permutation_of_a_few() -> None:
    rng = np.random.default_rng(4)
    costs = random_costs(rng, 5, 3)
    best = min(search(costs, 3, ["1f1b"], [p])["makespan_ms"] for p in itertools.permutations(range(5)))
    found = [search(costs, 3, ["1f1b"], max_moves=600, seed=seed)["makespan_ms"] for seed in range(3)]
    assert found == pytest.approx([best] * 3)


def bad_arguments() -> list[tuple[dict[str, object], str]]:
    return [
        ({"num_devices": 2}, "multiple of the number of devices"),
        ({"num_devices": 0}, "multiple of the number of devices"),
        ({"kinds": []}, "at least one schedule kind"),
        ({"kinds": ["gpipe"]}, "1f1b or adaptive, got gpipe"),
        ({"permutations": [[0, 0]]}, "each of the 2 micro-batches once"),
        ({"permutations": [[0]]}, "each of the 2 micro-batches once"),
        ({"permutations": [[0, 2]]}, "each of the 2 micro-batches once"),
        ({"limit_mb": [1.0]}, "one memory limit for each of 3 devices"),
        ({"max_in_flight": 0}, "max_in_flight must be positive"),
    ]


@pytest.mark.native
@pytest.mark.parametrize(("change", "message"), bad_arguments())
def test_bad_searches_are_refused(change: dict[str, object], message: str) -> None:
    costs = random_costs(np.random.default_rng(0), 2, 3)
    arguments: dict[str, object] = {"num_devices": 3, "limit_mb": [UNLIMITED] * 3} | change
    with pytest.raises(ValueError, match=message):
        search(costs, **arguments)  # type: ignore[arg-type]


@pytest.mark.native
@pytest.mark.parametrize("value", [-1.0, np.inf, np.nan])
def test_costs_that_are_none_are_refused(value: float) -> None:
    costs = random_costs(np.random.default_rng(0), 2, 3)
    costs[3][1, 2] = value
    with pytest.raises(ValueError, match="micro-batch 1 on stage 2"):
        search(costs, 3)


@pytest.mark.native
@pytest.mark.parametrize(
    ("op", "message"),
    [((9, 0, 0), "lists micro-batch 9"), ((0, -1, 0), "on stage -1"), ((0, 1, 0), "belongs to device 1")],
)
def test_replay_refuses_orders_that_do_not_fit(op: Op, message: str) -> None:
    costs = random_costs(np.random.default_rng(0), 2, 3)
    with pytest.raises(ValueError, match=message):
        native_replay(costs, [[op], [], []])
    with pytest.raises(ValueError, match="one order for each of 3 devices"):
        _C.replay(costs, 3, [np.zeros((0, 3), dtype=np.int32)])


def as_costs(columns: Sequence[FloatArray]) -> MicroBatchCosts:
    return MicroBatchCosts(**dict(zip(MicroBatchCosts.__dataclass_fields__, columns, strict=True)))


@pytest.mark.parametrize("num_micro_batches", [1, 2, 4, 5, 20, 21, 40])
def test_starting_orders_are_those_of_clusters(num_micro_batches: int) -> None:
    costs = as_costs(random_costs(np.random.default_rng(1), num_micro_batches, 2))
    orders = starting_orders(costs, PlannerConfig(reorder="clusters"))
    assert orders[0].tolist() == list(range(num_micro_batches))
    assert (np.sort(orders, axis=1) == np.arange(num_micro_batches)).all()
    expected = {1: 1, 2: 3, 4: 25, 5: 25, 20: 25, 21: 7, 40: 7}  # one more than the orders of the clusters
    assert len(orders) == expected[num_micro_batches]
    assert (orders == starting_orders(costs, PlannerConfig(reorder="clusters"))).all()
    assert starting_orders(costs, PlannerConfig(reorder="none")).tolist() == [list(range(num_micro_batches))]


def test_starting_orders_keep_clusters_together() -> None:
    # Three obvious clusters of seven: in every order their members are neighbours.
    times = np.repeat([1.0, 10.0, 100.0], 7)[np.random.default_rng(0).permutation(21)]
    columns = random_costs(np.random.default_rng(1), 21, 2)
    columns[0], columns[1] = times[:, None] * np.ones((1, 2)), times[:, None] * np.ones((1, 2))
    orders = starting_orders(as_costs(columns), PlannerConfig(reorder="clusters"))
    for order in orders[1:]:
        assert np.count_nonzero(np.diff(times[order])) == 2
    assert len({tuple(times[order]) for order in orders[1:]}) == 6


def test_equal_micro_batches_make_one_cluster() -> None:
    columns = [np.ones((30, 2)) for _ in range(7)]
    orders = starting_orders(as_costs(columns), PlannerConfig())
    assert len(orders) == 2 and sorted(orders[1].tolist()) == list(range(30))


def test_find_schedule_wraps_the_search() -> None:
    columns = random_costs(np.random.default_rng(2), 6, 4)
    costs = as_costs(columns)
    limits = np.array([200.0, 200.0])
    config = PlannerConfig(seed=3)
    schedule = find_schedule(costs, 2, limits, config, max_moves=50)
    assert schedule is not None and schedule.feasible and schedule.overflow_mb == 0.0
    times = pass_times(schedule, costs)
    orders: Orders = [[(m, v, b) for m, v, b in order.tolist()] for order in schedule.orders]
    expected = oracles.replay(columns, 2, orders)
    assert expected is not None and (times.start_ms == expected["start_ms"]).all()
    assert schedule.makespan_ms == expected["makespan_ms"]
    given = find_schedule(costs, 2, limits, config, max_moves=0, starts=np.array([[5, 4, 3, 2, 1, 0]]))
    assert given is not None and given.permutation == (5, 4, 3, 2, 1, 0)
    assert find_schedule(costs, 2, np.array([1.0, 1.0]), PlannerConfig(schedules=("adaptive",)), max_moves=0) is None
    too_tight = find_schedule(costs, 2, np.array([1.0, 1.0]), config, max_moves=0)
    assert too_tight is not None and not too_tight.feasible and too_tight.overflow_mb > 0
