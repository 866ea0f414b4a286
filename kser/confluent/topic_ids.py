"""The ids of topics, which tell a topic from an earlier topic with the same name.

librdkafka's consumer knows the ids and does not return them, so this module asks with an admin client. Rebalance
callbacks use the same admin client to read metadata.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

from confluent_kafka import TopicCollection
from confluent_kafka.admin import AdminClient

from kser.confluent.options import CONSUMER_ONLY, PRODUCER_ONLY

#: Timeout in seconds of a request for the ids of topics.
REQUEST_TIMEOUT = 2.0

#: Seconds in which no call waits for ids, after a request without a response.
SILENCE = 60.0

#: Options that the admin client does not get: the callbacks and the logger of the user belong to the consumer.
_CONSUMER_CALLBACKS = frozenset(("error_cb", "stats_cb", "throttle_cb", "statistics.interval.ms", "logger", "debug"))

_silent = logging.Logger("kser-topic-ids", logging.CRITICAL + 1)


class TopicIds:
    """The ids of the topics of a consumer.

    :param options: the user's options of librdkafka.
    :param interval: seconds between two requests while partitions are assigned.
    """

    def __init__(self, options: Mapping[str, Any], interval: float) -> None:
        foreign = CONSUMER_ONLY | PRODUCER_ONLY | _CONSUMER_CALLBACKS
        self._options = {key: value for key, value in options.items() if key not in foreign} | {"log_level": 0}
        self._interval = interval
        self._admin: AdminClient | None = None
        self._requested: dict[str, Future[Any]] = {}
        self._request_at = 0.0
        #: The time until which no call waits for ids. Brokers before Kafka 2.8 have no topic ids, and each call would
        #: wait in the client thread; a busy broker responds later.
        self._silent_until = 0.0

    def fetch(self, topics: Collection[str]) -> dict[str, bytes]:
        """Request the ids of topics and return them; unknown ids are missing in the result.

        Block at most :data:`REQUEST_TIMEOUT` seconds, and not at all if a request had no response within the last
        :data:`SILENCE` seconds.
        """
        self._request(topics)
        if time.monotonic() >= self._silent_until and wait(self._requested.values(), REQUEST_TIMEOUT).not_done:
            self._silent_until = time.monotonic() + SILENCE
        return self._results()

    def poll(self, topics: Collection[str]) -> dict[str, bytes]:
        """Return the ids that have arrived, and request them again if a request is due."""
        results = self._results()
        if topics and time.monotonic() >= self._request_at:
            self._request(topics)
        return results

    def describe(self, topic: str, timeout: float) -> Any:
        """Return the metadata of a topic and the id of the cluster, as ``list_topics`` of the client does.

        A rebalance callback must not call ``list_topics`` of its own client. After such a call, the next callback in
        the same poll, for example for a log line, aborts the process.

        :raises confluent_kafka.KafkaException: no broker responds in time.
        """
        return self._client().list_topics(topic, timeout=timeout)

    def close(self) -> None:
        """Close the connection to the brokers."""
        self._admin = None

    def _client(self) -> AdminClient:
        if self._admin is None:
            self._admin = AdminClient(self._options, logger=_silent)
        return self._admin

    def _request(self, topics: Collection[str]) -> None:
        self._request_at = time.monotonic() + self._interval
        # Any error leaves the ids unknown, and the next request follows.
        with suppress(Exception):
            admin = self._client()
            admin.poll(0)
            self._requested = admin.describe_topics(TopicCollection(sorted(topics)), request_timeout=REQUEST_TIMEOUT)

    def _results(self) -> dict[str, bytes]:
        results: dict[str, bytes] = {}
        for topic, future in list(self._requested.items()):
            if future.done():
                del self._requested[topic]
                with suppress(Exception):
                    results[topic] = _as_bytes(future.result().topic_id)
        return {topic: topic_id for topic, topic_id in results.items() if any(topic_id)}


def _as_bytes(topic_id: Any) -> bytes:
    parts = topic_id.get_most_significant_bits(), topic_id.get_least_significant_bits()
    return b"".join((part & (1 << 64) - 1).to_bytes(8, "big") for part in parts)
