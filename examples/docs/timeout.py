"""A time limit: the attempt fails, its code continues in its thread, and kser drops the late result."""

import logging
import threading

from kser import Message, OperationRegistry, Task
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer

logging.basicConfig(level=logging.WARNING, format="%(levelname)-7s %(message)s")
oregistry = OperationRegistry()
bank = threading.Event()


@oregistry.subscribe
class Charge(Task):
    TIME_LIMIT = 0.2

    def run(self):
        bank.wait()  # a call without a timeout
        print("the bank has answered, too late")
        consumer.stop()

    def onsuccess(self, result):
        print("never called")
        return result

    def onerror(self, result):
        Producer().send("orders", Message("order-2", Ship.path))
        return result


@oregistry.subscribe
class Ship(Task):
    def run(self):
        print("another worker runs order-2")
        bank.set()


consumer = Consumer(topics=["orders"])
consumer.REGISTRY = oregistry.controller
Producer().send("orders", Message("order-1", Charge.path))
try:
    consumer.run()
except SystemExit:
    print(consumer.counts)
