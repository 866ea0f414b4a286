"""Tests of the membership in a consumer group on Apache Kafka: fenced members, spares, KIP-848, and stuck clients."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from kafka.coordinator.assignors.range import RangePartitionAssignor

from kser.confluent.consumer import Consumer as ConfluentConsumer
from kser.consumer.base import BaseConsumer
from kser.errors import ClientStuck, SettingError
from kser.python_kafka.consumer import Consumer as PythonKafkaConsumer
from tests.consumer.harness import ConsumerThread
from tests.kafka.broker import Kafka
from tests.kafka.helpers import (
    REPOSITORY,
    TRANSPORTS,
    Worker,
    committed,
    config,
    message,
    needs_next_protocol,
    send_records,
    uuids,
    wait_until,
)
from tests.support import lines

CONSUMERS: dict[str, Any] = {"python_kafka": PythonKafkaConsumer, "confluent": ConfluentConsumer}


# -- fenced members ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_fenced_process_begins_nothing_more_and_ends_with_status_76(
    kafka: Kafka, topic: Callable[..., str], tmp_path: Any, transport: str
) -> None:
    name = topic()
    settings = config(kafka, name, group_instance_id="shop-1", auto_commit_interval_ms=600_000)
    first_messages = [message(), message(seconds=4), message()]
    with Worker(settings, name, tmp_path / "ledger", transport=transport) as fenced:
        fenced.wait_for_partitions(1)
        send_records(kafka, name, first_messages)
        fenced.wait_for("start", 2)
        with Worker(settings, name, tmp_path / "ledger", transport=transport) as successor:
            assert fenced.wait(30) == 76, fenced.text
            (error,) = [line for line in fenced.text.splitlines() if " ERROR kser." in line]
            assert "'shop-1'" in error and "the consumer ends" in error
            assert "messages still run, and will run again, because they cannot be committed: offset 1" in fenced.text
            assert "finished messages could not be committed and will be redelivered" in fenced.text
            assert "can poll again" not in fenced.text
            assert fenced.recorded("start") == uuids(first_messages[:2])
            wait_until(lambda: set(successor.recorded("end")) >= set(uuids(first_messages)), "all are handled", 30)
            assert successor.process.poll() is None
    assert committed(kafka, name, name) == 0


@needs_next_protocol
def test_static_member_of_the_next_protocol_waits_until_its_instance_id_is_free(
    kafka: Kafka, topic: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    """The member that holds the id may be a killed process, so a restarted one must not end with a status."""
    caplog.set_level(logging.INFO, "kser")
    name = topic()
    options = {
        "bootstrap.servers": kafka.bootstrap_servers,
        "group.id": name,
        "group.protocol": "consumer",
        "group.instance.id": "shop-1",
    }
    with closing(ConfluentConsumer(options, [name])) as holder:
        step_until([holder], lambda: holder.assignment, "the first member has the partition")
        with closing(ConfluentConsumer(options, [name])) as waiting:
            step_until(
                [holder, waiting],
                lambda: [line for line in lines(caplog, logging.ERROR) if "instance ID is still used" in line],
                "the second member logs what it waits for",
            )
            assert holder.assignment and not waiting.assignment
            holder.close()
            step_until([waiting], lambda: waiting.assignment, "the second member has the partition")
            step_until(
                [waiting],
                lambda: [line for line in lines(caplog) if "the Kafka client can poll again" in line],
                "the recovery is proved",
            )


@needs_next_protocol
def test_unknown_assignor_of_the_next_protocol_is_a_setting_error(kafka: Kafka, topic: Callable[..., str]) -> None:
    name = topic()
    options = {
        "bootstrap.servers": kafka.bootstrap_servers,
        "group.id": name,
        "group.protocol": "consumer",
        "group.remote.assignor": "nonsense",
    }
    with (
        closing(ConfluentConsumer(options, [name])) as consumer,
        pytest.raises(SettingError, match="assignor or its version range is not supported"),
    ):
        step_until([consumer], lambda: False, "the group rejects the assignor")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_session_timeout_that_the_broker_rejects_is_a_setting_error(
    kafka: Kafka, topic: Callable[..., str], transport: str
) -> None:
    name = topic()
    options = config(kafka, name, session_timeout_ms=500, heartbeat_interval_ms=100)
    if transport == "confluent":
        options = {key.replace("_", "."): value for key, value in options.items()}
    with (
        closing(CONSUMERS[transport](options, [name])) as consumer,
        pytest.raises(SettingError, match="correct the settings of the Kafka client, or those of the broker"),
    ):
        step_until([consumer], lambda: False, "the group rejects the session timeout")


@pytest.mark.parametrize(
    ("transport", "protocol"), [*((each, "classic") for each in TRANSPORTS), ("confluent", "consumer")]
)
def test_spare_consumer_is_a_member_without_partitions(
    kafka: Kafka, topic: Callable[..., str], transport: str, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = topic()
    options = config(kafka, name)
    if transport == "confluent":
        options = {key.replace("_", "."): value for key, value in options.items()}
    if protocol == "consumer":
        options = {"bootstrap.servers": kafka.bootstrap_servers, "group.id": name, "group.protocol": protocol}
    with closing(CONSUMERS[transport](options, [name])) as holder:
        step_until([holder], lambda: holder.assignment, "the first member has the partition")
        with closing(CONSUMERS[transport](options, [name], stall_timeout=1)) as spare:
            step_until([holder, spare], lambda: spare._kser_poller._client.is_member(), "the spare is a member")
            step_until([holder, spare], lambda: len(holder.assignment | spare.assignment) == 1, "one has the partition")
            assert not [line for line in lines(caplog, logging.ERROR) if "not a member" in line]


def step_until(consumers: list[BaseConsumer], condition: Callable[[], Any], event: str, seconds: float = 30) -> None:
    """Step consumers in turn until ``condition`` returns a true value.

    :param event: describes the condition in the error.
    """

    def is_met() -> Any:
        for consumer in consumers:
            consumer.step(0.1)
        return condition()

    wait_until(is_met, event, seconds)


# -- calls of the client library that block ----------------------------------------------------------------------------


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Return the event for which a callback waits; it is set at the end of the test."""
    event = threading.Event()
    yield event
    event.set()


