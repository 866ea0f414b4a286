"""Tests of results that tasks receive, and of the repeated execution of a failed operation (B8 to B11)."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
from cdumay_result import Result

from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from tests.support import UUID, lines


class Step(Task):
    """A task that returns the number of its runs under its name.

    Its first ``fails`` runs fail: with a failed result, or with an error if the param ``raises`` is set.
    """

    def postinit(self) -> None:
        self.runs = 0
        self.received: Result | None = None

    def unsafe_execute(self, result: Result | None = None) -> Any:
        self.received = result
        return super().unsafe_execute(result=result)

    def run(self) -> Result:
        self.runs += 1
        name = self.params["name"]
        if self.runs <= self.params.get("fails", 0):
            if self.params.get("raises"):
                raise ValueError(f"{name} raised")
            return Result(retcode=3, stderr=f"{name} failed", retval={"failed": name})
        return Result(uuid="another uuid", stdout=name, retval={name: self.runs})


def step(name: str, **params: Any) -> Step:
    """Return a step with a name, which is also part of its uuid."""
    return Step(f"uuid of {name}", {"name": name, **params})


def test_results_accumulate_in_order_under_the_operation_uuid() -> None:
    """B10"""
    operation = Operation(UUID, tasks=[step("a"), step("b")])
    result = operation.execute()
    assert result is operation.result
    assert (result.uuid, result.stdout, result.retval) == (UUID, "b", {"a": 1, "b": 1})


def test_each_task_gets_a_copy_of_the_accumulated_result() -> None:
    """B10"""
    a, b, c = step("a"), step("b"), step("c")
    operation = Operation(UUID, result=Result(retval={"m": 1}), tasks=[a, b, c])
    operation.execute(Result(retval={"x": 1}))
    assert [task.received.retval for task in (a, b, c) if task.received] == [
        {"m": 1, "x": 1},
        {"m": 1, "x": 1, "a": 1},
        {"m": 1, "x": 1, "a": 1, "b": 1},
    ]
    assert operation.result not in (a.received, b.received, c.received)


@pytest.mark.parametrize("incoming", ["constructor", "argument"])
def test_incoming_result_is_passed_to_the_first_task(incoming: str) -> None:
    """B10: the result of a message is the argument of the constructor."""
    first, incoming_result = step("a"), Result(uuid="incoming", stdout="before")
    operation = Operation(UUID, tasks=[first], result=incoming_result if incoming == "constructor" else None)
    operation.execute(incoming_result if incoming == "argument" else None)
    assert first.received is not None
    assert first.received.stdout == "before"


def test_incoming_result_is_not_modified() -> None:
    incoming = Result(uuid="incoming", stdout="before", retval={"m": 1})
    Operation(UUID, tasks=[step("a")]).execute(incoming)
    assert (incoming.uuid, incoming.stdout, incoming.retval) == ("incoming", "before", {"m": 1})


def test_raising_task_gets_its_onerror_hook_and_a_failed_status(caplog: pytest.LogCaptureFixture) -> None:
    """B11: the Failed line is logged, and the earlier results are kept."""
    caplog.set_level(logging.INFO, "kser")
    failures: list[Result] = []

    class HookedStep(Step):
        def onerror(self, result: Result) -> Result:
            failures.append(result)
            return result

    failing = HookedStep("1", {"name": "b", "fails": 1, "raises": True})
    operation = Operation(UUID, tasks=[step("a"), failing])
    result = operation.execute()
    assert (result.uuid, result.retcode, result.stdout, result.stderr) == (UUID, 500, "a", "b raised")
    assert result.retval["a"] == 1
    assert result.retval["error"]["extra"] == {"uuid": "1"}
    assert (len(failures), failing.status, operation.status) == (1, "FAILED", "FAILED")
    assert any(line.startswith("HookedStep.Failed: ") for line in lines(caplog))


def test_unsafe_execute_returns_the_result_of_a_raising_task() -> None:
    """B11: the operation becomes FAILED."""
    operation = Operation(UUID, tasks=[step("a", fails=1, raises=True)])
    assert operation.unsafe_execute().retcode == 500
    assert operation.status == "FAILED"


def test_task_that_returns_none_fails_the_operation() -> None:
    class NoResultStep(Step):
        def onsuccess(self, result: Result) -> None:
            return None

    operation = Operation(UUID, tasks=[NoResultStep(params={"name": "a"})])
    assert operation.execute().stderr == "'NoneType' object has no attribute 'retcode'"
    assert operation.status == "FAILED"


def test_negative_return_code_lets_the_operation_continue() -> None:
    class NegativeCodeTask(Task):
        def run(self) -> Result:
            return Result(retcode=-5)

    assert Operation(tasks=[NegativeCodeTask(), step("b")]).execute().stdout == "b"


@pytest.mark.parametrize("raises", [True, False])
def test_second_execution_continues_at_the_failed_task(raises: bool) -> None:
    """B8"""
    a, b, c = step("a"), step("b", fails=1, raises=raises), step("c")
    operation = Operation(UUID, tasks=[a, b, c])
    assert operation.execute().retcode != 0
    assert [task.status for task in operation.tasks] == ["SUCCESS", "FAILED", "PENDING"]
    result = operation.execute()
    assert [task.runs for task in (a, b, c)] == [1, 2, 1]
    assert (result.uuid, result.retcode, result.stderr, result.stdout) == (UUID, 0, "", "c")
    assert result.retval == {"a": 1, "b": 2, "c": 1}
    assert operation.status == "SUCCESS"


def test_retried_task_starts_with_a_blank_result() -> None:
    """C7"""
    failing = step("b", fails=1)
    operation = Operation(UUID, tasks=[failing])
    operation.execute()
    operation.execute()
    assert (failing.result.uuid, failing.result.retcode, failing.result.stderr, failing.result.retval) == (
        "uuid of b",
        0,
        "",
        {"b": 2},
    )


def test_skipped_tasks_are_merged_and_not_run() -> None:
    """B9"""
    a, b = step("a"), step("b")
    a.status, a.result = "SUCCESS", Result(stdout="stored", retval={"stored": 1})
    result = Operation(UUID, result=Result(retval={"m": 1}), tasks=[a, b]).execute()
    assert (a.runs, b.received.retval if b.received else None) == (0, {"m": 1, "stored": 1})
    assert result.retval == {"m": 1, "stored": 1, "b": 1}


def test_second_execution_of_a_finished_operation_returns_the_first_result() -> None:
    operation = Operation(UUID, result=Result(retval={"m": 1}), tasks=[step("a"), step("b")])
    first = operation.execute()
    second = operation.execute()
    assert (second.uuid, second.retval, second.stdout) == (first.uuid, first.retval, first.stdout)
    assert [task.runs for task in operation.tasks if isinstance(task, Step)] == [1, 1]


def test_incoming_result_of_the_first_run_does_not_leak_into_the_second() -> None:
    operation = Operation(UUID, tasks=[step("a", fails=1)])
    operation.execute(Result(retval={"only": "the first time"}))
    assert operation.execute().retval == {"a": 2}


def test_failed_incoming_result_fails_the_first_task_after_it_ran() -> None:
    """C3"""
    a, b = step("a"), step("b")
    operation = Operation(UUID, tasks=[a, b])
    assert operation.execute(Result(retcode=2, stderr="old")).retcode == 2
    assert (a.runs, b.runs, operation.status) == (1, 0, "FAILED")


def test_failed_incoming_result_fails_an_operation_without_unfinished_tasks() -> None:
    """C3"""
    operation = Operation(UUID, tasks=[step("a")])
    operation.execute()
    assert operation.execute(Result(retcode=2, stderr="old")).retcode == 2
    assert operation.status == "FAILED"


def test_interrupted_operation_continues_at_the_interrupted_task() -> None:
    class InterruptedStep(Step):
        def run(self) -> Result:
            self.result.print("half done")
            if self.runs == 0:
                self.runs += 1
                raise KeyboardInterrupt
            return super().run()

    a, b = step("a"), InterruptedStep("b", {"name": "b"})
    operation = Operation(UUID, tasks=[a, b])
    with pytest.raises(KeyboardInterrupt):
        operation.execute()
    assert (operation.status, b.status) == ("RUNNING", "FAILED")
    assert operation.execute().retcode == 0
    assert (a.runs, b.result.stdout) == (1, "b")


def test_repeatedly_failing_tasks_each_succeed_once_in_order() -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    generator = random.Random(seed)
    names = [f"step {number}" for number in range(20)]
    tasks = [step(name, fails=generator.randrange(3), raises=generator.random() < 0.5) for name in names]
    operation = Operation(UUID, tasks=tasks)
    executions = 1
    while operation.execute().retcode:
        executions += 1
    assert executions == 1 + sum(task.params["fails"] for task in tasks)
    assert [task.runs for task in tasks] == [task.params["fails"] + 1 for task in tasks]
    assert list(operation.result.retval) == names
