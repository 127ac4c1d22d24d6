"""Fixtures of the tests of endpoints."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llmsys.comm.transports import available_transports
from tests.kvdirect.endpoints import Job, new_job


@pytest.fixture(params=["loopback", "ucx"])
def job(request: pytest.FixtureRequest) -> Iterator[Job]:
    """Workers of one process over each transport that allows that."""
    if reason := available_transports()[request.param]:
        pytest.skip(reason)
    with new_job(request.param) as job:
        yield job


@pytest.fixture
def loopback() -> Iterator[Job]:
    """Workers that can be stopped, resumed and killed."""
    with new_job("loopback") as job:
        yield job
