"""The consumer: start it with ``python shop.py``."""

import logging

from cdumay_result import Result

from kser import Operation, OperationRegistry, Task

oregistry = OperationRegistry()


@oregistry.subscribe
class Charge(Task):
    REQUIRED_FIELDS = ("amount",)

    def run(self):
        return Result(stdout=f"charged {self.params['amount']} EUR", retval={"receipt": "R-17"})


@oregistry.subscribe
class Ship(Task):
    def run(self):
        receipt = self.result.retval["receipt"]
        return Result(stdout=f"shipped with receipt {receipt}")


@oregistry.subscribe
class PlaceOrder(Operation):
    def build_tasks(self, **params):
        return [Charge(params=params), Ship()]


if __name__ == "__main__":
    from kser.python_kafka.consumer import Consumer

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("kafka").setLevel(logging.WARNING)
    consumer = Consumer()
    consumer.REGISTRY = oregistry.controller
    consumer.run()
