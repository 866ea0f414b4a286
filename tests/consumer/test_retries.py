"""Tests of retried messages: attempts, back-off and hooks, with a clock that the test advances."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from cdumay_error.types import ValidationError
from cdumay_result import Result

from kser import signals
from kser.controller import Controller
from kser.entry import Entrypoint
from kser.retry import Retry
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from kser.status import FAILED
from tests.consumer.harness import THREE_ATTEMPTS, ScriptedTask, SteppedConsumer, committed, new_consumer, send_messages
from tests.support import lines, record_of, recording_controller

pytestmark = pytest.mark.usefixtures("bus")


class RecordingTask(Task):
    """A task that fails, and records its attempts and hooks."""

    RETRY = THREE_ATTEMPTS
    events: ClassVar[list[Any]] = []

    def run(self) -> Any:
        self.events.append(("run", self.attempt))
        raise ConnectionError("no")

    def onsuccess(self, result: Result) -> Result:
        self.events.append("onsuccess")
        return result

    def onerror(self, result: Result) -> Result:
        self.events.append(("onerror", self.status))
        return result


RecordingController = recording_controller(RecordingTask.events)


@pytest.fixture(autouse=True)
def registered(bus: Any) -> Iterator[None]:
    Controller.register(RecordingTask.path, RecordingTask)
    yield
    RecordingTask.events.clear()


# -- attempts ----------------------------------------------------------------------------------------------------------


def test_failed_message_is_retried_after_the_backoff_until_it_succeeds() -> None:
    ScriptedTask.script["1"] = [ConnectionError("no"), ConnectionError("no"), None]
    send_messages("1")
    stepped = SteppedConsumer(retry=THREE_ATTEMPTS)
    assert stepped.attempts(9.9) == [1, 0]
    assert committed() == 0
    assert stepped.attempts(0.2, 10) == [0, 1, 1]
    assert (committed(), stepped.consumer.counts) == (1, {"done": 1, "retried": 2, "dead_lettered": 0})


def test_message_fails_after_its_last_attempt() -> None:
    ScriptedTask.script["1"] = ConnectionError("no")
    send_messages("1")
    stepped = SteppedConsumer(retry=THREE_ATTEMPTS)
    assert stepped.attempts(10, 10, 10) == [1, 1, 1, 0]
    assert (committed(), stepped.consumer.counts["failed"]) == (1, 1)


def test_message_without_a_retry_policy_has_one_attempt() -> None:
    ScriptedTask.script["1"] = ConnectionError("no")
    send_messages("1")
    assert SteppedConsumer().attempts(1000) == [1, 0]
    assert committed() == 1


def test_every_attempt_starts_from_a_fresh_object() -> None:
    objects: list[Task] = []

    class CheckedTask(Task):
        RETRY = THREE_ATTEMPTS

        def run(self) -> Result:
            assert self not in objects
            assert (self.params, self.result.stdout, self.status) == ({}, "", "RUNNING")
            objects.append(self)
            self.params["spoilt"] = True
            self.result.stdout = "spoilt"
            raise ConnectionError("no")

    Controller.register(CheckedTask.path, CheckedTask)
    send_messages("1", cls=CheckedTask)
    assert SteppedConsumer().attempts(10, 10) == [1, 1, 1]
    assert [entry.uuid for entry in objects] == ["1"] * 3


def test_task_knows_its_attempt_number() -> None:
    send_messages("1", cls=RecordingTask)
    SteppedConsumer().attempts(10, 10)
    assert [number for name, number in RecordingTask.events if name == "run"] == [1, 2, 3]


def test_attempt_number_outside_a_consumer_is_one() -> None:
    assert RecordingTask().attempt == 1
    RecordingTask().execute()
    assert RecordingTask.events == [("run", 1), ("onerror", FAILED)]


def test_retry_policy_of_a_class_overrides_that_of_the_consumer() -> None:
    send_messages("1", cls=RecordingTask)
    assert SteppedConsumer(retry=Retry(max_attempts=9, delay=0)).attempts(0, 10, 10, 10) == [1, 0, 1, 1, 0]


def test_class_may_disable_retries() -> None:
    class TaskWithoutRetry(RecordingTask):
        RETRY = Retry(max_attempts=1)

    Controller.register(TaskWithoutRetry.path, TaskWithoutRetry)
    send_messages("1", cls=TaskWithoutRetry)
    assert SteppedConsumer(retry=THREE_ATTEMPTS).attempts(10) == [1, 0]


def test_retry_later_schedules_another_attempt() -> None:
    """Retry.later counts as an attempt and needs no policy; without one, there are three attempts."""
    ScriptedTask.script["1"] = lambda: (_ for _ in ()).throw(Retry.later(50))
    send_messages("1")
    assert SteppedConsumer().attempts(49, 2, 50, 50) == [1, 0, 1, 1, 0]
    assert committed() == 1


def test_retry_later_counts_as_an_attempt_of_the_policy() -> None:
    ScriptedTask.script["1"] = [Retry.later(50), ConnectionError("no"), Retry.later(1), None]
    send_messages("1")
    assert SteppedConsumer(retry=THREE_ATTEMPTS).attempts(50, 10, 100) == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("on", "attempts"),
    [(None, [1, 1]), ((ConnectionError,), [1, 0])],
    ids=["any failure", "some exceptions"],
)
def test_failed_result_is_retried_unless_the_policy_names_exceptions(on: Any, attempts: list[int]) -> None:
    ScriptedTask.script["1"] = lambda: Result(retcode=1, stderr="no")
    send_messages("1")
    assert SteppedConsumer(retry=Retry(delay=1, jitter=False, on=on)).attempts(1) == attempts


def test_not_retryable_error_fails_at_once() -> None:
    ScriptedTask.script["1"] = ValidationError("Missing parameter: amount")
    send_messages("1")
    assert SteppedConsumer(retry=THREE_ATTEMPTS).attempts(10) == [1, 0]


def test_undecodable_message_and_unknown_entrypoint_fail_at_once(bus: Any) -> None:
    bus.send("dice", b"no message")
    send_messages("1", cls="shop.Unknown")
    stepped = SteppedConsumer(retry=Retry(delay=0, on=(Exception,)))
    assert stepped.attempts(10) == [2, 0]
    assert stepped.consumer.counts["failed"] == 2


def test_task_that_raises_system_exit_is_retried() -> None:
    """C8: SystemExit is a failure of the task."""
    ScriptedTask.script["1"] = [SystemExit(3), None]
    send_messages("1")
    assert SteppedConsumer(retry=THREE_ATTEMPTS).attempts(10) == [1, 1]
    assert committed() == 1


def test_plain_entrypoint_is_retried() -> None:
    class FailingEntrypoint(Entrypoint):
        def run(self) -> None:
            raise ConnectionError("no")

    Controller.register(FailingEntrypoint.path, FailingEntrypoint)
    send_messages("1", cls=FailingEntrypoint)
    assert SteppedConsumer(retry=THREE_ATTEMPTS).attempts(10, 10) == [1, 1, 1]


@pytest.mark.parametrize("policy", [5, "often", None, False, {"max_attempts": 5}])
def test_user_retry_attribute_that_is_no_policy_falls_back_to_the_consumer(policy: Any) -> None:
    """C18: a class of the user may have an attribute of the same name with another meaning."""

    class UserTask(RecordingTask):
        RETRY = policy
        TIME_LIMIT = "12:00"
        attempt = "user value"

    Controller.register(UserTask.path, UserTask)
    send_messages("1", cls=UserTask)
    assert SteppedConsumer(retry=Retry(max_attempts=2, delay=1, jitter=False)).attempts(1, 1) == [1, 1, 0]
    assert [number for name, number in RecordingTask.events if name == "run"] == ["user value", "user value"]


# -- the back-off and other records ------------------------------------------------------------------------------------


def test_retry_backoff_blocks_the_key_and_no_other_record() -> None:
    ScriptedTask.script["1"] = [ConnectionError("no"), None]
    send_messages("1", "2", key=b"a")
    send_messages("3", key=b"b")
    send_messages("4")
    stepped = SteppedConsumer(retry=THREE_ATTEMPTS)
    assert stepped.attempts(5) == [3, 0]
    assert sorted(ScriptedTask.ran) == ["1", "3", "4"]
    assert stepped.attempts(5) == [0, 2]
    assert (ScriptedTask.ran[-2:], committed()) == (["1", "2"], 4)


@pytest.mark.parametrize(("ordering", "started"), [("partition", ["1"]), ("none", ["1", "2", "3"])])
def test_retry_backoff_blocks_other_records_according_to_the_ordering(ordering: str, started: list[str]) -> None:
    ScriptedTask.script["1"] = ConnectionError("no")
    send_messages("1", "2", key=b"a")
    send_messages("3")
    SteppedConsumer(retry=THREE_ATTEMPTS, ordering=ordering).attempts()
    assert ScriptedTask.ran == started


def test_retry_backoff_blocks_the_commit_but_not_its_metadata() -> None:
    ScriptedTask.script["1"] = [ConnectionError("no"), None]
    send_messages("1", "2", "3")
    stepped = SteppedConsumer(retry=THREE_ATTEMPTS)
    stepped.attempts()
    stepped.consumer.close()
    assert committed() == 0
    new_consumer().run_until_idle()
    assert sorted(ScriptedTask.ran) == ["1", "1", "2", "3"]


# -- hooks, log and signals --------------------------------------------------------------------------------------------


def test_failure_hooks_are_called_only_for_the_last_attempt() -> None:
    send_messages("1", cls=RecordingTask)
    stepped = SteppedConsumer()
    stepped.consumer.REGISTRY = RecordingController
    stepped.attempts(10)
    assert RecordingTask.events == [("run", 1), ("run", 2)]
    stepped.attempts(10)
    assert RecordingTask.events[2:] == [("run", 3), ("onerror", FAILED), "controller: onerror"]


def test_successful_retry_calls_the_success_hooks() -> None:
    class SecondAttemptTask(RecordingTask):
        def run(self) -> Any:
            return Result() if self.attempt == 2 else super().run()

    Controller.register(SecondAttemptTask.path, SecondAttemptTask)
    send_messages("1", cls=SecondAttemptTask)
    stepped = SteppedConsumer()
    stepped.consumer.REGISTRY = RecordingController
    stepped.attempts(10)
    assert RecordingTask.events == [("run", 1), "onsuccess", "controller: onsuccess"]


def test_retry_is_logged_as_a_warning_and_the_last_attempt_as_failed(caplog: pytest.LogCaptureFixture) -> None:
    send_messages("1", cls=RecordingTask)
    stepped = SteppedConsumer()
    stepped.attempts(10)
    record, _ = (record for record in caplog.records if ".Retry: " in record.getMessage())
    assert (record.levelname, record.name) == ("WARNING", "kser.entry")
    assert (
        record.getMessage()
        == f"RecordingTask.Retry: {RecordingTask.path}[1]: attempt 1 failed, the next follows in 10 s: no"
    )
    fields: Any = record
    assert (fields.kmsg["uuid"], fields.kresult["stderr"]) == ("1", "no")
    assert lines(caplog, logging.ERROR) == []
    stepped.attempts(10)
    assert record_of(caplog, "RecordingTask.Failed: ")
    assert record_of(caplog, "Controller.Failed: ")


def test_entry_retried_signal_is_emitted_for_each_retried_attempt() -> None:
    emitted: list[Any] = []

    def retried(sender: Any, entry: Any, result: Result, attempt: int) -> None:
        emitted.append(("retried", sender, entry.uuid, result.stderr, attempt))

    def failed(sender: Any, entry: Any, result: Result) -> None:
        emitted.append(("failed", sender, entry.uuid))

    send_messages("1", cls=RecordingTask)
    with signals.entry_retried.connected_to(retried), signals.entry_failed.connected_to(failed):
        SteppedConsumer().attempts(10, 10)
    assert emitted == [
        ("retried", RecordingTask, "1", "no", 1),
        ("retried", RecordingTask, "1", "no", 2),
        ("failed", RecordingTask, "1"),
    ]


# -- operations --------------------------------------------------------------------------------------------------------


class FailingStep(RecordingTask):
    """A task of an operation, whose own retry policy has no effect."""

    RETRY = Retry(max_attempts=9, delay=0)


class FailingOperation(Operation):
    """An operation whose first task fails."""

    RETRY = THREE_ATTEMPTS

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [FailingStep(), FailingStep()]

    def onerror(self, result: Result) -> Result:
        RecordingTask.events.append("operation: onerror")
        return result


def test_operation_is_retried_as_a_whole_with_its_own_policy(caplog: pytest.LogCaptureFixture) -> None:
    Controller.register(FailingOperation.path, FailingOperation)
    send_messages("1", cls=FailingOperation)
    assert SteppedConsumer().attempts(0, 10, 10, 10) == [1, 0, 1, 1, 0]
    runs = [("run", number) for number in (1, 2, 3)]
    assert [event for event in RecordingTask.events if event in runs] == runs
    assert RecordingTask.events.count("operation: onerror") == 1
    assert RecordingTask.events[-1] == "operation: onerror"
    assert len([line for line in lines(caplog) if line.startswith("FailingOperation.Retry: ")]) == 2


def test_task_executed_by_another_task_is_not_retried() -> None:
    class OuterTask(RecordingTask):
        RETRY = None

        def run(self) -> Any:
            return RecordingTask().execute()

    Controller.register(OuterTask.path, OuterTask)
    send_messages("1", cls=OuterTask)
    assert SteppedConsumer().attempts(10) == [1, 0]
    assert RecordingTask.events == [("run", 1), ("onerror", FAILED), ("onerror", FAILED)]


def test_task_that_cannot_be_built_is_retried() -> None:
    """``postinit`` may fail for a temporary reason, as ``run`` may."""

    class BuiltAtThirdAttempt(RecordingTask):
        def postinit(self) -> None:
            self.events.append("postinit")
            if self.events.count("postinit") < 3:
                raise ConnectionError("no")

        def run(self) -> Any:
            return Result()

    Controller.register(BuiltAtThirdAttempt.path, BuiltAtThirdAttempt)
    send_messages("1", cls=BuiltAtThirdAttempt)
    stepped = SteppedConsumer()
    assert stepped.attempts(10, 10) == [1, 1, 1]
    assert RecordingTask.events == ["postinit", "postinit", "postinit", "onsuccess"]
    assert stepped.consumer.counts == {"done": 1, "retried": 2, "dead_lettered": 0}


def test_onerror_that_returns_a_success_makes_the_attempt_a_success() -> None:
    class ForgivingTask(RecordingTask):
        RETRY = Retry(max_attempts=1)

        def onerror(self, result: Result) -> Result:
            return Result(uuid=self.uuid)

    Controller.register(ForgivingTask.path, ForgivingTask)
    send_messages("1", cls=ForgivingTask)
    stepped = SteppedConsumer()
    stepped.attempts()
    assert stepped.consumer.counts == {"done": 1, "dead_lettered": 0}


def test_onsuccess_that_returns_a_failure_makes_the_attempt_a_failure() -> None:
    class StrictTask(RecordingTask):
        RETRY = Retry(max_attempts=1)

        def run(self) -> Any:
            return Result()

        def onsuccess(self, result: Result) -> Result:
            return Result(uuid=self.uuid, retcode=1, stderr="not enough")

    Controller.register(StrictTask.path, StrictTask)
    send_messages("1", cls=StrictTask)
    stepped = SteppedConsumer()
    stepped.attempts()
    assert stepped.consumer.counts["failed"] == 1
