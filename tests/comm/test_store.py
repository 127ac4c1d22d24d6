"""One contract for the embedded store and Redis, and what is particular to each."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from llmsys.comm.store import MAX_KEY_BYTES, MAX_VALUE_BYTES, Store, open_store
from llmsys.core.errors import (
    AuthenticationError,
    ConfigError,
    DeadlineError,
    InputError,
    LlmsysError,
    PeerLostError,
)

LIMIT_S = 60.0
PASSWORD = "pass word/?#@:%7"
WRONG = "guess-9431"


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisServer:
    port: int
    tls_port: int
    ca_file: Path | None

    def url(self, password: str = PASSWORD, user: str = "") -> str:
        return f"redis://{user}:{quote(password, safe='')}@127.0.0.1:{self.port}/0"


def _why_no_redis() -> str:
    if shutil.which("redis-server") is None:
        return "the program redis-server is not installed (apt-get install redis-server)"
    if importlib.util.find_spec("redis") is None:
        return "the package redis is not installed (pip install redis)"
    return ""


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if reason := _why_no_redis():
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("redis")
    certificate = _certificate(directory)
    for _ in range(5):  # another process may take a port between its choice and its use
        server = RedisServer(port=_free_port(), tls_port=_free_port(), ca_file=certificate)
        process = subprocess.Popen(_redis_command(server, directory), stdout=subprocess.DEVNULL)
        try:
            if _answers(server.port, process):
                yield server
                return
        finally:
            process.terminate()
            process.wait(timeout=LIMIT_S)
    pytest.fail("redis-server did not start on any of 5 ports")


def _redis_command(server: RedisServer, directory: Path) -> list[str]:
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(server.port), "--dir", str(directory)]
    command += ["--save", "", "--appendonly", "no", "--requirepass", PASSWORD]
    command += ["--user", "planner", "on", f">{PASSWORD}", "~plans/*", "&*", "+@all"]
    if server.ca_file is not None:
        command += ["--tls-port", str(server.tls_port), "--tls-cert-file", str(server.ca_file)]
        command += ["--tls-key-file", str(directory / "key.pem"), "--tls-ca-cert-file", str(server.ca_file)]
        command += ["--tls-auth-clients", "no"]
    return command


def _certificate(directory: Path) -> Path | None:
    if shutil.which("openssl") is None:
        return None
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(directory / "key.pem"), "-out", str(directory / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True, timeout=LIMIT_S)
    return directory / "cert.pem"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    end_s = time.monotonic() + LIMIT_S
    while process.poll() is None and time.monotonic() < end_s:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S).close()
            return True
        except OSError:
            time.sleep(0.01)
    return False


@pytest.fixture
def torch_server() -> Iterator[Store]:
    with open_store("tcp://127.0.0.1:0?host=1") as store:
        yield store


Opener = Callable[[], Store]


@pytest.fixture(params=["torch", "redis"])
def opener(request: pytest.FixtureRequest) -> Iterator[Opener]:
    """Opens further connections to one store that is empty at first."""
    if request.param == "torch":
        url = request.getfixturevalue("torch_server").address
    else:
        url = request.getfixturevalue("redis_server").url()
        with open_store(url, timeout_s=LIMIT_S) as store:
            left = store.keys()
            for key in left:
                store.delete(key)
    opened: list[Store] = []

    def open_another() -> Store:
        opened.append(open_store(url, timeout_s=LIMIT_S))
        return opened[-1]

    yield open_another
    for store in opened:
        store.close()


@pytest.fixture
def store(opener: Opener) -> Store:
    return opener()


def test_values_are_any_bytes_and_are_replaced(store: Store, opener: Opener) -> None:
    for value in (b"", b"plain", bytes(range(256)), b"=" * 20, b"12"):
        store.set("key", value)
        assert store.get("key", LIMIT_S) == value
        assert opener().get("key", LIMIT_S) == value
    store.set("grün/\n *?[x]", b"1")
    assert store.get("grün/\n *?[x]", LIMIT_S) == b"1"


def test_the_largest_value_fits_and_a_larger_one_is_refused(store: Store) -> None:
    largest = b"\x07" * MAX_VALUE_BYTES
    store.set("large", largest)
    assert store.get("large", LIMIT_S) == largest
    with pytest.raises(InputError, match="'large' cannot be stored") as caught:
        store.set("large", largest + b"\0")
    assert str(MAX_VALUE_BYTES + 1) in caught.value.found
    with pytest.raises(InputError, match="cannot be stored") as caught:
        store.compare_and_set("large", None, "text")  # type: ignore[arg-type]
    assert caught.value.found == "str"
    store.set("k" * MAX_KEY_BYTES, b"")
    for key in ("", "k" * (MAX_KEY_BYTES + 1)):
        with pytest.raises(InputError, match="cannot be used"):
            store.get(key, 0.01)
        with pytest.raises(InputError, match="cannot be used"):
            store.set(key, b"")


def test_get_waits_for_another_to_set(store: Store, opener: Opener) -> None:
    writer = opener()
    started = threading.Event()

    def get() -> bytes:
        started.set()
        return store.get("later", LIMIT_S)

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(get)
        assert started.wait(LIMIT_S)
        with pytest.raises(DeadlineError, match=r"key 'never' was not set in the store at \S+ within 0\.1 s"):
            store.get("never", 0.1)  # the waiting thread does not hold up the others of its store
        assert not found.done()
        writer.set("later", b"now")
        assert found.result(LIMIT_S) == b"now"


def test_waiting_for_several_keys(store: Store) -> None:
    store.set("a", b"")
    store.add("b", 1)
    store.wait(["a", "b"], LIMIT_S)
    start_s = time.monotonic()
    with pytest.raises(DeadlineError, match="key 'c' was not set"):
        store.wait(["a", "c", "b"], 0.05)
    assert time.monotonic() - start_s < 5


def test_counts(store: Store, opener: Opener) -> None:
    assert store.add("count", 5) == 5
    assert store.add("count", -7) == -2
    assert store.add("count", 0) == -2
    assert store.get("count", LIMIT_S) == b"-2"
    store.set("text", b"not a number")
    with pytest.raises(InputError, match="add to key 'text'"):
        store.add("text", 1)
    assert store.get("text", LIMIT_S) == b"not a number"
    with ThreadPoolExecutor(4) as pool:
        tickets = list(pool.map(lambda s: [s.add("tickets", 1) for _ in range(50)], [opener() for _ in range(4)]))
    assert sorted(number for of_one in tickets for number in of_one) == list(range(1, 201))


def test_compare_and_set(store: Store) -> None:
    assert not store.compare_and_set("key", b"", b"x")  # no value is not the empty value
    assert not store.compare_and_set("key", b"old", b"x")
    assert store.keys() == ()
    assert store.compare_and_set("key", None, b"")
    assert not store.compare_and_set("key", None, b"")
    assert not store.compare_and_set("key", b"other", b"")  # though it already has the desired value
    assert store.compare_and_set("key", b"", b"new")
    assert store.get("key", LIMIT_S) == b"new"
    assert store.compare_and_set("key", b"new", b"new")
    store.add("count", 3)
    assert not store.compare_and_set("count", b"4", b"value")
    assert store.compare_and_set("count", b"3", b"value")
    assert store.get("count", LIMIT_S) == b"value"


def test_one_of_many_wins_a_compare_and_set(opener: Opener) -> None:
    """Also where all want the same value, and where what they compare with changes all the time."""
    stores = [opener() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for turn in range(10):
            won = pool.map(lambda s, key=f"leader{turn}": s.compare_and_set(key, None, b"taken"), stores)
            assert sorted(won) == [False, False, False, True]

        def increase(store: Store) -> None:
            for _ in range(20):
                while True:
                    value = store.get("number", LIMIT_S)
                    if store.compare_and_set("number", value, b"%d" % (int(value) + 1)):
                        break

        stores[0].set("number", b"0")
        list(pool.map(increase, stores))
    assert stores[0].get("number", LIMIT_S) == b"80"


def test_delete(store: Store) -> None:
    store.set("key", b"x")
    assert store.delete("key")
    assert not store.delete("key")
    with pytest.raises(DeadlineError):
        store.get("key", 0.01)
    assert store.add("key", 2) == 2
    assert store.delete("key")
    assert store.add("key", 2) == 2


def test_scopes_are_apart(store: Store) -> None:
    one, inner = store.scoped("job*1"), store.scoped("job*1").scoped("plans")
    for place, text in ((store, b"root"), (one, b"one"), (inner, b"inner")):
        place.set("key", text)
    store.set("jobs1/key", b"only looks like it")
    assert [place.get("key", LIMIT_S) for place in (store, one, inner)] == [b"root", b"one", b"inner"]
    assert store.keys() == ("job*1/key", "job*1/plans/key", "jobs1/key", "key")
    assert store.keys("job*1/") == ("job*1/key", "job*1/plans/key")
    assert one.keys() == ("key", "plans/key")
    assert one.keys("pl") == ("plans/key",)
    assert inner.keys() == ("key",)
    assert inner.delete("key") and inner.keys() == () and one.keys() == ("key",)
    with pytest.raises(DeadlineError, match=r"key 'job\*1/plans/key' was not set"):
        inner.get("key", 0.01)


def test_the_embedded_store_listens_where_it_is_told(torch_server: Store) -> None:
    port = int(torch_server.address.rpartition(":")[2])
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        lines = [line.split() for line in Path(table).read_text().splitlines()[1:]]
        listening = {entry[1] for entry in lines if entry[3] == "0A" and entry[1].endswith(f":{port:04X}")}
        assert listening == ({f"0100007F:{port:04X}"} if table.endswith("tcp") else set())


def test_the_embedded_store_ends_when_it_is_closed() -> None:
    server = open_store("tcp://127.0.0.1:0?host=1")
    client = open_store(server.address, timeout_s=LIMIT_S)
    scoped = server.scoped("a")
    server.close()
    server.close()
    for store in (server, scoped):
        with pytest.raises(InputError, match="was closed"):
            store.set("key", b"")
    with pytest.raises(PeerLostError, match=f"add to key 'key': lost the store at {server.address}"):
        client.add("key", 1)
    with pytest.raises(DeadlineError, match=f"no store answered at {server.address} within 0.2 s"):
        open_store(server.address, timeout_s=0.2)


def test_a_client_may_come_before_the_server() -> None:
    with socket.socket() as reserved:  # bound and not listening, so nobody else gets the port
        reserved.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
        with ThreadPoolExecutor(1) as pool:
            early = pool.submit(open_store, url, timeout_s=LIMIT_S)
            with pytest.raises(DeadlineError):
                open_store(url, timeout_s=0.1)
            assert not early.done()
            reserved.close()
            with open_store(f"{url}?host=1") as server, early.result(LIMIT_S) as client:
                server.set("key", b"x")
                assert client.get("key", LIMIT_S) == b"x"


def test_a_taken_port_is_named(torch_server: Store) -> None:
    with pytest.raises(ConfigError, match=f"cannot serve a store at {torch_server.address}"):
        open_store(f"{torch_server.address}?host=1")


def test_the_embedded_store_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "llmsys.comm.store", "127.0.0.1", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            with open_store(address, timeout_s=LIMIT_S) as one, open_store(address, timeout_s=LIMIT_S) as other:
                one.set("key", b"x")
                assert other.get("key", LIMIT_S) == b"x"
            process.terminate()
            assert process.wait(LIMIT_S) == 0
        finally:
            process.kill()


def _error(url: str, kind: type[LlmsysError], timeout_s: float = LIMIT_S) -> str:
    """The error of opening ``url``, which shows its password nowhere, also not in an exception behind it."""
    with pytest.raises(kind) as caught:
        open_store(url, timeout_s=timeout_s)
    text = "".join(traceback.format_exception(caught.value, limit=0))
    for secret in (PASSWORD, quote(PASSWORD, safe=""), WRONG, *PASSWORD.split("/")):
        assert secret not in text
    return text


def test_redis_wants_the_right_password(redis_server: RedisServer) -> None:
    assert "does not let us in" in _error(redis_server.url(WRONG), AuthenticationError)
    assert "does not let us in" in _error(redis_server.url(PASSWORD, user="nobody"), AuthenticationError)
    open_url = f"redis://127.0.0.1:{redis_server.port}/0"
    assert "has no password" in _error(open_url, ConfigError)
    assert "does not let us in" in _error(f"{open_url}?allow_unauthenticated=1", AuthenticationError)
    with open_store(redis_server.url()) as store:
        assert PASSWORD not in repr(store) and PASSWORD not in store.address


def test_redis_users_have_their_own_rights(redis_server: RedisServer) -> None:
    with open_store(redis_server.url(user="planner"), timeout_s=LIMIT_S) as store:
        store.scoped("plans").set("key", b"x")
        assert store.scoped("plans").get("key", LIMIT_S) == b"x"
        with pytest.raises(AuthenticationError, match="set of key 'elsewhere'"):
            store.set("elsewhere", b"x")


def test_redis_over_tls(redis_server: RedisServer) -> None:
    if redis_server.ca_file is None:
        pytest.skip("the program openssl is not installed, which makes the certificate")
    url = f"rediss://:{quote(PASSWORD, safe='')}@127.0.0.1:{redis_server.tls_port}/0"
    with open_store(f"{url}?ca={redis_server.ca_file}", timeout_s=LIMIT_S) as store:
        store.set("secret", b"x")
        assert store.get("secret", LIMIT_S) == b"x"
    assert "certificate verify failed" in _error(url, DeadlineError, timeout_s=0.3)
    plain_port = url.replace(str(redis_server.tls_port), str(redis_server.port))
    assert "with TLS" in _error(plain_port, DeadlineError, timeout_s=0.3)


def test_redis_without_a_server_or_package(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("redis") is not None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            url = f"redis://:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/0"
            text = _error(url, DeadlineError, timeout_s=0.2)
            assert f"no Redis server answered at redis://127.0.0.1:{port}/0 within 0.2 s" in text
    monkeypatch.setitem(sys.modules, "redis", None)
    assert "pip install redis" in _error(f"redis://:{WRONG}@127.0.0.1:1/0", ConfigError)


def test_redis_that_ends_is_a_lost_peer(tmp_path: Path) -> None:
    if reason := _why_no_redis():
        pytest.skip(reason)
    server = RedisServer(port=_free_port(), tls_port=0, ca_file=None)
    process = subprocess.Popen(_redis_command(server, tmp_path), stdout=subprocess.DEVNULL)
    try:
        with open_store(server.url(), timeout_s=LIMIT_S) as store:
            process.terminate()
            process.wait(LIMIT_S)
            with pytest.raises(PeerLostError, match="add to key 'key': lost the Redis server"):
                store.add("key", 1)
    finally:
        process.kill()
        process.wait(LIMIT_S)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("localhost:1", "no URL that we know"),
        ("http://localhost:1", "scheme 'http'"),
        ("tcp://localhost", "no host and port"),
        ("tcp://:1", "no host and port"),
        ("tcp://localhost:1?hosts=1", "options that we do not know"),
        ("tcp://localhost:1?host=yes", "the host of the store's URL is no number"),
        (f"redis://user:{PASSWORD}@localhost:1/0", "not shown"),
        (f"redis://user:1/{WRONG}@localhost:1/0", "the database of the store's URL is no number"),
        (f"redis://user:1?{WRONG}@localhost:1/0", "options that we do not know"),
        (f"redis://user:1#{WRONG}@localhost:1/0", "no host and port"),
        (f"redis://user:{WRONG}/@localhost:1/0", "no host and port"),
    ],
)
def test_urls_that_are_wrong(url: str, text: str) -> None:
    assert text in _error(url, ConfigError)
