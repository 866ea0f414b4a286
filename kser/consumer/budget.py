"""Limit of the records in flight in a consumer, by count and by bytes."""

from __future__ import annotations


class InFlightLimit:
    """Counter of the records in flight, with a limit of their number and bytes.

    :param max_count: the maximum number of records.
    :param max_bytes: the maximum number of bytes of their keys and values.
    """

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._average = 0
        #: The number of records in flight, and their bytes.
        self.count = self.bytes = 0

    def acquire(self, count: int, size: int) -> None:
        """Count additional records in flight."""
        self.count += count
        self.bytes += size
        if count:
            self._average = max(size // count, 1)

    def release(self, size: int) -> None:
        """Remove one record from the counters."""
        self.count -= 1
        self.bytes -= size

    def available(self, delayed: int) -> int:
        """Return how many more records may be in flight.

        :param resting: the number of records in flight that wait for a retry; these count by their bytes only.
        """
        room = self._max_count - self.count + delayed
        spare = self._max_bytes - self.bytes
        if room <= 0 or spare <= 0:
            return 0
        return min(room, spare // self._average + 1) if self._average else room
