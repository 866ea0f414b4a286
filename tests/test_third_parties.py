"""Tests of packages written for kser 0.8, in the shape of kser-crypto and flask-kser."""

from __future__ import annotations

import base64
import inspect
import json
from collections.abc import Iterator
from typing import Any

import pytest
from cdumay_result import Result
from flask import Flask
from marshmallow import fields, post_dump, pre_load

from kser.controller import Controller
from kser.dummy import consumer as dummy_consumer
from kser.dummy import producer as dummy_producer
from kser.dummy.broker import InMemoryBroker
from kser.entry import Entrypoint
from kser.python_kafka.consumer import Consumer as KafkaConsumer
from kser.python_kafka.producer import Producer as KafkaProducer
from kser.schemas import BaseSchema, Message
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task
from tests.support import UUID, message, ok_result


class Greet(Entrypoint):
    """Entrypoint whose result shows params, metadata and result of its message."""

    def run(self) -> Result:
        return ok_result(f"hello {self.params['name']}, {self.metadata.get('from')}, {self.result.stdout}")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Register the entrypoint, and empty the in-memory broker after the test."""
    Controller.register(Greet.path, Greet)
    yield
    InMemoryBroker.reset()


# -- in the shape of kser-crypto ---------------------------------------------------------------------------------------


class SecretSchema(BaseSchema):
    """Schema that encodes a whole message into one field."""

    result = fields.Dict()
    metadata = fields.Dict()

    @post_dump
    def hide(self, data: dict[str, Any], **_: Any) -> dict[str, str]:
        data["result"] = {"stdout": data["result"]["stdout"]} if isinstance(data.get("result"), dict) else {}
        return {"secret": base64.b64encode(json.dumps(data).encode()).decode()}

    @pre_load
    def reveal(self, data: dict[str, str], **_: Any) -> Any:
        return json.loads(base64.b64decode(data["secret"]))


class SecretMessage(Message):
    MARSHMALLOW_SCHEMA = SecretSchema()

    def __init__(
        self, uuid: str, entrypoint: str, params: Any = None, result: Any = None, metadata: Any = None
    ) -> None:
        super().__init__(uuid, entrypoint, params, result, metadata)

    @classmethod
    def of(cls, kmsg: Message) -> SecretMessage:
        values = vars(kmsg)
        result = values["result"]
        secret = cls(**values)
        secret.result = {"stdout": result.stdout}  # type: ignore[assignment]  # the schema dumps a dict
        return secret


class SecretController(Controller):
    TRANSPORT = SecretMessage


class SecretProducer(dummy_producer.Producer):
    def _send(self, topic: str, kmsg: Message, timeout: float = 60) -> Any:
        secret = SecretMessage.of(kmsg)
        self.client.send(topic, secret.MARSHMALLOW_SCHEMA.dumps(secret).encode())
        result = Result(uuid=kmsg.uuid, stdout=f"Message {kmsg.entrypoint}[{kmsg.uuid}] sent in {topic}")
        return self._onsuccess(kmsg=kmsg, result=result)


class SecretConsumer(dummy_consumer.Consumer):
    REGISTRY = SecretController


def test_overridden_transport_and_producer_understand_each_other() -> None:
    kmsg = message(Greet, params={"name": "world"}, result=ok_result("before"), metadata={"from": "me"})
    assert SecretProducer({}).send("dice", kmsg).retcode == 0
    (raw,) = InMemoryBroker.at("").values("dice")
    assert list(json.loads(raw)) == ["secret"]
    assert SecretController.run(raw).stdout == "hello world, me, before"
    assert SecretConsumer({}, ["dice"]).run_until_idle() == 1


def test_plain_controller_rejects_a_message_of_an_overridden_transport() -> None:
    SecretProducer({}).send("dice", message(Greet, params={"name": "world"}))
    assert Controller.run(InMemoryBroker.at("").values("dice")[0]).stderr == "Failed to load message"


def test_overridden_schema_replaces_the_fast_path() -> None:
    """The fast path replaces only the schema of the package itself."""
    plain = Message(UUID, Greet.path).dumps()
    assert SecretController.run(plain).retcode == 400
    assert list(json.loads(SecretMessage.of(message(Greet)).dumps())) == ["secret"]


def test_messages_are_rebuilt_from_their_attributes() -> None:
    kmsg = message(Greet, params={"name": "world"}, result=Result(uuid="r", retval={"a": 1}), metadata={"m": 1})
    rebuilt = SecretMessage(**vars(kmsg))
    assert vars(rebuilt) == vars(kmsg)
    assert Message.MARSHMALLOW_SCHEMA.dumps(rebuilt) == kmsg.dumps()


def test_task_and_operation_are_sent_with_an_overridden_producer() -> None:
    """Tasks and operations call the overridden `_send`."""
    registry = OperationRegistry(controller_class=SecretController, producer=SecretProducer({}))

    @registry.subscribe
    class SentTask(Task):
        TOPIC = "dice"

    @registry.subscribe
    class Order(Operation):
        TOPIC = "dice"

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [Greeting(params={"name": "x"})]

    class Greeting(Task):
        def run(self) -> Result:
            return ok_result("ran")

    SentTask().send()
    Order().send()
    assert [list(json.loads(raw)) for raw in InMemoryBroker.at("").values("dice")] == [["secret"], ["secret"]]
    assert SecretController.run(InMemoryBroker.at("").values("dice")[1]).stdout == "ran"


def test_triggers_of_a_controller_are_called_by_keyword() -> None:
    class KeywordOnly(Controller):
        @classmethod
        def _onsuccess(cls, *, kmsg: Message, result: Result) -> Any:  # type: ignore[override]
            return "success"

        @classmethod
        def _onerror(cls, *, kmsg: Message, result: Result) -> Any:  # type: ignore[override]
            return "error"

    assert KeywordOnly.run(message(Greet, params={"name": "x"}).dumps()) == "success"
    assert KeywordOnly.run(message(Greet).dumps()) == "error"


def test_controller_may_override_start_and_stop_processing() -> None:
    calls: list[str] = []

    class OverriddenProcessing(Controller):
        @classmethod
        def start_processing(cls, kmsg: Message) -> None:
            calls.append(f"started {kmsg.uuid}")

        @classmethod
        def stop_processing(cls) -> None:
            calls.append("stopped")

    OverriddenProcessing.run(message(Greet, params={"name": "x"}).dumps())
    assert calls == [f"started {UUID}", "stopped"]


# -- in the shape of flask-kser ----------------------------------------------------------------------------------------


class FlaskKser:
    """Extension that creates a producer and a consumer from an app's config, with positional arguments."""

    def __init__(self, app: Flask, producer: Any, consumer: Any) -> None:
        config = app.config["KAFKA"]
        self.producer = producer(config)
        self.consumer = consumer(config, app.config["TOPICS"])


def test_producers_and_consumers_are_constructed_positionally() -> None:
    app = Flask("shop")
    app.config.update(KAFKA={"bootstrap_servers": "here"}, TOPICS=("dice",))
    extension = FlaskKser(app, dummy_producer.Producer, dummy_consumer.Consumer)
    registry = OperationRegistry(app)
    extension.consumer.REGISTRY = registry.controller
    extension.producer.send("dice", message(Greet, params={"name": "x"}))
    assert extension.consumer.run_until_idle() == 1
    assert app.config["KAFKA"] == {"bootstrap_servers": "here"}


def test_default_transport_accepts_config_and_topics_positionally() -> None:
    producer, consumer = inspect.signature(KafkaProducer).parameters, inspect.signature(KafkaConsumer).parameters
    assert (next(iter(producer)), list(consumer)[:2]) == ("config", ["config", "topics"])
    kinds = {producer["config"].kind, consumer["config"].kind, consumer["topics"].kind}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
