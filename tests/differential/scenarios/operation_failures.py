"""Section 6: how an operation fails."""

from cdumay_error.types import ValidationError
from cdumay_result import Result
from recorder import call, case, emit, main, show

from kser.sequencing.operation import Operation
from kser.sequencing.task import Task


class Step(Task):
    """A task that prints a line when it runs."""

    def run(self):
        emit(f"{self.params} runs")
        return Result(stdout=f"out {self.params}", retval={self.params["step"]: 1})

    def onerror(self, result):
        emit(f"{self.params} onerror")
        return result


class Failing(Step):
    """A task that fails."""

    def run(self):
        emit(f"{self.params} raises")
        raise ValueError("x")


class Launch(Operation):
    """An operation that prints the calls of its last hooks."""

    def onsuccess(self, result):
        emit("onsuccess")
        return result

    def onerror(self, result):
        emit("onerror")
        return result


def raising(where: str, error: Exception, kind=Launch):
    """Return an operation whose method raises an error."""

    def method(self, *_args, **_kwargs):
        emit(where)
        raise error

    return type("Launch", (kind,), {where: method})


def tasks(*kinds) -> list:
    """Return new tasks of the given classes, with the uuid of the operation, so that the uuids of results are equal."""
    return [kind(uuid="u", params={"step": n}) for n, kind in enumerate(kinds, 1)]


@case("6.fail.task-raises")
def a_task_raises() -> None:
    operation = Launch(uuid="u", tasks=tasks(Step, Failing, Step))
    call("execute", operation.execute)
    show("statuses", (operation.status, [task.status for task in operation.tasks]))


@case("6.fail.task-raises-error")
def a_task_raises_an_error_of_cdumay() -> None:
    class Invalid(Step):
        def run(self):
            raise ValidationError("bad", extra={"k": 1})

    call("execute", Launch(uuid="u", tasks=tasks(Invalid)).execute)


@case("6.fail.task-raises-unsafe")
def a_task_raises_unsafely() -> None:
    operation = Launch(uuid="u", tasks=tasks(Failing, Step))
    call("unsafe", operation.unsafe_execute)
    show("status", operation.status)


@case("6.fail.task-none")
def a_task_returns_nothing() -> None:
    class Silent(Step):
        def onsuccess(self, result):
            return None

    call("execute", Launch(uuid="u", tasks=tasks(Silent, Step)).execute)


@case("6.fail.task-required")
def a_task_misses_a_parameter() -> None:
    class Needy(Step):
        REQUIRED_FIELDS = ("n",)

    call("execute", Launch(uuid="u", tasks=tasks(Needy, Step)).execute)


@case("6.fail.required")
def a_required_parameter_is_missing() -> None:
    class Needy(Launch):
        REQUIRED_FIELDS = ("n",)

    operation = Needy(uuid="u", tasks=tasks(Step))
    call("execute", operation.execute)
    show("status", operation.status)


@case("6.fail.required-unsafe")
def a_required_parameter_is_missing_unsafely() -> None:
    class Needy(Launch):
        REQUIRED_FIELDS = ("n",)

    operation = Needy(uuid="u", tasks=tasks(Step))
    call("unsafe", operation.unsafe_execute)
    show("status", operation.status)


@case("6.fail.prerun")
def prerun_raises() -> None:
    operation = raising("prerun", ValueError("x"))(uuid="u", tasks=tasks(Step))
    call("execute", operation.execute)
    show("status", operation.status)


@case("6.fail.prerun-unsafe")
def prerun_raises_unsafely() -> None:
    operation = raising("prerun", ValueError("x"))(uuid="u", tasks=tasks(Step))
    call("unsafe", operation.unsafe_execute)
    show("status", operation.status)


@case("6.fail.onsuccess")
def onsuccess_raises() -> None:
    operation = raising("onsuccess", ValueError("x"))(uuid="u", tasks=tasks(Step))
    call("execute", operation.execute)
    show("status", operation.status)


@case("6.fail.onerror-after-exception")
def onerror_raises_after_an_exception() -> None:
    operation = raising("onerror", KeyError("second"))(uuid="u", tasks=tasks(Failing))
    call("execute", operation.execute)
    show("status", operation.status)


@case("6.fail.onerror-after-retcode")
def onerror_raises_after_a_failure() -> None:
    class Bad(Step):
        def run(self):
            return Result(retcode=4, stderr="bad")

    operation = raising("onerror", KeyError("second"))(uuid="u", tasks=tasks(Bad))
    call("execute", operation.execute)
    show("status", operation.status)


@case("6.fail.postinit")
def postinit_raises() -> None:
    operation = call("construct", raising("postinit", ValueError("x")), uuid="u", tasks=tasks(Step))
    show("status", operation.status)
    show("result", operation.result)


@case("6.fail.postinit-execute")
def an_operation_whose_postinit_failed_is_executed() -> None:
    operation = raising("postinit", ValueError("x"))(uuid="u", tasks=tasks(Step))
    call("execute", operation.execute)
    show("status", operation.status)


@case("6.fail.postinit-set-status")
def a_set_status_that_looks_at_the_tasks() -> None:
    class Looking(Launch):
        def set_status(self, status, result=None):
            emit(f"set_status {len(self.tasks)}")
            super().set_status(status, result)

    call("construct", raising("postinit", ValueError("x"), Looking), uuid="u", tasks=tasks(Step))


@case("6.fail.onerror-none")
def the_error_trigger_without_a_result() -> None:
    call("_onerror", Launch(uuid="u")._onerror, None)
    call("_onsuccess", Launch(uuid="u")._onsuccess, None)


@case("6.fail.set-status")
def set_status_raises() -> None:
    operation = raising("set_status", ValueError("x"))(uuid="u", tasks=tasks(Step))
    call("execute", operation.execute)


@case("6.fail.not-a-task")
def a_task_that_is_none() -> None:
    call("execute", Launch(uuid="u", tasks=["text"]).execute)


@case("6.fail.resume")
def a_failed_operation_is_executed_again() -> None:
    class Flaky(Step):
        broken = True

        def run(self):
            emit(f"{self.params} runs")
            if self.broken:
                raise ValueError("x")
            return Result(stdout="fine")

    operation = Launch(uuid="u", tasks=tasks(Step, Flaky, Step))
    show("first", operation.execute())
    operation.tasks[1].broken = False
    show("second", operation.execute())
    show("statuses", (operation.status, [task.status for task in operation.tasks]))


if __name__ == "__main__":
    main()
