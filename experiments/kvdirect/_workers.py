"""Worker processes of the experiments that kill, stop and restart them: started quickly, told what to do by commands.

A `Nursery` is one process with everything imported; it forks the workers (see `_nursery`). A `Worker` takes commands
and tells what it has reached, over a socket of its own. All of them end with the driver, however it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

from experiments.environment import REPOSITORY
from llmsys.comm.bootstrap import SECRET_VARIABLE
from llmsys.core.errors import DeadlineError, PeerLostError, TransportError

_PID_BYTES = 8
_STDERR_TAIL_BYTES = 4000


class Nursery:
    """Forks workers that run the service of `module`. A context manager: leaving it ends all of them.

    secret: of the job; made if it is empty. Workers of two nurseries need the same to talk to each other.
    command_prefix: how to start Python elsewhere, such as ("ip", "netns", "exec", NAME).
    """

    def __init__(
        self,
        module: str,
        *,
        secret: str = "",
        command_prefix: Sequence[str] = (),
        timeout_s: float = 120.0,
    ) -> None:
        ours, theirs = socket.socketpair()
        self._control = ours
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._lock = threading.Lock()
        self._workers: list[Worker] = []
        self._timeout_s = timeout_s
        # One thread each: the machine is shared by all workers, and a pool of threads does not survive a fork.
        quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "UCX_WARN_UNUSED_ENV_VARS": "n"}
        self.secret = secret or secrets.token_hex(16)
        self._process = subprocess.Popen(
            [*command_prefix, sys.executable, "-m", "experiments.kvdirect._nursery", module],
            stdin=theirs.fileno(),
            stdout=self._stderr.fileno(),
            stderr=self._stderr.fileno(),
            cwd=REPOSITORY,
            env={**os.environ, **quiet, SECRET_VARIABLE: self.secret},
        )
        theirs.close()
        try:
            self._receive_pid("import its modules")
        except BaseException:
            self.close()
            raise

    def spawn(self, name: str) -> Worker:
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            socket.send_fds(self._control, [b"f"], [theirs.fileno()])
            pid = self._receive_pid(f"fork worker {name!r}")
            worker = Worker(name, pid, ours, self.stderr_tail)
            self._workers.append(worker)
        return worker

    def _receive_pid(self, doing: str) -> int:
        self._control.settimeout(self._timeout_s)
        try:
            data = self._control.recv(_PID_BYTES, socket.MSG_WAITALL)
        except TimeoutError as error:
            raise DeadlineError(
                f"the process that forks workers did not {doing}",
                expected=f"an answer within {self._timeout_s} s",
                found=self.stderr_tail() or "no output",
                fix="look at the load of this machine",
            ) from error
        if len(data) < _PID_BYTES:
            raise PeerLostError(
                f"the process that forks workers ended before it could {doing}",
                expected="a running process",
                found=self.stderr_tail() or "no output",
                fix="see its output",
            )
        return int.from_bytes(data, "little")

    def stderr_tail(self) -> str:
        """The end of what this process and its workers have printed."""
        size = os.fstat(self._stderr.fileno()).st_size
        return os.pread(self._stderr.fileno(), _STDERR_TAIL_BYTES, max(0, size - _STDERR_TAIL_BYTES)).decode(
            "utf-8", "replace"
        )

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        try:
            # While their parent is there to bury them.
            for worker in self._workers:
                worker.join()
        finally:
            self._control.close()
            self._process.kill()
            self._process.wait()
            self._stderr.close()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Call:
    """A command under way at a worker."""

    def __init__(self, worker: Worker, command: str, call_id: int) -> None:
        self._worker, self._command, self._call_id = worker, command, call_id
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._last: dict[str, Any] | None = None
        self.stages: dict[str, dict[str, Any]] = {}

    def put(self, message: dict[str, Any]) -> None:
        """For the reader of the worker's messages."""
        self._messages.put(message)

    def wait_stage(self, stage: str, timeout_s: float) -> bool:
        """Whether the command has reached `stage`; False if it ended before that."""
        deadline_s = time.monotonic() + timeout_s
        while stage not in self.stages and self._last is None:
            self._take(deadline_s, f"reach stage {stage!r}", timeout_s)
        return stage in self.stages

    def poll_stage(self, stage: str) -> bool:
        """Whether the command is known to have reached `stage`. Does not block."""
        with contextlib.suppress(queue.Empty):
            while self._last is None:
                self._sort(self._messages.get_nowait())
        return stage in self.stages

    def go(self) -> None:
        """Lets it go on from where it waits."""
        self._worker.send(call=self._call_id)

    def result(self, timeout_s: float) -> Any:
        """What the command returned.

        Raises:
            DeadlineError: nothing yet. PeerLostError: its worker has ended. TransportError: it failed.
        """
        deadline_s = time.monotonic() + timeout_s
        while self._last is None:
            self._take(deadline_s, "end", timeout_s)
        what = f"command {self._command!r} of worker {self._worker.name!r}"
        if "died" in self._last:
            raise PeerLostError(
                f"{what} has no result: the worker ended",
                expected="a running worker",
                found=self._worker.stderr_tail() or "no output",
                fix="see its output",
            )
        if "failure" in self._last:
            raise TransportError(
                f"{what} failed",
                expected="no exception",
                found=self._last["failure"],
                fix="see the traceback",
            )
        return self._last["value"]

    def _take(self, deadline_s: float, doing: str, timeout_s: float) -> None:
        try:
            message = self._messages.get(timeout=max(deadline_s - time.monotonic(), 0.0))
        except queue.Empty as error:
            raise DeadlineError(
                f"command {self._command!r} of worker {self._worker.name!r} did not {doing} in time",
                expected=f"it within {timeout_s:.3g} s",
                found=f"stages {', '.join(self.stages) or 'none'} reached",
                fix="look at that worker, or allow more time",
            ) from error
        self._sort(message)

    def _sort(self, message: dict[str, Any]) -> None:
        if "stage" in message:
            self.stages[message["stage"]] = message
        else:
            self._last = message


