"""The health check of a consumer's client, because kafka-python retries many errors without a report."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

from kafka import KafkaConsumer, errors
from kafka.errors import KafkaError

from kser.connection import FailureLog, explain, partial_failure_text
from kser.consumer.client import client_error, denied_topics
from kser.consumer.recoveries import as_recovery
from kser.consumer.subscription import Subscription
from kser.errors import ClientError
from kser.escaping import escape_lines
from kser.python_kafka.group_errors import recovery_from
from kser.python_kafka.logs import lines_of
from kser.python_kafka.options import connection_of
from kser.python_kafka.topics import TopicAccess

logger = escape_lines(logging.getLogger(__name__.rpartition(".")[0] + ".client"))

#: Timeout in milliseconds of the query that checks whether the group coordinator responds.
PROBE_TIMEOUT_MS = 1000
#: Seconds between two health checks of the topics and of the group coordinator, while no records arrive.
HEALTH_CHECK_INTERVAL = 5.0


class HealthCheck:
    """The health check of one client: its connections, its topics and its group.

    :param client: the client.
    :param subscription: the topics that the client consumes.
    :param has_group: whether the client commits offsets in a group.
    """

    def __init__(self, client: KafkaConsumer, subscription: Subscription, *, has_group: bool) -> None:
        self._client = client
        self._subscription = subscription
        self._has_group = has_group
        self._topics = sorted(subscription.names)
        self._connection = connection_of(client.config)
        self._lines = lines_of(client)
        self._access = TopicAccess(client)
        self._is_unmatched = False
        self._topic_failures = FailureLog()
        self._partial_failures = FailureLog()
        self._error: ClientError | None = None
        self._check_at = time.monotonic() + HEALTH_CHECK_INTERVAL

    def succeed(self) -> None:
        """Postpone the next check, because records arrived."""
        self._check_at = time.monotonic() + HEALTH_CHECK_INTERVAL
        self._error = None
        self._lines.failure.clear()

    def run(self) -> None:
        """Check for missing topics and unreachable brokers, if a check is due.

        :raises kser.errors.ClientError: the last check found an error.
        """
        if (unconnected := self._unconnected()) is not None:
            raise unconnected
        if time.monotonic() >= self._check_at:
            self._check_at = time.monotonic() + HEALTH_CHECK_INTERVAL
            try:
                self._error = self._check_topics() or self._check_group()
            except KafkaError as error:
                self._error = as_client_error(self._client, "fetch messages", error)
            reason = "" if self._error else self._lines.failure.persistent_reason()
            if reason and self._partial_failures.is_due(explain(reason, self._connection).kind):
                logger.warning(partial_failure_text(reason, self._connection))
        if self._error is not None:
            raise self._error

    def _unconnected(self) -> ClientError | None:
        """Return the error of a client that has not reached a broker yet."""
        reason = self._lines.failure.reason()
        if not reason or self._client._client.cluster._last_successful_refresh_ms:
            return None
        return client_error("fetch messages", self._connection, reason)

    def _check_topics(self) -> ClientError | None:
        self._report_unmatched_patterns()
        consumed: Collection[str] = {tp.topic for tp in self._client.assignment()}
        problem = self._access.problem([topic for topic in self._topics if topic not in consumed], self._connection)
        if problem is None or not consumed:
            self._topic_failures.succeed()
            return problem and (self._unconnected() or problem)
        if self._topic_failures.is_due(problem.kind):
            logger.error(f"{problem.message}; consuming the other topics meanwhile")
        return None

    def _report_unmatched_patterns(self) -> None:
        """Log once that the patterns match no topic."""
        if not self._subscription.patterns:
            return
        was_unmatched, self._is_unmatched = self._is_unmatched, not self._client.subscription()
        if self._is_unmatched and not was_unmatched:
            logger.warning(self._subscription.unmatched_text(self._connection.servers))

    def _check_group(self) -> ClientError | None:
        """Query a committed offset, to check that the group coordinator responds."""
        tp = next(iter(self._client.assignment()), None)
        if tp is None or not self._has_group:
            return None
        try:
            self._client.committed(tp, timeout_ms=PROBE_TIMEOUT_MS)
        except KafkaError as error:
            return as_client_error(self._client, "fetch messages", error)
        return None


def as_client_error(client: KafkaConsumer, action: str, error: KafkaError) -> ClientError:
    """Return an error of kafka-python in the form that makes the consumer recover from it.

    :param action: the purpose of the failed call as an infinitive, for example "fetch messages".
    """
    connection = connection_of(client.config)
    if isinstance(error, errors.TopicAuthorizationFailedError) and error.args:
        topics = error.args[0]
        return denied_topics([topics] if isinstance(topics, str) else topics, connection)
    # The text of a timeout does not name the cause, which the client only logs.
    is_timeout = isinstance(error, errors.KafkaTimeoutError)
    has_text = any(error.args) or isinstance(error, errors.BrokerResponseError)
    logged = "" if has_text and not is_timeout else lines_of(client).failure.reason()
    reason = logged or (error if has_text else "the request timed out")
    problem = client_error(action, connection, reason)
    return as_recovery(problem, recovery_from(error), client.config["group_instance_id"])
