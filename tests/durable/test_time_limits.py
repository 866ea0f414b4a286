"""Tests of time limits of the tasks of stored operations."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from cdumay_result import Result

from kser.errors import TaskTimeout
from kser.retry import Retry
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from kser.status import FAILED, PENDING, RUNNING, SUCCESS
from tests.consumer.harness import ConsumerThread, ScriptedTask, send_messages
from tests.durable.harness import (
    BOTH_MODES,
    LEASE_EXPIRED,
    MODES,
    DurableHarness,
    Sale,
    send_raw_message,
    worker_threads,
)
from tests.support import WAIT_SECONDS, wait_until


class StuckTask(Task):
    """A task with a time limit, whose first attempt waits for the gate of the test."""

    TIME_LIMIT = 5
    gate: ClassVar[threading.Event]
    #: The numbers of the attempts, and the errors that ``onerror`` got.
    attempts: ClassVar[list[int]] = []
    failures: ClassVar[list[str]] = []

    def run(self) -> Result:
        self.attempts.append(self.attempt)
        if self.attempt == 1:
            assert self.gate.wait(WAIT_SECONDS)
        return Result(retval={"by": self.attempt})

    def onerror(self, result: Result) -> Result:
        self.failures.append(result.stderr)
        return result


class StuckSale(Sale):
    """A sale whose second task gets stuck."""

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [ScriptedTask("1.a"), StuckTask("1.b"), ScriptedTask("1.c")]


class DistributedStuckSale(StuckSale):
    DISTRIBUTED = True


STUCK = pytest.mark.parametrize("cls", [StuckSale, DistributedStuckSale], ids=MODES)
LIMIT_EXCEEDED = "the attempt took longer than TIME_LIMIT, 5 s"


@pytest.fixture(autouse=True)
def stuck_task(gate: threading.Event) -> Iterator[None]:
    """Let the stuck task wait for the gate, and reset it after the test."""
    StuckTask.gate = gate
    yield
    StuckTask.attempts.clear()
    StuckTask.failures.clear()


@STUCK
@pytest.mark.parametrize("workers", [1, 3])
def test_timed_out_attempt_is_recorded_as_failed_and_its_worker_is_replaced(
    harness: DurableHarness, cls: type[StuckSale], workers: int, gate: threading.Event
) -> None:
    """durability rule 28: the late result is fenced."""
    process = harness.start_process(StuckTask, cls, group="workers", workers=workers)
    with ConsumerThread(process.consumer):
        send_raw_message(cls)
        wait_until(lambda: StuckTask.attempts)
        harness.advance(6)
        wait_until(harness.has_ended)
        assert (harness.status(), harness.task_statuses()) == (FAILED, [SUCCESS, FAILED, PENDING])
        send_messages("2", "3", "4")
        wait_until(lambda: {"2", "3", "4"} <= set(ScriptedTask.ran))
        before = harness.snapshot()
        gate.set()
        wait_until(lambda: len(worker_threads()) == workers)
    assert harness.snapshot() == before
    (attempt,) = [row for row in before.attempts if row.position == 1]
    assert (attempt.status, attempt.error) == (FAILED, LIMIT_EXCEEDED)
    assert (StuckTask.attempts, StuckTask.failures) == ([1], [LIMIT_EXCEEDED])
    assert "1.c" not in ScriptedTask.ran


@STUCK
def test_timeout_of_an_attempt_with_a_lost_claim_is_fenced(
    harness: DurableHarness, cls: type[StuckSale], gate: threading.Event
) -> None:
    """durability rules 8 and 28"""
    process = harness.start_process(StuckTask, cls, group="workers", workers=2)
    process.disable_background_service()
    with ConsumerThread(process.consumer):
        send_raw_message(cls)
        wait_until(lambda: StuckTask.attempts)
        harness.store_harness.advance(LEASE_EXPIRED)
        claim = harness.claim_and_die()
        process.clock.advance(6)
        # A new worker replaces the stuck one.
        wait_until(lambda: len(worker_threads()) == 3)
        wait_until(lambda: process.consumer.counts["done"])
        gate.set()
    row = harness.snapshot().operation
    assert (row.status, row.epoch, row.step) == (RUNNING, claim.epoch, 1)
    assert harness.attempts() == [(0, 1, SUCCESS)]


@STUCK
def test_timed_out_attempt_is_retried_while_the_first_is_stuck(
    harness: DurableHarness, cls: type[StuckSale], gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 28"""
    monkeypatch.setattr(StuckTask, "RETRY", Retry(max_attempts=2, delay=10, jitter=False), raising=False)
    process = harness.start_process(StuckTask, cls, group="workers", workers=2)
    with ConsumerThread(process.consumer):
        send_raw_message(cls)
        wait_until(lambda: StuckTask.attempts)
        harness.advance(6)
        wait_until(lambda: "task-retried" in harness.event_kinds())
        harness.advance(11)
        wait_until(harness.has_ended)
        gate.set()
    assert (harness.status(), harness.task_statuses()) == (SUCCESS, [SUCCESS] * 3)
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, FAILED), (1, 2, SUCCESS), (2, 1, SUCCESS)]
    assert harness.operation().result.retval == {"by": 2}


