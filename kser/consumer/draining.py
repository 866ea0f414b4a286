"""Partitions on their way out: until what runs of them has ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kser.consumer.client import Commit, Partition
from kser.consumer.offsets import Progress, uncommitted

if TYPE_CHECKING:
    from kser.consumer.dispatch import Dispatch


class Draining:
    """Partitions that are to be given up, until what runs of them has ended or the time is over."""

    def __init__(self, dispatch: Dispatch, leaving: Mapping[Partition, Progress], deadline: float) -> None:
        self._dispatch = dispatch
        self._leaving = leaving
        self._deadline = deadline
        #: What is to be committed once they are drained.
        self.commits: Callable[[], Mapping[Partition, Commit]] = self._finished

    @property
    def drained(self) -> bool:
        """Whether nothing of them runs any more, or no more time is left for it."""
        running = self._dispatch.is_running(list(self._leaving.values()))
        return not running or self._dispatch.clock() >= self._deadline

    def wait(self) -> None:
        """Return once they are drained."""
        self._dispatch.wait_for_change(max(self._deadline - self._dispatch.clock(), 0), lambda: self.drained)

    def _finished(self) -> Mapping[Partition, Commit]:
        return uncommitted(self._leaving, self._dispatch.is_begun)
