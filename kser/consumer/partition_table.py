"""The partition table, which contains the assigned partitions of a consumer and handles commits and rebalances."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from kser.consumer.client import Commit, Partition, RebalanceListener, Record
from kser.consumer.offsets import OffsetTracker, decode, pending_commits
from kser.consumer.work_item import was_started
from kser.consumer.work_queue import WorkQueue


class PartitionTable(RebalanceListener):
    """The assigned partitions and their offset trackers. The table shares the lock of the work queue.

    :param work_queue: the work queue that receives the records of the partitions.
    :param revoke_timeout: seconds to wait for the running records of a partition before the partition is revoked.
    """

    def __init__(self, work_queue: WorkQueue, revoke_timeout: float = 10) -> None:
        self._work_queue = work_queue
        self._revoke_timeout = revoke_timeout
        self._counts_as_finished: Callable[[Any], bool] | None = was_started if work_queue.commit_before else None
        self._trackers: dict[Partition, OffsetTracker] = {}
        self._revoked: dict[Partition, OffsetTracker] = {}
        self._assigned = self._closed = False
        #: False if the consumer cannot commit or must not commit. In that case, :meth:`commits` and revocations return
        #: no offsets.
        self.commit_enabled = True

    @property
    def assignment(self) -> frozenset[Partition]:
        """The assigned partitions."""
        return frozenset(self._trackers)

    def put(self, batches: Mapping[Partition, Sequence[Record]]) -> int:
        """Queue records and return their number."""
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
                self._work_queue.put(tracker, records)
                queued += len(records)
        return queued

    def blocked_partitions(self) -> Collection[Partition]:
        """Return the partitions from which the client must not fetch for now.

        These are the partitions with a dead letter that is not written yet, and the partitions whose finished offsets
        might not fit into the metadata of a commit.
        """
        with self._work_queue.lock:
            return {key for key, tracker in self._trackers.items() if tracker.is_full or tracker.dead_letter_pending}

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
        return self._revoke(() if self._closed else partitions)

    def on_lost(self, partitions: Collection[Partition]) -> None:
        self._revoke(partitions)

    def close(self) -> None:
        """Ignore revocations from now on.

        Call this method after the final commit, before the client leaves the group. Leaving the group revokes all
        partitions, and their offsets are already committed.
        """
        self._closed = True

    def _revoke(self, partitions: Collection[Partition]) -> PendingRevocation:
        with self._work_queue.lock:
            leaving = {key: tracker for key in partitions if (tracker := self._detach(key)) is not None}
            self._revoked.update(leaving)
        commits = partial(pending_commits, leaving, self._counts_as_finished) if self.commit_enabled else dict
        return PendingRevocation(self._work_queue, leaving, self._work_queue.clock() + self._revoke_timeout, commits)

    def _detach(self, key: Partition) -> OffsetTracker | None:
        tracker = self._trackers.pop(key, None)
        if tracker is not None:
            self._work_queue.drop_partition(tracker)
        return tracker

    def _resume(self, key: Partition, start: Commit, revoked: OffsetTracker) -> None:
        """Restore a partition that was revoked and is assigned to this consumer again.

        The running attempts and pending retries of the partition continue.
        """
        finished = decode(start)
        items = {at: item for at, item in revoked.started().items() if at >= start.offset and at not in finished}
        self._trackers[key] = OffsetTracker(start, revoked.finished_ranges(), items)
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
