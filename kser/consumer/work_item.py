"""The items of the work queue: one attempt at one record."""

from __future__ import annotations

from typing import Any, Protocol
from uuid import NAMESPACE_URL, uuid5

from kser.attempt import Attempt
from kser.consumer.client import Partition, Record
from kser.consumer.offsets import OffsetTracker
from kser.retry import Retry


class AttemptOwner(Protocol):
    """Worker pool that runs an attempt, as its work item uses it."""

    stopping: bool

    def ack(self, job: WorkItem) -> None:
        """Ack a running item."""

    def abandon(self, job: WorkItem) -> None:
        """Abandon a running item."""

    def now(self) -> float:
        """Return the time by the clock of the work queue."""
        ...

    def cluster(self) -> str:
        """Return the id of the Kafka cluster."""
        ...


class WorkItem(Attempt):
    """One attempt at a record.

    :param record: the Kafka record.
    :param tracker: the offset tracker of its partition.
    :param lane: the lane, whose items run one after another in order; None if the item is in no lane.
    :param retry: the retry policy of the consumer, for classes that declare none.
    """

    #: True once an attempt at the record was started.
    was_started = False
    #: The times at which a retry is due and at which the attempt started, by the clock of the work queue.
    due_at = started_at = 0.0
    #: The number of failed tries to write the dead letter.
    dead_letter_tries = 0
    #: The worker pool that runs the attempt; None before the start.
    worker_pool: AttemptOwner | None = None

    def __init__(self, record: Record, tracker: OffsetTracker, lane: Any, retry: Retry | None) -> None:
        self.record = record
        self.tracker = tracker
        self.lane = lane
        # The constructor of Attempt is inlined, because a call of it for each record would cost time.
        self.retry = retry
        self.outcome = []
        #: The bytes of the record's key and value.
        self.size = len(record.value or b"") + len(record.key or b"")

    def next_attempt(self, due_at: float) -> WorkItem:
        """Create the item that replaces this one, with the same attempt number; a retry increments the number.

        :param due_at: the time at which the new item is due.
        """
        job = WorkItem(self.record, self.tracker, self.lane, self.retry)
        job.was_started = True
        job.acked = self.acked
        job.due_at = due_at
        job.number = self.number
        return job

    @property
    def topic(self) -> str:  # type: ignore[override]  # an attribute of other attempts
        return self.record.topic

    @property
    def partition(self) -> Partition:
        """The partition of the record."""
        return Partition(self.record.topic, self.record.partition)

    def ack(self) -> None:
        if self.worker_pool is not None and not self.acked:
            self.worker_pool.ack(self)
        self.acked = True

    def restart_timer(self, time_limit: float | None) -> None:
        if self.worker_pool is not None:
            self.started_at = self.worker_pool.now()
        super().restart_timer(time_limit)

    def abandon(self) -> None:
        if self.worker_pool is not None:
            self.worker_pool.abandon(self)
        super().abandon()

    def deterministic_uuid(self) -> str:
        cluster = "" if self.worker_pool is None else self.worker_pool.cluster()
        return str(
            uuid5(NAMESPACE_URL, f"kafka:{cluster}/{self.record.topic}/{self.record.partition}/{self.record.offset}")
        )

    @property
    def shutting_down(self) -> bool:  # type: ignore[override]  # an attribute of other attempts
        return self.worker_pool is not None and self.worker_pool.stopping
