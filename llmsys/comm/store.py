"""A small shared store of bytes by key, where ranks meet and planners leave plans.

`open_store` makes one from a URL: ``tcp://127.0.0.1:1234?host=1`` serves torch's TCPStore from this process (the
embedded default; the others use the URL without ``host=1``), ``redis://user:password@127.0.0.1:6379/0`` uses a Redis
server, ``rediss://`` the same over TLS. A store of its own process: ``python -m llmsys.comm.store 127.0.0.1 1234``.
"""

from __future__ import annotations

import copy
import re
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sized
from types import TracebackType
from typing import Self
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from llmsys.core.errors import ConfigError, DeadlineError, InputError

DEFAULT_TIMEOUT_S = 30.0
MAX_VALUE_BYTES = (8 << 20) - 64
"""The largest value of any store: torch's server takes no message above 8 MiB."""
MAX_KEY_BYTES = 1024

_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.001, 0.05


class Store(ABC):
    """Values are bytes, keys are texts. Every method may be called by any thread, and blocks only as it says.

    What one process has written, all see. A key holds a value (`set`, `compare_and_set`) or a count (`add`); `get`
    of a count is its decimal text. Methods raise InputError for keys and values out of bounds, and PeerLostError when
    the server has gone.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        """For errors and for people; without any secret."""
        self._prefix = ""

    def scoped(self, prefix: str) -> Self:
        """The same store with keys below ``prefix + "/"``: what is done there is not seen elsewhere.

        Shares the connection: closing either closes both.
        """
        scoped = copy.copy(self)
        scoped._prefix = f"{self._full(prefix)}/"
        return scoped

    def set(self, key: str, value: bytes) -> None:
        """Store ``value`` (at most MAX_VALUE_BYTES), in place of any before it."""
        self._write(self._full(key), self._checked(key, value))

    def get(self, key: str, timeout_s: float) -> bytes:
        """The value of ``key``; blocks until there is one. Raises DeadlineError naming key and store."""
        pause_s, end_s = _FIRST_PAUSE_S, time.monotonic() + timeout_s
        while (value := self._read(self._full(key))) is None:
            remaining_s = end_s - time.monotonic()
            if not remaining_s > 0:
                raise DeadlineError(
                    f"key {self._full(key)!r} was not set in the store at {self.address} within {timeout_s:g} s",
                    expected="another process sets the key in time",
                    found="no such key",
                    fix="look at the process that should set it, or raise timeout_s",
                )
            time.sleep(min(pause_s, remaining_s))
            pause_s = min(1.5 * pause_s, _LAST_PAUSE_S)
        return value

    def wait(self, keys: Iterable[str], timeout_s: float) -> None:
        """Block until all ``keys`` have values. Raises DeadlineError naming the first that has none."""
        end_s = time.monotonic() + timeout_s
        for key in keys:
            self.get(key, max(0.0, end_s - time.monotonic()))

    def add(self, key: str, amount: int) -> int:
        """Add to a count, which starts at 0, and return the new count; no two calls see the same one (amount > 0)."""
        return self._add(self._full(key), amount)

    def compare_and_set(self, key: str, expected: bytes | None, desired: bytes) -> bool:
        """Store ``desired`` if the value is ``expected`` (None: there is none), in one step; whether it was stored.

        For small values, such as who leads: torch's server takes seconds to compare several MB.
        """
        return self._swap(self._full(key), expected, self._checked(key, desired))

    def delete(self, key: str) -> bool:
        """Remove the key; whether it was there."""
        return self._remove(self._full(key))

    def keys(self, prefix: str = "") -> tuple[str, ...]:
        """The keys that start with ``prefix``, sorted. Looks at the whole store: for clean-up, not for a loop."""
        found = self._list(self._prefix + prefix)
        return tuple(sorted(key.removeprefix(self._prefix) for key in found))

    @abstractmethod
    def close(self) -> None:
        """Let go of the connection, and end the server if this store is it. May be called again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r}, prefix={self._prefix!r})"

    def _full(self, key: str) -> str:
        full = self._prefix + key
        if not key or len(full.encode()) > MAX_KEY_BYTES:
            raise InputError(
                f"the key {key[:80]!r} cannot be used",
                expected=f"1 to {MAX_KEY_BYTES} bytes, with the scopes before it",
                found=f"{len(full.encode())} bytes",
                fix="name the key within these bounds",
            )
        return full

    def _checked(self, key: str, value: object) -> bytes:
        sized = isinstance(value, bytes | bytearray | memoryview)
        if not isinstance(value, bytes | bytearray | memoryview) or len(value) > MAX_VALUE_BYTES:
            raise InputError(
                f"the value of key {self._full(key)!r} cannot be stored",
                expected=f"bytes, at most {MAX_VALUE_BYTES} of them",
                found=f"{len(value)} bytes" if isinstance(value, Sized) and sized else type(value).__name__,
                fix="store it in parts under several keys" if sized else "encode it first",
            )
        return bytes(value)

    @abstractmethod
    def _read(self, key: str) -> bytes | None: ...

    @abstractmethod
    def _write(self, key: str, value: bytes) -> None: ...

    @abstractmethod
    def _add(self, key: str, amount: int) -> int: ...

    @abstractmethod
    def _swap(self, key: str, expected: bytes | None, desired: bytes) -> bool: ...

    @abstractmethod
    def _remove(self, key: str) -> bool: ...

    @abstractmethod
    def _list(self, prefix: str) -> list[str]: ...


