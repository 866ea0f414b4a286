"""The shop: an operation of three tasks. The buyer and the workers import this module."""

import os
import time
from pathlib import Path

from cdumay_result import Result

from kser import Operation, OperationRegistry, Task
from kser.python_kafka.producer import Producer
from kser.retry import Retry

#: While this file is missing, the label printer of the warehouse is out of paper.
PAPER = Path(os.environ["SHOP_PAPER"])

oregistry = OperationRegistry(producer=Producer())  # KSER_DATABASE_URI names the database


@oregistry.subscribe
class Reserve(Task):
    TOPIC = "warehouse"

    def run(self):
        time.sleep(0.1)
        return Result(stdout=f"reserved a {self.params['item']}", retval={"shelf": "B-12"})


@oregistry.subscribe
class Charge(Task):
    TOPIC = "bank"
    RETRY = Retry(max_attempts=5, delay=0.2, backoff=2, jitter=False, on=(ConnectionError,))

    def run(self):
        time.sleep(0.2)
        if self.attempt < 3:
            raise ConnectionError("the bank does not answer")
        return Result(stdout="charged", retval={"receipt": "R-17"})


@oregistry.subscribe
class Ship(Task):
    TOPIC = "warehouse"

    def run(self):
        if not PAPER.exists():
            raise RuntimeError("the label printer is out of paper")
        return Result(stdout="shipped from {shelf} with receipt {receipt}".format(**self.result.retval))


@oregistry.subscribe
class PlaceOrder(Operation):
    TOPIC = "orders"

    def build_tasks(self, **params):
        return [Reserve(params=params), Charge(params=params), Ship(params=params)]
