"""One attempt at a record, on its way from the client to a worker."""

from __future__ import annotations

from threading import Lock
from typing import Any

from kser.consumer.client import Partition, Record
from kser.consumer.offsets import Progress
from kser.delivery import Delivery
from kser.retry import Retry


class Job(Delivery):
    """One attempt at a record.

    :param record: what the transport handed out.
    :param progress: the partition's.
    :param lane: jobs of one lane neither overlap nor overtake; None for a job that is in none.
    """

    #: Whether the record was ever given to a worker.
    begun = False
    #: When it is to be given to a worker, and when it was, by the dispatch's clock.
    due = taken = 0.0
    #: How often it was tried in vain to write it down as a dead letter.
    burials = 0

    def __init__(self, record: Record, progress: Progress, lane: Any, retry: Retry | None) -> None:
        self.record = record
        self.progress = progress
        self.lane = lane
        # What Delivery does, without a call of its own for each record.
        self._retry = retry
        self._decision = Lock()
        #: Bytes of its key and value.
        self.size = len(record.value or b"") + len(record.key or b"")

    def following(self, due: float) -> Job:
        """The next attempt at the same record, or what stands for one; of the same number until it is counted up."""
        job = Job(self.record, self.progress, self.lane, self._retry)
        job.begun = True
        job.due = due
        job.attempt = self.attempt
        return job

    @property
    def place(self) -> Partition:
        """Where the record comes from."""
        return Partition(self.record.topic, self.record.partition)
