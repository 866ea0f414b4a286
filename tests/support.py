"""Helpers shared by several test modules."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cdumay_error import Error
from cdumay_result import Result

from kser.controller import Controller
from kser.schemas import Message

ROOT = Path(__file__).parent.parent

UUID = "872c3be0-51ac-457f-a4d9-12c2f7667b80"

#: Seconds to wait for an event in another thread before the test fails.
WAIT_SECONDS = 20


def records(caplog: pytest.LogCaptureFixture, level: int = logging.DEBUG) -> list[logging.LogRecord]:
    """Return the log records of kser from ``level`` upwards."""
    return [record for record in caplog.records if record.name.split(".")[0] == "kser" and record.levelno >= level]


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.DEBUG) -> list[str]:
    """Return the texts of the log records of kser from ``level`` upwards."""
    return [record.getMessage() for record in records(caplog, level)]


def record_of(caplog: pytest.LogCaptureFixture, start: str) -> logging.LogRecord:
    """Return the only log record of kser whose text begins with ``start``."""
    found = [record for record in records(caplog) if record.getMessage().startswith(start)]
    assert len(found) == 1, f"{len(found)} records begin with {start!r}: {lines(caplog)}"
    return found[0]


def message(entrypoint: Any, uuid: str = UUID, **arguments: Any) -> Message:
    """Return a message for an entrypoint: a class or its name."""
    return Message(uuid=uuid, entrypoint=getattr(entrypoint, "path", entrypoint), **arguments)


def ok_result(text: str) -> Result:
    """Return a successful result with a text in ``stdout``."""
    return Result(stdout=text)


def wait_until(is_done: Callable[[], Any]) -> None:
    """Wait for a condition that another thread or process fulfils."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_done():
        assert time.monotonic() < deadline, f"the condition was not met within {WAIT_SECONDS} s"
        time.sleep(0.005)


class SuccessfulError(Error):
    """An exception whose code means success."""

    CODE = 0


def recording_controller(events: list[Any]) -> type[Controller]:
    """Return a controller that adds its ``onsuccess`` and ``onerror`` hooks to ``events``."""

    class RecordingController(Controller):
        @classmethod
        def onsuccess(cls, kmsg: Message, result: Any) -> Any:
            events.append("controller: onsuccess")
            return result

        @classmethod
        def onerror(cls, kmsg: Message, result: Any) -> Any:
            events.append("controller: onerror")
            return result

    return RecordingController


class Clock:
    """A clock that only the test advances; pass it to a consumer as ``clock``."""

    def __init__(self) -> None:
        #: The time in seconds.
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self.now += seconds


def run_python(code: str, *arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run Python code in another process, with these environment variables; None removes a variable."""
    env = {key: value for key, value in {**os.environ, **environment}.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env=env,
    )


def run_concurrently(*calls: Callable[[], Any]) -> list[Any]:
    """Run calls in threads at the same time, and return the result or exception of each."""
    results: list[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(index: int) -> None:
        barrier.wait()
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
