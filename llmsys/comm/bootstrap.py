"""How endpoints find and trust each other: a listener, a dialler, and the identity that both present.

All transports share this; what they do with the connected socket afterwards is theirs. `handshake` is the protocol.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable

from llmsys.comm.handshake import (
    Channel,
    Hello,
    RefusedError,
    Session,
    dialler_handshake,
    listener_handshake,
    pack_hello,
)
from llmsys.comm.transports.base import TransportConfig
from llmsys.core.errors import ConfigError, DeadlineError, InputError, LlmsysError, TransportError

__all__ = [
    "SECRET_VARIABLE",
    "Hello",
    "Listener",
    "RefusedError",
    "Session",
    "dial",
    "host_id",
    "job_secret",
    "new_identity",
    "pack_hello",
    "parse_address",
]

SECRET_VARIABLE = "LLMSYS_JOB_SECRET"
_WILDCARDS = ("", "0.0.0.0", "::")
_RETRY_S = 0.05

_log = logging.getLogger(__name__)
_counter = itertools.count(1)


def job_secret(config: TransportConfig) -> bytes:
    """The secret that all processes of the job share: the setting, else the environment variable."""
    secret = config.secret or os.environ.get(SECRET_VARIABLE, "")
    if not secret:
        raise ConfigError(
            "the job has no secret",
            expected="a text that all processes of the job know and nobody else does",
            found=f"neither TransportConfig.secret nor the environment variable {SECRET_VARIABLE}",
            fix=f"export {SECRET_VARIABLE}=$(openssl rand -hex 32) before starting the processes of the job",
        )
    return secret.encode()


def new_identity(config: TransportConfig) -> tuple[str, int]:
    """Name and generation of an endpoint that starts now; the generation is random, so a restart has another."""
    name = config.name or f"{socket.gethostname()}-{os.getpid()}-{next(_counter)}"
    return name, secrets.randbelow((1 << 63) - 1) + 1


def host_id() -> str:
    """Equal in two processes if they run on one booted kernel and see the same process ids and shared memory.

    Containers have namespaces of their own, so that a process id or a name in /dev/shm means something else there.
    """
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    parts = [boot]
    for path in ("/proc/self/ns/pid", "/dev/shm"):
        try:
            status = os.stat(path)
            parts.append(f"{status.st_dev:x}.{status.st_ino:x}")
        except OSError:
            parts.append("none")
    return "/".join(parts)


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[IPv6]:port"."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    inner = host[1:-1] if bracketed else host
    if not colon or not inner or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise _bad_address(address)
    if ":" in inner and not bracketed:
        raise _bad_address(address)
    return inner, int(port)


def _bad_address(address: str) -> InputError:
    return InputError(
        "not an address of an endpoint",
        expected='"host:port" or "[IPv6 address]:port", with a port of 1 to 65535',
        found=repr(address),
        fix="use the address that the endpoint itself gives (transport.local.address)",
    )


def dial(
    address: str, *, secret: bytes, hello: Hello, timeout_s: float, wait: bool = False
) -> tuple[socket.socket, Hello, Session]:
    """Connects to a `Listener`. Returns the socket (blocking, no delay, the caller's to close), its hello, and tokens.

    wait: while nobody listens at the address, try again until the deadline, instead of failing at once.

    Raises:
        DeadlineError: no answer within `timeout_s`. AuthenticationError: secrets differ.
        RefusedError: it does not want us. TransportError: nobody listens there, or not this protocol or transport.
    """
    host, port = parse_address(address)
    deadline = time.monotonic() + timeout_s
    sock = _connect(address, host, port, deadline, timeout_s, wait)
    try:
        channel = Channel(sock, address=address, own_protocol=hello.protocol, timeout_s=timeout_s, deadline_s=deadline)
        peer, session = dialler_handshake(channel, secret=secret, hello=hello)
        sock.settimeout(None)
        return sock, peer, session
    except BaseException:
        sock.close()
        raise


def _connect(address: str, host: str, port: int, deadline: float, timeout_s: float, wait: bool) -> socket.socket:
    while True:
        remaining = deadline - time.monotonic()
        try:
            if remaining <= 0:
                raise TimeoutError
            sock = socket.create_connection((host, port), timeout=remaining)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if sock.getsockname() != sock.getpeername():
                return sock
            # TCP connects a socket with itself when it happens to pick the port it dials.
            sock.close()
            refusal: OSError = ConnectionRefusedError("nobody listens")
        except TimeoutError as error:
            raise DeadlineError(
                f"no connection to {address}",
                expected=f"a listener that takes the connection within {timeout_s:.3g} s",
                found="no answer",
                fix="check that the process there runs, or raise connect_timeout_s",
            ) from error
        except OSError as error:
            refusal = error
        if not wait or not isinstance(refusal, ConnectionRefusedError):
            raise TransportError(
                f"no connection to {address}",
                expected="an llmsys endpoint that listens there",
                found=str(refusal),
                fix="check the address, and that the process there runs and listens on a reachable interface",
            ) from refusal
        time.sleep(max(0.0, min(_RETRY_S, deadline - time.monotonic())))


class Listener:
    """Takes connections of peers that know the secret. Strangers cost a thread for a moment and nothing else.

    hello: what to present, asked for each connection.
    accepted: gets the socket (blocking, no delay, its to close unless it raises), the peer's hello and the tokens, on
        a thread of the connection's own; it should hand over and return.
    admit: called before the peer is answered; raises RefusedError to send it away.
    failed: hears of handshakes that failed, and the hello if it had been admitted. They are logged in any case.
    start_now: False lets connections wait until `start`; for callers whose `hello` needs `address`.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        secret: bytes,
        hello: Callable[[], Hello],
        accepted: Callable[[socket.socket, Hello, Session], None],
        admit: Callable[[Hello], None] | None = None,
        failed: Callable[[LlmsysError, Hello | None], None] | None = None,
        handshake_timeout_s: float = 10.0,
        max_handshakes: int = 64,
        start_now: bool = True,
    ) -> None:
        self._secret, self._hello, self._accepted = secret, hello, accepted
        self._admit, self._failed = admit, failed
        self._timeout_s, self._max_handshakes = handshake_timeout_s, max_handshakes
        self._changed = threading.Condition()
        self._handshakes: dict[threading.Thread, socket.socket | None] = {}
        self._closing = False
        self._sock = _listening_socket(host, port)
        shown = socket.gethostname() if host in _WILDCARDS else host
        bound_port = self._sock.getsockname()[1]
        self.address = f"[{shown}]:{bound_port}" if ":" in shown else f"{shown}:{bound_port}"
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._thread = threading.Thread(target=self._accept_all, name="llmsys-listener", daemon=True)
        self._started = False
        if start_now:
            self.start()

    def start(self) -> None:
        """Begins to take connections; does nothing the second time, or after `close`."""
        with self._changed:
            if not self._started and not self._closing:
                self._started = True
                self._thread.start()

    def close(self) -> None:
        """Stops listening, ends handshakes under way, joins the threads (so hold no lock that `accepted` waits for).

        Can be called again.
        """
        with self._changed:
            first, self._closing = not self._closing, True
            for sock in self._handshakes.values():
                if sock is not None:
                    # It wakes the thread; it fails if the peer has gone.
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
            self._changed.notify_all()
        if first:
            self._wake_writer.send(b"x")
        if self._started:
            self._thread.join()
        with self._changed:
            threads = list(self._handshakes)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()
        if first:
            for sock in (self._sock, self._wake_reader, self._wake_writer):
                sock.close()

    def _accept_all(self) -> None:
        poll = select.poll()
        for waited in (self._sock, self._wake_reader):
            poll.register(waited, select.POLLIN)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or len(self._handshakes) < self._max_handshakes)
                if self._closing:
                    return
            poll.poll()
            try:
                sock, origin = self._sock.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                # Out of file descriptors, say: what waits is taken when some are free again.
                _log.warning("cannot take a connection: %s", error)
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, timeout=_RETRY_S)
                continue
            self._start(sock, f"{origin[0]}:{origin[1]}")

    def _start(self, sock: socket.socket, origin: str) -> None:
        thread = threading.Thread(target=self._serve, args=(sock, origin), name="llmsys-handshake", daemon=True)
        with self._changed:
            if self._closing:
                sock.close()
                return
            try:
                thread.start()
            except RuntimeError as error:
                _log.warning("no thread for a connection from %s: %s", origin, error)
                sock.close()
                return
            self._handshakes[thread] = sock

    def _serve(self, sock: socket.socket, origin: str) -> None:
        admitted: list[Hello] = []

        def admit(peer: Hello) -> None:
            if self._admit is not None:
                self._admit(peer)
            admitted.append(peer)

        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            hello = self._hello()
            deadline_s = time.monotonic() + self._timeout_s
            channel = Channel(
                sock,
                address=origin,
                own_protocol=hello.protocol,
                timeout_s=self._timeout_s,
                deadline_s=deadline_s,
            )
            peer, session = listener_handshake(channel, secret=self._secret, hello=hello, admit=admit)
            sock.settimeout(None)
            self._let_go()
            self._accepted(sock, peer, session)
        except LlmsysError as error:
            _log.info("a connection from %s was not accepted: %s", origin, error.summary)
            self._give_up(sock, error, admitted)
        except Exception as error:
            _log.exception("a connection from %s failed", origin)
            self._give_up(sock, _failure(origin, error), admitted)
        finally:
            with self._changed:
                self._handshakes.pop(threading.current_thread(), None)
                self._changed.notify_all()

    def _give_up(self, sock: socket.socket, error: LlmsysError, admitted: list[Hello]) -> None:
        self._let_go()
        # Before the peer sees it: it may connect again at once.
        if self._failed is not None:
            self._failed(error, admitted[0] if admitted else None)
        sock.close()

    def _let_go(self) -> None:
        """From here on `close` leaves this thread's socket alone: it is another's, or closed and its number reused."""
        with self._changed:
            self._handshakes[threading.current_thread()] = None


def _listening_socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(128)
        sock.setblocking(False)
        return sock
    except OSError as error:
        sock.close()
        raise TransportError(
            f"cannot listen on {host or 'all interfaces'}, port {port}",
            expected="a free port on an address of this host",
            found=str(error),
            fix="set TransportConfig.port to 0 for any free port, and host to an address of this host",
        ) from error


def _failure(origin: str, error: Exception) -> TransportError:
    return TransportError(
        f"a connection from {origin} failed",
        expected="a transport that takes it over",
        found=f"{type(error).__name__}: {error}",
        fix="see the log for where",
    )
