"""The order in which the items of the work queue may start."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from itertools import count

from kser.consumer.job import Job
from kser.consumer.offsets import Progress


class Lanes:
    """Work items in three states: ready, queued behind another item of their lane, or delayed until they are due.

    Not thread-safe: the owner must hold a lock.
    """

    def __init__(self) -> None:
        #: The items that may start immediately.
        self.ready: deque[Job] = deque()
        # An entry exists while an item of the lane is ready, running or delayed; its queue has the items behind it.
        self._lanes: dict[tuple[Progress, bytes | str | None], deque[Job]] = {}
        self._waiting: list[tuple[float, int, Job]] = []
        self._ticket = count()

    def enter(self, job: Job) -> None:
        """Add a new item behind the other items of its lane."""
        if job.lane is None:
            self.ready.append(job)
        elif (queue := self._lanes.get((job.progress, job.lane))) is None:
            self.occupy(job)
            self.ready.append(job)
        else:
            queue.append(job)

    def occupy(self, job: Job) -> None:
        """Occupy the lane of a started item."""
        if job.lane is not None:
            self._lanes[job.progress, job.lane] = deque()

    def leave(self, job: Job) -> bool:
        """Free the lane of a finished item; return whether the next item of the lane became ready."""
        place = job.progress, job.lane
        queue = self._lanes.get(place)
        if queue:
            self.ready.append(queue.popleft())
            return True
        self._lanes.pop(place, None)
        return False

    def wait(self, job: Job) -> None:
        """Delay an item until it is due."""
        heapq.heappush(self._waiting, (job.due, next(self._ticket), job))

    def release(self, now: float) -> None:
        """Move the due items to the ready queue."""
        while self._waiting and self._waiting[0][0] <= now:
            self.ready.append(heapq.heappop(self._waiting)[2])

    @property
    def next_due(self) -> float | None:
        """The earliest due time of the delayed items; None if there are none."""
        return self._waiting[0][0] if self._waiting else None

    @property
    def resting(self) -> int:
        """The number of delayed items."""
        return len(self._waiting)

    @property
    def waiting(self) -> list[Job]:
        """The delayed items."""
        return [job for _, _, job in self._waiting]

    def drop(self, progress: Progress, stays: Callable[[Job], bool]) -> None:
        """Remove the items of a partition, except those for which ``stays`` returns True."""

        def kept(job: Job) -> bool:
            return job.progress is not progress or stays(job)

        self.ready = deque(filter(kept, self.ready))
        self._waiting = [entry for entry in self._waiting if kept(entry[2])]
        heapq.heapify(self._waiting)
        self._lanes = {place: jobs for place, jobs in self._lanes.items() if place[0] is not progress}

    def clear(self) -> None:
        """Remove all items."""
        self.ready.clear()
        self._waiting.clear()
        self._lanes.clear()
