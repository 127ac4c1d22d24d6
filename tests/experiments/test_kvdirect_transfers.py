"""KVDirect's figures of transfers: patterns and contents, processes and how they end, the link, the targets."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest

from experiments import network
from experiments.environment import REPOSITORY
from experiments.kvdirect import transfer_bandwidth
from experiments.kvdirect._pairs import EndpointProcess
from experiments.kvdirect._scatter import (
    CONTIGUOUS,
    RUN_LENGTH,
    RUNS,
    SHUFFLED,
    WORD_BYTES,
    Pattern,
    fill,
    num_wrong_bytes,
)
from experiments.kvdirect._systems import (
    CMA,
    CMA_ONE,
    GLOO_PACKED,
    MEMCPY,
    NIXL_NO_THREAD,
    NIXL_SLEEPS,
    NIXL_TWO_THREADS,
    SHM,
    SHM_ONE,
    TCP,
)
from experiments.network import LinkEnd, limited_link
from llmsys.core.errors import InputError, TransportError

HERE = LinkEnd(prefix=(), address="127.0.0.1")
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def can_link() -> None:
    if reason := network.why_not():
        pytest.skip(reason)


def pattern(kind: str, num_blocks: int = 64, block_bytes: int = 256) -> Pattern:
    return Pattern(kind=kind, block_bytes=block_bytes, num_blocks=num_blocks, seed=5)


class TestPatterns:
    @pytest.mark.parametrize("kind", [SHUFFLED, RUNS, CONTIGUOUS])
    def test_both_sides_are_permutations_and_equal_for_equal_seeds(self, kind: str) -> None:
        local, remote = pattern(kind).blocks()
        assert sorted(local) == sorted(remote) == list(range(64))
        for side, again in zip((local, remote), pattern(kind).blocks(), strict=True):
            np.testing.assert_array_equal(side, again)

    def test_each_kind_has_its_runs(self) -> None:
        def num_joints(kind: str) -> int:
            local, remote = pattern(kind, num_blocks=1024).blocks()
            return int(((np.diff(local) == 1) & (np.diff(remote) == 1)).sum())

        assert num_joints(CONTIGUOUS) == 1023
        within = 1024 // RUN_LENGTH * (RUN_LENGTH - 1)
        assert within <= num_joints(RUNS) <= within + 5
        assert num_joints(SHUFFLED) <= 5

    @pytest.mark.parametrize(("kind", "blocks", "size"), [(RUNS, 12, 256), (SHUFFLED, 0, 256), (SHUFFLED, 4, 12)])
    def test_blocks_that_do_not_fit_the_pattern_are_refused(self, kind: str, blocks: int, size: int) -> None:
        with pytest.raises(InputError, match=rf"{blocks} blocks of {size} bytes"):
            pattern(kind, blocks, size)


@pytest.mark.parametrize("kind", [SHUFFLED, RUNS, CONTIGUOUS])
def test_every_wrong_byte_is_counted(kind: str) -> None:
    chosen_pattern = pattern(kind)
    source, memory = (np.zeros(chosen_pattern.size_bytes // WORD_BYTES, dtype=np.uint64) for _ in range(2))
    fill(source)
    local, remote = chosen_pattern.blocks()
    blocks = memory.reshape(chosen_pattern.num_blocks, -1)
    blocks[local] = source.reshape(blocks.shape)[remote]
    assert num_wrong_bytes(memory, chosen_pattern) == 0

    memory.view(np.uint8)[777] ^= 1
    memory.view(np.uint8)[-1] ^= 0x80
    assert num_wrong_bytes(memory, chosen_pattern) == 2

    blocks[local] = source.reshape(blocks.shape)[remote]
    blocks[[3, 4]] = blocks[[4, 3]]
    assert num_wrong_bytes(memory, chosen_pattern) > 256
    blocks[:] = 0
    assert num_wrong_bytes(memory, chosen_pattern) > 0.9 * chosen_pattern.size_bytes


@pytest.fixture
def process() -> Iterator[EndpointProcess]:
    process = EndpointProcess("the process", end=HERE, env=dict(os.environ))
    yield process
    process.close()


class TestProcesses:
    def test_an_error_shows_the_process_the_command_and_the_traceback(self, process: EndpointProcess) -> None:
        with pytest.raises(TransportError, match=r"(?s)the process failed in 'measure'.*Traceback.*_memory"):
            process.ask("measure", pattern(SHUFFLED), True, True)

    def test_the_end_of_a_process_is_told_and_not_waited_for(self, process: EndpointProcess) -> None:
        process.send("close")
        process.answer("close")
        os.kill(process._process.pid, signal.SIGKILL)
        with pytest.raises(TransportError, match=r"(?s)the process has ended.*an answer to 'close'.*exit code -9"):
            process.ask("close")

    def test_processor_time_of_a_process_counts_only_while_it_runs(self, process: EndpointProcess) -> None:
        process.ask("close")
        process.stop()
        before = process.cpu_s()
        assert before > 0
        process.send("close")
        assert not process._connection.poll(0.2)
        assert process.cpu_s() == before
        process.go_on()
        process.answer("close")
        assert process.cpu_s() > before

    def test_a_stopped_process_ends_with_the_one_that_started_it(self) -> None:
        program = (
            "import os\nfrom experiments.kvdirect._pairs import EndpointProcess, _LOOPBACK\n"
            "process = EndpointProcess('child', end=_LOOPBACK, env=dict(os.environ))\n"
            "process.ask('close'); process.stop()\n"
            "print(process._process.pid, flush=True); input()"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.kill()
            parent.communicate()
            ended, _, _ = select.select([child], [], [], DEADLINE_S)
            assert ended
        finally:
            os.close(child)


RECEIVE = """
import socket, time
with socket.create_server(("", 5000)) as server:
    print(flush=True)
    stream, _ = server.accept()
