"""Errors of the toolkit: every one says what was expected, what was found, and which setting to change."""

from __future__ import annotations

from typing import Any


class LlmsysError(Exception):
    """Base of all errors raised on purpose by llmsys.

    ``str(error)`` is ``summary`` and then one indented line for each of ``expected``, ``found`` and ``fix``
    that was given. The four texts stay readable as attributes. Errors can be pickled, so that a planner
    process can hand one to its parent without losing the explanation.
    """

    def __init__(self, summary: str, *, expected: str = "", found: str = "", fix: str = "") -> None:
        self.summary = summary
        self.expected = expected
        self.found = found
        self.fix = fix
        super().__init__(summary)

    def __str__(self) -> str:
        details = (("expected", self.expected), ("found", self.found), ("fix", self.fix))
        return "\n".join([self.summary, *(f"  {label}: {text}" for label, text in details if text)])

    def _fields(self) -> dict[str, Any]:
        """Keyword arguments that rebuild this error; a subclass with more of them extends this."""
        return {"expected": self.expected, "found": self.found, "fix": self.fix}

    def __reduce__(self) -> tuple[Any, ...]:
        # The default reduction calls the class with positional args only, which would drop the keyword texts.
        return _rebuild, (type(self), self.summary, self._fields())


def _rebuild(cls: type[LlmsysError], summary: str, fields: dict[str, Any]) -> LlmsysError:
    return cls(summary, **fields)


class ConfigError(LlmsysError, ValueError):
    """A setting is unknown, missing, of the wrong type, or out of range."""


class InputError(LlmsysError, ValueError):
    """A value given to a function (a workload, a table, an argument) is not usable."""


class DataNotFoundError(LlmsysError, FileNotFoundError):
    """A file or directory that the settings name is not there."""


class InfeasibleError(LlmsysError):
    """No plan exists within the given limits (memory, sizes covered by the cost table)."""


class DeadlineError(LlmsysError, TimeoutError):
    """A wait passed its deadline; the summary names the peer, the operation and what it waited for."""


class TransportError(LlmsysError):
    """Moving bytes failed; the summary names the peer and the operation."""


class PeerLostError(TransportError):
    """The peer ended, closed its connection, or was not heard of within its lease."""


class LeaseExpiredError(TransportError):
    """The right to touch a peer's memory ended before the operation did; what was read must not be used."""


class AuthenticationError(TransportError):
    """A peer did not present the job's secret, or we do not know it."""


class DescriptorError(LlmsysError, ValueError):
    """A descriptor of remote memory is truncated, damaged, of another version, stale, or out of bounds."""


class PlanError(LlmsysError):
    """A plan breaks one of its rules. ``grid``, if given, is the plan as text with the bad cell marked."""

    def __init__(self, summary: str, *, expected: str = "", found: str = "", fix: str = "", grid: str = "") -> None:
        super().__init__(summary, expected=expected, found=found, fix=fix)
        self.grid = grid

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n{self.grid}" if self.grid else text

    def _fields(self) -> dict[str, Any]:
        return {**super()._fields(), "grid": self.grid}
