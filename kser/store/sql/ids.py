"""Operation ids, which increase with the time of creation."""

from __future__ import annotations

import random
import threading
from typing import Final

#: Start of the time in ids: the beginning of 2020, in seconds since 1970. The high bits of an id count the microseconds
#: since this start, and the 12 low bits are random, so ids fit into 63 bits until 2091.
ID_EPOCH: Final = 1_577_836_800
RANDOM_BITS: Final = 12


class IdGenerator:
    """A generator of operation ids, which increase strictly within a process, and approximately across processes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next_ids(self, now: float, count: int) -> int:
        """Reserve ``count`` consecutive ids, and return the first of these ids.

        :param now: the current time in seconds since 1970.
        """
        with self._lock:
            first = max(id_at(now) + random.getrandbits(RANDOM_BITS), self._last + 1)
            self._last = first + count - 1
            return first


def id_at(moment: float) -> int:
    """Return the lowest id that can be generated at ``moment``, in seconds since 1970."""
    return int(max(moment - ID_EPOCH, 0) * 1_000_000) << RANDOM_BITS


def time_of(identifier: int) -> float:
    """Return the time at which an id was generated, in seconds since 1970."""
    return ID_EPOCH + (identifier >> RANDOM_BITS) / 1_000_000
