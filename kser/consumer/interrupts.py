"""SIGTERM and SIGINT while a consumer runs in the main thread."""

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

from kser.delivery import CURRENT, Abandoned, Delivery

#: Seconds within which a second signal is the first one once more: a terminal and a wrapper may both pass it on.
SAME_SIGNAL = 0.2
#: Seconds between two attempts to get the main thread out of what it does.
NUDGE = 0.1
#: Seconds that it is given to clean up.
GRACE = 5.0
#: What gets it out: a signal that means nothing to anybody else, and that is ignored where nobody handles it.
NUDGING = signal.SIGURG
ENDING = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """The first signal asks the consumer to stop, the second one interrupts whatever the main thread does.

    A handler runs only when the main thread comes to run Python code, and a task may keep it from that for long. So
    signals are also written to a socket, where another thread finds them: see :meth:`wait`.

    :param stop: what the first one calls; in a signal handler, so it only sets flags.
    """

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1
        self._ends: tuple[socket.socket, socket.socket] | None = None
        # A handler may run while this very thread looks.
        self._lock = threading.RLock()
        self._seen: list[int] = []
        self._last = 0.0
        self._raised = 1
        self._out_of: Delivery | None = None

    @property
    def status(self) -> int | None:
        """The exit status when a second signal came: 128 and its number."""
        return 128 + self._seen[1] if len(self._seen) > 1 else None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals while inside. Elsewhere than in the main thread they are left alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._ends = _, write = socket.socketpair()
        for end in self._ends:
            end.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._handle) for number in (*ENDING, NUDGING)}
        _installed.append(self)
        try:
            yield
        finally:
            _installed.remove(self)
            self.uninstall()

    def uninstall(self) -> None:
        """Put back what handled signals before."""
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def close(self) -> None:
        """Let go of the sockets, once nobody waits."""
        ends, self._ends = self._ends, None
        for end in ends or ():
            end.close()

    def wait(self, timeout: float) -> None:
        """Wait for a signal, in any thread."""
        if select.select(self._ends[:1] if self._ends else [], [], [], timeout)[0]:
            self._look()

    def get_out(self, is_in: Callable[[], bool]) -> bool:
        """Get the main thread out of an attempt that was given up: only a signal handler can raise there, and once.

        :param is_in: whether the main thread still works.
        :return: whether it has left, after some seconds for what it has to clean up.
        """
        deadline = time.monotonic() + GRACE
        while is_in() and time.monotonic() < deadline:
            if self._out_of is None:
                signal.pthread_kill(threading.main_thread().ident or 0, NUDGING)
            self.wait(NUDGE)
        return not is_in()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._look()
        if number == NUDGING:
            delivery = CURRENT.get()
            if delivery is not None and delivery.abandoned and self._out_of is None:
                self._out_of = delivery
                raise Abandoned
        elif len(self._seen) > self._raised:
            self._raised = len(self._seen)
            raise KeyboardInterrupt

    def _look(self) -> None:
        """Take note of the signals that have come."""
        with self._lock:
            try:
                numbers = self._ends[0].recv(4096) if self._ends else b""
            except OSError:
                return
            for number in numbers:
                now = time.monotonic()
                if number in ENDING and (not self._seen or now - self._last >= SAME_SIGNAL):
                    self._seen.append(number)
                    self._last = now
                    self._stop()


#: Who handles signals in this process.
_installed: list[Interrupts] = []


def _forget_in_child() -> None:
    """A process that a task forks is not the consumer: it ends as processes do."""
    while _installed:
        _installed.pop().uninstall()


os.register_at_fork(after_in_child=_forget_in_child)
