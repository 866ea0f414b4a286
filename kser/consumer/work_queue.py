"""Limit of the records in flight in a consumer, by count and by bytes."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any

from kser.attempt import TIMED_OUT, resolve
from kser.consumer.client import Commit, Partition, RebalanceListener, Record
from kser.consumer.lanes import LaneQueue
from kser.consumer.offsets import OffsetTracker, decode, pending_commits
from kser.consumer.work_item import WorkItem
from kser.retry import Retry

logger = logging.getLogger(__name__)


class InFlightLimit:
    """Counter of the records in flight, with a limit of their number and bytes.

    :param max_count: the maximum number of records.
    :param max_bytes: the maximum number of bytes of their keys and values.
    """

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._average = 0
        #: The number of records in flight, and their bytes.
        self.count = self.bytes = 0

    def acquire(self, count: int, size: int) -> None:
        """Count additional records in flight."""
        self.count += count
        self.bytes += size
        if count:
            self._average = max(size // count, 1)

    def release(self, size: int) -> None:
        """Remove one record from the counters."""
        self.count -= 1
        self.bytes -= size

    def available(self, delayed: int) -> int:
        """Return how many more records may be in flight.

        :param delayed: the number of records in flight that wait for a retry; these count by their bytes only.
        """
        room = self._max_count - self.count + delayed
        spare = self._max_bytes - self.bytes
        if room <= 0 or spare <= 0:
            return 0
        return min(room, spare // self._average + 1) if self._average else room


class ConditionWaiters:
    """A condition variable for threads that each wait for a predicate of their own.

    :param lock: the lock of the state that the predicates read; callers of the notify methods must hold it.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._condition = threading.Condition(lock)
        #: The predicates of the waiting threads.
        self.predicates: list[Callable[[], bool]] = []

    def wait(self, predicate: Callable[[], bool], timeout: float) -> None:
        """Block until the predicate is true, or until ``timeout`` seconds have passed."""
        with self._condition:
            self.predicates.append(predicate)
            try:
                self._condition.wait_for(predicate, timeout)
            finally:
                self.predicates.remove(predicate)

    def notify_satisfied(self) -> None:
        """Wake the waiting threads if the predicate of at least one is true."""
        if any(until() for until in self.predicates):
            self._condition.notify_all()

    def notify_all(self) -> None:
        """Wake all waiting threads, so that each evaluates its predicate."""
        self._condition.notify_all()


class GroupLease:
    """A lease on the group membership, renewed by each poll of the client.

    If the process was stopped or starved and did not poll for a long time, the group may have reassigned its
    partitions. While the lease is expired, no attempt starts.

    :param clock: returns the time in seconds.
    :param max_silence: the duration of the lease, in seconds.
    """

    def __init__(self, clock: Callable[[], float], max_silence: float = math.inf) -> None:
        self._clock = clock
        self._max_silence = max_silence
        #: The time at which the lease expires, by the clock.
        self.deadline = clock() + max_silence

    def renew(self) -> None:
        """Renew the lease; call it while the client is in its group."""
        self.deadline = self._clock() + self._max_silence

    @property
    def is_expired(self) -> bool:
        """True if the lease has expired."""
        return self._clock() >= self.deadline


#: Seconds between two checks whether an expired group lease was renewed.
GROUP_LEASE_CHECK_INTERVAL = 0.1
KEY, PARTITION, NONE = ORDERINGS = ("key", "partition", "none")
_was_started = attrgetter("was_started")


