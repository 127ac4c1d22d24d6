"""The instructions of a plan: one class for each kind, as an executor interprets them.

A device runs its list from top to bottom. ``...Start`` posts a transfer and returns; ``...Finish`` waits for it. Every
buffer is a slot number of the device that runs the instruction: written once, then read, then freed by FreeBuffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """``micro_batch`` is a number within the replica, ``stage`` a stage of the pipeline that this device holds."""

    code: ClassVar[str] = ""

    micro_batch: int
    stage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadInput(Instruction):
    """Puts the stage's own input (token ids) into ``buffer``."""

    code: ClassVar[str] = "L"

    buffer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass(Instruction):
    """Reads the inputs in ``reads``, leaves the output for the next stage in ``writes`` (none on the last stage)."""

    code: ClassVar[str] = "F"

    reads: tuple[int, ...]
    writes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardPass(Instruction):
    """Reads inputs, output and the output's gradient in ``reads``, leaves the input's gradient in ``writes``."""

    code: ClassVar[str] = "B"

    reads: tuple[int, ...]
    writes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeBuffer(Instruction):
    """Ends the life of ``buffer``; its number may be used again."""

    code: ClassVar[str] = "X"

    buffer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer(Instruction):
    """Part of a transfer of ``buffer`` with pipeline device ``peer``. ``stage`` is this device's end of it."""

    buffer: int
    peer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SendActivationStart(Transfer):
    code: ClassVar[str] = "SA"


@dataclass(frozen=True, slots=True, kw_only=True)
class SendActivationFinish(Transfer):
    code: ClassVar[str] = "sa"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecvActivationStart(Transfer):
    code: ClassVar[str] = "RA"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecvActivationFinish(Transfer):
    code: ClassVar[str] = "ra"


@dataclass(frozen=True, slots=True, kw_only=True)
class SendGradStart(Transfer):
    code: ClassVar[str] = "SG"


@dataclass(frozen=True, slots=True, kw_only=True)
class SendGradFinish(Transfer):
    code: ClassVar[str] = "sg"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecvGradStart(Transfer):
    code: ClassVar[str] = "RG"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecvGradFinish(Transfer):
    code: ClassVar[str] = "rg"


KINDS: tuple[type[Instruction], ...] = (
    LoadInput,
    ForwardPass,
    BackwardPass,
    FreeBuffer,
    SendActivationStart,
    SendActivationFinish,
    RecvActivationStart,
    RecvActivationFinish,
    SendGradStart,
    SendGradFinish,
    RecvGradStart,
    RecvGradFinish,
)
BY_CODE: dict[str, type[Instruction]] = {kind.code: kind for kind in KINDS}

STARTS: dict[type[Instruction], type[Instruction]] = {
    SendActivationStart: RecvActivationStart,
    RecvActivationStart: SendActivationStart,
    SendGradStart: RecvGradStart,
    RecvGradStart: SendGradStart,
}
"""Each kind of start, and the kind that the peer must start in answer."""

FINISHES: dict[type[Instruction], type[Instruction]] = {
    SendActivationFinish: SendActivationStart,
    RecvActivationFinish: RecvActivationStart,
    SendGradFinish: SendGradStart,
    RecvGradFinish: RecvGradStart,
}
"""Each kind of finish, and the start it ends."""

SENDS: frozenset[type[Instruction]] = frozenset({SendActivationStart, SendGradStart})
