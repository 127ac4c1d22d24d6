"""A child process with one endpoint, under command of `endpoint.ProcessTarget`: `target_process.py TRANSPORT`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if "LLMSYS_NATIVE_DIR" in os.environ:
    import tests.conftest  # noqa: F401  It puts the sanitized module in place.

from tests.comm.endpoint import Endpoint, read_message, write_message


def main() -> None:
    commands, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # What libraries print must not come between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    endpoint = Endpoint(sys.argv[1], read_message(commands))
    write_message(answers, [True, None])
    while True:
        try:
            command, arguments = read_message(commands)
        except EOFError:
            break
        try:
            answer = [True, getattr(endpoint, command)(**arguments)]
        except Exception as error:
            answer = [False, f"{type(error).__name__}: {error}"]
        write_message(answers, answer)
    endpoint.close()


if __name__ == "__main__":
    main()
