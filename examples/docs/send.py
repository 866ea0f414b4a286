"""Send a task and an operation without building the message."""

from cdumay_result import Result

from kser import Operation, OperationRegistry, Task
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer

oregistry = OperationRegistry(producer=Producer())


@oregistry.subscribe
class Charge(Task):
    TOPIC = "orders"

    def run(self):
        print("charging", self.params)
        return Result(stdout="charged")


@oregistry.subscribe
class PlaceOrder(Operation):
    TOPIC = "orders"

    def build_tasks(self, **params):
        return [Charge(params=params)]


print(Charge(uuid="1", params={"amount": 3}).send())
print(PlaceOrder(uuid="2", params={"amount": 42}).send())

consumer = Consumer(topics=["orders"])
consumer.REGISTRY = oregistry.controller
print(consumer.run_until_idle(), "messages handled")
