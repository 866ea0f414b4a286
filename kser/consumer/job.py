"""The items of the work queue: one attempt at one record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid5

from kser.consumer.client import Partition, Record
from kser.consumer.offsets import Progress
from kser.delivery import Attempt
from kser.retry import Retry

if TYPE_CHECKING:
    from kser.consumer.workers import Workers


class Job(Attempt):
    """One attempt at a record.

    :param record: the Kafka record.
    :param progress: the offset tracker of its partition.
    :param lane: the lane, whose items run one after another in order; None if the item is in no lane.
    :param retry: the retry policy of the consumer, for classes that declare none.
    """

    #: Whether an attempt at the record was ever started.
    begun = False
    #: The times at which a retry is due and at which the attempt started, by the clock of the work queue.
    due = taken = 0.0
    #: The number of failed tries to write the dead letter.
    burials = 0
    #: The worker pool that runs the attempt; None before the start.
    crew: Workers | None = None

    def __init__(self, record: Record, progress: Progress, lane: Any, retry: Retry | None) -> None:
        self.record = record
        self.progress = progress
        self.lane = lane
        # The constructor of Attempt is inlined, because a call of it for each record would cost time.
        self.retry = retry
        self.outcome = []
        #: The bytes of the record's key and value.
        self.size = len(record.value or b"") + len(record.key or b"")

    def following(self, due: float) -> Job:
        """Create the item that replaces this one, with the same attempt number; a retry increments the number.

        :param due: the time at which the new item is due.
        """
        job = Job(self.record, self.progress, self.lane, self.retry)
        job.begun = True
        job.acked = self.acked
        job.due = due
        job.number = self.number
        return job

    @property
    def topic(self) -> str:  # type: ignore[override]  # an attribute of other attempts
        return self.record.topic

    @property
    def place(self) -> Partition:
        """The partition of the record."""
        return Partition(self.record.topic, self.record.partition)

    def ack(self) -> None:
        if self.crew is not None and not self.acked:
            self.crew.answer(self)
        self.acked = True

    def restart_timer(self, time_limit: float | None) -> None:
        if self.crew is not None:
            self.taken = self.crew.now()
        super().restart_timer(time_limit)

    def abandon(self) -> None:
        if self.crew is not None:
            self.crew.hand_back(self)
        super().abandon()

    def deterministic_uuid(self) -> str:
        cluster = "" if self.crew is None else self.crew.cluster()
        return str(
            uuid5(NAMESPACE_URL, f"kafka:{cluster}/{self.record.topic}/{self.record.partition}/{self.record.offset}")
        )

    @property
    def shutting_down(self) -> bool:  # type: ignore[override]  # an attribute of other attempts
        return self.crew is not None and self.crew.stopping
