"""Section 6: an operation runs its tasks."""

from cdumay_result import Result
from recorder import call, case, emit, main, show

from kser.sequencing.operation import Operation
from kser.sequencing.task import Task


class Step(Task):
    """A task that prints the result that it got, and returns its number."""

    def run(self):
        emit(f"{self.uuid} runs with {self.result.stdout!r} {sorted(self.result.retval)}")
        return Result(uuid="mine", stdout=f"out {self.uuid}", retval={self.uuid: 1})

    def onsuccess(self, result):
        emit(f"{self.uuid} onsuccess")
        return result

    def onerror(self, result):
        emit(f"{self.uuid} onerror")
        return result


class Launch(Operation):
    """An operation that prints the calls of its hooks."""

    def prerun(self):
        emit("prerun")

    def run(self):
        emit("run")

    def postrun(self, result):
        emit("postrun")
        return result

    def onsuccess(self, result):
        emit("onsuccess")
        return result

    def onerror(self, result):
        emit("onerror")
        return result


def steps(count: int = 2) -> list[Step]:
    """Return new tasks; the last one has the uuid of the operation, so that the result keeps its uuid."""
    return [*(Step(uuid=f"t{n}") for n in range(1, count)), Step(uuid="u")]


def returning(value, uuid: str = "u") -> Step:
    """Return a task that returns a value."""
    task = Step(uuid=uuid)
    task.run = lambda: value
    return task


@case("6.run.order", "6.run.hooks-unused", "6.log.pre-run", "6.log.success")
def the_tasks_run_in_order() -> None:
    operation = Launch(uuid="u", params={"a": 1}, tasks=steps())
    call("execute", operation.execute)
    show("status", operation.status)


@case("6.run.unsafe")
def unsafe_execute_runs_them_too() -> None:
    operation = Launch(uuid="u", tasks=steps(1))
    call("unsafe", operation.unsafe_execute)


@case("6.run.task-status")
def the_statuses_of_the_tasks() -> None:
    operation = Launch(uuid="u", tasks=steps(1))
    operation.tasks[0].prerun = lambda: emit(f"prerun {operation.tasks[0].status}")
    operation.execute()
    show("tasks", [task.status for task in operation.tasks])


@case("6.run.input")
def the_result_that_is_given_goes_to_the_first_task() -> None:
    given = Result(uuid="given", stdout="given", retval={"g": 1})
    operation = Launch(uuid="u", tasks=steps(2))
    call("execute", operation.execute, given)
    show("given", given)


@case("6.run.own-result")
def the_own_result_and_the_first_task() -> None:
    operation = Launch(uuid="u", tasks=steps(1), result=Result(uuid="own", stdout="own", retval={"o": 1}))
    call("execute", operation.execute)
    show("own", operation.result)


@case("6.run.value")
def the_result_of_an_operation() -> None:
    operation = Launch(uuid="u", tasks=[Step(uuid="t1"), Step(uuid="t2")])
    result = operation.execute()
    show("returned", result)
    show("own", operation.result)
    show("is the last task's", result is operation.tasks[-1].result)
    show("first task", operation.tasks[0].result)


@case("6.run.again")
def running_again() -> None:
    operation = Launch(uuid="u", tasks=steps(2))
    show("first", operation.execute())
    show("second", operation.execute())


@case("6.run.skipped")
def a_task_that_succeeded_is_skipped() -> None:
    done = Step(uuid="t2", status="SUCCESS", result=Result(uuid="t2", stdout="old", retval={"old": 1}))
    operation = Launch(uuid="u", tasks=[Step(uuid="t1"), done, Step(uuid="u")])
    call("execute", operation.execute)


@case("6.run.skipped-failed")
def a_skipped_task_whose_result_failed() -> None:
    done = Step(uuid="t1", status="SUCCESS", result=Result(uuid="u", retcode=3, stderr="old"))
    operation = Launch(uuid="u", tasks=[done])
    call("execute", operation.execute)


