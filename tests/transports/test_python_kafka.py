"""Tests of the default transport, kafka-python, on the embedded broker through real sockets."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import kafka
import pytest
from cdumay_error.types import ValidationError
from cdumay_result import Result
from flask import Flask
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import RebalanceInProgressError
from kafka.future import Future

from kser import signals
from kser.controller import Controller
from kser.embedded import EmbeddedBroker
from kser.entry import Entrypoint
from kser.errors import SettingError
from kser.python_kafka import rebalances
from kser.python_kafka.consumer import Consumer
from kser.python_kafka.producer import CHUNK, Producer
from kser.python_kafka.rebalances import PendingJoin
from kser.schemas import Message
from tests.support import UUID, lines, message, record_of

PATIENCE = 20

#: kafka-python 3 is; kafka-python 2 cannot end its thread then while no broker answers.
IDEMPOTENT_BY_ITSELF = KafkaProducer.DEFAULT_CONFIG["enable_idempotence"]

#: The mock cluster makes topics of four partitions.
PARTITIONS = 4


class Note(Entrypoint):
    seen: list[str] = []  # noqa: RUF012  emptied after each test

    def run(self) -> None:
        self.seen.append(self.uuid)


@pytest.fixture(scope="module")
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker("dice") as broker:
        yield broker


@pytest.fixture
def producer(broker: EmbeddedBroker) -> Iterator[Producer]:
    producer = Producer(broker.producer_config)
    yield producer
    producer.close()


@pytest.fixture
def opened() -> Iterator[Callable[[Consumer], Consumer]]:
    """Notes a consumer, to be closed when the test has ended in whatever way."""
    with ExitStack() as stack:
        yield lambda consumer: stack.enter_context(closing(consumer))


@pytest.fixture(autouse=True)
def registered(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    Controller.register(Note.path, Note)
    caplog.set_level(logging.INFO, "kser")
    yield
    Note.seen.clear()


def values_of(broker: EmbeddedBroker, topic: str, count: int) -> list[bytes]:
    """The first ``count`` records of a topic, as bytes."""
    reader = KafkaConsumer(**broker.producer_config, auto_offset_reset="earliest")
    reader.assign([TopicPartition(topic, number) for number in range(PARTITIONS)])
    values: list[bytes] = []
    deadline = time.monotonic() + PATIENCE
    while len(values) < count and time.monotonic() < deadline:
        values += [record.value for records in reader.poll(100).values() for record in records]
    reader.close()
    return values


def until(done: Callable[[], Any], *consumers: Consumer) -> None:
    """Let consumers take turns until there is what is waited for."""
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, "it did not happen in time"
        for consumer in consumers:
            consumer.step(timeout=0.05)


# -- sending -----------------------------------------------------------------------------------------------------------


def test_a_message_is_delivered_as_published(
    broker: EmbeddedBroker, producer: Producer, caplog: pytest.LogCaptureFixture
) -> None:
    kmsg = message("shop.Pay", params={"café": 1})
    text = f"Message shop.Pay[{UUID}] sent in one"
    result = producer.send("one", kmsg)
    assert (result.uuid, result.retcode, result.stdout) == (UUID, 0, text)
    assert lines(caplog) == [f"Producer.Success: shop.Pay[{UUID}]: {text}"]
    assert record_of(caplog, "Producer.Success").name == "kser.controller"
    assert values_of(broker, "one", 1) == [kmsg.dumps().encode()]


def test_hooks_are_called_around_sending(broker: EmbeddedBroker) -> None:
    class Hooked(Producer):
        @classmethod
        def onmessage(cls, kmsg: Message) -> Message:
            return Message(kmsg.uuid, "replaced")

        @classmethod
        def onsuccess(cls, kmsg: Message, result: Result) -> Any:
            return "hook", kmsg.entrypoint

    producer = Hooked(broker.producer_config)
    assert producer.send("hooked", message("original")) == ("hook", "original")
    producer.close()
    assert json.loads(values_of(broker, "hooked", 1)[0])["entrypoint"] == "replaced"


def test_raising_onmessage_hook_fails_the_message_under_its_own_uuid(broker: EmbeddedBroker) -> None:
    """C12"""

    class Refusing(Producer):
        @classmethod
        def onmessage(cls, kmsg: Message) -> Message:
            raise ValidationError("refused")

    producer = Refusing(broker.producer_config)
    result = producer.send("dice", message("x"))
    producer.close()
    assert (result.uuid, result.retcode, result.stderr) == (UUID, 400, "refused")


def test_interrupt_in_a_hook_is_not_swallowed(broker: EmbeddedBroker) -> None:
    """C9"""

    class Interrupted(Producer):
        @classmethod
        def onmessage(cls, kmsg: Message) -> Message:
            raise KeyboardInterrupt

    producer = Interrupted(broker.producer_config)
    with pytest.raises(KeyboardInterrupt):
        producer.send("dice", message("x"))
    with pytest.raises(KeyboardInterrupt):
        producer.bulk_send("dice", [message("x")])
    producer.close()


UNSENDABLE = {
    "no JSON form": ("dice", {"when": object()}, 500, "Object of type object is not JSON serializable"),
    "above the size limit": ("dice", {"text": "x" * 1_100_000}, 413, "'max_request_size' allows 1,048,576"),
    "an illegal topic": ("no topic!", {}, 500, "is illegal"),
}


@pytest.mark.parametrize(("topic", "params", "retcode", "reason"), UNSENDABLE.values(), ids=UNSENDABLE)
def test_unsendable_message_gives_a_failed_result_with_the_reason(
    producer: Producer, topic: str, params: dict[str, Any], retcode: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """D2, D13"""
    result = producer.send(topic, message("x", params=params))
    assert (result.uuid, result.retcode) == (UUID, retcode)
    assert reason in result.stderr
    assert lines(caplog) == [f"Producer.Failed: x[{UUID}]: {result.stderr}"]


def test_message_sent_signal_is_emitted_after_delivery(producer: Producer) -> None:
    heard: list[tuple[str, str]] = []

    def listen(sender: Any, topic: str, kmsg: Message, result: Result) -> None:
        heard.append((kmsg.uuid, result.uuid))

    with signals.message_sent.connected_to(listen):
        producer.send("dice", message("x", uuid="1"))
        producer.send("dice", message("x", uuid="2", params={"when": object()}))
        producer.bulk_send("dice", [message("x", uuid="3"), message("x", uuid="4", params={"when": object()})])
    assert heard == [("1", "1"), ("3", "3")]


# -- sending many ------------------------------------------------------------------------------------------------------


def test_bulk_send_accepts_any_iterable(broker: EmbeddedBroker, producer: Producer) -> None:
    """D14"""
    count = CHUNK + 10
    result = producer.bulk_send("many", (message("x", uuid=str(number)) for number in range(count)))
    assert (result.retcode, result.stdout) == (0, f"{count} message(s) sent")
    uuids = {json.loads(value)["uuid"] for value in values_of(broker, "many", count)}
    assert uuids == {str(number) for number in range(count)}


def test_bulk_send_of_no_messages_succeeds(producer: Producer) -> None:
    assert producer.bulk_send("dice", []).stdout == "0 message(s) sent"


def test_bulk_send_names_the_failed_messages(broker: EmbeddedBroker, producer: Producer) -> None:
    """D14: nothing is reported as sent that was not."""
    bad = {"1": {"when": object()}, "2": {"text": "x" * 1_100_000}}
    result = producer.bulk_send("some", [message("x", uuid=str(n), params=bad.get(str(n))) for n in range(4)])
    assert (result.retcode, result.stdout) == (500, "2 message(s) sent")
    assert result.stderr.startswith("2 of 4 message(s) not sent; first error: ")
    assert set(result.retval["failed"]) == {"1", "2"}
    assert "not JSON serializable" in result.retval["failed"]["1"]
    assert "'max_request_size' allows 1,048,576" in result.retval["failed"]["2"]
    assert len(values_of(broker, "some", 2)) == 2


def test_raising_iterable_gives_a_failed_result(broker: EmbeddedBroker, producer: Producer) -> None:
    def messages() -> Iterator[Message]:
        yield message("x")
        raise ValueError("no more")

    result = producer.bulk_send("cut", messages())
    assert (result.retcode, result.stderr) == (500, "no more")
    assert len(values_of(broker, "cut", 1)) == 1


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


@pytest.mark.parametrize("make", [Producer, lambda: Consumer(None, ["dice"])], ids=["producer", "consumer"])
def test_unknown_option_error_names_the_nearest_option(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KSER_CONFIG", '{"bootstrap_server": "localhost"}')
    with pytest.raises(SettingError, match="no option 'bootstrap_server'; the nearest is 'bootstrap_servers'"):
        make()


def test_config_argument_is_used_as_is_and_not_modified(broker: EmbeddedBroker) -> None:
    given = {**broker.config, "group_id": "given"}
    before = dict(given)
    Consumer(given, ["dice"]).close()
    assert given == before
    mine = broker.producer_config
    Producer(mine).close()
    assert mine == broker.producer_config
    with pytest.raises(Exception, match="group_id"):
        Producer({**mine, "group_id": "players"})


@pytest.mark.parametrize(
    ("options", "commit", "reset", "interval"),
    [
        ({}, "after", "earliest", 5),
        ({}, "before", "latest", 5),
        ({"auto_offset_reset": "latest"}, "after", "latest", 5),
        ({"enable_auto_commit": False}, "after", "earliest", 0),
        ({"auto_commit_interval_ms": 100}, "after", "earliest", 0.1),
    ],
)
def test_commit_interval_and_offset_reset_follow_the_options(
    broker: EmbeddedBroker, options: dict[str, Any], commit: str, reset: str, interval: float
) -> None:
    """D5, D7, D17"""
    consumer = Consumer({**broker.config, "group_id": "g", **options}, ["dice"], commit=commit)
    config = consumer.client.config
    consumer.close()
    # The client neither commits nor chooses where to begin: both are decided here.
    assert (config["auto_offset_reset"], config["enable_auto_commit"]) == ("none", False)
    assert (consumer._kser_reset, consumer._kser_poller._interval) == (reset, interval)


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
        ({}, -1, IDEMPOTENT_BY_ITSELF),
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


def test_record_without_key_and_value_is_written_as_an_empty_one(broker: EmbeddedBroker, producer: Producer) -> None:
    """The client writes none that has neither."""
    producer.produce("neither", None)
    assert values_of(broker, "neither", 1) == [b""]


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


def offsets(client: KafkaConsumer, topic: str) -> int:
    """How many records of a topic the client's group has behind it."""
    return sum(client.committed(TopicPartition(topic, number)) or 0 for number in range(PARTITIONS))


