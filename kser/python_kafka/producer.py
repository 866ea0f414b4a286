"""Producer on kafka-python. A drop-in replacement for ``kser.python_kafka`` of 0.8.27."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from cdumay_result import Result
from kafka import KafkaProducer, errors
from kafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError, TopicAuthorizationFailedError

from kser import signals
from kser.config import Settings
from kser.connection import FailureLog
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
from kser.python_kafka.idempotence import keep_usable
from kser.python_kafka.logs import lines_of
from kser.python_kafka.null_values import NullableValues, nullable, serialized
from kser.python_kafka.options import connect, connection_of, options_for, with_short_bootstrap
from kser.schemas import Message

logger = escape_lines(logging.getLogger(__name__))

#: kser's default of ``max_block_ms``, the time in milliseconds for which ``send`` may wait for the metadata of a topic.
MAX_BLOCK_MS = 5000
#: More bytes than the protocol adds to a record and a batch, apart from many headers.
MAX_OVERHEAD = 1000
#: Seconds that ``close`` waits for the delivery of messages that were sent before.
CLOSE_TIMEOUT = 0.5
#: Limits of a chunk: the number of messages, and the seconds of encoding. A chunk is a part of the messages of a bulk.
#: The producer encodes all messages of a chunk, and then passes them to the client.
CHUNK = 500
CHUNK_SECONDS = 0.05

#: Errors about the record itself, which every further send of the record would cause again. kafka-python 2 raises
#: AssertionError for arguments that it rejects.
_REJECTIONS = (
    AssertionError,
    errors.InvalidTopicError,
    errors.RecordListTooLargeError,
    errors.InvalidTimestampError,
    errors.UnsupportedForMessageFormatError,
    errors.PolicyViolationError,
    errors.InvalidRecordError,
)


class Producer(KafkaProducerBase):
    """A producer on ``kafka.KafkaProducer`` that checks the delivery of every message. Threads can share it.

    The default of ``acks`` is ``"all"``. With kafka-python 3, the producer is idempotent unless other options forbid
    it. With kafka-python 2, the producer is idempotent only with ``enable_idempotence``. kser does not set this option,
    because an idempotent producer of kafka-python 2 cannot end its thread while no broker responds.

    All threads share the client's single timeout for metadata, ``max_block_ms``. While one thread sends with a shorter
    timeout, another thread that sends to a new topic may time out too early. The Result of that other thread then
    contains the timeout error.

    :param config: options of KafkaProducer; None means the options of KafkaProducer in ``KSER_CONFIG``.
    :param app: a Flask application; its ``config`` has precedence over the environment.
    :raises kser.errors.BrokerUnavailable: no broker responds.
    :raises kser.errors.SettingError: ``KSER_CONFIG`` is invalid.
    """

    _kser_size_option = "max_request_size"

    def __init__(self, config: Mapping[str, Any] | None = None, *, app: Any = None) -> None:
        options = options_for(KafkaProducer, config, Settings.of(app))
        self._kser_limits = limits_of(app)
        options.setdefault("acks", "all")
        self._kser_max_block_ms = options.setdefault("max_block_ms", MAX_BLOCK_MS)
        self._kser_connection = connection_of(options)
        self._kser_servers = self._kser_connection.servers
        self._kser_failures = FailureLog()
        self._kser_max_block_lock = threading.Lock()
        self._kser_size_limit = options.get(
            self._kser_size_option, KafkaProducer.DEFAULT_CONFIG[self._kser_size_option]
        )
        self._kser_options = options
        self._kser_closed = False
        connect_if_due(self)
        renew_after_fork(self)

    def _kser_connect(self) -> KafkaProducer:
        if self._kser_closed:
            raise KafkaError("This producer is closed: create a new one")
        client = connect(KafkaProducer, self._kser_options)
        client.config["value_serializer"] = NullableValues(client.config["value_serializer"])
        keep_usable(client)
        return client

    #: The client; a forked process creates its own at its first send.
    client: Any = ProcessClient(_kser_connect)

    def _kser_ensure_connected(self) -> None:
        _ = self.client

    def _kser_record_value(self, topic: str, kmsg: Message) -> bytes:
        value, serializer = super()._kser_record_value(topic, kmsg), self._kser_options.get("value_serializer")
        return value if serializer is None else serialized(serializer, topic, value)

    def _kser_is_fatal(self) -> bool:
        manager = getattr(vars(self).get("client"), "_transaction_manager", None)
        return manager is not None and bool(manager.has_fatal_error())

    def _kser_drop_client(self) -> None:
        client = vars(self).get("client")
        if not self._kser_closed and client is not None and vars(Producer)["client"].drop(self, client):
            self._kser_options = with_short_bootstrap(self._kser_options)
            threading.Thread(target=_close_fatal, args=(client,), name="kser-fatal-client", daemon=True).start()

    def _kser_renew_after_fork(self) -> None:
        self._kser_max_block_lock = threading.Lock()
        if (client := vars(self).get("client")) is not None:
            # The function that kafka-python registered for the end of the process would close the parent's connections.
            client._unregister_cleanup()
            keep_for_ever(client)
            if not self._kser_closed:
                del self.client

    def _kser_new_bulk(self, topic: str, timeout: float, key: KeyFunction | None) -> Bulk:
        return _Bulk(self, topic, timeout, key)

    def close(self) -> None:
        self._kser_closed = True
        if (client := vars(self).get("client")) is None:
            return
        try:
            client.close(timeout=CLOSE_TIMEOUT)
        except KafkaError as error:
            logger.warning(
                f"{type(self).__name__}: closed before all messages were delivered to {self._kser_servers}: {error}"
            )
            # ``close`` timed out before it stopped the client's thread. Stop the thread by force, because otherwise the
            # thread would retry without end.
            client._sender.force_close()
            with suppress(KafkaError):
                client.close(timeout=CLOSE_TIMEOUT)

    def _kser_deliver(
        self, topic: str, value: bytes | None, key: bytes | None, headers: HeaderList, deadline: float
    ) -> None:
        delivery = self._kser_enqueue(topic, value, record_options(key, headers), deadline)
        try:
            self._kser_confirm(delivery, deadline)
        except (MessageSizeTooLargeError, TopicAuthorizationFailedError) as error:
            raise self._kser_undelivered_error(error, topic, size_of(value, key, headers)) from error

    def _kser_deliver_nowait(
        self, topic: str, value: bytes | None, deadline: float, on_delivered: Callable[[Exception | None], None]
    ) -> None:
        delivery = self._kser_enqueue(topic, value, {}, deadline)
        delivery.add_callback(lambda _record: on_delivered(None))
        delivery.add_errback(lambda error: on_delivered(self._kser_undelivered_error(error, topic, len(value or b""))))

    def _kser_success_result(self, topic: str, kmsg: Message, timeout: float) -> Result:
        return Result(uuid=kmsg.uuid, stdout=f"Message {kmsg.entrypoint}[{kmsg.uuid}] sent in {topic}")

    def _kser_is_rejection(self, error: Exception) -> bool:
        return isinstance(error, _REJECTIONS) or super()._kser_is_rejection(error)

    def _kser_enqueue(self, topic: str, value: bytes | None, options: Mapping[str, Any], deadline: float) -> Any:
        """Queue a record in the client, and return the future of its delivery.

        The client may wait for metadata first.
        """
        self._kser_replace_fatal_client()
        size = self._kser_size_checked(value, options)
        if value is None or "headers" in options:
            value, options = nullable(value, options)
        last_response = self._kser_last_response()
        try:
            if time_left(deadline) * 1000 >= self._kser_max_block_ms:
                delivery = self.client.send(topic, value, **options)
            else:
                delivery = self._kser_send_before(topic, value, options, deadline)
            # The client checks the size including the protocol's overhead. kafka-python 3 raises
            # MessageSizeTooLargeError, and kafka-python 2 returns a future that has this error. If the record is
            # clearly smaller than the client's limit, the error is a refusal of the broker, which has come already.
            if isinstance(getattr(delivery, "exception", None), MessageSizeTooLargeError):
                if size < self._kser_size_limit - MAX_OVERHEAD:
                    raise rejected_as_too_large(size, topic, self._kser_servers)
                raise delivery.exception
        except MessageSizeTooLargeError as error:
            raise self._kser_too_large_error(size) from error
        except TopicAuthorizationFailedError as error:
            raise self._kser_undelivered_error(error, topic, size) from error
        except KafkaTimeoutError as error:
            raise KafkaTimeoutError(f"{_text(error)} {self._kser_explain(topic, last_response)}") from error
        return delivery

    def _kser_confirm(self, delivery: Any, deadline: float) -> None:
        """Wait until the record is delivered."""
        try:
            delivery.get(timeout=time_left(deadline))
        except KafkaTimeoutError as error:
            unconfirmed = f"{self._kser_servers} did not confirm the message, which may still arrive"
            raise KafkaTimeoutError(f"{_text(error).rstrip('.')}: {unconfirmed}") from error

    def _kser_undelivered_error(self, error: Exception, topic: str, size: int) -> Exception:
        """Return the error of a failed delivery."""
        if isinstance(error, MessageSizeTooLargeError):
            return rejected_as_too_large(size, topic, self._kser_servers)
        if isinstance(error, TopicAuthorizationFailedError):
            denied: Exception = TopicAuthorizationFailedError(self._kser_denied_text(topic))
            return denied
        return error

    def _kser_send_before(self, topic: str, value: Any, options: Mapping[str, Any], deadline: float) -> Any:
        """Send with a shorter timeout than ``max_block_ms``.

        The timeout is a setting of the whole client, so only one thread at a time may lower it. Another thread with
        more time may time out too early meanwhile, and then its Result contains the timeout error.
        """
        if not self._kser_max_block_lock.acquire(timeout=time_left(deadline)):
            raise KafkaTimeoutError(f"Another thread still waits for metadata from {self._kser_servers}.")
        try:
            self.client.config["max_block_ms"] = time_left(deadline) * 1000
            return self.client.send(topic, value, **options)
        except TypeError as error:
            if time_left(deadline):
                raise
            # kafka-python 2.3 raises TypeError when it formats the text of its own timeout error.
            raise KafkaTimeoutError("No time was left to wait for metadata.") from error
        finally:
            self.client.config["max_block_ms"] = self._kser_max_block_ms
            self._kser_max_block_lock.release()

    def _kser_last_response(self) -> float:
        """Return the time of the last successful metadata response, by the client's clock."""
        return float(self.client._metadata._last_successful_refresh_ms)

    def _kser_explain(self, topic: str, last_response: float) -> str:
        # The wait for the metadata of the topic has timed out. If a broker has sent metadata since the start of the
        # call, the brokers are reachable, and the topic does not exist. Otherwise, no broker responds.
        if self._kser_last_response() != last_response:
            return self._kser_missing_topic_text(topic)
        failure = self._kser_unreachable(lines_of(self.client).failure.reason())
        if self._kser_failures.is_due(failure.kind):
            logger.error(f"{type(self).__name__}: {failure.text}")
        return failure.text


