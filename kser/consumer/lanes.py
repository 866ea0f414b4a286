"""Jobs in the order in which they may be begun."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from itertools import count

from kser.consumer.job import Job
from kser.consumer.offsets import Progress


class Lanes:
    """Jobs that are ready, jobs that wait for one of their lane to be over, and jobs that wait for their time.

    Not safe to share by threads: whoever owns it has a lock.
    """

    def __init__(self) -> None:
        #: Jobs that may be begun at once.
        self.ready: deque[Job] = deque()
        # A lane is there as long as one of its jobs is ready, running or waiting for its time.
        self._lanes: dict[tuple[Progress, bytes | str | None], deque[Job]] = {}
        self._waiting: list[tuple[float, int, Job]] = []
        self._ticket = count()

    def enter(self, job: Job) -> None:
        """A new job comes in, behind the others of its lane."""
        if job.lane is None:
            self.ready.append(job)
        elif (queue := self._lanes.get((job.progress, job.lane))) is None:
            self.occupy(job)
            self.ready.append(job)
        else:
            queue.append(job)

    def occupy(self, job: Job) -> None:
        """A job that is begun has its lane."""
        if job.lane is not None:
            self._lanes[job.progress, job.lane] = deque()

    def leave(self, job: Job) -> bool:
        """A job is over; returns whether another one of its lane is ready because of it."""
        place = job.progress, job.lane
        queue = self._lanes.get(place)
        if queue:
            self.ready.append(queue.popleft())
            return True
        self._lanes.pop(place, None)
        return False

    def wait(self, job: Job) -> None:
        """A job is ready when it is due."""
        heapq.heappush(self._waiting, (job.due, next(self._ticket), job))

    def release(self, now: float) -> None:
        """Jobs that are due are ready."""
        while self._waiting and self._waiting[0][0] <= now:
            self.ready.append(heapq.heappop(self._waiting)[2])

    @property
    def next_due(self) -> float | None:
        """When the next one is due of those that wait for their time."""
        return self._waiting[0][0] if self._waiting else None

    @property
    def resting(self) -> int:
        """How many wait for their time."""
        return len(self._waiting)

    @property
    def waiting(self) -> list[Job]:
        """The jobs that wait for their time."""
        return [job for _, _, job in self._waiting]

    def drop(self, progress: Progress, stays: Callable[[Job], bool]) -> None:
        """Forget a partition's jobs, but for those that stay."""

        def kept(job: Job) -> bool:
            return job.progress is not progress or stays(job)

        self.ready = deque(filter(kept, self.ready))
        self._waiting = [entry for entry in self._waiting if kept(entry[2])]
        heapq.heapify(self._waiting)
        self._lanes = {place: jobs for place, jobs in self._lanes.items() if place[0] is not progress}

    def clear(self) -> None:
        """Forget all of them."""
        self.ready.clear()
        self._waiting.clear()
        self._lanes.clear()
