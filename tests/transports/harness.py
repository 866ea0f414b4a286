"""The brokers and clients that the contract of all clients is proven on."""

from __future__ import annotations

import itertools
import uuid
from abc import abstractmethod
from contextlib import closing
from typing import Any, ClassVar

import confluent_kafka
from kafka import KafkaConsumer, TopicPartition

from kser.confluent.client import ConfluentClient
from kser.consumer.client import Commit, ConsumerClient, Partition
from kser.dummy.broker import DummyClient, InMemoryBroker
from kser.python_kafka.client import KafkaPythonClient
from kser.python_kafka.options import connect
from tests.transports.client_contract import PATIENCE, BrokerHarness, plain

NUMBERS = itertools.count()


class InMemoryBrokerHarness(BrokerHarness):
    """The in-memory bus."""

    def __init__(self) -> None:
        self.bus = InMemoryBroker()

    def new_topic(self, partitions: int = 1) -> str:
        name = f"topic-{next(NUMBERS)}"
        self.bus.create_topic(name, partitions)
        return name

    def grow(self, topic: str, partitions: int) -> None:
        self.bus.create_topic(topic, partitions)

    def send(self, topic: str, *values: str, partition: int = 0) -> None:
        for value in values:
            self.bus.send(topic, value.encode(), partition=partition)

    def client(self, group: str | None, reset: str = "earliest", *, commits: bool = True, **options: Any) -> Any:
        return DummyClient(self.bus, group, reset, commits=commits)

    def committed(self, group: str, key: Partition) -> Commit | None:
        committed = self.bus.committed.get((group, key))
        return plain(committed) if committed else None


class KafkaHarness(BrokerHarness):
    """A broker with Kafka's protocol."""

    #: What kafka-python needs to look at it.
    outside: ClassVar[dict[str, Any]] = {}

    def __init__(self, servers: str) -> None:
        self.servers = servers
        self._producer: Any = confluent_kafka.Producer({"bootstrap.servers": servers, "linger.ms": 0, "log_level": 0})

    @abstractmethod
    def new_topic(self, partitions: int = 1) -> str: ...

    def send(self, topic: str, *values: str, partition: int = 0) -> None:
        for value in values:
            self._producer.produce(topic, value, partition=partition)
        assert not self._producer.flush(PATIENCE)

    def committed(self, group: str, key: Partition) -> Commit | None:
        # Not with confluent-kafka, which reads on behind the end of metadata.
        options = {"bootstrap_servers": self.servers, "group_id": group, "enable_auto_commit": False}
        with closing(connect(KafkaConsumer, {**options, **self.outside})) as reader:
            committed = reader.committed(TopicPartition(*key), metadata=True)
        return plain(Commit(committed.offset, committed.metadata or "")) if committed else None


class PythonKafkaHarness(KafkaHarness):
    """kafka-python."""

    #: What its clients need beside.
    options: ClassVar[dict[str, Any]] = {}

    def client(
        self,
        group: str | None,
        reset: str = "earliest",
        *,
        commits: bool = True,
        impatient: bool = False,
        **options: Any,
    ) -> ConsumerClient:
        patience = {"session_timeout_ms": 1500, "max_poll_interval_ms": 2000} if impatient else {}
        own = {
            "bootstrap_servers": self.servers,
            "group_id": group,
            "enable_auto_commit": False,
            "auto_offset_reset": "none" if group else reset,
            "session_timeout_ms": 6000,
            "heartbeat_interval_ms": 200,
            "metadata_max_age_ms": 500,
            "reconnect_backoff_max_ms": 500,
        }
        client = connect(KafkaConsumer, {**own, **self.options, **patience, **options})
        return KafkaPythonClient(client, reset, commits=commits)


class ConfluentHarness(KafkaHarness):
    """confluent-kafka."""

    groupless = False

    def client(
        self,
        group: str | None,
        reset: str = "earliest",
        *,
        commits: bool = True,
        impatient: bool = False,
        **options: Any,
    ) -> ConsumerClient:
        patience = {"session.timeout.ms": 1500, "max.poll.interval.ms": 2000} if impatient else {}
        own = {
            "bootstrap.servers": self.servers,
            "group.id": group,
            "session.timeout.ms": 6000,
            "heartbeat.interval.ms": 200,
            "topic.metadata.refresh.interval.ms": 500,
            "reconnect.backoff.max.ms": 500,
        }
        return ConfluentClient({**own, **patience, **options}, reset, 1 << 20, commits=commits)


def new_name() -> str:
    """A name for a topic that nobody else has."""
    return f"kser-test-{uuid.uuid4()}"
