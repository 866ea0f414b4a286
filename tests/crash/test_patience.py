"""Tests of shutdown during an outage: queued messages are released, and running tasks are abandoned."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from cdumay_result import Result

from kser.controller import Controller
from kser.dummy.broker import InMemoryBroker
from kser.errors import StoreUnavailable
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task
from kser.store.memory import MemoryStore
from tests.consumer.harness import ConsumerThread, committed, new_consumer, send_messages
from tests.support import message, wait_until

pytestmark = pytest.mark.usefixtures("bus")


class Away(MemoryStore):
    """A database that is away when a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        #: Who asked in vain.
        self.asked = threading.Event()

    def get_operation(self, uuid: str) -> Any:
        if self.away and threading.current_thread().name != "kser-services":
            self.asked.set()
            raise StoreUnavailable("it is away")
        return super().get_operation(uuid)


class Asking(Task):
    """Asks whether it is to be cancelled, once its database is away."""

    store: ClassVar[Away]
    runs: ClassVar[list[str]] = []

    def run(self) -> Result:
        self.runs.append(self.uuid)
        if len(self.runs) == 1 and self.params:
            self.store.away = True
            assert not self.cancel_requested
        return Result()


class Order(Operation):
    TOPIC = "dice"

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [Asking(params=kwargs)]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Away]:
    Asking.store = Away()
    monkeypatch.setenv("KSER_LEASE", "2")
    monkeypatch.setenv("KSER_HEARTBEAT", "0.5")
    registry = OperationRegistry(store=Asking.store)
    for cls in (Asking, Order):
        monkeypatch.setattr(cls, "_kser_registry", registry, raising=False)
        Controller.register(cls.path, cls)
    yield Asking.store
    Asking.runs.clear()


@pytest.mark.parametrize("workers", [1, 2])
def test_graceful_shutdown_releases_a_message_waiting_for_the_database(store: Away, workers: int) -> None:
    store.away = True
    send_messages("1", cls=Order)
    began = time.monotonic()
    with ConsumerThread(new_consumer(workers=workers, shutdown_timeout=30)) as running:
        wait_until(store.asked.is_set)
        running.consumer.stop()
    assert (committed(), Asking.runs, time.monotonic() - began < 10) == (0, [], True)
    store.away = False
    new_consumer().run_until_idle()
    row = store.get_operation("1")
    assert row is not None
    assert (row.status, committed(), len(Asking.runs)) == ("SUCCESS", 1, 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_graceful_shutdown_abandons_a_task_waiting_for_the_database(store: Away, workers: int) -> None:
    """Another consumer runs it again, once the lease is over."""
    InMemoryBroker.at("").send("dice", message(Order, uuid="1", params={"asks": True}).dumps().encode())
    with ConsumerThread(new_consumer(workers=workers, shutdown_timeout=0.5)) as running:
        wait_until(store.asked.is_set)
        running.consumer.stop()
        running.join()
        wait_until(lambda: not [each for each in threading.enumerate() if each.name == "kser-worker"])
    assert committed() == 1
    store.away = False
    with ConsumerThread(new_consumer()):
        wait_until(lambda: (row := store.get_operation("1")) is not None and row.status == "SUCCESS")
    assert len(Asking.runs) == 2
    assert len(set(Asking.runs)) == 1
