"""Tests of a rebalance that returns the same partitions: records that did not run yet are delivered again, once."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from kser.controller import Controller
from kser.entry import Entrypoint
from kser.python_kafka.consumer import Consumer
from kser.schemas import Message
from tests.kafka.broker import Kafka
from tests.kafka.helpers import committed, config, put
from tests.support import Clock

PARTITIONS = 4
COUNT = 40
DONE_BEFORE = 5
PATIENCE = 20


class Note(Entrypoint):
    seen: list[str] = []  # noqa: RUF012  emptied before the test

    def run(self) -> None:
        self.seen.append(self.uuid)


class Gated(Consumer):
    """A consumer that pauses after ``limit`` messages."""

    limit = DONE_BEFORE
    time_source: Clock

    @classmethod
    def is_active(cls) -> bool:  # type: ignore[override]
        return len(Note.seen) < cls.limit


@pytest.fixture
def consumer(kafka: Kafka, topic: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Gated:
    monkeypatch.setattr(Note, "seen", [])
    name = topic(PARTITIONS)
    put(kafka, name, [Message(str(number), Note.path) for number in range(COUNT)], PARTITIONS)
    clock = Clock()
    consumer = Gated(config(kafka, name, auto_commit_interval_ms=600_000_000), [name], clock=clock)

    class Slow(Controller):
        ENTRYPOINTS = {Note.path: Note}  # noqa: RUF012

        @classmethod
        def onsuccess(cls, kmsg: Message, result: object) -> object:
            # Every message takes longer than a turn of the loop: the consumer polls with records in hand.
            clock.advance(2)
            return result

    consumer.REGISTRY = Slow
    consumer.time_source = clock
    return consumer


def until(done: Callable[[], bool], consumer: Consumer) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, "it did not happen in time"
        consumer.step(timeout=0.05)


def test_rebalance_commits_finished_records_and_loses_and_duplicates_nothing(
    kafka: Kafka, topic: Callable[..., str], consumer: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kafka-python 3 continues behind the returned records in partitions that a rebalance did not move."""
    (old,) = consumer.client.subscription()
    try:
        until(lambda: len(Note.seen) == DONE_BEFORE, consumer)
        assert consumer._kser_work_queue.in_flight, "nothing was in hand: the test shows nothing"
        assert committed(kafka, old, old, PARTITIONS) == 0
        consumer._kser_poller._client.subscribe([old, topic(PARTITIONS)], consumer._kser_partitions)  # type: ignore[union-attr]
        until(lambda: len(consumer.client.assignment()) == 2 * PARTITIONS, consumer)
        assert committed(kafka, old, old, PARTITIONS) == DONE_BEFORE
        monkeypatch.setattr(Gated, "limit", 10 * COUNT)
        consumer.time_source.advance(2)
        until(lambda: len(Note.seen) >= COUNT, consumer)
        for _ in range(5):
            consumer.step(timeout=0.05)
        assert sorted(Note.seen, key=int) == [str(number) for number in range(COUNT)]
    finally:
        consumer.close()
    assert committed(kafka, old, old, PARTITIONS) == COUNT
