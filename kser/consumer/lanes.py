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

    The class is not thread-safe: callers must hold the lock of the work queue.
    """

    def __init__(self) -> None:
        #: The items that may start immediately.
        self.ready: deque[WorkItem] = deque()
        #: The only partition whose items may start; None if all items may start.
        self.exclusive: OffsetTracker | None = None
        # A lane has an entry while one of its items is ready, running or delayed. The value of the entry is the queue
        # of the items that wait behind this item.
        self._lanes: dict[tuple[OffsetTracker, bytes | str | None], deque[WorkItem]] = {}
        self._delayed: list[tuple[float, int, WorkItem]] = []
        self._ticket = count()

    def add(self, item: WorkItem) -> None:
        """Add a new item behind the other items of its lane."""
        if item.lane is None:
            self.ready.append(item)
        elif (queue := self._lanes.get((item.tracker, item.lane))) is None:
            self.occupy(item)
            self.ready.append(item)
        else:
            queue.append(item)

    def take(self) -> WorkItem | None:
        """Remove and return the first item that may start; None if there is none. Some items must be ready."""
        if self.exclusive is None:
            return self.ready.popleft()
        item = next((item for item in self.ready if item.tracker is self.exclusive), None)
        if item is not None:
            self.ready.remove(item)
        return item

    def end_exclusive(self, tracker: OffsetTracker) -> None:
        """Let the other partitions start their items too, if only this partition could."""
        if self.exclusive is tracker:
            self.exclusive = None

    def add_first(self, item: WorkItem) -> None:
        """Add a new item before all items that are ready, or behind the other items of its lane."""
        if self.is_occupied(item.tracker, item.lane):
            self.add(item)
        else:
            self.occupy(item)
            self.ready.appendleft(item)

    def is_occupied(self, tracker: OffsetTracker, lane: bytes | str | None) -> bool:
        """Return whether a new item of this lane would wait."""
        return lane is not None and (tracker, lane) in self._lanes

    def occupy(self, item: WorkItem) -> None:
        """Occupy the lane of a started item, so that the other items of the lane wait."""
        if item.lane is not None:
            self._lanes[item.tracker, item.lane] = deque()

    def complete(self, item: WorkItem) -> bool:
        """Free the lane of a finished item; return whether the next item of the lane became ready."""
        lane = item.tracker, item.lane
        queue = self._lanes.get(lane)
        if queue:
            self.ready.append(queue.popleft())
            return True
        self._lanes.pop(lane, None)
        return False

    def delay(self, item: WorkItem) -> None:
        """Delay an item until it is due."""
        heapq.heappush(self._delayed, (item.due_at, next(self._ticket), item))

    def promote_due(self, now: float) -> None:
        """Move the due items to the ready queue."""
        while self._delayed and self._delayed[0][0] <= now:
            self.ready.append(heapq.heappop(self._delayed)[2])

    @property
    def next_due(self) -> float | None:
        """The earliest due time of the delayed items; None if no item is delayed."""
        return self._delayed[0][0] if self._delayed else None

    @property
    def delayed_count(self) -> int:
        """The number of delayed items."""
        return len(self._delayed)

    @property
    def delayed(self) -> list[WorkItem]:
        """The delayed items."""
        return [item for _, _, item in self._delayed]

    def remove_partition(self, tracker: OffsetTracker, survives: Callable[[WorkItem], bool]) -> None:
        """Remove the items of a partition, except those for which ``survives`` returns True."""

        def remains(item: WorkItem) -> bool:
            return item.tracker is not tracker or survives(item)

        self.ready = deque(filter(remains, self.ready))
        self._delayed = [entry for entry in self._delayed if remains(entry[2])]
        heapq.heapify(self._delayed)
        self._lanes = {lane: queue for lane, queue in self._lanes.items() if lane[0] is not tracker}

    def clear(self) -> None:
        """Remove all items."""
        self.ready.clear()
        self._delayed.clear()
        self._lanes.clear()
