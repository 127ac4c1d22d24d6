"""A child process with one native engine, under command of `engines.Child`: `engine_process.py SETTINGS`.

Its memory holds `pattern(size_bytes, seed)`. Commands and answers are lines of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if "LLMSYS_NATIVE_DIR" in os.environ:
    import tests.conftest  # noqa: F401  It puts the sanitized module in place.

from llmsys import _C
from tests.comm.engines import Memory, ended, new_engine, new_memory, pattern, post, wait_event


class Commands:
    """What the parent may ask for; each returns its answer."""

    def __init__(self, settings: dict[str, Any], answers: Any) -> None:
        self._answers = answers
        self.engine = new_engine(settings["path"], lease_s=settings["lease_s"], **settings["options"])
        self.memory = new_memory(self.engine, settings["size_bytes"], allocate=settings["path"] != "cma")
        self.memory.array[:] = pattern(settings["size_bytes"], settings["seed"])
        pid, address, nonce = self.engine.probe()
        self.answer(
            worker_address=self.engine.worker_address().hex(),
            probe=[pid, address, nonce.hex()],
            remote_key=self.engine.remote_key(self.memory.region).hex(),
            address=self.memory.address,
        )
        self.peer = self.engine.add_peer(
            "parent",
            settings["fd"],
            bytes.fromhex(settings["worker_address"]),
            settings["token_in"],
            settings["token_out"],
            settings["lease_s"],
            (settings["probe"][0], settings["probe"][1], bytes.fromhex(settings["probe"][2])),
        )
        wait_event(self.engine, "established")

    def answer(self, **values: Any) -> None:
        self._answers.write(json.dumps(values).encode() + b"\n")
        self._answers.flush()

    def sanitize(self) -> dict[str, Any]:
        return {"sanitize": _C.build_info()["sanitize"]}

    def crc32(self) -> dict[str, Any]:
        return {"crc32": zlib.crc32(self.memory.array)}

    def read(self, remote_key: str, address: int, size_bytes: int) -> dict[str, Any]:
        """Reads the parent's memory in blocks; answers twice, when the batch is posted and when it has ended."""
        remote = self.engine.import_remote(self.peer, bytes.fromhex(remote_key), address, size_bytes)
        into: Memory = new_memory(self.engine, size_bytes)
        block = 1 << 16
        request = post(
            self.engine, False, self.peer, into, remote, [(i, i, block) for i in range(0, size_bytes, block)], False
        )
        self.answer(posted=True)
        ended(request)
        state = self.engine.peer_state(self.peer)
        return {"kind": request.error_kind(), "error": request.error(), "state": state["state"]}

    def notifications(self, count: int) -> dict[str, Any]:
        ids = [wait_event(self.engine, "notification")[2] for _ in range(count)]
        return {"in_order": ids == list(range(1, count + 1))}

    def close(self) -> dict[str, Any]:
        self.engine.close()
        return {}


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # What libraries print must not come between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    commands = Commands(json.loads(sys.argv[1]), answers)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        commands.answer(**getattr(commands, name)(**arguments))


if __name__ == "__main__":
    main()
