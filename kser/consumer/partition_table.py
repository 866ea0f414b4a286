"""The partition table, which contains the assigned partitions of a consumer and handles commits and rebalances."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from kser.consumer.client import Commit, Partition, RebalanceListener, Record
from kser.consumer.isolation import Isolation
from kser.consumer.offsets import OffsetTracker, decode, pending_commits
from kser.consumer.work_item import was_started
from kser.consumer.work_queue import WorkQueue


class PartitionTable(RebalanceListener):
    """The assigned partitions and their offset trackers. The table shares the lock of the work queue.

    :param work_queue: the work queue that receives the records of the partitions.
    :param revoke_timeout: seconds to wait for the running records of a partition before the partition is revoked.
    :param max_starts: the number of starts after which a record that ends its process is given up; None counts no
        starts.
    """

    def __init__(self, work_queue: WorkQueue, revoke_timeout: float = 10, max_starts: int | None = None) -> None:
        self._work_queue = work_queue
        self._revoke_timeout = revoke_timeout
        self._counts_as_finished: Callable[[Any], bool] | None = was_started if work_queue.commit_before else None
        self._trackers: dict[Partition, OffsetTracker] = {}
        self._revoked: dict[Partition, OffsetTracker] = {}
        self._assigned = self._closed = False
        #: The isolated partitions; None if starts are not counted, because a record is committed before it starts.
        self._isolation = None if max_starts is None or work_queue.commit_before else Isolation(work_queue, max_starts)
        #: False if the consumer cannot commit or must not commit. In that case, :meth:`commits` and revocations return
        #: no offsets.
        self.commit_enabled = True

    @property
    def assignment(self) -> frozenset[Partition]:
        """The assigned partitions."""
        return frozenset(self._trackers)

    def put(self, batches: Mapping[Partition, Sequence[Record]], commit: Callable[[], object] | None = None) -> int:
        """Queue records and return their number.

        :param commit: commits the offsets of :meth:`commits`. This method calls it before it queues the first records
            of a partition, so that the start of the partition is counted.
        """
        try:
            if commit is not None and self._count_starts(batches):
                commit()
        finally:
            queued = self._put(batches)
        return queued

    def _put(self, batches: Mapping[Partition, Sequence[Record]]) -> int:
        queued = 0
        with self._work_queue.lock:
            for partition, records in batches.items():
                tracker = self._trackers.get(partition)
                if tracker is None and self._assigned:
                    # The partition was revoked after the client had fetched these records, so drop them.
                    continue
                if tracker is None:
                    # Without a group, no assignment defines the start offset, so start at the first received record.
                    tracker = self._trackers[partition] = OffsetTracker(Commit(records[0].offset))
                if self._isolation is not None and tracker in self._isolation:
                    self._isolation.hold(tracker, records)
                else:
                    self._work_queue.put(tracker, records)
                queued += len(records)
        return queued

    def blocked_partitions(self) -> Collection[Partition]:
        """Return the partitions from which the client must not fetch for now.

        These are the partitions with a dead letter that is not written yet, the partitions whose finished offsets might
        not fit into the metadata of a commit, and the isolated partitions with a record that waits.
        """
        with self._work_queue.lock:
            return {
                key
                for key, tracker in self._trackers.items()
                if tracker.is_full or tracker.dead_letter_pending or self._holds(tracker)
            }

    def advance(self, positions: Mapping[Partition, int]) -> None:
        """Let the partitions without unfinished records follow the fetch positions of the client."""
        with self._work_queue.lock:
            for key, position in positions.items():
                if (tracker := self._trackers.get(key)) is not None and not self._holds(tracker):
                    tracker.advance(position)

    @property
    def backlog(self) -> dict[Partition, int]:
        """The number of unfinished records of each partition, except records that wait for a retry."""
        with self._work_queue.lock:
            counts = {key: len(tracker.unfinished) for key, tracker in self._trackers.items()}
            for item in self._work_queue.lanes.delayed:
                if item.partition in counts:
                    counts[item.partition] -= 1
            return counts

    # -- commits -------------------------------------------------------------------------------------------------------

    def commits(self) -> dict[Partition, Commit]:
        """Return the offsets that can be committed and are not committed yet."""
        if not self.commit_enabled:
            return {}
        with self._work_queue.lock:
            if self._isolation is not None:
                self._isolation.update(self._trackers.values())
            return pending_commits(self._trackers, self._counts_as_finished)

    def committed_offsets(self) -> dict[Partition, Commit]:
        """Return the committed offsets of the assigned partitions."""
        with self._work_queue.lock:
            return {key: tracker.committed for key, tracker in self._trackers.items()}

    def mark_committed(self, commits: Mapping[Partition, Commit]) -> None:
        """Store offsets that the group has confirmed."""
        with self._work_queue.lock:
            for key, commit in commits.items():
                if key in self._trackers:
                    self._trackers[key].committed = commit
            if self._work_queue.waiters.predicates:
                self._work_queue.waiters.notify_satisfied()

    # -- starts --------------------------------------------------------------------------------------------------------

    def _count_starts(self, partitions: Collection[Partition]) -> bool:
        """Count the start of each partition whose first records have arrived; return whether there is one."""
        if self._isolation is None or not self.commit_enabled:
            return False
        with self._work_queue.lock:
            trackers = [tracker for key in partitions if (tracker := self._trackers.get(key)) is not None]
            new = [each for each in trackers if not each.starts.counted and each not in self._isolation]
            for tracker in new:
                # While all unfinished records wait for a retry, the new records are the records that may run.
                tracker.starts.count(tracker.next_offset if tracker.unfinished else tracker.commit().offset)
            return bool(new)

    def end_starts(self) -> None:
        """Remove the counts of starts from the next commits, because the consumer ends in an orderly way."""
        with self._work_queue.lock:
            for tracker in self._trackers.values():
                tracker.starts.reset()

    @property
    def has_due_start(self) -> bool:
        """True if a retry is due soon, so that its start must be committed now."""
        with self._work_queue.lock:
            return self._isolation is not None and self._isolation.update(self._trackers.values())

    @property
    def is_holding(self) -> bool:
        """True if a record of an isolated partition waits until it may start."""
        return self._isolation is not None and self._isolation.is_holding

    def start_isolated(self, commit: Callable[[], object]) -> int:
        """Queue the next record of the isolated partitions, if it may start; return the number of records queued.

        :param commit: commits the offsets of :meth:`commits`. The record starts only after its start is committed.
        """
        assert self._isolation is not None
        with self._work_queue.lock:
            released = self._isolation.expired(self._trackers)
            self._isolation.choose()
        queued = self.put(released, commit)
        commit()
        with self._work_queue.lock:
            return queued + self._isolation.release()

    def _holds(self, tracker: OffsetTracker) -> bool:
        return self._isolation is not None and self._isolation.holds(tracker)

    # -- rebalances ----------------------------------------------------------------------------------------------------

    def on_assign(self, starts: Mapping[Partition, Commit]) -> None:
        with self._work_queue.lock:
            self._assigned = True
            for key, start in starts.items():
                revoked = self._revoked.pop(key, None) or self._detach(key)
                # If the committed offset is lower than the last commit of this consumer, a user or the broker has
                # deleted or reset the offset of the group meanwhile. In that case, the offset tracker of the earlier
                # assignment is invalid, so create a new one.
                if revoked is None or start.offset < revoked.committed.offset:
                    self._trackers[key] = OffsetTracker(start)
                    self._work_queue.resume_partition(key, self._trackers[key], {})
                else:
                    self._resume(key, start, revoked)
                if self._isolation is not None and self.commit_enabled and not self._trackers[key].starts.counted:
                    self._isolation.admit(self._trackers[key])

    def on_reset(self, starts: Mapping[Partition, Commit]) -> None:
        with self._work_queue.lock:
            self._assigned = True
            for key, start in starts.items():
                self._detach(key)
                self._revoked.pop(key, None)
                self._trackers[key] = OffsetTracker(start)

    def on_revoke(self, partitions: Collection[Partition]) -> PendingRevocation:
        # When a closing client leaves the group, its partitions are revoked. Their offsets are already committed, so
        # return a revocation without partitions, which waits for no record and commits nothing.
        return self._revoke(() if self._closed else partitions, orderly=True)

    def on_lost(self, partitions: Collection[Partition]) -> None:
        self._revoke(partitions, orderly=False)

    def close(self) -> None:
        """Ignore revocations from now on.

        Call this method after the final commit, before the client leaves the group. Leaving the group revokes all
        partitions, and their offsets are already committed.
        """
        self._closed = True

    def _revoke(self, partitions: Collection[Partition], *, orderly: bool) -> PendingRevocation:
        with self._work_queue.lock:
            leaving = {key: tracker for key in partitions if (tracker := self._detach(key)) is not None}
            self._revoked.update(leaving)
            if orderly:
                for tracker in leaving.values():
                    tracker.starts.reset()
        commits = partial(pending_commits, leaving, self._counts_as_finished) if self.commit_enabled else dict
        return PendingRevocation(self._work_queue, leaving, self._work_queue.clock() + self._revoke_timeout, commits)

    def _detach(self, key: Partition) -> OffsetTracker | None:
        tracker = self._trackers.pop(key, None)
        if tracker is not None:
            if self._isolation is not None:
                self._isolation.drop(tracker)
            self._work_queue.drop_partition(tracker)
        return tracker

    def _resume(self, key: Partition, start: Commit, revoked: OffsetTracker) -> None:
        """Restore a partition that was revoked and is assigned to this consumer again.

        The running attempts and pending retries of the partition continue.
        """
        finished = decode(start)
        items = {at: item for at, item in revoked.started().items() if at >= start.offset and at not in finished}
        self._trackers[key] = OffsetTracker(start, revoked.finished_ranges(), items, revoked.last_offsets)
        self._trackers[key].starts.carry_over(revoked.starts)
        self._work_queue.resume_partition(key, self._trackers[key], items)


class PendingRevocation:
    """A revocation that waits until the running records of its partitions finish, or until a deadline.

    :param work_queue: the work queue.
    :param leaving: the offset trackers of the revoked partitions.
    :param deadline: the deadline, by the clock of the work queue.
    :param commits: returns the offsets to commit before the revocation completes.
    """

    def __init__(
        self,
        work_queue: WorkQueue,
        leaving: Mapping[Partition, OffsetTracker],
        deadline: float,
        commits: Callable[[], Mapping[Partition, Commit]],
    ) -> None:
        self._work_queue = work_queue
        self._leaving = leaving
        self._deadline = deadline
        #: Returns the offsets to commit before the revocation completes.
        self.commits = commits

    @property
    def drained(self) -> bool:
        """True when no record of the partitions is running, or the deadline has passed."""
        trackers = list(self._leaving.values())
        running = any(item.tracker in trackers and not item.attempt.acked for item in self._work_queue.running())
        return not running or self._work_queue.clock() >= self._deadline

    def wait(self) -> None:
        """Block until the partitions are drained."""
        timeout = max(self._deadline - self._work_queue.clock(), 0)
        self._work_queue.waiters.wait(lambda: self.drained, timeout)
