"""Tests of dead letters on Apache Kafka: what the broker rejects, and what a consumer with patterns reads."""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import confluent_kafka
import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from kser.confluent import patterns as confluent_patterns
from kser.confluent.consumer import Consumer as ConfluentConsumer
from kser.consumer.replay import iter_dead_letters, replay
from kser.controller import Controller
from kser.python_kafka.consumer import Consumer
from kser.sequencing.task import Task
from tests.kafka.broker import Kafka
from tests.kafka.helpers import client_options, committed, config, message, step_until
from tests.support import lines

#: The default of ``max.message.bytes``, which is the limit of the dead-letter topics in these tests.
TOPIC_LIMIT = 1_048_588

KINDS: dict[str, type[Any]] = {"python_kafka": Consumer, "confluent": ConfluentConsumer}

NewTopicFunction = Callable[..., None]


class Good(Task):
    """A task that records its topic."""

    ran: list[str] = []  # noqa: RUF012  the tests share it

    def run(self) -> None:
        self.ran.append(self.params["on"])


@pytest.fixture(autouse=True)
def registered() -> None:
    Good.ran.clear()
    Controller.register(Good.path, Good)


@pytest.fixture(params=KINDS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def new_topic(kafka: Kafka) -> Iterator[NewTopicFunction]:
    """Return ``new_topic(name, **config)``, which creates a topic; the topics are deleted after the test."""
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    names: list[str] = []

    def create(name: str, **options: str) -> None:
        settings = {key.replace("_", "."): value for key, value in options.items()}
        (created,) = admin.create_topics([NewTopic(name, 1, 1, config=settings)]).values()
        created.result(30)
        names.append(name)

    yield create
    for deleted in admin.delete_topics(names).values() if names else ():
        deleted.result(30)


def new_name() -> str:
    """Return a new name for a topic."""
    return f"kser-test-{uuid.uuid4()}"


def options_for(transport: str, kafka: Kafka, **options: Any) -> dict[str, Any]:
    """Return the options of a consumer, by default of a new group, with the names of the transport."""
    return client_options(transport, config(kafka, **options))


def send(kafka: Kafka, topic: str, *records: tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]) -> None:
    """Send records (value, key, headers) in compressed batches, each followed by a good message."""
    producer = confluent_kafka.Producer(
        {"bootstrap.servers": kafka.bootstrap_servers, "message.max.bytes": 9_000_000, "compression.type": "gzip"}
    )
    for value, key, headers in records:
        producer.produce(topic, value, key, headers=headers)
        producer.produce(topic, message(Good.path, on=topic).dumps(), b"good")
    assert producer.flush(30) == 0


def letters_of(transport: str, kafka: Kafka, topic: str) -> list[Any]:
    """Return the dead letters of a topic, in the order of their original offsets."""
    letters = iter_dead_letters(KINDS[transport], options_for(transport, kafka), topic, timeout=30)
    return sorted(letters, key=lambda letter: letter.offset)


def test_every_failed_record_has_a_dead_letter_that_its_topic_accepts(
    transport: str, kafka: Kafka, new_topic: NewTopicFunction
) -> None:
    """The consumed topic accepts larger records than the dead-letter topic, and batches are compressed."""
    topic = new_name()
    new_topic(topic, max_message_bytes="9000000")
    new_topic(f"{topic}.dlq")
    fits = (b"f" * 1_000_000, b"k", [("trace", b"1")])
    nearly = (b"n" * (TOPIC_LIMIT - 900), b"k", [])
    headers = (b"h" * 1_000_000, b"k", [("trace", b"t" * 100_000), ("null", None)])
    value = (b"v" * 3_000_000, b"k", [("trace", b"1")])
    key = (b"x", b"k" * 2_000_000, [])
    null = (None, None, [("null", None), ("empty", b""), ("null", b"1")])
    records: list[Any] = [fits, nearly, headers, value, key, null]
    send(kafka, topic, *records)
    group = new_name()
    options = options_for(transport, kafka, group_id=group, enable_auto_commit=False)
    with closing(KINDS[transport](options, [topic], dead_letter=True)) as consumer:
        step_until(consumer, lambda: consumer.counts["done"] == 12, "all records are finished", seconds=60)
        assert consumer.counts == {"done": 12, "failed": 6, "dead_lettered": 6}
    assert committed(kafka, group, topic) == 12
    letters = letters_of(transport, kafka, f"{topic}.dlq")
    assert [letter.omitted for letter in letters] == [(), (), ("headers",), ("value", "headers"), ("key", "value"), ()]
    complete = [letters[number] for number in (0, 1, 5)]
    assert [(letter.value, letter.key, list(letter.headers)) for letter in complete] == [fits, nearly, null]
    assert (letters[2].value, letters[2].headers) == (headers[0], ())
    assert [(letter.value, letter.key) for letter in letters[3:5]] == [(None, b"k"), (None, None)]
    assert (letters[3].value_size, letters[3].value_sha256) == (3_000_000, hashlib.sha256(value[0]).hexdigest())
    assert [letter.offset for letter in letters] == [0, 2, 4, 6, 8, 10]
    sent = replay(KINDS[transport], options_for(transport, kafka), f"{topic}.dlq", timeout=30)
    assert (sent, sent.refused) == (4, 2)
    shared = f"{topic}.shared"
    new_topic(shared)
    with closing(KINDS[transport](options, [topic], dead_letter=shared)) as consumer:
        step_until(consumer, lambda: consumer.counts["done"] == 4, "the replayed records are finished", seconds=60)
    again = [(letter.value, letter.key, list(letter.headers)) for letter in letters_of(transport, kafka, shared)]
    expected = [fits, nearly, (headers[0], b"k", []), null]
    assert sorted(again, key=repr) == sorted(expected, key=repr)


