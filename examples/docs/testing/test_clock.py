"""Test a retry without waiting: the test advances the clock of the consumer."""

import pytest

from kser import Message, OperationRegistry, Task
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer
from kser.retry import Retry

oregistry = OperationRegistry()


@oregistry.subscribe
class Charge(Task):
    RETRY = Retry(max_attempts=2, delay=60, jitter=False)

    def run(self):
        if self.attempt == 1:
            raise ConnectionError("the bank does not answer")


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def own_broker(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCK_PATH", str(tmp_path))
    yield
    InMemoryBroker.reset()


def test_charge_is_retried_after_a_minute():
    clock = Clock()
    consumer = Consumer(topics=["orders"], clock=clock)
    consumer.REGISTRY = oregistry.controller
    Producer().send("orders", Message("order-1", Charge.path))
    consumer.step(timeout=0)
    clock.now += 59
    consumer.step(timeout=0)
    assert consumer.counts["retried"] == 1
    assert consumer.counts["done"] == 0
    clock.now += 2
    consumer.step(timeout=0)
    assert consumer.counts["done"] == 1
