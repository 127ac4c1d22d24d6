"""Ranks on this machine: start them, get their results, and leave nothing behind; and who am I under torchrun.

A program for `launch` uses `init_from_env` and `current_rank` only, so it runs under ``torchrun`` unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import pickle
import secrets
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import IO, Any, TypeVar

from llmsys.comm.bootstrap import SECRET_VARIABLE
from llmsys.comm.rank_process import DUMP_SIGNAL, Job, ModuleSource, Report
from llmsys.core.errors import ConfigError, DeadlineError, InputError, LlmsysError

T = TypeVar("T")

_LOOPBACK = "127.0.0.1"
_GRACE_S = 3.0  # from the polite signal to the one that cannot be refused
_SETTLE_S = 0.3  # after a failure, for reports under way: the first to arrive need not be the first to have failed
_STACK_DUMP_S = 0.3
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_BOOT = "import sys; sys.path[:] = {path!r}; from llmsys.comm.rank_process import main; main(sys.argv[1:])"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """This process's place in the job: ``local_...`` counts within one machine."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def current_rank() -> RankInfo:
    """Read this process's place from the environment, as `launch` and torchrun set it. Raises ConfigError."""
    found = {name: os.environ.get(name, "") for name in _RANK_VARIABLES}
    if not all(value.isdecimal() for value in found.values()):
        raise ConfigError(
            "this process is not a rank of a job",
            expected=f"whole numbers in the environment variables {', '.join(_RANK_VARIABLES)}",
            found=", ".join(f"{name}={value!r}" for name, value in found.items()),
            fix="start the program with torchrun or llmsys.comm.launch.launch",
        )
    rank, local_rank, world_size, local_world_size = (int(value) for value in found.values())
    return RankInfo(rank=rank, local_rank=local_rank, world_size=world_size, local_world_size=local_world_size)


def init_from_env(backend: str | None = None, *, timeout_s: float = 300.0) -> RankInfo:
    """Initialise torch.distributed's default group from the environment, unless it is there already.

    ``backend`` defaults to gloo for CPU tensors, and nccl beside it for CUDA tensors where there are GPUs; then the
    current device becomes that of the local rank. ``timeout_s`` bounds the meeting of the ranks, and is the group's
    own limit on later operations. Blocks until all ranks are there. Raises ConfigError and DeadlineError.
    """
    import torch
    import torch.distributed as dist

    info = current_rank()
    if dist.is_initialized():
        return info
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(info.local_rank % torch.cuda.device_count())
    backend = backend or ("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        dist.init_process_group(backend, init_method="env://", timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise DeadlineError(
            f"rank {info.rank} of {info.world_size} could not join the process group at {address}",
            expected=f"all {info.world_size} ranks within {timeout_s:g} s, and backend {backend!r}",
            found=str(error).partition("\n")[0],
            fix="check that all ranks run and reach MASTER_ADDR:MASTER_PORT, or raise timeout_s",
        ) from error
    return info


def launch(
    function: Callable[..., T],
    num_ranks: int,
    *args: object,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    backend: str | None = "gloo",
) -> list[T]:
    """Run ``function(*args)`` in ``num_ranks`` new processes; its results in the order of the ranks.

    Each rank is a fresh interpreter (spawned, never forked) with this one's import path, working directory, output
    streams and environment, changed by ``env``, and with torchrun's variables, so that `init_from_env` works. It also
    gets LLMSYS_JOB_SECRET, random unless the environment or ``env`` has it, and sockets of the collective libraries
    bound to loopback. The rendezvous is a store inside this process on a free loopback port. With a ``backend`` the
    default process group is ready when ``function`` starts, and is taken down when all ranks have ended; with None
    torch is not even imported.

    ``function`` and ``args`` are pickled: a function at the top of a module, also one that only its file leads to
    (a test module, a script). Results return as pickles, by value; nothing is put into shared memory.

    Blocks until all ranks have ended. If one fails, or ``timeout_s`` passes, all are ended with their children, by
    SIGTERM and after a grace period SIGKILL; so too on KeyboardInterrupt. If this process (or the thread that called)
    dies, the kernel ends the ranks. Raises LlmsysError that shows rank and traceback, or signal, of the first failure
    (the exception is its ``__cause__``), DeadlineError with the ranks that were not done (their stacks are on standard
    error), InputError for what cannot be pickled.
    """
    if num_ranks < 1 or not 0 < timeout_s < math.inf:
        raise InputError(
            "launch needs ranks and time",
            expected="num_ranks of at least 1, a finite timeout_s above 0",
            found=f"num_ranks={num_ranks}, timeout_s={timeout_s}",
            fix="set num_ranks and timeout_s",
        )
    deadline_s = time.monotonic() + timeout_s
    job = Job(source=_source_of(function), call=_pickle_call(function, args), backend=backend, timeout_s=timeout_s)
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(_rendezvous())
        job_file = stack.enter_context(tempfile.TemporaryFile())
        job_file.write(pickle.dumps(job))
        job_file.flush()
        ranks: list[_Rank] = []
        env = {SECRET_VARIABLE: os.environ.get(SECRET_VARIABLE) or secrets.token_hex(32), **(env or {})}
        try:
            for rank in range(num_ranks):
                ranks.append(_start(rank, num_ranks, port, job_file, env))
            _collect(ranks, deadline_s, timeout_s)
        finally:
            _end(ranks)
    _check_exits(ranks)
    return [pickle.loads(rank.outcome.result) for rank in ranks if rank.outcome is not None]


