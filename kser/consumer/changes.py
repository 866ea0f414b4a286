"""Waiting until a predicate is true."""

from __future__ import annotations

import threading
from collections.abc import Callable


class ConditionWaiters:
    """A condition variable for threads that each wait for a predicate of their own.

    :param lock: the lock of the state that the predicates read; callers of the notify methods must hold it.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._condition = threading.Condition(lock)
        #: The predicates of the waiting threads.
        self.predicates: list[Callable[[], bool]] = []

    def wait(self, predicate: Callable[[], bool], timeout: float) -> None:
        """Block until the predicate is true, or until ``timeout`` seconds have passed."""
        with self._condition:
            self.predicates.append(predicate)
            try:
                self._condition.wait_for(predicate, timeout)
            finally:
                self.predicates.remove(predicate)

    def notify_satisfied(self) -> None:
        """Wake the waiting threads if the predicate of at least one is true."""
        if any(until() for until in self.predicates):
            self._condition.notify_all()

    def notify_all(self) -> None:
        """Wake all waiting threads, so that each evaluates its predicate."""
        self._condition.notify_all()
