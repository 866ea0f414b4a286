"""A controller with its own entrypoints."""

from typing import ClassVar

from kser import Controller, OperationRegistry, Task


class BillingController(Controller):
    ENTRYPOINTS: ClassVar = {}


billing = OperationRegistry(controller_class=BillingController)


@billing.subscribe
class Invoice(Task):
    pass


print(list(BillingController.ENTRYPOINTS))
print(list(Controller.ENTRYPOINTS))
