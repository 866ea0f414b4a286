"""Tests of retries and timeouts of the tasks of stored operations."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from cdumay_result import Result

from kser import signals
from kser.dummy.broker import InMemoryBroker
from kser.retry import Retry
from kser.sequencing.task import Task
from kser.status import FAILED, PENDING, RUNNING, SUCCESS
from tests.consumer.harness import ScriptedTask, committed, send_messages
from tests.durable.harness import (
    BOTH_MODES,
    LEASE_EXPIRED,
    MODES,
    DurableHarness,
    Process,
    Sale,
    in_other_thread,
    send_raw_message,
)
from tests.support import lines

#: Three attempts, ten seconds apart.
THREE_ATTEMPTS = Retry(max_attempts=3, delay=10, backoff=1, jitter=False)


class FailingTask(Task):
    """A task whose first attempts fail, and that records its calls."""

    #: The number of attempts that fail.
    failures: ClassVar[int] = 99
    #: The number of each attempt, and of each attempt after which ``onerror`` was called.
    attempts: ClassVar[list[int]] = []
    onerror_calls: ClassVar[list[int]] = []

    def run(self) -> Result:
        self.attempts.append(self.attempt)
        if len(self.attempts) <= self.failures:
            raise ConnectionError("no")
        return Result(retval={"n": self.attempt})

    def onerror(self, result: Result) -> Result:
        self.onerror_calls.append(self.attempt)
        return result


class RetriedTask(FailingTask):
    """A failing task with a retry policy."""

    RETRY = THREE_ATTEMPTS


class RetriedTaskSale(Sale):
    """A sale whose second task has a retry policy."""

    second_task: ClassVar[type[Task]] = RetriedTask

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [ScriptedTask("1.a"), self.second_task("1.b"), ScriptedTask("1.c")]


class DistributedRetriedTaskSale(RetriedTaskSale):
    DISTRIBUTED = True


class RetriedSale(RetriedTaskSale):
    """A sale with a retry policy, which applies to its tasks."""

    RETRY = THREE_ATTEMPTS
    second_task = FailingTask


class DistributedRetriedSale(RetriedSale):
    DISTRIBUTED = True


class NoRetrySale(RetriedTaskSale):
    """A sale without a retry policy, whose second task fails."""

    second_task = FailingTask


class DistributedNoRetrySale(NoRetrySale):
    DISTRIBUTED = True


RETRIED_TASK = pytest.mark.parametrize("cls", [RetriedTaskSale, DistributedRetriedTaskSale], ids=MODES)
NO_RETRY = pytest.mark.parametrize("cls", [NoRetrySale, DistributedNoRetrySale], ids=MODES)


@pytest.fixture(autouse=True)
def retried_classes(harness: DurableHarness) -> Iterator[None]:
    """Subscribe the classes in the first process, and reset the failing task after the test."""
    for cls in (
        FailingTask,
        RetriedTask,
        RetriedTaskSale,
        DistributedRetriedTaskSale,
        RetriedSale,
        DistributedRetriedSale,
        NoRetrySale,
        DistributedNoRetrySale,
    ):
        harness.first.subscribe_copy(cls)
    yield
    FailingTask.attempts.clear()
    FailingTask.onerror_calls.clear()
    FailingTask.failures = 99


def attempts_after(harness: DurableHarness, seconds: float, process: Process | None = None) -> int:
    """Let time pass, send due steps, handle the messages, and return the number of all attempts of the failing task."""
    harness.advance(seconds)
    (process or harness.first).background_service.reap()
    (process or harness.first).handle()
    return len(FailingTask.attempts)


# -- attempts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [RetriedTaskSale, DistributedRetriedTaskSale, RetriedSale, DistributedRetriedSale])
def test_retry_policy_gives_another_attempt_after_its_backoff(
    harness: DurableHarness, cls: type[RetriedTaskSale]
) -> None:
    """durability rule 27: the retry policy of the task, or the one of its operation."""
    FailingTask.failures = 2
    send_raw_message(cls)
    assert attempts_after(harness, 0) == 1
    assert [attempts_after(harness, seconds) for seconds in (9, 2, 8, 3)] == [1, 2, 2, 3]
    assert (harness.status(), harness.task_statuses()) == (SUCCESS, [SUCCESS] * 3)
    assert (FailingTask.attempts, FailingTask.onerror_calls) == ([1, 2, 3], [])
    assert ScriptedTask.ran == ["1.a", "1.c"]
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, FAILED), (1, 2, FAILED), (1, 3, SUCCESS), (2, 1, SUCCESS)]


@NO_RETRY
def test_retry_policy_of_the_consumer_applies_as_the_default(
    harness: DurableHarness, cls: type[RetriedTaskSale]
) -> None:
    """durability rule 27"""
    process = harness.start_process(FailingTask, cls, group="second", retry=THREE_ATTEMPTS)
    send_raw_message(cls)
    assert attempts_after(harness, 0, process) == 1
    assert [attempts_after(harness, seconds, process) for seconds in (11, 11, 99)] == [2, 3, 3]
    assert harness.status() == FAILED


@NO_RETRY
def test_task_without_a_retry_policy_has_one_attempt(harness: DurableHarness, cls: type[RetriedTaskSale]) -> None:
    """durability rule 27"""
    send_raw_message(cls)
    assert attempts_after(harness, 0) == 1
    assert (harness.status(), FailingTask.onerror_calls) == (FAILED, [1])


@RETRIED_TASK
def test_task_fails_after_its_last_attempt_and_onerror_is_called(
    harness: DurableHarness, cls: type[RetriedTaskSale]
) -> None:
    """durability rule 27"""
    send_raw_message(cls)
    attempts_after(harness, 0)
    attempts_after(harness, 11)
    assert attempts_after(harness, 11) == 3
    assert (harness.status(), harness.task_statuses()) == (FAILED, [SUCCESS, FAILED, PENDING])
    assert FailingTask.onerror_calls == [3]
    assert attempts_after(harness, 1000) == 3


@RETRIED_TASK
def test_retry_backoff_releases_the_claim_and_acks_the_message(
    harness: DurableHarness, cls: type[RetriedTaskSale]
) -> None:
    """durability rule 27: the worker is free during the back-off."""
    send_raw_message(cls)
    send_messages("other")
    harness.first.handle()
    row = harness.snapshot().operation
    assert (row.status, row.owner, row.step) == (RUNNING, None, 1)
    assert row.due_at == pytest.approx(harness.store_harness.now + 10, abs=3)
    assert row.take_at == row.due_at
    assert "other" in ScriptedTask.ran
    assert committed() == len(InMemoryBroker.at("").values("dice"))
    assert harness.first.work_queue.running() == []
    assert harness.first.consumer.counts.get("retried") is None


@RETRIED_TASK
def test_duplicate_message_does_not_shorten_the_retry_backoff(
    harness: DurableHarness, cls: type[RetriedTaskSale]
) -> None:
    """durability rule 27"""
    send_raw_message(cls)
    attempts_after(harness, 0)
    send_raw_message(cls)
    harness.first.handle()
    assert (FailingTask.attempts, FailingTask.onerror_calls) == ([1], [])


@RETRIED_TASK
def test_retry_survives_its_consumer(harness: DurableHarness, cls: type[RetriedTaskSale]) -> None:
    """durability rule 27: another consumer makes the next attempt."""
    FailingTask.failures = 1
    send_raw_message(cls)
    attempts_after(harness, 0)
    harness.first.consumer.close()
    second = harness.start_process(RetriedTask, cls)
    assert attempts_after(harness, 11, second) == 2
    assert harness.status() == SUCCESS


@BOTH_MODES
def test_retry_later_counts_as_an_attempt(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 27: ``Retry.later`` needs no retry policy; without a policy there are three attempts."""
    ScriptedTask.script["1.b"] = [Retry.later(50), Retry.later(5), Retry.later(1)]
    send_raw_message(cls)
    for seconds, attempts in ((0, 1), (49, 1), (2, 2), (6, 3), (1000, 3)):
        attempts_after(harness, seconds)
        assert ScriptedTask.ran.count("1.b") == attempts
    assert harness.status() == FAILED
    assert [attempt.number for attempt in harness.attempts() if attempt.position == 1] == [1, 2, 3]