class WorkQueue(RebalanceListener):
    """A queue of records in lanes that tracks which records are finished.

    :param ordering: the lane of a record: ``"key"`` (its key), ``"partition"`` (its partition) or ``"none"`` (no lane).
    :param max_in_flight: the maximum number of unfinished records; beyond it, :meth:`capacity` is 0.
    :param max_bytes: the maximum number of bytes of their keys and values.
    :param revoke_timeout: seconds to wait for the running records of a partition before it is revoked.
    :param retry: the retry policy for classes that declare none.
    :param max_silence: the duration of the group lease, see :class:`kser.consumer.work_queue.GroupLease`.
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
        max_silence: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ordering = ordering
        self._in_flight_limit = InFlightLimit(max_in_flight, max_bytes)
        self._revoke_timeout = revoke_timeout
        self._retry = retry
        #: With ``commit="before"``, returns whether an unfinished record counts as finished when offsets are computed.
        self.counts_as_finished: Callable[[Any], bool] | None = _was_started if commit_before else None
        self.clock = clock
        #: The group lease; while it is expired, no attempt starts.
        self.group_lease = GroupLease(clock, max_silence)
        # Re-entrant, because wait predicates call methods that acquire the lock.
        self._lock = threading.RLock()
        #: Condition for the workers: a record is ready.
        self._work_available = threading.Condition(self._lock)
        #: Waiters of all other threads: a record was started, finished, committed or detached.
        self._waiters = ConditionWaiters(self._lock)
        self._partitions: dict[Partition, OffsetTracker] = {}
        self._revoked: dict[Partition, OffsetTracker] = {}
        self._lanes = LaneQueue()
        self._running: set[WorkItem] = set()
        self._idle_workers = 0
        #: The low-water mark of the records in flight that a waiting thread needs; -1 without such a thread.
        self._low_water_mark = -1
        self._closed = self._paused = self._assigned = False
        #: Returns the cluster id. The poller sets it.
        self.cluster: Callable[[], str] = str
        #: The number of records finished, and of attempts started, since the start of the consumer.
        self.finished_count = self.started_count = 0

    # -- for the client thread -----------------------------------------------------------------------------------------

    def capacity(self) -> int:
        """Return how many more records the queue accepts."""
        return 0 if self._closed else self._in_flight_limit.available(self._lanes.delayed_count)

    @property
    def in_flight(self) -> int:
        """The number of unfinished records of the assigned partitions, without those that wait for a retry."""
        return self._in_flight_limit.count - self._lanes.delayed_count

    @property
    def assignment(self) -> frozenset[Partition]:
        """The assigned partitions."""
        return frozenset(self._partitions)

    def blocked_partitions(self) -> Collection[Partition]:
        """Return the blocked partitions: a dead letter cannot be written, or the commit metadata is full."""
        with self._lock:
            return {
                key for key, progress in self._partitions.items() if progress.is_full or progress.dead_letter_pending
            }

    def put(self, batches: Mapping[Partition, Sequence[Record]]) -> int:
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
                    progress = self._partitions[partition] = OffsetTracker(Commit(records[0].offset))
                self._track(progress, records)
                taken += len(records)
            if taken and self._idle_workers:
                self._work_available.notify(taken)
        return taken

    def _track(self, progress: OffsetTracker, records: Sequence[Record]) -> None:
        ordering, retry, lanes = self._ordering, self._retry, self._lanes
        count = size = 0
        for record in records:
            lane = record.key if ordering == KEY else ordering if ordering == PARTITION else None
            job = WorkItem(record, progress, lane, retry)
            entered = progress.track(record.offset, job)
            if entered is None:
                continue
            count += 1
            size += job.size
            # Otherwise an attempt from before the rebalance continues, and it already occupies the lane.
            if entered is job:
                lanes.add(job) if lane is not None else lanes.ready.append(job)
        self._in_flight_limit.acquire(count, size)

    @property
    def is_busy(self) -> bool:
        """True if all workers are busy."""
        return not self._idle_workers

    @property
    def backlog(self) -> dict[Partition, int]:
        """The number of unfinished records of each partition, without those that wait for a retry."""
        with self._lock:
            counts = {key: len(progress.unfinished) for key, progress in self._partitions.items()}
            for job in self._lanes.delayed:
                if job.partition in counts:
                    counts[job.partition] -= 1
            return counts

    def commits(self) -> dict[Partition, Commit]:
        """Return the offsets that can be committed and are not committed yet."""
        with self._lock:
            return pending_commits(self._partitions, self.counts_as_finished)

    def committed_offsets(self) -> dict[Partition, Commit]:
        """Return the committed offsets of the assigned partitions."""
        with self._lock:
            return {key: progress.committed for key, progress in self._partitions.items()}

    def mark_committed(self, commits: Mapping[Partition, Commit]) -> None:
        """Store offsets that the group has confirmed."""
        with self._lock:
            for key, commit in commits.items():
                if key in self._partitions:
                    self._partitions[key].committed = commit
            self._waiters.notify_satisfied()

    def wait_for_room(self, timeout: float, low: int) -> None:
        """Block until no more than ``low`` records are in flight, or until ``timeout`` seconds have passed."""
        with self._lock:
            self._low_water_mark = low
            self._waiters.wait(lambda: self.in_flight <= low or self._closed, timeout)
            self._low_water_mark = -1

    def wait_for_change(self, timeout: float, predicate: Callable[[], bool]) -> None:
        """Block until the predicate is true, or until ``timeout`` seconds have passed.

        The predicate is evaluated after every change of the queue, such as a finished record.
        """
        self._waiters.wait(predicate, timeout)

    # -- rebalances ----------------------------------------------------------------------------------------------------

    def on_assign(self, starts: Mapping[Partition, Commit]) -> None:
        with self._lock:
            self._assigned = True
            for key, start in starts.items():
                away = self._revoked.pop(key, None) or self._detach(key)
                # Committed offsets of a group decrease only if they were deleted; the old state is invalid then.
                if away is None or start.offset < away.committed.offset:
                    self._partitions[key] = OffsetTracker(start)
                else:
                    self._resume_partition(key, start, away)
                self._rejoin_lanes(key)

    def on_reset(self, starts: Mapping[Partition, Commit]) -> None:
        with self._lock:
            self._assigned = True
            for key, start in starts.items():
                self._detach(key)
                self._revoked.pop(key, None)
                self._partitions[key] = OffsetTracker(start)

    def on_revoke(self, partitions: Collection[Partition]) -> PendingRevocation:
        with self._lock:
            leaving = {key: progress for key in partitions if (progress := self._detach(key)) is not None}
            self._revoked.update(leaving)
        return PendingRevocation(self, leaving, self.clock() + self._revoke_timeout)

    def on_lost(self, partitions: Collection[Partition]) -> None:
        self.on_revoke(partitions)

    def _detach(self, key: Partition) -> OffsetTracker | None:
        progress = self._partitions.pop(key, None)
        if progress is None:
            return None
        for job in progress.unfinished.values():
            self._in_flight_limit.release(job.size)
        progress.revoke(_was_started)
        self._lanes.remove_partition(progress, self._survives_revocation)
        return progress

    def _survives_revocation(self, job: WorkItem) -> bool:
        return job.acked or (self.counts_as_finished is not None and job.was_started)

    def _resume_partition(self, key: Partition, start: Commit, away: OffsetTracker) -> None:
        """Restore a reassigned partition, so that its running attempts and pending retries continue."""
        known = decode(start)
        kept = {at: job for at, job in away.started().items() if at >= start.offset and at not in known}
        progress = self._partitions[key] = OffsetTracker(start, away.finished_ranges(), kept)
        for job in kept.values():
            job.tracker = progress
            if job.failure is not None:
                progress.dead_letter_pending.add(job.record.offset)
            self._lanes.occupy(job)
            if job not in self._running and not self._closed:
                self._lanes.delay(job)
        if kept:
            self._work_available.notify_all()

    def _rejoin_lanes(self, key: Partition) -> None:
        """Occupy the lanes of running attempts that survived the revocation, so that they block their lanes again."""
        for job in self._running:
            if job.acked and job.partition == key:
                job.tracker = self._partitions[key]
                self._lanes.occupy(job)

    # -- for workers ---------------------------------------------------------------------------------------------------

    def get(self, timeout: float) -> WorkItem | None:
        """Return the next record to run; None if none is ready within ``timeout`` seconds or the queue is closed."""
        deadline = None
        lanes = self._lanes
        with self._lock:
            while True:
                now = self.clock()
                if (due := lanes.next_due) is not None:
                    lanes.promote_due(now)
                if lanes.ready and not self._paused and now < self.group_lease.deadline:
                    return self._start(lanes.ready.popleft(), now)
                if deadline is None:
                    deadline = now + timeout
                left = deadline - now
                if left <= 0 or self._closed:
                    return None
                if lanes.ready:
                    # The group lease has expired, and its renewal notifies no worker; so check again soon.
                    left = min(left, GROUP_LEASE_CHECK_INTERVAL)
                if due is not None and not self._paused:
                    left = min(left, due - now)
                self._idle_workers += 1
                try:
                    self._work_available.wait(left)
                finally:
                    self._idle_workers -= 1

    def _start(self, job: WorkItem, now: float) -> WorkItem:
        job.was_started = True
        job.started_at = now
        self._running.add(job)
        self.started_count += 1
        if self._waiters.predicates:
            self._waiters.notify_satisfied()
        return job

    def task_done(self, job: WorkItem) -> bool:
        """Mark a record as finished; return False if its partition was revoked, so that it is not committed."""
        progress = job.tracker
        with self._lock:
            if job not in self._running:
                # The attempt was abandoned or timed out meanwhile, so a later attempt at the record counts instead.
                return True
            self._running.discard(job)
            self.finished_count += 1
            if progress.mark_finished(job.record.offset) and not progress.revoked:
                self._in_flight_limit.release(job.size)
                if self._low_water_mark >= 0 and self.in_flight <= self._low_water_mark:
                    self._waiters.notify_all()
            if job.lane is not None and self._lanes.complete(job) and self._idle_workers:
                self._work_available.notify()
            if self._waiters.predicates:
                self._waiters.notify_satisfied()
            return job.acked or self.counts_as_finished is not None or not progress.revoked

    def ack(self, job: WorkItem) -> None:
        """Acknowledge a running record, which the store now guarantees; its lane stays occupied until it finishes."""
        with self._lock:
            progress = job.tracker
            job.acked = True
            if job in self._running and progress.mark_finished(job.record.offset) and not progress.revoked:
                self._in_flight_limit.release(job.size)
            self._waiters.notify_satisfied()

    def requeue(self, job: WorkItem, seconds: float) -> None:
        """Schedule the next attempt at a record in ``seconds``; its lane stays occupied."""
        with self._lock:
            if self._remove_running(job):
                following = job.next_attempt(self.clock() + seconds)
                following.number += 1
                self._schedule_next(job, following)

    def retry_dead_letter(self, job: WorkItem, seconds: float) -> None:
        """Schedule another try to write the dead letter of a failed record in ``seconds``."""
        with self._lock:
            if self._remove_running(job):
                job.tracker.dead_letter_pending.add(job.record.offset)
                following = job.next_attempt(self.clock() + seconds)
                following.failure = job.failure
                following.dead_letter_tries = job.dead_letter_tries + 1
                self._schedule_next(job, following)

    def time_out(self, job: WorkItem, timeout_error: Exception, outcome: list[str]) -> bool:
        """Time out a running attempt: queue a replacement that fails with ``verdict``.

        :param outcome: the outcome latch of the attempt.
        :return: False if the attempt has already ended.
        """
        with self._lock:
            if job not in self._running or not resolve(outcome, TIMED_OUT):
                return False
            self._remove_running(job)
            job.abandoned = True
            following = job.next_attempt(0)
            following.timeout_error = timeout_error
            self._schedule_next(job, following)
            return True

    def abandon(self, job: WorkItem) -> bool:
        """Abandon a running attempt, so that its record stays unfinished; return False if it has already ended."""
        with self._lock:
            job.abandoned = self._remove_running(job)
            return job.abandoned

    def _remove_running(self, job: WorkItem) -> bool:
        if job not in self._running:
            return False
        self._running.discard(job)
        self._waiters.notify_satisfied()
        return True

    def _schedule_next(self, job: WorkItem, next_item: WorkItem) -> None:
        # The partition may have been revoked and reassigned meanwhile, and then its tracker may no longer contain the
        # record.
        known = job.tracker.replace(job.record.offset, next_item)
        goes_on = job.acked or (known and (not job.tracker.revoked or self._survives_revocation(next_item)))
        if goes_on and not self._closed:
            self._lanes.delay(next_item)
            self._work_available.notify()

    def running(self) -> list[WorkItem]:
        """Return the records that are running."""
        with self._lock:
            return list(self._running)

    def pause(self, paused: bool) -> None:
        """Pause or resume: a paused queue starts no attempts."""
        with self._lock:
            self._paused = paused
            self._work_available.notify_all()

    def close(self) -> None:
        """Close the queue: drop all waiting records and start no more attempts."""
        with self._lock:
            self._closed = True
            if self.counts_as_finished is not None:
                for job in self._lanes.delayed:
                    logger.warning(
                        f"offset {job.record.offset} of {job.partition} waited for a retry and is dropped: with"
                        " commit='before' it counts as finished"
                    )
            self._lanes.clear()
            self._work_available.notify_all()
            self._waiters.notify_all()

    def is_running(self, partitions: Collection[OffsetTracker]) -> bool:
        """Return whether a record of these partitions is running and not acknowledged."""
        with self._lock:
            return any(job.tracker in partitions and not job.acked for job in self._running)


class PendingRevocation:
    """A revocation that waits until the running records of its partitions finish, or until a deadline."""

    def __init__(self, work_queue: WorkQueue, leaving: Mapping[Partition, OffsetTracker], deadline: float) -> None:
        self._work_queue = work_queue
        self._leaving = leaving
        self._deadline = deadline
        #: Returns the offsets to commit before the revocation completes.
        self.commits: Callable[[], Mapping[Partition, Commit]] = self._finished

    @property
    def drained(self) -> bool:
        """True when no record of the partitions is running, or the deadline has passed."""
        running = self._work_queue.is_running(list(self._leaving.values()))
        return not running or self._work_queue.clock() >= self._deadline

    def wait(self) -> None:
        """Block until the partitions are drained."""
        self._work_queue.wait_for_change(max(self._deadline - self._work_queue.clock(), 0), lambda: self.drained)

    def _finished(self) -> Mapping[Partition, Commit]:
        return pending_commits(self._leaving, self._work_queue.counts_as_finished)
