"""An idempotent task: it may run twice, but charges once, because the uuid of the message is the idempotency key."""

import sqlite3

from cdumay_result import Result

from kser import Message, OperationRegistry, Task
from kser.dummy.consumer import Consumer
from kser.dummy.producer import Producer

oregistry = OperationRegistry()
database = sqlite3.connect(":memory:")
database.execute("CREATE TABLE payments (uuid TEXT PRIMARY KEY, amount INTEGER)")


@oregistry.subscribe
class Charge(Task):
    def run(self):
        with database:  # one transaction
            cursor = database.execute(
                "INSERT INTO payments VALUES (?, ?) ON CONFLICT (uuid) DO NOTHING", (self.uuid, self.params["amount"])
            )
        return Result(stdout="charged" if cursor.rowcount else "was charged before")

    def onsuccess(self, result):
        print(self.uuid, result)
        return result


consumer = Consumer(topics=["orders"])
consumer.REGISTRY = oregistry.controller
order = Message("order-1", Charge.path, {"amount": 42})
for _ in range(2):  # the second iteration is a redelivery
    Producer().send("orders", order)
consumer.run_until_idle()
print(database.execute("SELECT * FROM payments").fetchall())
