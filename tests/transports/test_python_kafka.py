"""Tests of the default transport, kafka-python, on the embedded broker through real sockets."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kafka
import pytest
from flask import Flask
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import RebalanceInProgressError
from kafka.future import Future

from kser.consumer.client import Partition
from kser.embedded import EmbeddedBroker
from kser.errors import SettingError
from kser.producer import CONSUMER_SIZE_LIMIT
from kser.python_kafka import rebalances
from kser.python_kafka.client import KafkaPythonClient
from kser.python_kafka.consumer import Consumer
from kser.python_kafka.producer import Producer
from kser.python_kafka.rebalances import PendingJoin
from tests.support import UUID, WAIT_SECONDS, Clock, lines, message
from tests.transports.harness import RecordingEntrypoint, new_name
from tests.transports.producer_contract import read

pytestmark = pytest.mark.usefixtures("recording_entrypoint")

#: True with kafka-python 3. With kafka-python 2, an idempotent producer cannot end its thread without a broker.
IDEMPOTENT_BY_DEFAULT = KafkaProducer.DEFAULT_CONFIG["enable_idempotence"]

#: The number of partitions of a topic in the embedded broker.
PARTITIONS = 4


@pytest.fixture(scope="module")
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker("dice") as broker:
        yield broker


@pytest.fixture
def producer(broker: EmbeddedBroker) -> Iterator[Producer]:
    producer = Producer(broker.producer_config)
    yield producer
    producer.close()


def send_raw(broker: EmbeddedBroker, topic: str, *values: bytes | None) -> None:
    """Send records to the first partition of a topic, without kser."""
    producer = KafkaProducer(**broker.producer_config)
    for value in values:
        producer.send(topic, value, key=b"key", partition=0)
    producer.close()


def step_until(condition: Callable[[], Any], consumer: Consumer) -> None:
    """Let a consumer take steps until a condition holds."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"the condition was not met within {WAIT_SECONDS} s"
        consumer.step(timeout=0.05)


def committed_records(client: KafkaConsumer, topic: str) -> int:
    """Return the number of records of a topic before the committed offsets of the client's group."""
    return sum(client.committed(TopicPartition(topic, number)) or 0 for number in range(PARTITIONS))


# -- sending -----------------------------------------------------------------------------------------------------------


UNSENDABLE = {
    "above the default size limit": ("dice", {"text": "x" * 1_100_000}, 413, "'max_request_size' allows 1,048,576"),
    "illegal topic": ("no topic!", {}, 500, "is illegal"),
}


