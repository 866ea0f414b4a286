"""The errors of a consumer's client: what librdkafka reports, what it only logs, and what a probe finds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

from confluent_kafka import KafkaError, KafkaException

from kser.confluent.group_errors import has_joined, is_fatal, recovery_from
from kser.confluent.logs import ClientLog
from kser.confluent.options import connection_of
from kser.connection import FailureLog, explain, partial_failure_text
from kser.consumer.client import client_error, denied_topics, joined_errors, missing_topics
from kser.consumer.recoveries import as_recovery
from kser.errors import ClientError
from kser.escaping import escape_lines

logger = escape_lines(logging.getLogger(__name__.rpartition(".")[0] + ".client"))

#: Timeout in seconds of the metadata request that probes the brokers after an outage.
PROBE_TIMEOUT = 0.5

#: Seconds between two probes.
PROBE_INTERVAL = 2.0

#: Errors that do not name their cause.
_WITHOUT_CAUSE = (KafkaError._ALL_BROKERS_DOWN, KafkaError._TIMED_OUT, KafkaError._TRANSPORT)


class ClientErrors:
    """The current errors of one client.

    :param options: the options of the client.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.connection = connection_of(options)
        #: The logger for the lines of librdkafka.
        self.log = ClientLog()
        #: The client; the caller sets it after it has created the client with :meth:`on_error` as ``error_cb``.
        self.client: Any = None
        #: The error after which librdkafka never works again; librdkafka reports its cause only once.
        self.fatal: KafkaError | None = None
        self._instance = options.get("group.instance.id")
        self._user_callback: Callable[[KafkaError], Any] | None = options.get("error_cb")
        self._last: KafkaError | None = None
        #: The topics that do not exist or must not be read, and the error of each.
        self._unavailable: dict[str, ClientError] = {}
        #: The error of a group that this client must not use.
        self._group_denied: ClientError | None = None
        self._failures = FailureLog()
        self._down = False
        self._probe_at = 0.0

    def on_error(self, error: KafkaError) -> None:
        """Record an error of the connections, and call the user's ``error_cb``. librdkafka calls this method."""
        if error.fatal() or error.code() in (KafkaError._AUTHENTICATION, KafkaError._ALL_BROKERS_DOWN):
            self._last = error
            self._down = True
        if self._user_callback is not None:
            self._user_callback(error)

    def note(self, error: KafkaError, topic: str | None = None) -> None:
        """Record an error that a poll returned. The next poll without records raises it.

        :param topic: the topic that the error is about, or None.
        """
        if is_fatal(error):
            self.fatal = error
        if topic is not None and error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            self._unavailable[topic] = missing_topics([topic], self.connection)
        elif topic is not None and error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
            self._unavailable[topic] = denied_topics([topic], self.connection)
        elif error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
            self._group_denied = self.as_client_error("join the group", error)
        else:
            self._last = error

    def on_assigned(self, topics: Collection[str]) -> None:
        """Forget errors of the group and of the topics, because the group has assigned partitions of these topics."""
        self._group_denied = None
        for topic in topics:
            self._unavailable.pop(topic, None)

    def current(self, *, has_partitions: bool) -> ClientError | None:
        """Return the current error. After an outage, the error is cleared only when a broker responds."""
        error = self._last
        if error is None:
            return self._group_denied or self._unavailable_topics(has_partitions=has_partitions)
        if not self._down or is_fatal(error):
            self._last = None
        elif self.broker_responds():
            self._last = None
            self._down = False
            self.log.failure.clear()
            return None
        return self.as_client_error("fetch messages", error)

    def warn_of_partial_failure(self) -> None:
        """Log connections to single brokers that fail for a while, although the client can use other brokers."""
        reason = self.log.failure.persistent_reason()
        if reason and self._failures.is_due(explain(reason, self.connection).kind):
            logger.warning(partial_failure_text(reason, self.connection))

    def broker_responds(self) -> bool:
        """Return whether a broker responds.

        After a failed probe, the next probe follows at least ``PROBE_INTERVAL`` seconds later.
        """
        if time.monotonic() < self._probe_at:
            return False
        try:
            self.client.list_topics(timeout=PROBE_TIMEOUT)
        except KafkaException:
            self._probe_at = time.monotonic() + PROBE_INTERVAL
            return False
        return True

    def is_member(self) -> bool:
        """Return whether the client is a member of its group, and a broker responds."""
        return self.fatal is None and has_joined(self.client) and self.broker_responds()

    def as_client_error(self, action: str, error: KafkaError) -> ClientError:
        """Return an error of librdkafka in the form that makes the consumer recover from it.

        :param action: the purpose of the failed call as an infinitive, for example "fetch messages".
        """
        # These errors hide the cause, which librdkafka only logs.
        reason = self.log.failure.reason() if error.code() in _WITHOUT_CAUSE else ""
        problem = client_error(action, self.connection, reason or error.str())
        return as_recovery(problem, recovery_from(error), self._instance)

    def _unavailable_topics(self, *, has_partitions: bool) -> ClientError | None:
        """Return the error of a client without partitions whose topics do not exist or must not be read.

        A client with partitions only logs such topics, because it can consume the others.
        """
        if not self._unavailable:
            return None
        if has_partitions:
            for topic, problem in list(self._unavailable.items()):
                if self._failures.is_due(problem.kind) and not self._probe_topic(topic):
                    logger.error(f"{problem.message}; consuming the other topics meanwhile")
            return None
        if time.monotonic() >= self._probe_at:
            self._probe_at = time.monotonic() + PROBE_INTERVAL
            for topic in list(self._unavailable):
                self._probe_topic(topic)
            # The caller logs these errors, so do not log them again once the client has partitions.
            for problem in self._unavailable.values():
                self._failures.is_due(problem.kind)
        return joined_errors(list(self._unavailable.values()))

    def _probe_topic(self, topic: str) -> bool:
        """Return whether the topic can be read by now."""
        with suppress(KafkaException):
            if self.client.list_topics(topic, timeout=PROBE_TIMEOUT).topics[topic].error is None:
                self._unavailable.pop(topic, None)
                return True
        return False
