"""Ranks start with torchrun's environment, return results in order, and always end."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from llmsys.comm.launch import current_rank, init_from_env, launch
from llmsys.core.errors import ConfigError, DeadlineError, InputError, LlmsysError
from tests.comm import ranks_launch as ranks

LIMIT_S = 120.0


def square_of_rank() -> int:
    return current_rank().rank ** 2


def _children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def _sockets() -> int:
    targets = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return sum(target.startswith("socket:") for target in targets)


@pytest.fixture(scope="module")
def torch_store_was_used() -> None:
    """The library under torch's store opens a pipe with its first loop in a process, and keeps it."""
    launch(square_of_rank, 1, timeout_s=LIMIT_S, backend=None)


@pytest.fixture(autouse=True)
def nothing_left(torch_store_was_used: None) -> Iterator[None]:
    """No process, descriptor, or shared memory remains after a launch, however it ended."""

    def state() -> tuple[set[int], int, int, set[str]]:
        return _children(), len(os.listdir("/proc/self/fd")), _sockets(), set(os.listdir("/dev/shm"))

    before = state()
    yield
    after = state()
    assert after[0] - before[0] == set()
    assert after[1:3] == before[1:3]
    assert after[3] - before[3] == set()


def _is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and is not reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end_s, f"no {what} within {LIMIT_S} s"
        time.sleep(0.01)


def _pids(directory: Path) -> list[int]:
    return [int(pid) for path in directory.glob("pids*") for pid in path.read_text().split()]


def test_results_come_in_the_order_of_the_ranks() -> None:
    assert launch(square_of_rank, 4, timeout_s=LIMIT_S, backend=None) == [0, 1, 4, 9]


def test_ranks_have_the_environment_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMSYS_JOB_SECRET", raising=False)
    monkeypatch.setenv("OF_PARENT", "kept")
    names = ["MASTER_ADDR", "OF_PARENT", "OF_CALL", "LLMSYS_JOB_SECRET", "MASTER_PORT"]
    found = launch(
        ranks.place_and_environment, 2, names, timeout_s=LIMIT_S, backend=None, env={"OF_CALL": "given", "RANK": "7"}
    )
    assert [entry[:4] for entry in found] == [(0, 0, 2, 2), (1, 1, 2, 2)]
    assert [entry[4][:3] for entry in found] == [["127.0.0.1", "kept", "given"]] * 2
    assert found[0][4] == found[1][4]
    secret, port = found[0][4][3:]
    assert secret is not None and len(bytes.fromhex(secret)) == 32
    with pytest.raises(ConnectionRefusedError):  # the store of the rendezvous is gone
        socket.create_connection(("127.0.0.1", int(port or 0)), timeout=10)


def test_each_launch_has_a_secret_of_its_own_unless_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMSYS_JOB_SECRET", raising=False)

    def secret(env: dict[str, str] | None = None) -> str | None:
        names = ["LLMSYS_JOB_SECRET"]
        ((*_, (value,)),) = launch(ranks.place_and_environment, 1, names, timeout_s=LIMIT_S, backend=None, env=env)
        return value

    assert secret() != secret()
    assert secret({"LLMSYS_JOB_SECRET": "mine"}) == "mine"
    monkeypatch.setenv("LLMSYS_JOB_SECRET", "of the parent")
    assert secret() == "of the parent"


def test_without_a_backend_torch_is_not_loaded() -> None:
    assert launch(ranks.has_torch_loaded, 1, timeout_s=LIMIT_S, backend=None) == [False]


def test_the_process_group_is_ready() -> None:
    assert launch(ranks.sum_over_ranks, 2, 1.5, timeout_s=LIMIT_S) == [4.5, 4.5]


def test_results_may_be_larger_than_a_pipe_holds() -> None:
    size_bytes = 3_000_000
    results = launch(ranks.large_result, 2, size_bytes, timeout_s=LIMIT_S, backend=None)
    assert results == [b"\0" * size_bytes, b"\1" * size_bytes]


def test_standard_input_of_a_rank_is_empty() -> None:
    assert launch(ranks.standard_input, 1, timeout_s=LIMIT_S, backend=None) == [""]


