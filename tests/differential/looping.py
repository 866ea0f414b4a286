"""Shared parts of the consumer loop scenarios: registries that end it, and pauses of the published package."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recorder import call, describe, emit, normalise

LONG = 5.0

_sleep = time.sleep


def patch_long_sleeps() -> None:
    """Show sleeps of several seconds instead of sleeping: meanwhile an operator ends the pause."""

    def sleep(seconds: float) -> None:
        if seconds < LONG:
            _sleep(seconds)
            return
        emit(f"sleep {seconds}")
        end_pause()

    time.sleep = sleep


def pause() -> None:
    """What an operator does to pause the consumer, for two seconds."""
    Path(os.environ["LOCK_FILE"]).write_text("")
    threading.Timer(2, end_pause).start()


def end_pause() -> None:
    """What an operator does to let the consumer go on."""
    Path(os.environ["LOCK_FILE"]).unlink(missing_ok=True)


def terminate() -> None:
    """What an operator does to end the consumer."""
    Path(os.environ["TERMINATE_FILE"]).write_text("")


class Registry:
    """Shows what it is given, does what it is told for one value, and ends the consumer at the value `end`."""

    def __init__(self, special: dict[Any, Callable[[], Any]] | None = None) -> None:
        self.special = special or {}
        #: What to do before a value is shown.
        self.before: dict[Any, Callable[[], Any]] = {}

    def run(self, data: Any) -> str:
        """Handle a message as a controller would."""
        if data in self.before:
            self.before[data]()
        emit(f"registry.run {describe(data)}")
        if data == "end":
            terminate()
        if data in self.special:
            self.special[data]()
        return "ignored"


def run(consumer: Any, patience: float = 20) -> None:
    """Run a consumer to its end, print how it ended, and let go of its client."""
    watchdog = threading.Timer(patience, os._exit, (97,))
    watchdog.start()
    call("run", consumer.run)
    watchdog.cancel()
    emit(f"client closed {normalise(str(consumer.client._closed))}")
    if not consumer.client._closed:
        consumer.client.close(autocommit=False)
