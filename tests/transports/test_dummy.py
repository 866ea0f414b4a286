"""Tests of the in-memory transport, apart from the contracts of clients and producers."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask

from kser.confluent.consumer import Consumer as ConfluentConsumer
from kser.consumer.client import Partition
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer
from kser.errors import SettingError
from kser.python_kafka.consumer import Consumer as KafkaConsumer
from tests.support import UUID, message
from tests.transports.harness import RecordingEntrypoint


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    """Delete the brokers of the test."""
    yield
    InMemoryBroker.reset()


def test_results_contain_the_timeout() -> None:
    assert Producer().send("shop", message("x"), timeout=5).stdout == f"Message x[{UUID}] sent in shop (timeout: 5)"
    assert Producer().bulk_send("shop", [message("x")], timeout=5).stdout == "1 message(s) sent to shop (timeout: 5)"


# -- brokers -----------------------------------------------------------------------------------------------------------


def test_producers_and_consumers_share_a_broker_by_address() -> None:
    assert Producer({"bootstrap_servers": "a"}).client is InMemoryBroker.at("a")
    assert Consumer({"bootstrap_servers": ["a", "b"]}, ["x"]).client is InMemoryBroker.at("['a', 'b']")
    assert InMemoryBroker.at("a") is not InMemoryBroker.at("b")


def test_reset_forgets_every_broker() -> None:
    broker = InMemoryBroker.at("a")
    InMemoryBroker.reset()
    assert InMemoryBroker.at("a") is not broker


def test_consumer_groups_are_independent(recording_entrypoint: type[RecordingEntrypoint]) -> None:
    Producer().send("shop", message(recording_entrypoint))
    for group in ("one", "two"):
        consumer = Consumer({"group_id": group}, ["shop", "empty"])
        assert consumer.run_until_idle() == 1
        consumer.close()
    assert recording_entrypoint.ran == [UUID, UUID]
    partition = Partition("shop", 0)
    assert [InMemoryBroker.at("").committed[group, partition].offset for group in ("one", "two")] == [1, 1]


def test_keyed_records_share_a_partition_and_others_are_spread() -> None:
    broker = InMemoryBroker.at("a")
    broker.create_topic("shop", 3)
    for number in range(6):
        broker.send("shop", b"%d" % number, key=b"key")
        broker.send("shop", b"-")
    assert [sum(record.key is None for record in log) for log in broker.topics["shop"]] == [2, 2, 2]
    (keyed,) = [values for log in broker.topics["shop"] if (values := [r.value for r in log if r.key])]
    assert keyed == [b"0", b"1", b"2", b"3", b"4", b"5"]


def test_record_may_be_sent_to_a_chosen_partition() -> None:
    broker = InMemoryBroker.at("a")
    broker.create_topic("shop", 2)
    broker.send("shop", b"text", headers=[("trace", b"1")], partition=1)
    (record,) = broker.topics["shop"][1]
    assert (record.partition, record.offset, record.value, record.headers) == (1, 0, b"text", (("trace", b"1"),))
    assert broker.values("shop") == [b"text"]
    assert broker.values("nothing") == []


def test_closed_consumer_takes_no_message() -> None:
    consumer = Consumer({}, ["shop"])
    consumer.close()
    Producer().send("shop", message("shop.Pay"))
    assert consumer.step(timeout=0) == 0


def test_producer_of_a_consumer_uses_the_same_broker() -> None:
    consumer = Consumer({"bootstrap_servers": "a"}, ["shop"])
    producer = consumer.make_producer()
    assert isinstance(producer, Producer)
    assert producer.client is InMemoryBroker.at("a")


def test_limits_of_an_app_apply_to_the_producer_of_its_consumer() -> None:
    app = Flask("shop")
    app.config.update(KSER_MAX_UUID_LENGTH=10, KSER_CONFIG={"group.id": "g", "bootstrap.servers": "127.0.0.1:1"})
    consumers: list[Any] = [Consumer({}, ["shop"], app=app), ConfluentConsumer(topics=["shop"], app=app)]
    for consumer in consumers:
        producer: Any = consumer.make_producer()
        result = producer.send("shop", message("shop.Pay", uuid="u" * 11))
        producer.close()
        consumer.close()
        assert result.retcode == 413


def test_step_returns_when_a_message_arrives() -> None:
    consumer = Consumer({}, ["shop"])
    sender = threading.Timer(0.05, Producer({}).send, ["shop", message("shop.Pay")])
    sender.start()
    assert consumer.step(timeout=30) == 1
    sender.join()


# -- settings and signatures -------------------------------------------------------------------------------------------


def test_missing_topics_error_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="set KSER_TOPICS"):
        Consumer({})
    monkeypatch.setenv("KSER_TOPICS", "shop,dice")
    Producer().send("dice", message("x"))
    assert Consumer().run_until_idle() == 1


def test_topics_given_as_one_text_are_rejected() -> None:
    """A text is an iterable of letters, so it would subscribe the consumer to one topic for each letter."""
    with pytest.raises(TypeError, match="must be a list"):
        Consumer({}, "shop")


def test_consumer_constructor_matches_the_one_on_kafka() -> None:
    """D12: one API over all transports."""
    parameters = inspect.signature(Consumer).parameters
    assert list(parameters) == list(inspect.signature(KafkaConsumer).parameters)


def test_settings_of_an_app_are_read() -> None:
    """D12"""
    app = Flask("shop")
    app.config.update(KSER_TOPICS="shop", KSER_CONFIG={"bootstrap_servers": "a"})
    Producer(app=app).send("shop", message("x"))
    assert len(InMemoryBroker.at("a").values("shop")) == 1
    assert Consumer(app=app).run_until_idle() == 1


def test_empty_config_dict_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """D12: an argument overrides the environment, as in the transports on Kafka."""
    monkeypatch.setenv("KSER_CONFIG", '{"bootstrap_servers": "environment"}')
    assert Producer({}).client is InMemoryBroker.at("")
    assert Consumer({}, ["shop"]).client is InMemoryBroker.at("")
    assert Producer().client is InMemoryBroker.at("environment")
