"""Failures: a return code above 0 means failure, and kser converts an exception to a failed Result."""

from cdumay_error.types import ValidationError
from cdumay_result import Result

from kser import Task


class Returns(Task):
    def run(self):
        return Result(retcode=2, stderr="out of stock")


class Raises(Task):
    def run(self):
        raise ZeroDivisionError("no items to divide the price by")


class Refuses(Task):
    def run(self):
        raise ValidationError("no such order", extra={"order": 17})


for task in (Returns(), Raises(), Refuses()):
    result = task.execute()
    error = result.retval.get("error", {})
    print(task.status, result.retcode, result.stderr, error.get("name"), error.get("extra", {}).get("order"))
