"""The child's side of `launch`: what a rank does from its first instruction to its exit.

A rank is a fresh interpreter with three channels to its parent. It reads the job from an unlinked file, writes one
report to a pipe, and then waits on its standard input, which the parent closes when every rank has reported. So no
rank takes its process group down while another still needs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import importlib.util
import os
import pickle
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from types import ModuleType

from llmsys.core.errors import InputError

_PR_SET_PDEATHSIG = 1
DUMP_SIGNAL = signal.SIGUSR1
"""A rank that gets this signal writes the stacks of its threads to its standard error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSource:
    """Where a function's module is found again: by ``name`` if that leads to ``file``, else from ``file`` itself.

    The second way is for modules that no import path reaches, such as tests collected by pytest's importlib mode.
    ``file`` is None where the module has none; then it must be importable.
    """

    name: str
    file: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every rank runs. ``call`` is the pickle of (function, args), read after ``source`` has been loaded."""

    source: ModuleSource | None
    call: bytes
    backend: str | None
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How a rank's function ended: ``result`` is a pickle, or ``failure`` the traceback and ``error`` a pickle of it.

    ``error`` is None if the exception cannot be pickled.
    """

    result: bytes = b""
    failure: str | None = None
    summary: str = ""
    error: bytes | None = None
    at_s: float = 0.0


def main(arguments: list[str]) -> None:
    """Entry point of the child: ``arguments`` are the report's and the job's file descriptors and the parent's id."""
    report_fd, job_fd, parent = (int(argument) for argument in arguments)
    _end_with(parent)
    faulthandler.register(DUMP_SIGNAL, all_threads=True)
    for fd in (report_fd, job_fd):
        os.set_inheritable(fd, False)
    release_fd = os.dup(0)  # dup makes it private to this process; the function gets an empty standard input
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    job: Job = pickle.loads(_read_all(job_fd))
    _write_all(report_fd, pickle.dumps(_run(job)))
    os.close(report_fd)
    while os.read(release_fd, 1):
        pass
    if job.backend is not None and "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def _end_with(parent: int) -> None:
    """The kernel ends this process when the thread that started it ends, however that happens."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def _read_all(fd: int) -> bytes:
    # All ranks share the file's position, so read by offset.
    parts, offset = [], 0
    while part := os.pread(fd, 1 << 20, offset):
        parts.append(part)
        offset += len(part)
    os.close(fd)
    return b"".join(parts)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _run(job: Job) -> Report:
    try:
        if job.source is not None:
            load_module(job.source)
        function, args = pickle.loads(job.call)
        if job.backend is not None:
            from llmsys.comm.launch import init_from_env

            init_from_env(job.backend, timeout_s=job.timeout_s)
        result = function(*args)
        return Report(result=_pickled(result))
    except BaseException as error:
        return _failure(error)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()


def _pickled(result: object) -> bytes:
    try:
        return pickle.dumps(result)
    except Exception as error:
        raise InputError(
            "the result of a rank cannot be sent to the parent",
            expected="a result that pickle can write",
            found=f"{type(result).__name__}: {error}",
            fix="return plain values, arrays or tensors from the launched function",
        ) from error


def _failure(error: BaseException) -> Report:
    at_s = time.monotonic()
    failure = "".join(traceback.format_exception(error))
    packed: bytes | None
    try:
        packed = pickle.dumps(error)
    except Exception:
        packed = None
    first = str(error).partition("\n")[0]
    summary = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return Report(failure=failure, summary=summary, error=packed, at_s=at_s)


def load_module(source: ModuleSource) -> ModuleType:
    """Import the module and put it into ``sys.modules`` under the name by which pickles refer to it."""
    if source.name == "__main__":
        # Under another name, so that the block behind `if __name__ == "__main__"` does not run.
        module = _load_file("__mp_main__", source.file)
        sys.modules["__main__"] = module
        return module
    if source.file is None or _leads_to(source.name, source.file):
        return importlib.import_module(source.name)
    return _load_file(source.name, source.file)


def _leads_to(name: str, file: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return False
    return spec is not None and spec.origin is not None and os.path.realpath(spec.origin) == os.path.realpath(file)


def _load_file(name: str, file: str | None) -> ModuleType:
    spec = None if file is None else importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InputError(
            f"a rank cannot load the module {name} of the launched function",
            expected="a Python file",
            found=str(file),
            fix="move the function into a module with a file; a notebook's or an interactive session's has none",
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    parts = name.split(".")
    for depth in range(1, len(parts)):  # pickle asks for the parents of a module, even if it is there
        parent = ".".join(parts[:depth])
        sys.modules.setdefault(parent, ModuleType(parent))
    spec.loader.exec_module(module)
    return module
