"""Tests of the shared producer: a consumer provides its connection to the tasks that it runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from cdumay_result import Result
from kafka.serializer import Serializer

from kser.confluent.producer import Producer as ConfluentProducer
from kser.consumer.services import SharedProducer
from kser.controller import Controller
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer
from kser.entry import Entrypoint
from kser.errors import BrokerUnavailable, ProducerMissing
from kser.python_kafka.producer import Producer as PythonKafkaProducer
from kser.schemas import Message
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task
from tests.consumer.harness import new_consumer
from tests.support import message, run_concurrently, wait_until


class RecordingEntrypoint(Entrypoint):
    """An entrypoint that records the uuids of its messages."""

    ran: list[str] = []  # noqa: RUF012  emptied after each test

    def run(self) -> None:
        self.ran.append(self.uuid)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    Controller.register(RecordingEntrypoint.path, RecordingEntrypoint)
    yield
    InMemoryBroker.reset()
    RecordingEntrypoint.ran.clear()


def new_sending_task(registry: OperationRegistry, name: str = "SendingTask") -> type[Task]:
    """Return a class that sends a message for :class:`RecordingEntrypoint` each time it runs."""

    def run(self: Task) -> Result:
        registry.producer.send("dice", message(RecordingEntrypoint, uuid=f"from {self.uuid}"))
        return Result()

    return registry.subscribe(type(name, (Task,), {"run": run, "__module__": __name__}))


def test_tasks_send_with_the_producer_of_their_consumer() -> None:
    cls = new_sending_task(OperationRegistry())
    InMemoryBroker.at("").send("dice", message(cls, uuid="1").dumps().encode())
    consumer = new_consumer()
    assert consumer.run_until_idle() == 2
    consumer.close()
    assert RecordingEntrypoint.ran == ["from 1"]


def test_registry_replaced_later_gets_the_shared_producer() -> None:
    class SeparateController(Controller):
        ENTRYPOINTS = {}  # noqa: RUF012  as in the documentation

    registry = OperationRegistry(controller_class=SeparateController)
    cls = new_sending_task(registry)
    consumer = new_consumer()
    consumer.step(timeout=0)
    with pytest.raises(ProducerMissing):
        _ = registry.producer
    consumer.REGISTRY = registry.controller
    InMemoryBroker.at("").send("dice", message(cls, uuid="1").dumps().encode())
    assert consumer.run_until_idle() == 2


def test_classes_subscribed_later_get_the_shared_producer() -> None:
    """A module with tasks may be imported while the consumer runs."""
    consumer = new_consumer()
    consumer.step(timeout=0)
    cls = new_sending_task(OperationRegistry(), "LateTask")
    InMemoryBroker.at("").send("dice", message(cls, uuid="1").dumps().encode())
    assert consumer.run_until_idle() == 2


def test_each_consumer_of_a_process_shares_its_own_producer() -> None:
    """Tests of users create one consumer after another, each with a new broker."""
    cls = new_sending_task(OperationRegistry())
    for number in ("1", "2"):
        InMemoryBroker.reset()
        InMemoryBroker.at("").send("dice", message(cls, uuid=number).dumps().encode())
        consumer = new_consumer()
        consumer.run_until_idle()
        consumer.close()
    assert RecordingEntrypoint.ran == ["from 1", "from 2"]


def test_entrypoint_without_a_registry_gets_no_producer() -> None:
    InMemoryBroker.at("").send("dice", message(RecordingEntrypoint, uuid="1").dumps().encode())
    assert new_consumer().run_until_idle() == 1


def test_registry_that_is_no_controller_gets_no_producer() -> None:
    class PlainRegistry:
        values: list[Any] = []  # noqa: RUF012

        @classmethod
        def run(cls, data: Any) -> None:
            cls.values.append(data)

    consumer = new_consumer()
    consumer.REGISTRY = PlainRegistry
    InMemoryBroker.at("").send("dice", b"text")
    assert consumer.step(timeout=0) == 1
    assert PlainRegistry.values == ["text"]


# -- several consumers in one process ----------------------------------------------------------------------------------


def consumers_of(registry: OperationRegistry, count: int) -> list[Consumer]:
    """Return consumers that lend their producers to the registry, the oldest first."""
    new_sending_task(registry)
    consumers = [new_consumer() for _ in range(count)]
    for consumer in consumers:
        consumer.step(timeout=0)
    return consumers


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_sends_succeed_until_the_last_consumer_has_ended_in_any_order(order: tuple[int, ...]) -> None:
    registry = OperationRegistry()
    consumers = consumers_of(registry, 3)
    for number in order[:-1]:
        consumers[number].close()
        assert registry.producer.send("dice", message(RecordingEntrypoint)).retcode == 0
    consumers[order[-1]].close()
    with pytest.raises(ProducerMissing):
        _ = registry.producer


def test_consumer_that_attaches_twice_lends_once() -> None:
    registry = OperationRegistry()
    first, second = consumers_of(registry, 2)
    for consumer in (first, second, second):
        consumer._kser_shared_producer.attach(consumer.REGISTRY)
    second.close()
    assert registry.producer is first._kser_shared_producer.producer()


def test_consumer_that_ends_does_not_attach_again() -> None:
    """The supervisor attaches every second, also while another thread closes the consumer."""
    registry = OperationRegistry()
    first, second = consumers_of(registry, 2)
    second._kser_shared_producer.detach()
    second._kser_shared_producer.attach(second.REGISTRY)
    assert registry.producer is first._kser_shared_producer.producer()


def test_closed_consumer_makes_no_producer() -> None:
    """A lender that has not made its producer must not make one that nobody closes."""
    (consumer,) = consumers_of(OperationRegistry(), 1)
    consumer.close()
    with pytest.raises(ProducerMissing, match="the consumer has closed its producer"):
        consumer._kser_shared_producer.producer()


def test_consumer_that_cannot_make_a_producer_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = OperationRegistry()
    first, second = consumers_of(registry, 2)

    def fail() -> Any:
        raise BrokerUnavailable("no broker responds")

    monkeypatch.setattr(second._kser_shared_producer, "_make", fail)
    assert registry.producer is first._kser_shared_producer.producer()
    first.close()
    with pytest.raises(BrokerUnavailable, match="no broker responds"):
        _ = registry.producer


def test_controller_that_a_consumer_no_longer_uses_borrows_nothing_after_its_end() -> None:
    registry = OperationRegistry()
    (consumer,) = consumers_of(registry, 1)

    class OtherController(Controller):
        ENTRYPOINTS = {}  # noqa: RUF012  as in the documentation

    consumer.REGISTRY = OtherController
    consumer.close()
    with pytest.raises(ProducerMissing):
        _ = registry.producer


def test_registry_with_a_producer_of_its_own_borrows_none() -> None:
    own = Producer()
    registry = OperationRegistry(producer=own)
    first, second = consumers_of(registry, 2)
    assert registry.producer is own
    second.close()
    first.close()
    assert registry.producer is own


def test_threads_send_without_a_failure_while_consumers_end() -> None:
    registry = OperationRegistry()
    consumers = consumers_of(registry, 3)
    ended = threading.Event()

    def send_until_ended() -> list[int]:
        codes = []
        while not ended.is_set():
            codes.append(registry.producer.send("dice", message(RecordingEntrypoint)).retcode)
        return codes

    def end_two() -> None:
        for consumer in (consumers[2], consumers[0]):
            consumer.close()
        ended.set()

    *sent, _ = run_concurrently(send_until_ended, send_until_ended, end_two)
    assert [set(codes) - {0} for codes in sent] == [set(), set()]


# -- without a broker --------------------------------------------------------------------------------------------------


class SigningPython(PythonKafkaProducer):
    """A producer whose hook signs each message."""

    @classmethod
    def onmessage(cls, kmsg: Message) -> Message:
        kmsg.metadata["signature"] = "7"
        return kmsg


class SigningConfluent(ConfluentProducer):
    """A producer whose hook signs each message."""

    @classmethod
    def onmessage(cls, kmsg: Message) -> Message:
        kmsg.metadata["signature"] = "7"
        return kmsg


def reversed_value(value: bytes) -> bytes:
    return value[::-1]


class OldSerializer(Serializer):  # type: ignore[misc]
    """A serializer with the parameters of kafka-python 2."""

    def serialize(self, topic: str, value: bytes) -> bytes:
        return value[::-1]


@pytest.mark.parametrize(
    ("producer_class", "options"),
    [
        (SigningPython, {}),
        (SigningPython, {"value_serializer": reversed_value}),
        (SigningPython, {"value_serializer": OldSerializer()}),
        (SigningConfluent, {}),
    ],
)
def test_messages_are_encoded_without_a_broker_as_the_producer_would_send_them(
    producer_class: Any, options: dict[str, Any]
) -> None:
    name = "bootstrap_servers" if producer_class is SigningPython else "bootstrap.servers"
    shared = SharedProducer(lambda: producer_class({name: "127.0.0.1:1", **options}))
    wait_until(lambda: shared.prepare() is not None)
    producer: Any = shared.prepare()
    value = producer._kser_record_value("dice", message(RecordingEntrypoint, uuid="1"))
    assert not {"client", "_kser_client"} & vars(producer).keys()
    decoded = Message.loads((value[::-1] if options else value).decode())
    assert (decoded.uuid, decoded.metadata) == ("1", {"signature": "7"})
    shared.close()


def test_producer_that_was_made_without_a_broker_connects_when_it_is_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    connected: list[Producer] = []
    monkeypatch.setattr(Producer, "_kser_ensure_connected", lambda self: connected.append(self))
    (consumer,) = consumers_of(OperationRegistry(), 1)
    shared = consumer._kser_shared_producer
    wait_until(lambda: shared.prepare() is not None)
    assert connected == []
    assert shared.lend() is shared.lend() is shared.prepare()
    assert connected == [shared.prepare()]
