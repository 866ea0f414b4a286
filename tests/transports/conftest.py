"""Fixtures of the transport tests."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator

import pytest

from kser.controller import Controller
from tests.transports.harness import RecordingEntrypoint


@pytest.fixture
def unused_address() -> str:
    """Return an address of this machine on which no process listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def recording_entrypoint(caplog: pytest.LogCaptureFixture) -> Iterator[type[RecordingEntrypoint]]:
    """Register the recording entrypoint, and capture the log of kser."""
    Controller.register(RecordingEntrypoint.path, RecordingEntrypoint)
    caplog.set_level(logging.INFO, "kser")
    yield RecordingEntrypoint
    RecordingEntrypoint.ran.clear()
