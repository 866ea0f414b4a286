"""Pending revocations: partitions that are revoked once their running records have finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kser.consumer.client import Commit, Partition
from kser.consumer.offsets import OffsetTracker, pending_commits

if TYPE_CHECKING:
    from kser.consumer.dispatch import WorkQueue


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
        """Whether no record of the partitions is running, or the deadline has passed."""
        running = self._work_queue.is_running(list(self._leaving.values()))
        return not running or self._work_queue.clock() >= self._deadline

    def wait(self) -> None:
        """Block until the partitions are drained."""
        self._work_queue.wait_for_change(max(self._deadline - self._work_queue.clock(), 0), lambda: self.drained)

    def _finished(self) -> Mapping[Partition, Commit]:
        return pending_commits(self._leaving, self._work_queue.counts_as_finished)
