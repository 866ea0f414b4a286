"""Which offset may be committed: the one below which everything is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping

from kser.consumer.client import Partition, Record


class _Progress:
    """One partition: records that were handed out, in order, until all before them are done."""

    __slots__ = ("committed", "done", "following", "open")

    def __init__(self, first: int) -> None:
        self.open: deque[int] = deque()
        self.done: set[int] = set()
        self.following = self.committed = first

    @property
    def resume_at(self) -> int:
        """The lowest unfinished offset."""
        return self.open[0] if self.open else self.following


class OffsetTracker:
    """Follows the records of all partitions from being handed out to being done, in whatever order that happens."""

    def __init__(self) -> None:
        self._partitions: dict[Partition, _Progress] = {}

    def received(self, record: Record) -> None:
        """The record was handed out; within a partition that happens in order."""
        key = Partition(record.topic, record.partition)
        progress = self._partitions.get(key)
        if progress is None:
            # Looked at by the client's thread as soon as it is in its place.
            progress = _Progress(record.offset)
            self._partitions[key] = progress
        progress.open.append(record.offset)
        progress.following = record.offset + 1

    def done(self, record: Record) -> None:
        """The record need not be handed out again. A record of a partition that was forgotten is passed over."""
        progress = self._partitions.get(Partition(record.topic, record.partition))
        if progress is None:
            return
        progress.done.add(record.offset)
        while progress.open and progress.open[0] in progress.done:
            progress.done.remove(progress.open.popleft())

    def committable(self, among: Collection[Partition] | None = None) -> dict[Partition, int]:
        """Where each partition is to be resumed, for those where that has changed since the last commit.

        :param among: only look at these.
        """
        return {
            key: progress.resume_at
            for key, progress in list(self._partitions.items())
            if progress.resume_at != progress.committed and (among is None or key in among)
        }

    def resume_at(self, among: Collection[Partition]) -> dict[Partition, int]:
        """Where these partitions are to be resumed, for those of which records were handed out."""
        return {key: self._partitions[key].resume_at for key in among if key in self._partitions}

    def committed(self, offsets: Mapping[Partition, int]) -> None:
        """These offsets were committed."""
        for key, offset in offsets.items():
            if key in self._partitions:
                self._partitions[key].committed = offset

    def forget(self, partitions: Collection[Partition]) -> None:
        """These partitions are ours no longer."""
        for key in partitions:
            self._partitions.pop(key, None)
