"""The embedded store: torch's TCPStore, with its server in one of the processes."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from llmsys.comm.store import DEFAULT_TIMEOUT_S, Store
from llmsys.core.errors import ConfigError, DeadlineError, InputError, PeerLostError

_VALUE = b"="  # the first byte of a value; counts are decimal texts
_MARK_BYTES = 8
_RETRY_S = 0.05


class TorchStore(Store):
    """A connection to torch's TCPStore at ``host`` and ``port``; with ``serve`` its server runs in this process.

    The server listens on ``host``'s interface only, and on a free port for 0; it ends with `close`. It knows no
    passwords: listen on loopback, or on a network that only the job reaches. Blocks up to ``timeout_s`` for a server
    that is not there yet. Raises DeadlineError, and ConfigError if the address cannot be listened on.

    A value is kept behind a mark of its writer's, new for each write, so that `compare_and_set` can tell its own
    success from another's, and a value of no bytes from none: TCPStore's own call tells neither.
    """

    def __init__(self, host: str, port: int, *, serve: bool = False, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        store = _listen(host, port, timeout_s) if serve else _connect(host, port, timeout_s)
        super().__init__(_address(host, store.port))
        self._held = [store]  # shared with the scoped copies, so that close is for all

    @property
    def port(self) -> int:
        return int(self._store("port").port)

    def close(self) -> None:
        self._held.clear()

    def _store(self, operation: str) -> dist.TCPStore:  # type: ignore[name-defined]
        if not self._held:
            raise InputError(
                f"{operation}: the store at {self.address} was closed",
                expected="an open store",
                found="a closed one",
                fix="close the store after its last use",
            )
        return self._held[0]

    @contextlib.contextmanager
    def _asking(self, operation: str) -> Iterator[dist.TCPStore]:  # type: ignore[name-defined]
        try:
            yield self._store(operation)
        except RuntimeError as error:
            raise PeerLostError(
                f"{operation}: lost the store at {self.address}",
                expected="an answer from its server",
                found=str(error).partition("\n")[0],
                fix="see whether the process that serves the store has ended",
            ) from error

    def _raw(self, key: str, operation: str) -> bytes | None:
        """What the server keeps. TCPStore's get would wait for it, but comparing with what nobody has does not."""
        probe = secrets.token_bytes(16)
        with self._asking(operation) as store:
            found = bytes(store.compare_set(key, probe, probe))
        return None if found == probe else found

    def _read(self, key: str) -> bytes | None:
        raw = self._raw(key, f"get of key {key!r}")
        return None if raw is None else _value(raw)

    def _write(self, key: str, value: bytes) -> None:
        with self._asking(f"set of key {key!r}") as store:
            store.set(key, _marked(value))

    def _add(self, key: str, amount: int) -> int:
        operation = f"add to key {key!r}"
        raw = self._raw(key, operation)
        if raw is not None and raw.startswith(_VALUE):  # TCPStore's server drops a client that adds to other bytes
            raise InputError(
                f"{operation}: it has a value",
                expected="a key that only add has written",
                found=f"a value of {len(_value(raw))} bytes",
                fix="use another key for the count",
            )
        with self._asking(operation) as store:
            return int(store.add(key, amount))

    def _swap(self, key: str, expected: bytes | None, desired: bytes) -> bool:
        operation, marked = f"compare and set of key {key!r}", _marked(desired)
        while True:
            raw = b"" if expected is None else self._raw(key, operation)
            if expected is not None and (raw is None or _value(raw) != expected):
                return False
            with self._asking(operation) as store:
                found = bytes(store.compare_set(key, raw, marked))
            if found == marked:
                return True
            if expected is None:
                return False
            # Written in between, perhaps with the same value: look again.

    def _remove(self, key: str) -> bool:
        with self._asking(f"delete of key {key!r}") as store:
            return bool(store.delete_key(key))

    def _list(self, prefix: str) -> list[str]:
        with self._asking("list of keys") as store:
            if not hasattr(store, "list_keys"):
                raise ConfigError(
                    "this torch cannot list the keys of its store",
                    expected="a torch whose TCPStore has list_keys",
                    found=f"a {type(store).__name__} without",
                    fix="install a newer torch, or use a redis:// store",
                )
            return [key for key in store.list_keys() if key.startswith(prefix)]


def _marked(value: bytes) -> bytes:
    return _VALUE + secrets.token_bytes(_MARK_BYTES) + value


def _value(raw: bytes) -> bytes:
    return raw[len(_VALUE) + _MARK_BYTES :] if raw.startswith(_VALUE) else raw


def _address(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _listen(host: str, port: int, timeout_s: float) -> dist.TCPStore:  # type: ignore[name-defined]
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"cannot serve a store at {_address(host, port)}",
            expected="an address of this machine and a free port",
            found=str(error),
            fix="choose another port, or 0 for any",
        ) from error
    with listener:
        port = listener.getsockname()[1]
        # The server takes a socket that is bound already; its own would listen on all interfaces.
        return dist.TCPStore(  # type: ignore[attr-defined]
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )


def _connect(host: str, port: int, timeout_s: float) -> dist.TCPStore:  # type: ignore[name-defined]
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            # torch's own attempts overrun the limit and write long warnings, so first see that somebody listens.
            socket.create_connection((host, port), timeout=max(_RETRY_S, end_s - time.monotonic())).close()
            return dist.TCPStore(  # type: ignore[attr-defined]
                host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
            )
        except (OSError, RuntimeError) as error:
            if time.monotonic() + _RETRY_S > end_s:
                raise DeadlineError(
                    f"no store answered at {_address(host, port)} within {timeout_s:g} s",
                    expected="a process that serves it, with ?host=1",
                    found=str(error).partition("\n")[0],
                    fix="start that process, correct the address, or raise timeout_s",
                ) from error
            time.sleep(_RETRY_S)
