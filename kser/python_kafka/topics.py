"""The topics that a consumer on kafka-python cannot read: missing topics, and topics that its user must not read."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from kafka import KafkaConsumer
from kafka.util import WeakMethod

from kser.connection import Connection
from kser.consumer.client import denied_topics, joined_errors, missing_topics
from kser.errors import ClientError


class _MetadataListener:
    """A listener that counts as equal to the listener that it replaces, so that kafka-python can remove it."""

    def __init__(self, replaced: Any, call: Callable[[Any], None]) -> None:
        self._replaced = replaced
        self._call = call

    def __call__(self, cluster: Any) -> None:
        self._call(cluster)

    def __hash__(self) -> int:
        return hash(self._replaced)

    def __eq__(self, other: object) -> bool:
        return other is self or bool(other == self._replaced)


class TopicAccess:
    """The topics that the brokers deny to a consumer.

    kafka-python neither joins the group nor updates its partitions while a single topic is denied, because its own
    listener for metadata raises an error then. So this class takes the place of that listener, notes the denied topics,
    and calls the listener as if there were none. The client then consumes the other topics.

    :param client: the Kafka client.
    """

    def __init__(self, client: KafkaConsumer) -> None:
        self._cluster = client._client.cluster
        self._coordinator = client._coordinator
        self._denied: set[str] = set()
        replaced = WeakMethod(self._coordinator._handle_metadata_update)
        self._cluster.remove_listener(replaced)
        self._cluster.add_listener(_MetadataListener(replaced, self._on_metadata))

    def problem(self, topics: Collection[str], connection: Connection) -> ClientError | None:
        """Return the error for the topics that the client knows no partition of; None if there are none."""
        # Ask the cache of the client, because ``KafkaConsumer.partitions_for_topic`` would request all topics.
        absent = {topic for topic in topics if not self._cluster.partitions_for_topic(topic)}
        problems = []
        if denied := absent & self._denied:
            problems.append(denied_topics(denied, connection))
        if missing := absent - denied:
            problems.append(missing_topics(missing, connection))
        return joined_errors(problems)

    def _on_metadata(self, cluster: Any) -> None:
        self._denied = set(cluster.unauthorized_topics)
        cluster.unauthorized_topics = set()
        self._coordinator._handle_metadata_update(cluster)
