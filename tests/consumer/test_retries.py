"""Tests of retried messages, in a consumer on the in-memory transport with a controlled clock."""

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
from tests.consumer.harness import ScriptedTask, SteppedConsumer, committed, send_messages
from tests.support import lines, record_of

pytestmark = pytest.mark.usefixtures("bus")

#: Three attempts, ten seconds apart.
THRICE = Retry(max_attempts=3, delay=10, backoff=1, jitter=False)


class Told(Task):
    """Notes what becomes of it."""

    RETRY = THRICE
    told: ClassVar[list[Any]] = []

    def run(self) -> Any:
        self.told.append(("run", self.attempt))
        raise ConnectionError("no")

    def onsuccess(self, result: Result) -> Result:
        self.told.append("onsuccess")
        return result

    def onerror(self, result: Result) -> Result:
        self.told.append(("onerror", self.status))
        return result


class Hooked(Controller):
    @classmethod
    def onsuccess(cls, kmsg: Any, result: Any) -> Any:
        Told.told.append("controller: onsuccess")
        return result

    @classmethod
    def onerror(cls, kmsg: Any, result: Any) -> Any:
        Told.told.append("controller: onerror")
        return result


@pytest.fixture(autouse=True)
def forget(bus: Any) -> Iterator[None]:
    Controller.register(Told.path, Told)
    yield
    Told.told.clear()


# -- attempts ----------------------------------------------------------------------------------------------------------


def test_failed_message_is_retried_after_the_backoff_until_it_succeeds() -> None:
    ScriptedTask.script["1"] = [ConnectionError("no"), ConnectionError("no"), None]
    send_messages("1")
    running = SteppedConsumer(retry=THRICE)
    assert running.attempts(9.9) == [1, 0]
    assert committed() == 0
    assert running.attempts(0.2, 10) == [0, 1, 1]
    assert (committed(), running.consumer.counts) == (1, {"done": 1, "retried": 2, "dead_lettered": 0})


def test_message_fails_after_its_last_attempt() -> None:
    ScriptedTask.script["1"] = ConnectionError("no")
    send_messages("1")
    running = SteppedConsumer(retry=THRICE)
    assert running.attempts(10, 10, 10) == [1, 1, 1, 0]
    assert (committed(), running.consumer.counts["failed"]) == (1, 1)


def test_message_without_a_retry_policy_has_one_attempt() -> None:
    ScriptedTask.script["1"] = ConnectionError("no")
    send_messages("1")
    assert SteppedConsumer().attempts(1000) == [1, 0]
    assert committed() == 1


def test_every_attempt_starts_from_a_fresh_object() -> None:
    objects: list[Task] = []

    class Fresh(Task):
        RETRY = THRICE

        def run(self) -> Result:
            assert self not in objects
            assert (self.params, self.result.stdout, self.status) == ({}, "", "RUNNING")
            objects.append(self)
            self.params["spoilt"] = True
            self.result.stdout = "spoilt"
            raise ConnectionError("no")

    Controller.register(Fresh.path, Fresh)
    send_messages("1", cls=Fresh)
    assert SteppedConsumer().attempts(10, 10) == [1, 1, 1]
    assert [entry.uuid for entry in objects] == ["1"] * 3


def test_task_knows_its_attempt_number() -> None:
    send_messages("1", cls=Told)
    SteppedConsumer().attempts(10, 10)
    assert [number for what, number in Told.told if what == "run"] == [1, 2, 3]


def test_attempt_number_outside_a_consumer_is_one() -> None:
    assert Told().attempt == 1
    Told().execute()
    assert Told.told == [("run", 1), ("onerror", FAILED)]


def test_retry_policy_of_a_class_overrides_that_of_the_consumer() -> None:
    send_messages("1", cls=Told)
    assert SteppedConsumer(retry=Retry(max_attempts=9, delay=0)).attempts(0, 10, 10, 10) == [1, 0, 1, 1, 0]


def test_class_may_disable_retries() -> None:
    class Once(Told):
        RETRY = Retry(max_attempts=1)

    Controller.register(Once.path, Once)
    send_messages("1", cls=Once)
    assert SteppedConsumer(retry=THRICE).attempts(10) == [1, 0]


