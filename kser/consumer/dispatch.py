"""Between the thread that owns the client and those that run tasks: records on their way, in lanes.

Everything here is guarded by one lock and takes no time: no user code, no network.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any

from kser.consumer.budget import Budget
from kser.consumer.changes import Changes
from kser.consumer.client import Commit, Listener, Partition, Record
from kser.consumer.draining import Draining
from kser.consumer.job import Job
from kser.consumer.lanes import Lanes
from kser.consumer.offsets import Progress, decode, uncommitted
from kser.consumer.pulse import Pulse
from kser.delivery import GIVEN_UP, decide
from kser.retry import Retry

logger = logging.getLogger(__name__)

#: Seconds between two looks at whether the client lives again.
FENCE_TICK = 0.1

KEY, PARTITION, NONE = ORDERINGS = ("key", "partition", "none")
_is_begun = attrgetter("begun")


class Dispatch(Listener):
    """Takes records in, gives them to workers in the order of their lanes, and knows what is finished.

    :param ordering: ``"key"``, ``"partition"`` or ``"none"``: what makes a lane.
    :param max_in_flight: records that may be unfinished; past that :meth:`room` is 0.
    :param max_bytes: bytes of their keys and values.
    :param revoke_timeout: seconds that what runs is waited for when its partition is to be given up.
    :param retry: the policy for classes that declare none.
    :param fence: see :class:`kser.consumer.pulse.Pulse`.
    :param commit_before: a record counts as finished for its group as soon as it is begun.
    """

    def __init__(
        self,
        *,
        ordering: str = KEY,
        max_in_flight: int = 1000,
        max_bytes: int = 1 << 24,
        revoke_timeout: float = 10,
        retry: Retry | None = None,
        commit_before: bool = False,
        fence: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ordering = ordering
        self._budget = Budget(max_in_flight, max_bytes)
        self._revoke_timeout = revoke_timeout
        self._retry = retry
        #: Tells what counts as finished for the group although it is not.
        self.is_begun: Callable[[Any], bool] | None = _is_begun if commit_before else None
        self.clock = clock
        #: Whether the client is in its group: else nothing is begun.
        self.pulse = Pulse(clock, fence)
        # Whoever waits for a change looks at things that take the lock themselves.
        self._lock = threading.RLock()
        #: For workers: there is something to take.
        self._work = threading.Condition(self._lock)
        #: For everybody else: something was finished.
        self._changes = Changes(self._lock)
        self._partitions: dict[Partition, Progress] = {}
        self._away: dict[Partition, Progress] = {}
        self._lanes = Lanes()
        self._running: set[Job] = set()
        self._idle_workers = 0
        #: Somebody waits until no more than that are in flight.
        self._low = -1
        self._closed = self._paused = self._assigned = False
        #: Tells this Kafka cluster from others; the thread that owns the client says how.
        self.cluster: Callable[[], str] = str
        #: How many records were finished, and how many were given to workers, in all.
        self.settled = self.begun = 0

    # -- for the thread that owns the client ---------------------------------------------------------------------------

    def room(self) -> int:
        """How many records may be taken in now."""
        return 0 if self._closed else self._budget.room(self._lanes.resting)

    @property
    def in_flight(self) -> int:
        """How many records of our partitions are unfinished, but for those that wait for their next attempt."""
        return self._budget.count - self._lanes.resting

    @property
    def assignment(self) -> frozenset[Partition]:
        """The partitions that are ours."""
        return frozenset(self._partitions)

    def held(self) -> Collection[Partition]:
        """Partitions to take nothing of: a dead letter cannot be written, or what is finished cannot be noted."""
        with self._lock:
            return {key for key, progress in self._partitions.items() if progress.is_full or progress.unburied}

    def offer(self, batches: Mapping[Partition, Sequence[Record]]) -> int:
        """Take records in; returns how many there were."""
        taken = 0
        with self._lock:
            for partition, records in batches.items():
                progress = self._partitions.get(partition)
                if progress is None and self._assigned:
                    # It was taken away while these were on their way.
                    continue
                if progress is None:
                    # Without a group nobody says where a partition begins.
                    progress = self._partitions[partition] = Progress(Commit(records[0].offset))
                self._enter(progress, records)
                taken += len(records)
            if taken and self._idle_workers:
                self._work.notify(taken)
        return taken

    def _enter(self, progress: Progress, records: Sequence[Record]) -> None:
        ordering, retry, lanes = self._ordering, self._retry, self._lanes
        count = size = 0
        for record in records:
            lane = record.key if ordering == KEY else ordering if ordering == PARTITION else None
            job = Job(record, progress, lane, retry)
            entered = progress.received(record.offset, job)
            if entered is None:
                continue
            count += 1
            size += job.size
            # Another one was begun before the partition went and came back.
            if entered is job:
                lanes.enter(job) if lane is not None else lanes.ready.append(job)
        self._budget.take(count, size)

    @property
    def is_busy(self) -> bool:
        """Whether no worker waits for a record."""
        return not self._idle_workers

    @property
    def backlog(self) -> dict[Partition, int]:
        """How many records of each partition are here that could be handled now."""
        with self._lock:
            counts = {key: len(progress.open) for key, progress in self._partitions.items()}
            for job in self._lanes.waiting:
                if job.place in counts:
                    counts[job.place] -= 1
            return counts

    def commits(self) -> dict[Partition, Commit]:
        """What may be committed and is not."""
        with self._lock:
            return uncommitted(self._partitions, self.is_begun)

    def known(self) -> dict[Partition, Commit]:
        """What the group knows of our partitions."""
        with self._lock:
            return {key: progress.committed for key, progress in self._partitions.items()}

    def committed(self, commits: Mapping[Partition, Commit]) -> None:
        """This was committed."""
        with self._lock:
            for key, commit in commits.items():
                if key in self._partitions:
                    self._partitions[key].committed = commit
            self._changes.tell()

    def wait_for_room(self, timeout: float, low: int) -> None:
        """Return when no more than ``low`` records are in flight, or after ``timeout``."""
        with self._lock:
            self._low = low
            self._changes.wait(lambda: self.in_flight <= low or self._closed, timeout)
            self._low = -1

    def wait_for_change(self, timeout: float, until: Callable[[], bool]) -> None:
        """Return when ``until()`` is true, which is looked at whenever a record is finished, or after ``timeout``."""
        self._changes.wait(until, timeout)

    # -- partitions come and go ----------------------------------------------------------------------------------------

    def on_assign(self, starts: Mapping[Partition, Commit]) -> None:
        with self._lock:
            self._assigned = True
            for key, start in starts.items():
                away = self._away.pop(key, None) or self._give_up(key)
                # A group never goes back, unless somebody deleted what it had committed.
                if away is None or start.offset < away.committed.offset:
                    self._partitions[key] = Progress(start)
                else:
                    self._adopt(key, start, away)
                self._keep_lanes(key)

    def on_reset(self, starts: Mapping[Partition, Commit]) -> None:
        with self._lock:
            self._assigned = True
            for key, start in starts.items():
                self._give_up(key)
                self._away.pop(key, None)
                self._partitions[key] = Progress(start)

    def on_revoke(self, partitions: Collection[Partition]) -> Draining:
        with self._lock:
            leaving = {key: progress for key in partitions if (progress := self._give_up(key)) is not None}
            self._away.update(leaving)
        return Draining(self, leaving, self.clock() + self._revoke_timeout)

    def on_lost(self, partitions: Collection[Partition]) -> None:
        self.on_revoke(partitions)

    def _give_up(self, key: Partition) -> Progress | None:
        progress = self._partitions.pop(key, None)
        if progress is None:
            return None
        for job in progress.open.values():
            self._budget.give(job.size)
        progress.revoke(_is_begun)
        self._lanes.drop(progress, self._stays)
        return progress

    def _stays(self, job: Job) -> bool:
        return job.answered or (self.is_begun is not None and job.begun)

    def _adopt(self, key: Partition, start: Commit, away: Progress) -> None:
        """A partition is ours again: what is running or waiting for its next attempt goes on as it was."""
        known = decode(start)
        kept = {at: job for at, job in away.begun().items() if at >= start.offset and at not in known}
        progress = self._partitions[key] = Progress(start, away.finished_ranges(), kept)
        for job in kept.values():
            job.progress = progress
            if job.failure is not None:
                progress.unburied.add(job.record.offset)
            self._lanes.occupy(job)
            if job not in self._running and not self._closed:
                self._lanes.wait(job)
        if kept:
            self._work.notify_all()

    def _keep_lanes(self, key: Partition) -> None:
        """What goes on although its partition was away holds the others of its lane up again."""
        for job in self._running:
            if job.answered and job.place == key:
                job.progress = self._partitions[key]
                self._lanes.occupy(job)

    # -- for workers ---------------------------------------------------------------------------------------------------

    def take(self, timeout: float) -> Job | None:
        """The next record to work on; None when there is none within ``timeout`` seconds, or no more at all."""
        deadline = None
        lanes = self._lanes
        with self._lock:
            while True:
                now = self.clock()
                if (due := lanes.next_due) is not None:
                    lanes.release(now)
                if lanes.ready and not self._paused and now < self.pulse.until:
                    return self._begin(lanes.ready.popleft(), now)
                if deadline is None:
                    deadline = now + timeout
                left = deadline - now
                if left <= 0 or self._closed:
                    return None
                if lanes.ready:
                    # Fenced, which nobody tells about.
                    left = min(left, FENCE_TICK)
                if due is not None and not self._paused:
                    left = min(left, due - now)
                self._idle_workers += 1
                try:
                    self._work.wait(left)
                finally:
                    self._idle_workers -= 1

    def _begin(self, job: Job, now: float) -> Job:
        job.begun = True
        job.taken = now
        self._running.add(job)
        self.begun += 1
        if self._changes.awaited:
            self._changes.tell()
        return job

    def finish(self, job: Job) -> bool:
        """A record is done with; returns False when its partition is not ours now, so that it is not committed."""
        progress = job.progress
        with self._lock:
            if job not in self._running:
                # Given up meanwhile: another attempt stands for it.
                return True
            self._running.discard(job)
            self.settled += 1
            if progress.finished(job.record.offset) and not progress.revoked:
                self._budget.give(job.size)
                if self._low >= 0 and self.in_flight <= self._low:
                    self._changes.wake()
            if job.lane is not None and self._lanes.leave(job) and self._idle_workers:
                self._work.notify()
            if self._changes.awaited:
                self._changes.tell()
            return job.answered or self.is_begun is not None or not progress.revoked

    def answer(self, job: Job) -> None:
        """A database answers for a record that is worked on: it is finished for its group, and its lane still waits."""
        with self._lock:
            progress = job.progress
            job.answered = True
            if job in self._running and progress.finished(job.record.offset) and not progress.revoked:
                self._budget.give(job.size)
            self._changes.tell()

    def retry(self, job: Job, seconds: float) -> None:
        """The record is to be tried once more, after ``seconds``; its lane waits."""
        with self._lock:
            if self._let_go(job):
                following = job.following(self.clock() + seconds)
                following.attempt += 1
                self._follow(job, following)

    def bury_later(self, job: Job, seconds: float) -> None:
        """The record failed for good, and that is to be written down once more, after ``seconds``."""
        with self._lock:
            if self._let_go(job):
                job.progress.unburied.add(job.record.offset)
                following = job.following(self.clock() + seconds)
                following.failure = job.failure
                following.burials = job.burials + 1
                self._follow(job, following)

    def expire(self, job: Job, verdict: Exception, decision: list[str]) -> bool:
        """Give up the attempt that ``decision`` is about: it fails with ``verdict``. False when it has ended."""
        with self._lock:
            if job not in self._running or not decide(decision, GIVEN_UP):
                return False
            self._let_go(job)
            job.abandoned = True
            following = job.following(0)
            following.verdict = verdict
            self._follow(job, following)
            return True

    def abandon(self, job: Job) -> bool:
        """Give up the attempt that runs: the record stays unfinished. Returns False when it has ended meanwhile."""
        with self._lock:
            job.abandoned = self._let_go(job)
            return job.abandoned

    def _let_go(self, job: Job) -> bool:
        if job not in self._running:
            return False
        self._running.discard(job)
        self._changes.tell()
        return True

    def _follow(self, job: Job, following: Job) -> None:
        # The partition may have gone, and come back, meanwhile.
        known = job.progress.replace(job.record.offset, following)
        goes_on = job.answered or (known and (not job.progress.revoked or self._stays(following)))
        if goes_on and not self._closed:
            self._lanes.wait(following)
            self._work.notify()

    def running(self) -> list[Job]:
        """What workers work on now."""
        with self._lock:
            return list(self._running)

    def pause(self, paused: bool) -> None:
        """Give nothing to workers for a while, or do again."""
        with self._lock:
            self._paused = paused
            self._work.notify_all()

    def close(self) -> None:
        """Give nothing more to workers."""
        with self._lock:
            self._closed = True
            if self.is_begun is not None:
                for job in self._lanes.waiting:
                    logger.warning(
                        f"offset {job.record.offset} of {job.place} waited for another attempt and is dropped: with"
                        " commit='before' it counts as done"
                    )
            self._lanes.clear()
            self._work.notify_all()
            self._changes.wake()

    def is_running(self, partitions: Collection[Progress]) -> bool:
        """Whether workers work on something of these partitions that nothing else answers for."""
        with self._lock:
            return any(job.progress in partitions and not job.answered for job in self._running)
