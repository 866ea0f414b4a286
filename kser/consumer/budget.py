"""How many records a consumer may hold, by count and by bytes."""

from __future__ import annotations


class Budget:
    """What is held of what may be held.

    :param max_count: records.
    :param max_bytes: bytes of their keys and values.
    """

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._average = 0
        #: Records that are held, and their bytes.
        self.count = self.bytes = 0

    def take(self, count: int, size: int) -> None:
        """So many records are held more."""
        self.count += count
        self.bytes += size
        if count:
            self._average = max(size // count, 1)

    def give(self, size: int) -> None:
        """One record less is held."""
        self.count -= 1
        self.bytes -= size

    def room(self, resting: int) -> int:
        """How many records there is room for.

        :param resting: of those that are held, how many do not count: they only take bytes.
        """
        room = self._max_count - self.count + resting
        spare = self._max_bytes - self.bytes
        if room <= 0 or spare <= 0:
            return 0
        return min(room, spare // self._average + 1) if self._average else room
