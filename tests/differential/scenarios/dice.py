"""Section 7: the documented dice example with its names, and a die that always shows one."""

import random

from cdumay_result import Result
from recorder import call, case, main, show

from kser.schemas import Message
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task

random.randint = lambda low, high: low

oregistry = OperationRegistry()


@oregistry.subscribe
class DiceRoll(Task):
    """A roll of a die."""

    def run(self):
        launch = random.randint(1, 6)
        return Result(uuid=self.uuid, stdout=f"You made a {launch}")


@oregistry.subscribe
class DiceLaunch(Operation):
    """An operation of three rolls."""

    def build_tasks(self, **kwargs):
        return [DiceRoll(uuid="t1"), DiceRoll(uuid="t2"), DiceRoll(uuid="t3")]


@case("7.dice.names")
def the_names_that_were_decorated() -> None:
    show("task", DiceRoll)
    show("operation", DiceLaunch)
    show("registered", sorted(oregistry.controller.ENTRYPOINTS))


@case("7.dice.task")
def a_message_for_the_task() -> None:
    raw = Message(uuid="u", entrypoint="__main__.DiceRoll").dumps()
    call("run", oregistry.controller.run, raw)


@case("7.dice.build")
def building_the_operation() -> None:
    call("build", lambda: DiceLaunch(uuid="u").build().tasks)


@case("7.dice.operation")
def a_message_for_the_operation() -> None:
    raw = Message(uuid="u", entrypoint="__main__.DiceLaunch").dumps()
    call("run", oregistry.controller.run, raw)


if __name__ == "__main__":
    main()
