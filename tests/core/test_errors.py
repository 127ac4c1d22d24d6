from __future__ import annotations

import pickle

import pytest

from llmsys.core import errors

ALL = [
    errors.LlmsysError,
    errors.ConfigError,
    errors.InputError,
    errors.DataNotFoundError,
    errors.InfeasibleError,
    errors.PlanError,
    errors.DeadlineError,
]


@pytest.mark.parametrize("cls", ALL)
def test_text_has_only_the_given_lines_and_survives_pickling(cls: type[errors.LlmsysError]) -> None:
    full = cls("it broke", expected="x > 0", found="x = -1", fix="set x to 1")
    assert str(full) == "it broke\n  expected: x > 0\n  found: x = -1\n  fix: set x to 1"
    assert str(cls("it broke", fix="set x")) == "it broke\n  fix: set x"
    assert str(cls("it broke")) == "it broke"
    copy = pickle.loads(pickle.dumps(full))
    assert type(copy) is cls
    assert str(copy) == str(full)
    assert (copy.summary, copy.expected, copy.found, copy.fix) == (
        "it broke",
        "x > 0",
        "x = -1",
        "set x to 1",
    )


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.InputError, ValueError),
        (errors.DataNotFoundError, FileNotFoundError),
        (errors.DeadlineError, TimeoutError),
    ],
)
def test_errors_are_caught_as_the_builtin_kind(cls: type[errors.LlmsysError], builtin: type[Exception]) -> None:
    with pytest.raises(builtin, match="gone"):
        raise cls("gone")


def test_plan_error_appends_the_grid_and_keeps_it_when_pickled() -> None:
    error = errors.PlanError("two ops in one cell", found="F1 and F2", grid="rank 0 | F0 [F1] B0")
    assert str(error) == "two ops in one cell\n  found: F1 and F2\nrank 0 | F0 [F1] B0"
    copy = pickle.loads(pickle.dumps(error))
    assert copy.grid == error.grid and str(copy) == str(error)
