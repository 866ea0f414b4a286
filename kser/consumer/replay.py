"""Reading dead letters back, and replaying them to their original topics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from typing import Any
from uuid import uuid4

from kser.attempt import UNREADABLE
from kser.consumer.base import BaseConsumer
from kser.consumer.client import Record
from kser.consumer.dead_letters import DeadLetter, parse_dead_letter
from kser.consumer.services import SharedProducer
from kser.errors import BrokerUnavailable

#: Number of dead letters that are replayed between two commits. After a crash, the next replay repeats the dead letters
#: that were replayed after the last commit.
READ_BATCH = 100

#: Time limit of one poll for dead letters, in seconds.
POLL_TIMEOUT = 0.5


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
    """Send the original message of each dead letter to its original topic.

    Skip dead letters that ``where`` rejects, and dead letters of unreadable data, which contain no message.

    Each call continues where the previous call with the same ``group`` stopped. After a crash, some messages may be
    sent twice, with the same uuids.

    :param consumer: the consumer class of the transport.
    :param config: options of the consumer's client; ``group`` replaces the group in ``config``.
    :param topic: the topic of the dead letters.
    :param where: returns whether to send a dead letter; None sends all dead letters.
    :param limit: the maximum number of messages to send.
    :param to: a topic to send all messages to, instead of their original topics.
    :param group: the consumer group that stores the progress of the replay; ``kser-replay-<topic>`` if None.
    :param timeout: seconds to wait for a response of the broker, and for each delivery.
    :return: the number of messages sent.
    :raises kser.errors.BrokerUnavailable: the broker did not respond in time.
    :raises kser.errors.DeliveryError: a message could not be sent; the next call starts with this message.
    """
    sent = 0
    with ExitStack() as last_to_first:
        reader = _reader(consumer, config, topic, group or f"kser-replay-{topic}")
        sender = SharedProducer(reader.make_producer)
        last_to_first.callback(sender.close)
        last_to_first.callback(reader.close)
        for record in _records(reader, topic, timeout):
            if sent == limit:
                break
            letter = parse_dead_letter(record)
            # The dead letter of unreadable data has no value that could be sent.
            if letter is None or letter.reason == UNREADABLE:
                continue
            if where is None or where(letter):
                sender.producer().produce(
                    to or letter.topic, letter.value, key=letter.key, headers=letter.headers, timeout=timeout
                )
                sent += 1
    return sent


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


def _records(reader: BaseConsumer, topic: str, timeout: float) -> Iterator[Record]:
    """Iterate over the records of the topic, up to the current end of the topic."""
    try:
        yield from reader._kser_read(timeout, POLL_TIMEOUT, READ_BATCH)
    except TimeoutError:
        raise BrokerUnavailable(
            f"the dead letters of {topic!r} could not be read: no response within {timeout:g} s;"
            " check that the broker is reachable and that the topic exists"
        ) from None
