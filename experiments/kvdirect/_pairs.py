"""Initiator and target of a system in processes of their own, which run only while it is their turn."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from experiments.environment import REPOSITORY
from experiments.kvdirect._endpoint_process import EndpointSpec, Measured, Opened
from experiments.kvdirect._scatter import Pattern
from experiments.kvdirect._systems import System
from experiments.network import LinkEnd
from llmsys.comm.bootstrap import SECRET_VARIABLE
from llmsys.core.errors import DeadlineError, TransportError

_COMMAND_TIMEOUT_S = 120.0
_CLOSE_TIMEOUT_S = 10.0
_LOOPBACK = LinkEnd(prefix=(), address="127.0.0.1")


class EndpointProcess:
    """A running `_endpoint_process`. Not thread safe."""

    def __init__(self, name: str, *, end: LinkEnd, env: dict[str, str]) -> None:
        self.name = name
        self._connection, theirs = multiprocessing.Pipe()
        module = [sys.executable, "-m", "experiments.kvdirect._endpoint_process"]
        with theirs:
            self._process = subprocess.Popen(
                [*end.prefix, *module, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=_errors_of_this_process(),
                cwd=REPOSITORY,
            )

    def send(self, command: str, *arguments: object) -> None:
        """Starts a command; `answer` must follow. Lets two processes start up at the same time."""
        try:
            self._connection.send((command, arguments))
        except OSError as error:
            raise self._ended(command) from error

    def answer(self, command: str, timeout_s: float = _COMMAND_TIMEOUT_S) -> Any:
        """Raises DeadlineError and TransportError, which show the process, the command and its traceback."""
        if not self._connection.poll(timeout_s):
            raise DeadlineError(
                f"the process {self.name} did not answer",
                expected=f"the end of {command!r} within {timeout_s:g} s",
                found="nothing",
                fix="look at its output above; choose fewer bytes on a slow machine",
            )
        try:
            fine, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._ended(command) from error
        if fine:
            return value
        raise TransportError(
            f"the process {self.name} failed in {command!r}",
            expected="a transfer without errors",
            found=value,
            fix="see the traceback of the process above",
        )

    def ask(self, command: str, *arguments: object) -> Any:
        self.send(command, *arguments)
        return self.answer(command)

    def _ended(self, command: str) -> TransportError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_TIMEOUT_S)
        return TransportError(
            f"the process {self.name} has ended",
            expected=f"an answer to {command!r}",
            found=f"exit code {self._process.returncode}",
            fix="see its output above",
        )

    def stop(self) -> None:
        """Returns when all its threads stand still."""
        self._process.send_signal(signal.SIGSTOP)
        # Leaves it to be reaped by the Popen object if it has ended instead.
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def cpu_s(self) -> float:
        """Processor time that all its threads have used, to the nanosecond."""
        # The clock of another process, as clock_getcpuclockid makes it; /proc/<pid>/stat counts in steps of 10 ms.
        return time.clock_gettime(~self._process.pid << 3 | 2)

    def close(self) -> None:
        """Lets it end in good order, and ends it if it does not."""
        self._connection.close()
        self.go_on()
        try:
            self._process.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _errors_of_this_process() -> int | None:
    """Where what a library prints should go: standard output is for results. A notebook has no such file."""
    try:
        return sys.stderr.fileno()
    except (OSError, AttributeError):
        return None


class Pair:
    """The two processes of one system; "memcpy" has only one. Made by `open_pairs`."""

    def __init__(self, system: System, processes: Sequence[EndpointProcess]) -> None:
        self.system = system
        self._processes = processes
        self.missing = ""
        self.description: dict[str, str] = {}

    def open(self, size_bytes: int, ends: Sequence[LinkEnd], *, huge_pages: bool) -> None:
        for number, (process, end) in enumerate(zip(self._processes, ends, strict=False)):
            spec = EndpointSpec(
                name=process.name,
                kind=self.system.kind,
                options=self.system.options,
                host=end.address,
                size_bytes=size_bytes,
                target=number == 1,
                allocated=self.system.allocated,
                huge_pages=huge_pages,
            )
            process.send("open", spec)
        opened: list[Opened] = [process.answer("open") for process in self._processes]
        self.missing, self.description = opened[0].missing, opened[0].description
        if len(opened) == 2 and not self.missing:
            self._processes[0].ask("connect", opened[1])

    def measure(self, pattern: Pattern, *, coalesce: bool = True, verify: bool = False) -> Measured:
        """One transfer. Raises TransportError if its contents are wrong, where `verify` asks for a look at them."""
        measured: Measured = self._processes[0].ask("measure", pattern, coalesce, verify)
        if measured.num_wrong_bytes:
            raise TransportError(
                f"{self.system.name} moved wrong bytes",
                expected=f"{pattern.size_bytes} bytes, each as at the target",
                found=f"{measured.num_wrong_bytes} wrong ones ({pattern.kind}, blocks of {pattern.block_bytes})",
                fix="report this: a transport must never do that",
            )
        return measured

    def round_trips(self, count: int, payload_bytes: int) -> list[float]:
        """Seconds of each of `count` messages there and back."""
        times: list[float] = self._processes[0].ask("round_trips", count, payload_bytes)
        return times

    def idle_cpu_percent(self, seconds: float) -> list[float]:
        """Of one core, used by each process (initiator, target) while nothing is transferred. Blocks for `seconds`."""
        before = [process.cpu_s() for process in self._processes]
        started = time.monotonic()
        time.sleep(seconds)
        after = [process.cpu_s() for process in self._processes]
        elapsed = time.monotonic() - started
        return [100 * (b - a) / elapsed for a, b in zip(before, after, strict=True)]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Its processes run within the block; all others are stopped, so that none takes a core from another."""
        for process in self._processes:
            process.go_on()
        yield
        for process in self._processes:
            process.stop()


@contextmanager
def open_pairs(
    systems: Sequence[System],
    size_bytes: Sequence[int],
    ends: Sequence[LinkEnd] = (_LOOPBACK, _LOOPBACK),
    *,
    huge_pages: bool = False,
) -> Iterator[list[Pair]]:
    """Pairs of processes of `systems`, connected and stopped, in their order; all are ended with the block.

    size_bytes: of the memory of each side, for each system. ends: where initiators and targets run. huge_pages: asked
    for memory that no transport allocates.
    A pair whose transport cannot be used here says why in `missing`, and has no processes.
    """
    base = {**os.environ, SECRET_VARIABLE: secrets.token_hex(32), "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        pairs = []
        for system in systems:
            processes = []
            for role, end in zip(("initiator", "target"), ends, strict=False):
                if role == "target" and system.kind == "memcpy":
                    continue
                process = EndpointProcess(f"{system.name}: {role}", end=end, env={**base, **system.env})
                stack.callback(process.close)
                processes.append(process)
            pairs.append(Pair(system, processes))
        for pair, size in zip(pairs, size_bytes, strict=True):
            pair.open(size, ends, huge_pages=huge_pages)
            for process in pair._processes:
                process.stop()
        yield pairs


def rotated(pairs: Sequence[Pair], repeat: int) -> list[Pair]:
    """All of them, beginning with another one at each repeat."""
    first = repeat % len(pairs)
    return [*pairs[first:], *pairs[:first]]
