"""The store on a Redis server, for when the embedded one is outgrown. Needs the package ``redis``."""

from __future__ import annotations

import contextlib
import importlib
import re
import time
from collections.abc import Iterator
from typing import Any

from llmsys.comm.store import DEFAULT_TIMEOUT_S, Store
from llmsys.core.errors import AuthenticationError, ConfigError, DeadlineError, InputError, LlmsysError, PeerLostError

_RETRY_S = 0.05
# Redis runs a script without anything in between.
_SWAP = """
local found = redis.call('GET', KEYS[1])
if ARGV[1] == '0' then
  if found then return 0 end
elseif found ~= ARGV[2] then
  return 0
end
redis.call('SET', KEYS[1], ARGV[3])
return 1
"""


class RedisStore(Store):
    """A connection to the Redis server at ``host`` and ``port``.

    ``user`` defaults to Redis's default user. A password is required unless ``allow_unauthenticated``: who reaches an
    open Redis server can change every plan. Without ``tls`` the password crosses the network as it is. Blocks up to
    ``timeout_s`` for a server that is not there yet, later as long for each answer. Raises ConfigError (no package, no
    password), AuthenticationError, DeadlineError. Other programs' keys on the server are kept apart by `scoped`.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        database: int = 0,
        user: str | None = None,
        password: str | None = None,
        tls: bool = False,
        tls_ca_file: str | None = None,
        allow_unauthenticated: bool = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        address = f"{'rediss' if tls else 'redis'}://{host}:{port}/{database}"
        super().__init__(address)
        if password is None and not allow_unauthenticated:
            raise ConfigError(
                f"the store at {address} has no password",
                expected="redis://USER:PASSWORD@HOST:PORT/DB",
                found="no password",
                fix="give the server a password (requirepass or an ACL user) and put it into the URL, or set "
                "allow_unauthenticated=1 for a server that only this job reaches",
            )
        self._redis = _import_redis()
        settings: dict[str, Any] = {"ssl": True, "ssl_ca_certs": tls_ca_file} if tls else {}
        self._client = self._redis.Redis(
            host=host,
            port=port,
            db=database,
            username=user,
            password=password,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            # No second attempts behind our back: an add whose answer was lost would count twice.
            retry=importlib.import_module("redis.retry").Retry(importlib.import_module("redis.backoff").NoBackoff(), 0),
            **settings,
        )
        self._meet(timeout_s)

    def _meet(self, timeout_s: float) -> None:
        end_s = time.monotonic() + timeout_s
        while True:
            try:
                with self._asking("opening"):
                    self._client.ping()
                return
            except PeerLostError as error:
                if time.monotonic() + _RETRY_S > end_s:
                    self.close()
                    raise DeadlineError(
                        f"no Redis server answered at {self.address} within {timeout_s:g} s",
                        expected="a server that listens there" + (", with TLS" if "rediss" in self.address else ""),
                        found=error.found,
                        fix="start the server, correct the address, or raise timeout_s",
                    ) from None
                time.sleep(_RETRY_S)
            except LlmsysError:
                self.close()
                raise

    def close(self) -> None:
        self._client.close()

    @contextlib.contextmanager
    def _asking(self, operation: str) -> Iterator[None]:
        # The client's errors are not chained: their texts are ours to choose, and never hold the password.
        problems = self._redis.exceptions
        try:
            yield
        except (problems.AuthenticationError, problems.NoPermissionError) as error:
            raise self._refused(operation, error) from None
        except (problems.ConnectionError, problems.TimeoutError, OSError) as error:
            raise PeerLostError(
                f"{operation}: lost the Redis server at {self.address}",
                expected="an answer from the server",
                found=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
                fix="see whether the server runs and its log",
            ) from None
        except problems.ResponseError as error:
            if "AUTH" in str(error).upper():
                raise self._refused(operation, error) from None
            raise InputError(
                f"{operation}: the Redis server at {self.address} refused",
                expected="a key that is used in one way only, and a server that keeps writes",
                found=str(error),
                fix="use another key, or see the server's settings",
            ) from None

    def _refused(self, operation: str, error: Exception) -> AuthenticationError:
        return AuthenticationError(
            f"{operation}: the Redis server at {self.address} does not let us in",
            expected="user and password that the server knows, and that may use these keys and commands",
            found=str(error),
            fix="correct user and password in the store's URL, or the user's rights on the server",
        )

    def _read(self, key: str) -> bytes | None:
        with self._asking(f"get of key {key!r}"):
            found = self._client.get(key)
        return None if found is None else bytes(found)

    def _write(self, key: str, value: bytes) -> None:
        with self._asking(f"set of key {key!r}"):
            self._client.set(key, value)

    def _add(self, key: str, amount: int) -> int:
        with self._asking(f"add to key {key!r}"):
            return int(self._client.incrby(key, amount))

    def _swap(self, key: str, expected: bytes | None, desired: bytes) -> bool:
        there, value = ("0", b"") if expected is None else ("1", expected)
        with self._asking(f"compare and set of key {key!r}"):
            return bool(self._client.eval(_SWAP, 1, key, there, value, desired))

    def _remove(self, key: str) -> bool:
        with self._asking(f"delete of key {key!r}"):
            return bool(self._client.delete(key))

    def _list(self, prefix: str) -> list[str]:
        pattern = re.sub(r"([*?\[\]\\^])", r"\\\1", prefix) + "*"
        with self._asking("list of keys"):
            # A scan may show a key twice.
            return sorted({key.decode() for key in self._client.scan_iter(match=pattern, count=1000)})


def _import_redis() -> Any:
    try:
        return importlib.import_module("redis")
    except ModuleNotFoundError:
        raise ConfigError(
            "a redis:// store needs the package redis",
            expected="the package redis",
            found="it is not installed",
            fix="pip install redis, or use the embedded store, tcp://HOST:PORT",
        ) from None
