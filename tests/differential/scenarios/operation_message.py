"""Section 6: operations that arrive as messages."""

import json

from cdumay_result import Result
from recorder import call, case, emit, main, show

from kser.controller import Controller
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task

UUID = "11111111-1111-4111-8111-111111111111"


class Step(Task):
    """A task that prints the result that it got."""

    def run(self):
        emit(f"runs with {self.result.stdout!r} {sorted(self.result.retval)}")
        return Result(stdout="out", retval={str(len(self.result.retval)): 1})


class Launch(Operation):
    """An operation with the default life cycle, which builds its tasks."""

    def build_tasks(self, **kwargs):
        emit(f"build_tasks {sorted(kwargs)}")
        return [Step(uuid="t1"), Step(uuid=UUID)]


class SelfBuilt(Launch):
    """An operation that builds its tasks in prerun, as users of the published package had to."""

    def prerun(self):
        self.build()


class Empty(Operation):
    """An operation without tasks."""


def raw(entrypoint: str, **fields) -> str:
    """Return a message as JSON."""
    return json.dumps({"uuid": UUID, "entrypoint": entrypoint, **fields})


for known in (Launch, SelfBuilt, Empty, Step):
    Controller.register(known.__name__, known)


@case("6.message.from-message")
def a_message_becomes_an_operation_without_tasks() -> None:
    message = Launch(uuid="u", params={"a": 1}, status="MINE", metadata={"m": 1}).to_Message()
    call("message", message.dumps)
    operation = Launch.from_Message(message)
    show("values", (operation.uuid, operation.params, operation.status, operation.tasks, operation.metadata))


@case("6.message.not-built")
def an_operation_by_message() -> None:
    call("run", Controller.run, raw("Launch", params={"a": 1}))


@case("6.message.self-built", "6.message.order")
def an_operation_by_message_that_builds_itself() -> None:
    call("run", Controller.run, raw("SelfBuilt"))


@case("6.message.empty")
def an_operation_by_message_that_stays_empty() -> None:
    call("run", Controller.run, raw("Empty"))


@case("6.message.result")
def the_result_of_the_message_and_the_first_task() -> None:
    given = {"uuid": "r", "stdout": "given", "retval": {"g": 1}}
    show("run", Controller.run(raw("SelfBuilt", result=given)))


@case("6.message.task")
def a_task_by_message() -> None:
    call("run", Controller.run, raw("Step", metadata={"m": 1}, result={"uuid": "r", "retval": {"g": 1}}))


@case("6.message.retcode")
def an_operation_by_message_fails_with_a_small_retcode() -> None:
    class Bad(Step):
        def run(self):
            return Result(retcode=4, stderr="bad")

    class Failing(Operation):
        def prerun(self):
            self.add_task(Bad(uuid=UUID))

    Controller.register("Failing", Failing)
    call("run", Controller.run, raw("Failing"))


@case("6.message.raises")
def an_operation_by_message_whose_task_raises() -> None:
    class Broken(Step):
        def run(self):
            raise ValueError("x")

    class Failing(Operation):
        def prerun(self):
            self.add_task(Broken(uuid=UUID))

    Controller.register("Failing", Failing)
    call("run", Controller.run, raw("Failing"))


if __name__ == "__main__":
    main()
