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


class Add(Task):
    def postinit(self) -> None:
        self.runs = 0

    def run(self) -> Result:
        self.runs += 1
        if self.runs <= self.params.get("fails", 0):
            raise ValueError(f"{self.params['name']} raised")
        return Result(stdout=self.params["name"], retval={self.params["name"]: len(self.result.retval)})


def add(name: str, **params: Any) -> Add:
    return Add(name, {"name": name, **params})


class Inner(Operation):
    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [add("i1"), add("i2")]


class Outer(Operation):
    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [add("o1"), Inner("inner"), add("o2")]


def test_results_pass_into_and_out_of_a_nested_operation() -> None:
    result = Outer(UUID).execute()
    assert (result.uuid, result.stdout) == (UUID, "o2")
    assert result.retval == {"o1": 0, "i1": 1, "i2": 2, "o2": 3}


def test_nested_operation_builds_itself() -> None:
    """B3: locally or nested."""
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
        "Add.Success",
        "Inner.SetStatus",
        "Add.Success",
        "Add.Success",
        "Inner.SetStatus",
        "Inner.Success",
        "Add.Success",
        "Outer.SetStatus",
        "Outer.Success",
    ]


def test_nested_operation_runs_by_message() -> None:
    Controller.register(Outer.path, Outer)
    result = Controller.run(message(Outer).dumps())
    assert (result.uuid, result.retcode, list(result.retval)) == (UUID, 0, ["o1", "i1", "i2", "o2"])


def test_second_execution_continues_in_the_nested_operation_that_failed() -> None:
    """B8"""
    first, bad, last = add("i1"), add("i2", fails=1), add("o2")
    inner = Operation("inner", tasks=[first, bad])
    outer = Operation(UUID, tasks=[add("o1"), inner, last])
    assert outer.execute().stderr == "i2 raised"
    assert (inner.status, outer.status, last.status) == ("FAILED", "FAILED", "PENDING")
    result = outer.execute()
    assert (result.retcode, result.stderr, list(result.retval)) == (0, "", ["o1", "i1", "i2", "o2"])
    assert [task.runs for task in (first, bad, last)] == [1, 2, 1]


def test_skipped_nested_operation_contributes_its_result() -> None:
    """B9: 0.8 gave an empty result for it."""
    inner = Operation("inner", tasks=[add("i1")])
    bad = add("o2", fails=1)
    outer = Operation(UUID, tasks=[inner, bad])
    outer.execute()
    assert list(outer.execute().retval) == ["i1", "o2"]
    assert [task.runs for task in inner.tasks if isinstance(task, Add)] == [1]


def test_missing_parameter_of_a_nested_operation_fails_both_levels() -> None:
    class Picky(Operation):
        REQUIRED_FIELDS = ("bet",)

    inner = Picky("inner")
    outer = Operation(UUID, tasks=[inner])
    assert outer.execute().stderr == f"Missing parameter: bet for {Picky.path}"
    assert (inner.status, outer.status) == ("FAILED", "FAILED")


def test_operations_nest_to_any_depth() -> None:
    operation = Operation("0", tasks=[add("leaf")])
    for depth in range(1, 20):
        operation = Operation(str(depth), tasks=[operation])
    assert operation.execute().retval == {"leaf": 0}
