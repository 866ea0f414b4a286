"""Build the tasks of an operation: prebuild checks the params, build_tasks creates the tasks, finalize runs last."""

from cdumay_error.types import ValidationError

from kser import Operation, OperationRegistry, Task

oregistry = OperationRegistry()


@oregistry.subscribe
class Reserve(Task):
    REQUIRED_FIELDS = ("item",)


@oregistry.subscribe
class Ship(Task):
    REQUIRED_FIELDS = ("address",)


@oregistry.subscribe
class PlaceOrder(Operation):
    REQUIRED_FIELDS = ("items",)
    TASKS = (Ship,)  # the operation requires all fields that Ship requires

    def prebuild(self, **params):
        if not params["items"]:
            raise ValidationError("the order is empty")
        return {**params, "items": sorted(params["items"])}  # the arguments of build_tasks

    def build_tasks(self, items, **params):
        return [*(Reserve(params={"item": item}) for item in items), Ship(params=params)]

    def finalize(self):
        print(f"{len(self.tasks)} tasks")
        return self


params = {"items": ["tea", "milk"], "address": "Main Street 1"}
order = PlaceOrder(params=params).build()
print([(type(task).__name__, task.params.get("item")) for task in order.tasks])

for wrong in ({"items": []}, {"items": [], "address": "Main Street 1"}):
    try:
        PlaceOrder(params=wrong).build()
    except ValidationError as error:
        print(error.message)
