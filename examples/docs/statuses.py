"""Record the status of operations in a database of your own."""

import sqlite3

from cdumay_result import Result

from kser import Operation, OperationRegistry, Task

oregistry = OperationRegistry()
database = sqlite3.connect(":memory:")
database.execute("CREATE TABLE history (uuid TEXT, status TEXT, output TEXT)")


@oregistry.subscribe
class Charge(Task):
    def run(self):
        return Result(stdout="charged")


@oregistry.subscribe
class PlaceOrder(Operation):
    def build_tasks(self, **params):
        return [Charge(params=params)]

    def set_status(self, status, result=None):
        super().set_status(status, result)
        database.execute("INSERT INTO history VALUES (?, ?, ?)", (self.uuid, status, str(result or "")))


PlaceOrder(uuid="order-1", params={"amount": 42}).execute()
for row in database.execute("SELECT * FROM history"):
    print(row)