def test_a_function_of_a_module_that_no_import_path_reaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "apart.py"
    path.write_text("class Answer:\n    value = 42\n\n\ndef answer(given):\n    return isinstance(given, Answer)\n")
    # As pytest's importlib mode does: the module and its parents are in sys.modules, and no path leads to them.
    for parent in ("far", "far.away"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    module = _load(path, "far.away.apart")
    assert launch(module.answer, 1, module.Answer(), timeout_s=LIMIT_S, backend=None) == [True]


def _load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_first_failure_is_shown_with_rank_and_traceback(tmp_path: Path) -> None:
    with pytest.raises(LlmsysError, match=r"rank 1 of 2 failed: ValueError: the first failure") as caught:
        launch(ranks.fail_in_order, 2, str(tmp_path), timeout_s=LIMIT_S, backend=None)
    assert "in fail_in_order" in caught.value.found and 'raise ValueError("the first failure")' in caught.value.found
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_exception_that_cannot_be_pickled_is_shown_as_text() -> None:
    with pytest.raises(LlmsysError, match="rank 0 of 1 failed: UnpicklableError: cannot be rebuilt") as caught:
        launch(ranks.fail_unpicklably, 1, timeout_s=LIMIT_S, backend=None)
    assert "in fail_unpicklably" in caught.value.found


def test_a_result_that_cannot_be_pickled_is_a_failure() -> None:
    with pytest.raises(LlmsysError, match="InputError: the result of a rank cannot be sent"):
        launch(ranks.unpicklable_result, 1, timeout_s=LIMIT_S, backend=None)


@pytest.mark.parametrize(("how", "text"), [("kill", "killed by signal 9"), ("exit", "exited with code 3")])
def test_a_dead_rank_ends_the_others(how: str, text: str) -> None:
    with pytest.raises(LlmsysError, match=f"rank 1 of 3 ended: {text}"):
        launch(ranks.die, 3, how, timeout_s=LIMIT_S, backend=None)


def test_a_rank_that_dies_after_its_result_is_a_failure() -> None:
    with pytest.raises(LlmsysError, match="rank 1 of 2 ended: exited with code 7"):
        launch(ranks.die_at_exit, 2, timeout_s=LIMIT_S, backend=None)


def test_the_deadline_ends_ranks_and_their_children(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also ranks that ignore SIGTERM."""
    monkeypatch.setattr("llmsys.comm.launch._GRACE_S", 1.0)
    with pytest.raises(DeadlineError, match=r"ranks \[1\] of 2 did not end within 3 s") as caught:
        launch(ranks.hang_stubbornly, 2, str(tmp_path), timeout_s=3.0, backend=None)
    assert "ranks [0] had returned" in caught.value.found
    assert "in hang" in capfd.readouterr().err  # the stack of the late rank
    pids = _pids(tmp_path)
    assert len(pids) == 2
    _wait_until(lambda: not any(_is_alive(pid) for pid in pids), "end of the rank and its child")


def test_a_keyboard_interrupt_ends_the_ranks(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        if _pids(tmp_path):
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    timer = signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            launch(ranks.leave_pid_and_hang, 1, str(tmp_path), timeout_s=LIMIT_S, backend=None)
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)
    assert not any(_is_alive(pid) for pid in _pids(tmp_path))


def test_ranks_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, ranks.__file__, str(tmp_path)], env=_plain_environment())
    try:
        _wait_until(lambda: len(_pids(tmp_path)) == 2, "two ranks")
    finally:
        parent.kill()
        parent.wait(timeout=LIMIT_S)
    _wait_until(lambda: not any(_is_alive(pid) for pid in _pids(tmp_path)), "end of the ranks")


def _plain_environment() -> dict[str, str]:
    root = str(Path(ranks.__file__).parents[2])
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return {name: value for name, value in os.environ.items() if name not in names} | {"PYTHONPATH": root}


def test_the_same_program_runs_under_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, ranks.__file__, str(tmp_path)],
        env=_plain_environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"rank0": "3.0", "rank1": "3.0"}


def test_outside_a_job_there_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE='two'"):
        current_rank()


def test_joining_a_group_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # not listening, so nobody answers here
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused.getsockname()[1])}
        for name, value in (place | address).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(DeadlineError, match=r"rank 1 of 2 could not join the process group at 127.0.0.1:\d+"):
            init_from_env("gloo", timeout_s=1.0)


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be sent to the ranks"):
        launch(lambda: 0, 1, timeout_s=LIMIT_S, backend=None)
    with pytest.raises(InputError, match="launch needs ranks and time"):
        launch(square_of_rank, 0, timeout_s=LIMIT_S)
    for timeout_s in (float("nan"), float("inf"), 0.0):
        with pytest.raises(InputError, match="launch needs ranks and time"):
            launch(square_of_rank, 1, timeout_s=timeout_s)
