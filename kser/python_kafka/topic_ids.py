"""The ids of topics, which tell a topic from an earlier topic with the same name, for kafka-python 2 and 3."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from kafka import KafkaConsumer
from kafka.errors import KafkaError

from kser.python_kafka.rebalances import ASYNC

if not ASYNC:
    from kser.python_kafka.metadata_request import topic_id_request, topic_ids_of

#: Timeout in milliseconds of a request for which the caller waits.
FETCH_TIMEOUT_MS = 2000

#: Milliseconds after which the caller tries again to send the request, while a connection is being made.
READY_INTERVAL_MS = 50


class TopicIds:
    """The ids of the topics of a consumer.

    :param client: the Kafka client.
    :param interval: seconds between two requests.
    """

    def __init__(self, client: KafkaConsumer, interval: float) -> None:
        self._client = client
        self._interval = interval
        self._request_at = 0.0
        #: kafka-python 3: the ids that :meth:`poll` has returned. kafka-python 2: the response that is awaited.
        self._seen: Any = None

    def poll(self, topics: set[str]) -> dict[str, bytes]:
        """Return the ids that have arrived, and request them if a request is due. Unknown ids are missing."""
        if topics and time.monotonic() >= self._request_at:
            self._request_at = time.monotonic() + self._interval
            self._request(topics)
        return self._new_ids()

    def fetch(self, topics: set[str]) -> dict[str, bytes]:
        """Request the ids of topics, and wait for the response up to ``FETCH_TIMEOUT_MS``."""
        if not topics:
            return {}
        network = self._client._client
        if ASYNC:
            response = network.cluster.request_update()
            with suppress(KafkaError):
                self._client._net.run(self._client._manager.wait_for, response, FETCH_TIMEOUT_MS)
            return self._new_ids()
        deadline = time.monotonic() + FETCH_TIMEOUT_MS / 1000
        # The connection to the node may not be ready yet, or may break.
        while (left := (deadline - time.monotonic()) * 1000) > 0:
            self._seen = None
            if not self._request(topics):
                break
            network.poll(timeout_ms=left if self._seen is not None else min(left, READY_INTERVAL_MS), future=self._seen)
            if self._seen is not None and self._seen.succeeded():
                break
        return self._new_ids()

    def at_start(self, topics: set[str]) -> dict[str, bytes]:
        """Return the ids of topics whose partitions start, and let the next poll request them again.

        kafka-python 3 knows the ids, because they are part of its metadata. With kafka-python 2, wait for the response.
        """
        ids = self._new_ids() if ASYNC else self.fetch(topics)
        self._request_at = 0.0
        return ids

    def _request(self, topics: set[str]) -> bool:
        """Request the ids of topics if a node is ready; return False if the brokers know no ids."""
        network = self._client._client
        if ASYNC:
            network.cluster.request_update()
            return True
        request = topic_id_request(network.get_api_versions(), topics)
        if request is None:
            return False
        node = network.least_loaded_node()
        if node is not None and network.ready(node):
            self._seen = network.send(node, request)
        else:
            self._request_at = 0.0
        return True

    def _new_ids(self) -> dict[str, bytes]:
        if ASYNC:
            ids = getattr(self._client._client.cluster, "_topic_ids", {})
            if ids is self._seen:
                return {}
            self._seen = ids
            return {topic: topic_id.bytes for topic, topic_id in dict(ids).items() if topic and topic_id.int}
        response, self._seen = self._seen, None
        if response is None or not response.is_done:
            self._seen = response
            return {}
        return topic_ids_of(response.value) if response.succeeded() else {}
