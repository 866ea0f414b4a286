"""One operation in both execution modes: in one consumer, and over the consumers."""

from cdumay_result import Result

from kser import Operation, OperationRegistry, Task
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer
from kser.store import open_store

oregistry = OperationRegistry(producer=Producer(), store=open_store("memory://"))


@oregistry.subscribe
class Charge(Task):
    TOPIC = "bank"

    def run(self):
        return Result(stdout="charged")


@oregistry.subscribe
class Ship(Task):
    TOPIC = "warehouse"

    def run(self):
        return Result(stdout=f"{self.result.stdout} and shipped")


@oregistry.subscribe
class PlaceOrder(Operation):
    TOPIC = "orders"

    def build_tasks(self, **params):
        return [Charge(), Ship()]


consumers = []
for topic in ("orders", "bank", "warehouse"):
    consumer = Consumer({"group_id": topic}, [topic])
    consumer.REGISTRY = oregistry.controller
    consumers.append(consumer)


def run():
    while sum([consumer.run_until_idle() for consumer in consumers]):
        pass


PlaceOrder(uuid="order-1").build().send()
run()
print(oregistry.get("order-1").result)
print({topic: len(InMemoryBroker.at("").values(topic)) for topic in ("orders", "bank", "warehouse")})

PlaceOrder(uuid="order-2").build().launch()
run()
print(oregistry.get("order-2").result)
print({topic: len(InMemoryBroker.at("").values(topic)) for topic in ("orders", "bank", "warehouse")})
print(InMemoryBroker.at("").values("warehouse")[0])
