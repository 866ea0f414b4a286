"""Helpers shared by several test modules."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cdumay_result import Result

from kser.schemas import Message

ROOT = Path(__file__).parent.parent

UUID = "872c3be0-51ac-457f-a4d9-12c2f7667b80"


def records(caplog: pytest.LogCaptureFixture, level: int = logging.DEBUG) -> list[logging.LogRecord]:
    """What kser logged, from ``level`` on."""
    return [record for record in caplog.records if record.name.split(".")[0] == "kser" and record.levelno >= level]


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.DEBUG) -> list[str]:
    """The texts of what kser logged, from ``level`` on."""
    return [record.getMessage() for record in records(caplog, level)]


def record_of(caplog: pytest.LogCaptureFixture, start: str) -> logging.LogRecord:
    """The one record of kser whose text begins with ``start``."""
    found = [record for record in records(caplog) if record.getMessage().startswith(start)]
    assert len(found) == 1, f"{len(found)} records begin with {start!r}: {lines(caplog)}"
    return found[0]


def message(entrypoint: Any, uuid: str = UUID, **arguments: Any) -> Message:
    """A message for a class or for a name."""
    return Message(uuid=uuid, entrypoint=getattr(entrypoint, "path", entrypoint), **arguments)


def said(text: str) -> Result:
    """A successful result with something to tell."""
    return Result(stdout=text)


class Clock:
    """Time that passes when a test says so.

    :param consumer: one that is to go by it from now on.
    """

    def __init__(self, consumer: Any = None) -> None:
        self.now = 1000.0
        if consumer is not None:
            self.now = consumer._kser_clock()
            consumer._kser_clock = consumer._kser_work_queue.clock = self
            consumer._kser_work_queue.group_lease._clock = self

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def run_python(code: str, *arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process of its own; a variable that is None is not set there."""
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
