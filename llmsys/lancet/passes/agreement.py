"""All ranks compare what they are about to run before anything runs, and take the plan that one of them made.

Ranks whose graphs differ would start different all-to-alls and wait for each other for ever. The exchange goes through
the store of the process group, not through collectives: it works on every backend, says which rank is missing, and
leaves the group usable. The first rank of the group compares, plans, and tells the others.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import count, zip_longest

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from llmsys.core.errors import DeadlineError, InputError, LlmsysError

_AT_ONCE_S = 0.01
_CHUNK_BYTES = 4 << 20  # below the largest message of torch's store
_numbers: dict[str, count[int]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """``compare_s``: until all ranks have come with their graphs; ``plan_s``: until the first rank has planned."""

    compare_s: float = 300.0
    plan_s: float = 3600.0


def agree(
    lines: Sequence[str],
    make: Callable[[], str],
    *,
    group: dist.ProcessGroup | None = None,
    deadlines: Deadlines | None = None,
    error: Exception | None = None,
) -> str:
    """What ``make`` returns on the first rank of the group, if the ``lines`` of all its ranks are equal.

    All ranks call it together, each time in the same order. A rank that cannot go on passes its ``error``. Blocks.
    Every rank raises the same: InputError with the first line that differs and both ranks, DeadlineError naming the
    ranks that did not come, and what a rank's ``error``, or ``make``, was. A rank whose first rank is missing gets a
    DeadlineError naming that one.
    """
    ranks = tuple(dist.get_process_group_ranks(group if group is not None else dist.group.WORLD))
    name = "-".join(map(str, ranks)) if group is not None else "all"
    prefix = f"llmsys/lancet/{name}/{next(_numbers.setdefault(name, count()))}"
    exchange = _Exchange(PrefixStore(prefix, _get_default_store()), ranks, deadlines or Deadlines())
    if dist.get_rank() == ranks[0]:
        return exchange.lead(lines, make, error)
    return exchange.follow(lines, error)


class _Exchange:
    """Keys: ``digest<rank>`` and ``lines<rank>`` of each rank, ``verdict`` and ``made`` of the first."""

    def __init__(self, store: Store, ranks: tuple[int, ...], deadlines: Deadlines) -> None:
        self._store = store
        self._ranks = ranks
        self._deadlines = deadlines

    def lead(self, lines: Sequence[str], make: Callable[[], str], error: Exception | None) -> str:
        own = self._ranks[0]
        if error is not None:
            self._put("verdict", _packed(_told(error, own)))
            raise error
        found = self._compare(lines)
        if found is None:
            self._put("verdict", "")
            try:
                made = make()
            except Exception as failure:
                self._put("made", _packed(_told(failure, own)))
                raise
            self._put("made", "=" + made)
            return made
        self._put("verdict", _packed(found))
        raise found

    def follow(self, lines: Sequence[str], error: Exception | None) -> str:
        own = dist.get_rank()
        text = "\n".join(lines)
        self._put(f"lines{own}", text)
        self._put(f"digest{own}", _packed(_told(error, own)) if error is not None else _digest(text))
        if error is not None:
            raise error
        answer = ""
        for key, limit_s in (("verdict", self._deadlines.compare_s), ("made", self._deadlines.plan_s)):
            # The first rank itself waits until the deadline; then it tells, and this needs a moment.
            received = self._get(key, 1.25 * limit_s + 5.0)
            if received is None:
                raise self._late([self._ranks[0]], "its comparison of the graphs" if key == "verdict" else "its plan")
            answer = received
            if answer and not answer.startswith("="):
                raise _unpacked(answer)
        return answer.removeprefix("=")

    def _compare(self, lines: Sequence[str]) -> LlmsysError | None:
        text = "\n".join(lines)
        others = self._ranks[1:]
        end_s = time.monotonic() + self._deadlines.compare_s
        found: dict[int, str] = {}
        late: list[int] = []
        for rank in others:
            answer = self._get(f"digest{rank}", max(_AT_ONCE_S, end_s - time.monotonic()))
            if answer is None:
                late.append(rank)
            else:
                found[rank] = answer
        for answer in found.values():
            if answer.startswith("{"):
                return _unpacked(answer)
        if late:
            return self._late(late, "their graphs")
        for rank, answer in found.items():
            if answer != _digest(text):
                theirs = self._get(f"lines{rank}", self._deadlines.compare_s) or ""
                return _difference(self._ranks[0], lines, rank, theirs.split("\n"))
        return None

    def _late(self, ranks: Sequence[int], what: str) -> DeadlineError:
        return DeadlineError(
            f"lancet: rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} did not send {what}",
            expected=f"all of the ranks {', '.join(map(str, self._ranks))} compile the same step at the same time, "
            f"within {self._deadlines.compare_s:g} s (and plan within {self._deadlines.plan_s:g} s)",
            found=f"rank {dist.get_rank()} waited alone; a rank compiles anew when the shapes of its batch change",
            fix="give all ranks batches of one shape (drop or pad the last one), or raise timeout_s",
        )

    def _put(self, key: str, text: str) -> None:
        data = zlib.compress(text.encode())
        chunks = [data[at : at + _CHUNK_BYTES] for at in range(0, len(data), _CHUNK_BYTES)] or [b""]
        for place, chunk in enumerate(chunks):
            self._store.set(f"{key}.{place}", chunk.hex())
        self._store.set(key, str(len(chunks)))

    def _get(self, key: str, timeout_s: float) -> str | None:
        """None if it is not there in time."""
        try:
            self._store.wait([key], timedelta(seconds=timeout_s))
        except RuntimeError:  # DistStoreError, of which torch 2.11 and 2.13 have different bases
            return None
        number = int(self._store.get(key))
        data = b"".join(bytes.fromhex(self._store.get(f"{key}.{place}").decode()) for place in range(number))
        return zlib.decompress(data).decode()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _difference(first: int, lines: Sequence[str], second: int, others: Sequence[str]) -> InputError:
    pairs = enumerate(zip_longest(lines, others, fillvalue="(nothing)"), 1)
    number, (mine, theirs) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
    return InputError(
        f"lancet: the graphs of ranks {first} and {second} differ, first in line {number}",
        expected=f"the same step on every rank; rank {first} has: {mine}",
        found=f"rank {second} has: {theirs}",
        fix="give all ranks the same model, settings and batch shape; branches on the rank must not change the graph",
    )


def _told(error: BaseException, rank: int) -> LlmsysError:
    """An error of one rank as the others raise it."""
    if isinstance(error, InputError):
        return InputError(
            f"rank {rank}: {error.summary}", expected=error.expected, found=error.found or "an error", fix=error.fix
        )
    return LlmsysError(
        f"rank {rank} failed: {getattr(error, 'summary', '') or error!r}",
        expected="every rank captures the step, and the first one plans it",
        found=f"{type(error).__name__} on rank {rank}",
        fix="see the error on that rank",
    )


def _packed(error: LlmsysError) -> str:
    texts = [error.summary, error.expected, error.found, error.fix]
    return json.dumps({"class": type(error).__name__, "texts": texts})


def _unpacked(text: str) -> LlmsysError:
    given = json.loads(text)
    summary, expected, found, fix = given["texts"]
    kinds: dict[str, type[LlmsysError]] = {"InputError": InputError, "DeadlineError": DeadlineError}
    return kinds.get(given["class"], LlmsysError)(summary, expected=expected, found=found, fix=fix)
