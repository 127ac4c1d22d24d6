"""The process in which OR-Tools runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from llmsys.core.errors import InputError, LlmsysError
from llmsys.lancet import cp_sat
from llmsys.lancet.cp_sat import solve_apart


def _largest(limit: int) -> int:
    cp_model = cp_sat.or_tools()
    model = cp_model.CpModel()
    x = model.new_int_var(0, limit, "x")
    model.maximize(2 * x)
    solver = cp_model.CpSolver()
    print("what a library prints is no answer")
    assert solver.solve(model) == cp_model.OPTIMAL
    return int(solver.value(x))


def _fail() -> None:
    raise InputError("bad", expected="good", found="bad", fix="mend it")


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_one_child_solves_and_this_process_has_no_or_tools() -> None:
    assert [solve_apart(_largest, n) for n in (3, 5)] == [3, 5]
    first = cp_sat._child
    assert solve_apart(os.getpid) != os.getpid()
    assert cp_sat._child is first


def test_errors_come_back() -> None:
    with pytest.raises(InputError, match="mend it"):
        solve_apart(_fail)
    assert solve_apart(_largest, 2) == 2


def test_a_child_that_dies_is_an_error_and_replaced() -> None:
    with pytest.raises(LlmsysError, match="exit status -9"):
        solve_apart(_end)
    assert solve_apart(_largest, 4) == 4


def test_a_child_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cp_sat, "DEADLINE_S", 0.2)
    with pytest.raises(LlmsysError, match="did not answer"):
        solve_apart(signal.pause)


def test_the_child_ends_with_its_process() -> None:
    code = "import os; from llmsys.lancet.cp_sat import solve_apart; print(solve_apart(os.getpid), flush=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


@pytest.mark.parametrize("first", ["transports", "solver"])
def test_other_libraries_with_a_protobuf_of_their_own_do_no_harm(first: str) -> None:
    """NIXL and OR-Tools in one process end it with a segmentation fault, whichever is imported first."""
    steps = {
        "transports": "from llmsys.comm.transports import available_transports; available_transports()",
        "solver": "from llmsys.lancet.assignment import assign_exact; print(assign_exact([2.0, 3.0], [2.5, 1.0, 2.0], "
        "[[0, 1, 2], [0, 1, 2]]).hidden_ms)",
    }
    code = "\n".join([steps[first], *(text for name, text in steps.items() if name != first)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout.strip()) == (0, "5.0"), done.stderr
