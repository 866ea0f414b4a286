"""The count of starts of a partition, so that a message that kills its process does not start again without end.

A consumer that dies commits nothing, so its records start again at the next owner of their partition. Before the first
record of an assigned partition starts, the consumer therefore commits the same offset again, with one more start in the
metadata (``starts:2``). The count belongs to the committed offset: it ends when the committed offset moves, and when a
consumer gives the partition back in an orderly way. So the count grows only if consumers die one after the other, and
only if none of them finishes the record at the committed offset. A process that dies before a record starts does not
count.
"""

from __future__ import annotations

from kser.consumer.client import Commit

STARTS_PREFIX = "starts:"

#: The number of counted starts from which on the records of a partition run one at a time.
ISOLATE_FROM = 2


class StartCount:
    """The count of starts of an assigned partition.

    :param start: the committed offset of the group at the assignment.
    """

    def __init__(self, start: Commit) -> None:
        word = start.word(STARTS_PREFIX)
        self._number = int(word) if word.isdigit() else 0
        self._offset = start.offset
        #: True if the start of this consumer is counted.
        self.counted = False

    def at(self, offset: int) -> int:
        """Return the number of starts at a committed offset."""
        return self._number if offset == self._offset else 0

    def count(self, offset: int) -> None:
        """Count the start of this consumer at a committed offset. The next commit contains the count."""
        self._number, self._offset = self.at(offset) + 1, offset
        self.counted = True

    def reset(self) -> None:
        """Remove the count, because the consumer gives the partition back in an orderly way."""
        self._number = 0

    def carry_over(self, earlier: StartCount) -> None:
        """Take over whether this start is counted, from an earlier assignment of the partition to this consumer."""
        self.counted = earlier.counted and self._number > 0 and self._number == earlier.at(self._offset)

    def annotate(self, commit: Commit) -> Commit:
        """Return the commit with the count in its metadata."""
        number = self.at(commit.offset)
        return Commit(commit.offset, f"{STARTS_PREFIX}{number} {commit.metadata}".rstrip()) if number else commit