def test_retry_later_schedules_another_attempt() -> None:
    """Retry.later counts as an attempt and needs no policy; without one, there are three attempts."""
    ScriptedTask.script["1"] = lambda: (_ for _ in ()).throw(Retry.later(50))
    send_messages("1")
    assert SteppedConsumer().attempts(49, 2, 50, 50) == [1, 0, 1, 1, 0]
    assert committed() == 1


def test_retry_later_counts_as_an_attempt_of_the_policy() -> None:
    ScriptedTask.script["1"] = [Retry.later(50), ConnectionError("no"), Retry.later(1), None]
    send_messages("1")
    assert SteppedConsumer(retry=THRICE).attempts(50, 10, 100) == [1, 1, 1, 0]


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
    assert SteppedConsumer(retry=THRICE).attempts(10) == [1, 0]


def test_undecodable_message_and_unknown_entrypoint_fail_at_once(bus: Any) -> None:
    bus.send("dice", b"no message")
    send_messages("1", cls="shop.Unknown")
    running = SteppedConsumer(retry=Retry(delay=0, on=(Exception,)))
    assert running.attempts(10) == [2, 0]
    assert running.consumer.counts["failed"] == 2


def test_task_that_raises_system_exit_is_retried() -> None:
    """C8: SystemExit is a failure of the task."""
    ScriptedTask.script["1"] = [SystemExit(3), None]
    send_messages("1")
    assert SteppedConsumer(retry=THRICE).attempts(10) == [1, 1]
    assert committed() == 1


def test_plain_entrypoint_is_retried() -> None:
    class Bare(Entrypoint):
        tries: ClassVar[list[int]] = []

        def run(self) -> None:
            self.tries.append(1)
            raise ConnectionError("no")

    Controller.register(Bare.path, Bare)
    send_messages("1", cls=Bare)
    assert SteppedConsumer(retry=THRICE).attempts(10, 10) == [1, 1, 1]


@pytest.mark.parametrize("policy", [5, "often", None, False, {"max_attempts": 5}])
def test_user_retry_attribute_that_is_no_policy_falls_back_to_the_consumer(policy: Any) -> None:
    """C18: an attribute of the user with the same name and another meaning is not a policy."""

    class Mine(Told):
        RETRY = policy
        TIME_LIMIT = "12:00"
        attempt = "mine"

    Controller.register(Mine.path, Mine)
    send_messages("1", cls=Mine)
    assert SteppedConsumer(retry=Retry(max_attempts=2, delay=1, jitter=False)).attempts(1, 1) == [1, 1, 0]
    assert [number for what, number in Told.told if what == "run"] == ["mine", "mine"]


# -- what others hear of it --------------------------------------------------------------------------------------------


def test_failure_hooks_are_called_only_for_the_last_attempt() -> None:
    send_messages("1", cls=Told)
    running = SteppedConsumer()
    running.consumer.REGISTRY = Hooked
    running.attempts(10)
    assert Told.told == [("run", 1), ("run", 2)]
    running.attempts(10)
    assert Told.told[2:] == [("run", 3), ("onerror", FAILED), "controller: onerror"]


def test_successful_retry_calls_the_success_hooks() -> None:
    class Second(Told):
        def run(self) -> Any:
            return Result() if self.attempt == 2 else super().run()

    Controller.register(Second.path, Second)
    send_messages("1", cls=Second)
    running = SteppedConsumer()
    running.consumer.REGISTRY = Hooked
    running.attempts(10)
    assert Told.told == [("run", 1), "onsuccess", "controller: onsuccess"]


def test_retry_is_logged_as_a_warning_and_the_last_attempt_as_failed(caplog: pytest.LogCaptureFixture) -> None:
    send_messages("1", cls=Told)
    running = SteppedConsumer()
    running.attempts(10)
    record, _ = (record for record in caplog.records if ".Retry: " in record.getMessage())
    assert (record.levelname, record.name) == ("WARNING", "kser.entry")
    assert record.getMessage() == f"Told.Retry: {Told.path}[1]: attempt 1 failed, the next follows in 10 s: no"
    fields: Any = record
    assert (fields.kmsg["uuid"], fields.kresult["stderr"]) == ("1", "no")
    assert lines(caplog, logging.ERROR) == []
    running.attempts(10)
    assert record_of(caplog, "Told.Failed: ")
    assert record_of(caplog, "Controller.Failed: ")


