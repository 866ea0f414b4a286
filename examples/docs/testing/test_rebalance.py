"""Tests of the shop when consumers join, leave and die. Each test controls the consumers step by step."""

import pytest

from kser import Message, OperationRegistry, Task
from kser.consumer.client import Partition
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer

oregistry = OperationRegistry()
charged = []


@oregistry.subscribe
class Charge(Task):
    def run(self):
        charged.append(self.uuid)
        if self.params.get("crash"):
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def broker(tmp_path, monkeypatch):
    for name in ("RUNNING_FILE", "LOCK_FILE", "TERMINATE_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    InMemoryBroker.reset()
    charged.clear()
    broker = InMemoryBroker.at("")
    broker.create_topic("orders", partitions=2)
    return broker


def new_consumer(**options):
    consumer = Consumer({"group_id": "shop"}, ["orders"], **options)
    consumer.REGISTRY = oregistry.controller
    return consumer


def rebalance(*consumers):
    """Complete a rebalance: each member polls once to join, and again to get its partitions."""
    for _ in range(2):
        for consumer in consumers:
            consumer.step(timeout=0)


def test_two_consumers_share_the_partitions():
    first = new_consumer()
    rebalance(first)
    assert len(first.assignment) == 2
    second = new_consumer()
    rebalance(first, second)
    assert len(first.assignment) == len(second.assignment) == 1
    second.close()
    rebalance(first)
    assert len(first.assignment) == 2


def test_a_consumer_that_leaves_has_its_work_committed(broker):
    first = new_consumer()
    for number in range(4):
        Producer().send("orders", Message(f"order-{number}", Charge.path))
    first.run_until_idle()
    first.close()
    assert [broker.committed["shop", Partition("orders", number)].offset for number in (0, 1)] == [2, 2]


def test_an_order_of_a_consumer_that_dies_is_charged_by_another(broker):
    first = new_consumer()
    Producer().send("orders", Message("order-1", Charge.path, {"crash": True}))
    with pytest.raises(KeyboardInterrupt):
        first.run_until_idle()
    broker.groups["shop"].members[0].expel()  # as if its session had timed out
    second = new_consumer()
    with pytest.raises(KeyboardInterrupt):
        second.run_until_idle()
    assert charged == ["order-1", "order-1"]
