"""An operation stops at the first failed task. When it runs again, it continues at this task."""

from cdumay_result import Result

from kser import Operation, Task

cash = [5, 50]


class Charge(Task):
    def run(self):
        if cash.pop(0) < 42:
            return Result(retcode=1, stderr="not enough money")
        return Result(stdout="charged", retval={"receipt": "R-17"})


class Reserve(Task):
    def run(self):
        return Result(stdout="reserved", retval={"shelf": 3})


class Ship(Task):
    def run(self):
        return Result(stdout=f"shipped from shelf {self.result.retval['shelf']}")


order = Operation(tasks=[Reserve(), Charge(), Ship()])
for _ in range(2):
    result = order.execute()
    print(order.status, [task.status for task in order.tasks])
    print(result.retcode, result, result.retval)
