"""The child's side of `_workers`: a process that has imported everything and forks workers, and their command loop.

Importing torch takes seconds, starting an endpoint takes a few hundredths of one. So that workers can be killed and
replaced at will, one process imports once and forks each of them. It never starts a thread or an endpoint itself.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from llmsys.core.errors import DeadlineError

_PR_SET_PDEATHSIG = 1
_PID_BYTES = 8


class Service(Protocol):
    """What a worker does: `commands` by name; each gets a `Progress` and the driver's arguments, on its own thread."""

    def commands(self) -> Mapping[str, Callable[..., Any]]: ...


class Channel:
    """The way back to the driver: one JSON object a line. Thread safe."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, **values: Any) -> None:
        line = json.dumps(values).encode() + b"\n"
        with self._lock:
            self._connection.sendall(line)

    def event(self, name: str, **values: Any) -> None:
        """Tells the driver something that no command asked for; `at_s` is of the monotonic clock, as everywhere."""
        self.send(event=name, at_s=time.monotonic(), **values)


class Progress:
    """One command under way: it tells which stage it has reached, and can wait there for the driver's word."""

    def __init__(self, channel: Channel, call_id: int) -> None:
        self._channel = channel
        self._call_id = call_id
        self._go = threading.Event()

    def reached(self, stage: str, **values: Any) -> None:
        self._channel.send(call=self._call_id, stage=stage, at_s=time.monotonic(), **values)

    def go(self) -> None:
        self._go.set()

    def wait_for_go(self, timeout_s: float) -> None:
        if not self._go.wait(timeout_s):
            raise DeadlineError(
                "the driver did not let a command go on",
                expected=f"its word within {timeout_s} s",
                found="nothing",
                fix="raise the timeout, or look at the driver",
            )


def serve(connection: socket.socket, make_service: Callable[[Channel], Service]) -> None:
    """Runs the driver's commands, each on a thread of its own, until the driver closes the connection."""
    channel = Channel(connection)
    commands = make_service(channel).commands()
    open_calls: dict[int, Progress] = {}

    def run(call_id: int, command: str, arguments: dict[str, Any], progress: Progress) -> None:
        try:
            value = commands[command](progress, **arguments)
            channel.send(call=call_id, value=value)
        except Exception:
            channel.send(call=call_id, failure=traceback.format_exc())
        finally:
            open_calls.pop(call_id, None)

    for line in connection.makefile("rb"):
        message = json.loads(line)
        call_id = message["call"]
        if "command" not in message:
            if progress := open_calls.get(call_id):
                progress.go()
            continue
        progress = open_calls[call_id] = Progress(channel, call_id)
        arguments = (call_id, message["command"], message["arguments"], progress)
        threading.Thread(target=run, args=arguments, name=message["command"], daemon=True).start()


def main(module_name: str) -> None:
    """Forks a worker for each socket that comes over standard input, until that is closed.

    module_name: of a module with `make_service(channel)`.
    """
    _end_with_parent()
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    module = importlib.import_module(module_name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel then reaps workers that end
    control.sendall(os.getpid().to_bytes(_PID_BYTES, "little"))
    while True:
        word, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not word:
            return
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            _work(socket.socket(fileno=descriptors[0]), module.make_service)
        os.close(descriptors[0])
        control.sendall(pid.to_bytes(_PID_BYTES, "little"))


def _work(connection: socket.socket, make_service: Callable[[Channel], Service]) -> None:
    _end_with_parent()
    code = 1
    try:
        serve(connection, make_service)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Threads of commands may still wait for peers; the driver has gone, so nobody waits for them.
        sys.stderr.flush()
        os._exit(code)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == 1:
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
