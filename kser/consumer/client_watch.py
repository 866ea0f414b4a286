"""The watch over the thread that owns the Kafka client, for calls of the client library that never return."""

from __future__ import annotations

import linecache
import sys
import traceback
from collections.abc import Callable
from types import FrameType

#: The longest time in seconds that a check adds to the age of a turn. A process that was suspended, or that a task
#: has kept from running other threads, makes no check meanwhile, so this time does not count.
MAX_STEP = 1.0


class ClientWatch:
    """A watch that measures the turns of the client thread.

    A turn is the time between two calls of :meth:`beat`: one call of the client library, or a few of them.

    :param limit: the longest duration of a turn, in seconds.
    :param clock: returns the time in seconds.
    """

    def __init__(self, limit: float, clock: Callable[[], float]) -> None:
        #: The longest duration of a turn, in seconds.
        self.limit = limit
        self._clock = clock
        self._turn = self._checked_turn = 0
        self._checked_at = clock()
        self._age = 0.0

    def beat(self) -> None:
        """Begin a new turn. The client thread calls this method."""
        self._turn += 1

    def is_overdue(self) -> bool:
        """Return whether the current turn has exceeded the limit. The supervisor calls this method again and again."""
        now = self._clock()
        step = min(now - self._checked_at, MAX_STEP)
        self._checked_at = now
        if self._turn != self._checked_turn:
            self._checked_turn, self._age = self._turn, 0.0
        else:
            self._age += step
        return self._age >= self.limit


def stack_of(ident: int | None) -> tuple[str, str]:
    """Return the innermost line of a thread as text, and its whole stack.

    :param ident: the identifier of the thread.
    """
    frame: FrameType | None = sys._current_frames().get(ident or 0)
    if frame is None:
        return "an unknown place", ""
    code = frame.f_code
    line = linecache.getline(code.co_filename, frame.f_lineno).strip()
    file = "/".join(code.co_filename.split("/")[-3:])
    return f"{file}:{frame.f_lineno} in {code.co_name}: {line}", "".join(traceback.format_stack(frame))
