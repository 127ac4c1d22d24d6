"""All-to-alls measured on the group that will run them: on their lane, and what they take of the caller's time.

torchrun --nproc-per-node=2 -m llmsys.lancet.runtime.messages --sizes-mb 0.25 0.5 1 2 --output link.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed import distributed_c10d

from llmsys.comm.launch import init_from_env
from llmsys.core.config import build
from llmsys.core.errors import InputError
from llmsys.lancet.costs import MessageTable
from llmsys.lancet.runtime import irregular

P = TypeVar("P")
R = TypeVar("R")

_KINDS = ("dense", "there", "back")
_STEPS = ("start", "lane", "wait", "stream", "taken")
_MAX_STREAM = 8
_WORK_FACTOR = 1.3
_MAX_REST_MS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageTimes:
    """Of one kind of all-to-all, by the bytes of a rank's buffer.

    ``start``: the caller's time to start it. ``lane``: from then until all is there, alone on an idle link. ``wait``:
    the caller's time to take over what is there. ``stream``: in place of ``lane``, for each of several that are under
    way, as many as make up the largest size, 8 at most: what an idle link lets pass at once is shared by all.
    ``taken``: the part of ``lane`` by which computation beside it is delayed, since sending needs a processor too.
    """

    start: MessageTable
    lane: MessageTable
    wait: MessageTable
    stream: MessageTable
    taken: MessageTable


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTimes:
    """``dense``: torch's functional all-to-all. ``there`` and ``back``: those of `irregular`, with and without counts.

    The sizes of irregular ones are those of their filled rows. Equal on all ranks of the group: the slowest's.
    """

    num_ranks: int
    dense: MessageTimes
    there: MessageTimes
    back: MessageTimes

    def of(self, kind: str) -> MessageTimes:
        return {"dense": self.dense, "there": self.there, "back": self.back}[kind]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LinkTimes:
        """Raises InputError for anything that `to_json` does not write."""
        try:
            return build(cls, json.loads(text))
        except ValueError as error:
            raise InputError(
                "these are no times of all-to-alls",
                expected="what LinkTimes.to_json wrote",
                found=str(error).partition("\n")[0],
                fix="measure them again: python -m llmsys.lancet.runtime.messages, under torchrun",
            ) from error


def measure_all_to_all(
    sizes_bytes: Sequence[int],
    group: dist.ProcessGroup | None = None,
    *,
    row_bytes: int = 1024,
    num_local_experts: int = 2,
    num_repeats: int = 7,
) -> LinkTimes:
    """Measure all-to-alls of these sizes among the ranks of ``group``, float32, on an idle link.

    ``sizes_bytes``: of the buffer of one rank, 1/ranks of which goes to each, itself included. Blocks; all ranks call
    it with equal arguments. Raises InputError for fewer than two sizes, or one too small for a row to each expert.
    """
    found = group if group is not None else dist.group.WORLD
    assert found is not None
    num_experts = found.size() * num_local_experts
    if len(set(sizes_bytes)) < 2 or min(sizes_bytes) < num_experts * row_bytes:
        raise InputError(
            "these sizes cannot be measured",
            expected=f"two or more sizes of at least {num_experts} rows of {row_bytes} bytes, one for each expert",
            found=f"sizes_bytes {list(sizes_bytes)}",
            fix="set sizes_bytes or row_bytes",
        )
    sizes = sorted(set(sizes_bytes))
    measured: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in _KINDS}
    rest_ms = 0.0
    for size in reversed(sizes):
        number = min(_MAX_STREAM, round(sizes[-1] / size))
        rounds = [_round(found, size, row_bytes, num_experts, number, rest_ms) for _ in range(num_repeats + 1)][1:]
        for kind in _KINDS:
            medians = [statistics.median(r[kind][step] for r in rounds) for step in range(len(_STEPS))]
            measured[kind].insert(0, tuple(medians))
            rest_ms = min(_MAX_REST_MS, max(rest_ms, medians[_STEPS.index("lane")]))
    return _agreed(found, sizes, measured)


class _Message(Generic[P, R]):
    """How to send one: ``start`` it, let it ``arrive``, and take it over (``wait``)."""

    def __init__(self, start: Callable[[], P], arrive: Callable[[P], None], wait: Callable[[P], R]) -> None:
        self.start, self.arrive, self.wait = start, arrive, wait


def _timed(
    group: dist.ProcessGroup, message: _Message[P, R], num_in_stream: int, rest_ms: float
) -> tuple[R, tuple[float, ...]]:
    _rest(group, rest_ms)
    times = [time.perf_counter()]
    pending = message.start()
    times.append(time.perf_counter())
    message.arrive(pending)
    times.append(time.perf_counter())
    result = message.wait(pending)
    times.append(time.perf_counter())
    start_ms, lane_ms, wait_ms = np.diff(times) * 1e3
    _rest(group, rest_ms)
    stream_ms = _stream_ms(group, message, num_in_stream) if num_in_stream > 1 else lane_ms
    _rest(group, rest_ms)
    return result, (start_ms, lane_ms, wait_ms, stream_ms, _taken_ms(group, message, lane_ms))


def _rest(group: dist.ProcessGroup, rest_ms: float) -> None:
    """A link of limited rate lets more pass after a pause, as after the computation between the messages of a step."""
    time.sleep(rest_ms / 1e3)
    dist.barrier(group)


def _stream_ms(group: dist.ProcessGroup, message: _Message[P, R], number: int) -> float:
    """Of each of ``number`` messages that are started at once."""
    pending = [message.start()]
    begin_s = time.perf_counter()
    pending += [message.start() for _ in range(number - 1)]
    for one in pending:
        message.arrive(one)
    end_s = time.perf_counter()
    for one in pending:
        message.wait(one)
    return (end_s - begin_s) * 1e3 / number


def _taken_ms(group: dist.ProcessGroup, message: _Message[P, R], lane_ms: float) -> float:
    """By how much the message delays computation that goes on beside it, longer than it takes."""
    a = torch.ones(96, 96)

    def work_ms(count: int) -> float:
        begin_s = time.perf_counter()
        for _ in range(count):
            a @ a
        return (time.perf_counter() - begin_s) * 1e3

    unit_ms = work_ms(10) / 10
    count = 1 + int(_WORK_FACTOR * lane_ms / unit_ms)
    alone_ms = work_ms(count)
    dist.barrier(group)
    pending = message.start()
    beside_ms = work_ms(count)
    message.arrive(pending)
    message.wait(pending)
    return float(min(max(0.0, beside_ms - alone_ms), lane_ms))


def _round(
    group: dist.ProcessGroup, size: int, row_bytes: int, num_experts: int, num_in_stream: int, rest_ms: float
) -> dict[str, tuple[float, ...]]:
    """One all-to-all of each kind: ms of each of `_STEPS`. Between messages the link is idle for ``rest_ms``."""
    rows = size // row_bytes // num_experts
    x = torch.ones(rows * num_experts, row_bytes // 4)
    order = torch.arange(len(x))[:, None]
    buffer, sent = irregular.dispatch(x, order % num_experts, order // num_experts, num_experts)
    name = group.group_name
    times: dict[str, tuple[float, ...]] = {}

    def timed(kind: str, message: _Message[P, R]) -> R:
        result, times[kind] = _timed(group, message, num_in_stream, rest_ms)
        return result

    timed("dense", _Message(lambda: _start_dense(buffer, group), _arrive_dense, lambda _: None))
    there, received = timed(
        "there", _Message(lambda: irregular.start(buffer, sent, name, "measured"), _arrive, irregular.wait)
    )
    start_back = lambda: irregular.start_back(there, received, sent, name, "measured back")  # noqa: E731
    timed("back", _Message(start_back, _arrive, irregular.wait_back))
    return times


def group_of(name: str) -> dist.ProcessGroup:
    """The group that functional collectives know by this name."""
    found: dist.ProcessGroup = distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]
    return found


def _start_dense(buffer: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    sizes = [len(buffer) // group.size()] * group.size()
    started: torch.Tensor = torch.ops._c10d_functional.all_to_all_single(buffer, sizes, sizes, group.group_name)
    return started


def _arrive_dense(pending: torch.Tensor) -> None:
    functional.wait_tensor(pending)  # type: ignore[no-untyped-call]


def _arrive(pending: irregular.Pending) -> None:
    pending.handle.wait()


def _agreed(group: dist.ProcessGroup, sizes: Sequence[int], mine: dict[str, list[tuple[float, ...]]]) -> LinkTimes:
    everyones: list[dict[str, list[tuple[float, ...]]]] = [{} for _ in range(group.size())]
    dist.all_gather_object(everyones, mine, group=group)
    slowest = {kind: np.max([ranks[kind] for ranks in everyones], axis=0) for kind in _KINDS}

    def table(kind: str, step: int) -> MessageTable:
        # Noise must not make a larger message faster.
        ms = np.maximum.accumulate(slowest[kind][:, step])
        return MessageTable(sizes_bytes=tuple(map(float, sizes)), ms=tuple(ms.tolist()))

    found = {kind: MessageTimes(**{name: table(kind, step) for step, name in enumerate(_STEPS)}) for kind in _KINDS}
    return LinkTimes(num_ranks=group.size(), dense=found["dense"], there=found["there"], back=found["back"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m llmsys.lancet.runtime.messages", description=__doc__)
    parser.add_argument("--sizes-mb", type=float, nargs="+", required=True, help="bytes of a rank's buffer / 10^6")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, written by rank 0")
    parser.add_argument("--row-bytes", type=int, default=1024)
    parser.add_argument("--timeout-s", type=float, default=300.0)
    given = parser.parse_args(arguments)
    rank = init_from_env(timeout_s=given.timeout_s).rank
    found = measure_all_to_all([int(size * 1e6) for size in given.sizes_mb], row_bytes=given.row_bytes)
    if rank == 0:
        given.output.write_text(found.to_json(), encoding="utf-8")
        print(found.to_json(), end="")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
