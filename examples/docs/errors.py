"""Errors contain advice. You can convert an error to a Result, which has the code and the identifier of the error."""

from cdumay_result import Result

from kser import Operation, OperationRegistry, Task
from kser.dummy.producer import Producer
from kser.errors import KserError, SendError

oregistry = OperationRegistry()


@oregistry.subscribe
class Charge(Task):
    pass


try:
    Charge().send()
except KserError as error:
    print(type(error).__name__, error.msgid, error.code)
    print(error.message)
    print(Result.from_exception(error).retcode)

connected = OperationRegistry(producer=Producer())


@connected.subscribe
class PlaceOrder(Operation):
    TOPIC = "orders"


try:
    PlaceOrder(uuid="order-1", params={"when": {1, 2}}).send()
except SendError as error:
    print(error.message)
    print(error.result.retcode)