def open_store(url: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Store:
    """Open the store that ``url`` names; waits up to ``timeout_s`` for its server, and later for each answer.

    ``tcp://HOST:PORT?host=1``: with host=1 this process serves, on that interface only; port 0 finds a free one, see
    ``address``. ``redis://USER:PASSWORD@HOST:PORT/DB``, with USER left out for Redis's default user, and percent signs
    for special letters. Without a password it is refused unless ``?allow_unauthenticated=1`` says so. ``rediss://`` is
    TLS, with ``?ca=FILE`` for a certificate of one's own. Raises ConfigError, DeadlineError, AuthenticationError;
    no error ever shows the password.
    """
    scheme = url.partition(":")[0] if re.match(r"[a-z]+://", url) else ""
    if scheme == "tcp":
        from llmsys.comm.store_torch import TorchStore

        host, port, options, _ = _parts(url, ("host",))
        return TorchStore(host, port, serve=_flag(options, "host"), timeout_s=timeout_s)
    if scheme in ("redis", "rediss"):
        from llmsys.comm.store_redis import RedisStore

        host, port, options, split = _parts(url, ("allow_unauthenticated", "ca"))
        return RedisStore(
            host,
            port,
            database=_number(split.path.strip("/") or "0", "database"),
            user=unquote(split.username or "") or None,
            password=unquote(split.password or "") or None,
            tls=scheme == "rediss",
            tls_ca_file=options.get("ca"),
            allow_unauthenticated=_flag(options, "allow_unauthenticated"),
            timeout_s=timeout_s,
        )
    raise ConfigError(
        "the store has no URL that we know",
        expected="tcp://HOST:PORT, redis://USER:PASSWORD@HOST:PORT/DB or rediss://...",
        found=f"a URL with scheme {scheme!r}",
        fix="set the store's URL",
    )


def _parts(url: str, known: tuple[str, ...]) -> tuple[str, int, dict[str, str], SplitResult]:
    """Host, port and options. A password with special letters may end up anywhere, so errors show no part of it."""
    try:
        split = urlsplit(url)
        host, port = split.hostname, split.port
    except ValueError:  # its text holds parts of the URL
        host = port = None
    if not host or port is None or split.fragment:
        raise ConfigError(
            "the store's URL has no host and port",
            expected="SCHEME://HOST:PORT or SCHEME://USER:PASSWORD@HOST:PORT",
            found="a URL of another form (not shown: it may hold a password)",
            fix="write HOST:PORT, and special letters of user and password by percent signs, as %23 for #",
        ) from None
    options = dict(parse_qsl(split.query, keep_blank_values=True))
    if unknown := options.keys() - set(known):
        raise ConfigError(
            "the store's URL has options that we do not know",
            expected=", ".join(known),
            found=f"{len(unknown)} others (not shown: they may hold a password)",
            fix="leave them out, and write ? and & in a password as %3F and %26",
        )
    return host, port, options, split


def _flag(options: dict[str, str], name: str) -> bool:
    return bool(_number(options.get(name, "0"), name))


def _number(text: str, name: str) -> int:
    if not text.isdecimal():
        raise ConfigError(
            f"the {name} of the store's URL is no number",
            expected="a whole number",
            found=f"{len(text)} other letters (not shown: they may be of a password)",
            fix=f"set {name} to a number; in a password, write / as %2F",
        )
    return int(text)


def _serve(arguments: list[str]) -> None:
    host, port = arguments
    with open_store(f"tcp://{host}:{port}?host=1") as store:
        print(store.address, flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    _serve(sys.argv[1:])
