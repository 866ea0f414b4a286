"""The start positions of newly assigned partitions, in the three groups that the rebalance listener distinguishes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kser.consumer.client import Commit, Partition, RebalanceListener, no_committed_offset
from kser.consumer.commit_metadata import CommitMetadata, Validity


class StartPositions:
    """The start positions that a client has found.

    :param metadata: the metadata of the client's commits.
    :param reset: the reset policy: ``"earliest"``, ``"latest"`` or ``"none"``.
    :param commit: commits start positions; None if the client does not commit.
    """

    def __init__(
        self, metadata: CommitMetadata, reset: str, commit: Callable[[Mapping[Partition, Commit]], None] | None
    ) -> None:
        self._metadata = metadata
        self._reset = reset
        self._commit = commit
        #: Partitions that start at their committed offset.
        self.known: dict[Partition, Commit] = {}
        #: Partitions without a committed offset, and partitions whose committed offset or metadata is void.
        self.fresh: dict[Partition, Commit] = {}
        self._void: set[Partition] = set()

    def find(self, key: Partition, committed: Commit | None, first_position: Callable[[], Commit]) -> Commit:
        """Find the start position of a partition: its committed offset or, without one, as the reset policy demands.

        A position that is not the committed offset is committed at once.

        :param committed: the committed offset with its metadata in the form in which Kafka has stored it.
        :param first_position: returns the position that the reset policy demands.
        :raises kser.errors.ClientError: there is no committed offset, and the reset policy is ``"none"``.
        :raises Exception: the error of ``first_position``, or of the commit; the partition then has no start position.
        """
        start = None if committed is None else self._add_committed(key, committed)
        if start is None:
            if self._reset == "none":
                raise no_committed_offset([key])
            start = self._add_uncommitted(key, first_position())
        if key in self.fresh and self._commit is not None:
            try:
                self._commit({key: start})
            except Exception:
                del self.fresh[key]
                raise
        return start

    def _add_committed(self, key: Partition, committed: Commit) -> Commit | None:
        """Add a partition that has a committed offset.

        :return: the commit at which the partition starts, or None if the offset was committed for an earlier topic.
        """
        commit, validity = self._metadata.start_of(key, committed.offset, committed.metadata)
        is_new_topic = self._metadata.is_of_new_topic(key)
        if validity is Validity.VALID and not is_new_topic:
            self.known[key] = commit
            return commit
        self._void.add(key)
        if validity is Validity.OLD_TOPIC:
            return None
        self.fresh[key] = commit
        return commit

    def _add_uncommitted(self, key: Partition, start: Commit) -> Commit:
        """Add a partition without a committed offset that applies."""
        if self._metadata.is_of_new_topic(key):
            self._void.add(key)
        self.fresh[key] = start
        return start

    @property
    def all(self) -> dict[Partition, Commit]:
        """All start positions."""
        return {**self.known, **self.fresh}

    def report(self, listener: RebalanceListener) -> None:
        """Report the start positions to the listener."""
        for key in self.all:
            self._metadata.mark_started(key)
        listener.on_assign(self.known)
        # A client that never commits finds no committed offset when a partition is assigned to it again. So call
        # ``on_assign`` in this case: the listener still knows the finished offsets, and ``on_reset`` would discard
        # them.
        void = {key: start for key, start in self.fresh.items() if self._commit is not None or key in self._void}
        listener.on_reset(void)
        listener.on_assign({key: start for key, start in self.fresh.items() if key not in void})
