"""Tests of retries and timeouts of the tasks of stored operations."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from cdumay_result import Result

from kser import signals
from kser.dummy.broker import InMemoryBroker
from kser.retry import Retry
from kser.sequencing.task import Task
from kser.status import FAILED, PENDING, RUNNING, SUCCESS
from tests.consumer.harness import ConsumerThread, ScriptedTask, committed, send_messages
from tests.durable.harness import (
    BOTH_WAYS,
    LEASE_EXPIRED,
    DurableHarness,
    Process,
    Sale,
    Spread,
    in_other_thread,
    send_raw_message,
)
from tests.support import WAIT_SECONDS, lines, wait_until

#: Three attempts, ten seconds apart.
THRICE = Retry(max_attempts=3, delay=10, backoff=1, jitter=False)


class Told(Task):
    """Fails as often as the test says, and notes what becomes of it."""

    fails: ClassVar[int] = 99
    told: ClassVar[list[Any]] = []

    def run(self) -> Result:
        self.told.append(("run", self.attempt))
        if len([each for each in self.told if each[0] == "run"]) <= self.fails:
            raise ConnectionError("no")
        return Result(retval={"n": self.attempt})

    def onerror(self, result: Result) -> Result:
        self.told.append(("onerror", self.attempt))
        return result


class Tried(Told):
    RETRY = THRICE


class Trying(Sale):
    """A task that has a policy of its own, between two others."""

    own: ClassVar[type[Task]] = Tried

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [ScriptedTask("1.a"), self.own("1.b"), ScriptedTask("1.c")]


class TryingSpread(Trying):
    DISTRIBUTED = True


class Patient(Trying):
    """An operation whose policy its tasks have."""

    RETRY = THRICE
    own = Told


class PatientSpread(Patient):
    DISTRIBUTED = True


class Bare(Trying):
    own = Told


class BareSpread(Bare):
    DISTRIBUTED = True


TRYING = pytest.mark.parametrize("cls", [Trying, TryingSpread])


@pytest.fixture(autouse=True)
def forget(harness: DurableHarness) -> Iterator[None]:
    for cls in (Told, Tried, Trying, TryingSpread, Patient, PatientSpread, Bare, BareSpread):
        harness.first.subscribe_copy(cls)
    yield
    Told.told.clear()
    Told.fails = 99


def after(harness: DurableHarness, seconds: float, process: Process | None = None) -> int:
    """Let time pass, have the reaper look, and handle what there is; returns how many attempts were made in all."""
    harness.advance(seconds)
    (process or harness.first).background_service.reap()
    (process or harness.first).handle()
    return len([each for each in Told.told if each[0] == "run"])


# -- another attempt ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Trying, TryingSpread, Patient, PatientSpread])
def test_retry_policy_gives_another_attempt_after_its_backoff(harness: DurableHarness, cls: type[Trying]) -> None:
    """durability rule 27: the task's policy, or that of its operation."""
    Told.fails = 2
    send_raw_message(cls)
    assert after(harness, 0) == 1
    assert [after(harness, 9), after(harness, 2), after(harness, 8), after(harness, 3)] == [1, 2, 2, 3]
    assert (harness.status(), harness.tasks()) == (SUCCESS, [SUCCESS] * 3)
    assert [each for each in Told.told if each[0] == "run"] == [("run", 1), ("run", 2), ("run", 3)]
    assert ScriptedTask.ran == ["1.a", "1.c"]
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, FAILED), (1, 2, FAILED), (1, 3, SUCCESS), (2, 1, SUCCESS)]
    assert ("onerror", 1) not in Told.told


@pytest.mark.parametrize("cls", [Bare, BareSpread])
def test_retry_policy_of_the_consumer_applies_as_the_default(harness: DurableHarness, cls: type[Trying]) -> None:
    """durability rule 27"""
    process = harness.process(Told, cls, group="patient", retry=THRICE)
    send_raw_message(cls)
    assert after(harness, 0, process) == 1
    assert [after(harness, 11, process), after(harness, 11, process), after(harness, 99, process)] == [2, 3, 3]
    assert harness.status() == FAILED


@pytest.mark.parametrize("cls", [Bare, BareSpread])
def test_task_without_a_retry_policy_has_one_attempt(harness: DurableHarness, cls: type[Trying]) -> None:
    """durability rule 27"""
    send_raw_message(cls)
    assert after(harness, 0) == 1
    assert (harness.status(), Told.told[-1]) == (FAILED, ("onerror", 1))


