"""Takeovers in the work queue: steps of stored operations that a worker runs without a record."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from kser.consumer.client import Commit
from kser.consumer.lanes import LaneQueue
from kser.consumer.offsets import OffsetTracker
from kser.consumer.work_item import WorkItem
from kser.retry import Retry
from kser.takeover import Takeover


class TakeoverTracker(OffsetTracker):
    """The offset tracker of one takeover, which has no offset: nothing is committed, and nothing is revoked.

    :param takeover: the takeover.
    """

    def __init__(self, takeover: Takeover) -> None:
        super().__init__(Commit(0))
        self._takeover = takeover

    def mark_finished(self, offset: int) -> bool:
        self._takeover.end()
        return True

    def replace(self, offset: int, item: Any) -> bool:
        return True

    def is_committed(self, offset: int) -> bool:
        return True


class TakeoverItem(WorkItem):
    """The work item of a takeover. It is in no lane.

    :param takeover: the takeover.
    :param tracker: the tracker of the takeover.
    :param retry: the retry policy of the consumer, for classes that declare no policy.
    :param deadline: the time at which the reservation expires, by the clock of the work queue.
    """

    def __init__(
        self, takeover: Takeover, tracker: TakeoverTracker, retry: Retry | None, deadline: float = math.inf
    ) -> None:
        super().__init__(takeover, tracker, None, retry)
        self.deadline = deadline
        # The store is responsible for the step, so the consumer neither retries the message nor writes a dead letter.
        self.attempt.acked = True

    @property
    def takeover(self) -> Takeover:
        """The takeover."""
        return cast(Takeover, self.record)

    def next_attempt(self, due_at: float) -> TakeoverItem:
        """Create the item that reports the timeout of this item. It never expires, because its step has begun."""
        item = TakeoverItem(self.takeover, cast(TakeoverTracker, self.tracker), self.attempt.retry)
        item.was_started = True
        return item

    @property
    def place(self) -> str:
        return self.takeover.label


class TakeoverQueue:
    """The takeovers that wait for a worker. The queue shares the lock of the work queue.

    :param work_available: the condition of the work queue for which idle workers wait.
    :param acquire: counts a takeover of a size as in flight.
    :param release: removes one record of a size from the counters.
    """

    def __init__(
        self,
        work_available: threading.Condition,
        acquire: Callable[[int], None],
        release: Callable[[int], None],
    ) -> None:
        self._work_available = work_available
        self._acquire = acquire
        self._release = release
        self._waiting: deque[TakeoverItem] = deque()
        self._closed = False
        # True if the last item that started is a takeover that overtook a ready record.
        self._has_overtaken = False

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, item: TakeoverItem) -> bool:
        """Append a new takeover, which counts as one record in flight; return False if the queue is closed.

        The caller must hold the lock.
        """
        if self._closed:
            return False
        self._acquire(item.size)
        self._waiting.append(item)
        self._work_available.notify()
        return True

    def put_timeout(self, item: TakeoverItem) -> None:
        """Insert the item that reports the timeout of a started takeover, which is still counted as in flight.

        The caller must hold the lock.
        """
        if not self._closed:
            self._waiting.appendleft(item)
            self._work_available.notify()

    def next_item(self, now: float, lanes: LaneQueue, may_start_records: bool) -> WorkItem | None:
        """Remove and return the item to start now: a takeover or a ready record. The caller must hold the lock.

        A takeover starts before the ready records, but no second takeover starts while a record is ready. No takeover
        starts while a record must run alone.

        :param now: the time, by the clock of the work queue. Takeovers whose reservation has expired are dropped.
        :param lanes: the ready records.
        :param may_start_records: whether the group lease permits records. A takeover needs no group lease.
        """
        record_is_ready = may_start_records and bool(lanes.ready)
        while self._waiting and lanes.exclusive is None:
            if record_is_ready and self._has_overtaken:
                break
            item = self._waiting.popleft()
            if item.deadline > now:
                self._has_overtaken = record_is_ready
                item.takeover.is_started = True
                return item
            self._drop(item)
        if not record_is_ready:
            return None
        self._has_overtaken = False
        return lanes.take()

    def close(self) -> None:
        """Drop the waiting takeovers, so that their reservations are returned, and accept no more.

        The caller must hold the lock.
        """
        self._closed = True
        while self._waiting:
            self._drop(self._waiting.popleft())

    def _drop(self, item: TakeoverItem) -> None:
        self._release(item.size)
        item.takeover.end()
