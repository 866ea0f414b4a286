"""Tests of every producer on brokers in this process: the in-memory broker, and the embedded one through sockets."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from kser.confluent.producer import Producer as ConfluentProducer
from kser.controller import BaseProducer
from kser.dummy.broker import InMemoryBroker
from kser.dummy.producer import Producer as DummyProducer
from kser.embedded import EmbeddedBroker
from kser.errors import DeliveryError
from kser.python_kafka.producer import Producer as KafkaProducer
from tests.support import UUID, message
from tests.transports.client_contract import PROMPT_SECONDS
from tests.transports.harness import new_name
from tests.transports.producer_contract import KafkaContract, ProducerContract, Sent, Transport, read


class Dummy(Transport):
    """The in-memory broker and its producer."""

    producer = DummyProducer
    ending = " in {topic} (timeout: 60)"
    bulk_ending = " to {topic} (timeout: 60)"
    limit = "max_request_size"

    def config(self) -> dict[str, Any]:
        return {"bootstrap_servers": "contract"}

    def new_topic(self) -> str:
        name = new_name()
        InMemoryBroker.at("contract").create_topic(name, 4)
        return name

    def records(self, topic: str, count: int) -> list[Sent]:
        records = [record for log in InMemoryBroker.at("contract").topics[topic] for record in log]
        assert len(records) == count
        return [Sent(record.value, record.key, list(record.headers), record.partition) for record in records]


class Embedded(Transport):
    """The embedded broker, and a producer for it."""

    def __init__(self, broker: EmbeddedBroker) -> None:
        self.broker = broker

    def new_topic(self) -> str:
        name = new_name()
        self.broker.create_topic(name)
        return name

    def records(self, topic: str, count: int) -> list[Sent]:
        return read(self.broker.bootstrap_servers, topic, count)


class PythonKafka(Embedded):
    producer = KafkaProducer
    ending = " in {topic}"
    limit = "max_request_size"

    def config(self) -> dict[str, Any]:
        return self.broker.producer_config


class Confluent(Embedded):
    producer = ConfluentProducer
    limit = "message.max.bytes"

    def config(self) -> dict[str, Any]:
        return {"bootstrap.servers": self.broker.bootstrap_servers}


@pytest.fixture(scope="module")
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as broker:
        yield broker


class TestDummy(ProducerContract):
    @pytest.fixture
    def transport(self) -> Iterator[Transport]:
        yield Dummy()
        InMemoryBroker.reset()


@pytest.mark.parametrize("kind", [PythonKafka, Confluent])
class TestKafka(KafkaContract):
    @pytest.fixture
    def transport(self, kind: type[Embedded], broker: EmbeddedBroker) -> Transport:
        return kind(broker)

    def test_dead_broker_is_named_within_the_timeout(self, kind: type[Embedded]) -> None:
        """D2: a message to a known topic may still arrive; a message to another topic waits for metadata."""
        with EmbeddedBroker("dice") as broker:
            producer = kind.producer(kind(broker).config())
            assert producer.send("dice", message("x")).retcode == 0
        with closing(producer):
            start = time.monotonic()
            result = producer.send("dice", message("x"), timeout=0.3)
            other = producer.send("other", message("x"), timeout=0.3)
            bulk = producer.bulk_send("dice", [message("x", uuid=str(n)) for n in range(3)], timeout=0.3)
            with pytest.raises(DeliveryError, match="may still arrive"):
                producer.produce("dice", b"x", timeout=0.3)
            assert time.monotonic() - start < PROMPT_SECONDS
            assert (result.uuid, result.retcode) == (UUID, 500)
            assert f"{broker.bootstrap_servers} did not confirm the message, which may still arrive" in result.stderr
            assert (other.uuid, other.retcode) == (UUID, 500)
            assert f"No broker responds at {broker.bootstrap_servers}: start one there" in other.stderr
            assert (bulk.retcode, bulk.stdout) == (500, "0 message(s) sent")
            assert set(bulk.retval["failed"]) == {"0", "1", "2"}
            assert "may still arrive" in bulk.stderr


@pytest.mark.parametrize("kind", [DummyProducer, KafkaProducer, ConfluentProducer])
def test_producers_have_the_same_methods(kind: type[BaseProducer]) -> None:
    """D12"""
    assert issubclass(kind, BaseProducer)
    public = {name for name in dir(kind) if not name.startswith("_") and name != "client"}
    assert public == {name for name in dir(BaseProducer) if not name.startswith("_")} | {"bulk_send", "send_nowait"}
    for name in ("__init__", "send", "bulk_send", "send_nowait", "produce", "close", "_send"):
        parameters = inspect.signature(getattr(kind, name)).parameters
        assert list(parameters) == list(inspect.signature(getattr(KafkaProducer, name)).parameters), name