@TRYING
def test_task_fails_after_its_last_attempt_and_onerror_is_called(harness: DurableHarness, cls: type[Trying]) -> None:
    """durability rule 27"""
    send_raw_message(cls)
    after(harness, 0)
    after(harness, 11)
    assert after(harness, 11) == 3
    assert (harness.status(), harness.tasks()) == (FAILED, [SUCCESS, FAILED, PENDING])
    assert Told.told[-1] == ("onerror", 3)
    assert after(harness, 1000) == 3


@TRYING
def test_retry_backoff_releases_the_claim_and_acks_the_message(harness: DurableHarness, cls: type[Trying]) -> None:
    """durability rule 27: the worker is free."""
    send_raw_message(cls)
    send_messages("other")
    harness.first.handle()
    row = harness.stored().operation
    assert (row.status, row.owner, row.step) == (RUNNING, None, 1)
    assert row.due_at == pytest.approx(harness.store_harness.now + 10, abs=3)
    assert row.next_check_at == row.due_at
    assert "other" in ScriptedTask.ran
    assert committed() == len(InMemoryBroker.at("").values("dice"))
    assert harness.first.consumer._kser_work_queue.running() == []
    assert harness.first.consumer.counts.get("retried") is None


@TRYING
def test_duplicate_message_does_not_shorten_the_retry_backoff(harness: DurableHarness, cls: type[Trying]) -> None:
    """durability rule 27"""
    send_raw_message(cls)
    after(harness, 0)
    send_raw_message(cls)
    harness.first.handle()
    assert Told.told == [("run", 1)]


@TRYING
def test_retry_survives_its_consumer(harness: DurableHarness, cls: type[Trying]) -> None:
    """durability rule 27: another one makes the next attempt."""
    Told.fails = 1
    send_raw_message(cls)
    after(harness, 0)
    harness.first.consumer.close()
    second = harness.process(Tried, cls)
    assert after(harness, 11, second) == 2
    assert harness.status() == SUCCESS


