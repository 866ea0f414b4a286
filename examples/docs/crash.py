"""A consumer is killed during an operation; another consumer continues after the last checkpoint."""

import os
import subprocess
import sys
import tempfile

from cdumay_result import Result

from kser import Operation, OperationRegistry, Task
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer

oregistry = OperationRegistry(producer=Producer())


@oregistry.subscribe
class Charge(Task):
    def run(self):
        print("charging", flush=True)
        return Result(retval={"receipt": "R-17"})


@oregistry.subscribe
class Ship(Task):
    def run(self):
        print(f"shipping {self.uuid} with receipt {self.result.retval['receipt']}", flush=True)
        if sys.argv[1:] == ["crash"]:
            os._exit(9)  # ends the process like SIGKILL


@oregistry.subscribe
class PlaceOrder(Operation):
    TOPIC = "orders"

    def build_tasks(self, **params):
        return [Charge(), Ship(uuid="parcel-1")]


consumer = Consumer(topics=["orders"])
consumer.REGISTRY = oregistry.controller

if sys.argv[1:] == ["crash"]:
    PlaceOrder(uuid="order-1").build().send()
    consumer.run_until_idle()

with tempfile.TemporaryDirectory() as folder:
    os.environ["KSER_DATABASE_URI"] = f"sqlite:///{folder}/shop.db"
    os.environ["KSER_LEASE"] = "1"  # 15 s by default
    print("the first consumer ends with", subprocess.run([sys.executable, __file__, "crash"]).returncode)
    while oregistry.get("order-1").status == "RUNNING":
        consumer.step(timeout=0.1)  # each step looks for steps to take over; consumer.run() has a thread for this
    for event in oregistry.get("order-1").events:
        print("  ", event.kind, *filter(None, [event.text]))
    oregistry.store.close()
