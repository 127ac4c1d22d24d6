"""Two network namespaces joined by a link of a known rate, to measure transfers over a network on one machine.

The namespaces have no names: each lives as long as a process that holds it, and that ends when this process closes a
pipe, also by dying. So nothing is left behind, and nothing of the machine's own network is touched. A user who is not
root becomes root of a user namespace that holds both, where the system allows that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from llmsys.core.errors import InputError

DEVICE = "llmsys0"
"""What both namespaces call their end of the link."""

_ADDRESSES = ("198.18.0.1", "198.18.0.2")  # of the range set aside for benchmarks (RFC 2544)
_PROGRAMS = ("unshare", "nsenter", "ip", "tc", "mount")
_BURST_S = 0.0005
_MIN_BURST_BYTES = 128 << 10  # two of the largest segments that TCP hands to a device
_QUEUE_S = 0.01
_COMMAND_TIMEOUT_S = 20.0
_POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkEnd:
    """One namespace. A program started with `prefix` before its command runs in it and sees `address` on DEVICE."""

    prefix: tuple[str, ...]
    address: str


class Link:
    """The two ends, and what the link does. Made by `limited_link`."""

    def __init__(self, ends: tuple[LinkEnd, LinkEnd], mtu_bytes: int) -> None:
        self.ends = ends
        self.mtu_bytes = mtu_bytes

    def limit(self, gbit_per_s: float) -> None:
        """Lets so many bits a second pass in each direction, headers of Ethernet, IP and TCP included."""
        bytes_per_s = gbit_per_s * 1e9 / 8
        burst_bytes = max(_MIN_BURST_BYTES, int(bytes_per_s * _BURST_S))
        shape = ["rate", f"{int(gbit_per_s * 1e9)}bit", "burst", str(burst_bytes)]
        shape += ["limit", str(burst_bytes + int(bytes_per_s * _QUEUE_S))]
        for end in self.ends:
            _run([*end.prefix, "tc", "qdisc", "replace", "dev", DEVICE, "root", "tbf", *shape])

    @property
    def payload_share(self) -> float:
        """The most of the rate that can be payload of TCP: the rest is headers (with TCP's time stamps)."""
        return (self.mtu_bytes - 20 - 32) / (self.mtu_bytes + 14)


@contextmanager
def limited_link(gbit_per_s: float, *, mtu_bytes: int = 1500) -> Iterator[Link]:
    """A link that is gone, with its namespaces, when the block and all programs started in them have ended.

    Raises:
        InputError: this user may not make namespaces, or a program is missing.
    """
    _check_possible()
    with ExitStack() as stack:
        as_root = os.geteuid() == 0
        pids = [stack.enter_context(_namespace(() if as_root else ("--user", "--map-root-user")))]
        # The link needs rights in both, so the second one is made within the first one's user namespace.
        pids.append(stack.enter_context(_namespace((), within=() if as_root else _enter(pids[0], "--user"))))
        kinds = ("--net", "--mount", *(() if as_root else ("--user",)))
        prefixes = [_enter(pid, *kinds) for pid in pids]
        peer = ["peer", "name", DEVICE, "netns", str(pids[1])]
        _run([*prefixes[0], "ip", "link", "add", DEVICE, "mtu", str(mtu_bytes), "type", "veth", *peer])
        for prefix, address in zip(prefixes, _ADDRESSES, strict=True):
            _run([*prefix, "ip", "address", "add", f"{address}/30", "dev", DEVICE])
            _run([*prefix, "ip", "link", "set", DEVICE, "mtu", str(mtu_bytes), "up"])
            _run([*prefix, "ip", "link", "set", "lo", "up"])
        for prefix in prefixes:
            _wait_until_up(prefix)
        first, second = (LinkEnd(prefix=p, address=a) for p, a in zip(prefixes, _ADDRESSES, strict=True))
        link = Link((first, second), mtu_bytes)
        link.limit(gbit_per_s)
        yield link


def _wait_until_up(prefix: Sequence[str]) -> None:
    # The system notices up to a second later that both ends are up, and UCX leaves out a device that is not.
    deadline_s = time.monotonic() + _COMMAND_TIMEOUT_S
    while "LOWER_UP" not in (state := _run([*prefix, "ip", "link", "show", DEVICE])) or "state UP" not in state:
        if time.monotonic() > deadline_s:
            raise _refused(f"wait for {DEVICE}", state)
        time.sleep(_POLL_S)


def why_not() -> str | None:
    """None if a limited link can be made here, else the reason."""
    try:
        with limited_link(1.0):
            return None
    except InputError as error:
        return str(error)


def _check_possible() -> None:
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        raise InputError(
            "a rate-limited link between network namespaces cannot be made here",
            expected=f"the programs {', '.join(_PROGRAMS)} (of util-linux, iproute2 and mount)",
            found=f"no {', '.join(missing)}",
            fix="install them, or leave this experiment out",
        )


def _enter(pid: int, *kinds: str) -> tuple[str, ...]:
    """What to put before a command so that it runs in those namespaces of a process, in the same directory."""
    keep = ("--preserve-credentials",) if "--user" in kinds else ()
    return ("nsenter", "--target", str(pid), *kinds, *keep, "--wd")


@contextmanager
def _namespace(options: Sequence[str], within: Sequence[str] = ()) -> Iterator[int]:
    """The process that holds a new network namespace until its standard input is closed."""
    # With a /sys of its own, since UCX takes its list of devices from there.
    script = "mount -t sysfs sysfs /sys && exec cat"
    holder = subprocess.Popen(
        [*within, "unshare", *options, "--net", "--mount", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert holder.stdin and holder.stdout and holder.stderr
    try:
        try:
            holder.stdin.write(b"\n")
            holder.stdin.flush()
        except BrokenPipeError:
            pass
        if holder.stdout.readline() != b"\n":  # what `cat` sends back once the namespace is ready
            raise _refused("unshare", holder.stderr.read().decode(errors="replace"))
        yield holder.pid
    finally:
        holder.kill()
        holder.communicate()


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise _refused(" ".join(command), f"no end within {_COMMAND_TIMEOUT_S:g} s") from error
    if done.returncode:
        raise _refused(" ".join(command), done.stderr)
    return done.stdout


def _refused(command: str, found: str) -> InputError:
    return InputError(
        f"a rate-limited link between network namespaces cannot be made here: {command}",
        expected="root with CAP_SYS_ADMIN and CAP_NET_ADMIN, or a user who may make user namespaces",
        found=f"{found.strip() or 'no message'} (user id {os.geteuid()})",
        fix="run as root outside of a restricted container, or leave this experiment out",
    )