@BOTH_WAYS
def test_retry_later_counts_as_an_attempt(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 27: Retry.later needs no policy; without one, there are three attempts."""
    ScriptedTask.script["1.b"] = [Retry.later(50), Retry.later(5), Retry.later(1)]
    send_raw_message(cls)
    for seconds, seen in ((0, 1), (49, 1), (2, 2), (6, 3), (1000, 3)):
        after(harness, seconds)
        assert ScriptedTask.ran.count("1.b") == seen
    assert harness.status() == FAILED
    assert [number for at, number, _ in harness.attempts() if at == 1] == [1, 2, 3]


@TRYING
def test_retried_attempt_is_emitted_and_logged_as_a_retry(
    harness: DurableHarness, cls: type[Trying], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 27"""
    heard: list[Any] = []
    Told.fails = 1

    def hear(sender: Any, operation: str, position: int, new: str, attempt: int, error: Any) -> None:
        heard.append((operation, position, new, attempt, error))

    with signals.task_changed.connected_to(hear):
        send_raw_message(cls)
        after(harness, 0)
        after(harness, 11)
    assert heard == [
        ("1", 0, SUCCESS, 1, None),
        ("1", 1, PENDING, 1, "no"),
        ("1", 1, SUCCESS, 2, None),
        ("1", 2, SUCCESS, 1, None),
    ]
    assert f"Tried.Retry: {Tried.path}[1.b]: attempt 1 failed, the next follows in 10 s: no" in lines(
        caplog, logging.WARNING
    )
    assert [line for line in lines(caplog, logging.ERROR) if "Failed" in line] == []
    assert harness.event_kinds().count("task-retried") == 1


@TRYING
def test_each_attempt_starts_from_a_fresh_object_with_earlier_results(
    harness: DurableHarness, cls: type[Trying]
) -> None:
    """durability rule 27"""
    objects: list[Any] = []

    class Fresh(Task):
        RETRY = THRICE

        def run(self) -> Result:
            assert self not in objects
            assert (self.params, self.result.retval, self.uuid) == ({}, {"a": 1}, "1.b")
            objects.append(self)
            self.params["spoilt"] = True
            self.result.retval["spoilt"] = True
            raise ConnectionError("no")

    class Own(cls):  # type: ignore[valid-type,misc]
        own = Fresh

    ScriptedTask.script["1.a"] = lambda: Result(retval={"a": 1})
    harness.first.subscribe_copy(Fresh)
    harness.first.subscribe_copy(Own)
    send_raw_message(Own)
    for _ in range(4):
        after(harness, 11)
    assert len(objects) == 3


@BOTH_WAYS
def test_owner_crash_does_not_count_as_an_attempt(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 27: recorded attempts count."""
    second = harness.process(group="second")
    numbers: list[int] = []

    class Dying(ScriptedTask):
        def run(self) -> None:
            numbers.append(self.attempt)
            if len(numbers) == 1:
                in_other_thread(lambda: harness.advance(LEASE_EXPIRED), second.handle)()

    class Own(cls):  # type: ignore[valid-type,misc]
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [Dying("1.a")]

    for process in (harness.first, second):
        process.subscribe_copy(Dying)
        process.subscribe_copy(Own)
    send_raw_message(Own)
    harness.first.handle()
    assert (numbers, harness.attempts()) == ([1, 1], [(0, 1, SUCCESS)])


# -- after a resume ----------------------------------------------------------------------------------------------------


@TRYING
def test_resume_restarts_the_retry_policy_and_continues_the_numbering(
    harness: DurableHarness, cls: type[Trying]
) -> None:
    """durability rules 25 and 27"""
    Told.fails = 5
    send_raw_message(cls)
    after(harness, 0)
    for _ in range(3):
        after(harness, 11)
    assert (harness.status(), Told.told[-1]) == (FAILED, ("onerror", 3))
    operation = harness.registry.get("1")
    assert operation is not None
    operation.resume()
    assert after(harness, 0) == 4
    assert harness.status() == RUNNING
    after(harness, 11)
    after(harness, 11)
    assert [number for what, number in Told.told if what == "run"] == [1, 2, 3, 4, 5, 6]
    assert harness.status() == SUCCESS


# -- time --------------------------------------------------------------------------------------------------------------


class Stuck(Task):
    """Does not return before the test lets it go, the first time."""

    TIME_LIMIT = 5
    gate: ClassVar[threading.Event]
    told: ClassVar[list[Any]] = []

    def run(self) -> Result:
        self.told.append(("run", self.attempt))
        if self.attempt == 1:
            assert self.gate.wait(WAIT_SECONDS)
        return Result(retval={"by": self.attempt})

    def onerror(self, result: Result) -> Result:
        self.told.append(("onerror", result.stderr))
        return result


class Holding(Sale):
    own: ClassVar[type[Task]] = Stuck

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [ScriptedTask("1.a"), self.own("1.b"), ScriptedTask("1.c")]


class HoldingSpread(Holding):
    DISTRIBUTED = True


HOLDING = pytest.mark.parametrize("cls", [Holding, HoldingSpread])


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    Stuck.gate = threading.Event()
    yield Stuck.gate
    Stuck.gate.set()
    Stuck.told.clear()


@HOLDING
@pytest.mark.parametrize("workers", [1, 3])
def test_timed_out_attempt_is_recorded_as_failed_and_its_worker_is_replaced(
    harness: DurableHarness, cls: type[Holding], workers: int, gate: threading.Event
) -> None:
    """durability rule 28: the late result meets the fence."""
    process = harness.process(Stuck, cls, group="workers", workers=workers)
    with ConsumerThread(process.consumer):
        send_raw_message(cls)
        wait_until(lambda: Stuck.told)
        harness.advance(6)
        wait_until(harness.has_ended)
        assert (harness.status(), harness.tasks()) == (FAILED, [SUCCESS, FAILED, PENDING])
        send_messages("2", "3", "4")
        wait_until(lambda: {"2", "3", "4"} <= set(ScriptedTask.ran))
        before = harness.stored()
        gate.set()
        wait_until(lambda: len([t for t in threading.enumerate() if t.name == "kser-worker"]) == max(workers, 1))
    assert harness.stored() == before
    (attempt,) = [each for each in before.attempts if each.position == 1]
    assert (attempt.status, attempt.error) == (FAILED, "the attempt took longer than TIME_LIMIT, 5 s")
    assert Stuck.told == [("run", 1), ("onerror", "the attempt took longer than TIME_LIMIT, 5 s")]
    assert "1.c" not in ScriptedTask.ran


@HOLDING
def test_timeout_of_an_attempt_with_a_lost_claim_is_fenced(
    harness: DurableHarness, cls: type[Holding], gate: threading.Event
) -> None:
    """durability rules 8 and 28"""
    process = harness.process(Stuck, cls, group="workers", workers=2)
    process.disable_background_service()
    with ConsumerThread(process.consumer):
        send_raw_message(cls)
        wait_until(lambda: Stuck.told)
        harness.store_harness.advance(LEASE_EXPIRED)
        claim = harness.claim_and_die()
        process.clock.advance(6)
        wait_until(lambda: len([t for t in threading.enumerate() if t.name == "kser-worker"]) == 3)
        wait_until(lambda: process.consumer.counts["done"])
        gate.set()
    row = harness.stored().operation
    assert (row.status, row.epoch, row.step) == (RUNNING, claim.epoch, 1)
    assert harness.attempts() == [(0, 1, SUCCESS)]


@HOLDING
def test_timed_out_attempt_is_retried_while_the_first_is_stuck(
    harness: DurableHarness, cls: type[Holding], gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 28"""
    monkeypatch.setattr(Stuck, "RETRY", Retry(max_attempts=2, delay=10, jitter=False), raising=False)
    process = harness.process(Stuck, cls, group="workers", workers=2)
    with ConsumerThread(process.consumer):
        send_raw_message(cls)
        wait_until(lambda: Stuck.told)
        harness.advance(6)
        wait_until(lambda: "task-retried" in harness.event_kinds())
        harness.advance(11)
        wait_until(harness.has_ended)
        gate.set()
    assert (harness.status(), harness.tasks()) == (SUCCESS, [SUCCESS] * 3)
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, FAILED), (1, 2, SUCCESS), (2, 1, SUCCESS)]
    operation = harness.registry.get("1")
    assert operation is not None
    assert operation.result.retval == {"by": 2}


