"""Commit metadata: messages finish out of order, and the next consumer skips the finished messages."""

from kser import Message, OperationRegistry, Task
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer
from kser.retry import Retry

oregistry = OperationRegistry()


@oregistry.subscribe
class Charge(Task):
    RETRY = Retry(max_attempts=2, delay=600, max_delay=600, jitter=False)

    def run(self):
        print(f"{consumer_name} runs {self.uuid}")
        if consumer_name == "A" and self.uuid == "order-1":
            raise ConnectionError("the bank does not answer")  # retried in 10 minutes


def new_consumer():
    consumer = Consumer({"group_id": "shop"}, ["orders"])
    consumer.REGISTRY = oregistry.controller
    return consumer


for number in range(4):
    Producer().send("orders", Message(f"order-{number}", Charge.path))

consumer_name = "A"
consumer = new_consumer()
consumer.run_until_idle()
for commit in InMemoryBroker.at("").committed.values():
    print(f"committed: offset {commit.offset}, metadata {commit.metadata!r}")
consumer.close()  # order-1 waits for its retry and stays uncommitted

consumer_name = "B"
consumer = new_consumer()
consumer.run_until_idle()
for commit in InMemoryBroker.at("").committed.values():
    print(f"committed: offset {commit.offset}, metadata {commit.metadata!r}")
consumer.close()
