"""Reading dead letters back, and replaying them to their original topics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, closing
from typing import Any
from uuid import uuid4

from kser.attempt import UNREADABLE
from kser.config import is_topic_name
from kser.consumer.base import BaseConsumer
from kser.consumer.client import Partition, Record
from kser.consumer.dead_letters import PREFIX, SUFFIX, DeadLetter, has_dead_letter_headers, parse_dead_letter
from kser.consumer.services import SharedProducer
from kser.consumer.unreadable import UnreadableRecord, decoding_error
from kser.controller import BaseProducer
from kser.errors import BrokerUnavailable, MessageTooLarge, RecordRejected, UsageError
from kser.escaping import escape_lines

logger = escape_lines(logging.getLogger(__name__))

#: Number of dead letters that are replayed between two commits. After a crash, the next replay repeats the dead letters
#: that were replayed after the last commit.
READ_BATCH = 100

#: Time limit of one poll for dead letters, in seconds.
POLL_TIMEOUT = 0.5

#: Maximum number of refused records that a replay logs separately. After that, the replay only logs their number.
MAX_REFUSAL_LINES = 20


#: Maximum number of dead letters that a replay without ``topics`` leaves unread because they name other topics.
MAX_KEPT = 20


class ReplayCount(int):
    """The number of messages that a replay has sent."""

    #: The number of records that the replay has refused to send, and that it has logged at WARNING.
    refused: int = 0


def iter_dead_letters(
    consumer: type[BaseConsumer], config: Mapping[str, Any], topic: str, *, timeout: float = 10
) -> Iterator[DeadLetter]:
    """Iterate over the dead letters currently on a topic, oldest first within a partition, without committing offsets.

    :param consumer: the consumer class of the transport, for example ``kser.python_kafka.consumer.Consumer``.
    :param config: options of the consumer's client; the group in ``config`` is ignored.
    :param topic: the topic of the dead letters.
    :param timeout: seconds to wait for a response of the broker.
    :raises kser.errors.BrokerUnavailable: the broker did not respond in time.
    """
    with closing(_reader(consumer, config, topic, f"kser-read-{uuid4()}", commit="never")) as reader:
        for record in _records(reader, topic, timeout):
            if (letter := parse_dead_letter(record)) is not None:
                yield letter
            elif error := decoding_error(record):
                logger.warning(f"{_place(record)} is no readable dead letter: {error}")


def replay(
    consumer: type[BaseConsumer],
    config: Mapping[str, Any],
    topic: str,
    *,
    where: Callable[[DeadLetter], bool] | None = None,
    limit: int | None = None,
    topics: Collection[str] | None = None,
    to: str | None = None,
    group: str | None = None,
    timeout: float = 10,
) -> ReplayCount:
    """Send the original message of each dead letter to its original topic; skip dead letters that ``where`` rejects.

    Each call continues where the previous call with the same ``group`` stopped. After a crash, some messages may be
    sent twice, with the same uuids.

    A replay sends only to the topic ``<name>`` if the dead-letter topic is ``<name>.dlq``, or to ``topics``, because
    the headers of a dead letter can be forged. A replay refuses every other dead letter, dead letters without their
    value or with broken headers, and messages that the topic rejects for good: it logs a WARNING, and continues.
    Refused dead letters count as read. Without ``topics``, those of other topics stay unread for a call with topics.

    :param consumer: the consumer class of the transport.
    :param config: options of the consumer's client; ``group`` replaces the group in ``config``.
    :param topic: the topic of the dead letters.
    :param where: returns whether to send a dead letter; None sends all dead letters.
    :param limit: the maximum number of messages to send.
    :param topics: the original topics to send to. Without ``.dlq`` in ``topic``, ``topics`` or ``to`` is required.
    :param to: a topic to send all messages to, instead of their original topics.
    :param group: the consumer group that stores the progress of the replay; ``kser-replay-<topic>`` if None.
    :param timeout: seconds to wait for a response of the broker, and for each delivery.
    :return: the number of messages sent; its attribute ``refused`` is the number of refused records.
    :raises kser.errors.BrokerUnavailable: the broker did not respond in time.
    :raises kser.errors.DeliveryError: a message could not be sent now; the next call starts with this message.
    :raises kser.errors.UsageError: the original topics are unknown, a name is illegal, or ``topics`` is missing and
        more than 20 dead letters name other topics.
    """
    sender = _Sender(topic, _allowed_topics(topic, topics, to), where, to, timeout, keeps_others=topics is None)
    sent = 0
    with ExitStack() as last_to_first:
        reader = _reader(consumer, config, topic, group or f"kser-replay-{topic}")
        shared = SharedProducer(reader.make_producer)
        last_to_first.callback(shared.close)
        last_to_first.callback(reader.close)
        last_to_first.callback(sender.log_number)
        for record in _records(reader, topic, timeout, sender.is_kept):
            if sent == limit:
                break
            sent += sender.send(record, shared.producer)
    return sender.count(sent)


def _allowed_topics(topic: str, topics: Collection[str] | None, to: str | None) -> Collection[str] | None:
    """Return the topics that messages may be sent to; None allows all topics, because ``to`` replaces them."""
    if isinstance(topics, str):
        raise UsageError(f"topics must be a list of names, not a str: pass [{topics!r}]")
    for name in (topic, *(topics or ()), *(() if to is None else (to,))):
        if not isinstance(name, str) or not is_topic_name(name):
            raise UsageError(f"replay: {name!r} is no legal name of a topic: correct it")
    if topic == to or topic in (topics or ()):
        raise UsageError(f"replay: {topic!r} is the dead-letter topic itself, so the replay would never end")
    if to is not None:
        return None
    if topics is not None:
        return topics
    if not topic.endswith(SUFFIX):
        raise UsageError(
            f"replay: the dead-letter topic {topic!r} may contain dead letters of any topic, because its name does not"
            f" end with {SUFFIX!r}: pass the original topics as topics=[...], or pass to=..."
        )
    return [topic.removesuffix(SUFFIX)]


def _place(record: Record) -> str:
    """Return the offset of a record, or the offsets of an unreadable record, as the subject of a sentence."""
    if isinstance(record, UnreadableRecord):
        return f"the data at {record}"
    return f"offset {record.offset} of {Partition(record.topic, record.partition)}"


def _refusal(letter: DeadLetter) -> str:
    """Return the reason why a dead letter contains no message to send; empty if it contains one."""
    if letter.reason == UNREADABLE:
        return "its original data was unreadable, so it contains no message"
    if "value" in letter.omitted:
        return "it has no value, because the value was too large for the dead-letter topic"
    return ""


class _Sender:
    """The sender of a replay, which refuses some records.

    :param topic: the topic of the dead letters.
    :param allowed: the topics that messages may be sent to; None allows all topics.
    :param where: returns whether to send a dead letter; None sends all dead letters.
    :param to: a topic to send all messages to, or None.
    :param timeout: seconds to wait for each delivery.
    :param keeps_others: whether the dead letters of other topics stay unread.
    """

    def __init__(
        self,
        topic: str,
        allowed: Collection[str] | None,
        where: Callable[[DeadLetter], bool] | None,
        to: str | None,
        timeout: float,
        *,
        keeps_others: bool,
    ) -> None:
        self._topic = topic
        self._allowed = allowed
        self._where = where
        self._to = to
        self._timeout = timeout
        self._keeps_others = keeps_others
        self._kept: list[Record] = []
        self._refused = 0

    def is_kept(self, record: Record) -> bool:
        """Return whether the record that was refused last stays unread."""
        return bool(self._kept) and self._kept[-1] is record

    def send(self, record: Record, producer: Callable[[], BaseProducer]) -> bool:
        """Send the message of a dead letter, or refuse the record.

        :param record: a record of the topic of the dead letters.
        :param producer: returns the producer.
        :return: True if the message was sent.
        :raises kser.errors.DeliveryError: the message could not be sent now.
        :raises kser.errors.UsageError: too many dead letters name other topics.
        """
        letter = parse_dead_letter(record)
        if letter is None:
            if error := decoding_error(record):
                self._refuse(record, f"the client cannot decode it: {error}")
            elif has_dead_letter_headers(record):
                self._refuse(record, f"its headers {PREFIX}… are incomplete or invalid")
            return False
        if self._where is not None and not self._where(letter):
            return False
        if self._allowed is not None and letter.topic not in self._allowed:
            self._refuse_topic(record, letter.topic, self._allowed)
            return False
        if reason := _refusal(letter):
            self._refuse(record, reason)
            return False
        target = self._to or letter.topic
        try:
            producer().produce(target, letter.value, key=letter.key, headers=letter.headers, timeout=self._timeout)
        except (MessageTooLarge, RecordRejected) as error:
            self._refuse(record, error.message)
            return False
        return True

    def _refuse_topic(self, record: Record, named: str, allowed: Collection[str]) -> None:
        """Refuse a dead letter of another topic, and leave it unread if the caller did not name the topics.

        :param named: the original topic.
        :raises kser.errors.UsageError: too many dead letters were left unread.
        """
        reason = (
            f"it names {named[:250]!r} as its original topic, and this replay may send only to"
            f" {', '.join(map(repr, allowed))}"
        )
        if not self._keeps_others:
            self._refuse(record, reason)
            return
        self._kept.append(record)
        if len(self._kept) > MAX_KEPT:
            raise UsageError(
                f"replay: more than {MAX_KEPT} dead letters of {self._topic!r} name other topics, such as"
                f" {named[:250]!r}: pass topics=[...] with all topics to send to; these dead letters stay unread"
            )
        self._refuse(record, f"{reason}; it stays unread: pass topics=[...] with all topics to send to")

    def _refuse(self, record: Record, reason: str) -> None:
        """Count a refused record, and log it unless many records were logged already."""
        self._refused += 1
        if self._refused <= MAX_REFUSAL_LINES:
            logger.warning(f"replay: {_place(record)} is not sent: {reason}")

    def count(self, sent: int) -> ReplayCount:
        """Return the number of sent messages, with the number of refused records."""
        count = ReplayCount(sent)
        count.refused = self._refused
        return count

    def log_number(self) -> None:
        """Log the number of refused records, if some of them were not logged."""
        if self._refused > MAX_REFUSAL_LINES:
            logger.warning(f"replay: {self._refused} records of {self._topic!r} were not sent")


def _reader(
    consumer: type[BaseConsumer], config: Mapping[str, Any], topic: str, group: str, commit: str = "after"
) -> BaseConsumer:
    # A consumer removes the pause file when it starts. The consumer that reads the dead letters must not do so, because
    # the pause file controls the regular consumers of this host.
    reader: Any = type("DeadLetterReader", (consumer,), {"clean_lock": classmethod(lambda cls: None)})
    # This function sets these options itself, because the settings of this process are meant for its regular consumers.
    instance: BaseConsumer = reader(
        {**config, consumer.GROUP_OPTION: group, consumer.RESET_OPTION: "earliest"},
        [topic],
        commit=commit,
        dead_letter=False,
        workers=1,
        ordering="none",
        max_in_flight=READ_BATCH,
    )
    return instance


def _records(
    reader: BaseConsumer, topic: str, timeout: float, is_kept: Callable[[Record], bool] = lambda record: False
) -> Iterator[Record]:
    """Iterate over the records of the topic, up to the current end of the topic.

    :param is_kept: returns whether a record stays unread.
    """
    try:
        yield from reader._kser_read(timeout, POLL_TIMEOUT, READ_BATCH, is_kept)
    except TimeoutError:
        reasons = "; ".join(f"{key} waits: {reason}" for key, reason in reader._kser_poller.waiting.items())
        raise BrokerUnavailable(
            f"the dead letters of {topic!r} could not be read: "
            + (
                reasons
                or f"no response within {timeout:g} s; check that the broker is reachable and that the topic exists"
            )
        ) from None
