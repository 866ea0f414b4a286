"""Brokers and clients on which the contract tests of the clients run."""

from __future__ import annotations

import time
import uuid
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import closing, suppress
from typing import Any, ClassVar

import confluent_kafka
from confluent_kafka import KafkaException
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata

from kser.confluent.client import ConfluentClient
from kser.consumer.client import Commit, ConsumerClient, Partition
from kser.dummy.broker import DummyClient, InMemoryBroker
from kser.entry import Entrypoint
from kser.python_kafka.client import KafkaPythonClient
from kser.python_kafka.options import connect
from tests.support import wait_until
from tests.transports.client_contract import BROKER_SECONDS, BrokerHarness, without_client_notes


class RecordingEntrypoint(Entrypoint):
    """An entrypoint that records the uuid of each message that it runs."""

    #: The uuids in the order of the attempts; a fixture empties the list after each test.
    ran: ClassVar[list[str]] = []

    def run(self) -> None:
        self.ran.append(self.uuid)


class InMemoryBrokerHarness(BrokerHarness):
    """The in-memory broker and its clients."""

    def __init__(self) -> None:
        self.broker = InMemoryBroker()

    def new_topic(self, partitions: int = 1) -> str:
        name = new_name()
        self.broker.create_topic(name, partitions)
        return name

    def grow(self, topic: str, partitions: int) -> None:
        self.broker.create_topic(topic, partitions)

    def send(self, topic: str, *values: str, partition: int = 0) -> None:
        for value in values:
            self.broker.send(topic, value.encode(), partition=partition)

    def client(self, group: str | None, reset: str = "earliest", *, commits: bool = True, **options: Any) -> Any:
        return DummyClient(self.broker, group, reset, commits=commits)

    def committed(self, group: str, key: Partition) -> Commit | None:
        committed = self.broker.committed.get((group, key))
        return without_client_notes(committed) if committed else None

    def written(self, group: str, key: Partition) -> Commit:
        return self.broker.committed[group, key]

    def move(self, group: str, key: Partition, commit: Commit) -> None:
        self.broker.committed[group, key] = commit

    def create_again(self, topic: str, partitions: int = 1) -> None:
        self.broker.delete_topic(topic)
        self.broker.create_topic(topic, partitions)


class KafkaHarness(BrokerHarness):
    """A broker with the protocol of Kafka, and clients of one kind for it."""

    #: Options of the kafka-python client that reads committed offsets.
    reader_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, servers: str) -> None:
        self.servers = servers
        self._producer: Any = confluent_kafka.Producer({"bootstrap.servers": servers, "linger.ms": 0, "log_level": 0})

    @abstractmethod
    def new_topic(self, partitions: int = 1) -> str: ...

    def send(self, topic: str, *values: str, partition: int = 0) -> None:
        deadline = time.monotonic() + BROKER_SECONDS
        refused = self._refused(topic, values, partition)
        while refused:
            # The broker or the producer does not know a partition yet that was just created.
            assert time.monotonic() < deadline, f"the broker has not accepted {refused}"
            self._producer.list_topics(topic, BROKER_SECONDS)
            refused = self._refused(topic, refused, partition)

    def _refused(self, topic: str, values: Sequence[str], partition: int) -> list[str]:
        """Send values, and return those that the broker has refused."""
        refused: list[str] = []

        def note(error: Any, message: Any) -> None:
            if error is not None:
                refused.append(message.value().decode())

        for value in values:
            try:
                self._producer.produce(topic, value, partition=partition, on_delivery=note)
            except KafkaException:
                refused.append(value)
        assert not self._producer.flush(BROKER_SECONDS)
        return refused

    def committed(self, group: str, key: Partition) -> Commit | None:
        committed = self._read(group, key)
        return without_client_notes(committed) if committed else None

    def written(self, group: str, key: Partition) -> Commit:
        committed = self._read(group, key)
        assert committed is not None
        return committed

    def _read(self, group: str, key: Partition) -> Commit | None:
        # Do not use confluent-kafka, because it reads beyond the end of the metadata.
        with closing(self._reader(group)) as reader:
            committed = reader.committed(TopicPartition(*key), metadata=True)
        return Commit(committed.offset, committed.metadata or "") if committed else None

    def move(self, group: str, key: Partition, commit: Commit) -> None:
        def is_moved() -> bool:
            # The group has members until the last one has left it.
            with closing(self._reader(group)) as reader, suppress(KafkaError):
                reader.assign([TopicPartition(*key)])
                reader.commit({TopicPartition(*key): OffsetAndMetadata(commit.offset, commit.metadata, -1)})
                return True
            return False

        wait_until(is_moved)

    def create_again(self, topic: str, partitions: int = 1) -> None:
        raise NotImplementedError

    def _reader(self, group: str) -> KafkaConsumer:
        options = {"bootstrap_servers": self.servers, "group_id": group, "enable_auto_commit": False}
        return connect(KafkaConsumer, {**options, **self.reader_options})


class PythonKafkaHarness(KafkaHarness):
    """A broker with the protocol of Kafka, and clients of kafka-python."""

    #: Additional options of the clients.
    options: ClassVar[dict[str, Any]] = {}

    def client(
        self,
        group: str | None,
        reset: str = "earliest",
        *,
        commits: bool = True,
        expires_soon: bool = False,
        **options: Any,
    ) -> ConsumerClient:
        timeouts = {"session_timeout_ms": 1500, "max_poll_interval_ms": 2000} if expires_soon else {}
        defaults = {
            "bootstrap_servers": self.servers,
            "group_id": group,
            "enable_auto_commit": False,
            "auto_offset_reset": "none" if group else reset,
            "session_timeout_ms": 6000,
            "heartbeat_interval_ms": 200,
            "metadata_max_age_ms": 500,
            "reconnect_backoff_max_ms": 500,
        }
        client = connect(KafkaConsumer, {**defaults, **self.options, **timeouts, **options})
        return KafkaPythonClient(client, reset, commits=commits)


class ConfluentHarness(KafkaHarness):
    """A broker with the protocol of Kafka, and clients of confluent-kafka."""

    groupless = False

    def client(
        self,
        group: str | None,
        reset: str = "earliest",
        *,
        commits: bool = True,
        expires_soon: bool = False,
        **options: Any,
    ) -> ConsumerClient:
        timeouts: dict[str, Any] = {"max.poll.interval.ms": 2000} if expires_soon else {}
        # With the protocol "consumer", the broker sets the timeouts of the group.
        protocol: dict[str, Any] = {"group.protocol": "consumer"}
        if self.eager:
            protocol = {"session.timeout.ms": 1500 if expires_soon else 6000, "heartbeat.interval.ms": 200}
        defaults = {
            "bootstrap.servers": self.servers,
            "group.id": group,
            **protocol,
            "topic.metadata.refresh.interval.ms": 500,
            "reconnect.backoff.max.ms": 500,
        }
        return ConfluentClient({**defaults, **timeouts, **options}, reset, 1 << 20, commits=commits)


def new_name() -> str:
    """Return a unique name for a topic or a transaction."""
    return f"kser-test-{uuid.uuid4()}"
