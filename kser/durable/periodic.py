"""Periodic thread: a daemon thread that repeats a call while at least one consumer needs it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

#: Maximum number of seconds that :meth:`PeriodicThread.stop` waits for the end of the current call. The shutdown of a
#: consumer must not wait long for a send or for the database, and a daemon thread does not keep the process alive.
STOP_TIMEOUT = 1.0


class PeriodicThread:
    """A daemon thread that repeats a call. Consumers of one process share the thread.

    :param name: name of the thread.
    :param call: the call, which must not raise an exception. It returns the number of seconds from its start until the
        next call.
    :param at_end: a call that the thread makes at its end, or None.
    """

    def __init__(self, name: str, call: Callable[[], float], at_end: Callable[[], object] | None = None) -> None:
        self._name = name
        self._call = call
        self._at_end = at_end
        self._lock = threading.Lock()
        self._users: set[object] = set()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        """True if the thread runs."""
        return self._thread is not None

    def start(self, user: object) -> None:
        """Start the thread if it does not run yet.

        :param user: the consumer that needs the thread. Further calls for the same consumer do nothing.
        """
        with self._lock:
            self._users.add(user)
            if self._thread is None:
                self._stopped = threading.Event()
                self._thread = threading.Thread(target=self._run, args=[self._stopped], name=self._name, daemon=True)
                self._thread.start()

    def stop(self, user: object) -> None:
        """Stop the thread if no other consumer needs it, and wait for the end of the current call.

        :param user: the consumer that no longer needs the thread.
        """
        with self._lock:
            self._users.discard(user)
            if self._users or self._thread is None:
                return
            thread, self._thread = self._thread, None
            self._stopped.set()
        if thread is not threading.current_thread():
            thread.join(STOP_TIMEOUT)

    def _run(self, stopped: threading.Event) -> None:
        while not stopped.is_set():
            started_at = time.monotonic()
            interval = self._call()
            stopped.wait(max(started_at + interval - time.monotonic(), 0))
        if self._at_end is not None:
            self._at_end()