def _source_of(function: Callable[..., Any]) -> ModuleSource | None:
    while isinstance(function, functools.partial):
        function = function.func
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    if module is None:
        return None
    spec = getattr(module, "__spec__", None)
    name = spec.name if module.__name__ == "__main__" and spec is not None else module.__name__
    return ModuleSource(name=name, file=getattr(module, "__file__", None))


def _pickle_call(function: Callable[..., Any], args: tuple[object, ...]) -> bytes:
    try:
        return pickle.dumps((function, args))
    except Exception as error:
        raise InputError(
            "the function or its arguments cannot be sent to the ranks",
            expected="a function at the top of a module, and arguments that pickle can write",
            found=f"{getattr(function, '__qualname__', function)}: {error}",
            fix="move the function out of the class, function or lambda that holds it",
        ) from error


@contextlib.contextmanager
def _rendezvous() -> Iterator[int]:
    """A store for the ranks to meet, in this process; its port. The socket is bound first, so no port is raced for."""
    import torch.distributed as dist

    with socket.socket() as listener:
        listener.bind((_LOOPBACK, 0))
        listener.listen(128)
        port: int = listener.getsockname()[1]
        store = dist.TCPStore(  # type: ignore[attr-defined]
            _LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    try:
        yield port
    finally:
        del store


@dataclass(slots=True, kw_only=True)
class _Rank:
    """A started process. It is reaped only in `_end`, so that its number cannot pass to another process before."""

    number: int
    process: subprocess.Popen[bytes]
    pid_fd: int
    report_fd: int
    received: bytearray = field(default_factory=bytearray)
    outcome: Report | None = None
    died_at_s: float | None = None

    @property
    def failed(self) -> bool:
        return self.died_at_s is not None or (self.outcome is not None and self.outcome.failure is not None)


def _start(rank: int, num_ranks: int, port: int, job_file: IO[bytes], env: Mapping[str, str]) -> _Rank:
    read_fd, write_fd = os.pipe()
    boot = _BOOT.format(path=[os.path.abspath(entry) for entry in sys.path])
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", boot, str(write_fd), str(job_file.fileno()), str(os.getpid())],
            stdin=subprocess.PIPE,
            pass_fds=(write_fd, job_file.fileno()),
            env=_environment(rank, num_ranks, port, env),
            start_new_session=True,  # a process group of its own, so that its children can be ended with it
        )
    except BaseException:
        os.close(read_fd)
        raise
    finally:
        os.close(write_fd)
    return _Rank(number=rank, process=process, pid_fd=os.pidfd_open(process.pid), report_fd=read_fd)


