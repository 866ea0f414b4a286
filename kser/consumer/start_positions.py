"""The start positions of newly assigned partitions, in the three groups that the rebalance listener distinguishes."""

from __future__ import annotations

from kser.consumer.client import Commit, Partition, RebalanceListener
from kser.consumer.commit_metadata import CommitMetadata, Validity


class StartPositions:
    """The start positions that a client has found.

    :param metadata: the metadata of the client's commits.
    """

    def __init__(self, metadata: CommitMetadata) -> None:
        self._metadata = metadata
        #: Partitions that start at their committed offset.
        self.known: dict[Partition, Commit] = {}
        #: Partitions without a committed offset, and partitions whose committed offset or metadata is void.
        self.fresh: dict[Partition, Commit] = {}
        self._void: set[Partition] = set()

    def add_committed(self, key: Partition, offset: int, written: str) -> Commit | None:
        """Add a partition that has a committed offset.

        :param written: the metadata in the form in which Kafka has stored it.
        :return: the commit at which the partition starts, or None if the offset was committed for an earlier topic.
            The caller must commit the offset if the partition is in :attr:`fresh`.
        """
        commit, validity = self._metadata.start_of(key, offset, written)
        is_new_topic = self._metadata.is_of_new_topic(key)
        if validity is Validity.VALID and not is_new_topic:
            self.known[key] = commit
            return commit
        self._void.add(key)
        if validity is Validity.OLD_TOPIC:
            return None
        self.fresh[key] = commit
        return commit

    def add_uncommitted(self, key: Partition, start: Commit) -> None:
        """Add a partition without a committed offset that applies."""
        if self._metadata.is_of_new_topic(key):
            self._void.add(key)
        self.fresh[key] = start

    def drop(self, key: Partition) -> None:
        """Remove a partition whose start position could not be committed."""
        self.fresh.pop(key, None)

    @property
    def all(self) -> dict[Partition, Commit]:
        """All start positions."""
        return {**self.known, **self.fresh}

    def report(self, listener: RebalanceListener, *, can_commit: bool) -> None:
        """Report the start positions to the listener."""
        for key in self.all:
            self._metadata.mark_started(key)
        listener.on_assign(self.known)
        # A client that never commits finds no committed offset when a partition is assigned to it again. So call
        # ``on_assign`` in this case: the listener still knows the finished offsets, and ``on_reset`` would discard
        # them.
        void = {key: start for key, start in self.fresh.items() if can_commit or key in self._void}
        listener.on_reset(void)
        listener.on_assign({key: start for key, start in self.fresh.items() if key not in void})
