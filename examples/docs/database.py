"""Create the tables, check their version, and purge old operations."""

import os
import subprocess
import sys
import tempfile
from datetime import timedelta

from kser import Operation, OperationRegistry, Task
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer


def store_command(*arguments):
    print("$ python -m kser.store", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "kser.store", *arguments])


folder = tempfile.TemporaryDirectory()
os.chdir(folder.name)
os.environ["KSER_DATABASE_URI"] = "sqlite:///shop.db"
store_command("status")
store_command("upgrade")
store_command("status")

oregistry = OperationRegistry(producer=Producer())


@oregistry.subscribe
class Charge(Task):
    def run(self):
        pass


@oregistry.subscribe
class PlaceOrder(Operation):
    TOPIC = "orders"

    def build_tasks(self, **params):
        return [Charge()]


for _ in range(3):
    PlaceOrder().build().send()
consumer = Consumer(topics=["orders"])
consumer.REGISTRY = oregistry.controller
consumer.run_until_idle()
print("ended more than 30 days ago:", oregistry.purge(older_than=timedelta(days=30)))
print("ended successfully, ever:", oregistry.purge(older_than=0, status="SUCCESS"))
oregistry.store.close()
