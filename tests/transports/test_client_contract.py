"""Tests of every client on brokers in this process: the in-memory broker, and the embedded one through sockets.

The embedded broker rebalances other than Kafka, so two members of a group are tested on Apache Kafka.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kser.embedded import EmbeddedBroker
from tests.transports.client_contract import BrokerHarness, CoreClientContract, Member
from tests.transports.group_contract import GroupContract
from tests.transports.harness import ConfluentHarness, InMemoryBrokerHarness, KafkaHarness, PythonKafkaHarness, new_name


class EmbeddedHarness(KafkaHarness):
    reader_options = {"api_version": (2, 0)}  # noqa: RUF012

    def __init__(self, broker: EmbeddedBroker) -> None:
        super().__init__(broker.bootstrap_servers)
        self._broker = broker

    def new_topic(self, partitions: int = 1) -> str:
        """Create a topic of four partitions, which is the only number that the embedded broker has."""
        name = new_name()
        self._broker.create_topic(name)
        return name


class PythonKafka(EmbeddedHarness, PythonKafkaHarness):
    options = {"api_version": (2, 0), "heartbeat_interval_ms": 500}  # noqa: RUF012


class Confluent(EmbeddedHarness, ConfluentHarness):
    pass


@pytest.fixture(scope="module")
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as broker:
        yield broker


class TestDummy(GroupContract):
    @pytest.fixture
    def harness(self) -> BrokerHarness:
        return InMemoryBrokerHarness()

    def expel(self, member: Member) -> None:
        member.client.expel()  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [PythonKafka, Confluent])
class TestEmbedded(CoreClientContract):
    @pytest.fixture
    def harness(self, kind: type[EmbeddedHarness], broker: EmbeddedBroker) -> BrokerHarness:
        return kind(broker)
