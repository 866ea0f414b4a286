"""One attempt at a record, on its way from the client to a worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid5

from kser.consumer.client import Partition, Record
from kser.consumer.offsets import Progress
from kser.delivery import Delivery
from kser.retry import Retry

if TYPE_CHECKING:
    from kser.consumer.workers import Workers


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
    #: Those that work on it; None before that.
    crew: Workers | None = None

    def __init__(self, record: Record, progress: Progress, lane: Any, retry: Retry | None) -> None:
        self.record = record
        self.progress = progress
        self.lane = lane
        # What Delivery does, without a call of its own for each record.
        self.retry = retry
        self.decision = []
        #: Bytes of its key and value.
        self.size = len(record.value or b"") + len(record.key or b"")

    def following(self, due: float) -> Job:
        """The next attempt at the same record, or what stands for one; of the same number until it is counted up."""
        job = Job(self.record, self.progress, self.lane, self.retry)
        job.begun = True
        job.answered = self.answered
        job.due = due
        job.attempt = self.attempt
        return job

    @property
    def topic(self) -> str:  # type: ignore[override]  # an attribute of other deliveries
        return self.record.topic

    @property
    def place(self) -> Partition:
        """Where the record comes from."""
        return Partition(self.record.topic, self.record.partition)

    def answer(self) -> None:
        if self.crew is not None and not self.answered:
            self.crew.answer(self)
        self.answered = True

    def begin(self, timeout: float | None) -> None:
        if self.crew is not None:
            self.taken = self.crew.now()
        super().begin(timeout)

    def hand_back(self) -> None:
        if self.crew is not None:
            self.crew.hand_back(self)
        super().hand_back()

    def identity(self) -> str:
        cluster = "" if self.crew is None else self.crew.cluster()
        return str(
            uuid5(NAMESPACE_URL, f"kafka:{cluster}/{self.record.topic}/{self.record.partition}/{self.record.offset}")
        )

    @property
    def ending(self) -> bool:  # type: ignore[override]  # an attribute of other deliveries
        return self.crew is not None and self.crew.stopping
