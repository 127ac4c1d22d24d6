"""What transports on foreign libraries share: cutting a checked batch into parts, memory as arrays, and errors."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmsys.comm.transports.base import Offsets
from llmsys.comm.transports.memory import Batch

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Entries of one or more groups of a batch, in the batch's order.

    local_addresses, remote_addresses: where each begins, in the memory of the process that it belongs to.
    lengths: in bytes, none is 0. groups: the index in `Batch.groups` that each came from.
    """

    local_addresses: Offsets
    remote_addresses: Offsets
    lengths: Offsets
    groups: Offsets


def parts_of(batch: Batch, *, max_bytes: int, max_entries: int) -> Iterator[Part]:
    """Parts of at most `max_bytes` and `max_entries` each; a longer entry becomes several."""
    whole = _pieces(_flat(batch), max_bytes)
    ends = np.cumsum(whole.lengths)
    begin = 0
    while begin < ends.size:
        before = int(ends[begin - 1]) if begin else 0
        end = min(int(np.searchsorted(ends, before + max_bytes, side="right")), begin + max_entries)
        yield Part(
            local_addresses=whole.local_addresses[begin:end],
            remote_addresses=whole.remote_addresses[begin:end],
            lengths=whole.lengths[begin:end],
            groups=whole.groups[begin:end],
        )
        begin = end


def _flat(batch: Batch) -> Part:
    empty = [np.empty(0, dtype=np.int64)]
    groups = batch.groups
    return Part(
        local_addresses=np.concatenate([g.local_offsets + g.local.address for g in groups] or empty),
        remote_addresses=np.concatenate([g.remote_offsets + g.remote.address for g in groups] or empty),
        lengths=np.concatenate([g.lengths for g in groups] or empty),
        groups=np.repeat(np.arange(len(groups)), [g.lengths.size for g in groups]),
    )


def _pieces(whole: Part, max_bytes: int) -> Part:
    if not whole.lengths.size or whole.lengths.max() <= max_bytes:
        return whole
    num_pieces = -(-whole.lengths // max_bytes)
    origin = np.repeat(np.arange(whole.lengths.size), num_pieces)
    firsts = np.cumsum(num_pieces) - num_pieces
    begins = (np.arange(origin.size) - firsts[origin]) * max_bytes
    return Part(
        local_addresses=whole.local_addresses[origin] + begins,
        remote_addresses=whole.remote_addresses[origin] + begins,
        lengths=np.minimum(whole.lengths[origin] - begins, max_bytes),
        groups=whole.groups[origin],
    )


def wait_for_verdict(check: Callable[[], None], timeout_s: float = 2.0) -> None:
    """After a library's error: `check` raises the better one if the peer has died, which shows on its connection only
    a moment after its memory is gone."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        check()
        time.sleep(0.005)


def bytes_at(address: int, size_bytes: int) -> Bytes:
    """Memory as an array that does not own it."""
    memory = memoryview((ctypes.c_uint8 * size_bytes).from_address(address))
    return np.frombuffer(memory.cast("B"), dtype=np.uint8)
