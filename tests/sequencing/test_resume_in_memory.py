"""Tests of results passed from task to task, and of executing a failed operation again (B8 to B11)."""

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
    """Adds a value of its own; fails as often as its params say, returning or raising."""

    def postinit(self) -> None:
        self.runs = 0
        self.got: Result | None = None

    def unsafe_execute(self, result: Result | None = None) -> Any:
        self.got = result
        return super().unsafe_execute(result=result)

    def run(self) -> Result:
        self.runs += 1
        name = self.params["name"]
        if self.runs <= self.params.get("fails", 0):
            if self.params.get("raises"):
                raise ValueError(f"{name} raised")
            return Result(retcode=3, stderr=f"{name} failed", retval={"failed": name})
        return Result(uuid="run's own", stdout=name, retval={name: self.runs})


def step(name: str, **params: Any) -> Step:
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
    assert [task.got.retval for task in (a, b, c) if task.got] == [
        {"m": 1, "x": 1},
        {"m": 1, "x": 1, "a": 1},
        {"m": 1, "x": 1, "a": 1, "b": 1},
    ]
    assert operation.result not in (a.got, b.got, c.got)


@pytest.mark.parametrize("incoming", ["constructor", "argument"])
def test_incoming_result_is_passed_to_the_first_task(incoming: str) -> None:
    """B10: also the message's own."""
    first, given = step("a"), Result(uuid="given", stdout="before")
    operation = Operation(UUID, tasks=[first], result=given if incoming == "constructor" else None)
    operation.execute(given if incoming == "argument" else None)
    assert first.got is not None
    assert first.got.stdout == "before"


def test_incoming_result_is_not_modified() -> None:
    given = Result(uuid="given", stdout="before", retval={"m": 1})
    Operation(UUID, tasks=[step("a")]).execute(given)
    assert (given.uuid, given.stdout, given.retval) == ("given", "before", {"m": 1})


def test_raising_task_gets_its_onerror_hook_and_a_failed_status(caplog: pytest.LogCaptureFixture) -> None:
    """B11: Failed line, hook, status; what came before is kept."""
    caplog.set_level(logging.INFO, "kser")
    told: list[Result] = []

    class Told(Step):
        def onerror(self, result: Result) -> Result:
            told.append(result)
            return result

    bad = Told("1", {"name": "b", "fails": 1, "raises": True})
    operation = Operation(UUID, tasks=[step("a"), bad])
    result = operation.execute()
    assert (result.uuid, result.retcode, result.stdout, result.stderr) == (UUID, 500, "a", "b raised")
    assert result.retval["a"] == 1
    assert result.retval["error"]["extra"] == {"uuid": "1"}
    assert (len(told), bad.status, operation.status) == (1, "FAILED", "FAILED")
    assert any(line.startswith("Told.Failed: ") for line in lines(caplog))


def test_unsafe_execute_returns_the_result_of_a_raising_task() -> None:
    """B11: the operation does not stay RUNNING."""
    operation = Operation(UUID, tasks=[step("a", fails=1, raises=True)])
    assert operation.unsafe_execute().retcode == 500
    assert operation.status == "FAILED"


def test_task_that_returns_none_fails_the_operation() -> None:
    class Nothing(Step):
        def onsuccess(self, result: Result) -> None:
            return None

    operation = Operation(UUID, tasks=[Nothing(params={"name": "a"})])
    assert operation.execute().stderr == "'NoneType' object has no attribute 'retcode'"
    assert operation.status == "FAILED"


def test_negative_return_code_lets_the_operation_continue() -> None:
    class Negative(Task):
        def run(self) -> Result:
            return Result(retcode=-5)

    assert Operation(tasks=[Negative(), step("b")]).execute().stdout == "b"


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
    bad = step("b", fails=1)
    operation = Operation(UUID, tasks=[bad])
    operation.execute()
    operation.execute()
    assert (bad.result.uuid, bad.result.retcode, bad.result.stderr, bad.result.retval) == ("uuid of b", 0, "", {"b": 2})


def test_skipped_tasks_are_merged_and_not_run() -> None:
    """B9"""
    a, b = step("a"), step("b")
    a.status, a.result = "SUCCESS", Result(stdout="stored", retval={"stored": 1})
    result = Operation(UUID, result=Result(retval={"m": 1}), tasks=[a, b]).execute()
    assert (a.runs, b.got.retval if b.got else None) == (0, {"m": 1, "stored": 1})
    assert result.retval == {"m": 1, "stored": 1, "b": 1}


def test_finished_operation_executed_again_runs_nothing_and_returns_the_same() -> None:
    operation = Operation(UUID, result=Result(retval={"m": 1}), tasks=[step("a"), step("b")])
    first = operation.execute()
    again = operation.execute()
    assert (again.uuid, again.retval, again.stdout) == (first.uuid, first.retval, first.stdout)
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
    class Interrupted(Step):
        def run(self) -> Result:
            self.result.print("half done")
            if self.runs == 0:
                self.runs += 1
                raise KeyboardInterrupt
            return super().run()

    a, b = step("a"), Interrupted("b", {"name": "b"})
    operation = Operation(UUID, tasks=[a, b])
    with pytest.raises(KeyboardInterrupt):
        operation.execute()
    assert (operation.status, b.status) == ("RUNNING", "FAILED")
    assert operation.execute().retcode == 0
    assert (a.runs, b.result.stdout) == (1, "b")


def test_repeatedly_failing_tasks_each_succeed_once_in_order() -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    names = [f"step {number}" for number in range(20)]
    tasks = [step(name, fails=chance.randrange(3), raises=chance.random() < 0.5) for name in names]
    operation = Operation(UUID, tasks=tasks)
    attempts = 1
    while operation.execute().retcode:
        attempts += 1
    assert attempts == 1 + sum(task.params["fails"] for task in tasks)
    assert [task.runs for task in tasks] == [task.params["fails"] + 1 for task in tasks]
    assert list(operation.result.retval) == names
