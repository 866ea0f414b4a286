"""Tests of an operation as a task of another operation."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from cdumay_result import Result

from kser.controller import Controller
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from tests.support import UUID, lines, message


class CountingTask(Task):
    """A task that returns the number of earlier results under its name; its first ``fails`` runs raise."""

    def postinit(self) -> None:
        self.runs = 0

    def run(self) -> Result:
        self.runs += 1
        if self.runs <= self.params.get("fails", 0):
            raise ValueError(f"{self.params['name']} raised")
        return Result(stdout=self.params["name"], retval={self.params["name"]: len(self.result.retval)})


def counting_task(name: str, **params: Any) -> CountingTask:
    return CountingTask(name, {"name": name, **params})


class Inner(Operation):
    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [counting_task("i1"), counting_task("i2")]


class Outer(Operation):
    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [counting_task("o1"), Inner("inner"), counting_task("o2")]


def test_results_pass_into_and_out_of_a_nested_operation() -> None:
    result = Outer(UUID).execute()
    assert (result.uuid, result.stdout) == (UUID, "o2")
    assert result.retval == {"o1": 0, "i1": 1, "i2": 2, "o2": 3}


def test_nested_operation_builds_itself() -> None:
    """B3: a nested operation without tasks is built before it runs."""
    outer = Outer(UUID)
    outer.execute()
    inner = outer.tasks[1]
    assert isinstance(inner, Operation)
    assert (len(inner.tasks), inner.status, inner.result.uuid) == (2, "SUCCESS", "inner")


def test_log_lines_of_both_levels_interleave(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kser")
    Outer(UUID).execute()
    assert [line.split(": ")[0] for line in lines(caplog)] == [
        "Outer.SetStatus",
        "CountingTask.Success",
        "Inner.SetStatus",
        "CountingTask.Success",
        "CountingTask.Success",
        "Inner.SetStatus",
        "Inner.Success",
        "CountingTask.Success",
        "Outer.SetStatus",
        "Outer.Success",
    ]


def test_nested_operation_runs_by_message() -> None:
    Controller.register(Outer.path, Outer)
    result = Controller.run(message(Outer).dumps())
    assert (result.uuid, result.retcode, list(result.retval)) == (UUID, 0, ["o1", "i1", "i2", "o2"])


def test_second_execution_continues_in_the_nested_operation_that_failed() -> None:
    """B8"""
    first, failing, last = counting_task("i1"), counting_task("i2", fails=1), counting_task("o2")
    inner = Operation("inner", tasks=[first, failing])
    outer = Operation(UUID, tasks=[counting_task("o1"), inner, last])
    assert outer.execute().stderr == "i2 raised"
    assert (inner.status, outer.status, last.status) == ("FAILED", "FAILED", "PENDING")
    result = outer.execute()
    assert (result.retcode, result.stderr, list(result.retval)) == (0, "", ["o1", "i1", "i2", "o2"])
    assert [task.runs for task in (first, failing, last)] == [1, 2, 1]


def test_skipped_nested_operation_contributes_its_result() -> None:
    """B9: with 0.8, a skipped nested operation had an empty result."""
    inner = Operation("inner", tasks=[counting_task("i1")])
    failing = counting_task("o2", fails=1)
    outer = Operation(UUID, tasks=[inner, failing])
    outer.execute()
    assert list(outer.execute().retval) == ["i1", "o2"]
    assert [task.runs for task in inner.tasks if isinstance(task, CountingTask)] == [1]


def test_missing_parameter_of_a_nested_operation_fails_both_levels() -> None:
    class StrictOperation(Operation):
        REQUIRED_FIELDS = ("bet",)

    inner = StrictOperation("inner")
    outer = Operation(UUID, tasks=[inner])
    assert outer.execute().stderr == f"Missing parameter: bet for {StrictOperation.path}"
    assert (inner.status, outer.status) == ("FAILED", "FAILED")


def test_operations_nest_to_any_depth() -> None:
    operation = Operation("0", tasks=[counting_task("leaf")])
    for depth in range(1, 20):
        operation = Operation(str(depth), tasks=[operation])
    assert operation.execute().retval == {"leaf": 0}
