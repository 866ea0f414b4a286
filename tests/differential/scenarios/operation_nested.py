"""Section 6: operations inside operations."""

from cdumay_result import Result
from recorder import call, case, emit, main, show

from kser.sequencing.operation import Operation
from kser.sequencing.task import Task


class Step(Task):
    """A task that prints the names in the result that it got."""

    def run(self):
        emit(f"{self.uuid} runs with {sorted(self.result.retval)}")
        return Result(stdout=f"out {self.uuid}", retval={self.uuid: 1})


class Launch(Operation):
    """An operation of given tasks."""


def nested(*inner) -> Launch:
    """Return an operation whose second task is an operation with the given tasks; the last task has its uuid."""
    return Launch(uuid="u", tasks=[Step(uuid="t1"), Launch(uuid="inner", tasks=list(inner)), Step(uuid="u")])


@case("6.nested.order")
def results_are_forwarded_both_ways() -> None:
    operation = nested(Step(uuid="deep1"), Step(uuid="inner"))
    call("execute", operation.execute)
    show("statuses", (operation.status, operation.tasks[1].status))


@case("6.nested.again")
def running_again() -> None:
    operation = nested(Step(uuid="inner"))
    operation.execute()
    show("second", operation.execute())


@case("6.nested.retcode")
def a_task_of_the_inner_operation_returns_a_failure() -> None:
    bad = Step(uuid="inner")
    bad.run = lambda: Result(retcode=4, stderr="bad")
    operation = nested(bad)
    call("execute", operation.execute)
    show("statuses", (operation.status, operation.tasks[1].status))


@case("6.nested.raises")
def a_task_of_the_inner_operation_raises() -> None:
    class Failing(Step):
        def run(self):
            raise ValueError("x")

    operation = nested(Failing(uuid="inner"))
    call("execute", operation.execute)
    show("statuses", (operation.status, operation.tasks[1].status))


@case("6.nested.empty")
def an_inner_operation_without_tasks() -> None:
    call("execute", nested().execute)


@case("6.nested.three-deep")
def three_levels() -> None:
    innermost = Launch(uuid="innermost", tasks=[Step(uuid="innermost")])
    operation = nested(Step(uuid="deep"), innermost)
    result = operation.execute()
    show("keys", sorted(result.retval))
    show("stdout", result.stdout)


if __name__ == "__main__":
    main()
