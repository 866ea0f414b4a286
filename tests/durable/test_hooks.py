"""Tests of the hooks of stored operations: onsuccess and onerror at their end."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import pytest
from cdumay_result import Result

from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from kser.status import FAILED, PENDING, RUNNING, SUCCESS
from kser.store.model import OperationRow, Phase
from tests.consumer.harness import ScriptedTask
from tests.durable.harness import (
    BOTH_MODES,
    HOOKED,
    LEASE_EXPIRED,
    MODES,
    DistributedHookedSale,
    DistributedSale,
    DurableHarness,
    HookedSale,
    Sale,
    in_other_thread,
    send_raw_message,
    sent_messages,
)
from tests.support import lines

pytestmark = pytest.mark.usefixtures("hooked_classes")


@HOOKED
def test_onsuccess_hook_runs_under_the_claim_before_the_end_is_recorded(
    harness: DurableHarness, cls: type[HookedSale]
) -> None:
    """durability rule 23"""
    rows: list[OperationRow] = []
    retvals: list[Any] = []

    def look(name: str, result: Result) -> Result:
        rows.append(harness.snapshot().operation)
        retvals.append(result.retval)
        return result

    HookedSale.on_hook = look
    ScriptedTask.script["1.c"] = lambda: Result(retval={"c": 1})
    send_raw_message(cls)
    harness.first.handle()
    assert (HookedSale.hook_calls, retvals) == ([("onsuccess", "1")], [{"c": 1}])
    (row,) = rows
    assert (row.status, row.phase, row.owner is not None) == (RUNNING, Phase.END_SUCCESS, True)
    assert harness.status() == SUCCESS


@HOOKED
def test_onerror_hook_runs_when_a_task_failed(harness: DurableHarness, cls: type[HookedSale]) -> None:
    """durability rule 23"""
    ScriptedTask.script["1.b"] = ConnectionError("no")
    send_raw_message(cls)
    harness.first.handle()
    assert HookedSale.hook_calls == [("onerror", "1")]
    assert (harness.status(), harness.task_statuses()) == (FAILED, [SUCCESS, FAILED, PENDING])
    assert "no" in harness.operation().result.stderr


@HOOKED
def test_hook_return_value_is_the_stored_result(harness: DurableHarness, cls: type[HookedSale]) -> None:
    """durability rule 23"""
    HookedSale.on_hook = lambda name, result: Result(uuid="1", retval={"made": name})
    send_raw_message(cls)
    harness.first.handle()
    assert (harness.status(), harness.operation().result.retval) == (SUCCESS, {"made": "onsuccess"})


@HOOKED
@pytest.mark.parametrize("error", [ConnectionError("no"), SystemExit(3)])
def test_raising_onsuccess_hook_fails_the_operation(
    harness: DurableHarness, cls: type[HookedSale], error: BaseException
) -> None:
    """durability rule 23"""

    def fail(name: str, result: Result) -> Result:
        if name == "onsuccess":
            raise error
        return result

    HookedSale.on_hook = fail
    send_raw_message(cls)
    harness.first.handle()
    assert HookedSale.hook_calls == [("onsuccess", "1"), ("onerror", "1")]
    assert (harness.status(), harness.task_statuses()) == (FAILED, [SUCCESS] * 3)


@HOOKED
def test_raising_onerror_hook_leaves_the_operation_failed_and_is_logged(
    harness: DurableHarness, cls: type[HookedSale], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 23"""

    def fail(name: str, result: Result) -> Result:
        raise ValueError("the hook failed")

    HookedSale.on_hook = fail
    ScriptedTask.script["1.b"] = ConnectionError("no")
    send_raw_message(cls)
    harness.first.handle()
    assert harness.status() == FAILED
    assert any("onerror raised: the hook failed" in line for line in lines(caplog, logging.ERROR))


@HOOKED
def test_hook_runs_again_only_after_its_consumer_died(harness: DurableHarness, cls: type[HookedSale]) -> None:
    """durability rule 23"""
    second = harness.start_process(cls, group="second")

    def exceed_the_lease_once(name: str, result: Result) -> Result:
        if len(HookedSale.hook_calls) == 1:
            in_other_thread(lambda: harness.advance(LEASE_EXPIRED), second.handle)()
        return result

    HookedSale.on_hook = exceed_the_lease_once
    send_raw_message(cls)
    harness.first.handle()
    assert HookedSale.hook_calls == [("onsuccess", "1")] * 2
    assert harness.status() == SUCCESS
    assert harness.event_kinds().count("ended") == 1
    send_raw_message(cls)
    harness.first.handle()
    assert len(HookedSale.hook_calls) == 2


def test_end_of_an_operation_is_sent_to_a_consumer_that_knows_its_class(harness: DurableHarness) -> None:
    """durability rule 23: the hooks run in a consumer that knows the class."""
    other = harness.start_process(group="other")
    harness.first.class_of(DistributedHookedSale)("1").build().send(topic="orders")
    other.handle()
    assert (ScriptedTask.ran, HookedSale.hook_calls, harness.status()) == (["1.a", "1.b", "1.c"], [], RUNNING)
    (end_message,) = sent_messages("orders")
    assert (end_message.uuid, end_message.entrypoint) == ("1", DistributedHookedSale.path)
    harness.first.run(end_message)
    assert (HookedSale.hook_calls, harness.status()) == ([("onsuccess", "1")], SUCCESS)


def test_end_hooks_send_no_extra_message(harness: DurableHarness) -> None:
    """durability rule 23: the worker of the last task ends the operation, with hooks or without."""
    for cls in (DistributedSale, DistributedHookedSale):
        sent_before = len(sent_messages())
        harness.first.send(cls, cls.__name__)
        harness.first.handle()
        # One message of the operation, and one of each task.
        assert len(sent_messages()) - sent_before == 4
        assert harness.status(cls.__name__) == SUCCESS


@BOTH_MODES
def test_log_line_of_an_end_matches_the_in_memory_one(
    harness: DurableHarness, cls: type[Sale], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 23"""
    send_raw_message(cls)
    harness.first.handle()
    assert any(
        line.startswith(f"{cls.__name__}.SetStatus: {cls.path}[1] status update 'RUNNING' -> 'SUCCESS'")
        for line in lines(caplog, logging.INFO)
    )


class ExitingHookTask(Task):
    """A task that fails, and whose hook raises SystemExit."""

    runs: ClassVar[int] = 0

    def run(self) -> None:
        ExitingHookTask.runs += 1
        raise ValueError("no")

    def onerror(self, result: Result) -> Any:
        raise SystemExit(3)


@pytest.mark.parametrize("distributed", [False, True], ids=MODES)
def test_task_hook_that_raises_system_exit_fails_its_step_once(harness: DurableHarness, distributed: bool) -> None:
    """durability rule 22: a repetition of the step would raise SystemExit again."""
    task_class = harness.first.subscribe_copy(ExitingHookTask)

    class Exiting(Operation):
        DISTRIBUTED = distributed

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [task_class(f"{self.uuid}.x")]

    ExitingHookTask.runs = 0
    send_raw_message(harness.registry.subscribe(Exiting))
    harness.first.handle()
    assert (harness.status(), ExitingHookTask.runs) == (FAILED, 1)