@pytest.mark.parametrize(("topic", "params", "retcode", "reason"), UNSENDABLE.values(), ids=UNSENDABLE)
def test_unsendable_message_gives_a_failed_result_with_the_reason(
    producer: Producer, topic: str, params: dict[str, Any], retcode: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """D2"""
    result = producer.send(topic, message("x", params=params))
    assert (result.uuid, result.retcode) == (UUID, retcode)
    assert reason in result.stderr
    assert lines(caplog) == [f"Producer.Failed: x[{UUID}]: {result.stderr}"]


# -- settings ----------------------------------------------------------------------------------------------------------


def test_producer_and_consumer_read_the_environment(broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in broker.environment("players").items():
        monkeypatch.setenv(name, value)
    producer, consumer = Producer(), Consumer()
    assert producer.client.config["bootstrap_servers"] == broker.bootstrap_servers
    assert consumer.client.config["group_id"] == "players"
    assert producer.client.config["api_version"] == consumer.client.config["api_version"] == (2, 0)
    assert consumer.client.subscription() == set(broker.topics)
    assert producer.send(broker.topics[0], message("x")).retcode == 0
    consumer.close()
    producer.close()


def test_producer_and_consumer_read_the_config_of_an_app(broker: EmbeddedBroker) -> None:
    app = Flask("shop")
    app.config.update(KSER_CONFIG={**broker.config, "group_id": "app"}, KSER_TOPICS=["dice"])
    producer, consumer = Producer(app=app), Consumer(app=app)
    assert (consumer.client.config["group_id"], consumer.client.subscription()) == ("app", {"dice"})
    consumer.close()
    producer.close()


@pytest.mark.parametrize("construct", [Producer, lambda: Consumer(None, ["dice"])], ids=["producer", "consumer"])
def test_unknown_option_error_names_the_nearest_option(construct: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSER_CONFIG", '{"bootstrap_server": "localhost"}')
    with pytest.raises(SettingError, match="no option 'bootstrap_server'; the nearest is 'bootstrap_servers'"):
        construct()


def test_config_argument_is_used_as_is_and_not_modified(broker: EmbeddedBroker) -> None:
    config = {**broker.config, "group_id": "players"}
    copy = dict(config)
    Consumer(config, ["dice"]).close()
    assert config == copy
    producer_config = broker.producer_config
    Producer(producer_config).close()
    assert producer_config == broker.producer_config
    with pytest.raises(Exception, match="group_id"):
        Producer({**producer_config, "group_id": "players"})


@pytest.mark.parametrize(
    ("options", "commit", "reset"),
    [
        ({}, "after", "earliest"),
        ({}, "before", "latest"),
        ({"auto_offset_reset": "latest"}, "after", "latest"),
    ],
)
def test_start_of_a_new_group_follows_the_options(
    broker: EmbeddedBroker, options: dict[str, Any], commit: str, reset: str
) -> None:
    """D5, D17"""
    topic = new_name()
    broker.create_topic(topic)
    send_raw(broker, topic, message(RecordingEntrypoint, uuid="old").dumps().encode())
    with closing(Consumer({**broker.config, "group_id": topic, **options}, [topic], commit=commit)) as consumer:
        # The client must neither commit nor choose a start position, because kser does both.
        config = consumer.client.config
        assert (config["auto_offset_reset"], config["enable_auto_commit"]) == ("none", False)
        step_until(lambda: len(consumer.assignment) == PARTITIONS, consumer)
        send_raw(broker, topic, message(RecordingEntrypoint, uuid="new").dumps().encode())
        step_until(lambda: "new" in RecordingEntrypoint.ran, consumer)
    assert RecordingEntrypoint.ran == (["old", "new"] if reset == "earliest" else ["new"])


@pytest.mark.parametrize(
    ("options", "interval"), [({}, 5), ({"enable_auto_commit": False}, 0), ({"auto_commit_interval_ms": 100}, 0.1)]
)
def test_commit_interval_follows_the_options(broker: EmbeddedBroker, options: dict[str, Any], interval: float) -> None:
    """D5, D7"""
    topic = new_name()
    broker.create_topic(topic)
    send_raw(broker, topic, message(RecordingEntrypoint).dumps().encode())
    clock = Clock()
    with closing(Consumer({**broker.config, "group_id": topic, **options}, [topic], clock=clock)) as consumer:
        step_until(lambda: RecordingEntrypoint.ran, consumer)
        clock.advance(interval * 0.9)
        consumer.step(timeout=0.05)
        assert committed_records(consumer.client, topic) == (0 if interval else 1)
        clock.advance(interval * 0.2)
        step_until(lambda: committed_records(consumer.client, topic) == 1, consumer)


def test_consumer_without_a_group_starts_at_the_latest_record(broker: EmbeddedBroker) -> None:
    consumer = Consumer(broker.config, ["dice"])
    config = consumer.client.config
    consumer.close()
    assert (config["auto_offset_reset"], config["enable_auto_commit"]) == ("latest", False)


def test_invalid_consumer_is_rejected_without_leaving_a_client_open(broker: EmbeddedBroker) -> None:
    with pytest.raises(SettingError, match="commit must be one of"):
        Consumer(broker.config, ["dice"], commit="sometimes")
    with pytest.raises(SettingError, match="auto_offset_reset"):
        Consumer({**broker.config, "group_id": "g", "auto_offset_reset": "earlist"}, ["dice"])
    with pytest.raises(SettingError, match="set KSER_TOPICS"):
        Consumer(broker.config)
    with pytest.raises(TypeError, match="list"):
        Consumer(broker.config, "dice")


@pytest.mark.parametrize(
    ("options", "acks", "idempotent"),
    [
        ({}, -1, IDEMPOTENT_BY_DEFAULT),
        ({"acks": 1, "enable_idempotence": False}, 1, False),
        ({"enable_idempotence": True}, -1, True),
        ({"enable_idempotence": False}, -1, False),
    ],
)
def test_acks_default_to_all_replicas(
    broker: EmbeddedBroker, options: dict[str, Any], acks: int, idempotent: bool
) -> None:
    producer = Producer({**broker.producer_config, **options})
    config = producer.client.config
    sent = producer.send("dice", message("x"))
    producer.close()
    assert (config["acks"], config["enable_idempotence"], sent.retcode) == (acks, idempotent, 0)


@pytest.mark.filterwarnings("ignore:value_serializer does not implement:DeprecationWarning")
def test_null_value_does_not_reach_the_value_serializer_of_the_user(broker: EmbeddedBroker) -> None:
    producer = Producer({**broker.producer_config, "value_serializer": bytes.upper})
    for value in (None, b"text"):
        producer.produce("serialized", value, headers=[("null", None)])
    producer.close()
    records = read(broker.bootstrap_servers, "serialized", 2)
    assert sorted(record.value or b"" for record in records) == [b"", b"TEXT"]
    assert None in [record.value for record in records]


def test_producer_of_a_consumer_accepts_the_size_of_every_record_that_was_read(
    broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**broker.config, "group_id": "g"}
    app = Flask("shop")
    app.config.update(KSER_CONFIG={**config, "max_request_size": 7}, KSER_PRODUCER_CONFIG={"acks": 1})
    app.config["KSER_MAX_UUID_LENGTH"] = 11
    consumers = [
        Consumer(config, ["dice"]),
        Consumer(config, ["dice"], producer_config={"max_request_size": 5, "acks": 0}),
        Consumer(topics=["dice"], app=app),
    ]
    producers: list[Any] = [Producer(app=app), *(consumer.make_producer() for consumer in consumers)]
    found = [(each.client.config["max_request_size"], each.client.config["acks"]) for each in producers]
    assert [each._kser_limits and each._kser_limits.max_uuid_length for each in producers] == [11, None, None, 11]
    for each in (*producers, *consumers):
        each.close()
    assert found == [(7, 1), (CONSUMER_SIZE_LIMIT, -1), (5, 0), (7, 1)]


def test_unknown_producer_option_of_a_consumer_is_rejected_by_its_constructor(broker: EmbeddedBroker) -> None:
    with pytest.raises(SettingError, match="KafkaProducer knows no option 'max_request_sise'; the nearest is 'max_re"):
        Consumer({**broker.config, "group_id": "g"}, ["dice"], producer_config={"max_request_sise": 1})


def test_construction_removes_the_pause_file(broker: EmbeddedBroker, caplog: pytest.LogCaptureFixture) -> None:
    """D9"""
    caplog.set_level(logging.DEBUG, "kser")
    path = Path(os.environ["LOCK_FILE"])
    path.touch()
    Consumer({**broker.config, "group_id": "g"}, ["dice"]).close()
    assert not path.exists()
    assert lines(caplog) == [f"Cleaning existing pause file: {path}"]


def test_producer_of_a_consumer_uses_the_options_it_knows(broker: EmbeddedBroker) -> None:
    consumer = Consumer({**broker.config, "group_id": "g", "client_id": "me"}, ["dice"])
    producer = consumer.make_producer()
    assert isinstance(producer, Producer)
    assert producer.client.config["client_id"] == "me"
    assert producer.send("dice", message("x")).retcode == 0
    producer.close()
    consumer.close()


# -- consuming ---------------------------------------------------------------------------------------------------------


def test_invalid_and_valid_records_are_handled_and_committed(
    broker: EmbeddedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """D3, D17: also records that were sent before the group existed, and a record with a null value."""
    broker.create_topic("mixed")
    send_raw(broker, "mixed", None, b"\xff", b"text", message(RecordingEntrypoint).dumps().encode())
    config = {**broker.config, "group_id": "mixed", "enable_auto_commit": False}
    with closing(Consumer(config, ["mixed"])) as consumer:
        step_until(lambda: RecordingEntrypoint.ran, consumer)
        assert committed_records(consumer.client, "mixed") == 4
    assert len([line for line in lines(caplog) if ".ImportError: " in line]) == 3


@pytest.mark.skipif(
    not hasattr(kafka, "AsyncConsumerRebalanceListener"), reason="kafka-python 2 calls no listener when it is closed"
)
def test_finished_records_are_committed_at_a_revocation(broker: EmbeddedBroker) -> None:
    """Closing the client, here without the consumer, revokes its partitions."""
    broker.create_topic("revoked")
    values = [message(RecordingEntrypoint, uuid=str(number)).dumps().encode() for number in range(3)]
    send_raw(broker, "revoked", *values)
    consumer = Consumer({**broker.config, "group_id": "revoked", "auto_commit_interval_ms": 600_000}, ["revoked"])
    step_until(lambda: len(RecordingEntrypoint.ran) == 3, consumer)
    assert committed_records(consumer.client, "revoked") == 0
    consumer.client.close(autocommit=False)
    with closing(KafkaConsumer(**broker.producer_config, group_id="revoked")) as reader:
        assert committed_records(reader, "revoked") == 3


def test_group_without_offset_reset_logs_the_missing_committed_offset(
    broker: EmbeddedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    config = {**broker.config, "group_id": "nowhere", "auto_offset_reset": "none"}
    with closing(Consumer(config, ["dice"])) as consumer:
        step_until(lambda: lines(caplog, logging.ERROR), consumer)
        (line,) = lines(caplog, logging.ERROR)
        assert line.startswith("Consumer: the group has no committed offset in dice[")
        assert line.endswith("or set the policy to 'earliest' or 'latest'; trying again")


@pytest.mark.parametrize("attribute", ["_unstarted", "_restarting"])
def test_position_of_a_partition_that_must_still_find_its_start_is_not_reported(attribute: str) -> None:
    """The position may be of the topic that was deleted, so a commit of it would skip records of the new topic."""
    states = {TopicPartition("dice", n): SimpleNamespace(position=SimpleNamespace(offset=7 + n)) for n in range(3)}
    states[TopicPartition("dice", 3)] = SimpleNamespace(position=None)
    client = KafkaPythonClient.__new__(KafkaPythonClient)
    scripted: Any = SimpleNamespace(_subscription=SimpleNamespace(assignment=states), assignment=lambda: set(states))
    client._client, client._unstarted, client._restarting = scripted, set(), set()
    assert client.positions() == {Partition("dice", n): 7 + n for n in range(3)}
    getattr(client, attribute).add(TopicPartition("dice", 1))
    assert client.positions() == {Partition("dice", 0): 7, Partition("dice", 2): 9}


# -- joins that outlast polls ------------------------------------------------------------------------------------------


def test_pending_join_is_usable_while_running_and_for_a_session_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The group removes a member that sends no heartbeat for a session, and then its join is void."""
    now = 100.0
    monkeypatch.setattr(rebalances.time, "monotonic", lambda: now)
    task = Future()
    join = PendingJoin(task, polled=99.0)
    assert join.is_usable(3)
    now = 200.0
    assert join.is_usable(3), "a join takes as long as the group waits for its other members"
    task.success(b"")
    now = 202.9
    assert join.is_usable(3)
    now = 203.1
    assert not join.is_usable(3)
    assert PendingJoin(task, polled=201.0).is_usable(3)
    assert not PendingJoin(task, polled=199.0).is_usable(3)


@pytest.mark.parametrize(
    ("error", "usable"), [(RebalanceInProgressError(), True), (ValueError("raised by an assignor"), False)]
)
def test_pending_join_with_an_unexpected_error_is_not_usable(error: Exception, usable: bool) -> None:
    task = Future()
    task.failure(error)
    assert PendingJoin(task, time.monotonic()).is_usable(3) == usable