@BOTH_MODES
def test_immediate_retry_is_sent_by_the_worker_of_the_failed_attempt(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 27: the retry needs no reaper."""
    ScriptedTask.script["1.b"] = [Retry.later(0), None]
    send_raw_message(cls)
    harness.first.handle()
    assert (ScriptedTask.ran, harness.status()) == (["1.a", "1.b", "1.b", "1.c"], SUCCESS)


@RETRIED_TASK
def test_retried_attempt_is_emitted_and_logged_as_a_retry(
    harness: DurableHarness, cls: type[RetriedTaskSale], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 27"""
    changes: list[Any] = []
    FailingTask.failures = 1

    def record_change(sender: Any, operation: str, position: int, new: str, attempt: int, error: Any) -> None:
        changes.append((operation, position, new, attempt, error))

    with signals.task_changed.connected_to(record_change):
        send_raw_message(cls)
        attempts_after(harness, 0)
        attempts_after(harness, 11)
    assert changes == [
        ("1", 0, SUCCESS, 1, None),
        ("1", 1, PENDING, 1, "no"),
        ("1", 1, SUCCESS, 2, None),
        ("1", 2, SUCCESS, 1, None),
    ]
    assert f"RetriedTask.Retry: {RetriedTask.path}[1.b]: attempt 1 failed, the next follows in 10 s: no" in lines(
        caplog, logging.WARNING
    )
    assert [line for line in lines(caplog, logging.ERROR) if "Failed" in line] == []
    assert harness.event_kinds().count("task-retried") == 1


@RETRIED_TASK
def test_each_attempt_starts_from_a_fresh_object_with_earlier_results(
    harness: DurableHarness, cls: type[RetriedTaskSale]
) -> None:
    """durability rule 27"""
    tasks: list[Task] = []
    inputs: list[Any] = []

    class ModifyingTask(Task):
        RETRY = THREE_ATTEMPTS

        def run(self) -> Result:
            tasks.append(self)
            inputs.append((self.uuid, dict(self.params), dict(self.result.retval)))
            self.params["modified"] = True
            self.result.retval["modified"] = True
            raise ConnectionError("no")

    class ModifyingSale(cls):  # type: ignore[valid-type,misc]
        second_task = ModifyingTask

    ScriptedTask.script["1.a"] = lambda: Result(retval={"a": 1})
    harness.first.subscribe_copy(ModifyingTask)
    harness.first.subscribe_copy(ModifyingSale)
    send_raw_message(ModifyingSale)
    for _ in range(4):
        attempts_after(harness, 11)
    assert inputs == [("1.b", {}, {"a": 1})] * 3
    assert len({id(task) for task in tasks}) == 3


@BOTH_MODES
def test_owner_crash_does_not_count_as_an_attempt(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 27: only recorded attempts count."""
    second = harness.start_process(group="second")
    numbers: list[int] = []

    class SlowOnceTask(ScriptedTask):
        def run(self) -> None:
            numbers.append(self.attempt)
            if len(numbers) == 1:
                in_other_thread(lambda: harness.advance(LEASE_EXPIRED), second.handle)()

    class SlowOnceSale(cls):  # type: ignore[valid-type,misc]
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [SlowOnceTask("1.a")]

    for process in (harness.first, second):
        process.subscribe_copy(SlowOnceTask)
        process.subscribe_copy(SlowOnceSale)
    send_raw_message(SlowOnceSale)
    harness.first.handle()
    assert (numbers, harness.attempts()) == ([1, 1], [(0, 1, SUCCESS)])


# -- after a resume ----------------------------------------------------------------------------------------------------


@RETRIED_TASK
def test_resume_restarts_the_retry_policy_and_continues_the_numbering(
    harness: DurableHarness, cls: type[RetriedTaskSale]
) -> None:
    """durability rules 25 and 27"""
    FailingTask.failures = 5
    send_raw_message(cls)
    attempts_after(harness, 0)
    for _ in range(3):
        attempts_after(harness, 11)
    assert (harness.status(), FailingTask.onerror_calls) == (FAILED, [3])
    harness.operation().resume()
    assert attempts_after(harness, 0) == 4
    assert harness.status() == RUNNING
    attempts_after(harness, 11)
    attempts_after(harness, 11)
    assert FailingTask.attempts == [1, 2, 3, 4, 5, 6]
    assert harness.status() == SUCCESS


def test_policy_of_a_class_that_is_subscribed_again_applies_to_the_next_task(harness: DurableHarness) -> None:
    """The execution looks up the class of the operation for each task."""
    operation_class = harness.first.class_of(Sale)

    def subscribe_again() -> None:
        again = type(operation_class)(
            operation_class.__name__, (operation_class,), {"__module__": Sale.__module__, "RETRY": THREE_ATTEMPTS}
        )
        harness.registry.controller.ENTRYPOINTS[Sale.path] = again

    ScriptedTask.script["1.a"] = subscribe_again
    ScriptedTask.script["1.b"] = [ConnectionError("no")]
    send_raw_message(Sale)
    harness.first.handle()
    assert harness.task_statuses() == [SUCCESS, PENDING, PENDING]
