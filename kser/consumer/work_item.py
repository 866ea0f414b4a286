"""The items of the work queue. Each item contains a record, the lane of the record and the attempt at the record."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from kser.attempt import Attempt
from kser.consumer.client import Partition, Record
from kser.consumer.offsets import OffsetTracker
from kser.limits import header_bytes
from kser.retry import Retry

#: Function that returns whether an attempt at the record of an item was started.
was_started = attrgetter("was_started")


#: Seconds before a retry from which on the record counts as started again, so that a commit contains the start in time.
RETRY_LEAD = 2.0


class WorkItem:
    """A record in the work queue, and one attempt at it.

    :param record: the Kafka record.
    :param tracker: the offset tracker of its partition.
    :param lane: the lane, whose items run one after another in order; None if the item is in no lane.
    :param retry: the retry policy of the consumer, for classes that declare no policy.
    """

    #: True once an attempt at the record was started.
    was_started = False
    #: The time at which a retry is due, by the clock of the work queue.
    due_at = 0.0
    #: The number of failed tries to write the dead letter.
    dead_letter_tries = 0

    def __init__(self, record: Record, tracker: OffsetTracker, lane: Any, retry: Retry | None) -> None:
        self.record = record
        self.tracker = tracker
        self.lane = lane
        #: The attempt at the record.
        self.attempt = Attempt(retry, record)
        key, value, headers = record.key, record.value, record.headers
        #: The total size of the record's key, value and headers, in bytes.
        self.size = (len(key) if key else 0) + (len(value) if value else 0)
        if headers:
            self.size += header_bytes(headers)

    def survives_revocation(self, commit_before: bool) -> bool:
        """Return whether the item continues after a revocation of its partition.

        The item continues only if Kafka will not redeliver its record. This is true in two cases: the record is acked,
        or ``commit_before`` is True and an attempt at the record was started.

        :param commit_before: whether a record counts as finished as soon as its attempt has started.
        """
        return self.attempt.acked or (commit_before and self.was_started)

    def waits(self, now: float) -> bool:
        """Return whether the attempt at the record has ended, and the next attempt is not due soon."""
        return self.attempt.failure is not None or self.due_at > now + RETRY_LEAD

    def next_attempt(self, due_at: float) -> WorkItem:
        """Create the item that replaces this item: for a retry, a timeout, or another write of the dead letter.

        The new item keeps the attempt number, because only a retry is a new attempt. For a retry, the caller increments
        the number.

        :param due_at: the time at which the new item is due.
        """
        item = WorkItem(self.record, self.tracker, self.lane, self.attempt.retry)
        item.was_started = True
        item.due_at = due_at
        item.attempt.acked = self.attempt.acked
        item.attempt.number = self.attempt.number
        return item

    @property
    def partition(self) -> Partition:
        """The partition of the record."""
        return Partition(self.record.topic, self.record.partition)

    @property
    def place(self) -> str:
        """The place of the record, for log lines."""
        return f"offset {self.record.offset} of {self.partition}"
