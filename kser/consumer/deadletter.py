"""Dead letters: permanently failed messages, stored on a topic of their own until they are replayed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from kser import __hostname__, signals
from kser.consumer.client import Partition, Record
from kser.consumer.job import WorkItem
from kser.controller import BaseProducer
from kser.delivery import Failure
from kser.errors import BrokerUnavailable, DeliveryError, MessageTooLarge
from kser.schemas import Message

if TYPE_CHECKING:
    from kser.consumer.base import BaseConsumer

#: Prefix of the headers that kser adds; the headers of the original message stay unchanged.
PREFIX = "kser-dlq-"
#: Maximum characters of the error message: at the first try, and if the dead letter was too large with that.
TEXT_LIMITS = (2000, 0)
#: Time limit for writing a dead letter, in seconds.
WRITE_TIMEOUT = 10.0
#: Dead letters that are replayed between two commits. A crash between two commits sends them a second time.
READ_BATCH = 100
#: Seconds that one poll waits for dead letters.
POLL_TIMEOUT = 0.5


class DeadLetterWriter:
    """Writer of dead letters.

    :param topic_for: returns the dead letter topic of a source topic; None if the source topic has no dead letters.
    :param producer: returns the producer.
    :param sender: the consumer class; its name is stored in the dead letters, and it is the sender of the signal.
    :param logger: the logger of the consumer.
    """

    def __init__(
        self,
        topic_for: Callable[[str], str | None],
        producer: Callable[[], BaseProducer],
        sender: type,
        logger: logging.Logger,
    ) -> None:
        self._topic_for = topic_for
        self._producer = producer
        self._sender = sender
        self._logger = logger
        #: The number of dead letters written.
        self.written = 0

    def write(self, record: Record, failure: Failure, attempts: int, again: bool = False) -> bool:
        """Write the dead letter of a permanently failed record.

        :param attempts: the number of attempts at the record.
        :param again: whether an earlier write failed; the failure was logged then and is logged at DEBUG now.
        :return: True if the record counts as finished: its dead letter is written, or its topic has no dead letters.
        """
        topic = self._topic_for(record.topic)
        if topic is None:
            return True
        try:
            self._produce(topic, record, failure, attempts)
        except Exception as error:
            self._logger.log(
                logging.DEBUG if again else logging.ERROR,
                f"{self._sender.__name__}: offset {record.offset} of {Partition(record.topic, record.partition)} failed"
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
        raise DeliveryError(f"{too_large.message}; raise the limits of the producer and of the topic {topic!r}")

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
    """A permanently failed message.

    :param key: the key of the original record.
    :param value: the value of the original record.
    :param headers: the headers of the original record.
    :param reason: ``undecodable``, ``unknown-entrypoint`` or ``failed``.
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


def iter_dead_letters(
    consumer: type[BaseConsumer], config: Mapping[str, Any], topic: str, *, timeout: float = 10
) -> Iterator[DeadLetter]:
    """Iterate over the dead letters currently on a topic, oldest first within a partition. It commits no offsets.

    :param consumer: the consumer class of the transport: ``kser.python_kafka.consumer.Consumer`` or another one.
    :param config: options of its client; the group in it is ignored.
    :param topic: the topic of the dead letters.
    :param timeout: seconds to wait for a response of the broker.
    :raises kser.errors.BrokerUnavailable: the broker did not respond in time.
    """
    with closing(_reader(consumer, config, topic, f"kser-read-{uuid4()}", commit="never")) as reader:
        for job in _records(reader, timeout):
            if (letter := _parse(job.record)) is not None:
                yield letter
            reader._kser_work_queue.task_done(job)


def replay(
    consumer: type[BaseConsumer],
    config: Mapping[str, Any],
    topic: str,
    *,
    where: Callable[[DeadLetter], bool] | None = None,
    limit: int | None = None,
    to: str | None = None,
    group: str | None = None,
    timeout: float = 10,
) -> int:
    """Send dead letters back to their original topics, unchanged; skip those that ``where`` does not select.

    Each call continues where the previous call with the same ``group`` stopped. After a crash, some messages may be
    sent twice, with the same uuids.

    :param consumer: the consumer class of the transport.
    :param config: options of its client; the group in it is replaced by ``group``.
    :param topic: the topic of the dead letters.
    :param where: selects the dead letters to send; None sends all of them.
    :param limit: the maximum number of messages to send.
    :param to: a topic to send all messages to, instead of their original topics.
    :param group: the consumer group that stores the progress of the replay; ``kser-replay-<topic>`` if None.
    :param timeout: seconds to wait for a response of the broker, and for each delivery.
    :return: the number of messages sent.
    :raises kser.errors.BrokerUnavailable: the broker did not respond in time.
    :raises kser.errors.DeliveryError: a message could not be sent; the next call starts with this message.
    """
    sent = 0
    with closing(_reader(consumer, config, topic, group or f"kser-replay-{topic}")) as reader:
        for job in _records(reader, timeout):
            if sent == limit:
                break
            letter = _parse(job.record)
            if letter is not None and (where is None or where(letter)):
                reader._kser_shared_producer.producer().produce(
                    to or letter.topic, letter.value, key=letter.key, headers=letter.headers, timeout=timeout
                )
                sent += 1
            reader._kser_work_queue.task_done(job)
            if reader._kser_work_queue.finished_count % READ_BATCH == 0:
                reader._kser_poller.commit()
    return sent


def _reader(
    consumer: type[BaseConsumer], config: Mapping[str, Any], topic: str, group: str, commit: str = "after"
) -> BaseConsumer:
    # The reader must not remove the pause file, because the file belongs to the other consumers of this host.
    reader: Any = type("DeadLetterReader", (consumer,), {"clean_lock": classmethod(lambda cls: None)})
    # The reader sets these options itself, because the settings of this process are meant for its regular consumers.
    found: BaseConsumer = reader(
        {**config, consumer.GROUP_OPTION: group, consumer.RESET_OPTION: "earliest"},
        [topic],
        commit=commit,
        dead_letter=False,
        workers=1,
        ordering="none",
        max_in_flight=READ_BATCH,
    )
    return found


def _records(reader: BaseConsumer, timeout: float) -> Iterator[WorkItem]:
    """Iterate over the records of the topic, up to its current end."""
    deadline = time.monotonic() + timeout
    while True:
        taken = reader._kser_poller.poll_once(min(POLL_TIMEOUT, timeout))
        while (job := reader._kser_work_queue.get(0)) is not None:
            yield job
            deadline = time.monotonic() + timeout
        lag = reader._kser_poller.lag()
        if not taken and reader.assignment and reader.assignment <= lag.keys() and max(lag.values()) <= 0:
            return
        if time.monotonic() > deadline:
            raise BrokerUnavailable(
                f"the dead letters of {reader._kser_topics[0]!r} could not be read: no response within {timeout:g} s;"
                " check that the broker is reachable and that the topic exists"
            )


def _parse(record: Record) -> DeadLetter | None:
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
