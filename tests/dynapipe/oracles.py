"""Short, slow and obvious versions of what the native solvers do."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from llmsys.core.costs import GridTable
from llmsys.dynapipe.config import Recompute
from llmsys.dynapipe.costs import CostModel

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Op = tuple[int, int, int]  # micro-batch, stage, is backward
Orders = list[list[Op]]


# --- micro-batches ---


def run_times(
    cost_model: CostModel,
    recompute: Recompute,
    limits_mb: Sequence[float],
    in_flight: int,
    encoder_len: IntArray,
    decoder_len: IntArray,
) -> FloatArray:
    """``times[i, j]`` of a micro-batch of samples i to j - 1 on its slowest device; infinite where one has no room."""
    n = len(encoder_len)
    runs = [(i, j) for i in range(n) for j in range(i + 1, n + 1)]
    count = np.array([j - i for i, j in runs], dtype=np.float64)
    enc = np.array([encoder_len[i:j].max() for i, j in runs], dtype=np.float64)
    dec = np.array([decoder_len[i:j].max() for i, j in runs], dtype=np.float64)
    tables = cost_model.layer_tables(recompute)

    def layer_costs(table: GridTable, *lengths: FloatArray) -> dict[str, FloatArray]:
        values = table.query(np.stack([*lengths, count], axis=1))
        return {name: np.maximum(0.0, column) for name, column in values.items()}

    decoder = layer_costs(tables.decoder, *([enc, dec] if tables.encoder else [dec]))
    encoder = layer_costs(tables.encoder, enc) if tables.encoder else decoder
    head = layer_costs(tables.head, dec)
    slowest = np.zeros(len(runs))
    for device, (limit, state) in enumerate(zip(limits_mb, cost_model.state_mb(recompute), strict=True)):
        # Activations of one layer after the other, as they pile up in a forward pass.
        time, stored, peak = np.zeros(len(runs)), np.zeros(len(runs)), np.zeros(len(runs))
        stages = [cost_model.stages[v] for v in cost_model.device_stages(device)]
        layers = [encoder] * sum(s.num_encoder for s in stages) + [decoder] * sum(s.num_decoder for s in stages)
        for layer in layers:
            time = time + layer["fw_ms"] + layer["bw_ms"]
            peak = np.maximum(peak, stored + layer["peak_mb"])
            stored = stored + layer["stored_mb"]
        if any(s.head for s in stages):
            time = time + head["fw_ms"] + head["bw_ms"]
        free = limit - state
        before = (in_flight - 1) * stored if in_flight > 1 else 0.0  # 0 times infinity is not a number
        time = np.where((in_flight * stored <= free) & (before + peak <= free), time, np.inf)
        slowest = np.maximum(slowest, time)
    times = np.full((n, n + 1), np.inf)
    for (i, j), value in zip(runs, slowest.tolist(), strict=True):
        times[i, j] = value
    return times


def objective(times: Sequence[float], pipeline_factor: float, num_replicas: float) -> float:
    longest = max(times)  # 0 times infinity is not a number
    return pipeline_factor * longest + sum(times) / num_replicas if longest < np.inf else np.inf


def every_partition(n: int) -> Iterator[list[tuple[int, int]]]:
    """All cuts of 0..n-1 into runs (begin, end)."""
    for cuts in itertools.product((False, True), repeat=n - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [n]
        yield list(zip([0, *ends[:-1]], ends, strict=True))


def best_partition_by_trying_all(times: FloatArray, pipeline_factor: float, num_replicas: float) -> float:
    n = len(times)
    costs = ([float(times[run]) for run in runs] for runs in every_partition(n))
    return min(objective(cost, pipeline_factor, num_replicas) for cost in costs)


def best_partition_by_every_maximum(times: FloatArray, pipeline_factor: float, num_replicas: float) -> float:
    """The paper's dynamic program, once for each value that the longest micro-batch can have."""
    n = len(times)
    best = np.inf
    for t_max in np.unique(times[np.isfinite(times)]).tolist():
        total = [0.0] + [np.inf] * n
        for end in range(1, n + 1):
            total[end] = min(
                (total[begin] + times[begin, end] for begin in range(end) if times[begin, end] <= t_max), default=np.inf
            )
        best = min(best, pipeline_factor * t_max + total[n] / num_replicas)
    return float(best)


