"""Tests of the shop without a broker, threads or sleeps."""

import pytest
from cdumay_result import Result

from kser import Message, Operation, OperationRegistry, Task
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer

oregistry = OperationRegistry()


@oregistry.subscribe
class Charge(Task):
    TOPIC = "orders"

    def run(self):
        return Result(stdout="charged", retval={"receipt": "R-17"})


@oregistry.subscribe
class PlaceOrder(Operation):
    def build_tasks(self, **params):
        return [Charge(params=params)]

    def onsuccess(self, result):
        Charge(uuid="tip").send()  # uses the producer that the consumer shares
        return result


@pytest.fixture(autouse=True)
def lock_files(tmp_path, monkeypatch):
    for name in ("RUNNING_FILE", "LOCK_FILE", "TERMINATE_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.fixture
def consumer():
    InMemoryBroker.reset()  # removes the messages of other tests
    consumer = Consumer(topics=["orders"])
    consumer.REGISTRY = oregistry.controller
    yield consumer
    consumer.close()


def test_a_task_returns_a_receipt():
    assert Charge().execute().retval == {"receipt": "R-17"}


def test_step_handles_the_available_messages(consumer):
    Producer().send("orders", Message("order-1", Charge.path))
    assert consumer.step(timeout=0) == 1
    assert consumer.step(timeout=0) == 0


def test_an_order_is_charged_and_tipped(consumer, caplog):
    caplog.set_level("INFO")
    Producer().send("orders", Message("order-1", PlaceOrder.path))
    assert consumer.run_until_idle() == 2  # the order, and the task that it sent
    assert f"PlaceOrder.Success: {PlaceOrder.path}[order-1]: charged" in caplog.messages
    assert f"Charge.Success: {Charge.path}[tip]: charged" in caplog.messages


def test_sent_messages_can_be_read_back():
    elsewhere = {"bootstrap_servers": "elsewhere"}  # a separate in-memory broker
    Producer(elsewhere).send("orders", Message("order-2", Charge.path))
    assert [Message.loads(value).uuid for value in InMemoryBroker.at("elsewhere").values("orders")] == ["order-2"]


def test_failed_message_becomes_a_dead_letter():
    InMemoryBroker.reset()
    consumer = Consumer(topics=["orders"], dead_letter=True)
    consumer.REGISTRY = oregistry.controller
    Producer().send("orders", Message("order-3", "shop.Nothing"))
    consumer.run_until_idle()
    (letter,) = InMemoryBroker.at("").topics["orders.dlq"][0]
    assert dict(letter.headers)["kser-dlq-reason"] == b"unknown-entrypoint"
    assert Message.loads(letter.value).uuid == "order-3"
