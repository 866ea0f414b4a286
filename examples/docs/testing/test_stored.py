"""Tests of a stored operation with an in-memory store and a clock that the test sets."""

import pytest
from cdumay_result import Result

from kser import Operation, OperationRegistry, Task
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer
from kser.retry import Retry
from kser.store.memory import MemoryStore

now = [0.0]
oregistry = OperationRegistry(store=MemoryStore(clock=lambda: now[0]))


@oregistry.subscribe
class Charge(Task):
    RETRY = Retry(max_attempts=2, delay=60, jitter=False)

    def run(self):
        if self.attempt == 1:
            raise ConnectionError("the bank does not answer")
        return Result(stdout="charged")


@oregistry.subscribe
class PlaceOrder(Operation):
    TOPIC = "orders"

    def build_tasks(self, **params):
        return [Charge()]


@pytest.fixture(autouse=True)
def lock_files(tmp_path, monkeypatch):
    for name in ("RUNNING_FILE", "LOCK_FILE", "TERMINATE_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.fixture
def consumer():
    InMemoryBroker.reset()
    consumer = Consumer(topics=["orders"])
    consumer.REGISTRY = oregistry.controller
    yield consumer
    consumer.close()


def test_an_order_is_charged_a_minute_later(consumer):
    Producer().send("orders", PlaceOrder(uuid="order-1").to_Message())
    consumer.run_until_idle()
    assert oregistry.get("order-1").status == "RUNNING"
    now[0] += 61
    consumer.run_until_idle()  # takes over the steps that are due
    assert oregistry.get("order-1").status == "SUCCESS"
    assert [attempt.status for attempt in oregistry.get("order-1").attempts] == ["FAILED", "SUCCESS"]


def test_an_order_that_is_cancelled_while_it_waits_is_not_charged(consumer):
    Producer().send("orders", PlaceOrder(uuid="order-2").to_Message())
    consumer.run_until_idle()
    assert oregistry.get("order-2").cancel(reason="the customer called") == "CANCELLED"
    now[0] += 61
    assert consumer.run_until_idle() == 0