@HOLDING
def test_task_timeout_does_not_apply_to_its_neighbours(
    harness: DurableHarness, cls: type[Holding], gate: threading.Event
) -> None:
    """durability rule 28: an operation may take as long as it likes."""
    seen: list[Any] = []
    gate.set()

    def look() -> None:
        seen.extend(item.attempt.time_limit for item in harness.first.consumer._kser_work_queue.running())

    ScriptedTask.script["1.a"] = ScriptedTask.script["1.c"] = look
    harness.first.subscribe_copy(Stuck)
    harness.first.subscribe_copy(cls)
    send_raw_message(cls)
    harness.first.handle()
    assert (seen, harness.status()) == ([None, None], SUCCESS)


@BOTH_WAYS
def test_operation_timeout_applies_to_each_task_separately(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 28"""
    seen: list[Any] = []

    class Timed(cls):  # type: ignore[valid-type,misc]
        TIME_LIMIT = 7

    ScriptedTask.script["1.a"] = ScriptedTask.script["1.c"] = lambda: seen.extend(
        (item.attempt.time_limit, item.attempt.started_at) for item in harness.first.consumer._kser_work_queue.running()
    )
    ScriptedTask.script["1.b"] = lambda: harness.advance(6)
    harness.first.subscribe_copy(Timed)
    send_raw_message(Timed)
    harness.first.handle()
    (first, began), (last, begun) = seen
    assert (first, last) == (7, 7)
    assert begun - began >= 6
    assert harness.status() == SUCCESS


# -- dead letters ------------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_recorded_failure_is_not_dead_lettered(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 29: the store keeps it, and resume() replays it."""
    process = harness.process(cls, group="letters", dead_letter=True)
    ScriptedTask.script["1.b"] = ConnectionError("no")
    send_raw_message(cls)
    process.handle()
    assert harness.status() == FAILED
    assert InMemoryBroker.at("").topics.get("dice.dlq", [[]]) == [[]]
    assert (process.consumer.counts["dead_lettered"], process.consumer.counts.get("failed")) == (0, None)


@pytest.mark.parametrize("how", ["build", "hook", "unknown"])
def test_recorded_failure_of_any_cause_is_not_dead_lettered(harness: DurableHarness, how: str) -> None:
    """durability rule 29"""

    class Odd(Sale):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            if how == "build":
                raise ConnectionError("no")
            return super().build_tasks(**kwargs)

        def onsuccess(self, result: Result) -> Result:
            if how == "hook":
                raise ConnectionError("no")
            return result

    process = harness.process(Odd, group="letters", dead_letter=True)
    operation = harness.first.subscribe_copy(Odd)("1")
    (operation if how == "build" else operation.build()).send()
    if how == "unknown":
        process.unsubscribe(ScriptedTask)
    process.handle()
    assert harness.status() == FAILED
    assert process.consumer.counts["dead_lettered"] == 0


def test_failed_plain_task_is_still_dead_lettered(harness: DurableHarness) -> None:
    """durability rule 29"""
    process = harness.process(Spread, group="letters", dead_letter=True)
    ScriptedTask.script["plain"] = ConnectionError("no")
    send_messages("plain", cls=ScriptedTask)
    process.handle()
    assert process.consumer.counts["dead_lettered"] == 1
