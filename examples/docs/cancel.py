"""Cancel operations: a pending operation ends immediately, and a running operation ends after its current task."""

import time

from cdumay_result import Result

from kser import Operation, OperationRegistry, Task
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer
from kser.store import open_store

oregistry = OperationRegistry(producer=Producer(), store=open_store("memory://"))


@oregistry.subscribe
class Pick(Task):
    def run(self):
        for number in range(1, 1000):
            if number == 3:  # usually another process cancels
                print("cancel:", oregistry.get("order-2").cancel(reason="the customer called"))
            if self.cancel_requested:  # reads the database at most twice per second
                return Result(stdout="stopped early")
            time.sleep(0.01)
        return Result(stdout="picked everything")


@oregistry.subscribe
class Ship(Task):
    def run(self):
        print("shipping")


@oregistry.subscribe
class PlaceOrder(Operation):
    TOPIC = "orders"

    def build_tasks(self, **params):
        return [Pick(), Ship()]


consumer = Consumer(topics=["orders"])
consumer.REGISTRY = oregistry.controller

PlaceOrder(uuid="order-1").build().send()
print("cancel:", oregistry.get("order-1").cancel())
PlaceOrder(uuid="order-2").build().send()
consumer.run_until_idle()

for uuid in ("order-1", "order-2"):
    order = oregistry.get(uuid)
    print(order.uuid, order.status, [f"{task.status}: {task.result}" for task in order.tasks])
