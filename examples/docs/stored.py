"""A stored operation: send it, run it, and read it from the database."""

import os
import tempfile

from cdumay_result import Result

from kser import Operation, OperationRegistry, Task
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer

folder = tempfile.TemporaryDirectory()
os.environ["KSER_DATABASE_URI"] = f"sqlite:///{folder.name}/shop.db"

oregistry = OperationRegistry(producer=Producer())


@oregistry.subscribe
class Charge(Task):
    def run(self):
        return Result(stdout="charged", retval={"receipt": "R-17"})


@oregistry.subscribe
class Ship(Task):
    def run(self):
        return Result(stdout=f"shipped with receipt {self.result.retval['receipt']}")


@oregistry.subscribe
class PlaceOrder(Operation):
    TOPIC = "orders"

    def build_tasks(self, **params):
        return [Charge(params=params), Ship(params=params)]


order = PlaceOrder(uuid="order-1", params={"amount": 42}, metadata={"customer": "7"}).build()
order.send()
print("sent:", oregistry.get("order-1").status)

consumer = Consumer(topics=["orders"])
consumer.REGISTRY = oregistry.controller
consumer.run_until_idle()

print("wait:", order.wait(timeout=5))
stored = oregistry.get("order-1")
print("get: ", stored.status, [f"{type(task).__name__} {task.status}: {task.result}" for task in stored.tasks])
for event in stored.events:
    print("     ", event.kind)
print("find:", [found.uuid for found in oregistry.find(status="SUCCESS", metadata={"customer": 7})])

Producer().send("orders", order.to_Message())  # a duplicate message: the same uuid and params
consumer.run_until_idle()
print("again:", len(oregistry.get("order-1").attempts), "attempts")
oregistry.store.close()
