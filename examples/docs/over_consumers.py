"""One message per task, without a database: your code sends the tasks, and stores the state that the tasks share.

A task sends itself with the uuid of its operation. At its end, it calls ``launch_next``. The state is in a dict.
"""

from cdumay_result import Result

from kser import Operation, OperationRegistry, Task
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer

producer = Producer()
oregistry = OperationRegistry(producer=producer)
operations = {}


class Step(Task):
    def send(self, result=None):
        return producer.send(self.TOPIC, self.to_Message(result=result))

    def onsuccess(self, result):
        self.operation.launch_next(self, result)
        return result

    def onerror(self, result):
        self.operation.launch_next(self, result)
        return result

    @property
    def operation(self):
        return operations[self.metadata["operation"]]


@oregistry.subscribe
class Charge(Step):
    TOPIC = "money"

    def run(self):
        return Result(stdout="charged", retval={"receipt": "R-17"})


@oregistry.subscribe
class Ship(Step):
    TOPIC = "parcels"

    def run(self):
        return Result(stdout=f"shipped with receipt {self.result.retval['receipt']}")


@oregistry.subscribe
class PlaceOrder(Operation):
    def build_tasks(self, **params):
        return [step(metadata={"operation": self.uuid}) for step in (Charge, Ship)]

    def finalize(self):
        operations[self.uuid] = self
        return self

    def set_status(self, status, result=None):
        super().set_status(status, result)
        print(f"the operation is {status}: {result}")


consumers = []
for topic in ("money", "parcels"):
    consumer = Consumer({"group_id": topic}, [topic])
    consumer.REGISTRY = oregistry.controller
    consumers.append(consumer)

print(PlaceOrder().build().launch())
for consumer in consumers:
    consumer.run_until_idle()