@case("6.run.retcode", "6.log.failed")
def a_task_returns_a_failure() -> None:
    for retcode in (1, 300):
        operation = Launch(uuid="u", tasks=[returning(Result(retcode=retcode, stderr="bad")), Step(uuid="never")])
        call(f"{retcode}", operation.execute)
        show("status", operation.status)


@case("6.run.retcode-unsafe")
def a_task_returns_a_failure_unsafely() -> None:
    operation = Launch(uuid="u", tasks=[returning(Result(retcode=4, stderr="bad")), Step(uuid="never")])
    call("unsafe", operation.unsafe_execute)


@case("6.run.retcode-negative")
def a_negative_retcode_goes_on() -> None:
    operation = Launch(uuid="u", tasks=[returning(Result(retcode=-5, stderr="odd"), "t1"), Step(uuid="u")])
    call("execute", operation.execute)


@case("6.run.empty")
def an_operation_without_tasks() -> None:
    operation = Launch(uuid="u")
    call("execute", operation.execute)
    show("status", operation.status)
    call("given", Launch(uuid="u").execute, Result(uuid="g", stdout="given"))


@case("6.run.empty-built")
def an_operation_that_was_built_without_tasks() -> None:
    operation = Launch(uuid="u", params={"a": 1})
    operation.build()
    call("execute", operation.execute)
    show("status", operation.status)


@case("6.run.not-built")
def an_operation_that_was_never_built() -> None:
    class Building(Launch):
        def build_tasks(self, **kwargs):
            emit(f"build_tasks {sorted(kwargs)}")
            return steps(1)

    call("execute", Building(uuid="u", params={"a": 1}).execute)


@case("6.run.built-in-prerun")
def an_operation_that_builds_itself() -> None:
    class Building(Launch):
        def build_tasks(self, **kwargs):
            emit("build_tasks")
            return steps(1)

        def prerun(self):
            self.build(dice=1)

    call("execute", Building(uuid="u").execute)


@case("6.run.built-outside")
def an_operation_that_was_built_is_not_built_again() -> None:
    class Building(Launch):
        def build_tasks(self, **kwargs):
            emit("build_tasks")
            return steps(1)

    operation = Building(uuid="u")
    operation.build()
    call("execute", operation.execute)


@case("6.run.value-of-hook")
def the_value_of_the_hook_is_returned() -> None:
    operation = Launch(uuid="u", tasks=steps(1))
    operation.onsuccess = lambda result: "value"
    show("execute", operation.execute())


@case("6.run.task-value")
def a_task_that_is_an_entrypoint_with_a_mapping() -> None:
    class Replacing(Step):
        def onsuccess(self, result):
            return Result(uuid="replaced", stdout="replaced", retval={"r": 1})

    operation = Launch(uuid="u", tasks=[Replacing(uuid="t1"), Step(uuid="u")])
    show("execute", operation.execute())


@case("6.run.set-status-override")
def a_users_set_status_is_called_with_the_result() -> None:
    class Recording(Launch):
        def set_status(self, status, result=None):
            emit(f"set_status {status} {result and result.stdout}")
            super().set_status(status, result)

    Recording(uuid="u", tasks=steps(1)).execute()


@case("6.run.triggers")
def underscore_triggers_of_an_operation() -> None:
    class Triggered(Launch):
        def _prerun(self):
            emit("_prerun")
            return super()._prerun()

        def _onsuccess(self, result):
            emit("_onsuccess")
            return super()._onsuccess(result)

        def _onerror(self, result):
            emit("_onerror")
            return super()._onerror(result)

        def _set_status(self, status, result=None):
            emit(f"_set_status {status}")
            return super()._set_status(status, result)

        def _run(self):
            emit("_run")
            return super()._run()

        def _postrun(self, result):
            emit("_postrun")
            return super()._postrun(result)

    call("execute", Triggered(uuid="u", tasks=steps(1)).execute)


if __name__ == "__main__":
    main()
