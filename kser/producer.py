"""Shared parts of all producers: keys, headers and sizes of records, and the Result of a bulk send."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from cdumay_error import Error
from cdumay_result import Result

from kser import signals
from kser.config import CONFIG
from kser.connection import UNREACHABLE, Connection, ConnectionFailure, explain
from kser.controller import BaseProducer, Headers
from kser.errors import DeliveryError, MessageTooLarge, RecordRejected, UsageError
from kser.limits import Limits, current_limits, header_bytes
from kser.results import failed_result, merge
from kser.schemas import Message

#: Size limit in bytes of the producer that a consumer makes, unless the user sets a limit. It is high, so that only the
#: limit of the topic decides whether a dead letter fits. It is below 100 MB, because by default a broker closes the
#: connection when it receives a larger request.
CONSUMER_SIZE_LIMIT = 64 << 20

#: Seconds between two replacements of a client in a fatal state. A new client may become fatal at once.
REPLACE_INTERVAL = 1.0

Key = str | bytes | None

#: Function that returns the key of each message in a bulk send.
KeyFunction = Callable[[Message], Key]

#: Headers in the form that the Kafka clients accept.
HeaderList = list[tuple[str, bytes | None]]


def key_bytes(key: Key) -> bytes | None:
    """Return a key as bytes; text is encoded as UTF-8.

    :raises kser.errors.UsageError: the key is neither text nor bytes.
    """
    if isinstance(key, str):
        return key.encode("utf-8")
    if key is None or isinstance(key, bytes):
        return key
    raise UsageError(f"a key must be a str or bytes, not {key!r}: convert it")


def header_list(headers: Headers | None) -> HeaderList:
    """Return headers as a list of pairs of a name and bytes, which the Kafka clients accept.

    :raises kser.errors.UsageError: a header is not a pair of a name and bytes.
    """
    if not headers:
        return []
    pairs: Any = headers.items() if isinstance(headers, Mapping) else headers
    checked: HeaderList = []
    for pair in pairs:
        match pair:
            case (str() as name, (bytes() | None) as value):
                checked.append((name, value))
            case _:
                raise UsageError(f"a header must be a name and bytes, not {pair!r}: encode its value")
    return checked


def encode_key_and_headers(key: Key = None, headers: Headers | None = None) -> tuple[bytes | None, HeaderList]:
    """Return the key and the headers of a record in the form that the Kafka clients accept.

    :raises kser.errors.UsageError: the key or a header has a wrong type.
    """
    return key_bytes(key), header_list(headers)


def record_options(key: bytes | None, headers: HeaderList) -> dict[str, Any]:
    """Return the key and the headers of a record as keyword arguments for the Kafka clients.

    The result has no argument for a key that is None, and no argument for empty headers.
    """
    options: dict[str, Any] = {}
    if key is not None:
        options["key"] = key
    if headers:
        options["headers"] = headers
    return options


def size_of(value: bytes | None, key: bytes | None, headers: HeaderList) -> int:
    """Return the size of a record in bytes, without the overhead of the protocol."""
    size = len(value or b"") + len(key or b"")
    return size + sum(len(name.encode("utf-8")) + len(data or b"") for name, data in headers) if headers else size


def too_large(size: int, limit: int, setting: str) -> MessageTooLarge:
    """Build the error for a record that exceeds the limit of the client.

    :param setting: name of the client's option for this limit.
    """
    return MessageTooLarge(
        f"the record has {size:,} bytes, and {setting!r} allows {limit:,} including protocol overhead: send a reference"
        f" instead of the data, or raise {setting!r} in {CONFIG} and 'max.message.bytes' of the topic"
    )


def rejected_as_too_large(size: int, topic: str, servers: str) -> MessageTooLarge:
    """Build the error for a record that the client sent and the broker rejected as too large."""
    return MessageTooLarge(
        f"the record has {size:,} bytes, more than topic {topic!r} at {servers} accepts ('max.message.bytes' of the"
        " topic, else 'message.max.bytes' of the brokers): send a reference instead of the data, or raise that limit"
    )


def error_text(error: BaseException) -> str:
    """Return the text of an error, in the form of ``stderr`` in the failed Result of ``send``."""
    text = error.message if isinstance(error, Error) else str(error)
    return text or repr(error)


def time_left(deadline: float) -> float:
    """Return the seconds until ``deadline``, by the monotonic clock, or 0 if the deadline has passed."""
    return max(deadline - time.monotonic(), 0.0)


class BulkResult:
    """Outcome of a bulk send."""

    def __init__(self) -> None:
        self._count = 0
        self._errors: dict[str, str] = {}
        self._failed = 0

    def add(self) -> None:
        """Count a message."""
        self._count += 1

    def fail(self, kmsg: Message, error: BaseException) -> None:
        """Count a message as not sent and record the reason."""
        self._errors[kmsg.uuid] = error_text(error)
        self._failed += 1

    def result(self, ending: str = "") -> Result:
        """Return one Result for all messages, with the number of sent messages.

        ``retval["failed"]`` is a dict with one entry for each message that was not sent: the key is the uuid of the
        message, and the value is the reason.

        :param ending: text to append after the number of sent messages.
        """
        sent = f"{self._count - self._failed} message(s) sent{ending}"
        if not self._failed:
            return Result(stdout=sent)
        reason = next(iter(self._errors.values()))
        return Result(
            retcode=500,
            stdout=sent,
            stderr=f"{self._failed} of {self._count} message(s) not sent; first error: {reason}",
            retval={"failed": self._errors},
        )


class Bulk:
    """Sender of the messages of one ``bulk_send``.

    This base class waits for the delivery of each message before it sends the next message. The subclasses for Kafka
    send further messages during this wait.

    :param topic: the topic of all messages.
    :param timeout: seconds for the whole bulk.
    :param key: a function that returns the key of a message, or None to send all messages without a key.
    """

    def __init__(self, producer: KafkaProducerBase, topic: str, timeout: float, key: KeyFunction | None) -> None:
        self._producer = producer
        self._topic = topic
        self._timeout = timeout
        self._deadline = self._producer._kser_deadline(timeout)
        self._key = key
        self._results = BulkResult()

    def run(self, kmsgs: Iterable[Message]) -> Result:
        """Send the messages, wait for their delivery, and return the Result."""
        try:
            self.send(kmsgs)
        except Exception as exc:
            return merge(self.finish(), Result.from_exception(exc))
        return self.finish()

    def send(self, kmsgs: Iterable[Message]) -> None:
        """Send the messages."""
        for kmsg in kmsgs:
            self._results.add()
            try:
                data = self._producer._kser_encode(kmsg)
                self._producer._kser_deliver(self._topic, data, self._key_of(kmsg), [], self._deadline)
            except Exception as exc:
                self._results.fail(kmsg, exc)
            else:
                self._producer._kser_emit_sent(self._topic, kmsg, self._timeout)

    def finish(self) -> Result:
        """Wait until all messages are delivered or the deadline passes, and return the Result."""
        return self._results.result()

    def _key_of(self, kmsg: Message) -> bytes | None:
        return None if self._key is None else key_bytes(self._key(kmsg))


def _function(owner: Any, name: str) -> Any:
    """Return the function of a bound method."""
    method = getattr(owner, name)
    return getattr(method, "__func__", method)


class KafkaProducerBase(BaseProducer):
    """Base of the producers of all transports; a transport implements only the delivery of a record."""

    #: Bootstrap servers, for error texts.
    _kser_servers: str = ""
    #: How the client connects, for error texts.
    _kser_connection: Connection
    #: Size limit of the client in bytes, and the name of its option.
    _kser_size_limit: int = 0
    _kser_size_option: ClassVar[str] = ""
    #: Limits of messages; None stands for the limits of the context, see :func:`kser.limits.current_limits`.
    _kser_limits: Limits | None = None
    #: The time of the last replacement of a client in a fatal state, by the monotonic clock.
    _kser_replaced_at: float = -REPLACE_INTERVAL

    def _kser_replace_fatal_client(self) -> None:
        """Drop a client in a fatal state, which can send nothing any more, so that the next use connects a new client.

        The cause, such as a missing permission, may have disappeared. Call this method before each send. It replaces at
        most one client in ``REPLACE_INTERVAL`` seconds.
        """
        if self._kser_is_fatal() and time.monotonic() - self._kser_replaced_at >= REPLACE_INTERVAL:
            self._kser_replaced_at = time.monotonic()
            self._kser_drop_client()

    def _kser_is_fatal(self) -> bool:
        """Return whether the client is in a fatal state, in which it can send nothing any more."""
        return False

    def _kser_drop_client(self) -> None:
        """Forget the client and close it, unless another thread does so."""

    def _kser_deadline(self, timeout: float) -> float:
        """Return the time at which a bulk must have ended, by the monotonic clock."""
        return time.monotonic() + timeout

    def _kser_deliver(
        self, topic: str, value: bytes | None, key: bytes | None, headers: HeaderList, deadline: float
    ) -> None:
        """Send a record and wait until it is delivered.

        :param deadline: end of the wait, by the monotonic clock.
        """
        raise NotImplementedError

    def _kser_deliver_nowait(
        self, topic: str, value: bytes | None, deadline: float, on_delivered: Callable[[Exception | None], None]
    ) -> None:
        """Send a record without waiting for its delivery.

        :param deadline: time by which the client must have accepted the record, by the monotonic clock.
        :param on_delivered: called with None after the delivery, or with the error if the delivery failed. The client
            may call the function in any thread.
        """
        raise NotImplementedError

    def _kser_success_result(self, topic: str, kmsg: Message, timeout: float) -> Result:
        """Return the Result of a delivered message."""
        raise NotImplementedError

    def _send(self, topic: str, kmsg: Message, timeout: float = 60, **options: Any) -> Any:
        deadline = time.monotonic() + timeout
        try:
            key, headers = encode_key_and_headers(**options)
            (self._kser_limits or current_limits()).check_headers(header_bytes(headers))
            self._kser_deliver(topic, self._kser_encode(kmsg), key, headers, deadline)
            result = self._kser_success_result(topic, kmsg, timeout)
        except Exception as exc:
            result = failed_result(exc, kmsg.uuid)
        return self._kser_after_send(topic, kmsg, result)

    def send_nowait(self, topic: str, kmsg: Message, on_delivered: Callable[[Any], Any], timeout: float = 60) -> None:
        """Send one message without waiting for its delivery.

        If the producer's class overrides hooks, or if the signal ``message_sent`` has listeners, this method waits for
        the delivery as :meth:`~kser.controller.BaseProducer.send` does. The reason is that hooks and listeners are user
        code, which must run in the calling thread and not in the client's own thread.

        :param topic: the topic to send to.
        :param kmsg: the message.
        :param on_delivered: called with the value that :meth:`~kser.controller.BaseProducer.send` would return, in the
            thread that receives the delivery report; the function must be quick.
        :param timeout: seconds within which the client must accept the message. The client's delivery timeout
            (``delivery_timeout_ms`` or ``delivery.timeout.ms``) limits the time after that.
        """
        if self._kser_has_user_hooks():
            on_delivered(self.send(topic, kmsg, timeout))
            return

        def on_report(error: Exception | None) -> None:
            result = (
                self._kser_success_result(topic, kmsg, timeout) if error is None else failed_result(error, kmsg.uuid)
            )
            on_delivered(self._kser_after_send(topic, kmsg, result))

        try:
            self._kser_deliver_nowait(topic, self._kser_encode(kmsg), time.monotonic() + timeout, on_report)
        except Exception as exc:
            on_report(exc)

    def bulk_send(
        self, topic: str, kmsgs: Iterable[Message], timeout: float = 60, *, key: KeyFunction | None = None
    ) -> Result:
        """Send many messages, then wait until all are delivered.

        :param topic: the topic of all messages.
        :param kmsgs: any iterable of messages, which is consumed once.
        :param timeout: seconds for the whole call. The in-memory transport ignores this limit and only shows the number
            in the Result.
        :param key: a function that returns the key of a message, or None to send all messages without a key.
        :return: a Result with the number of sent messages. If some messages were not sent, the Result is a failed
            Result, and the dict ``retval["failed"]`` contains the uuid of each of these messages with the reason. A
            message that timed out may still arrive.
        """
        return self._kser_new_bulk(topic, timeout, key).run(kmsgs)

    def _kser_new_bulk(self, topic: str, timeout: float, key: KeyFunction | None) -> Bulk:
        return Bulk(self, topic, timeout, key)

    def _kser_has_user_hooks(self) -> bool:
        """Return whether a send calls user code: an overridden hook, or a listener of ``message_sent``.

        The user code may itself send a message and wait for its delivery. In the client's own thread, this wait would
        never end, because only that thread can receive the delivery report.
        """
        if signals.message_sent.receivers:
            return True
        return any(_function(self, name) is not ours for name, ours in _HOOK_METHODS.items())

    def produce(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes | None]] = (),
        timeout: float = 60,
    ) -> None:
        try:
            self._kser_deliver(topic, value, *encode_key_and_headers(key, headers), time.monotonic() + timeout)
        except MessageTooLarge:
            raise
        except Exception as exc:
            kind = RecordRejected if self._kser_is_rejection(exc) else DeliveryError
            raise kind(self._kser_undelivered_text(topic, error_text(exc))) from exc

    def _kser_is_rejection(self, error: Exception) -> bool:
        """Return whether an error of a send is about the record itself, so that every further send would fail too."""
        return isinstance(error, TypeError | ValueError | OverflowError)

    def _kser_size_checked(self, value: bytes | None, options: Mapping[str, Any]) -> int:
        """Return the size of a record.

        :param options: key and headers, from :func:`record_options`.
        :raises kser.errors.MessageTooLarge: the size exceeds the limit of the client.
        """
        size = size_of(value, options.get("key"), options.get("headers", []))
        if size > self._kser_size_limit:
            raise self._kser_too_large_error(size)
        return size

    def _kser_too_large_error(self, size: int) -> MessageTooLarge:
        return too_large(size, self._kser_size_limit, self._kser_size_option)

    def _kser_missing_topic_text(self, topic: str) -> str:
        return f"The brokers at {self._kser_servers} have no topic {topic!r}: create it, or correct its name"

    def _kser_denied_text(self, topic: str) -> str:
        user = f"user {self._kser_connection.user!r}" if self._kser_connection.user else "the user of this client"
        return (
            f"not authorized to write to topic {topic!r} at {self._kser_servers}: grant {user} Write and Describe on"
            " the topic"
        )

    def _kser_unreachable(self, reason: str) -> ConnectionFailure:
        """Return the failure of a send, because the client has no connection to a broker.

        :param reason: the reason of the last failed connection; empty if it is unknown.
        """
        connection = self._kser_connection
        failure = explain(reason or "no response", connection)
        if failure.kind not in UNREACHABLE:
            return failure._replace(text=f"Cannot connect to Kafka at {connection.servers}: {failure.text}")
        advice = f"start one there, or correct {connection.option!r} in {CONFIG}"
        return failure._replace(text=f"No broker responds at {connection.servers}: {advice}")

    def _kser_undelivered_text(self, topic: str, reason: str) -> str:
        return f"the record for topic {topic!r} was not delivered: {reason}"

    def _kser_emit_sent(self, topic: str, kmsg: Message, timeout: float) -> None:
        result = self._kser_success_result(topic, kmsg, timeout)
        signals.emit(signals.message_sent, type(self), topic=topic, kmsg=kmsg, result=result)

    def _kser_record_value(self, topic: str, kmsg: Message) -> bytes:
        """Return the value that the record for a message would have, without a connection.

        :raises Exception: user code that changes or encodes messages raised this exception.
        """
        return self._kser_encode(kmsg)

    def _kser_encode(self, kmsg: Message) -> bytes:
        """Return the value of the record for a message.

        :raises kser.errors.LimitExceeded: the message exceeds a limit; see :mod:`kser.limits`.
        """
        kmsg = self._onmessage(kmsg)
        limits = self._kser_limits or current_limits()
        limits.check_message(kmsg.uuid, getattr(kmsg, "metadata", None))
        value: bytes = limits.encode_message(kmsg).encode("utf-8")
        limits.check_value(value)
        return value


#: The methods that a send calls, with the implementation in KafkaProducerBase. If a producer class overrides one of
#: these methods, a send runs the user's code. The dict does not contain the methods that each transport implements.
_HOOK_METHODS = {
    name: _function(KafkaProducerBase, name)
    for name in (
        "send",
        "_send",
        "_kser_after_send",
        "_kser_call_hook",
        "_onsuccess",
        "onsuccess",
        "_onerror",
        "onerror",
    )
}
