"""Dead letters: permanently failed messages, written to a separate topic."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from kser import __hostname__, signals
from kser.attempt import Failure, safe_text
from kser.consumer.client import Partition, Record
from kser.consumer.logs import ConsumerLogger
from kser.consumer.unreadable import decoding_notes
from kser.controller import BaseProducer
from kser.errors import MessageTooLarge, RecordRejected
from kser.schemas import Message

#: Prefix of the headers that kser adds to a dead letter. The other headers of the original record stay unchanged.
PREFIX = "kser-dlq-"

#: Suffix of the default name of a dead-letter topic.
SUFFIX = ".dlq"

#: Maximum number of characters of the error message in a dead letter. The first limit is for the first write; the
#: second limit is for all further writes, if the first dead letter was too large.
TEXT_LIMITS = (2000, 0)

#: Maximum number of characters of every other text in the headers that kser adds.
SHORT_TEXT_LIMIT = 200

#: Maximum size of a key in a stub, in bytes.
STUB_KEY_LIMIT = 1000

#: Time limit for writing a small dead letter, in seconds, and the additional time for each byte of its value.
WRITE_TIMEOUT = 10.0
WRITE_TIMEOUT_PER_BYTE = 1e-6

Headers = tuple[tuple[str, bytes | None], ...]


class Letter(NamedTuple):
    """The record that a dead letter is: what the producer writes to the dead-letter topic.

    :param key: the key of the original record, or None if it is omitted.
    :param value: the value of the original record, or None if it is omitted.
    :param headers: the headers of the original record unless they are omitted, and the headers that kser adds.
    :param omitted: the omitted parts of the original record: ``key``, ``value`` and ``headers``.
    """

    key: bytes | None
    value: bytes | None
    headers: Headers
    omitted: tuple[str, ...] = ()


class Origin(NamedTuple):
    """The origin of a dead letter: its record and its failure.

    :param record: the original record.
    :param failure: the failure of the record.
    :param attempts: the number of attempts at the record.
    :param consumer: the name of the consumer class that failed the record.
    """

    record: Record
    failure: Failure
    attempts: int
    consumer: str


class DeadLetterWriter:
    """Writer of dead letters.

    :param topic_for: a function that returns the dead-letter topic of a source topic, or None if dead letters are
        disabled for the source topic.
    :param producer: returns the producer that writes the dead letters.
    :param sender: the consumer class. Each dead letter contains the name of the class, and the class is the sender of
        the signal ``dead_lettered``.
    :param log: the logger of the consumer.
    """

    def __init__(
        self,
        topic_for: Callable[[str], str | None],
        producer: Callable[[], BaseProducer],
        sender: type,
        log: ConsumerLogger,
    ) -> None:
        self._topic_for = topic_for
        self._producer = producer
        self._sender = sender
        self._log = log
        #: The number of dead letters written.
        self.written = 0

    def write(self, record: Record, failure: Failure, attempts: int, again: bool = False) -> bool:
        """Write the dead letter of a permanently failed record.

        If the dead letter is too large, or if the client or the broker rejects it for another permanent reason, the
        writer tries smaller forms of the dead letter (:func:`forms_of`). If all forms are rejected, the record counts
        as finished without a dead letter, because no later write can succeed. Every other error is a problem of the
        broker, which may disappear, so the record stays unfinished.

        :param attempts: the number of attempts at the record.
        :param again: whether an earlier write of this dead letter failed. The earlier failure was logged at ERROR, so
            this call logs a failure at DEBUG.
        :return: True if the record counts as finished: its dead letter is written or was rejected, the record is itself
            a dead letter, or dead letters are disabled for its topic.
        """
        topic = self._topic_for(record.topic)
        if topic is None:
            return True
        place = f"offset {record.offset} of {Partition(record.topic, record.partition)}"
        reason = _shorten(failure.reason)
        headers = _headers_of(record)
        if self._is_dead_letter(record, headers):
            self._log.warning(
                f"{place} failed ({reason}), and it is a dead letter itself: kser writes no dead letter of a dead"
                f" letter, so the record only stays on {record.topic!r}"
            )
            return True
        try:
            self._produce(topic, Origin(record, failure, attempts, self._sender.__name__), headers)
        except (MessageTooLarge, RecordRejected) as error:
            self._log.error(
                f"{place} failed ({reason}) and every form of its dead letter was rejected: {error.message}; the record"
                f" counts as finished without a dead letter. The producer ('producer_config' of the consumer) and the"
                f" topic {topic!r} must accept the dead letters"
            )
            return True
        except Exception as error:
            self._log.log(
                logging.DEBUG if again else logging.ERROR,
                f"{place} failed ({reason}) and its dead letter cannot be written to {topic!r}: {safe_text(error)}; the"
                " partition is paused until the write succeeds",
            )
            return False
        self.written += 1
        signals.emit(signals.dead_lettered, self._sender, topic=topic, record=record, failure=failure)
        return True

    def _is_dead_letter(self, record: Record, headers: Headers | None) -> bool:
        """Return whether the record is a dead letter on its own dead-letter topic.

        The headers alone prove nothing, because any producer can add them. The topic must fit too.
        """
        letter = parse_with_headers(record, headers or ())
        return letter is not None and self._topic_for(letter.topic) == record.topic

    def _produce(self, topic: str, origin: Origin, headers: Headers | None) -> None:
        """Write the largest form of the dead letter that is accepted.

        :raises kser.errors.DeliveryError: no form was accepted; the error is the error of the complete form.
        """
        rejection: MessageTooLarge | RecordRejected | None = None
        producer = self._producer()
        for letter in forms_of(origin, headers):
            timeout = WRITE_TIMEOUT + WRITE_TIMEOUT_PER_BYTE * len(letter.value or b"")
            try:
                producer.produce(topic, letter.value, key=letter.key, headers=letter.headers, timeout=timeout)
            except (MessageTooLarge, RecordRejected) as error:
                rejection = rejection or error
                continue
            if letter.omitted:
                self._log_omitted(topic, origin.record, letter, rejection)
            return
        assert rejection is not None
        raise rejection

    def _log_omitted(
        self, topic: str, record: Record, letter: Letter, rejection: MessageTooLarge | RecordRejected | None
    ) -> None:
        reason = rejection.message if rejection else "the client could not decode the headers"
        parts = " and ".join(letter.omitted)
        self._log.warning(
            f"the dead letter of offset {record.offset} of {Partition(record.topic, record.partition)} was written to"
            f" {topic!r} without {parts}: {reason}"
        )


# -- building ----------------------------------------------------------------------------------------------------------


def forms_of(origin: Origin, headers: Headers | None) -> Iterator[Letter]:
    """Yield the forms of a dead letter, from the complete one to the smallest one. This function raises no error.

    The forms are: the complete dead letter, without the error message, without the headers of the original record, and
    a stub (:func:`stub_of`).

    :param headers: the headers of the original record; None if the client could not decode them.
    """
    record = origin.record
    original = tuple(header for header in headers or () if not header[0].startswith(PREFIX))
    missing = ("headers",) if headers is None else ()
    for limit in TEXT_LIMITS:
        added = _added_headers(origin, limit, missing)
        yield Letter(record.key, record.value, (*original, *added), missing)
    if original:
        yield Letter(record.key, record.value, _added_headers(origin, 0, ("headers",)), ("headers",))
    if record.value is not None or len(record.key or b"") > STUB_KEY_LIMIT:
        yield stub_of(origin, bool(original) or headers is None)


def stub_of(origin: Origin, has_headers: bool = False) -> Letter:
    """Return the stub of a dead letter: a record without a value, whose headers describe the original record.

    The stub has the key of the original record if the key has at most ``STUB_KEY_LIMIT`` bytes. This function raises no
    error.

    :param has_headers: whether the original record has headers, which the stub omits.
    """
    key, value = origin.record.key, origin.record.value
    keeps_key = len(key or b"") <= STUB_KEY_LIMIT
    parts = {"key": not keeps_key, "value": value is not None, "headers": has_headers}
    omitted = tuple(name for name, is_omitted in parts.items() if is_omitted)
    digest: dict[str, object] = {}
    if value is not None:
        digest = {"value-size": len(value), "value-sha256": hashlib.sha256(value).hexdigest()}
    return Letter(key if keeps_key else None, None, _added_headers(origin, 0, omitted, digest), omitted)


def _added_headers(
    origin: Origin, limit: int, omitted: tuple[str, ...], digest: Mapping[str, object] | None = None
) -> Headers:
    """Return the headers that kser adds.

    :param limit: the maximum number of characters of the error message.
    :param digest: size and hash of an omitted value.
    """
    record, failure = origin.record, origin.failure
    values = {
        "reason": _shorten(failure.reason),
        "error-class": _shorten(failure.error_class),
        "error-message": _shorten(failure.message, limit),
        "attempts": origin.attempts,
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "timestamp": record.timestamp,
        "consumer": f"{_shorten(origin.consumer)} {_shorten(__hostname__)} {os.getpid()}",
        "time": int(time.time() * 1000),
        **({"omitted": ",".join(omitted)} if omitted else {}),
        **decoding_notes(record),
        **(digest or {}),
    }
    return tuple((PREFIX + name, str(value).encode("utf-8", "backslashreplace")) for name, value in values.items())


def _shorten(value: object, limit: int = SHORT_TEXT_LIMIT) -> str:
    return safe_text(value)[:limit]


def _headers_of(record: Record) -> Headers | None:
    """Return the headers of a record; None if the client cannot decode them."""
    try:
        return tuple(record.headers)
    except Exception:
        return None


# -- parsing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeadLetter:
    """A permanently failed message, parsed from its dead letter.

    :param key: the key of the original record.
    :param value: the value of the original record.
    :param headers: the headers of the original record.
    :param reason: ``undecodable``, ``over-limit``, ``unknown-entrypoint``, ``unreadable``, ``max-starts`` or
        ``failed``.
    :param error_class: the full class name of the exception; empty for a failed result.
    :param error_message: the message of the error, possibly truncated.
    :param attempts: the number of attempts at the message.
    :param topic: the topic of the original record.
    :param partition: the partition of the original record.
    :param offset: the offset of the original record.
    :param timestamp: the timestamp of the original record, in milliseconds since 1970.
    :param consumer: the consumer that wrote the dead letter: class, host and process id.
    :param time: the time of writing the dead letter, in milliseconds since 1970.
    :param omitted: the parts of the original record that the dead letter does not contain, because they were too large:
        ``key``, ``value`` and ``headers``; usually empty.
    :param value_size: the size of the omitted value in bytes; None if the value is not omitted.
    :param value_sha256: the SHA-256 hash of the omitted value, in hexadecimal; empty if the value is not omitted.
    """

    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]
    reason: str
    error_class: str
    error_message: str
    attempts: int
    topic: str
    partition: int
    offset: int
    timestamp: int
    consumer: str
    time: int
    omitted: tuple[str, ...] = ()
    value_size: int | None = None
    value_sha256: str = ""

    @property
    def message(self) -> Message | None:
        """The decoded message; None if it is undecodable."""
        try:
            return Message.loads(self.value or b"")
        except Exception:
            return None


def parse_dead_letter(record: Record) -> DeadLetter | None:
    """Parse a record into a dead letter; return None if it is not a dead letter."""
    return parse_with_headers(record, _headers_of(record) or ())


def has_dead_letter_headers(record: Record) -> bool:
    """Return whether a record has a header of a dead letter. The record may still be no valid dead letter."""
    return any(name.startswith(PREFIX) for name, _ in _headers_of(record) or ())


def parse_with_headers(record: Record, headers: Headers) -> DeadLetter | None:
    """Parse a record whose headers were already read; return None if it is not a dead letter."""
    ours = {name.removeprefix(PREFIX): value or b"" for name, value in headers if name.startswith(PREFIX)}

    def text(name: str) -> str:
        return ours[name].decode("utf-8", "replace")

    try:
        return DeadLetter(
            key=record.key,
            value=record.value,
            headers=tuple((name, value) for name, value in headers if not name.startswith(PREFIX)),
            reason=text("reason"),
            error_class=text("error-class"),
            error_message=text("error-message"),
            attempts=int(text("attempts")),
            topic=text("topic"),
            partition=int(text("partition")),
            offset=int(text("offset")),
            timestamp=int(text("timestamp")),
            consumer=text("consumer"),
            time=int(text("time")),
            omitted=tuple(filter(None, text("omitted").split(","))) if "omitted" in ours else (),
            value_size=int(text("value-size")) if "value-size" in ours else None,
            value_sha256=text("value-sha256") if "value-sha256" in ours else "",
        )
    except (KeyError, ValueError):
        return None
