"""Tests of the shared producer: a consumer provides its connection to the tasks that it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from cdumay_result import Result

from kser.controller import Controller
from kser.dummy.broker import InMemoryBroker
from kser.entry import Entrypoint
from kser.errors import ProducerMissing
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task
from tests.consumer.harness import new_consumer
from tests.support import message


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
