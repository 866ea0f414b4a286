"""Four workers: records with the same key run one after the other, and records with different keys run in parallel."""

import threading
import time
from collections import defaultdict

from kser import Message, OperationRegistry, Task
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer

oregistry = OperationRegistry()
lock = threading.Lock()
running, most, order = set(), 0, defaultdict(list)


@oregistry.subscribe
class Step(Task):
    def run(self):
        global most
        customer = self.params["customer"]
        with lock:
            assert customer not in running, "two records of one key overlap"
            running.add(customer)
            most = max(most, len(running))
            order[customer].append(self.params["number"])
        time.sleep(0.05)
        with lock:
            running.discard(customer)
            if sum(map(len, order.values())) == 12:
                consumer.stop()


producer = Producer()
for number in range(4):
    for customer in ("ann", "bob", "eve"):
        message = Message(f"{customer}-{number}", Step.path, {"customer": customer, "number": number})
        producer.send("orders", message, key=customer)

consumer = Consumer(topics=["orders"], workers=4, ordering="key")
consumer.REGISTRY = oregistry.controller
try:
    consumer.run()
except SystemExit:
    for customer, numbers in sorted(order.items()):
        print(customer, numbers)
    print("at once:", most)