@STUCK
def test_task_timeout_does_not_apply_to_its_neighbours(
    harness: DurableHarness, cls: type[StuckSale], gate: threading.Event
) -> None:
    """durability rule 28: the operation itself has no time limit."""
    limits: list[float | None] = []
    gate.set()

    def record_limit() -> None:
        limits.extend(item.attempt.time_limit for item in harness.first.work_queue.running())

    ScriptedTask.script["1.a"] = ScriptedTask.script["1.c"] = record_limit
    harness.first.subscribe_copy(StuckTask)
    harness.first.subscribe_copy(cls)
    send_raw_message(cls)
    harness.first.handle()
    assert (limits, harness.status()) == ([None, None], SUCCESS)


@BOTH_MODES
def test_operation_timeout_applies_to_each_task_separately(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 28"""
    limits: list[float | None] = []
    starts: list[float] = []

    class LimitedSale(cls):  # type: ignore[valid-type,misc]
        TIME_LIMIT = 7

    def record_limit() -> None:
        (item,) = harness.first.work_queue.running()
        limits.append(item.attempt.time_limit)
        starts.append(item.attempt.started_at)

    ScriptedTask.script["1.a"] = ScriptedTask.script["1.c"] = record_limit
    ScriptedTask.script["1.b"] = lambda: harness.advance(6)
    harness.first.subscribe_copy(LimitedSale)
    send_raw_message(LimitedSale)
    harness.first.handle()
    assert limits == [7, 7]
    first_start, last_start = starts
    assert last_start - first_start >= 6
    assert harness.status() == SUCCESS


def test_attempt_that_timed_out_while_building_does_not_accept_the_operation(
    harness: DurableHarness, gate: threading.Event
) -> None:
    """durability rules 2 and 28: the attempt was already reported as failed."""
    builds: list[str] = []

    class SlowBuild(Operation):
        TIME_LIMIT = 5

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            builds.append(self.uuid)
            gate.wait(WAIT_SECONDS)
            return [ScriptedTask(f"{self.uuid}.a")]

    process = harness.first
    send_raw_message(harness.registry.subscribe(SlowBuild))
    with ConsumerThread(process.consumer):
        wait_until(lambda: builds)
        process.clock.advance(6)
        wait_until(lambda: process.consumer.counts.get("failed"))
        gate.set()
        wait_until(lambda: len(worker_threads()) == 1)
    assert (harness.store.get_operation("1"), ScriptedTask.ran) == (None, [])


def test_task_that_ends_at_its_time_limit_does_not_time_out_the_next_one(harness: DurableHarness) -> None:
    """durability rule 28: the supervisor read the time of the first task before the task ended."""
    work_queue = harness.first.work_queue
    seen_by_supervisor: list[tuple[Any, Any]] = []
    timed_out: list[bool] = []

    class LimitedSale(Sale):
        TIME_LIMIT = 5

    def exceed_the_limit() -> None:
        (item,) = work_queue.running()
        seen_by_supervisor.append((item, item.attempt.outcome))
        harness.first.clock.advance(5.1)

    def time_out_first_task() -> None:
        ((item, outcome),) = seen_by_supervisor
        timed_out.append(work_queue.time_out(item, TaskTimeout("too long"), outcome))

    ScriptedTask.script["1.a"] = exceed_the_limit
    ScriptedTask.script["1.b"] = time_out_first_task
    harness.first.subscribe_copy(LimitedSale)
    send_raw_message(LimitedSale)
    harness.first.handle()
    assert (timed_out, harness.status(), len(harness.attempts())) == ([False], SUCCESS, 3)