def test_callback_that_blocks_librdkafka_ends_the_consumer(
    kafka: Kafka, topic: Callable[..., str], gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    name = topic()
    options = {
        "bootstrap.servers": kafka.bootstrap_servers,
        "group.id": name,
        "statistics.interval.ms": 100,
        "stats_cb": lambda _: gate.wait(),
    }
    consumer = ConfluentConsumer(options, [name], revoke_timeout=0, client_timeout=1.5)
    with ConsumerThread(consumer) as thread:
        assert isinstance(thread.join(), ClientStuck)
        gate.set()
    assert "the Kafka client has not returned for 1.5 s" in "".join(lines(caplog, logging.ERROR))


#: A program with a callback that librdkafka calls in each poll, also directly after a rebalance callback.
PROGRAM = """
import sys, time
from kser.confluent.consumer import Consumer

servers, topic, reset = sys.argv[1:]
options = {
    "bootstrap.servers": servers,
    "group.id": topic,
    "auto.offset.reset": reset,
    "statistics.interval.ms": 1,
    "stats_cb": lambda _: None,
}
consumer = Consumer(options, [topic])
deadline = time.monotonic() + 60
while not consumer.assignment and time.monotonic() < deadline:
    consumer.step(0.2)
for _ in range(5):
    consumer.step(0.2)
assert consumer.assignment
consumer.close()
"""


@pytest.mark.parametrize("reset", ["earliest", "latest"])
def test_callback_of_librdkafka_may_follow_a_rebalance_callback(
    kafka: Kafka, topic: Callable[..., str], reset: str
) -> None:
    """After ``list_topics`` in a rebalance callback, the next callback in the same poll would abort the process."""
    program = [sys.executable, "-c", PROGRAM, kafka.bootstrap_servers, topic(3), reset]
    done = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class BlockingAssignor(RangePartitionAssignor):
    """An assignor that blocks the leader of the group until ``gate`` is set."""

    gate: threading.Event

    @classmethod
    def assign(cls, *arguments: Any) -> Any:
        cls.gate.wait()
        return super().assign(*arguments)


def test_assignor_that_blocks_kafka_python_ends_the_consumer(
    kafka: Kafka, topic: Callable[..., str], gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    name = topic()
    BlockingAssignor.gate = gate
    options = config(kafka, name, partition_assignment_strategy=[BlockingAssignor])
    consumer = PythonKafkaConsumer(options, [name], revoke_timeout=0, client_timeout=1.5)
    with ConsumerThread(consumer) as thread:
        assert isinstance(thread.join(), ClientStuck)
        gate.set()
    assert "the Kafka client has not returned for 1.5 s" in "".join(lines(caplog, logging.ERROR))
