"""Waiting for something to become true."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Changes:
    """Threads that wait, each until something is true, which is looked at whenever it may have become so.

    :param lock: held by whoever tells of a change.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._condition = threading.Condition(lock)
        #: What is waited for.
        self.awaited: list[Callable[[], bool]] = []

    def wait(self, until: Callable[[], bool], timeout: float) -> None:
        """Return when ``until()`` is true, or after ``timeout`` seconds."""
        with self._condition:
            self.awaited.append(until)
            try:
                self._condition.wait_for(until, timeout)
            finally:
                self.awaited.remove(until)

    def tell(self) -> None:
        """Something has changed."""
        if any(until() for until in self.awaited):
            self._condition.notify_all()

    def wake(self) -> None:
        """Let all look, whatever they wait for."""
        self._condition.notify_all()