# --- schedules; costs are the seven columns of the native solvers ---


def replay(costs: Sequence[FloatArray], num_devices: int, orders: Orders) -> dict[str, FloatArray] | None:
    """Run device orders by a queue of events. None when they wait for each other.

    Keys: makespan_ms, peak_mb (devices,), start_ms and send_start_ms (M, V, 2).
    """
    forward_ms, backward_ms, stored, forward_peak, backward_extra, send_forward, send_backward = costs
    num_stages = forward_ms.shape[1]
    start, send_start = np.zeros((*forward_ms.shape, 2)), np.zeros((*forward_ms.shape, 2))
    inputs: set[Op] = {(m, 0, 0) for m in range(len(forward_ms))}  # passes whose input has arrived
    waiting = [deque(order) for order in orders]
    outbox: list[deque[Op]] = [deque() for _ in orders]
    busy, sending = [False] * num_devices, [False] * num_devices
    events: list[tuple[float, int, Callable[[], None]]] = []
    numbers = itertools.count()
    now = makespan = 0.0

    def at(time: float, action: Callable[[], None]) -> None:
        heapq.heappush(events, (time, next(numbers), action))

    def successor(op: Op) -> Op | None:
        m, v, backward = op
        if not backward:
            return (m, v + 1, 0) if v + 1 < num_stages else (m, v, 1)
        return (m, v - 1, 1) if v > 0 else None

    def end_pass(device: int, op: Op) -> None:
        nonlocal makespan
        busy[device], makespan = False, now
        follower = successor(op)
        if follower is not None and follower[1] % num_devices == device:
            inputs.add(follower)
        elif follower is not None:
            outbox[device].append(op)

    def end_send(device: int, op: Op) -> None:
        sending[device] = False
        follower = successor(op)
        assert follower is not None
        inputs.add(follower)

    def begin_what_can() -> None:
        for device in range(num_devices):
            if not busy[device] and waiting[device] and waiting[device][0] in inputs:
                op = waiting[device].popleft()
                busy[device] = True
                start[op] = now
                duration = (backward_ms if op[2] else forward_ms)[op[:2]]
                at(now + duration, lambda d=device, o=op: end_pass(d, o))
            if not sending[device] and outbox[device]:
                op = outbox[device].popleft()
                sending[device] = True
                send_start[op] = now
                duration = (send_backward if op[2] else send_forward)[op[:2]]
                at(now + duration, lambda d=device, o=op: end_send(d, o))

    begin_what_can()
    while events:
        now, _, action = heapq.heappop(events)
        action()
        if not events or events[0][0] > now:
            begin_what_can()
    if any(waiting):
        return None
    peaks = []
    for order in orders:
        held = peak = 0.0
        for m, v, backward in order:
            peak = max(peak, held + (backward_extra if backward else forward_peak)[m, v])
            held += -stored[m, v] if backward else stored[m, v]
        peaks.append(peak)
    return {
        "makespan_ms": np.array(makespan),
        "peak_mb": np.array(peaks),
        "start_ms": start,
        "send_start_ms": send_start,
    }


def one_f_one_b(num_micro_batches: int, num_devices: int) -> Orders:
    """Device d runs S - d forwards, then backward and forward in turn, then the backwards that are left."""
    orders: Orders = []
    for device in range(num_devices):
        warm_up = min(num_devices - device, num_micro_batches)
        order: list[Op] = [(m, device, 0) for m in range(warm_up)]
        for m in range(num_micro_batches):
            order.append((m, device, 1))
            if warm_up + m < num_micro_batches:
                order.append((warm_up + m, device, 0))
        orders.append(order)
    return orders