def test_invalid_and_valid_records_are_handled_and_committed(
    broker: EmbeddedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """D3, D17: records sent before the start of the group are handled, a null value too."""
    broker.create_topic("mixed")
    raw = KafkaProducer(**broker.producer_config)
    for value in (None, b"\xff", b"text", message(Note).dumps().encode()):
        raw.send("mixed", value, key=b"key", partition=0)
    raw.close()
    config = {**broker.config, "group_id": "mixed", "enable_auto_commit": False}
    consumer = Consumer(config, ["mixed"])
    until(lambda: Note.seen, consumer)
    assert offsets(consumer.client, "mixed") == 4
    consumer.close()
    assert len([line for line in lines(caplog) if ".ImportError: " in line]) == 3


@pytest.mark.skipif(
    not hasattr(kafka, "AsyncConsumerRebalanceListener"), reason="kafka-python 2 tells nobody when it is closed"
)
def test_finished_records_are_committed_at_a_revocation(broker: EmbeddedBroker) -> None:
    """Also when other code closes the client: its partitions go with it."""
    broker.create_topic("given-up")
    raw = KafkaProducer(**broker.producer_config)
    for number in range(3):
        raw.send("given-up", message(Note, uuid=str(number)).dumps().encode(), partition=0)
    raw.close()
    config = {**broker.config, "group_id": "given-up", "auto_commit_interval_ms": 600_000}
    consumer = Consumer(config, ["given-up"])
    until(lambda: len(Note.seen) == 3, consumer)
    assert offsets(consumer.client, "given-up") == 0
    consumer.client.close(autocommit=False)
    reader = KafkaConsumer(**broker.producer_config, group_id="given-up")
    assert offsets(reader, "given-up") == 3
    reader.close()


def test_group_without_offset_reset_logs_the_missing_committed_offset(
    broker: EmbeddedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    config = {**broker.config, "group_id": "nowhere", "auto_offset_reset": "none"}
    consumer = Consumer(config, ["dice"])
    until(lambda: lines(caplog, logging.ERROR), consumer)
    (line,) = lines(caplog, logging.ERROR)
    assert line.startswith("Consumer: the group has no committed offset in dice[")
    assert line.endswith("or set the policy to 'earliest' or 'latest'; trying again")
    consumer.close()


# -- joins that outlast polls ------------------------------------------------------------------------------------------


def test_pending_join_is_usable_while_running_and_for_a_session_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member that is silent for a session is none any more: what it joined with is void."""
    now = 100.0
    monkeypatch.setattr(rebalances.time, "monotonic", lambda: now)
    task = Future()
    joining = PendingJoin(task, polled=99.0)
    assert joining.is_usable(3)
    now = 200.0
    assert joining.is_usable(3), "a group may wait for long for its other members"
    task.success(b"")
    now = 202.9
    assert joining.is_usable(3)
    now = 203.1
    assert not joining.is_usable(3)
    assert PendingJoin(task, polled=201.0).is_usable(3)
    assert not PendingJoin(task, polled=199.0).is_usable(3)


@pytest.mark.parametrize(
    ("error", "of_use"), [(RebalanceInProgressError(), True), (ValueError("an assignor's"), False)]
)
def test_pending_join_with_an_unexpected_error_is_not_usable(error: Exception, of_use: bool) -> None:
    task = Future()
    task.failure(error)
    assert PendingJoin(task, time.monotonic()).is_usable(3) == of_use
