"""Queries of a kafka-python client for offsets: committed offsets, and the first and last offsets of partitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import LeaderNotAvailableError

from kser.consumer.client import Commit, Partition
from kser.consumer.commit_metadata import CommitMetadata
from kser.python_kafka.metadata import partitions_of

#: Timeout in milliseconds of a query for committed offsets, or for the first and last offset of a partition.
QUERY_TIMEOUT_MS = 5000


class OffsetQueries:
    """The queries of one client. Each method raises ``kafka.errors.KafkaError`` if the query fails.

    :param client: the Kafka client.
    :param reset: where a partition without a committed offset starts: ``"earliest"``, ``"latest"`` or ``"none"``.
    :param metadata: the metadata of the client's commits.
    """

    def __init__(self, client: KafkaConsumer, reset: str, metadata: CommitMetadata) -> None:
        self._client = client
        self._reset = reset
        self._metadata = metadata

    def committed(self, tp: TopicPartition) -> Commit | None:
        """Return the committed offset with its metadata in the form in which Kafka has stored it."""
        committed = self._client.committed(tp, metadata=True, timeout_ms=QUERY_TIMEOUT_MS)
        return None if committed is None else Commit(committed.offset, committed.metadata or "")

    def first_position(self, tp: TopicPartition) -> Commit:
        """Return the start position of a partition without a committed offset."""
        at_end = self._reset == "latest" and not self._was_added(tp)
        return Commit((self.ends if at_end else self.beginnings)([tp])[tp])

    def beginnings(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        """Return the first offset of each partition."""
        # In kafka-python 2, ``KafkaConsumer.beginning_offsets`` accepts no timeout and can block for minutes.
        return self._ask(self._client._fetcher.beginning_offsets, partitions)

    def ends(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        """Return the offset after the last record of each partition."""
        return self._ask(self._client._fetcher.end_offsets, partitions)

    def _ask(self, query: Callable[..., Any], partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        try:
            return dict(query(partitions, timeout_ms=QUERY_TIMEOUT_MS))
        except AttributeError as error:
            if error.name != "invalid_metadata":
                raise
            # kafka-python 2 raises this error if a broker does not lead some of the partitions, for example directly
            # after their topic was created.
            self._client._client.cluster.request_update()
            names = ", ".join(f"{tp.topic}[{tp.partition}]" for tp in partitions)
            raise LeaderNotAvailableError(f"a broker does not lead all of these partitions: {names}") from error

    def _was_added(self, tp: TopicPartition) -> bool:
        numbers = partitions_of(self._client, tp.topic) or {tp.partition}
        # One request for all partitions, because ``KafkaConsumer.committed`` reads one partition in each request, and a
        # topic with hundreds of partitions would take minutes.
        commits = self._client._coordinator.fetch_committed_offsets(
            [TopicPartition(tp.topic, number) for number in sorted(numbers)], timeout_ms=QUERY_TIMEOUT_MS
        )
        for key, commit in commits.items():
            self._metadata.restore(Partition(*key), commit.offset, commit.metadata or "")
        return self._metadata.partition_counts.is_new_partition(Partition(*tp))
