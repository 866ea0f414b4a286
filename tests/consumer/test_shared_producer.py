"""Tests of the shared producer: a consumer provides its connection to the tasks that it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from cdumay_result import Result

from kser.controller import Controller
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.entry import Entrypoint
from kser.errors import ProducerMissing
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task
from tests.support import message


class ScriptedTask(Entrypoint):
    ran: list[str] = []  # noqa: RUF012  emptied after each test

    def run(self) -> None:
        self.ran.append(self.uuid)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    Controller.register(ScriptedTask.path, ScriptedTask)
    yield
    InMemoryBroker.reset()
    ScriptedTask.ran.clear()


def new_consumer() -> Consumer:
    return Consumer({}, ["dice"])


def sending(registry: OperationRegistry, name: str = "Send") -> type[Task]:
    """A class that sends a message of :class:`ScriptedTask` each time it runs."""

    def run(self: Task) -> Result:
        registry.producer.send("dice", message(ScriptedTask, uuid=f"from {self.uuid}"))
        return Result()

    return registry.subscribe(type(name, (Task,), {"run": run, "__module__": __name__}))


def test_tasks_send_with_the_producer_of_their_consumer() -> None:
    cls = sending(OperationRegistry())
    InMemoryBroker.at("").send("dice", message(cls, uuid="1").dumps().encode())
    consumer = new_consumer()
    assert consumer.run_until_idle() == 2
    consumer.close()
    assert ScriptedTask.ran == ["from 1"]


def test_registry_replaced_later_gets_the_shared_producer() -> None:
    class Apart(Controller):
        ENTRYPOINTS = {}  # noqa: RUF012  how the docs say it is done

    registry = OperationRegistry(controller_class=Apart)
    cls = sending(registry)
    consumer = new_consumer()
    consumer.step(timeout=0)
    with pytest.raises(ProducerMissing):
        _ = registry.producer
    consumer.REGISTRY = registry.controller
    InMemoryBroker.at("").send("dice", message(cls, uuid="1").dumps().encode())
    assert consumer.run_until_idle() == 2


def test_classes_subscribed_later_get_the_shared_producer() -> None:
    """A module with tasks may be imported when the consumer runs already."""
    consumer = new_consumer()
    consumer.step(timeout=0)
    cls = sending(OperationRegistry(), "Late")
    InMemoryBroker.at("").send("dice", message(cls, uuid="1").dumps().encode())
    assert consumer.run_until_idle() == 2


def test_each_consumer_of_a_process_shares_its_own_producer() -> None:
    """Tests of users make one consumer after the other, on a bus that is new each time."""
    cls = sending(OperationRegistry())
    for number in ("1", "2"):
        InMemoryBroker.reset()
        InMemoryBroker.at("").send("dice", message(cls, uuid=number).dumps().encode())
        consumer = new_consumer()
        consumer.run_until_idle()
        consumer.close()
    assert ScriptedTask.ran == ["from 1", "from 2"]


def test_entrypoint_without_a_registry_gets_no_producer() -> None:
    InMemoryBroker.at("").send("dice", message(ScriptedTask, uuid="1").dumps().encode())
    assert new_consumer().run_until_idle() == 1


def test_registry_that_is_no_controller_gets_no_producer() -> None:
    class Anything:
        seen: list[Any] = []  # noqa: RUF012

        @classmethod
        def run(cls, data: Any) -> None:
            cls.seen.append(data)

    consumer = new_consumer()
    consumer.REGISTRY = Anything
    InMemoryBroker.at("").send("dice", b"text")
    assert consumer.step(timeout=0) == 1
    assert Anything.seen == ["text"]
