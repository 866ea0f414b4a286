"""Helpers of the scenarios that run a consumer: a registry that ends it, and pauses."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recorder import call, describe, emit, normalise

#: Seconds from which a sleep is printed instead.
LONG_SLEEP = 5.0

_sleep = time.sleep


def patch_long_sleeps() -> None:
    """Replace long sleeps by a line of the trace, and end the pause as an operator would during the sleep."""

    def sleep(seconds: float) -> None:
        if seconds < LONG_SLEEP:
            _sleep(seconds)
            return
        emit(f"sleep {seconds}")
        end_pause()

    time.sleep = sleep


def pause() -> None:
    """Pause the consumer as an operator does, for two seconds."""
    Path(os.environ["LOCK_FILE"]).write_text("")
    threading.Timer(2, end_pause).start()


def end_pause() -> None:
    """End the pause of the consumer as an operator does."""
    Path(os.environ["LOCK_FILE"]).unlink(missing_ok=True)


def terminate() -> None:
    """Terminate the consumer as an operator does."""
    Path(os.environ["TERMINATE_FILE"]).write_text("")


class Registry:
    """A registry that prints each message, and terminates the consumer at the message `end`."""

    def __init__(self, special: dict[Any, Callable[[], Any]] | None = None) -> None:
        #: Functions to call after a message was printed, by message.
        self.special = special or {}
        #: Functions to call before a message is printed, by message.
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


def run(consumer: Any, timeout: float = 20) -> None:
    """Run a consumer to its end, print how it ended, and close its client."""
    watchdog = threading.Timer(timeout, os._exit, (97,))
    watchdog.start()
    call("run", consumer.run)
    watchdog.cancel()
    emit(f"client closed {normalise(str(consumer.client._closed))}")
    if not consumer.client._closed:
        consumer.client.close(autocommit=False)
