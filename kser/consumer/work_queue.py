"""The work queue of a consumer: which record runs next, and which records are in flight.

One lock guards the queue and its partitions. A thread that holds the lock runs no user code and makes no network call.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from kser.attempt import TIMED_OUT, Attempt, Failure
from kser.consumer.client import Partition, Record
from kser.consumer.lanes import LaneQueue
from kser.consumer.offsets import OffsetTracker
from kser.consumer.takeovers import TakeoverItem, TakeoverQueue
from kser.consumer.unreadable import UnreadableRecord
from kser.consumer.work_item import WorkItem, was_started
from kser.escaping import escape_lines
from kser.retry import Retry

logger = escape_lines(logging.getLogger(__name__))


class InFlightLimit:
    """Counter of the records in flight, with a limit of their number and of their total size.

    :param max_count: the maximum number of records.
    :param max_bytes: the maximum total size of the keys, values and headers of these records, in bytes.
    """

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._average = 0
        #: The number of records in flight, and their total size in bytes.
        self.count = self.bytes = 0

    def acquire(self, count: int, size: int) -> None:
        """Count records as in flight.

        :param size: the total size of the records, in bytes.
        """
        self.count += count
        self.bytes += size
        if count:
            self._average = max(size // count, 1)

    def acquire_takeover(self, size: int) -> None:
        """Count a takeover as one record in flight.

        The size of a takeover says nothing about the records that the client fetches, so their average stays.
        """
        self.count += 1
        self.bytes += size

    def release(self, size: int) -> None:
        """Remove one record from the counters."""
        self.count -= 1
        self.bytes -= size

    def available(self, delayed: int) -> int:
        """Return how many more records may be in flight.

        :param delayed: the number of records in flight that wait for a retry. These records count towards
            ``max_bytes``, but not towards ``max_count``.
        """
        room = self._max_count - self.count + delayed
        spare = self._max_bytes - self.bytes
        if room <= 0 or spare <= 0:
            return 0
        return min(room, spare // self._average + 1) if self._average else room


class ConditionWaiters:
    """A condition variable for several threads, each of which waits for its own predicate.

    :param lock: the lock of the state that the predicates read. Callers of the notify methods must hold the lock.
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
        """Wake the waiting threads if the predicate of at least one of them is true.

        This also wakes the other threads, which then continue to wait.
        """
        if any(predicate() for predicate in self.predicates):
            self._condition.notify_all()

    def notify_all(self) -> None:
        """Wake all waiting threads, so that each evaluates its predicate."""
        self._condition.notify_all()


class GroupLease:
    """The group lease: the period in which attempts may start. Each poll of the client renews the lease.

    If the process was suspended or got no CPU time, it did not poll, and the group may have reassigned the partitions.
    While the lease is expired, no attempt starts.

    :param clock: returns the time in seconds.
    :param max_silence: the duration of the lease, in seconds.
    """

    def __init__(self, clock: Callable[[], float], max_silence: float = math.inf) -> None:
        self._clock = clock
        self._max_silence = max_silence
        #: The time at which the lease expires, by the clock.
        self.deadline = clock() + max_silence

    def renew(self) -> None:
        """Renew the lease. Call this method only while the client is in its group."""
        self.deadline = self._clock() + self._max_silence

    @property
    def is_expired(self) -> bool:
        """True if the group lease has expired."""
        return self._clock() >= self.deadline


#: Seconds between two checks whether an expired group lease has been renewed.
GROUP_LEASE_CHECK_INTERVAL = 0.1
KEY, PARTITION, NONE = ORDERINGS = ("key", "partition", "none")


def lane_of(record: Record, ordering: str) -> bytes | str | None:
    """Return the lane of a record in its partition, None if it has none."""
    return record.key if ordering == KEY else ordering if ordering == PARTITION else None


