"""Runs measured training steps on two ranks that are joined by a link of limited rate.

The rate is chosen for each model such that its all-to-alls take a given share of a step without overlap, on this
machine, whatever its speed: a first run over a fast link says how long the computation takes.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from experiments.environment import REPOSITORY
from experiments.lancet._measured_job import NUM_CHOICES, Job, Sample
from experiments.network import Link, limited_link
from llmsys.core.config import build
from llmsys.core.errors import DeadlineError, PeerLostError

_FAST_GBIT_PER_S = 10.0
_NUM_RANKS = 2
# Memory that a step frees is kept for the next one, so that a step does not pay for new pages now and then.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "1073741824"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One sample, and the link that it was measured on: ``rate_gbit_per_s`` in each direction, headers included.

    ``compute_ms``: of a step without its waits, before the rate was chosen.
    """

    sample: Sample
    rate_gbit_per_s: float
    compute_ms: float


def measure(job: Job, comm_share: float) -> Iterator[list[Measured]]:
    """The samples of one model after another. ``comm_share``: of all-to-alls in a step without overlap.

    Raises InputError where no link can be made here, DeadlineError and PeerLostError with a rank's output.
    """
    with limited_link(_FAST_GBIT_PER_S) as link, _ranks(job, link) as ranks:
        for _ in job.models:
            rate = compute_ms = 0.0
            for _ in range(NUM_CHOICES):
                told = ranks.receive()
                compute_ms = told["compute_ms"]
                rate = _rate(link, told, comm_share / (1 - comm_share) * compute_ms, rate)
                link.limit(rate)
                ranks.answer()
            found = [build(Sample, sample) for sample in ranks.receive()["samples"]]
            link.limit(_FAST_GBIT_PER_S)
            yield [Measured(sample=s, rate_gbit_per_s=rate, compute_ms=compute_ms) for s in found]


def _rate(link: Link, told: dict[str, float], comm_ms: float, before: float) -> float:
    """At which all-to-alls take ``comm_ms``; corrected, where they were measured at the rate ``before``.

    The link's bucket is full after a time without messages, so they are faster than the rate says.
    """
    if not before:
        return told["link_bytes"] * 8 / 1e6 / link.payload_share / comm_ms
    return min(before * told["waited_ms"] / comm_ms, _FAST_GBIT_PER_S)


class _Ranks:
    """The processes, and the conversation with rank 0."""

    def __init__(self, job: Job, processes: list[subprocess.Popen[bytes]], errors: IO[bytes]) -> None:
        self._job, self._processes, self._errors = job, processes, errors
        self._pending = b""

    def receive(self) -> dict[str, Any]:
        """The next message of rank 0, within the job's limit."""
        output = self._processes[0].stdout
        assert output is not None
        deadline_s = time.monotonic() + self._job.timeout_s
        while b"\n" not in self._pending:
            ended = [rank for rank, process in enumerate(self._processes) if process.poll() is not None]
            readable, _, _ = select.select([output], [], [], 0.2)
            data = os.read(output.fileno(), 1 << 20) if readable else b""
            self._pending += data
            if b"\n" not in self._pending and not data and ended:
                raise PeerLostError(
                    f"rank {ended[0]} of the measured step ended",
                    expected="samples of every model",
                    found=self._tail(),
                    fix="see its output",
                )
            if time.monotonic() > deadline_s:
                raise DeadlineError(
                    f"rank 0 of the measured step sent nothing within {self._job.timeout_s:g} s",
                    expected="the samples of a model",
                    found=self._tail() or "no output",
                    fix="raise settings.timeout_s, or measure fewer repeats",
                )
        line, _, self._pending = self._pending.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def answer(self) -> None:
        pipe = self._processes[0].stdin
        assert pipe is not None
        pipe.write(b"go on\n")
        pipe.flush()

    def _tail(self) -> str:
        size = os.fstat(self._errors.fileno()).st_size
        return os.pread(self._errors.fileno(), 4000, max(0, size - 4000)).decode(errors="replace")


@contextmanager
def _ranks(job: Job, link: Link) -> Iterator[_Ranks]:
    """Ranks that have ended when the block has."""
    environment = {**os.environ, **_ALLOCATOR, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile() as errors:
        job_file = Path(directory) / "job.json"
        job_file.write_text(json.dumps(asdict(job)), encoding="utf-8")
        try:
            for rank, end in enumerate(link.ends):
                arguments = [str(job_file), str(rank), str(_NUM_RANKS), link.ends[0].address, str(os.getpid())]
                processes.append(
                    subprocess.Popen(
                        [*end.prefix, sys.executable, "-m", "experiments.lancet._measured_worker", *arguments],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        cwd=REPOSITORY,
                        env=environment,
                    )
                )
            yield _Ranks(job, processes, errors)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.communicate()
