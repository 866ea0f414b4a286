"""Retries: a policy of the task, a policy of the consumer, and a retry that the task requests."""

import logging

from kser import Message, OperationRegistry, Task
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer
from kser.retry import Retry

logging.basicConfig(level=logging.WARNING, format="%(levelname)-7s %(message)s")
oregistry = OperationRegistry()


@oregistry.subscribe
class Charge(Task):
    RETRY = Retry(max_attempts=3, delay=0.01, jitter=False, on=(ConnectionError,))

    def run(self):
        print(f"attempt {self.attempt} of {self.uuid}")
        if self.attempt < self.params["succeeds_at"]:
            raise ConnectionError("the bank does not answer")

    def onsuccess(self, result):
        print(f"{self.uuid} is done")
        return result

    def onerror(self, result):
        print(f"{self.uuid} has failed: {result}")
        return result


@oregistry.subscribe
class Collect(Task):
    def run(self):
        if self.attempt == 1:
            raise Retry.later(0.01)
        print(f"{self.uuid} is collected")


def handle_all(count):
    done = 0
    while done < count:
        consumer.step(timeout=0.05)
        done = consumer.counts["done"]


consumer = Consumer(topics=["orders"], retry=Retry(max_attempts=2, delay=0))
consumer.REGISTRY = oregistry.controller
producer = Producer()
producer.send("orders", Message("order-1", Charge.path, {"succeeds_at": 3}))
handle_all(1)
producer.send("orders", Message("order-2", Charge.path, {"succeeds_at": 9}))
handle_all(2)
producer.send("orders", Message("parcel-1", Collect.path))
handle_all(3)
print(consumer.counts)
