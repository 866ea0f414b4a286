"""Tests of a rebalance that returns the same partitions: records in flight are redelivered, and each runs once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kser.controller import Controller
from kser.entry import Entrypoint
from kser.python_kafka.consumer import Consumer
from kser.schemas import Message
from tests.kafka.broker import Kafka
from tests.kafka.helpers import committed, config, send_records, step_until
from tests.support import Clock

PARTITIONS = 4
#: The number of messages, and the number of messages that run before the rebalance.
COUNT = 40
RUN_BEFORE = 5


class RunRecorder(Entrypoint):
    """An entrypoint that records the uuids of its messages."""

    runs: list[str] = []  # noqa: RUF012  emptied before the test

    def run(self) -> None:
        self.runs.append(self.uuid)


class PausingConsumer(Consumer):
    """A consumer that pauses after ``limit`` messages, and its clock."""

    limit = RUN_BEFORE
    clock: Clock

    @classmethod
    def is_active(cls) -> bool:  # type: ignore[override]
        return len(RunRecorder.runs) < cls.limit


@pytest.fixture
def consumer(kafka: Kafka, topic: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> PausingConsumer:
    monkeypatch.setattr(RunRecorder, "runs", [])
    name = topic(PARTITIONS)
    send_records(kafka, name, [Message(str(number), RunRecorder.path) for number in range(COUNT)], PARTITIONS)
    clock = Clock()
    consumer = PausingConsumer(config(kafka, name, auto_commit_interval_ms=600_000_000), [name], clock=clock)

    class AdvancingController(Controller):
        ENTRYPOINTS = {RunRecorder.path: RunRecorder}  # noqa: RUF012

        @classmethod
        def onsuccess(cls, kmsg: Message, result: object) -> object:
            # Each message takes longer than a step, so that the consumer polls while records are in flight.
            clock.advance(2)
            return result

    consumer.REGISTRY = AdvancingController
    consumer.clock = clock
    return consumer


def test_rebalance_commits_finished_records_and_loses_and_duplicates_nothing(
    kafka: Kafka, topic: Callable[..., str], consumer: PausingConsumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kafka-python 3 does not redeliver fetched records of partitions that a rebalance did not move."""
    (old,) = consumer.client.subscription()
    try:
        step_until(consumer, lambda: len(RunRecorder.runs) == RUN_BEFORE, "the first messages have run", timeout=0.05)
        assert consumer._kser_work_queue.in_flight, "no record was in flight, so the test shows nothing"
        assert committed(kafka, old, old, PARTITIONS) == 0
        consumer._kser_poller._client.subscribe([old, topic(PARTITIONS)], consumer._kser_partitions)  # type: ignore[union-attr]
        step_until(
            consumer,
            lambda: len(consumer.client.assignment()) == 2 * PARTITIONS,
            "the partitions of both topics are assigned",
            timeout=0.05,
        )
        assert committed(kafka, old, old, PARTITIONS) == RUN_BEFORE
        monkeypatch.setattr(PausingConsumer, "limit", 10 * COUNT)
        consumer.clock.advance(2)
        step_until(consumer, lambda: len(RunRecorder.runs) >= COUNT, "all messages have run", timeout=0.05)
        for _ in range(5):
            consumer.step(timeout=0.05)
        assert sorted(RunRecorder.runs, key=int) == [str(number) for number in range(COUNT)]
    finally:
        consumer.close()
    assert committed(kafka, old, old, PARTITIONS) == COUNT
