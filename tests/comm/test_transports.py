"""The list of transports."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llmsys.comm import transports
from llmsys.comm.transports import TRANSPORTS, available_transports, transport_class
from llmsys.comm.transports.base import Transport
from llmsys.core.errors import ConfigError


def test_every_transport_is_usable_or_says_why_not() -> None:
    found = available_transports()
    assert list(found) == list(TRANSPORTS) and found["loopback"] is None
    for name, problem in found.items():
        if problem is None:
            cls = transport_class(name)
            assert issubclass(cls, Transport) and cls.name == name
        else:
            with pytest.raises(ConfigError, match=name) as caught:
                transport_class(name)
            assert caught.value.found == problem and "available_transports" in caught.value.fix


def test_a_wrong_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="not a transport") as caught:
        transport_class("lopback")
    assert caught.value.fix == "did you mean 'loopback'?" and "ucx_py" in caught.value.expected
    with pytest.raises(ConfigError) as caught:
        transport_class("x")
    assert "choose one of" in caught.value.fix


def test_a_broken_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transports.TRANSPORTS, "gloo", "llmsys.no_such_module:Gloo")
    with pytest.raises(ConfigError, match="gloo cannot be used here") as caught:
        transport_class("gloo")
    assert "no_such_module" in caught.value.found


def test_the_package_imports_no_transport() -> None:
    code = "import sys, llmsys.comm.transports; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    loaded = done.stdout.split()
    assert "torch" not in loaded and "llmsys.comm.transports.base" in loaded
    assert not {module.partition(":")[0] for module in TRANSPORTS.values()} & set(loaded)