with stream:
    received, started = len(stream.recv(1)), time.perf_counter()
    while part := stream.recv(1 << 20):
        received += len(part)
    print(received, time.perf_counter() - started)
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 5000), timeout=30) as stream:
    stream.sendall(bytes(8 << 20))
"""


class TestLink:
    def test_it_passes_no_more_than_its_rate_and_changes_it(self, can_link: None) -> None:
        with limited_link(1.0) as link:
            for gbit_per_s in (0.2, 0.8):
                link.limit(gbit_per_s)
                receiver = subprocess.Popen(
                    [*link.ends[0].prefix, sys.executable, "-c", RECEIVE], stdout=subprocess.PIPE, text=True
                )
                assert receiver.stdout is not None
                receiver.stdout.readline()
                send = [*link.ends[1].prefix, sys.executable, "-c", SEND, link.ends[0].address]
                subprocess.run(send, check=True, timeout=DEADLINE_S)
                received, seconds = receiver.communicate(timeout=DEADLINE_S)[0].split()
                share = int(received) * 8 / float(seconds) / 1e9 / gbit_per_s
                # The bucket is full at first, which gives 128 KiB of 8 MiB for nothing.
                assert 0.3 < share < link.payload_share * 1.03, (gbit_per_s, share)

    def test_nothing_of_it_is_left(self, can_link: None) -> None:
        def devices() -> str:
            return subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout

        before = devices()
        with pytest.raises(RuntimeError, match="on purpose"), limited_link(1.0) as link:
            pids = [end.prefix[end.prefix.index("--target") + 1] for end in link.ends]
            assert network.DEVICE not in devices()
            raise RuntimeError("on purpose")
        assert devices() == before
        assert not any(os.path.exists(f"/proc/{pid}/ns/net") for pid in pids)

    def test_without_the_right_to_make_namespaces_the_reason_is_given(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shutil.which", lambda program: None if program == "tc" else program)
        text = r"(?s)cannot be made here.*iproute2.*no tc.*leave this experiment out"
        with pytest.raises(InputError, match=text), limited_link(1.0):
            pass
        monkeypatch.undo()
        monkeypatch.setattr(network, "_namespace", _refusing_namespace)
        assert "user id" in (network.why_not() or "")


def _refusing_namespace(*_: object, **__: object) -> Any:
    raise network._refused("unshare", "Operation not permitted")


def rates(**methods: list[float]) -> pd.DataFrame:
    """Rows of bandwidth at 16 KiB and 64 KiB, one repeat for each number, and postings of 2% and 8%."""
    names = {"shm": SHM, "cma": CMA, "tcp": TCP, "memcpy": MEMCPY, "thread": NIXL_SLEEPS, "none": NIXL_NO_THREAD}
    names |= {"gloo": GLOO_PACKED, "two": NIXL_TWO_THREADS, "shm1": SHM_ONE, "cma1": CMA_ONE}
    bandwidth = [
        {
            "quantity": "bandwidth",
            "scatter": SHUFFLED,
            "block_bytes": size,
            "coalesce": True,
            "method": names[key],
            "repeat": repeat,
            "gb_per_s": value,
        }
        for size in (16 << 10, 64 << 10)
        for key, values in methods.items()
        for repeat, value in enumerate(values)
    ]
    posting = [
        {"quantity": "posting", "block_bytes": 4096, "num_blocks": 8, "method": m, "posting_share": s, "posting_s": s}
        for m, s in ((SHM, 0.02), (CMA, 0.08))
    ]
    return pd.DataFrame(bandwidth + posting)


class TestTargets:
    def test_ratios_are_taken_within_a_repeat(self) -> None:
        rows = rates(
            shm=[9, 1, 30],
            shm1=[5, 1, 10],
            memcpy=[10, 1, 30],
            cma=[4] * 3,
            cma1=[2] * 3,
            thread=[2] * 3,
            none=[3] * 3,
            gloo=[1] * 3,
        )
        shm, shm1, nixl, nixl1, gloo, *posted = transfer_bandwidth.compare(rows)
        assert shm.ours == 1.0 and shm.note.startswith("holds")
        assert shm1.ours == 0.5 and shm1.note.startswith("DOES NOT HOLD")
        assert nixl.ours == pytest.approx(4 / 3) and NIXL_NO_THREAD in nixl.note and nixl.note.startswith("holds")
        assert nixl1.ours == pytest.approx(2 / 3) and nixl1.note.startswith("DOES NOT HOLD")
        assert gloo.ours == 4.0 and gloo.note.startswith("holds")
        assert [item.ours for item in posted] == [0.08, 0.02]
        assert [item.note.split(":")[0] for item in posted] == ["DOES NOT HOLD", "holds"]

    def test_a_missed_target_is_told(self) -> None:
        rows = rates(shm=[8.9], shm1=[8.9], memcpy=[10], cma=[2.5], cma1=[2.5], thread=[2], none=[1], gloo=[1])
        assert all(item.note.startswith("DOES NOT HOLD") for item in transfer_bandwidth.compare(rows)[:5])

    def test_one_thread_meets_one_thread_and_two_meet_the_best(self) -> None:
        _, _, nixl, nixl1, *_ = transfer_bandwidth.compare(rates(cma=[5], cma1=[4], none=[2], two=[5]))
        assert (nixl.ours, nixl1.ours) == (1.0, 2.0)
        assert "with 1 copying thread" in nixl1.name and "with" not in nixl.name.split("NIXL")[1]