def adaptive(
    costs: Sequence[FloatArray],
    num_devices: int,
    permutation: Sequence[int],
    limit_mb: Sequence[float],
    max_in_flight: int,
) -> Orders | None:
    """The cyclic schedule with real queues; None when it comes to a halt before all work is done.

    Positions in ``permutation`` are what "newer" compares. A micro-batch new to a device is put off while its forward
    peak, or any later backward pass with it in memory, would pass the limit, or too many are in flight.
    """
    _, _, stored, forward_peak, backward_extra, _, _ = costs
    num_stages = stored.shape[1]
    forwards: list[deque[int]] = [deque() for _ in range(num_stages)]
    backwards: list[deque[int]] = [deque() for _ in range(num_stages)]
    forwards[0].extend(range(len(permutation)))
    in_flight: list[set[tuple[int, int]]] = [set() for _ in range(num_devices)]  # (position, stage) held
    memory = [0.0] * num_devices
    newest_forward, newest_backward = [-1] * num_devices, [-1] * num_devices
    orders: Orders = [[] for _ in range(num_devices)]
    progress = True
    while progress:
        progress = False
        next_cycle: list[tuple[deque[int], int]] = []
        for device in range(num_devices):
            stages = range(device, num_stages, num_devices)
            ready_backwards = sorted((backwards[v][0], v) for v in stages if backwards[v])
            ready_forwards = sorted((forwards[v][0], v) for v in stages if forwards[v])
            for one, other in itertools.zip_longest(ready_backwards, ready_forwards):
                if one is not None:
                    position, v = one
                    backwards[v].popleft()
                    m = permutation[position]
                    memory[device] -= stored[m, v]
                    in_flight[device].discard(one)
                    newest_backward[device] = max(newest_backward[device], position)
                    orders[device].append((m, v, 1))
                    if v > 0:
                        next_cycle.append((backwards[v - 1], position))
                    progress = True
                if other is not None:
                    position, v = other
                    m = permutation[position]
                    if position > newest_forward[device]:
                        extras = [backward_extra[permutation[p], u] for p, u in in_flight[device]]
                        extra = max([backward_extra[m, v], *extras])
                        too_full = (
                            memory[device] + forward_peak[m, v] > limit_mb[device]
                            or memory[device] + stored[m, v] + extra > limit_mb[device]
                        )
                        if too_full or newest_forward[device] - newest_backward[device] >= max_in_flight:
                            continue
                        newest_forward[device] = position
                    forwards[v].popleft()
                    memory[device] += stored[m, v]
                    in_flight[device].add(other)
                    orders[device].append((m, v, 0))
                    next_cycle.append((forwards[v + 1] if v + 1 < num_stages else backwards[v], position))
                    progress = True
        for queue, position in next_cycle:
            queue.append(position)
    num_passes = sum(len(order) for order in orders)
    return orders if num_passes == 2 * len(permutation) * num_stages else None


# --- paths ---


def path_length(x: Sequence[int], y: Sequence[int], path: Sequence[int]) -> int:
    return sum(abs(x[a] - x[b]) + abs(y[a] - y[b]) for a, b in itertools.pairwise(path))


def shortest_path_length(x: Sequence[int], y: Sequence[int]) -> int:
    """Held and Karp: the shortest open L1 path through all points."""
    n = len(x)
    best = {(1 << i, i): 0 for i in range(n)}
    for visited in range(1, 1 << n):
        for last in range(n):
            length = best.get((visited, last))
            if length is None:
                continue
            for following in range(n):
                if visited >> following & 1:
                    continue
                key = (visited | 1 << following, following)
                longer = length + abs(x[last] - x[following]) + abs(y[last] - y[following])
                best[key] = min(best.get(key, longer), longer)
    return min(best[(1 << n) - 1, last] for last in range(n))
