"""Producer on confluent-kafka. It has the same interface as the producer of ``kser.confluent`` in kser 0.8.27."""

from __future__ import annotations

import collections
import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import confluent_kafka
from cdumay_result import Result
from confluent_kafka import KafkaError, KafkaException

from kser import signals
from kser.config import CONFIG, Settings
from kser.confluent.delivery_reports import (
    MAX_POLL,
    DeliveryWaiter,
    LastError,
    Waiter,
    guarded,
    report_error,
)
from kser.confluent.logs import ClientLog
from kser.confluent.options import connect, connection_of, options_for, required_acks, with_defaults
from kser.confluent.producer_client import PURGED, ProducerClient
from kser.connection import UNREACHABLE, FailureLog
from kser.controller import connect_if_due
from kser.escaping import escape_lines
from kser.forks import ProcessClient, keep_for_ever, renew_after_fork
from kser.limits import limits_of
from kser.producer import (
    Bulk,
    HeaderList,
    KafkaProducerBase,
    KeyFunction,
    record_options,
    rejected_as_too_large,
    size_of,
    time_left,
)
from kser.schemas import Message

logger = escape_lines(logging.getLogger(__name__))

#: Timeout in seconds of the metadata lookup for a topic that is new to the client.
MAX_BLOCK = 5.0
#: Seconds between two metadata requests for an unknown topic. A topic that was just created appears with a delay.
TOPIC_POLL_INTERVAL = 0.1
#: Seconds that ``close`` waits for the confirmation of sent messages.
CLOSE_TIMEOUT = 0.5
#: librdkafka's default of ``message.max.bytes``.
MESSAGE_MAX_BYTES = 1_000_000
#: Number of messages that ``bulk_send`` sends between two reads of delivery reports.
CHUNK = 500
#: Number of messages that ``bulk_send`` may send without a confirmation before it waits for delivery reports.
MAX_IN_FLIGHT = 20_000

_UNKNOWN_TOPIC = (KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_OR_PART)
_NOT_READY = (*_UNKNOWN_TOPIC, KafkaError.LEADER_NOT_AVAILABLE)
#: Errors about the record itself, which every further send of the record would cause again.
_REJECTIONS = (
    KafkaError._INVALID_ARG,
    KafkaError.TOPIC_EXCEPTION,
    KafkaError.RECORD_LIST_TOO_LARGE,
    KafkaError.INVALID_TIMESTAMP,
    KafkaError.UNSUPPORTED_FOR_MESSAGE_FORMAT,
    KafkaError.POLICY_VIOLATION,
    KafkaError.INVALID_RECORD,
)


