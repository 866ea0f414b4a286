"""The work queue between the client thread and the workers, ordered by lanes.

One lock guards the whole state. Methods run neither user code nor network calls, so they hold it only briefly.
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
from kser.delivery import TIMED_OUT, resolve
from kser.retry import Retry

logger = logging.getLogger(__name__)

#: Seconds between two checks whether an expired group lease was renewed.
FENCE_TICK = 0.1

KEY, PARTITION, NONE = ORDERINGS = ("key", "partition", "none")
_is_begun = attrgetter("begun")


class Dispatch(Listener):
    """A queue of records in lanes that tracks which records are finished.

    :param ordering: the lane of a record: ``"key"`` (its key), ``"partition"`` (its partition) or ``"none"`` (no lane).
    :param max_in_flight: the maximum number of unfinished records; beyond it, :meth:`capacity` is 0.
    :param max_bytes: the maximum number of bytes of their keys and values.
    :param revoke_timeout: seconds to wait for the running records of a partition before it is revoked.
    :param retry: the retry policy for classes that declare none.
    :param fence: the duration of the group lease, see :class:`kser.consumer.work_queue.GroupLease`.
    :param commit_before: whether a record counts as finished for its group as soon as its attempt has started.
    :param clock: returns the time in seconds.
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
        #: With ``commit="before"``, returns whether an unfinished record counts as finished when offsets are computed.
        self.is_begun: Callable[[Any], bool] | None = _is_begun if commit_before else None
        self.clock = clock
        #: The group lease; while it is expired, no attempt starts.
        self.pulse = Pulse(clock, fence)
        # Re-entrant, because wait predicates call methods that acquire the lock.
        self._lock = threading.RLock()
        #: Condition for the workers: a record is ready.
        self._work = threading.Condition(self._lock)
        #: Waiters of all other threads: a record was started, finished, committed or detached.
        self._changes = Changes(self._lock)
        self._partitions: dict[Partition, Progress] = {}
        self._away: dict[Partition, Progress] = {}
        self._lanes = Lanes()
        self._running: set[Job] = set()
        self._idle_workers = 0
        #: The low-water mark of the records in flight that a waiting thread needs; -1 without such a thread.
        self._low = -1
        self._closed = self._paused = self._assigned = False
        #: Returns the cluster id. The poller sets it.
        self.cluster: Callable[[], str] = str
        #: The number of records finished, and of attempts started, since the start of the consumer.
        self.settled = self.begun = 0

    # -- for the client thread -----------------------------------------------------------------------------------------

    def room(self) -> int:
        """Return how many more records the queue accepts."""
        return 0 if self._closed else self._budget.room(self._lanes.resting)

    @property
    def in_flight(self) -> int:
        """The number of unfinished records of the assigned partitions, without those that wait for a retry."""
        return self._budget.count - self._lanes.resting

    @property
    def assignment(self) -> frozenset[Partition]:
        """The assigned partitions."""
        return frozenset(self._partitions)

    def held(self) -> Collection[Partition]:
        """Return the blocked partitions: a dead letter cannot be written, or the commit metadata is full."""
        with self._lock:
            return {key for key, progress in self._partitions.items() if progress.is_full or progress.unburied}

    def offer(self, batches: Mapping[Partition, Sequence[Record]]) -> int:
        """Queue records and return their number."""
        taken = 0
        with self._lock:
            for partition, records in batches.items():
                progress = self._partitions.get(partition)
                if progress is None and self._assigned:
                    # The partition was revoked after the client had fetched these records, so drop them.
                    continue
                if progress is None:
                    # Without a group, no assignment defines a start offset, so the first record does.
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
            # Otherwise an attempt from before the rebalance continues, and it already occupies the lane.
            if entered is job:
                lanes.enter(job) if lane is not None else lanes.ready.append(job)
        self._budget.take(count, size)

    @property
    def is_busy(self) -> bool:
        """Whether all workers are busy."""
        return not self._idle_workers

    @property
    def backlog(self) -> dict[Partition, int]:
        """The number of unfinished records of each partition, without those that wait for a retry."""
        with self._lock:
            counts = {key: len(progress.open) for key, progress in self._partitions.items()}
            for job in self._lanes.waiting:
                if job.place in counts:
                    counts[job.place] -= 1
            return counts

    def commits(self) -> dict[Partition, Commit]:
        """Return the offsets that can be committed and are not committed yet."""
        with self._lock:
            return uncommitted(self._partitions, self.is_begun)

    def known(self) -> dict[Partition, Commit]:
        """Return the committed offsets of the assigned partitions."""
        with self._lock:
            return {key: progress.committed for key, progress in self._partitions.items()}

    def committed(self, commits: Mapping[Partition, Commit]) -> None:
        """Store offsets that the group has confirmed."""
        with self._lock:
            for key, commit in commits.items():
                if key in self._partitions:
                    self._partitions[key].committed = commit
            self._changes.tell()

    def wait_for_room(self, timeout: float, low: int) -> None:
        """Block until no more than ``low`` records are in flight, or until ``timeout`` seconds have passed."""
        with self._lock:
            self._low = low
            self._changes.wait(lambda: self.in_flight <= low or self._closed, timeout)
            self._low = -1

    def wait_for_change(self, timeout: float, until: Callable[[], bool]) -> None:
        """Block until the predicate is true, or until ``timeout`` seconds have passed.

        The predicate is evaluated after every change of the queue, such as a finished record.
        """
        self._changes.wait(until, timeout)

    # -- rebalances ----------------------------------------------------------------------------------------------------

    def on_assign(self, starts: Mapping[Partition, Commit]) -> None:
        with self._lock:
            self._assigned = True
            for key, start in starts.items():
                away = self._away.pop(key, None) or self._give_up(key)
                # Committed offsets of a group decrease only if they were deleted; the old state is invalid then.
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
        return job.acked or (self.is_begun is not None and job.begun)

    def _adopt(self, key: Partition, start: Commit, away: Progress) -> None:
        """Restore a reassigned partition, so that its running attempts and pending retries continue."""
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
        """Occupy the lanes of running attempts that survived the revocation, so that they block their lanes again."""
        for job in self._running:
            if job.acked and job.place == key:
                job.progress = self._partitions[key]
                self._lanes.occupy(job)

    # -- for workers ---------------------------------------------------------------------------------------------------

    def take(self, timeout: float) -> Job | None:
        """Return the next record to run; None if none is ready within ``timeout`` seconds or the queue is closed."""
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
                    # The group lease has expired, and its renewal notifies no worker; so check again soon.
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
        """Mark a record as finished; return False if its partition was revoked, so that it is not committed."""
        progress = job.progress
        with self._lock:
            if job not in self._running:
                # The attempt was abandoned or timed out meanwhile, so a later attempt at the record counts instead.
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
            return job.acked or self.is_begun is not None or not progress.revoked

    def answer(self, job: Job) -> None:
        """Acknowledge a running record, which the store now guarantees; its lane stays occupied until it finishes."""
        with self._lock:
            progress = job.progress
            job.acked = True
            if job in self._running and progress.finished(job.record.offset) and not progress.revoked:
                self._budget.give(job.size)
            self._changes.tell()

    def retry(self, job: Job, seconds: float) -> None:
        """Schedule the next attempt at a record in ``seconds``; its lane stays occupied."""
        with self._lock:
            if self._let_go(job):
                following = job.following(self.clock() + seconds)
                following.number += 1
                self._follow(job, following)

    def bury_later(self, job: Job, seconds: float) -> None:
        """Schedule another try to write the dead letter of a failed record in ``seconds``."""
        with self._lock:
            if self._let_go(job):
                job.progress.unburied.add(job.record.offset)
                following = job.following(self.clock() + seconds)
                following.failure = job.failure
                following.burials = job.burials + 1
                self._follow(job, following)

    def expire(self, job: Job, verdict: Exception, decision: list[str]) -> bool:
        """Time out a running attempt: queue a replacement that fails with ``verdict``.

        :param decision: the outcome latch of the attempt.
        :return: False if the attempt has already ended.
        """
        with self._lock:
            if job not in self._running or not resolve(decision, TIMED_OUT):
                return False
            self._let_go(job)
            job.abandoned = True
            following = job.following(0)
            following.timeout_error = verdict
            self._follow(job, following)
            return True

    def abandon(self, job: Job) -> bool:
        """Abandon a running attempt, so that its record stays unfinished; return False if it has already ended."""
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
        # The partition may have been revoked and reassigned meanwhile, and then its tracker may no longer contain the
        # record.
        known = job.progress.replace(job.record.offset, following)
        goes_on = job.acked or (known and (not job.progress.revoked or self._stays(following)))
        if goes_on and not self._closed:
            self._lanes.wait(following)
            self._work.notify()

    def running(self) -> list[Job]:
        """Return the records that are running."""
        with self._lock:
            return list(self._running)

    def pause(self, paused: bool) -> None:
        """Pause or resume: a paused queue starts no attempts."""
        with self._lock:
            self._paused = paused
            self._work.notify_all()

    def close(self) -> None:
        """Close the queue: drop all waiting records and start no more attempts."""
        with self._lock:
            self._closed = True
            if self.is_begun is not None:
                for job in self._lanes.waiting:
                    logger.warning(
                        f"offset {job.record.offset} of {job.place} waited for a retry and is dropped: with"
                        " commit='before' it counts as finished"
                    )
            self._lanes.clear()
            self._work.notify_all()
            self._changes.wake()

    def is_running(self, partitions: Collection[Progress]) -> bool:
        """Return whether a record of these partitions is running and not acknowledged."""
        with self._lock:
            return any(job.progress in partitions and not job.acked for job in self._running)
