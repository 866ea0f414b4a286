"""Handling of SIGTERM and SIGINT while a consumer runs in the main thread."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from kser.attempt import Attempt, AttemptAbandoned, current_attempt

#: Seconds within which a repeated signal counts as the same signal, because a terminal and a wrapper program may both
#: forward the same signal.
REPEATED_SIGNAL_WINDOW = 0.2

#: Seconds between two sends of ``WAKEUP_SIGNAL`` to the main thread.
WAKEUP_INTERVAL = 0.1

#: Seconds that the main thread has to leave an abandoned attempt, including the clean-up code of the task.
CLEANUP_GRACE = 5.0

#: The signal that makes the main thread run the handler that ends an abandoned attempt. kser uses SIGURG for nothing
#: else, and a process without a handler for SIGURG ignores it.
WAKEUP_SIGNAL = signal.SIGURG
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class ShutdownSignals:
    """The signal handlers of a consumer.

    The first signal stops the consumer, and the second signal interrupts the main thread.

    Python runs a signal handler only when the main thread executes Python code, and a blocking task can delay that for
    a long time. So this class lets Python also write each signal to a socket (:func:`signal.set_wakeup_fd`), which
    another thread reads with :meth:`wait`.

    :param stop: called at each signal. The call may happen inside a signal handler, so ``stop`` must only set flags.
    """

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        # Re-entrant, because a signal handler can run while the same thread holds the lock.
        self._lock = threading.RLock()
        self._received: list[int] = []
        self._last = 0.0
        self._raised = 1
        self._interrupted: Attempt | None = None

    @property
    def status(self) -> int | None:
        """The exit status after a second signal: 128 plus the number of that signal; None before a second signal."""
        return 128 + self._received[1] if len(self._received) > 1 else None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Install the signal handlers for the duration of the context. Outside of the main thread, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._sockets = _, write = socket.socketpair()
        for connection in self._sockets:
            connection.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._handle) for number in (*STOP_SIGNALS, WAKEUP_SIGNAL)}
        _installed.append(self)
        try:
            yield
        finally:
            _installed.remove(self)
            self.uninstall()

    def uninstall(self) -> None:
        """Restore the previous signal handlers."""
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def close(self) -> None:
        """Close the sockets. Call this method when no thread waits for a signal."""
        connections, self._sockets = self._sockets, None
        for connection in connections or ():
            connection.close()

    def wait(self, timeout: float) -> None:
        """Wait for a signal, up to ``timeout`` seconds. Any thread may call this method."""
        if select.select(self._sockets[:1] if self._sockets else [], [], [], timeout)[0]:
            self._read_pending()

    def interrupt_main_thread(self, is_running: Callable[[], bool]) -> bool:
        """Interrupt an abandoned attempt that still runs in the main thread.

        Another thread cannot raise an exception in the main thread, but a signal handler can, because it runs in the
        main thread. So this method sends ``WAKEUP_SIGNAL`` to the main thread, and the handler raises the exception, at
        most once.

        :param is_running: returns whether the main thread still runs tasks.
        :return: whether the main thread has left the attempt, including its clean-up code, within ``CLEANUP_GRACE``
            seconds.
        """
        deadline = time.monotonic() + CLEANUP_GRACE
        while is_running() and time.monotonic() < deadline:
            if self._interrupted is None:
                signal.pthread_kill(threading.main_thread().ident or 0, WAKEUP_SIGNAL)
            self.wait(WAKEUP_INTERVAL)
        return not is_running()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._read_pending()
        if number == WAKEUP_SIGNAL:
            attempt = current_attempt.get()
            if attempt is not None and attempt.abandoned and self._interrupted is None:
                self._interrupted = attempt
                raise AttemptAbandoned
        elif len(self._received) > self._raised:
            self._raised = len(self._received)
            raise KeyboardInterrupt

    def _read_pending(self) -> None:
        """Read the pending signals from the socket and call ``stop`` for each new signal."""
        with self._lock:
            try:
                numbers = self._sockets[0].recv(4096) if self._sockets else b""
            except OSError:
                return
            for number in numbers:
                now = time.monotonic()
                if number in STOP_SIGNALS and (not self._received or now - self._last >= REPEATED_SIGNAL_WINDOW):
                    self._received.append(number)
                    self._last = now
                    self._stop()


#: The signal handlers that are installed in this process.
_installed: list[ShutdownSignals] = []


def _uninstall_in_child() -> None:
    """Restore the previous signal handlers in a forked child process, because only the parent runs a consumer."""
    while _installed:
        _installed.pop().uninstall()


os.register_at_fork(after_in_child=_uninstall_in_child)
