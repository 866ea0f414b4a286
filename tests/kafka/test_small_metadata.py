"""Tests of brokers that accept only short metadata of commits, or none (``offset.metadata.max.bytes``)."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from kser.consumer.client import Commit, Partition
from tests.conftest import needs
from tests.kafka.broker import PROPERTIES, KafkaBroker, ServiceMissing
from tests.kafka.test_client_contract import Confluent, OnKafka, PythonKafka
from tests.support import lines
from tests.transports.client_contract import Member, until
from tests.transports.harness import new_name

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

#: Metadata that is too long for both brokers.
LONG = "kser:" + ",".join(["1"] * 401)


@pytest.fixture(scope="module", params=[0, 64])
def limit(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def broker(limit: int) -> Iterator[KafkaBroker]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.kafka.broker.PROPERTIES", f"{PROPERTIES}offset.metadata.max.bytes={limit}\n")
        try:
            broker = KafkaBroker()
        except ServiceMissing as problem:
            needs("Apache Kafka", problem)
    with broker:
        yield broker


@pytest.mark.parametrize("kind", [PythonKafka, Confluent])
def test_offsets_are_committed_with_as_much_metadata_as_the_broker_accepts(
    broker: KafkaBroker, limit: int, kind: type[OnKafka], caplog: pytest.LogCaptureFixture
) -> None:
    harness = kind(broker)
    key = Partition(harness.new_topic(2), 0)
    harness.send(key.topic, *map(str, range(9)))
    group = new_name()
    member = Member(harness.client(group), key.topic)
    until(lambda: len(member.records) == 9, "all records arrive", member)
    for offset in (2, 3):
        member.client.commit({key: Commit(offset, f"starts:1 {LONG}")}, 10)
        committed = harness.written(group, key)
        assert committed.offset == offset
        assert len(committed.metadata) <= limit
        assert ("starts:1" in committed.metadata) == (limit > 0)
    assert [line for line in lines(caplog, logging.WARNING) if "offset.metadata.max.bytes" in line][1:] == []
    assert "offset.metadata.max.bytes of the broker to 4096" in caplog.text
    # The commit of a revocation is shortened too.
    member.finished = {key: Commit(4, LONG)}
    other = Member(harness.client(group), key.topic)
    until(lambda: member.starts and other.starts, "each has one partition", member, other)
    assert harness.written(group, key).offset == 4
    member.close()
    other.close()
    successor = Member(harness.client(group), key.topic)
    until(lambda: len(successor.records) >= 5, "the other records arrive", successor)
    assert successor.values(0) == list(map(str, range(4, 9)))
    successor.close()
