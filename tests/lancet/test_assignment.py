"""Algorithm 1 and the exact assignment against brute force on small cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llmsys.core.errors import InputError
from llmsys.core.specs import NODES
from llmsys.lancet.assignment import UNASSIGNED, assign_exact, assign_greedy, hidden_ms
from llmsys.lancet.costs import cluster_costs
from llmsys.lancet.labelling import find_candidates
from llmsys.lancet.workload import StepConfig, build_step, moe_model

Case = tuple[list[float], list[float], list[list[int]]]


def random_case(rng: np.random.Generator) -> Case:
    num_comm, num_units = int(rng.integers(1, 4)), int(rng.integers(0, 7))
    comm_ms = [float(rng.integers(0, 20)) / 2 for _ in range(num_comm)]
    unit_ms = [float(rng.integers(1, 16)) / 2 for _ in range(num_units)]
    allowed = [[i for i in range(num_units) if rng.random() < 0.7] for _ in range(num_comm)]
    return comm_ms, unit_ms, allowed


def best_by_trying_all(comm_ms: list[float], unit_ms: list[float], allowed: list[list[int]]) -> float:
    choices = [[UNASSIGNED, *(j for j, units in enumerate(allowed) if i in units)] for i in range(len(unit_ms))]
    return max(hidden_ms(comm_ms, unit_ms, targets) for targets in itertools.product(*choices))


def algorithm_1(comm_ms: list[float], unit_ms: list[float], allowed: list[list[int]]) -> list[int]:
    """The listing of the paper, line by line."""
    targets = [UNASSIGNED] * len(unit_ms)
    for i, t in enumerate(comm_ms):
        t_u = t
        while t_u > 0 and any(targets[j] == UNASSIGNED for j in allowed[i]):
            best = None
            for j in allowed[i]:
                if targets[j] == UNASSIGNED and (best is None or abs(t_u - unit_ms[j]) < abs(t_u - unit_ms[best])):
                    best = j
            assert best is not None
            t_u -= unit_ms[best]
            targets[best] = i
    return targets


@pytest.mark.parametrize("seed", range(40))
def test_greedy_is_the_papers_algorithm(seed: int) -> None:
    case = random_case(np.random.default_rng(seed))
    found = assign_greedy(*case)
    assert list(found.targets) == algorithm_1(*case)
    assert found.hidden_ms == hidden_ms(case[0], case[1], found.targets) <= best_by_trying_all(*case)
    if found.proven:
        assert found.hidden_ms == best_by_trying_all(*case)


@pytest.mark.parametrize("seed", range(25))
def test_exact_hides_as_much_as_any_assignment(seed: int) -> None:
    case = random_case(np.random.default_rng(1000 + seed))
    comm_ms, unit_ms, allowed = case
    found = assign_exact(*case)
    assert found.proven
    assert found.hidden_ms == pytest.approx(best_by_trying_all(*case), abs=1e-3)
    assert found.hidden_ms == hidden_ms(comm_ms, unit_ms, found.targets) <= found.bound_ms
    for unit, target in enumerate(found.targets):
        assert target == UNASSIGNED or unit in allowed[target]


def test_best_fit_can_be_worse_than_the_best() -> None:
    """The first all-to-all takes what only the second could use well: 3 of 4 ms, with 2 + 2 there."""
    comm_ms, unit_ms, allowed = [4.0, 3.0], [3.5, 2.0, 2.0], [[0, 1, 2], [0]]
    greedy, exact = assign_greedy(comm_ms, unit_ms, allowed), assign_exact(comm_ms, unit_ms, allowed)
    assert greedy.targets == (0, 0, UNASSIGNED) and greedy.hidden_ms == 4.0 and not greedy.proven
    assert exact.targets == (1, 0, 0) and exact.hidden_ms == exact.bound_ms == 7.0


def test_the_last_unit_may_take_longer_than_what_is_left() -> None:
    found = assign_greedy([5.0], [3.0, 9.0], [[0, 1]])
    assert found.targets == (0, 0) and found.hidden_ms == 5.0 and found.proven
    assert assign_greedy([5.0], [4.0, 1.0, 2.0], [[0, 1, 2]]).targets == (0, 0, UNASSIGNED)


def test_a_reached_limit_is_told_and_leaves_the_greedy_result_at_least() -> None:
    rng = np.random.default_rng(3)
    comm_ms = [float(t) for t in rng.uniform(23, 28, 12)]
    unit_ms = [float(t) for t in rng.uniform(1, 9, 60)]
    allowed = [list(range(5 * j + 5)) for j in range(12)]
    found = assign_exact(comm_ms, unit_ms, allowed, solver_limit=1e-6)
    assert not found.proven
    assert assign_greedy(comm_ms, unit_ms, allowed).hidden_ms <= found.hidden_ms < found.bound_ms


def test_exact_gives_the_same_targets_again() -> None:
    rng = np.random.default_rng(4)
    case: Case = ([9.0] * 5, [float(t) for t in rng.uniform(1, 5, 14)], [list(range(3 * j + 2)) for j in range(5)])
    assert assign_exact(*case, solver_limit=0.2).targets == assign_exact(*case, solver_limit=0.2).targets


@pytest.mark.parametrize(
    ("comm_ms", "unit_ms", "allowed", "found"),
    [
        ([1.0], [1.0], [], "0 lists"),
        ([float("nan")], [1.0], [[0]], "nan"),
        ([1.0], [-1.0], [[0]], "-1.0"),
        ([1.0], [1.0], [[1]], "1"),
    ],
)
@pytest.mark.parametrize("assign", [assign_greedy, assign_exact])
def test_broken_input_is_named(assign, comm_ms, unit_ms, allowed, found) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError) as error:
        assign(comm_ms, unit_ms, allowed)
    assert error.value.found == found


@pytest.mark.parametrize("node", ["p4de", "p3dn"])
@pytest.mark.parametrize("model", ["gpt2_s_moe", "gpt2_l_moe"])
@pytest.mark.parametrize("num_gpus", [16, 64])
def test_greedy_is_within_two_percent_of_the_best_on_the_papers_models(model: str, node: str, num_gpus: int) -> None:
    batch = {"gpt2_s_moe": 16, "gpt2_l_moe": 8}[model]
    graph = build_step(StepConfig(model=moe_model(model), num_gpus=num_gpus, batch_per_gpu=batch, gate="switch"))
    costs = cluster_costs(NODES[node], num_gpus, arithmetic="tf32" if node == "p4de" else "fp32")
    op_ms = [costs.op_ms(graph, op) for op in graph.ops]
    found = find_candidates(graph, op_ms)
    comm_ms = [op_ms[op] for op in found.all_to_alls]
    unit_ms = [unit.duration_ms for unit in found.units]
    assert len(comm_ms) >= 12 and len(unit_ms) > len(comm_ms)
    greedy = assign_greedy(comm_ms, unit_ms, found.movable)
    best = assign_exact(comm_ms, unit_ms, found.movable, gap=0.001)
    assert greedy.hidden_ms >= 0.98 * best.hidden_ms
    # In one of these the solver's limit comes before the bound does: nothing hides more than 3.5% above the greedy one.
    assert greedy.hidden_ms >= 0.965 * best.bound_ms
