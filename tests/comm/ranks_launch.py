"""What the ranks of test_launch.py run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from llmsys.comm.launch import current_rank, launch

FOREVER_S = 600


def place_and_environment(names: list[str]) -> tuple[int, int, int, int, list[str | None]]:
    info = current_rank()
    values = [os.environ.get(name) for name in names]
    return info.rank, info.local_rank, info.world_size, info.local_world_size, values


def has_torch_loaded() -> bool:
    return "torch" in sys.modules


def large_result(size_bytes: int) -> bytes:
    return bytes([current_rank().rank]) * size_bytes


def standard_input() -> str:
    return sys.stdin.read()


def fail_in_order(directory: str) -> None:
    """Rank 1 fails first; rank 0 fails because of it, and its report may well arrive first."""
    mark = Path(directory) / "failed"
    if current_rank().rank == 1:
        mark.touch()
        raise ValueError("the first failure")
    while not mark.exists():
        time.sleep(0.001)
    raise RuntimeError("a follow-up")


class UnpicklableError(Exception):
    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)


def fail_unpicklably() -> None:
    raise UnpicklableError(1, "cannot be rebuilt")


def unpicklable_result() -> object:
    return lambda: None


def die(how: str) -> None:
    """Rank 1 dies while the others wait."""
    if current_rank().rank == 1:
        if how == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(FOREVER_S)


def die_at_exit() -> int:
    if current_rank().rank == 1:
        import atexit

        atexit.register(os._exit, 7)
    return 0


def hang_stubbornly(directory: str) -> None:
    """Rank 1 never ends, ignores SIGTERM, and has a child of its own; both leave their process ids."""
    if current_rank().rank != 1:
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({FOREVER_S})"])
    write_pids(directory, os.getpid(), child.pid)
    time.sleep(FOREVER_S)


def write_pids(directory: str, *pids: int) -> None:
    partial = Path(directory) / f"partial{os.getpid()}"
    partial.write_text(" ".join(str(pid) for pid in pids))
    partial.rename(Path(directory) / f"pids{os.getpid()}")


def leave_pid_and_hang(directory: str) -> None:
    write_pids(directory, os.getpid())
    time.sleep(FOREVER_S)


def sum_over_ranks(value: float) -> float:
    import torch
    import torch.distributed as dist

    total = torch.tensor([value * (current_rank().rank + 1)])
    dist.all_reduce(total)
    return float(total)


if __name__ == "__main__":
    # A parent that its test ends: with a torchrun environment it is a rank itself.
    if "RANK" in os.environ:
        from llmsys.comm.launch import init_from_env

        found = init_from_env("gloo", timeout_s=60)
        (Path(sys.argv[1]) / f"rank{found.rank}").write_text(str(sum_over_ranks(1.0)))
    else:
        launch(leave_pid_and_hang, 2, sys.argv[1], timeout_s=FOREVER_S, backend=None)