def test_record_that_its_dead_letter_topic_rejects_for_good_is_finished(
    transport: str, kafka: Kafka, new_topic: NewTopicFunction, caplog: pytest.LogCaptureFixture
) -> None:
    """A compacted topic accepts no record without a key, and a topic name has at most 249 characters."""
    compacted = new_name()
    long = f"{compacted}-{'x' * 240}"[:247]
    new_topic(compacted)
    new_topic(f"{compacted}.dlq", cleanup_policy="compact")
    new_topic(long)
    for topic in (compacted, long):
        send(kafka, topic, (b"no message", None, []))
    options = options_for(transport, kafka)
    with closing(KINDS[transport](options, [f"^{compacted}"], dead_letter=True)) as consumer:
        step_until(consumer, lambda: consumer.counts["done"] == 4, "all records are finished", seconds=60)
        assert consumer.counts == {"done": 4, "failed": 2, "dead_lettered": 0}
    rejected = sorted(line for line in lines(caplog, logging.ERROR) if "every form of its dead letter" in line)
    assert len(rejected) == 2
    assert [name in line for name, line in zip((long, f"{compacted}.dlq"), rejected, strict=True)] == [True, True]


def test_pattern_follows_new_topics_and_leaves_the_own_dead_letters_out(
    transport: str,
    kafka: Kafka,
    new_topic: NewTopicFunction,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prefix = new_name()
    monkeypatch.setattr(confluent_patterns, "PATTERN_INTERVAL", 0.5)
    options = options_for(transport, kafka)
    if transport == "python_kafka":
        options["metadata_max_age_ms"] = 500
    with closing(KINDS[transport](options, [rf"^{prefix}\."], dead_letter=True)) as consumer:
        unmatched = f"have no topic that matches '^{prefix}\\\\.': the consumer waits for such a topic"
        step_until(consumer, lambda: any(unmatched in line for line in lines(caplog)), "no topic matches", seconds=30)
        new_topic(f"{prefix}.a.dlq")
        for name in ("a", "b"):
            new_topic(f"{prefix}.{name}")
            send(kafka, f"{prefix}.{name}", (b"no message", None, []) if name == "a" else (b"{}", b"k", []))
            if name == "a":
                step_until(consumer, lambda: f"{prefix}.a" in Good.ran, "the first topic is consumed", seconds=60)
                new_topic(f"{prefix}.b.dlq")
        step_until(consumer, lambda: f"{prefix}.b" in Good.ran, "the second topic is consumed", seconds=60)
        step_until(consumer, lambda: consumer.counts["done"] == 4, "all records are finished", seconds=60)
        for _ in range(4):
            consumer.step(0.5)
        assert {partition.topic for partition in consumer.assignment} == {f"{prefix}.a", f"{prefix}.b"}
        assert consumer.counts == {"done": 4, "failed": 2, "dead_lettered": 2}
    assert len([line for line in lines(caplog) if unmatched in line]) == 1
    assert [line for line in lines(caplog, logging.ERROR) if "have no topic" in line] == []