class Producer(KafkaProducerBase):
    """A producer on ``confluent_kafka.Producer`` that checks the delivery of every message.

    Threads can and should share a producer, because each producer has its own connection to every broker. The defaults
    are ``acks`` ``all``, ``enable.idempotence`` true, ``linger.ms`` 0 (messages are sent immediately),
    ``max.in.flight.requests.per.connection`` 1 (with more requests, librdkafka loses a message if its partition has a
    new leader, and this producer then reports it as not confirmed) and ``partitioner`` ``murmur2_random``, which
    assigns keys to partitions like the Java client and kafka-python.

    :param config: options of librdkafka; None means the producer options in ``KSER_CONFIG``.
    :param app: a Flask application; its ``config`` has precedence over the environment.
    :raises kser.errors.SettingError: an option is unknown or invalid.
    """

    _kser_size_option = "message.max.bytes"

    def __init__(self, config: Mapping[str, Any] | None = None, *, app: Any = None) -> None:
        options = with_defaults(options_for("producer", config, Settings.of(app)))
        self._kser_limits = limits_of(app)
        self._kser_connection = connection_of(options)
        self._kser_servers = self._kser_connection.servers
        self._kser_log = ClientLog()
        self._kser_failures = FailureLog()
        self._kser_last_error = LastError(options.get("error_cb"))
        options |= {name: guarded(options[name]) for name in ("stats_cb", "throttle_cb") if options.get(name)}
        self._kser_topics: set[str] = set()
        self._kser_closed = False
        self._kser_has_offsets = required_acks(options) != "0"
        self._kser_options = {**options, "error_cb": self._kser_last_error}
        self._kser_size_limit = int(options.get(self._kser_size_option, MESSAGE_MAX_BYTES))
        connect_if_due(self)
        renew_after_fork(self)

    def _kser_connect(self) -> ProducerClient:
        self._kser_check_open()
        keywords: dict[str, Any] = {} if "logger" in self._kser_options else {"logger": self._kser_log}
        return ProducerClient(connect(confluent_kafka.Producer, self._kser_options, **keywords))

    _kser_client: Any = ProcessClient(_kser_connect)

    @property
    def client(self) -> Any:
        """The client of librdkafka. A forked process creates its own at its first send.

        The producer replaces a client in a fatal state.
        """
        return self._kser_client.client

    def _kser_renew_after_fork(self) -> None:
        if (inherited := vars(self).pop("_kser_client", None)) is not None:
            keep_for_ever(inherited.client)

    def _kser_ensure_connected(self) -> None:
        _ = self._kser_client

    def _kser_usable_client(self) -> ProducerClient:
        self._kser_replace_fatal_client()
        usable: ProducerClient = self._kser_client
        return usable

    def _kser_is_fatal(self) -> bool:
        current = vars(self).get("_kser_client")
        return current is not None and bool(current.fatal.reason)

    def _kser_drop_client(self) -> None:
        current = vars(self).get("_kser_client")
        if not self._kser_closed and current is not None and vars(Producer)["_kser_client"].drop(self, current):
            current.abandon(CLOSE_TIMEOUT)

    def _kser_new_bulk(self, topic: str, timeout: float, key: KeyFunction | None) -> Bulk:
        return _Bulk(self, topic, timeout, key)

    def close(self) -> None:
        if self._kser_closed:
            return
        self._kser_closed = True
        if (current := vars(self).get("_kser_client")) is None:
            return
        current.poller.close()
        client = current.client
        try:
            left = client.flush(CLOSE_TIMEOUT)
        except KafkaException as error:
            # The client reports its fatal error. It delivers nothing any more.
            current.fatal.note(error.args[0])
            left = len(client)
        if left:
            logger.warning(
                f"{type(self).__name__}: closed before all messages were delivered to {self._kser_servers}:"
                f" {left} not confirmed"
            )
            # Purge the queue, because librdkafka would retry these messages as long as the client object exists.
            client.purge()
            current.fatal.poll(0)
        # Older versions of confluent-kafka have no ``close``. They close their connections when the client is
        # garbage-collected.
        if hasattr(client, "close"):
            client.close()

    def _kser_check_open(self) -> None:
        if self._kser_closed:
            raise KafkaException("This producer is closed: create a new one")

    def _kser_deliver(
        self, topic: str, value: bytes | None, key: bytes | None, headers: HeaderList, deadline: float
    ) -> None:
        delivery = DeliveryWaiter(has_offset=self._kser_has_offsets)
        began = time.monotonic()
        client = self._kser_usable_client()
        with client.poller:
            self._kser_enqueue(client, topic, value, record_options(key, headers), delivery, deadline)
            client.poller.wait(delivery, deadline)
        if not delivery.done():
            raise self._kser_unconfirmed_error(began)
        if delivery.error is not None:
            size = size_of(value, key, headers)
            error = self._kser_undelivered_error(client, delivery.error, topic, size, began)
            raise error from KafkaException(delivery.error)

    def _kser_deliver_nowait(
        self, topic: str, value: bytes | None, deadline: float, on_delivered: Callable[[Exception | None], None]
    ) -> None:
        began = time.monotonic()
        client = self._kser_usable_client()
        size = len(value or b"")

        def report(error: Any, record: Any) -> None:
            error = report_error(error, record, has_offset=self._kser_has_offsets)
            on_delivered(None if error is None else self._kser_undelivered_error(client, error, topic, size, began))

        self._kser_enqueue(client, topic, value, {}, report, deadline)
        # Read the delivery reports of earlier messages here, because the housekeeping thread reads them only once a
        # second.
        client.poller.poll()

    def _kser_success_result(self, topic: str, kmsg: Message, timeout: float) -> Result:
        return Result(uuid=kmsg.uuid, stdout=f"Message {kmsg.entrypoint}[{kmsg.uuid}] sent")

    def _kser_enqueue(
        self,
        client: ProducerClient,
        topic: str,
        value: bytes | None,
        options: Mapping[str, Any],
        on_delivery: Callable[[Any, Any], None],
        deadline: float,
    ) -> None:
        """Queue a record in the client, after waiting for the topic's metadata and for space in the queue."""
        self._kser_check_open()
        size = self._kser_size_checked(value, options)
        if topic not in self._kser_topics:
            self._kser_look_up_topic(client, topic, deadline)
        while True:
            try:
                client.client.produce(topic, value, on_delivery=on_delivery, **options)
                return
            except KafkaException as error:
                raise self._kser_rejected_error(client, error.args[0], topic, size) from error
            except BufferError as error:
                left = time_left(deadline)
                if not left:
                    raise KafkaException(
                        f"The client's queue is full of messages that {self._kser_servers} did not confirm yet:"
                        f" send slower, or raise 'queue.buffering.max.messages' in {CONFIG}"
                    ) from error
            if not client.poller.poll(min(left, MAX_POLL)):
                time.sleep(min(left, MAX_POLL / 10))

    def _kser_look_up_topic(self, client: ProducerClient, topic: str, deadline: float) -> None:
        """Check that the topic exists.

        Without this check, librdkafka would keep a message for a missing topic for half a minute before it reports the
        error.
        """
        began = time.monotonic()
        lookup_deadline = min(deadline, began + MAX_BLOCK)
        request_timeout = 1.0
        topic_error: Any = None
        while left := time_left(lookup_deadline):
            try:
                # Start with a short timeout, because signal handlers do not run while the request waits for a response.
                timeout = max(min(left, request_timeout), 0.001)
                topic_error = client.client.list_topics(topic, timeout=timeout).topics[topic].error
            except KafkaException as error:
                self._kser_last_error.remember(error.args[0])
                request_timeout *= 2
                continue
            if topic_error is None:
                self._kser_topics.add(topic)
                return
            if topic_error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
                raise KafkaException(self._kser_denied_text(topic))
            if topic_error.code() not in _NOT_READY:
                text = f"{topic_error.str()}: topic {topic!r} at {self._kser_servers}"
                raise KafkaException(text) from KafkaException(topic_error)
            time.sleep(min(TOPIC_POLL_INTERVAL, time_left(lookup_deadline)))
        if topic_error is not None:
            raise KafkaException(self._kser_missing_topic_text(topic))
        client.poller.poll()
        raise KafkaException(self._kser_unreachable_text(began))

    def _kser_unreachable_text(self, began: float) -> str:
        failure = self._kser_unreachable(self._kser_log.failure.reason())
        if self._kser_failures.is_due(failure.kind):
            logger.error(f"{type(self).__name__}: {failure.text}")
        # The text of these kinds does not contain the error of the client.
        cause = self._kser_last_text(began) if failure.kind in UNREACHABLE else ""
        return f"{failure.text}{cause}"

    def _kser_last_text(self, began: float) -> str:
        return self._kser_connection.secrets.hide(self._kser_last_error.text_since(began))

    def _kser_is_rejection(self, error: Exception) -> bool:
        cause = error.__cause__
        if isinstance(cause, KafkaException) and isinstance(cause.args[0], KafkaError):
            return cause.args[0].code() in _REJECTIONS
        return super()._kser_is_rejection(error)

    def _kser_unconfirmed_error(self, began: float) -> KafkaException:
        return KafkaException(
            f"{self._kser_servers} did not confirm the message, which may still arrive: check that the brokers"
            f" run there, or correct 'bootstrap.servers' in {CONFIG}{self._kser_last_text(began)}"
        )

    def _kser_rejected_error(self, client: ProducerClient, error: KafkaError, topic: str, size: int) -> Exception:
        """Return the error of a record that the client rejected."""
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            return self._kser_too_large_error(size)
        if error.code() == KafkaError._FATAL:
            client.fatal.note(error)
            # The client reports the cause to the next poll.
            client.poller.poll()
            return self._kser_fatal_error(client, topic)
        return KafkaException(f"{error.str()}: topic {topic!r} at {self._kser_servers}")

    def _kser_fatal_error(self, client: ProducerClient, topic: str) -> KafkaException:
        return KafkaException(
            f"{client.fatal.reason}: topic {topic!r} at {self._kser_servers}; kser replaces the client before a later"
            " send"
        )

    def _kser_undelivered_error(
        self, client: ProducerClient, error: KafkaError, topic: str, size: int, began: float
    ) -> Exception:
        """Return the error of a failed delivery report."""
        if error.code() == KafkaError.MSG_SIZE_TOO_LARGE:
            return rejected_as_too_large(size, topic, self._kser_servers)
        if error.code() in _UNKNOWN_TOPIC:
            # The brokers do not know the topic, although an earlier lookup found it, so the topic has been deleted
            # since. Look the topic up again before the next message.
            self._kser_topics.discard(topic)
            return KafkaException(self._kser_missing_topic_text(topic))
        if error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
            return KafkaException(self._kser_denied_text(topic))
        if error.code() == KafkaError._MSG_TIMED_OUT:
            return self._kser_unconfirmed_error(began)
        if client.fatal.note(error) or (client.fatal.reason and error.code() in PURGED):
            return self._kser_fatal_error(client, topic)
        return KafkaException(f"{error.str()}: topic {topic!r} at {self._kser_servers}")


