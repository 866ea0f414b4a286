"""Tests of a group that moves to another cluster: MirrorMaker translates its offsets and keeps their metadata."""

from __future__ import annotations

import logging

import pytest

from kser.consumer.client import Commit, Partition
from tests.conftest import needs
from tests.kafka.broker import Kafka, KafkaBroker, ServiceMissing
from tests.kafka.helpers import wait_until
from tests.kafka.mirror_maker import mirror_maker
from tests.kafka.test_client_contract import Confluent, OnKafka, PythonKafka
from tests.support import lines
from tests.transports.client_contract import Member, until
from tests.transports.harness import new_name

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

#: The number of records, and the offset that the group has committed in the source cluster.
COUNT = 40
COMMITTED = 20


def test_group_runs_all_records_from_its_translated_offset_on(
    kafka: Kafka, own_kafka: KafkaBroker, caplog: pytest.LogCaptureFixture
) -> None:
    kinds: tuple[type[OnKafka], ...] = (PythonKafka, Confluent)
    sources = [kind(kafka) for kind in kinds]
    topic = sources[0].new_topic()
    key = Partition(topic, 0)
    groups = [f"{kind.__name__}-{new_name()}" for kind in kinds]
    sources[0].send(topic, *map(str, range(COUNT)))
    for harness, group in zip(sources, groups, strict=True):
        member = Member(harness.client(group), topic)
        until(lambda: len(member.records) == COUNT, "all records arrive", member)  # noqa: B023
        # The records at 20 and 25 are unfinished.
        member.client.commit({key: Commit(COMMITTED, "kser:1,4,1,e")}, 10)
        member.close()
    targets = [kind(own_kafka) for kind in kinds]
    try:
        with mirror_maker(kafka, own_kafka, topic) as output:
            for harness, group in zip(targets, groups, strict=True):
                wait_until(
                    lambda: harness.committed(group, key),  # noqa: B023
                    f"the offset of {group} is translated; MirrorMaker wrote {output}",
                    90,
                )
    except ServiceMissing as problem:
        needs("MirrorMaker", problem)
    finally:
        kafka.delete_topic(topic)
    for harness, group in zip(targets, groups, strict=True):
        moved = harness.written(group, key)
        assert moved.offset <= COMMITTED and "kser:1,4,1,e" in moved.metadata, "MirrorMaker keeps the metadata"
        member = Member(harness.client(group), topic)
        until(lambda: len(member.records) >= COUNT - moved.offset, "the records arrive", member)  # noqa: B023
        assert member.starts == {key: Commit(moved.offset)}
        assert member.values() == list(map(str, range(moved.offset, COUNT)))
        member.close()
    warnings = [line for line in lines(caplog, logging.WARNING) if "MirrorMaker" in line]
    assert len(warnings) == 2 and all(line.startswith(f"{key}: the metadata beside") for line in warnings)
