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
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from llmsys.comm.launch import init_from_env
from llmsys.core.config import build
from llmsys.core.errors import InputError
from llmsys.lancet.costs import MessageTable
from llmsys.lancet.runtime import irregular

P = TypeVar("P")
R = TypeVar("R")

_KINDS = ("dense", "there", "back")


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageTimes:
    """Of one kind of all-to-all, by the bytes of a rank's buffer: the caller's time to start it, the time from then
    until all is there, and the caller's time to take over what is there.
    """

    start: MessageTable
    lane: MessageTable
    wait: MessageTable


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
    """Measure all-to-alls of these sizes among the ranks of ``group``, float32, each alone on an idle link.

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
    for size in sizes:
        rounds = [_round(found, size, row_bytes, num_experts) for _ in range(num_repeats + 1)][1:]
        for kind in _KINDS:
            measured[kind].append(tuple(statistics.median(r[kind][step] for r in rounds) for step in range(3)))
    return _agreed(found, sizes, measured)


def _round(group: dist.ProcessGroup, size: int, row_bytes: int, num_experts: int) -> dict[str, tuple[float, ...]]:
    """One all-to-all of each kind: ms of start, lane and wait."""
    rows = size // row_bytes // num_experts
    x = torch.ones(rows * num_experts, row_bytes // 4)
    order = torch.arange(len(x))[:, None]
    buffer, sent = irregular.dispatch(x, order % num_experts, order // num_experts, num_experts)
    name = group.group_name
    times: dict[str, tuple[float, ...]] = {}
    _, times["dense"] = _timed(group, lambda: _start_dense(buffer, group), _arrive_dense, lambda _: None)
    (there, received), times["there"] = _timed(
        group, lambda: irregular.start(buffer, sent, name, "measured"), _arrive, irregular.wait
    )
    _, times["back"] = _timed(
        group,
        lambda: irregular.start_back(there, received, sent, name, "measured back"),
        _arrive,
        irregular.wait_back,
    )
    return times


def _start_dense(buffer: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    sizes = [len(buffer) // group.size()] * group.size()
    started: torch.Tensor = torch.ops._c10d_functional.all_to_all_single(buffer, sizes, sizes, group.group_name)
    return started


def _arrive_dense(pending: torch.Tensor) -> None:
    functional.wait_tensor(pending)  # type: ignore[no-untyped-call]


def _arrive(pending: irregular.Pending) -> None:
    pending.handle.wait()


def _timed(
    group: dist.ProcessGroup, start: Callable[[], P], arrive: Callable[[P], None], wait: Callable[[P], R]
) -> tuple[R, tuple[float, float, float]]:
    dist.barrier(group)
    times = [time.perf_counter()]
    pending = start()
    times.append(time.perf_counter())
    arrive(pending)
    times.append(time.perf_counter())
    result = wait(pending)
    times.append(time.perf_counter())
    start_ms, lane_ms, wait_ms = np.diff(times) * 1e3
    return result, (start_ms, lane_ms, wait_ms)


def _agreed(group: dist.ProcessGroup, sizes: Sequence[int], mine: dict[str, list[tuple[float, ...]]]) -> LinkTimes:
    everyones: list[dict[str, list[tuple[float, ...]]]] = [{} for _ in range(group.size())]
    dist.all_gather_object(everyones, mine, group=group)
    slowest = {kind: np.max([ranks[kind] for ranks in everyones], axis=0) for kind in _KINDS}

    def table(kind: str, step: int) -> MessageTable:
        # Noise must not make a larger message faster.
        ms = np.maximum.accumulate(slowest[kind][:, step])
        return MessageTable(sizes_bytes=tuple(map(float, sizes)), ms=tuple(ms.tolist()))

    found = {kind: MessageTimes(start=table(kind, 0), lane=table(kind, 1), wait=table(kind, 2)) for kind in _KINDS}
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
