"""An operation fails, the cause is fixed, and the resumed operation continues at the failed task."""

from cdumay_result import Result

from kser import Operation, OperationRegistry, Task
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer
from kser.errors import StateConflict
from kser.store import open_store

oregistry = OperationRegistry(producer=Producer(), store=open_store("memory://"))
printer = {"paper": False}


@oregistry.subscribe
class Charge(Task):
    def run(self):
        print("charging")
        return Result(stdout="charged")


@oregistry.subscribe
class Ship(Task):
    def run(self):
        print(f"shipping, attempt {self.attempt} of {self.uuid}")
        if not printer["paper"]:
            raise RuntimeError("out of paper")
        return Result(stdout="shipped")


@oregistry.subscribe
class PlaceOrder(Operation):
    TOPIC = "orders"

    def build_tasks(self, **params):
        return [Charge(), Ship(uuid="parcel-1")]


consumer = Consumer(topics=["orders"])
consumer.REGISTRY = oregistry.controller

PlaceOrder(uuid="order-1").build().send()
consumer.run_until_idle()
print(oregistry.get("order-1").status)

printer["paper"] = True
oregistry.get("order-1").resume()
consumer.run_until_idle()
print(oregistry.get("order-1").status)

try:
    oregistry.get("order-1").resume()
except StateConflict as conflict:
    print(conflict.message)
