"""Dead letters: messages that failed for good, on a topic of their own, until somebody sends them again."""

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
from kser.consumer.job import Job
from kser.controller import BaseProducer
from kser.delivery import Failure
from kser.errors import BrokerUnavailable, MessageTooLarge, NotDelivered
from kser.schemas import Message

if TYPE_CHECKING:
    from kser.consumer.base import BaseConsumer

#: How the names of our headers begin; the message's own headers are left as they are.
PREFIX = "kser-dlq-"
#: Characters of an error's message that are kept, and when the record is too large for that.
TEXT_LIMITS = (2000, 0)
#: Seconds that writing a dead letter may take.
TIMEOUT = 10.0
#: Dead letters that are sent again between two commits: after a crash they may be sent once more.
BATCH = 100
#: Seconds that a poll waits for dead letters.
POLL_TIMEOUT = 0.5


class DeadLetters:
    """Writes dead letters.

    :param topic_for: the topic for messages of a topic; None when they go nowhere.
    :param producer: gives what they are written with.
    :param sender: the consumer's class: its name is in the dead letters, and it sends the signal.
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
        #: How many were written.
        self.written = 0

    def write(self, record: Record, failure: Failure, attempts: int, again: bool = False) -> bool:
        """Write a record where messages go that failed for good.

        :param attempts: how often it was tried.
        :param again: it could not be written before, which was said then.
        :return: whether it may count as done: it is written, or goes nowhere.
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
                f" ({failure.reason}) and cannot be written to {topic!r}: {error}; its partition waits until it can",
            )
            return False
        self.written += 1
        signals.emit(signals.dead_lettered, self._sender, topic=topic, record=record, failure=failure)
        return True

    def _produce(self, topic: str, record: Record, failure: Failure, attempts: int) -> None:
        for limit in TEXT_LIMITS:
            headers = [*record.headers, *self._headers(record, failure, attempts, limit)]
            try:
                self._producer().produce(topic, record.value, key=record.key, headers=headers, timeout=TIMEOUT)
                return
            except MessageTooLarge as error:
                too_large = error
        raise NotDelivered(f"{too_large.message}; raise the limits of the producer and of the topic {topic!r}")

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
    """A message that failed for good.

    :param key: as it was, like ``value`` and ``headers``.
    :param reason: ``undecodable``, ``unknown-entrypoint`` or ``failed``.
    :param error_class: the exception's, empty for a failed result.
    :param error_message: what it said, maybe cut.
    :param attempts: how often it was tried.
    :param topic: where it came from, like ``partition`` and ``offset``.
    :param timestamp: when it was written there, in milliseconds since 1970.
    :param consumer: class, host and process that gave it up.
    :param time: when, in milliseconds since 1970.
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
        """The message; None when it cannot be read."""
        try:
            return Message.loads(self.value or b"")
        except Exception:
            return None


def iter_dead_letters(
    consumer: type[BaseConsumer], config: Mapping[str, Any], topic: str, *, timeout: float = 10
) -> Iterator[DeadLetter]:
    """The dead letters that are on a topic now, oldest first within a partition. Nothing is committed for anybody.

    :param consumer: the consumer class of the transport: ``kser.python_kafka.consumer.Consumer`` or another one.
    :param config: options of its client; the group is not used.
    :param topic: where dead letters are.
    :param timeout: seconds to wait for an answer.
    :raises kser.errors.BrokerUnavailable: there was none.
    """
    with closing(_reader(consumer, config, topic, f"kser-read-{uuid4()}", commit="never")) as reader:
        for job in _jobs(reader, timeout):
            if (letter := _letter(job.record)) is not None:
                yield letter
            reader._dispatch.finish(job)


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
    """Send dead letters once more to where they came from, as they were. What is not to be sent is passed over.

    Each call goes on where the last one with the same ``group`` stopped. After a crash some may be sent twice, with the
    uuids that they have.

    :param consumer: the consumer class of the transport.
    :param config: options of its client; the group is set here.
    :param topic: where dead letters are.
    :param where: which to send; all of them when None.
    :param limit: how many to send at most.
    :param to: a topic to send to in place of the one each came from.
    :param group: who remembers how far it came; ``kser-replay-<topic>`` when None.
    :param timeout: seconds to wait for an answer, and for each delivery.
    :return: how many were sent.
    :raises kser.errors.BrokerUnavailable: there was no answer.
    :raises kser.errors.NotDelivered: one could not be sent; a later call begins with it.
    """
    sent = 0
    with closing(_reader(consumer, config, topic, group or f"kser-replay-{topic}")) as reader:
        for job in _jobs(reader, timeout):
            if sent == limit:
                break
            letter = _letter(job.record)
            if letter is not None and (where is None or where(letter)):
                reader._lending.producer().produce(
                    to or letter.topic, letter.value, key=letter.key, headers=letter.headers, timeout=timeout
                )
                sent += 1
            reader._dispatch.finish(job)
            if reader._dispatch.settled % BATCH == 0:
                reader._poller.commit()
    return sent


def _reader(
    consumer: type[BaseConsumer], config: Mapping[str, Any], topic: str, group: str, commit: str = "after"
) -> BaseConsumer:
    # It reads beside the consumers of this host: their pause file is none of its business.
    reader: Any = type("DeadLetterReader", (consumer,), {"clean_lock": classmethod(lambda cls: None)})
    # The settings of this process are those of its consumers.
    found: BaseConsumer = reader(
        {**config, consumer.GROUP_OPTION: group, consumer.RESET_OPTION: "earliest"},
        [topic],
        commit=commit,
        dead_letter=False,
        workers=1,
        ordering="none",
        max_in_flight=BATCH,
    )
    return found


def _jobs(reader: BaseConsumer, timeout: float) -> Iterator[Job]:
    """What the topic holds, until there is no more."""
    deadline = time.monotonic() + timeout
    while True:
        taken = reader._poller.turn(min(POLL_TIMEOUT, timeout))
        while (job := reader._dispatch.take(0)) is not None:
            yield job
            deadline = time.monotonic() + timeout
        lag = reader._poller.lag()
        if not taken and reader.assignment and reader.assignment <= lag.keys() and max(lag.values()) <= 0:
            return
        if time.monotonic() > deadline:
            raise BrokerUnavailable(
                f"the dead letters of {reader._topics[0]!r} could not be read: no answer within {timeout:g} s; is there"
                " a broker, and is there such a topic?"
            )


def _letter(record: Record) -> DeadLetter | None:
    """A dead letter out of its record; None when it is none."""
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
