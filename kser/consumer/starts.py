"""The counts of starts of a partition, so that a message that kills its process does not start again without end.

A consumer that dies commits nothing, so its records start again at the next owner of their partition. Before the first
record of an assigned partition starts, the consumer therefore commits the same offset again, with one more start in the
metadata (``starts:2``). A count belongs to one offset: it ends when the record there is finished, and when a consumer
gives the partition back in an orderly way. So the count grows only if consumers die one after the other, and only if
none of them finishes the record. A process that dies before a record starts does not count.

The count of a record that waits for a retry does not contain the start of this consumer: its attempt has ended, and the
process lives. While it waits, the start of the next record is counted. For example, ``starts:1,3-2`` counts 1 start at
the committed offset and 2 starts of the record 3 offsets above it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from kser.consumer.client import Commit

STARTS_PREFIX = "starts:"

#: The number of counted starts from which on the records of a partition run one at a time.
ISOLATE_FROM = 2


#: The maximum number of counts in the metadata of a commit.
MAX_COUNTS = 8

_WORD = re.compile(r"[0-9]{1,9}(,[0-9]{1,18}-[0-9]{1,9})*")


class StartCount:
    """The counts of starts of an assigned partition.

    :param start: the committed offset of the group at the assignment.
    """

    def __init__(self, start: Commit) -> None:
        self._counts = _decode(start)
        # The offsets whose count contains the start of this consumer.
        self._own: set[int] = set()
        # The counted offsets whose record waits for a retry.
        self._waiting: set[int] = set()
        #: True if the start of this consumer is counted.
        self.counted = False

    def at(self, offset: int) -> int:
        """Return the number of starts at an offset."""
        return self._counts.get(offset, 0) - (offset in self._waiting)

    @property
    def highest(self) -> int:
        """The highest number of starts."""
        return max(map(self.at, self._counts), default=0)

    def count(self, offset: int) -> None:
        """Count the start of this consumer at an offset. The next commit contains the count."""
        if offset not in self._own or offset in self._waiting:
            self._counts[offset] = self.at(offset) + 1
        self._waiting.discard(offset)
        self._own.add(offset)
        self.counted = True

    def update(self, unfinished: Mapping[int, Any], waits: Callable[[Any], bool], *, isolated: bool) -> bool:
        """Update which counted records wait for a retry, and count the next record if all of them wait.

        :param unfinished: the items of the unfinished records by offset, in order.
        :param waits: returns whether the record of an item waits for a retry.
        :param isolated: whether the partition is isolated, so that each of its starts is counted anyway.
        :return: True if a retry is due soon, so that the start counts again.
        """
        if not self._own:
            return False
        before = self._waiting
        self._waiting = {offset for offset in self._own if offset in unfinished and waits(unfinished[offset])}
        if self._waiting and not any(offset in unfinished for offset in self._own - self._waiting):
            offset = None if isolated else _first_ready(unfinished, waits)
            self.counted = offset is not None
            if offset is not None:
                self.count(offset)
        return any(offset in unfinished for offset in before - self._waiting)

    def finish(self, offset: int) -> None:
        """Remove the count of a finished record."""
        self._counts.pop(offset, None)
        self._own.discard(offset)
        self._waiting.discard(offset)

    def reset(self) -> None:
        """Remove the counts, because the consumer gives the partition back in an orderly way."""
        self._counts.clear()
        self._own.clear()
        self._waiting.clear()

    def carry_over(self, earlier: StartCount) -> None:
        """Take over which starts are counted, from an earlier assignment of the partition to this consumer."""
        self._own = {at for at in earlier._own if 0 < self._counts.get(at, 0) == earlier._counts[at]}
        self.counted = bool(self._own)

    def annotate(self, commit: Commit) -> Commit:
        """Return the commit with the counts in its metadata."""
        if not self._counts:
            return commit
        start = commit.offset
        numbers = [(offset, number) for offset in sorted(self._counts) if (number := self.at(offset))]
        above = "".join(f",{offset - start}-{number}" for offset, number in numbers[:MAX_COUNTS] if offset > start)
        number = self.at(start)
        return (
            Commit(start, f"{STARTS_PREFIX}{number}{above} {commit.metadata}".rstrip()) if number or above else commit
        )


def _first_ready(unfinished: Mapping[int, Any], waits: Callable[[Any], bool]) -> int | None:
    waiting_lanes = set()
    for offset, item in unfinished.items():
        if waits(item):
            waiting_lanes.add(item.lane)
        elif item.lane is None or item.lane not in waiting_lanes:
            return offset
    return None


def _decode(start: Commit) -> dict[int, int]:
    word = start.word(STARTS_PREFIX)
    if not _WORD.fullmatch(word):
        return {}
    first, *others = word.split(",")
    counts = {start.offset: int(first)}
    for other in others:
        distance, _, number = other.partition("-")
        counts[start.offset + int(distance)] = int(number)
    return {offset: number for offset, number in counts.items() if number}
