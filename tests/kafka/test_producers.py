"""Tests of each Kafka producers on Apache Kafka: the producer contract."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from kser.confluent.producer import Producer as ConfluentProducer
from kser.python_kafka.producer import Producer as KafkaProducer
from tests.kafka.broker import Kafka
from tests.transports.producer_contract import KafkaContract, Sent, Transport, read

PARTITIONS = 4


class OnKafka(Transport):
    """Transport of the producer contract on Apache Kafka."""

    def __init__(self, kafka: Kafka) -> None:
        self.kafka = kafka
        self.topics: list[str] = []

    def new_topic(self) -> str:
        self.topics.append(f"kser-test-{uuid.uuid4()}")
        self.kafka.create_topic(self.topics[-1], PARTITIONS)
        return self.topics[-1]

    def records(self, topic: str, count: int) -> list[Sent]:
        return read(self.kafka.bootstrap_servers, topic, count)


class PythonKafka(OnKafka):
    producer = KafkaProducer
    ending = " in {topic}"
    limit = "max_request_size"

    def config(self) -> dict[str, Any]:
        return {"bootstrap_servers": self.kafka.bootstrap_servers}


class Confluent(OnKafka):
    producer = ConfluentProducer
    limit = "message.max.bytes"

    def config(self) -> dict[str, Any]:
        return {"bootstrap.servers": self.kafka.bootstrap_servers}


@pytest.mark.parametrize("kind", [PythonKafka, Confluent])
class TestProducers(KafkaContract):
    @pytest.fixture
    def transport(self, kind: type[OnKafka], kafka: Kafka) -> Iterator[Transport]:
        transport = kind(kafka)
        yield transport
        for topic in transport.topics:
            kafka.delete_topic(topic)
