"""The listener and the dialler: mutual authentication, refusals, deadlines, and strangers that do no harm."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import msgpack
import pytest

from llmsys.comm import bootstrap
from llmsys.comm.bootstrap import Hello, Listener, RefusedError, Session, dial, host_id, job_secret, new_identity
from llmsys.comm.handshake import MAX_FRAME_BYTES
from llmsys.comm.transports.base import TransportConfig
from llmsys.core.errors import (
    AuthenticationError,
    ConfigError,
    DeadlineError,
    InputError,
    LlmsysError,
    TransportError,
)

SECRET = b"a secret that nobody may print"
WAIT_S = 20.0


def make_hello(name: str = "a", **changes: object) -> Hello:
    values: dict[str, object] = {
        "protocol": "ucx",
        "name": name,
        "generation": 7,
        "address": "127.0.0.1:1",
        "host_id": "h",
        "pid": 1,
        "lease_s": 10.0,
        "details": {"worker": b"\x00\xff" * 500, "number": 1 << 63, "text": "é"},
    }
    return Hello(**(values | changes))  # type: ignore[arg-type]


class Server:
    """A listener that keeps what it accepted and what failed."""

    def __init__(self, **options: object) -> None:
        self.accepted: queue.Queue[tuple[socket.socket, Hello, Session]] = queue.Queue()
        self.failed: queue.Queue[tuple[LlmsysError, Hello | None]] = queue.Queue()
        values: dict[str, object] = {
            "host": "127.0.0.1",
            "port": 0,
            "secret": SECRET,
            "hello": lambda: make_hello("server"),
            "accepted": lambda *given: self.accepted.put(given),
            "failed": lambda *given: self.failed.put(given),
        }
        self.listener = Listener(**(values | options))  # type: ignore[arg-type]
        self.address = self.listener.address

    def dial(self, **options: object) -> tuple[socket.socket, Hello, Session]:
        values: dict[str, object] = {"secret": SECRET, "hello": make_hello("client"), "timeout_s": WAIT_S}
        return dial(self.address, **(values | options))  # type: ignore[arg-type]

    def check_alive(self) -> None:
        sock, _, _ = self.dial()
        self.accepted.get(timeout=WAIT_S)[0].close()
        sock.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(**options: object) -> Server:
        servers.append(Server(**options))
        return servers[-1]

    yield start
    for server in servers:
        server.listener.close()
        while not server.accepted.empty():
            server.accepted.get()[0].close()


def raw(server: Server) -> socket.socket:
    host, port = bootstrap.parse_address(server.address)
    return socket.create_connection((host, port), timeout=WAIT_S)


def frame(message: object, magic: bytes = b"LLMS", version: int = 1) -> bytes:
    payload: bytes = msgpack.packb(message)
    return struct.pack("!4sHI", magic, version, len(payload)) + payload


def test_both_sides_learn_the_others_hello_and_matching_tokens(serve: Callable[..., Server]) -> None:
    server = serve()
    sock, hello, session = server.dial()
    other, other_hello, other_session = server.accepted.get(timeout=WAIT_S)
    with sock, other:
        assert (hello, other_hello) == (make_hello("server"), make_hello("client"))
        assert session.token_in == other_session.token_out
        assert session.token_out == other_session.token_in
        assert session.token_in != session.token_out
        for end, far in ((sock, other), (other, sock)):
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) and not end.get_inheritable()
            assert end.gettimeout() is None
            end.sendall(b"after")
            assert far.recv(5) == b"after"
    again, _, second = server.dial()
    again.close()
    assert second.token_in != session.token_in


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0"])
def test_addresses(host: str, serve: Callable[..., Server]) -> None:
    try:
        server = serve(host=host)
    except TransportError as error:
        if host == "::1":
            pytest.skip(f"no IPv6 here: {error.found}")
        raise
    assert server.address.startswith({"::1": "[::1]:", "0.0.0.0": socket.gethostname()}.get(host, host))
    server.check_alive()


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "host:0", "host:65536", "host:x", "::1:80", "[]:80"])
def test_no_address(address: str) -> None:
    with pytest.raises(InputError, match="not an address"):
        dial(address, secret=SECRET, hello=make_hello(), timeout_s=1)


def test_wrong_secret_is_an_error_on_both_sides(serve: Callable[..., Server], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = serve()
    with pytest.raises(AuthenticationError) as caught:
        server.dial(secret=b"another hidden text")
    error, admitted = server.failed.get(timeout=WAIT_S)
    assert isinstance(error, AuthenticationError) and admitted is None
    assert server.address in str(caught.value) and "LLMSYS_JOB_SECRET" in caught.value.fix
    told = f"{caught.value}{error}{caplog.text}"
    assert SECRET.decode() not in told and "another hidden text" not in told
    assert server.accepted.empty()
    server.check_alive()


def test_an_impostor_that_does_not_know_the_secret_is_found_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        address = f"127.0.0.1:{impostor.getsockname()[1]}"

        def answer() -> None:
            sock, _ = impostor.accept()
            with sock:
                sock.recv(1 << 16)
                sock.sendall(frame({"nonce": b"n" * 32}))
                proof = msgpack.unpackb(sock.recv(1 << 16)[10:])
                # What the dialler sent is the best that it can send back.
                sock.sendall(frame({"hello": proof["hello"], "proof": proof["proof"]}))
                sock.recv(1)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(AuthenticationError, match="secret"):
            dial(address, secret=SECRET, hello=make_hello(), timeout_s=WAIT_S)
        thread.join(WAIT_S)


def test_a_changed_hello_is_found_out(serve: Callable[..., Server]) -> None:
    """What lies between the two cannot change who somebody claims to be."""
    server = serve()
    with socket.create_server(("127.0.0.1", 0)) as middle:

        def forward() -> None:
            near, _ = middle.accept()
            with near, raw(server) as far:
                for source, target in ((near, far), (far, near), (near, far), (far, near)):
                    target.sendall(source.recv(1 << 16).replace(b"client", b"tneilc"))

        thread = threading.Thread(target=forward)
        thread.start()
        address = f"127.0.0.1:{middle.getsockname()[1]}"
        with pytest.raises(AuthenticationError):
            dial(address, secret=SECRET, hello=make_hello("client"), timeout_s=WAIT_S)
        thread.join(WAIT_S)
    assert isinstance(server.failed.get(timeout=WAIT_S)[0], AuthenticationError)


def test_another_transport_is_named_on_both_sides(serve: Callable[..., Server]) -> None:
    server = serve()
    with pytest.raises(TransportError, match="another transport") as caught:
        server.dial(hello=make_hello(protocol="nixl"))
    assert "'nixl'" in caught.value.expected and "'ucx'" in caught.value.found
    error, _ = server.failed.get(timeout=WAIT_S)
    assert "'ucx'" in error.expected and "'nixl'" in error.found


def test_another_version_is_named(serve: Callable[..., Server]) -> None:
    server = serve()
    with raw(server) as sock:
        sock.sendall(frame({"nonce": b"n" * 32, "protocol": "ucx"}, version=2))
        assert b"refusal" in sock.recv(1 << 16)
    error, _ = server.failed.get(timeout=WAIT_S)
    assert (error.expected, error.found) == ("version 1", "version 2")


def test_refused_by_the_transport(serve: Callable[..., Server]) -> None:
    def admit(hello: Hello) -> None:
        raise RefusedError("no", reason=f"{hello.name} is here already", expected="e", found="f", fix="x")

    server = serve(admit=admit)
    with pytest.raises(RefusedError) as caught:
        server.dial()
    assert caught.value.reason == "client is here already"
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason
    assert isinstance(server.failed.get(timeout=WAIT_S)[0], RefusedError)


def test_an_admitted_peer_that_goes_away_is_reported(serve: Callable[..., Server]) -> None:
    def takes_over(sock: socket.socket, hello: Hello, session: Session) -> None:
        raise ValueError("not today")

    server = serve(accepted=takes_over)
    sock, _, _ = server.dial()
    with sock:
        assert sock.recv(1) == b""
    error, hello = server.failed.get(timeout=WAIT_S)
    assert "not today" in str(error) and hello is not None and hello.name == "client"


GARBAGE = [
    b"",
    b"\x00",
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    os.urandom(100_000),
    struct.pack("!4sHI", b"LLMS", 1, 0xFFFFFFFF) + b"x" * 100,
    struct.pack("!4sHI", b"LLMS", 1, MAX_FRAME_BYTES) + b"\x91" * MAX_FRAME_BYTES,
    struct.pack("!4sHI", b"LLMS", 1, 0),
    frame([1, 2]),
    frame({"nonce": b"short", "protocol": "ucx"}),
    frame({"nonce": "text", "protocol": "ucx"}),
    frame({"nonce": b"n" * 32, "protocol": "ucx", "more": 1}),
    frame({"nonce": b"n" * 32, "protocol": "ucx"}) + frame({"hello": b"", "proof": b""}),
    frame({"nonce": b"n" * 32, "protocol": "ucx"}) + frame({"hello": b"x" * 60_000, "proof": b"p" * 32}),
    frame({"refusal": "secret", "word": "x"}),
    frame({"refusal": "x" * 9_000}),
]


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_does_no_harm(data: bytes, serve: Callable[..., Server]) -> None:
    server = serve()
    with raw(server) as sock:
        # It may hang up before it has read everything.
        with contextlib.suppress(OSError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        error, hello = server.failed.get(timeout=WAIT_S)
    assert isinstance(error, TransportError) and hello is None
    assert all((error.expected, error.found, error.fix)) and len(str(error)) < 1500
    server.check_alive()


def test_a_huge_frame_is_refused_before_it_is_read(serve: Callable[..., Server]) -> None:
    server = serve(handshake_timeout_s=WAIT_S)
    with raw(server) as sock:
        sock.sendall(struct.pack("!4sHI", b"LLMS", 1, MAX_FRAME_BYTES + 1))
        error, _ = server.failed.get(timeout=WAIT_S / 2)
    assert f"announced a frame of {MAX_FRAME_BYTES + 1} bytes" in error.found


def test_silence_ends_at_the_deadline_and_does_not_keep_others_out(serve: Callable[..., Server]) -> None:
    server = serve(handshake_timeout_s=0.5, max_handshakes=4)
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            sock = stack.enter_context(raw(server))
            sock.sendall(b"LLM")
        server.check_alive()
    assert isinstance(server.failed.get(timeout=WAIT_S)[0], DeadlineError)


def test_dial_deadline_names_address_and_what_was_awaited() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(DeadlineError, match=address) as caught:
            dial(address, secret=SECRET, hello=make_hello(), timeout_s=0.3)
        assert time.monotonic() - started < 5
        assert "a challenge within 0.3 s" in caught.value.expected


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"127.0.0.1:{sock.getsockname()[1]}"


def test_refused_at_once_or_after_waiting() -> None:
    address = free_address()
    started = time.monotonic()
    with pytest.raises(TransportError, match=address):
        dial(address, secret=SECRET, hello=make_hello(), timeout_s=60)
    assert time.monotonic() - started < 10
    with pytest.raises(DeadlineError, match=address):
        dial(address, secret=SECRET, hello=make_hello(), timeout_s=0.3, wait=True)


def test_waiting_for_a_listener_that_comes_later(serve: Callable[..., Server]) -> None:
    address = free_address()
    dialled: queue.Queue[object] = queue.Queue()

    def run() -> None:
        try:
            dialled.put(dial(address, secret=SECRET, hello=make_hello(), timeout_s=WAIT_S, wait=True))
        except LlmsysError as error:
            dialled.put(error)

    thread = threading.Thread(target=run)
    thread.start()
    serve(port=int(address.rpartition(":")[2]))
    result = dialled.get(timeout=WAIT_S)
    thread.join(WAIT_S)
    assert isinstance(result, tuple), result
    result[0].close()


def test_many_at_once(serve: Callable[..., Server]) -> None:
    server = serve(max_handshakes=8)
    names: queue.Queue[str] = queue.Queue()

    def run(number: int) -> None:
        sock, _, _ = server.dial(hello=make_hello(f"client{number}"))
        names.put(f"client{number}")
        sock.close()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    seen = set()
    for _ in threads:
        sock, hello, _ = server.accepted.get(timeout=WAIT_S)
        seen.add(hello.name)
        sock.close()
    for thread in threads:
        thread.join(WAIT_S)
    assert seen == {f"client{number}" for number in range(40)} and names.qsize() == 40


def test_close_ends_threads_and_handshakes_and_frees_the_port(serve: Callable[..., Server]) -> None:
    before = set(threading.enumerate())
    fds = set(os.listdir("/proc/self/fd"))
    server = serve()
    with raw(server) as silent:
        silent.sendall(b"LLMS")
        server.check_alive()
        server.listener.close()
        server.listener.close()
        assert set(threading.enumerate()) == before
        assert silent.recv(1) == b""
    assert set(os.listdir("/proc/self/fd")) == fds
    with socket.create_server(bootstrap.parse_address(server.address)):
        pass
    with pytest.raises(TransportError):
        server.dial(timeout_s=5)


def test_port_in_use(serve: Callable[..., Server]) -> None:
    server = serve()
    with pytest.raises(TransportError, match="cannot listen") as caught:
        serve(port=int(server.address.rpartition(":")[2]))
    assert "port to 0" in caught.value.fix


def test_a_hello_that_is_too_large(serve: Callable[..., Server]) -> None:
    server = serve()
    with pytest.raises(TransportError, match="too large"):
        server.dial(hello=make_hello(details={"worker": b"x" * MAX_FRAME_BYTES}))
    server.check_alive()


@pytest.mark.parametrize(
    "changes",
    [{"generation": 0}, {"generation": 1 << 63}, {"lease_s": 0}, {"lease_s": float("nan")}, {"pid": "1"}, {"name": 3}],
)
def test_a_hello_that_cannot_be_true(changes: dict[str, object], serve: Callable[..., Server]) -> None:
    server = serve()
    with pytest.raises(TransportError):
        server.dial(hello=make_hello(**changes))
    assert "hello" in str(server.failed.get(timeout=WAIT_S)[0])


def test_secret_and_session_are_not_shown() -> None:
    config = TransportConfig(secret="hidden")
    assert "hidden" not in repr(config) and job_secret(config) == b"hidden"
    assert "123" not in repr(Session(token_in=123, token_out=1230))


def test_job_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSYS_JOB_SECRET", "from outside")
    assert job_secret(TransportConfig()) == b"from outside"
    assert job_secret(TransportConfig(secret="given")) == b"given"
    monkeypatch.delenv("LLMSYS_JOB_SECRET")
    with pytest.raises(ConfigError, match="no secret") as caught:
        job_secret(TransportConfig())
    assert "export LLMSYS_JOB_SECRET" in caught.value.fix


def test_identity() -> None:
    (name, generation), (other_name, other_generation) = (new_identity(TransportConfig()) for _ in range(2))
    assert name != other_name and str(os.getpid()) in name
    assert generation != other_generation and 0 < generation < 1 << 63
    assert new_identity(TransportConfig(name="decode0"))[0] == "decode0"


def test_host_id_is_the_same_in_another_process() -> None:
    code = "from llmsys.comm.bootstrap import host_id; print(host_id())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == host_id()
