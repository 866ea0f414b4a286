"""Subscription to topic patterns on librdkafka.

librdkafka has patterns of its own, but they cannot leave out the dead-letter topics, and their syntax differs from the
patterns of kafka-python. So this module looks up all topics regularly, and subscribes to the names that match.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from confluent_kafka import KafkaException

from kser.consumer.subscription import PATTERN_INTERVAL, Subscription
from kser.escaping import escape_lines

logger = escape_lines(logging.getLogger(__name__))

#: Timeout in seconds of a lookup of all topics. It is short, because the client thread cannot poll meanwhile.
LOOKUP_TIMEOUT = 2.0
#: Seconds between two lookups until the first lookup succeeds.
FIRST_INTERVAL = 1.0


class PatternFollower:
    """Keeps the topics of a client equal to the topics that match a subscription.

    :param client: the client of librdkafka.
    :param subscription: a subscription with patterns.
    :param subscribe: subscribes the client to names of topics.
    :param servers: the bootstrap servers.
    """

    def __init__(
        self, client: Any, subscription: Subscription, subscribe: Callable[[list[str]], Any], servers: str
    ) -> None:
        self._client = client
        self._subscription = subscription
        self._subscribe = subscribe
        self._servers = servers
        self._followed: list[str] | None = None
        self._due_at = 0.0

    def follow(self) -> None:
        """Look up the topics if a lookup is due, and subscribe to the matching topics if they have changed.

        If no broker responds, the topics stay unchanged until the next lookup.
        """
        if time.monotonic() < self._due_at:
            return
        self._due_at = time.monotonic() + (FIRST_INTERVAL if self._followed is None else PATTERN_INTERVAL)
        try:
            topics = self._client.list_topics(timeout=LOOKUP_TIMEOUT).topics
        except KafkaException:
            return
        self._due_at = time.monotonic() + PATTERN_INTERVAL
        matching = self._subscription.matching(topics)
        if matching == self._followed:
            return
        self._followed = matching
        if matching:
            self._subscribe(matching)
        else:
            self._client.unsubscribe()
            logger.warning(self._subscription.unmatched_text(self._servers))
