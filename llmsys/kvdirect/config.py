"""Settings of KVDirect's endpoints."""

from __future__ import annotations

from dataclasses import dataclass

from llmsys.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class KvConfig:
    """How long an endpoint waits and keeps things.

    coalesce: blocks that are adjacent on both sides travel as one operation (the paper's coalescing).
    unclaimed_timeout_s: blocks held for a peer that never connects are freed after this time. The time of a peer that
        is connected is bounded by its lease alone.
    quarantine_s: blocks that a lost peer was allowed to write stay out of use for this long, because a process that
        was stopped in the middle of a copy finishes that copy when it goes on. On this host nothing can revoke its
        mapping.
    exchange_timeout_s: deadline for the peer's answers: its table of tensors, its acknowledgement of a completion.
    remembered_requests: outcomes of ended requests that are kept, so that a repeated completion gets the same answer.
    """

    coalesce: bool = True
    unclaimed_timeout_s: float = 60.0
    quarantine_s: float = 30.0
    exchange_timeout_s: float = 30.0
    remembered_requests: int = 65_536

    def __post_init__(self) -> None:
        for name in ("unclaimed_timeout_s", "exchange_timeout_s", "remembered_requests"):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"{name} must be positive",
                    expected="a number above 0",
                    found=f"{name}={getattr(self, name)}",
                    fix=f"leave {name} out for its default",
                )
        if self.quarantine_s < 0:
            raise ConfigError(
                "quarantine_s must not be negative",
                expected="seconds, 0 or more",
                found=f"quarantine_s={self.quarantine_s}",
                fix="leave quarantine_s out for its default",
            )
