"""Tests of the commit modes: the committed offset before, during and after each message."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from cdumay_result import Result

from kser.controller import Controller
from kser.entry import Entrypoint
from kser.python_kafka.consumer import Consumer
from tests.consumer.harness import ConsumerThread
from tests.kafka.broker import Kafka
from tests.kafka.helpers import committed, config, message, send_records, step_until, wait_until

#: Client options for a commit interval that is longer than any test.
LONG_INTERVAL: dict[str, Any] = {"auto_commit_interval_ms": 3_600_000}
#: Client options for a commit after each message.
MANUAL_COMMIT: dict[str, Any] = {"enable_auto_commit": False}

#: The param of a message whose task does not read the committed offset.
NO_READ = {"read": False}


class OffsetReader(Entrypoint):
    """An entrypoint that reads the committed offset while it runs."""

    #: The topic of the messages, and the name of the consumer group.
    topic: str
    read_offset: Callable[[], int | None]
    #: The offset that each message has read, None for a message with ``NO_READ``.
    offsets: list[int | None]

    def run(self) -> Result:
        type(self).offsets.append(type(self).read_offset() if self.params.get("read", True) else None)
        if self.params.get("then") == "interrupt":
            raise KeyboardInterrupt
        return Result(uuid=self.uuid)


@pytest.fixture
def reader(kafka: Kafka, topic: Callable[..., str]) -> type[OffsetReader]:
    """Return the entrypoint ``reader``, with a topic for its messages."""
    name = topic()

    class TopicReader(OffsetReader):
        topic = name
        offsets = []  # noqa: RUF012
        read_offset = staticmethod(lambda: committed(kafka, name, name))

    Controller.register("reader", TopicReader)
    return TopicReader


def consumer_of(kafka: Kafka, reader: type[OffsetReader], commit: str = "after", **options: Any) -> Consumer:
    """Return a consumer of the topic of the entrypoint."""
    return Consumer(config(kafka, reader.topic, **options), [reader.topic], commit=commit)


def test_manual_commit_after_commits_each_message_when_it_finishes(kafka: Kafka, reader: type[OffsetReader]) -> None:
    send_records(kafka, reader.topic, [message("reader") for _ in range(4)])
    with closing(consumer_of(kafka, reader, **MANUAL_COMMIT)) as consumer:
        step_until(consumer, lambda: len(reader.offsets) == 4, "all messages are handled")
        assert reader.offsets == [0, 1, 2, 3]
        assert reader.read_offset() == 4


def test_manual_commit_before_commits_each_message_when_it_starts(kafka: Kafka, reader: type[OffsetReader]) -> None:
    send_records(kafka, reader.topic, [message("reader") for _ in range(4)])
    with closing(consumer_of(kafka, reader, "before", auto_offset_reset="earliest", **MANUAL_COMMIT)) as consumer:
        step_until(consumer, lambda: len(reader.offsets) == 4, "all messages are handled")
        assert reader.offsets == [1, 2, 3, 4]


@pytest.mark.parametrize(("commit", "expected"), [("after", 1), ("before", 2)])
def test_interrupted_message_is_committed_only_with_commit_before(
    kafka: Kafka, reader: type[OffsetReader], commit: str, expected: int
) -> None:
    send_records(kafka, reader.topic, [message("reader"), message("reader", then="interrupt")])
    consumer = consumer_of(kafka, reader, commit, auto_offset_reset="earliest")
    with pytest.raises(KeyboardInterrupt), closing(consumer):
        step_until(consumer, lambda: False, "an interrupt")
    assert reader.read_offset() == expected


@pytest.mark.parametrize("commit", ["after", "before"])
def test_interval_commit_waits_for_the_interval_or_the_close(
    kafka: Kafka, reader: type[OffsetReader], commit: str
) -> None:
    send_records(kafka, reader.topic, [message("reader") for _ in range(3)])
    with closing(consumer_of(kafka, reader, commit, auto_offset_reset="earliest", **LONG_INTERVAL)) as consumer:
        step_until(consumer, lambda: len(reader.offsets) == 3, "all messages are handled")
        assert reader.offsets == [0, 0, 0], "only the start position is committed"
        assert reader.read_offset() == 0
    assert reader.read_offset() == 3


def test_commit_interval_is_that_of_the_client(kafka: Kafka, reader: type[OffsetReader]) -> None:
    with closing(consumer_of(kafka, reader, auto_commit_interval_ms=100)) as consumer:
        send_records(kafka, reader.topic, [message("reader", **NO_READ)])
        step_until(
            consumer, lambda: reader.read_offset() == 1, "the offset is committed while the consumer runs", seconds=5
        )


def test_poison_message_is_committed_like_any_other(kafka: Kafka, reader: type[OffsetReader]) -> None:
    pills = [b"", b"\xff\xfe\xfd", b"{", b"[]", b'{"uuid": 1}', message("unknown.Entrypoint").dumps().encode()]
    send_records(kafka, reader.topic, [*pills, message("reader")])
    with closing(consumer_of(kafka, reader, **MANUAL_COMMIT)) as consumer:
        step_until(consumer, lambda: reader.offsets, "the message after them is handled")
        assert reader.offsets == [len(pills)]
        assert reader.read_offset() == len(pills) + 1


def test_unchanged_offset_is_not_committed_again(
    kafka: Kafka, reader: type[OffsetReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(consumer_of(kafka, reader, auto_commit_interval_ms=50)) as consumer:
        step_until(consumer, lambda: consumer.assignment, "the partition is assigned")
        send_records(kafka, reader.topic, [message("reader", **NO_READ)])
        commits: list[Any] = []
        commit = consumer.client.commit

        def record_and_commit(offsets: Any, **options: Any) -> None:
            commits.append(offsets)
            commit(offsets, **options)

        monkeypatch.setattr(consumer.client, "commit", record_and_commit)
        step_until(consumer, lambda: reader.read_offset() == 1, "the offset is committed")
        for _ in range(3):
            consumer.step(0.1)
        # The first commit contains the offset before the record, and the count of starts.
        assert [offset.offset for offsets in commits for offset in offsets.values()] == [0, 1]


@pytest.mark.parametrize(("commit", "expected"), [("after", 2), ("before", 0)])
def test_new_group_starts_at_the_earliest_message_only_with_commit_after(
    kafka: Kafka, reader: type[OffsetReader], commit: str, expected: int
) -> None:
    send_records(kafka, reader.topic, [message("reader", **NO_READ)] * 2)
    with closing(consumer_of(kafka, reader, commit)) as consumer:
        step_until(consumer, consumer.client.assignment, "the partition is assigned")
        for _ in range(3):
            consumer.step()
        assert len(reader.offsets) == expected


def test_consumer_without_a_group_handles_messages_and_commits_nothing(
    kafka: Kafka, reader: type[OffsetReader], caplog: pytest.LogCaptureFixture
) -> None:
    # This consumer has no group_id.
    options = {"bootstrap_servers": kafka.bootstrap_servers, "auto_offset_reset": "earliest"}
    send_records(kafka, reader.topic, [message("reader", **NO_READ)] * 3)
    with closing(Consumer(options, [reader.topic])) as consumer:
        step_until(consumer, lambda: len(reader.offsets) == 3, "all messages are handled")
    assert "without group_id no offset can be committed" in caplog.text


def test_stop_ends_a_consumer_running_in_another_thread(kafka: Kafka, reader: type[OffsetReader]) -> None:
    send_records(kafka, reader.topic, [message("reader", **NO_READ)])
    consumer: Any = consumer_of(kafka, reader)
    with ConsumerThread(consumer) as thread:
        wait_until(lambda: reader.offsets, "the message is handled")
        consumer.stop()
        ending = thread.join()
    assert isinstance(ending, SystemExit)
    assert ending.code == 0
    assert reader.read_offset() == 1
