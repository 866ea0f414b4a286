"""Tests of topics with transactions: the markers and the aborted records have offsets, and count as finished."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from kser.confluent.consumer import Consumer as ConfluentConsumer
from kser.consumer.client import Partition
from kser.python_kafka.consumer import Consumer as PythonKafkaConsumer
from tests.kafka.broker import Kafka
from tests.kafka.helpers import client_options, committed, config, step_until
from tests.kafka.test_client_contract import Confluent
from tests.support import lines

CONSUMERS = {"python_kafka": PythonKafkaConsumer, "confluent": ConfluentConsumer}


@pytest.mark.parametrize("transport", list(CONSUMERS))
def test_committed_offset_passes_the_markers_and_the_aborted_records(
    kafka: Kafka, topic: Callable[..., str], transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = topic()
    key = Partition(name, 0)
    harness = Confluent(kafka)
    options = client_options(
        transport, config(kafka, name, isolation_level="read_committed", auto_commit_interval_ms=300)
    )
    consumer: Any = CONSUMERS[transport](options, [name])
    with closing(consumer):
        harness.send_in_transactions(key, ["first", "second"])
        step_until(consumer, lambda: committed(kafka, name, name) == 3, "the marker is committed")
        harness.abort_transaction(key, "third", "fourth")
        step_until(consumer, lambda: committed(kafka, name, name) == 6, "the aborted records are committed")
        # An idle consumer commits nothing more.
        commits: list[Any] = []
        commit = consumer._kser_poller._client.commit
        consumer._kser_poller._client.commit = lambda *arguments: (commits.append(arguments), commit(*arguments))
        for _ in range(8):
            consumer.step(0.1)
        assert commits == []
        harness.delete_before(key, 6)
    with closing(CONSUMERS[transport](options, [name])) as successor:
        harness.send(name, "last")
        step_until(successor, lambda: committed(kafka, name, name) == 7, "the last record is committed")
    assert [line for line in lines(caplog, logging.ERROR) if "out of range" in line] == []
