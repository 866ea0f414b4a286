"""Isolated partitions: their records run one at a time, because consumers have died while they ran records of them.

The first two starts of a partition run as usual. If they end without progress (:mod:`kser.consumer.starts`), one of the
records kills its process, and it is not known which one. From the third start on, the consumer therefore isolates the
partition: a record starts when the record before it is finished and committed, and at most one record of all isolated
partitions runs at a time. So the lowest unfinished record is the record at which the consumers die. In the second half
of the permitted starts, this record runs alone in its consumer. After ``max_starts`` starts, it is given up unrun.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from kser.attempt import Failure
from kser.consumer.client import Partition, Record
from kser.consumer.offsets import OffsetTracker
from kser.consumer.starts import ISOLATE_FROM
from kser.consumer.work_queue import WorkQueue

#: The reason of a permanent failure, as a dead letter names it.
MAX_STARTS = "max-starts"

#: Seconds for which a partition stays isolated after its first record has started. A consumer finishes more records
#: before it dies than it has committed, so the record that kills the process can be behind the lowest unfinished one.
ISOLATION_TIME = 60.0

_FAILURE = "{starts} consumers have died while they ran the message"


class Isolation:
    """The isolated partitions of a consumer. The caller of each method must hold the lock of the work queue.

    :param work_queue: the work queue, which gets the records one by one.
    :param max_starts: the number of starts after which the lowest unfinished record is given up.
    """

    def __init__(self, work_queue: WorkQueue, max_starts: int) -> None:
        self._work_queue = work_queue
        self._max_starts = max_starts
        self._held: dict[OffsetTracker, deque[Record]] = {}
        self._ends_at: dict[OffsetTracker, float] = {}
        self._chosen: OffsetTracker | None = None
        #: The failure of the chosen record, which is given up; None if the record runs.
        self._failure: Failure | None = None

    def __contains__(self, tracker: object) -> bool:
        return tracker in self._held

    @property
    def is_holding(self) -> bool:
        """True if a record of an isolated partition waits."""
        return any(self._held.values())

    def holds(self, tracker: OffsetTracker) -> bool:
        """Return whether a record of this partition waits."""
        return bool(self._held.get(tracker))

    def admit(self, tracker: OffsetTracker) -> None:
        """Isolate a newly assigned partition if consumers have died at it."""
        if tracker.starts.at(tracker.committed.offset) >= min(ISOLATE_FROM, self._max_starts):
            self._held[tracker] = deque()

    def hold(self, tracker: OffsetTracker, records: Sequence[Record]) -> None:
        """Hold the received records of an isolated partition back."""
        self._held[tracker].extend(records)

    def drop(self, tracker: OffsetTracker) -> None:
        """Forget a partition that is revoked, with its records."""
        self._held.pop(tracker, None)
        self._ends_at.pop(tracker, None)
        if self._chosen is tracker:
            self._chosen = None
        self._work_queue.lanes.end_exclusive(tracker)

    def expired(self, partitions: Mapping[Partition, OffsetTracker]) -> dict[Partition, Sequence[Record]]:
        """End the isolation of the partitions that have been isolated for long enough.

        :return: the records that were held back.
        """
        now = self._work_queue.clock()
        ended: dict[Partition, Sequence[Record]] = {}
        for key, tracker in partitions.items():
            if now >= self._ends_at.get(tracker, now + 1) and not self._is_busy(tracker):
                ended[key] = list(self._held[tracker])
                self.drop(tracker)
        return ended

    def choose(self) -> None:
        """Choose the partition whose next record starts now, if no record of an isolated partition is running.

        Unless the record is given up, its start is counted: the next commit contains the count.
        """
        if self._chosen is not None or any(map(self._is_busy, self._held)):
            return
        self._work_queue.lanes.exclusive = None
        waiting = [tracker for tracker, records in self._held.items() if records]
        if not waiting:
            return
        # The partition with the fewest starts is first, because the others may end the process again.
        tracker = min(waiting, key=_starts)
        starts = _starts(tracker)
        if starts < self._max_starts:
            if starts >= max(self._max_starts // 2, 1):
                self._work_queue.lanes.exclusive = tracker
                if self._work_queue.running():
                    return
            tracker.starts.count(tracker.commit().offset)
        self._chosen = tracker
        self._failure = None if starts < self._max_starts else Failure(MAX_STARTS, "", _FAILURE.format(starts=starts))

    def release(self) -> int:
        """Pass the next record of the chosen partition to the work queue, if the last commit contains its start.

        :return: the number of records passed: 0 or 1.
        """
        tracker = self._chosen
        if tracker is None or tracker.commit() != tracker.committed:
            return 0
        self._chosen = None
        self._ends_at.setdefault(tracker, self._work_queue.clock() + ISOLATION_TIME)
        records = self._held[tracker]
        while records and not tracker.unfinished:
            self._work_queue.put(tracker, [records.popleft()], isolated=True, failure=self._failure)
        if not tracker.unfinished:
            self._work_queue.lanes.end_exclusive(tracker)
        return len(tracker.unfinished)

    def _is_busy(self, tracker: OffsetTracker) -> bool:
        # The attempt at an acked record still runs, although the record is finished.
        return bool(tracker.unfinished) or any(item.tracker is tracker for item in self._work_queue.running())


def _starts(tracker: OffsetTracker) -> int:
    return tracker.starts.at(tracker.commit().offset)
