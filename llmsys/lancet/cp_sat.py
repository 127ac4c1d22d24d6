"""Runs OR-Tools in a process of its own.

OR-Tools brings its own protobuf and abseil, and a process in which another library brings these too (NIXL's, for one)
crashes. So the programs are made and solved in a child, which is started when it is first needed, imports no more than
that, and ends with this process.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import IO, Any, ParamSpec, TypeVar, cast

from llmsys.core.errors import ConfigError, DeadlineError, LlmsysError

P = ParamSpec("P")
T = TypeVar("T")

_BOOT = "import sys; sys.path[:] = {path!r}; from llmsys.lancet.cp_sat import serve; serve()"
_LENGTH = struct.Struct("<Q")
# Solvers have limits of their own; this is for a child that hangs.
DEADLINE_S = 600.0


def or_tools() -> ModuleType:
    """For functions that `solve_apart` calls. ConfigError if OR-Tools is missing."""
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise ConfigError(
            "constraint programs need OR-Tools",
            expected="the package ortools",
            found=str(error),
            fix="install ortools, or set axis_solver to 'propagate' and weight_gradients to 'greedy'",
        ) from error
    return cp_model


class _Child:
    def __init__(self) -> None:
        self.owner = os.getpid()
        # What is preloaded into this process (a sanitizer) is for this one.
        env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOT.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
        )

    @property
    def usable(self) -> bool:
        # A fork shares the pipes with its parent, whose answers it would take.
        return self.owner == os.getpid() and self.process.poll() is None

    def ask(self, call: bytes) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(_LENGTH.pack(len(call)) + call)
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE_S)
        if not ready:
            self.end()
            raise DeadlineError(
                "the process that solves constraint programs did not answer",
                expected=f"an answer within {DEADLINE_S:g} s",
                found="nothing",
                fix="lower solver_limit, or set axis_solver to 'propagate' and weight_gradients to 'greedy'",
            )
        return pickle.loads(_read(self.process.stdout))

    def end(self) -> None:
        if self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()


_lock = threading.Lock()
_child: _Child | None = None


def solve_apart(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What ``function`` of these arguments returns in the child, or raises there; all of it must be pickled.

    Blocks, one call at a time. Raises LlmsysError if the child ends, DeadlineError if it does not answer.
    """
    global _child
    call = pickle.dumps((function, args, kwargs))
    with _lock:
        if _child is None or not _child.usable:
            _child = _Child()
        try:
            value, error = _child.ask(call)
        except DeadlineError:  # an OSError too
            raise
        except (OSError, EOFError) as broken:
            _child.end()
            raise LlmsysError(
                "the process that solves constraint programs has ended",
                expected="an answer",
                found=f"exit status {_child.process.returncode}",
                fix="look at its output on standard error, or set axis_solver to 'propagate' and weight_gradients to "
                "'greedy'",
            ) from broken
    if error is not None:
        raise error
    return cast(T, value)


@atexit.register
def _end() -> None:
    if _child is not None:
        _child.end()


def serve() -> None:
    """The child: calls what comes over standard input until that is closed."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            function, args, kwargs = pickle.loads(_read(sys.stdin.buffer))
            try:
                answer = pickle.dumps((function(*args, **kwargs), None))
            except Exception as error:
                answer = pickle.dumps((None, error))
            answers.write(_LENGTH.pack(len(answer)) + answer)
            answers.flush()


def _read(stream: IO[bytes]) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    return _exactly(stream, length)


def _exactly(stream: IO[bytes], length: int) -> bytes:
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return data
