"""Isolated partitions: their records run one at a time, because consumers have died while they ran records of them.

The first two starts of a partition run as usual. If they end without progress (:mod:`kser.consumer.starts`), one of the
records kills its process, and it is not known which one. From the third start on, the consumer therefore isolates the
partition: at most one record of all isolated partitions runs at a time, and its start is committed before. The next
record starts when the attempt has ended: the record is finished, acked, or waits for a retry. So the record with the
most starts is the record at which the consumers die. In the second half of the permitted starts, this record runs alone
in its consumer: beside no record and no takeover. After ``max_starts`` starts, it is given up unrun.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from kser.attempt import Failure
from kser.consumer.client import Partition, Record
from kser.consumer.offsets import OffsetTracker
from kser.consumer.starts import ISOLATE_FROM
from kser.consumer.takeovers import TakeoverItem
from kser.consumer.unreadable import UnreadableRecord
from kser.consumer.work_item import WorkItem
from kser.consumer.work_queue import WorkQueue, lane_of

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
        if tracker.starts.highest >= min(ISOLATE_FROM, self._max_starts):
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
        busy = self._busy()
        ended: dict[Partition, Sequence[Record]] = {}
        for key, tracker in partitions.items():
            if now >= self._ends_at.get(tracker, now + 1) and tracker not in busy:
                ended[key] = list(self._held[tracker])
                self.drop(tracker)
        return ended

    def choose(self) -> None:
        """Choose the partition whose next record starts now, if no record of an isolated partition is running.

        Unless the record is given up, its start is counted: the next commit contains the count.
        """
        if self._chosen is not None or any(tracker in self._held for tracker in self._busy()):
            return
        self._work_queue.lanes.exclusive = None
        self.update(self._held)
        for tracker, records in self._held.items():
            # A record whose lane is occupied waits there: it does not start now, so its start is not counted.
            while records and (tracker.is_finished(_last_offset(records[0])) or self._waits_for_lane(tracker)):
                self._work_queue.put(tracker, [records.popleft()])
        waiting = [tracker for tracker, records in self._held.items() if records]
        if not waiting:
            return
        # The partition with the fewest starts is first, because the others may end the process again.
        tracker = min(waiting, key=self._starts)
        starts = self._starts(tracker)
        if starts < self._max_starts:
            if starts >= max(self._max_starts // 2, 1):
                self._work_queue.lanes.exclusive = tracker
                if any(_may_end_process(item) for item in self._work_queue.running()):
                    return
            tracker.starts.count(self._next_offset(tracker))
        self._chosen = tracker
        self._failure = None if starts < self._max_starts else Failure(MAX_STARTS, "", _FAILURE.format(starts=starts))

    def release(self) -> int:
        """Pass the next record of the chosen partition to the work queue, if the last commit contains its start.

        :return: the number of records passed: 0 or 1.
        """
        tracker = self._chosen
        self.update(self._held)
        if tracker is None or tracker.commit() != tracker.committed:
            return 0
        self._chosen = None
        self._ends_at.setdefault(tracker, self._work_queue.clock() + ISOLATION_TIME)
        records = self._held[tracker]
        count = len(tracker.unfinished)
        while records and len(tracker.unfinished) == count:
            self._work_queue.put(tracker, [records.popleft()], isolated=True, failure=self._failure)
        if len(tracker.unfinished) == count:
            self._work_queue.lanes.end_exclusive(tracker)
        return len(tracker.unfinished) - count

    def update(self, trackers: Iterable[OffsetTracker]) -> bool:
        """Update which records of these partitions wait for a retry.

        :return: True if a retry is due soon, so that its start must be committed.
        """
        now = self._work_queue.clock()

        def waits(item: WorkItem) -> bool:
            return item.waits(now)

        return sum(each.starts.update(each.unfinished, waits, isolated=each in self) for each in trackers) > 0

    def _busy(self) -> set[OffsetTracker]:
        """Return the partitions with a record that runs or is ready.

        A record that waits for a retry, or for its lane, has ended no process. The attempt at an acked record may run
        for hours, and its record does not start again.
        """
        running = (item.tracker for item in self._work_queue.running() if not item.attempt.acked)
        return {*running, *(item.tracker for item in self._work_queue.lanes.ready)}

    def _next_offset(self, tracker: OffsetTracker) -> int:
        record = self._held[tracker][0]
        return tracker.first_unfinished(record.offset, _last_offset(record))

    def _waits_for_lane(self, tracker: OffsetTracker) -> bool:
        lane = lane_of(self._held[tracker][0], self._work_queue.ordering)
        return self._work_queue.lanes.is_occupied(tracker, lane)

    def _starts(self, tracker: OffsetTracker) -> int:
        return tracker.starts.at(self._next_offset(tracker))


def _may_end_process(item: WorkItem) -> bool:
    """Return whether a running item prevents the start of a record that must run alone."""
    return isinstance(item, TakeoverItem) or not item.attempt.acked


def _last_offset(record: Record) -> int:
    return record.last_offset if isinstance(record, UnreadableRecord) else record.offset
