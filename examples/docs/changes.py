"""Listeners for status changes of stored operations, in one consumer and over the consumers."""

from cdumay_result import Result

from kser import Operation, OperationRegistry, Task
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer
from kser.signals import operation_changed, task_changed
from kser.store import open_store

oregistry = OperationRegistry(producer=Producer(), store=open_store("memory://"))


@oregistry.subscribe
class Charge(Task):
    def run(self):
        return Result(stdout="charged")


@oregistry.subscribe
class PlaceOrder(Operation):
    TOPIC = "orders"

    def build_tasks(self, **params):
        return [Charge()]


@operation_changed.connect
def on_operation(registry, uuid, entrypoint, old, new, result):
    print(f"{entrypoint}[{uuid}]: {old} -> {new}" + ("" if result is None else f": {result}"))


@task_changed.connect
def on_task(registry, operation, position, new, attempt, error):
    print(f"task {position} of {operation}: {new} at attempt {attempt}")


PlaceOrder(uuid="order-1").build().send()
consumer = Consumer(topics=["orders"])
consumer.REGISTRY = oregistry.controller
consumer.run_until_idle()
