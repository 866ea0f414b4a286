"""The order in which the items of the work queue may start."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from itertools import count

from kser.consumer.offsets import OffsetTracker
from kser.consumer.work_item import WorkItem


class LaneQueue:
    """Work items in three states: ready, queued behind another item of their lane, or delayed until they are due.

    Not thread-safe: the owner must hold a lock.
    """

    def __init__(self) -> None:
        #: The items that may start immediately.
        self.ready: deque[WorkItem] = deque()
        # An entry exists while an item of the lane is ready, running or delayed; its queue has the items behind it.
        self._lanes: dict[tuple[OffsetTracker, bytes | str | None], deque[WorkItem]] = {}
        self._delayed: list[tuple[float, int, WorkItem]] = []
        self._ticket = count()

    def add(self, job: WorkItem) -> None:
        """Add a new item behind the other items of its lane."""
        if job.lane is None:
            self.ready.append(job)
        elif (queue := self._lanes.get((job.tracker, job.lane))) is None:
            self.occupy(job)
            self.ready.append(job)
        else:
            queue.append(job)

    def occupy(self, job: WorkItem) -> None:
        """Occupy the lane of a started item."""
        if job.lane is not None:
            self._lanes[job.tracker, job.lane] = deque()

    def complete(self, job: WorkItem) -> bool:
        """Free the lane of a finished item; return whether the next item of the lane became ready."""
        place = job.tracker, job.lane
        queue = self._lanes.get(place)
        if queue:
            self.ready.append(queue.popleft())
            return True
        self._lanes.pop(place, None)
        return False

    def delay(self, job: WorkItem) -> None:
        """Delay an item until it is due."""
        heapq.heappush(self._delayed, (job.due_at, next(self._ticket), job))

    def promote_due(self, now: float) -> None:
        """Move the due items to the ready queue."""
        while self._delayed and self._delayed[0][0] <= now:
            self.ready.append(heapq.heappop(self._delayed)[2])

    @property
    def next_due(self) -> float | None:
        """The earliest due time of the delayed items; None if there are none."""
        return self._delayed[0][0] if self._delayed else None

    @property
    def delayed_count(self) -> int:
        """The number of delayed items."""
        return len(self._delayed)

    @property
    def delayed(self) -> list[WorkItem]:
        """The delayed items."""
        return [job for _, _, job in self._delayed]

    def remove_partition(self, tracker: OffsetTracker, survives: Callable[[WorkItem], bool]) -> None:
        """Remove the items of a partition, except those for which ``stays`` returns True."""

        def kept(job: WorkItem) -> bool:
            return job.tracker is not tracker or survives(job)

        self.ready = deque(filter(kept, self.ready))
        self._delayed = [entry for entry in self._delayed if kept(entry[2])]
        heapq.heapify(self._delayed)
        self._lanes = {place: jobs for place, jobs in self._lanes.items() if place[0] is not tracker}

    def clear(self) -> None:
        """Remove all items."""
        self.ready.clear()
        self._delayed.clear()
        self._lanes.clear()