def test_entry_retried_signal_is_emitted_for_each_retried_attempt() -> None:
    heard: list[Any] = []

    def retried(sender: Any, entry: Any, result: Result, attempt: int) -> None:
        heard.append(("retried", sender, entry.uuid, result.stderr, attempt))

    def failed(sender: Any, entry: Any, result: Result) -> None:
        heard.append(("failed", sender, entry.uuid))

    send_messages("1", cls=Told)
    with signals.entry_retried.connected_to(retried), signals.entry_failed.connected_to(failed):
        SteppedConsumer().attempts(10, 10)
    assert heard == [("retried", Told, "1", "no", 1), ("retried", Told, "1", "no", 2), ("failed", Told, "1")]


# -- operations --------------------------------------------------------------------------------------------------------


class Step(Told):
    """A task of an operation, with a policy that does not count there."""

    RETRY = Retry(max_attempts=9, delay=0)


class Both(Operation):
    RETRY = THRICE

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [Step(), Step()]

    def onerror(self, result: Result) -> Result:
        Told.told.append("operation: onerror")
        return result


def test_operation_is_retried_as_a_whole_with_its_own_policy(caplog: pytest.LogCaptureFixture) -> None:
    Controller.register(Both.path, Both)
    send_messages("1", cls=Both)
    assert SteppedConsumer().attempts(0, 10, 10, 10) == [1, 0, 1, 1, 0]
    runs = [("run", number) for number in (1, 2, 3)]
    assert [told for told in Told.told if told in runs] == runs
    assert Told.told.count("operation: onerror") == 1
    assert Told.told[-1] == "operation: onerror"
    assert len([line for line in lines(caplog) if line.startswith("Both.Retry: ")]) == 2


def test_task_executed_by_another_task_is_not_retried() -> None:
    class Outer(Told):
        RETRY = None

        def run(self) -> Any:
            return Told().execute()

    Controller.register(Outer.path, Outer)
    send_messages("1", cls=Outer)
    assert SteppedConsumer().attempts(10) == [1, 0]
    assert Told.told == [("run", 1), ("onerror", FAILED), ("onerror", FAILED)]


def test_task_that_cannot_be_built_is_retried() -> None:
    """``postinit`` may need what is not there for a moment, as ``run`` may."""

    class Connecting(Told):
        def postinit(self) -> None:
            self.told.append("postinit")
            if self.told.count("postinit") < 3:
                raise ConnectionError("no")

        def run(self) -> Any:
            return Result()

    Controller.register(Connecting.path, Connecting)
    send_messages("1", cls=Connecting)
    running = SteppedConsumer()
    assert running.attempts(10, 10) == [1, 1, 1]
    assert Told.told == ["postinit", "postinit", "postinit", "onsuccess"]
    assert running.consumer.counts == {"done": 1, "retried": 2, "dead_lettered": 0}


def test_onerror_that_returns_a_success_makes_the_attempt_a_success() -> None:
    class Forgiving(Told):
        RETRY = Retry(max_attempts=1)

        def onerror(self, result: Result) -> Result:
            return Result(uuid=self.uuid)

    Controller.register(Forgiving.path, Forgiving)
    send_messages("1", cls=Forgiving)
    running = SteppedConsumer()
    running.attempts()
    assert running.consumer.counts == {"done": 1, "dead_lettered": 0}


def test_onsuccess_that_returns_a_failure_makes_the_attempt_a_failure() -> None:
    class Picky(Told):
        RETRY = Retry(max_attempts=1)

        def run(self) -> Any:
            return Result()

        def onsuccess(self, result: Result) -> Result:
            return Result(uuid=self.uuid, retcode=1, stderr="not enough")

    Controller.register(Picky.path, Picky)
    send_messages("1", cls=Picky)
    running = SteppedConsumer()
    running.attempts()
    assert running.consumer.counts["failed"] == 1
