"""The ways of moving blocks between two processes that KVDirect's figures compare."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llmsys.core.errors import ConfigError

Kind = Literal["memcpy", "ucx", "nixl", "gloo"]
OptionValue = str | int | float | bool

MEMCPY = "memcpy in one process"
SHM = "ours, shared memory"
SHM_ONE = "ours, shared memory, 1 thread"
CMA = "ours, process_vm_readv"
CMA_ONE = "ours, process_vm_readv, 1 thread"
TCP = "ours, UCX over TCP"
NIXL_SPINS = "NIXL READ, progress thread polls"
NIXL_SLEEPS = "NIXL READ, progress thread sleeps"
NIXL_NO_THREAD = "NIXL READ, no progress thread"
NIXL_TWO_THREADS = "NIXL READ, 2 transfer threads"
GLOO_BLOCKS = "gloo two-sided, per block"
GLOO_PACKED = "gloo two-sided, packed"


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One method of a figure: a transport with settings of its own, run by an initiator and a target process.

    kind: whose transport; "memcpy" is a copy within the initiator, the limit of what a CPU can do.
    options: fields of the transport's options class. env: changes of the environment of both processes.
    allocated: the target's memory is what `Transport.allocate` gives, which peers map; else any memory, registered.
    coalesces: also measured without coalescing, where that makes a difference.
    num_copying_threads: of the initiator, which move bytes at the same time.
    max_blocks: so many blocks a measurement, because each costs this system a message; None means all.
    """

    name: str
    kind: Kind
    options: dict[str, OptionValue] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    allocated: bool = False
    coalesces: bool = False
    num_copying_threads: int = 1
    max_blocks: int | None = None


_MAX_TWO_SIDED_BLOCKS = 16_384
# Large parts: each costs NIXL a look at our lease, which is a fifth of the time with its adapter's default.
_NIXL: dict[str, OptionValue] = {"slice_bytes": 256 << 20}

SYSTEMS = {
    system.name: system
    for system in (
        System(name=MEMCPY, kind="memcpy"),
        System(
            name=SHM,
            kind="ucx",
            options={"cma": False, "num_copy_threads": 2},
            allocated=True,
            coalesces=True,
            num_copying_threads=2,
        ),
        System(name=SHM_ONE, kind="ucx", options={"cma": False, "num_copy_threads": 1}, allocated=True),
        System(
            name=CMA,
            kind="ucx",
            options={"shm": False, "num_copy_threads": 2},
            coalesces=True,
            num_copying_threads=2,
        ),
        System(name=CMA_ONE, kind="ucx", options={"shm": False, "num_copy_threads": 1}),
        System(name=TCP, kind="ucx", options={"shm": False, "cma": False, "tls": "tcp,self"}, coalesces=True),
        System(name=NIXL_SPINS, kind="nixl", options={**_NIXL, "progress": "spin"}),
        System(name=NIXL_SLEEPS, kind="nixl", options={**_NIXL, "progress": "events"}),
        System(name=NIXL_NO_THREAD, kind="nixl", options={**_NIXL, "progress": "poll"}),
        System(
            name=NIXL_TWO_THREADS,
            kind="nixl",
            options={**_NIXL, "progress": "events", "num_threads": 2},
            num_copying_threads=2,
        ),
        System(name=GLOO_BLOCKS, kind="gloo", options={"pack": False}, max_blocks=_MAX_TWO_SIDED_BLOCKS),
        System(name=GLOO_PACKED, kind="gloo", options={"pack": True}),
    )
}


def chosen(names: tuple[str, ...]) -> list[System]:
    """The systems of these names, in the order of SYSTEMS; all of them if none are named. Raises ConfigError."""
    for name in names:
        if name not in SYSTEMS:
            raise ConfigError(
                f"there is no system {name!r}",
                expected="of " + ", ".join(SYSTEMS),
                found=name,
                fix="set settings.systems",
            )
    return [system for name, system in SYSTEMS.items() if not names or name in names]