def _environment(rank: int, num_ranks: int, port: int, env: Mapping[str, str]) -> dict[str, str]:
    defaults = {
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",  # as torchrun does: ranks share the cores
    }
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": num_ranks,
        "LOCAL_WORLD_SIZE": num_ranks,
        "MASTER_PORT": port,
    }
    agent = {"MASTER_ADDR": _LOOPBACK, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return defaults | dict(os.environ) | dict(env) | {name: str(value) for name, value in place.items()} | agent


def _collect(ranks: Sequence[_Rank], deadline_s: float, timeout_s: float) -> None:
    """Read every rank's report and see it exit; raises at the first failure and at the deadline."""
    with selectors.DefaultSelector() as selector:
        for rank in ranks:
            selector.register(rank.report_fd, selectors.EVENT_READ, rank)
        limit_s = deadline_s
        while selector.get_map() and (remaining_s := limit_s - time.monotonic()) > 0:
            for key, _ in selector.select(remaining_s):
                rank = key.data
                if _receive(rank):
                    continue
                selector.unregister(rank.report_fd)
                if rank.failed:
                    limit_s = min(limit_s, time.monotonic() + _SETTLE_S)
    if any(rank.failed for rank in ranks):
        raise _first_failure(ranks)
    if all(rank.outcome is not None for rank in ranks):
        _release(ranks)
        if _wait_for_exit(ranks, deadline_s):
            return
    raise _too_late(ranks, timeout_s)


def _receive(rank: _Rank) -> bool:
    """Take what the rank has written; False when that was all."""
    if data := os.read(rank.report_fd, 1 << 20):
        rank.received += data
        return True
    try:
        rank.outcome = pickle.loads(rank.received)
    except Exception:  # it ended before or within its report
        rank.died_at_s = time.monotonic()
        _wait_for_exit([rank], rank.died_at_s + _GRACE_S)
    rank.received.clear()
    return False


def _release(ranks: Sequence[_Rank]) -> None:
    for rank in ranks:
        assert rank.process.stdin is not None
        rank.process.stdin.close()


def _wait_for_exit(ranks: Sequence[_Rank], deadline_s: float) -> bool:
    """Whether all have exited by the deadline."""
    waiting = {rank.pid_fd for rank in ranks}
    while waiting:
        remaining_s = max(0.0, deadline_s - time.monotonic())
        exited, _, _ = select.select(sorted(waiting), [], [], remaining_s)
        if not exited:
            return False
        waiting -= set(exited)
    return True


def _first_failure(ranks: Sequence[_Rank]) -> LlmsysError:
    """A death comes before exceptions, which then are its consequences; else the earliest exception counts."""
    dead = [rank for rank in ranks if rank.died_at_s is not None]
    if dead:
        return _death(min(dead, key=lambda rank: rank.died_at_s or 0.0), len(ranks))
    failures = [(rank.outcome.at_s, rank.number, rank.outcome) for rank in ranks if rank.outcome and rank.failed]
    _, number, outcome = min(failures, key=lambda failure: failure[:2])
    error = LlmsysError(
        f"rank {number} of {len(ranks)} failed: {outcome.summary}",
        expected="every rank returns from the launched function",
        found=f"in rank {number}\n{outcome.failure}",
        fix="see the traceback of the rank above; all ranks were ended",
    )
    with contextlib.suppress(Exception):  # its class may not load here; the text above has all of it
        error.__cause__ = None if outcome.error is None else pickle.loads(outcome.error)
    return error


def _death(rank: _Rank, num_ranks: int) -> LlmsysError:
    _end([rank])
    code = rank.process.returncode
    if code < 0:
        how = f"killed by signal {-code} ({signal.Signals(-code).name})"
    else:
        how = f"exited with code {code}"
    return LlmsysError(
        f"rank {rank.number} of {num_ranks} ended: {how}",
        expected="every rank returns from the launched function",
        found=f"{how}, without a report",
        fix="see the rank's own output; signal 9 often means that memory ran out",
    )


def _too_late(ranks: Sequence[_Rank], timeout_s: float) -> DeadlineError:
    late = [rank for rank in ranks if rank.outcome is None] or list(ranks)
    for rank in late:
        with contextlib.suppress(ProcessLookupError):
            rank.process.send_signal(DUMP_SIGNAL)
    _wait_for_exit(late, time.monotonic() + _STACK_DUMP_S)
    done = [rank.number for rank in ranks if rank not in late]
    return DeadlineError(
        f"ranks {[rank.number for rank in late]} of {len(ranks)} did not end within {timeout_s:g} s",
        expected="every rank returns from the launched function",
        found=f"ranks {done} had returned; the stacks of the others are on standard error",
        fix="look for what those ranks wait for, or raise timeout_s",
    )


def _end(ranks: Sequence[_Rank]) -> None:
    """End and reap the ranks and their children. May be called again."""
    ranks = [rank for rank in ranks if rank.process.returncode is None]
    for kind in (signal.SIGTERM, signal.SIGKILL):
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.process.pid, kind)
        _wait_for_exit(ranks, time.monotonic() + _GRACE_S)
    for rank in ranks:
        rank.process.wait(timeout=10 * _GRACE_S)
        os.close(rank.report_fd)
        os.close(rank.pid_fd)
        if rank.process.stdin is not None:
            rank.process.stdin.close()


def _check_exits(ranks: Sequence[_Rank]) -> None:
    for rank in ranks:
        if rank.process.returncode != 0:
            raise _death(rank, len(ranks))
