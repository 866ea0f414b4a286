"""Tests of records that no client can decode, and of hostile records between good messages."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib import import_module
from typing import Any, ClassVar

import pytest
from cdumay_result import Result
from kafka import codec

from kser.consumer.base import BaseConsumer
from kser.consumer.client import Partition
from kser.consumer.replay import iter_dead_letters
from kser.controller import Controller
from kser.entry import Entrypoint
from kser.python_kafka import batches
from kser.python_kafka.consumer import Consumer
from tests.conftest import needs
from tests.kafka.broker import Kafka, KafkaBroker
from tests.kafka.helpers import TRANSPORTS, client_options, committed, config, read_values
from tests.kafka.hostile import (
    CODECS,
    DAMAGES,
    DamagingProxy,
    HostileProducer,
    HostileRecord,
    damage_batch,
    good_message,
    hostile_records,
    send_compressed,
)
from tests.support import lines

#: Seconds that a consumer may take for all records of a test, on a loaded machine.
SECONDS = 60

ENTRYPOINT = "hostile.Counted"
DLQ = "kser-dlq-"


class Counted(Entrypoint):
    """An entrypoint that counts its runs."""

    runs: ClassVar[Counter[str]] = Counter()

    def run(self) -> Result:
        self.runs[self.uuid] += 1
        return Result(uuid=self.uuid)


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    """Register the entrypoint with an empty counter."""
    Controller.register(ENTRYPOINT, Counted)
    Counted.runs.clear()
    yield
    Controller.ENTRYPOINTS.pop(ENTRYPOINT, None)


def new_consumer(transport: str, kafka: Kafka, *topics: str, **options: Any) -> BaseConsumer:
    """Return a consumer of a new group, which commits each record at once."""
    cls = import_module(f"kser.{transport}.consumer").Consumer
    consumer: BaseConsumer = cls(
        client_options(transport, config(kafka, enable_auto_commit=False)), list(topics), **options
    )
    return consumer


def step_until(consumer: BaseConsumer, condition: Callable[[], Any]) -> None:
    """Step a consumer until a condition holds."""
    deadline = consumer._kser_clock() + SECONDS
    while not condition():
        assert consumer._kser_clock() < deadline, f"not within {SECONDS} s: {consumer.counts}"
        consumer.step(0.1)


def offsets(consumer: BaseConsumer) -> dict[tuple[str, int], int]:
    """Return the committed offset of each partition."""
    return {tuple(key): commit.offset for key, commit in consumer._kser_partitions.committed_offsets().items()}


# -- hostile records ---------------------------------------------------------------------------------------------------


class Sent:
    """A topic with hostile records between good messages: in partition 0 plain batches, in 1 to 4 compressed ones."""

    def __init__(self, kafka: Kafka, topic: str) -> None:
        self.topic = topic
        self.uuids: list[str] = []
        self.bad: list[HostileRecord] = []
        self.ends: Counter[tuple[str, int]] = Counter()
        with closing(HostileProducer(kafka)) as producer:
            for record in hostile_records(ENTRYPOINT):
                producer.send(topic, self._note(record, 0))
                producer.send(topic, self._note(self._good(), 0))
            mixed = [record for record in hostile_records(ENTRYPOINT) if len(record.value or b"") < 60_000]
            small = [record for record in mixed if sum(len(value or b"") for _, value in record.headers) < 60_000]
            producer.send(topic, *(self._note(record, 1) for record in small), partition=1, is_gzipped=True)
            bomb = HostileRecord("20 MB of zeros, compressed to 20 kB", bytes(20_000_000))
            producer.send(topic, self._note(bomb, 1), partition=1, is_gzipped=True)
        for partition, name in enumerate(CODECS[2:], start=2):
            # librdkafka compresses only batches that become smaller.
            good = [self._note(self._good(text="x" * 2000), partition) for _ in range(5)]
            send_compressed(kafka, topic, name, [record.value or b"" for record in good], partition)

    def _good(self, **params: Any) -> HostileRecord:
        uuid, value = good_message(ENTRYPOINT, **params)
        return HostileRecord("good", value, uuid=uuid)

    def _note(self, record: HostileRecord, partition: int) -> HostileRecord:
        self.ends[self.topic, partition] += 1
        self.uuids.append(record.uuid) if record.uuid else self.bad.append(record)
        return record

    @property
    def once(self) -> Counter[str]:
        """The runs that the records must cause: one for each good message."""
        return Counter(self.uuids)


@pytest.fixture(scope="module")
def sent(kafka: Kafka) -> Sent:
    """Return the topic with hostile records."""
    kafka.create_topic("hostile", len(CODECS))
    return Sent(kafka, "hostile")


def needs_codecs(transport: str) -> None:
    """Skip a test of kafka-python if the packages of its codecs are not installed."""
    if transport == "python_kafka" and not (codec.has_snappy() and codec.has_lz4() and codec.has_zstd()):
        needs("kser[codecs]")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_consumer_runs_each_good_message_once_between_hostile_records(transport: str, kafka: Kafka, sent: Sent) -> None:
    needs_codecs(transport)
    with closing(new_consumer(transport, kafka, sent.topic)) as consumer:
        step_until(consumer, lambda: offsets(consumer) == dict(sent.ends))
        assert sent.once == Counted.runs
        assert consumer.counts["failed"] == len(sent.bad)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_consumer_writes_a_dead_letter_for_each_hostile_record(
    transport: str, kafka: Kafka, topic: Callable[..., str]
) -> None:
    name, dead = topic(), topic()
    records = hostile_records(ENTRYPOINT)
    bad = [record for record in records if not record.uuid]
    with closing(HostileProducer(kafka)) as producer:
        for record in records:
            producer.send(name, record)
    with closing(new_consumer(transport, kafka, name, dead_letter=dead)) as consumer:
        step_until(consumer, lambda: offsets(consumer) == {(name, 0): len(records)})
        assert Counter(record.uuid for record in records if record.uuid) == Counted.runs
        assert consumer.counts["dead_lettered"] == len(bad)
    values = read_values(kafka, dead)
    assert len(values) == len(bad)
    # The dead letter of a record near the size limit of the topic may be a stub without the value.
    assert not Counter(record.value for record in bad if not record.is_large) - Counter(values)


# -- codecs that are not installed -------------------------------------------------------------------------------------


def test_only_partitions_with_a_missing_codec_wait(
    kafka: Kafka, sent: Sent, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ("snappy", "lz4", "lz4f", "lz4framed", "zstd"):
        monkeypatch.setattr(codec, module, None)
    readable = {key: end for key, end in sent.ends.items() if key[1] < 2}
    with closing(new_consumer("python_kafka", kafka, sent.topic)) as consumer:
        step_until(consumer, lambda: offsets(consumer).items() >= readable.items())
        step_until(consumer, lambda: len([line for line in lines(caplog, logging.ERROR) if " waits: " in line]) == 3)
        assert {offset for key, offset in offsets(consumer).items() if key not in readable} == {0}
        assert consumer.counts["failed"] == len(sent.bad)
    for partition, package in enumerate(("python-snappy", "lz4", "zstandard"), start=2):
        (line,) = [line for line in lines(caplog, logging.ERROR) if line.startswith(f"hostile[{partition}] waits: ")]
        assert f"the Python package '{package}' is not installed: install kser[codecs]" in line


# -- damaged data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_data_that_is_damaged_on_the_wire_is_fetched_again(
    transport: str, kafka: Kafka, topic: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    name = topic()
    first, second, third = ((good_message(ENTRYPOINT, n=number)) for number in range(3))
    with closing(HostileProducer(kafka)) as producer, closing(DamagingProxy(kafka)) as proxy:
        for uuid, value in (first, second, third):
            producer.send(name, HostileRecord("good", value, uuid=uuid))
        proxy.damage(second[0].encode(), times=2)
        with closing(new_consumer(transport, proxy.kafka, name)) as consumer:
            step_until(consumer, lambda: offsets(consumer) == {(name, 0): 3})
            assert consumer.counts["done"] == 3
            assert not consumer.counts.get("failed")
        assert proxy.damaged == 2
    assert Counter([first[0], second[0], third[0]]) == Counted.runs
    assert not [line for line in lines(caplog, logging.ERROR) if "cannot be read" in line]


class DamagedBroker:
    """A broker with a topic for each kind of damage. Each topic has four batches with three messages each."""

    def __init__(self, kafka: KafkaBroker) -> None:
        self.good: list[str] = []
        with closing(HostileProducer(kafka)) as producer:
            for name in self.topics:
                kafka.create_topic(name)
                for batch in range(4):
                    messages = [good_message(ENTRYPOINT) for _ in range(3)]
                    producer.send(name, *(HostileRecord("good", value, uuid=uuid) for uuid, value in messages))
                    if batch != 1:
                        self.good += [uuid for uuid, _ in messages]
        kafka.stop()
        for number, damage in enumerate(DAMAGES.values()):
            damage_batch(kafka, f"damaged-{number}", 1, damage)
        kafka.start()

    @property
    def topics(self) -> list[str]:
        """The names of the topics."""
        return [f"damaged-{number}" for number in range(len(DAMAGES))]


def test_consumers_skip_a_batch_that_is_damaged_on_disk(
    own_kafka: KafkaBroker, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = DamagedBroker(own_kafka)
    for transport in TRANSPORTS:
        Counted.runs.clear()
        caplog.clear()
        dead = f"dead-{transport}".replace("_", "-")
        own_kafka.create_topic(dead)
        with closing(new_consumer(transport, own_kafka, *damaged.topics, dead_letter=dead)) as consumer:
            step_until(consumer, lambda: offsets(consumer) == {(name, 0): 12 for name in damaged.topics})
            assert Counter(damaged.good) == Counted.runs
            assert consumer.counts["failed"] == consumer.counts["dead_lettered"] == len(damaged.topics)
        skipped = [line for line in lines(caplog, logging.ERROR) if "cannot be read" in line]
        assert sorted(line.partition(": ")[2].partition(" cannot")[0] for line in skipped) == [
            f"offsets 3 to 5 of {Partition(name, 0)}" for name in damaged.topics
        ]
        letters = iter_dead_letters(Consumer, config(own_kafka), dead, timeout=SECONDS)
        assert sorted((letter.topic, letter.offset, letter.reason) for letter in letters) == [
            (name, 3, "unreadable") for name in damaged.topics
        ]
        group = consumer._kser_group
        assert group is not None
        assert [committed(own_kafka, group, name) for name in damaged.topics] == [12] * len(damaged.topics)


def test_interval_between_reports_of_a_waiting_partition_is_ten_minutes() -> None:
    assert batches.REPORT_INTERVAL == 600