class _Bulk(Bulk, Waiter):
    """The messages of one ``bulk_send``.

    Delivery reports arrive in the thread that polls; the thread that called ``bulk_send`` processes them.
    """

    _producer: Producer

    def __init__(self, producer: Producer, topic: str, timeout: float, key: KeyFunction | None) -> None:
        super().__init__(producer, topic, timeout, key)
        self._client = producer._kser_usable_client()
        self._began = time.monotonic()
        self._first_error: Exception | None = None
        self._in_flight: dict[int, tuple[Message, int]] = {}
        self._enough = 0
        self._number = 0
        self._reported: collections.deque[tuple[Message, int, Any]] = collections.deque()

    def run(self, kmsgs: Iterable[Message]) -> Result:
        with self._client.poller:
            return super().run(kmsgs)

    def send(self, kmsgs: Iterable[Message]) -> None:
        """Send each message as soon as the iterable yields it."""
        for kmsg in kmsgs:
            self._results.add()
            try:
                self._put(kmsg)
            except Exception as exc:
                self._results.fail(kmsg, exc)
            self._number += 1
            if not self._number % CHUNK:
                self._drain_reports()

    def finish(self) -> Result:
        self._enough = 0
        self._client.poller.wait(self, self._deadline)
        late = []
        while self._in_flight:
            # A late delivery report in another thread may remove a message meanwhile. A loop over the dict would then
            # fail, so pop the messages one by one.
            _, (kmsg, _) = self._in_flight.popitem()
            late.append(kmsg)
        self._process_reports()
        for kmsg in reversed(late):
            self._results.fail(kmsg, self._producer._kser_unconfirmed_error(self._began))
        return self._results.result()

    def done(self) -> bool:
        return len(self._in_flight) <= self._enough

    def _put(self, kmsg: Message) -> None:
        producer = self._producer
        data = producer._kser_encode(kmsg)
        options = record_options(self._key_of(kmsg), [])
        if self._first_error is not None:
            raise self._first_error
        number = self._number
        self._in_flight[number] = (kmsg, len(data))
        try:
            report = functools.partial(self._report, number)
            producer._kser_enqueue(self._client, self._topic, data, options, report, self._deadline)
        except Exception as exc:
            del self._in_flight[number]
            if isinstance(exc, KafkaException):
                # Fail the remaining messages of this ``bulk_send`` immediately, with the same error. Otherwise, each of
                # them would wait for the brokers again, and then fail for the same reason.
                self._first_error = exc
            raise

    def _report(self, number: int, error: Any, record: Any) -> None:
        """Handle a delivery report. librdkafka calls this method."""
        error = report_error(error, record, has_offset=self._producer._kser_has_offsets)
        sent = self._in_flight.pop(number, None)
        if sent is not None and (error is not None or signals.message_sent.receivers):
            self._reported.append((*sent, error))
        self.reported()

    def _drain_reports(self) -> None:
        """Read delivery reports, and wait while too many messages are not confirmed."""
        self._client.poller.poll()
        if len(self._in_flight) > MAX_IN_FLIGHT:
            self._enough = MAX_IN_FLIGHT // 2
            self._client.poller.wait(self, self._deadline)
        self._process_reports()

    def _process_reports(self) -> None:
        while self._reported:
            kmsg, size, error = self._reported.popleft()
            if error is None:
                self._producer._kser_emit_sent(self._topic, kmsg, self._timeout)
            else:
                failure = self._producer._kser_undelivered_error(self._client, error, self._topic, size, self._began)
                self._results.fail(kmsg, failure)
