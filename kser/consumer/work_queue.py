"""Limit of the records in flight in a consumer, by count and by bytes."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any

from kser.attempt import TIMED_OUT, Attempt
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
        self._running: dict[Attempt, WorkItem] = {}
        self._idle_workers = 0
        #: The low-water mark of the records in flight that a waiting thread needs; -1 without such a thread.
        self._low_water_mark = -1
        self._closed = self._paused = self._assigned = False
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
            return {key for key, tracker in self._partitions.items() if tracker.is_full or tracker.dead_letter_pending}

    def put(self, batches: Mapping[Partition, Sequence[Record]]) -> int:
        """Queue records and return their number."""
        taken = 0
        with self._lock:
            for partition, records in batches.items():
                tracker = self._partitions.get(partition)
                if tracker is None and self._assigned:
                    # The partition was revoked after the client had fetched these records, so drop them.
                    continue
                if tracker is None:
                    # Without a group, no assignment defines a start offset, so the first record does.
                    tracker = self._partitions[partition] = OffsetTracker(Commit(records[0].offset))
                self._track(tracker, records)
                taken += len(records)
            if taken and self._idle_workers:
                self._work_available.notify(taken)
        return taken

    def _track(self, tracker: OffsetTracker, records: Sequence[Record]) -> None:
        ordering, retry, lanes = self._ordering, self._retry, self._lanes
        count = size = 0
        for record in records:
            lane = record.key if ordering == KEY else ordering if ordering == PARTITION else None
            item = WorkItem(record, tracker, lane, retry)
            entered = tracker.track(record.offset, item)
            if entered is None:
                continue
            count += 1
            size += item.size
            # Otherwise an attempt from before the rebalance continues, and it already occupies the lane.
            if entered is item:
                lanes.add(item) if lane is not None else lanes.ready.append(item)
        self._in_flight_limit.acquire(count, size)

    @property
    def is_busy(self) -> bool:
        """True if all workers are busy."""
        return not self._idle_workers

    @property
    def backlog(self) -> dict[Partition, int]:
        """The number of unfinished records of each partition, without those that wait for a retry."""
        with self._lock:
            counts = {key: len(tracker.unfinished) for key, tracker in self._partitions.items()}
            for item in self._lanes.delayed:
                if item.partition in counts:
                    counts[item.partition] -= 1
            return counts

    def commits(self) -> dict[Partition, Commit]:
        """Return the offsets that can be committed and are not committed yet."""
        with self._lock:
            return pending_commits(self._partitions, self.counts_as_finished)

    def committed_offsets(self) -> dict[Partition, Commit]:
        """Return the committed offsets of the assigned partitions."""
        with self._lock:
            return {key: tracker.committed for key, tracker in self._partitions.items()}

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
            leaving = {key: tracker for key in partitions if (tracker := self._detach(key)) is not None}
            self._revoked.update(leaving)
        return PendingRevocation(self, leaving, self.clock() + self._revoke_timeout)

    def on_lost(self, partitions: Collection[Partition]) -> None:
        self.on_revoke(partitions)

    def _detach(self, key: Partition) -> OffsetTracker | None:
        tracker = self._partitions.pop(key, None)
        if tracker is None:
            return None
        for item in tracker.unfinished.values():
            self._in_flight_limit.release(item.size)
        tracker.revoke(_was_started)
        self._lanes.remove_partition(tracker, self._survives_revocation)
        return tracker

    def _survives_revocation(self, item: WorkItem) -> bool:
        return item.attempt.acked or (self.counts_as_finished is not None and item.was_started)

    def _resume_partition(self, key: Partition, start: Commit, away: OffsetTracker) -> None:
        """Restore a reassigned partition, so that its running attempts and pending retries continue."""
        known = decode(start)
        kept = {at: item for at, item in away.started().items() if at >= start.offset and at not in known}
        tracker = self._partitions[key] = OffsetTracker(start, away.finished_ranges(), kept)
        for item in kept.values():
            item.tracker = tracker
            if item.attempt.failure is not None:
                tracker.dead_letter_pending.add(item.record.offset)
            self._lanes.occupy(item)
            if item.attempt not in self._running and not self._closed:
                self._lanes.delay(item)
        if kept:
            self._work_available.notify_all()

    def _rejoin_lanes(self, key: Partition) -> None:
        """Occupy the lanes of running attempts that survived the revocation, so that they block their lanes again."""
        for item in self._running.values():
            if item.attempt.acked and item.partition == key:
                item.tracker = self._partitions[key]
                self._lanes.occupy(item)

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
                    item = lanes.ready.popleft()
                    item.was_started = True
                    item.attempt.started_at = now
                    self._running[item.attempt] = item
                    self.started_count += 1
                    if self._waiters.predicates:
                        self._waiters.notify_satisfied()
                    return item
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

    def task_done(self, item: WorkItem) -> bool:
        """Mark a record as finished; return False if its partition was revoked, so that it is not committed."""
        tracker = item.tracker
        with self._lock:
            if self._running.pop(item.attempt, None) is None:
                # The attempt was abandoned or timed out meanwhile, so a later attempt at the record counts instead.
                return True
            self.finished_count += 1
            if tracker.mark_finished(item.record.offset) and not tracker.revoked:
                self._in_flight_limit.release(item.size)
                if self._low_water_mark >= 0 and self.in_flight <= self._low_water_mark:
                    self._waiters.notify_all()
            if item.lane is not None and self._lanes.complete(item) and self._idle_workers:
                self._work_available.notify()
            if self._waiters.predicates:
                self._waiters.notify_satisfied()
            return not tracker.revoked or item.attempt.acked or self.counts_as_finished is not None

    def ack(self, attempt: Attempt) -> None:
        """Ack the record of a running attempt; its lane stays occupied until the attempt finishes."""
        with self._lock:
            attempt.acked = True
            item = self._running.get(attempt)
            if item is not None and item.tracker.mark_finished(item.record.offset) and not item.tracker.revoked:
                self._in_flight_limit.release(item.size)
            self._waiters.notify_satisfied()

    def requeue(self, item: WorkItem, seconds: float) -> None:
        """Schedule the next attempt at a record in ``seconds``; its lane stays occupied."""
        with self._lock:
            if self._remove_running(item.attempt):
                following = item.next_attempt(self.clock() + seconds)
                following.attempt.number += 1
                self._schedule_next(item, following)

    def retry_dead_letter(self, item: WorkItem, seconds: float) -> None:
        """Schedule another try to write the dead letter of a failed record in ``seconds``."""
        with self._lock:
            if self._remove_running(item.attempt):
                item.tracker.dead_letter_pending.add(item.record.offset)
                following = item.next_attempt(self.clock() + seconds)
                following.attempt.failure = item.attempt.failure
                following.dead_letter_tries = item.dead_letter_tries + 1
                self._schedule_next(item, following)

    def time_out(self, item: WorkItem, timeout_error: Exception, outcome: list[str]) -> bool:
        """Time out a running attempt: queue a replacement that fails with ``timeout_error``.

        :param outcome: the outcome latch of the attempt.
        :return: False if the attempt has already ended.
        """
        with self._lock:
            if item.attempt not in self._running:
                return False
            outcome.append(TIMED_OUT)
            if outcome[0] != TIMED_OUT:
                return False
            self._remove_running(item.attempt)
            item.attempt.mark_abandoned()
            following = item.next_attempt(0)
            following.attempt.timeout_error = timeout_error
            self._schedule_next(item, following)
            return True

    def abandon(self, attempt: Attempt) -> bool:
        """Abandon a running attempt, so that its record stays unfinished; return False if it has already ended."""
        with self._lock:
            was_running = self._remove_running(attempt)
            if was_running:
                attempt.mark_abandoned()
            return was_running

    def _remove_running(self, attempt: Attempt) -> bool:
        if self._running.pop(attempt, None) is None:
            return False
        self._waiters.notify_satisfied()
        return True

    def _schedule_next(self, item: WorkItem, next_item: WorkItem) -> None:
        # The partition may have been revoked and reassigned meanwhile, and then its tracker may no longer contain the
        # record.
        known = item.tracker.replace(item.record.offset, next_item)
        continues = item.attempt.acked or (known and (not item.tracker.revoked or self._survives_revocation(next_item)))
        if continues and not self._closed:
            self._lanes.delay(next_item)
            self._work_available.notify()

    def running(self) -> list[WorkItem]:
        """Return the items whose attempts are running."""
        with self._lock:
            return list(self._running.values())

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
                for item in self._lanes.delayed:
                    logger.warning(
                        f"offset {item.record.offset} of {item.partition} waited for a retry and is dropped: with"
                        " commit='before' it counts as finished"
                    )
            self._lanes.clear()
            self._work_available.notify_all()
            self._waiters.notify_all()

    def is_running(self, partitions: Collection[OffsetTracker]) -> bool:
        """Return whether a record of these partitions is running and not acknowledged."""
        with self._lock:
            return any(item.tracker in partitions and not item.attempt.acked for item in self._running.values())


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
