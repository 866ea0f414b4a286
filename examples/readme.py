import logging

from cdumay_result import Result

from kser import Message, Operation, OperationRegistry, Task
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer

logging.basicConfig(level=logging.INFO, format="%(message)s")
oregistry = OperationRegistry()


@oregistry.subscribe
class Charge(Task):
    def run(self):
        return Result(stdout="charged {amount} EUR".format(**self.params), retval={"receipt": "R-17"})


@oregistry.subscribe
class Ship(Task):
    def run(self):  # self.result holds the result of Charge
        return Result(stdout="shipped with receipt {receipt}".format(**self.result.retval))


@oregistry.subscribe
class PlaceOrder(Operation):
    def build_tasks(self, **params):
        return [Charge(params=params), Ship()]


consumer = Consumer(topics=["orders"])
consumer.REGISTRY = oregistry.controller
Producer().send("orders", Message("order-1", "__main__.PlaceOrder", {"amount": 42}))
consumer.run_until_idle()
