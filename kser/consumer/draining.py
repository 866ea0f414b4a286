"""Pending revocations: partitions that are revoked once their running records have finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kser.consumer.client import Commit, Partition
from kser.consumer.offsets import Progress, uncommitted

if TYPE_CHECKING:
    from kser.consumer.dispatch import Dispatch


class Draining:
    """A revocation that waits until the running records of its partitions finish, or until a deadline."""

    def __init__(self, dispatch: Dispatch, leaving: Mapping[Partition, Progress], deadline: float) -> None:
        self._dispatch = dispatch
        self._leaving = leaving
        self._deadline = deadline
        #: Returns the offsets to commit before the revocation completes.
        self.commits: Callable[[], Mapping[Partition, Commit]] = self._finished

    @property
    def drained(self) -> bool:
        """Whether no record of the partitions is running, or the deadline has passed."""
        running = self._dispatch.is_running(list(self._leaving.values()))
        return not running or self._dispatch.clock() >= self._deadline

    def wait(self) -> None:
        """Block until the partitions are drained."""
        self._dispatch.wait_for_change(max(self._deadline - self._dispatch.clock(), 0), lambda: self.drained)

    def _finished(self) -> Mapping[Partition, Commit]:
        return uncommitted(self._leaving, self._dispatch.is_begun)
