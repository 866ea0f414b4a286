"""Dead letters: permanently failed messages, written to a separate topic."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from kser import __hostname__, signals
from kser.attempt import Failure
from kser.consumer.client import Partition, Record
from kser.consumer.logs import ConsumerLogger
from kser.controller import BaseProducer
from kser.errors import DeliveryError, MessageTooLarge
from kser.schemas import Message

#: Prefix of the headers that kser adds to a dead letter. The headers of the original record stay unchanged.
PREFIX = "kser-dlq-"

#: Maximum number of characters of the error message in a dead letter. The first limit is for the first write; the
#: second limit is for a second write, if the first dead letter was too large.
TEXT_LIMITS = (2000, 0)

#: Time limit for writing a dead letter, in seconds.
WRITE_TIMEOUT = 10.0


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

        :param attempts: the number of attempts at the record.
        :param again: whether an earlier write of this dead letter failed. The earlier failure was logged at ERROR, so
            this call logs a failure at DEBUG.
        :return: True if the record counts as finished: its dead letter is written, or dead letters are disabled for its
            topic.
        """
        topic = self._topic_for(record.topic)
        if topic is None:
            return True
        try:
            self._produce(topic, record, failure, attempts)
        except Exception as error:
            self._log.log(
                logging.DEBUG if again else logging.ERROR,
                f"offset {record.offset} of {Partition(record.topic, record.partition)} failed"
                f" ({failure.reason}) and its dead letter cannot be written to {topic!r}: {error}; the partition is"
                " paused until the write succeeds",
            )
            return False
        self.written += 1
        signals.emit(signals.dead_lettered, self._sender, topic=topic, record=record, failure=failure)
        return True

    def _produce(self, topic: str, record: Record, failure: Failure, attempts: int) -> None:
        for limit in TEXT_LIMITS:
            headers = [*record.headers, *self._headers(record, failure, attempts, limit)]
            try:
                self._producer().produce(topic, record.value, key=record.key, headers=headers, timeout=WRITE_TIMEOUT)
                return
            except MessageTooLarge as error:
                too_large = error
        raise DeliveryError(
            f"{too_large.message}; the producer and the topic {topic!r} must accept records of this size"
        )

    def _headers(self, record: Record, failure: Failure, attempts: int, limit: int) -> list[tuple[str, bytes | None]]:
        values = {
            "reason": failure.reason,
            "error-class": failure.error_class[:200],
            "error-message": failure.message[:limit],
            "attempts": attempts,
            "topic": record.topic,
            "partition": record.partition,
            "offset": record.offset,
            "timestamp": record.timestamp,
            "consumer": f"{self._sender.__name__} {__hostname__} {os.getpid()}",
            "time": int(time.time() * 1000),
        }
        return [(PREFIX + name, str(value).encode("utf-8", "backslashreplace")) for name, value in values.items()]


@dataclass(frozen=True)
class DeadLetter:
    """A permanently failed message, parsed from its dead letter.

    :param key: the key of the original record.
    :param value: the value of the original record.
    :param headers: the headers of the original record.
    :param reason: ``undecodable``, ``unknown-entrypoint``, ``max-starts`` or ``failed``.
    :param error_class: the full class name of the exception; empty for a failed result.
    :param error_message: the message of the error, possibly truncated.
    :param attempts: the number of attempts at the message.
    :param topic: the topic of the original record.
    :param partition: the partition of the original record.
    :param offset: the offset of the original record.
    :param timestamp: the timestamp of the original record, in milliseconds since 1970.
    :param consumer: the consumer that wrote the dead letter: class, host and process id.
    :param time: the time of writing the dead letter, in milliseconds since 1970.
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

    @property
    def message(self) -> Message | None:
        """The decoded message; None if it is undecodable."""
        try:
            return Message.loads(self.value or b"")
        except Exception:
            return None


def parse_dead_letter(record: Record) -> DeadLetter | None:
    """Parse a record into a dead letter; return None if it is not a dead letter."""
    ours = {name.removeprefix(PREFIX): value or b"" for name, value in record.headers if name.startswith(PREFIX)}

    def text(name: str) -> str:
        return ours[name].decode("utf-8", "replace")

    try:
        return DeadLetter(
            key=record.key,
            value=record.value,
            headers=tuple((name, value) for name, value in record.headers if not name.startswith(PREFIX)),
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
        )
    except (KeyError, ValueError):
        return None