class WorkQueue:
    """A queue of records in lanes, from which the workers take the next record to run.

    :param ordering: the lane of a record: ``"key"`` (its key), ``"partition"`` (its partition) or ``"none"`` (no lane).
    :param max_in_flight: the maximum number of unfinished records, not counting records that wait for a retry. At this
        number, :meth:`capacity` is 0.
    :param max_bytes: the maximum total size of the keys, values and headers of these records, in bytes.
    :param retry: the retry policy for classes that declare no policy.
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
        retry: Retry | None = None,
        commit_before: bool = False,
        max_silence: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        #: The lane of a record, see the parameter.
        self.ordering = ordering
        self._in_flight_limit = InFlightLimit(max_in_flight, max_bytes)
        self._retry = retry
        #: True if a record counts as finished for its group as soon as its attempt has started.
        self.commit_before = commit_before
        self.clock = clock
        #: The group lease; while it is expired, no attempt starts.
        self.group_lease = GroupLease(clock, max_silence)
        #: The lock of the queue and of its partitions. Re-entrant, because wait predicates call methods that acquire
        #: the lock.
        self.lock = threading.RLock()
        #: The condition for which workers wait: a record is ready.
        self._work_available = threading.Condition(self.lock)
        #: Wakes the threads that are not workers. They wait until a record is started, finished, committed or revoked.
        self.waiters = ConditionWaiters(self.lock)
        #: The waiting items. Hold the lock while you read them.
        self.lanes = LaneQueue()
        #: The waiting takeovers. Hold the lock while you read them.
        self.takeovers = TakeoverQueue(
            self._work_available, self._in_flight_limit.acquire_takeover, self._in_flight_limit.release
        )
        self._running: dict[Attempt, WorkItem] = {}
        self._idle_workers = 0
        #: The number of records in flight at which :meth:`wait_for_room` returns; -1 while no thread waits there.
        self._low_water_mark = -1
        self._closed = self._paused = False
        #: The number of records and takeovers finished, and of attempts started, since the start of the consumer.
        self.finished_count = self.started_count = 0
        #: The number of records finished, without takeovers.
        self.finished_records = 0

    # -- for the client thread -----------------------------------------------------------------------------------------

    def capacity(self) -> int:
        """Return how many more records the queue accepts."""
        return 0 if self._closed else self._in_flight_limit.available(self.lanes.delayed_count)

    @property
    def in_flight(self) -> int:
        """The number of records in flight in the assigned partitions, not counting records that wait for a retry."""
        return self._in_flight_limit.count - self.lanes.delayed_count

    @property
    def is_busy(self) -> bool:
        """True if all workers are busy."""
        return not self._idle_workers

    def wait_for_room(self, timeout: float, low: int) -> None:
        """Block until no more than ``low`` records are in flight, or until ``timeout`` seconds have passed."""
        with self.lock:
            self._low_water_mark = low
            self.waiters.wait(lambda: self.in_flight <= low or self._closed, timeout)
            self._low_water_mark = -1

    # -- for the partition table ---------------------------------------------------------------------------------------

    def put(
        self,
        tracker: OffsetTracker,
        records: Sequence[Record],
        *,
        isolated: bool = False,
        failure: Failure | None = None,
    ) -> None:
        """Queue the new records of a partition. The caller must hold the lock.

        :param tracker: the offset tracker of the partition.
        :param isolated: whether the records come before all waiting records of other lanes.
        :param failure: the permanent failure of the records, which then do not run.
        """
        ordering, retry, lanes = self.ordering, self._retry, self.lanes
        count = size = 0
        for record in records:
            if type(record) is UnreadableRecord:
                first = tracker.first_unfinished(record.offset, record.last_offset)
                record = replace(record, offset=first)
            lane = lane_of(record, ordering)
            item = WorkItem(record, tracker, lane, retry)
            item.attempt.failure = failure
            entered = tracker.track(record.offset, item)
            if type(record) is UnreadableRecord:
                tracker.extend(record.offset, record.last_offset)
            if entered is None:
                continue
            count += 1
            size += item.size
            # If ``entered`` is another item, it belongs to an attempt or a retry from before the rebalance. This item
            # already occupies its lane.
            if entered is item and isolated:
                lanes.add_first(item)
            elif entered is item:
                lanes.add(item) if lane is not None else lanes.ready.append(item)
        self._in_flight_limit.acquire(count, size)
        if self._idle_workers:
            self._work_available.notify(len(records))

    def drop_partition(self, tracker: OffsetTracker) -> None:
        """Drop the waiting items of a revoked partition; its running attempts continue. The caller must hold the lock.

        :param tracker: the offset tracker of the partition.
        """
        for item in tracker.unfinished.values():
            self._in_flight_limit.release(item.size)
        tracker.revoke(was_started)
        self.lanes.remove_partition(tracker, lambda item: item.survives_revocation(self.commit_before))

    def resume_partition(
        self, partition: Partition, tracker: OffsetTracker, carried_over: Mapping[int, WorkItem]
    ) -> None:
        """Take over the attempts and retries of a partition that is assigned to this consumer again.

        The running attempts and the pending retries are from an earlier assignment. The caller must hold the lock.

        :param tracker: the new offset tracker of the partition.
        :param carried_over: the items that were started during an earlier assignment and are unfinished.
        """
        for item in carried_over.values():
            item.tracker = tracker
            if item.attempt.failure is not None:
                tracker.dead_letter_pending.add(item.record.offset)
            self.lanes.occupy(item)
            if item.attempt not in self._running and not self._closed:
                self.lanes.delay(item)
        if carried_over:
            self._work_available.notify_all()
        # An attempt whose record is acked continues after the revocation, but the revocation freed its lane. Occupy the
        # lane again, so that no later record of the lane starts before the attempt ends.
        for item in self._running.values():
            if item.attempt.acked and item.partition == partition:
                item.tracker = tracker
                self.lanes.occupy(item)

    # -- for workers ---------------------------------------------------------------------------------------------------

    def get(self, timeout: float) -> WorkItem | None:
        """Return the next item to run.

        :return: None if no item is ready within ``timeout`` seconds, or if the queue is closed.
        """
        deadline = None
        lanes = self.lanes
        with self.lock:
            while not self._closed:
                now = self.clock()
                if (due := lanes.next_due) is not None:
                    lanes.promote_due(now)
                may_start_records = now < self.group_lease.deadline
                item = None if self._paused else self.takeovers.next_item(now, lanes, may_start_records)
                if item is not None:
                    item.was_started = True
                    item.attempt.started_at = now
                    self._running[item.attempt] = item
                    self.started_count += 1
                    if self.waiters.predicates:
                        self.waiters.notify_satisfied()
                    return item
                if deadline is None:
                    deadline = now + timeout
                left = deadline - now
                if left <= 0:
                    return None
                if lanes.ready:
                    # The group lease has expired, or another partition has exclusive use of the workers. The end of
                    # this state notifies no worker, so check again soon.
                    left = min(left, GROUP_LEASE_CHECK_INTERVAL)
                if due is not None and not self._paused:
                    left = min(left, due - now)
                self._idle_workers += 1
                try:
                    self._work_available.wait(left)
                finally:
                    self._idle_workers -= 1
            return None

    def task_done(self, item: WorkItem) -> bool:
        """Mark a record as finished.

        :return: False if the record cannot be committed, because its partition was revoked.
        """
        tracker = item.tracker
        with self.lock:
            if self._running.pop(item.attempt, None) is None:
                # The attempt was abandoned or timed out meanwhile, so ignore its end. If the record is not finished, a
                # later attempt finishes it.
                return True
            self.finished_count += 1
            self.finished_records += not isinstance(item, TakeoverItem)
            self.lanes.end_exclusive(tracker)
            if tracker.mark_finished(item.record.offset) and not tracker.revoked:
                self._in_flight_limit.release(item.size)
                if self._low_water_mark >= 0 and self.in_flight <= self._low_water_mark:
                    self.waiters.notify_all()
            if item.lane is not None and self.lanes.complete(item) and self._idle_workers:
                self._work_available.notify()
            if self.waiters.predicates:
                self.waiters.notify_satisfied()
            return not tracker.revoked or item.attempt.acked or self.commit_before

    def ack(self, attempt: Attempt) -> None:
        """Ack the record of a running attempt. Its lane stays occupied until the attempt finishes."""
        with self.lock:
            attempt.acked = True
            item = self._running.get(attempt)
            if item is not None:
                self.lanes.end_exclusive(item.tracker)
            if item is not None and item.tracker.mark_finished(item.record.offset) and not item.tracker.revoked:
                self._in_flight_limit.release(item.size)
            self.waiters.notify_satisfied()

    def requeue(self, item: WorkItem, seconds: float) -> None:
        """Schedule the next attempt at a record in ``seconds`` seconds. The lane of the record stays occupied."""
        with self.lock:
            if self._remove_running(item.attempt):
                following = item.next_attempt(self.clock() + seconds)
                following.attempt.number += 1
                self._schedule_next(item, following)

    def retry_dead_letter(self, item: WorkItem, seconds: float) -> None:
        """Schedule another try to write the dead letter of a failed record, after ``seconds`` seconds."""
        with self.lock:
            if self._remove_running(item.attempt):
                item.tracker.dead_letter_pending.add(item.record.offset)
                following = item.next_attempt(self.clock() + seconds)
                following.attempt.failure = item.attempt.failure
                following.dead_letter_tries = item.dead_letter_tries + 1
                self._schedule_next(item, following)

    def time_out(self, item: WorkItem, timeout_error: Exception, outcome: list[str]) -> bool:
        """Time out a running attempt: abandon it, and queue an item that reports ``timeout_error`` in its place.

        The thread of the attempt may never return. So a new attempt with the same number raises ``timeout_error``
        instead of running the message, and the failure is handled like any other failure.

        :param outcome: the outcome latch of the attempt (``Attempt.outcome``), which accepts only its first value.
        :return: False if the attempt has already ended.
        """
        with self.lock:
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
        """Abandon a running attempt, so that its record stays unfinished.

        :return: False if the attempt has already ended.
        """
        with self.lock:
            was_running = self._remove_running(attempt)
            if was_running:
                attempt.mark_abandoned()
            return was_running

    def _remove_running(self, attempt: Attempt) -> bool:
        item = self._running.pop(attempt, None)
        if item is None:
            return False
        self.lanes.end_exclusive(item.tracker)
        self.waiters.notify_satisfied()
        return True

    def _schedule_next(self, item: WorkItem, next_item: WorkItem) -> None:
        if isinstance(next_item, TakeoverItem):
            self.takeovers.put_timeout(next_item)
            return
        # The partition may have been revoked and assigned again meanwhile. In that case, its tracker may no longer
        # contain the record.
        is_tracked = item.tracker.replace(item.record.offset, next_item)
        continues = item.attempt.acked or (
            is_tracked and (not item.tracker.revoked or next_item.survives_revocation(self.commit_before))
        )
        if continues and not self._closed:
            self.lanes.delay(next_item)
            self._work_available.notify()

    def running(self) -> list[WorkItem]:
        """Return the items whose attempts are running."""
        with self.lock:
            return list(self._running.values())

    def pause(self, paused: bool) -> None:
        """Pause or resume the queue. A paused queue starts no attempts."""
        with self.lock:
            self._paused = paused
            self._work_available.notify_all()

    def close(self) -> None:
        """Close the queue: drop all waiting records and start no more attempts."""
        with self.lock:
            self._closed = True
            if self.commit_before:
                for item in self.lanes.delayed:
                    logger.warning(
                        f"the message at {item.place} waited for a retry and is"
                        " dropped, because with commit='before' it counts as finished"
                    )
            self.lanes.clear()
            self.takeovers.close()
            self._work_available.notify_all()
            self.waiters.notify_all()