class Worker:
    """One process. Commands may be given from any thread."""

    def __init__(self, name: str, pid: int, connection: socket.socket, stderr_tail: Any) -> None:
        self.name, self.pid = name, pid
        # Numbers of processes are used again, within minutes on a busy machine; this stays with the process.
        self._process: int | None = None
        with contextlib.suppress(ProcessLookupError):
            self._process = os.pidfd_open(pid)
        self.stderr_tail = stderr_tail
        self._connection = connection
        self._lock = threading.Condition()
        self._calls: dict[int, Call] = {}
        self._num_calls = 0
        self._events: list[dict[str, Any]] = []
        self._ended = False
        self._reader = threading.Thread(target=self._read, name=f"reader-{name}", daemon=True)
        self._reader.start()

    def call(self, command: str, /, **arguments: Any) -> Call:
        with self._lock:
            self._num_calls += 1
            call_id = self._num_calls
            call = self._calls[call_id] = Call(self, command, call_id)
            if self._ended:
                call.put({"died": True})
        self.send(call=call_id, command=command, arguments=arguments)
        return call

    def ask(self, command: str, within_s: float = 60.0, /, **arguments: Any) -> Any:
        """Gives a command and waits for its result."""
        return self.call(command, **arguments).result(within_s)

    def send(self, **values: Any) -> None:
        # A worker that has ended is noticed by its reader, and by whoever waits for a result.
        with contextlib.suppress(OSError), self._lock:
            self._connection.sendall(json.dumps(values).encode() + b"\n")

    def events(self, name: str, since_s: float = 0.0) -> list[dict[str, Any]]:
        """What the worker told unasked under that name, since a moment of the monotonic clock."""
        with self._lock:
            return [event for event in self._events if event["event"] == name and event["at_s"] >= since_s]

    def wait_event(self, name: str, since_s: float, timeout_s: float, **values: Any) -> dict[str, Any]:
        """The first such event since then that has these values."""

        def found() -> dict[str, Any] | None:
            fitting = (event for event in self.events(name, since_s) if values.items() <= event.items())
            return next(fitting, None)

        with self._lock:
            self._lock.wait_for(lambda: found() is not None or self._ended, timeout_s)
        event = found()
        if event is None:
            raise DeadlineError(
                f"worker {self.name!r} did not tell {name!r} in time",
                expected=f"{values} within {timeout_s:.3g} s",
                found=f"{self.events(name, since_s)}" if not self._ended else "that it ended",
                fix="look at that worker, or allow more time",
            )
        return event

    def kill(self) -> None:
        """Ends it as a crash would, at once."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError), self._lock:
            if self._process is not None:
                signal.pidfd_send_signal(self._process, number)

    def join(self, timeout_s: float = 10.0) -> None:
        """Waits until it has ended, with all that it had open; DeadlineError if it has not. One thread at a time."""
        deadline_s = time.monotonic() + timeout_s
        self._reader.join(timeout_s)
        # The end of its connection is not the end of the process: it may not have closed everything yet.
        if self._process is None:
            return
        waiting = select.poll()
        waiting.register(self._process, select.POLLIN)
        if not waiting.poll(1e3 * max(deadline_s - time.monotonic(), 0.0)):
            raise DeadlineError(
                f"worker {self.name!r} did not end in time",
                expected=f"the end of process {self.pid} within {timeout_s} s",
                found="that it still runs",
                fix="look at that process",
            )
        with self._lock:
            os.close(self._process)
            self._process = None

    def _read(self) -> None:
        with contextlib.suppress(OSError), self._connection.makefile("rb") as lines:
            for line in lines:
                with contextlib.suppress(ValueError):  # a line that a kill has cut off
                    self._sort(json.loads(line))
        with self._lock:
            self._ended = True
            calls = list(self._calls.values())
            self._lock.notify_all()
        for call in calls:
            call.put({"died": True})
        self._connection.close()

    def _sort(self, message: dict[str, Any]) -> None:
        with self._lock:
            if "event" in message:
                self._events.append(message)
                self._lock.notify_all()
                return
            call = self._calls[message["call"]]
            if "stage" not in message:
                del self._calls[message["call"]]
        call.put(message)


def free_port() -> int:
    """A port of this host where nobody listens, outside of the range from which the kernel takes ports by itself.

    So a worker that comes back finds its port free.
    """
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        first = int(file.read().split()[0])
    for _ in range(1000):
        port = first // 2 + secrets.randbelow(max(first // 2, 1))
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise TransportError(
        "no free port for a worker",
        expected=f"one between {first // 2} and {first}",
        found="1000 that are in use or forbidden",
        fix="end the programs that listen there",
    )