class _Bulk(Bulk):
    """The messages of one ``bulk_send``.

    This class encodes messages in chunks, passes them to the client in chunks, and checks their delivery in chunks. If
    this class passed each message separately, each message would wake the client's own thread, and the client would
    send most messages in separate requests.
    """

    _producer: Producer

    def __init__(self, producer: Producer, topic: str, timeout: float, key: KeyFunction | None) -> None:
        super().__init__(producer, topic, timeout, key)
        #: The deadline of the wait for metadata and for space in the client's buffer.
        self._metadata_deadline = self._deadline
        self._first_error: KafkaTimeoutError | None = None
        self._chunk: list[tuple[Message, bytes, dict[str, Any]]] = []
        self._unchecked: list[tuple[Message, int, Any]] = []

    def send(self, kmsgs: Iterable[Message]) -> None:
        """Send the messages in chunks. The encoding of a chunk ends after about ``CHUNK_SECONDS``."""
        began = time.monotonic()
        for kmsg in kmsgs:
            self._results.add()
            try:
                options = record_options(self._key_of(kmsg), [])
                self._chunk.append((kmsg, self._producer._kser_encode(kmsg), options))
            except Exception as exc:
                self._results.fail(kmsg, exc)
            if len(self._chunk) >= CHUNK or time.monotonic() - began > CHUNK_SECONDS:
                self._send_chunk()
                began = time.monotonic()

    def finish(self) -> Result:
        self._send_chunk()
        # Ignore the timeout here, because ``_check`` finds every late message.
        with suppress(KafkaTimeoutError):
            self._producer.client.flush(timeout=time_left(self._deadline))
        self._check(self._unchecked)
        return self._results.result()

    def _send_chunk(self) -> None:
        # Most messages of the earlier chunks are delivered by now, so check them and release their futures.
        checkable, self._unchecked = self._unchecked, []
        for kmsg, data, options in self._chunk:
            try:
                delivery = self._producer._kser_enqueue(self._topic, data, options, self._metadata_deadline)
                self._unchecked.append((kmsg, len(data), delivery))
            except KafkaTimeoutError as exc:
                # Fail the remaining messages of the bulk without a wait. Record this first error for all of them,
                # because only the first error contains the cause.
                self._metadata_deadline = time.monotonic()
                self._first_error = self._first_error or exc
                self._results.fail(kmsg, self._first_error)
            except Exception as exc:
                self._results.fail(kmsg, exc)
        self._chunk = []
        self._check(checkable)

    def _check(self, deliveries: Iterable[tuple[Message, int, Any]]) -> None:
        announced = bool(signals.message_sent.receivers)
        for kmsg, size, delivery in deliveries:
            try:
                self._producer._kser_confirm(delivery, self._deadline)
            except Exception as exc:
                self._results.fail(kmsg, self._producer._kser_undelivered_error(exc, self._topic, size))
            else:
                if announced:
                    self._producer._kser_emit_sent(self._topic, kmsg, self._timeout)


def _close_fatal(client: KafkaProducer) -> None:
    with suppress(KafkaError):
        client.close(timeout=CLOSE_TIMEOUT)


def _text(error: KafkaTimeoutError) -> str:
    """Return the text of a client's error without the name of its class.

    The callers put the text into a new error of the same class, and the text of the new error begins with the name
    again.
    """
    return str(error.args[0] if error.args else error)
