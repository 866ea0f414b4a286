"""Tests of the in-memory transport. Behaviour page, section 10; the consumer loop has its own tests."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from cdumay_error.types import ValidationError
from cdumay_result import Result
from flask import Flask

from kser import signals
from kser.consumer.client import Partition
from kser.controller import BaseProducer, Controller
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer
from kser.entry import Entrypoint
from kser.errors import SettingError
from kser.python_kafka.consumer import Consumer as KafkaConsumer
from kser.python_kafka.producer import Producer as KafkaProducer
from kser.schemas import Message
from tests.support import UUID, lines, message

TEXT = f"Message shop.Pay[{UUID}] sent in shop (timeout: 60)"


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    yield
    InMemoryBroker.reset()


def test_send_logs_the_published_text_and_appends_to_the_topic(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kser")
    kmsg = message("shop.Pay", params={"a": 1})
    result = Producer({}).send("shop", kmsg)
    assert (result.uuid, result.retcode, result.stdout) == (UUID, 0, TEXT)
    assert InMemoryBroker.at("").values("shop") == [kmsg.dumps().encode()]
    assert lines(caplog) == [f"Producer.Success: shop.Pay[{UUID}]: {TEXT}"]


def test_message_that_is_not_json_gives_a_failed_result_and_is_not_sent(caplog: pytest.LogCaptureFixture) -> None:
    """D13"""
    result = Producer({}).send("shop", message("shop.Pay", params={"when": object()}))
    assert (result.uuid, result.retcode) == (UUID, 500)
    assert result.stderr == "Object of type object is not JSON serializable"
    assert InMemoryBroker.at("").values("shop") == []
    assert lines(caplog) == [f"Producer.Failed: shop.Pay[{UUID}]: {result.stderr}"]


def test_hooks_of_producers_are_called() -> None:
    class Hooked(Producer):
        @classmethod
        def onmessage(cls, kmsg: Message) -> Message:
            return Message(kmsg.uuid, "other")

        @classmethod
        def onsuccess(cls, kmsg: Message, result: Result) -> Any:
            return "hook", kmsg.entrypoint

        @classmethod
        def onerror(cls, kmsg: Message, result: Result) -> Any:
            return "error hook", result.retcode

    producer = Hooked()
    assert producer.send("shop", message("shop.Pay")) == ("hook", "shop.Pay")
    assert Message.loads(InMemoryBroker.at("").values("shop")[0]).entrypoint == "other"
    assert Producer().send("shop", message("shop.Pay", params={"a": object()})).retcode == 500


def test_raising_onmessage_hook_fails_the_message_under_its_own_uuid() -> None:
    """C12: the uuid of a message is the uuid of its result."""

    class Refusing(Producer):
        @classmethod
        def onmessage(cls, kmsg: Message) -> Message:
            raise ValidationError("refused")

    result = Refusing().send("shop", message("shop.Pay"))
    assert (result.uuid, result.retcode, result.stderr) == (UUID, 400, "refused")


def test_bulk_send_accepts_any_iterable() -> None:
    """D14"""
    result = Producer().bulk_send("shop", (message("shop.Pay", uuid=str(number)) for number in range(3)), timeout=5)
    assert (result.retcode, result.stdout) == (0, "3 message(s) sent to shop (timeout: 5)")
    assert len(InMemoryBroker.at("").values("shop")) == 3


def test_bulk_send_with_a_message_that_is_not_json_gives_a_failed_result() -> None:
    """D13"""
    result = Producer().bulk_send("shop", [message("x"), message("x", params={"a": object()}), message("x")])
    assert result.retcode == 500
    assert "not JSON serializable" in result.stderr


def test_bulk_send_emits_message_sent_for_each_message() -> None:
    heard: list[str] = []

    def listen(sender: Any, topic: str, kmsg: Message, result: Result) -> None:
        heard.append(f"{kmsg.uuid} {result.uuid}")

    with signals.message_sent.connected_to(listen):
        Producer().bulk_send("shop", [message("x", uuid="1"), message("x", uuid="2")])
    assert heard == ["1 1", "2 2"]


def test_closing_a_producer_is_harmless() -> None:
    Producer().close()


# -- buses -------------------------------------------------------------------------------------------------------------


def test_producers_and_consumers_share_a_broker_by_address() -> None:
    assert Producer({"bootstrap_servers": "a"}).client is InMemoryBroker.at("a")
    assert Consumer({"bootstrap_servers": ["a", "b"]}, ["x"]).client is InMemoryBroker.at("['a', 'b']")
    assert InMemoryBroker.at("a") is not InMemoryBroker.at("b")


def test_reset_forgets_every_broker() -> None:
    bus = InMemoryBroker.at("a")
    InMemoryBroker.reset()
    assert InMemoryBroker.at("a") is not bus


def test_consumer_groups_are_independent() -> None:
    class Note(Entrypoint):
        def run(self) -> None:
            return None

    Controller.register(Note.path, Note)
    Producer().send("shop", message(Note))
    for group in ("one", "two"):
        consumer = Consumer({"group_id": group}, ["shop", "empty"])
        assert consumer.run_until_idle() == 1
        consumer.close()
    partition = Partition("shop", 0)
    assert [InMemoryBroker.at("").committed[group, partition].offset for group in ("one", "two")] == [1, 1]


def test_keyed_records_share_a_partition_and_others_are_spread() -> None:
    bus = InMemoryBroker.at("a")
    bus.create_topic("shop", 3)
    for number in range(6):
        bus.send("shop", b"%d" % number, key=b"key")
        bus.send("shop", b"-")
    assert [sum(record.key is None for record in log) for log in bus.topics["shop"]] == [2, 2, 2]
    (keyed,) = [values for log in bus.topics["shop"] if (values := [r.value for r in log if r.key])]
    assert keyed == [b"0", b"1", b"2", b"3", b"4", b"5"]


def test_record_may_be_sent_to_a_chosen_partition() -> None:
    bus = InMemoryBroker.at("a")
    bus.create_topic("shop", 2)
    bus.send("shop", b"text", headers=[("trace", b"1")], partition=1)
    (record,) = bus.topics["shop"][1]
    assert (record.partition, record.offset, record.value, record.headers) == (1, 0, b"text", (("trace", b"1"),))
    assert bus.values("shop") == [b"text"]
    assert bus.values("nothing") == []


def test_keys_and_headers_are_sent_with_a_message() -> None:
    Producer({}).send("shop", message("shop.Pay"), key="customer", headers={"trace": b"1"})
    ((record,),) = InMemoryBroker.at("").topics["shop"]
    assert (record.key, record.headers) == (b"customer", (("trace", b"1"),))


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


def test_step_returns_when_a_message_arrives() -> None:
    consumer = Consumer({}, ["shop"])
    sender = threading.Timer(0.05, Producer({}).send, ["shop", message("shop.Pay")])
    sender.start()
    assert consumer.step(timeout=30) == 1
    sender.join()


# -- like the real ones ------------------------------------------------------------------------------------------------


def test_missing_topics_error_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="set KSER_TOPICS"):
        Consumer({})
    monkeypatch.setenv("KSER_TOPICS", "shop,dice")
    Producer().send("dice", message("x"))
    assert Consumer().run_until_idle() == 1


def test_topics_given_as_one_text_are_rejected() -> None:
    """Read letter by letter, a text would subscribe the consumer to topics that do not exist."""
    with pytest.raises(TypeError, match="must be a list"):
        Consumer({}, "shop")


@pytest.mark.parametrize(("mine", "real"), [(Consumer, KafkaConsumer), (Producer, KafkaProducer)])
def test_constructors_match_those_of_the_kafka_transport(mine: Any, real: Any) -> None:
    """D12: one API over all transports."""
    assert list(inspect.signature(mine).parameters) == list(inspect.signature(real).parameters)


def test_settings_of_an_app_are_read() -> None:
    """D12"""
    app = Flask("shop")
    app.config.update(KSER_TOPICS="shop", KSER_CONFIG={"bootstrap_servers": "a"})
    Producer(app=app).send("shop", message("x"))
    assert len(InMemoryBroker.at("a").values("shop")) == 1
    assert Consumer(app=app).run_until_idle() == 1


def test_empty_config_dict_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """D12: arguments win over the environment, with this transport as with the real one."""
    monkeypatch.setenv("KSER_CONFIG", '{"bootstrap_servers": "environment"}')
    assert Producer({}).client is InMemoryBroker.at("")
    assert Consumer({}, ["shop"]).client is InMemoryBroker.at("")
    assert Producer().client is InMemoryBroker.at("environment")


def test_producers_of_all_transports_have_the_same_methods() -> None:
    """D12"""
    for name in ("send", "bulk_send", "close", "_send"):
        mine, real = getattr(Producer, name), getattr(KafkaProducer, name)
        assert list(inspect.signature(mine).parameters) == list(inspect.signature(real).parameters)
    assert issubclass(Producer, BaseProducer)
