"""Ids of operations, which increase with the time of creation."""

from __future__ import annotations

import random
import threading
from typing import Final

#: Epoch of the ids: the start of 2020 in seconds since 1970. An id has microseconds in its high bits and 12 random low
#: bits, so 63 bits last until 2091.
ID_EPOCH: Final = 1_577_836_800
RANDOM_BITS: Final = 12


class IdGenerator:
    """A generator of ids. The ids increase strictly within a process, and approximately across processes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next_ids(self, now: float, count: int) -> int:
        """Reserve ``count`` consecutive ids, and return the first one."""
        with self._lock:
            first = max(id_at(now) + random.getrandbits(RANDOM_BITS), self._last + 1)
            self._last = first + count - 1
            return first


def id_at(moment: float) -> int:
    """Return the lowest id that can be generated at a time."""
    return int(max(moment - ID_EPOCH, 0) * 1_000_000) << RANDOM_BITS


def time_of(identifier: int) -> float:
    """Return the time at which an id was generated."""
    return ID_EPOCH + (identifier >> RANDOM_BITS) / 1_000_000
