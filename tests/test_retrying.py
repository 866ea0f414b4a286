"""Messages that are tried again, in a consumer on the in-memory transport whose time passes when a test says so."""

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
from tests.engine import Act, Running, committed, put
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


def test_a_message_is_tried_again_when_its_time_has_come_and_done_when_it_succeeds() -> None:
    Act.acts["1"] = [ConnectionError("no"), ConnectionError("no"), None]
    put("1")
    running = Running(retry=THRICE)
    assert running.attempts(9.9) == [1, 0]
    assert committed() == 0
    assert running.attempts(0.2, 10) == [0, 1, 1]
    assert (committed(), running.consumer.counts) == (1, {"done": 1, "retried": 2, "dead_lettered": 0})


def test_after_the_last_attempt_it_failed() -> None:
    Act.acts["1"] = ConnectionError("no")
    put("1")
    running = Running(retry=THRICE)
    assert running.attempts(10, 10, 10) == [1, 1, 1, 0]
    assert (committed(), running.consumer.counts["failed"]) == (1, 1)


def test_without_a_policy_there_is_one_attempt() -> None:
    Act.acts["1"] = ConnectionError("no")
    put("1")
    assert Running().attempts(1000) == [1, 0]
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
    put("1", cls=Fresh)
    assert Running().attempts(10, 10) == [1, 1, 1]
    assert [entry.uuid for entry in objects] == ["1"] * 3


def test_a_task_knows_the_number_of_its_attempt() -> None:
    put("1", cls=Told)
    Running().attempts(10, 10)
    assert [number for what, number in Told.told if what == "run"] == [1, 2, 3]


def test_outside_of_a_consumer_an_attempt_is_the_first() -> None:
    assert Told().attempt == 1
    Told().execute()
    assert Told.told == [("run", 1), ("onerror", FAILED)]


def test_the_policy_of_a_class_wins_over_that_of_the_consumer() -> None:
    put("1", cls=Told)
    assert Running(retry=Retry(max_attempts=9, delay=0)).attempts(0, 10, 10, 10) == [1, 0, 1, 1, 0]


def test_a_class_may_say_that_it_is_not_tried_again() -> None:
    class Once(Told):
        RETRY = Retry(max_attempts=1)

    Controller.register(Once.path, Once)
    put("1", cls=Once)
    assert Running(retry=THRICE).attempts(10) == [1, 0]


def test_a_task_asks_for_another_attempt_later() -> None:
    """It counts as one, and needs no policy: then there are three."""
    Act.acts["1"] = lambda: (_ for _ in ()).throw(Retry.later(50))
    put("1")
    assert Running().attempts(49, 2, 50, 50) == [1, 0, 1, 1, 0]
    assert committed() == 1


def test_asking_for_later_counts_as_an_attempt_of_the_policy() -> None:
    Act.acts["1"] = [Retry.later(50), ConnectionError("no"), Retry.later(1), None]
    put("1")
    assert Running(retry=THRICE).attempts(50, 10, 100) == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("on", "attempts"),
    [(None, [1, 1]), ((ConnectionError,), [1, 0])],
    ids=["any failure", "some exceptions"],
)
def test_a_failed_result_is_tried_again_only_when_no_exceptions_are_named(on: Any, attempts: list[int]) -> None:
    Act.acts["1"] = lambda: Result(retcode=1, stderr="no")
    put("1")
    assert Running(retry=Retry(delay=1, jitter=False, on=on)).attempts(1) == attempts


def test_what_no_attempt_can_mend_fails_at_once() -> None:
    Act.acts["1"] = ValidationError("Missing parameter: amount")
    put("1")
    assert Running(retry=THRICE).attempts(10) == [1, 0]


def test_what_no_policy_has_to_judge_fails_at_once(bus: Any) -> None:
    bus.send("dice", b"no message")
    put("1", cls="shop.Unknown")
    running = Running(retry=Retry(delay=0, on=(Exception,)))
    assert running.attempts(10) == [2, 0]
    assert running.consumer.counts["failed"] == 2


def test_a_task_that_wants_to_end_the_consumer_is_tried_again() -> None:
    """C8: SystemExit is a failure of the task."""
    Act.acts["1"] = [SystemExit(3), None]
    put("1")
    assert Running(retry=THRICE).attempts(10) == [1, 1]
    assert committed() == 1


def test_an_entrypoint_that_is_no_task_is_tried_again_too() -> None:
    class Bare(Entrypoint):
        tries: ClassVar[list[int]] = []

        def run(self) -> None:
            self.tries.append(1)
            raise ConnectionError("no")

    Controller.register(Bare.path, Bare)
    put("1", cls=Bare)
    assert Running(retry=THRICE).attempts(10, 10) == [1, 1, 1]


@pytest.mark.parametrize("policy", [5, "often", None, False, {"max_attempts": 5}])
def test_a_users_own_retry_that_is_no_policy_gives_way_to_the_consumers(policy: Any) -> None:
    """C18: what we add gives way to an attribute of that name which means something else."""

    class Mine(Told):
        RETRY = policy
        TIMEOUT = "12:00"
        attempt = "mine"

    Controller.register(Mine.path, Mine)
    put("1", cls=Mine)
    assert Running(retry=Retry(max_attempts=2, delay=1, jitter=False)).attempts(1, 1) == [1, 1, 0]
    assert [number for what, number in Told.told if what == "run"] == ["mine", "mine"]


# -- what others hear of it --------------------------------------------------------------------------------------------


def test_hooks_are_called_for_the_last_attempt_alone() -> None:
    put("1", cls=Told)
    running = Running()
    running.consumer.REGISTRY = Hooked
    running.attempts(10)
    assert Told.told == [("run", 1), ("run", 2)]
    running.attempts(10)
    assert Told.told[2:] == [("run", 3), ("onerror", FAILED), "controller: onerror"]


def test_an_attempt_that_succeeds_calls_the_hooks_of_success() -> None:
    class Second(Told):
        def run(self) -> Any:
            return Result() if self.attempt == 2 else super().run()

    Controller.register(Second.path, Second)
    put("1", cls=Second)
    running = Running()
    running.consumer.REGISTRY = Hooked
    running.attempts(10)
    assert Told.told == [("run", 1), "onsuccess", "controller: onsuccess"]


def test_what_is_tried_again_is_logged_as_such_and_only_the_last_as_failed(caplog: pytest.LogCaptureFixture) -> None:
    put("1", cls=Told)
    running = Running()
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


def test_listeners_hear_of_each_attempt_that_is_followed_by_another() -> None:
    heard: list[Any] = []

    def retried(sender: Any, entry: Any, result: Result, attempt: int) -> None:
        heard.append(("retried", sender, entry.uuid, result.stderr, attempt))

    def failed(sender: Any, entry: Any, result: Result) -> None:
        heard.append(("failed", sender, entry.uuid))

    put("1", cls=Told)
    with signals.entry_retried.connected_to(retried), signals.entry_failed.connected_to(failed):
        Running().attempts(10, 10)
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


def test_an_operation_is_tried_again_as_a_whole_with_its_own_policy(caplog: pytest.LogCaptureFixture) -> None:
    Controller.register(Both.path, Both)
    put("1", cls=Both)
    assert Running().attempts(0, 10, 10, 10) == [1, 0, 1, 1, 0]
    runs = [("run", number) for number in (1, 2, 3)]
    assert [told for told in Told.told if told in runs] == runs
    assert Told.told.count("operation: onerror") == 1
    assert Told.told[-1] == "operation: onerror"
    assert len([line for line in lines(caplog) if line.startswith("Both.Retry: ")]) == 2


def test_a_task_that_another_one_executes_is_that_ones_business() -> None:
    class Outer(Told):
        RETRY = None

        def run(self) -> Any:
            return Told().execute()

    Controller.register(Outer.path, Outer)
    put("1", cls=Outer)
    assert Running().attempts(10) == [1, 0]
    assert Told.told == [("run", 1), ("onerror", FAILED), ("onerror", FAILED)]


def test_a_task_whose_construction_fails_is_tried_again() -> None:
    """``postinit`` may need what is not there for a moment, as ``run`` may."""

    class Connecting(Told):
        def postinit(self) -> None:
            self.told.append("postinit")
            if self.told.count("postinit") < 3:
                raise ConnectionError("no")

        def run(self) -> Any:
            return Result()

    Controller.register(Connecting.path, Connecting)
    put("1", cls=Connecting)
    running = Running()
    assert running.attempts(10, 10) == [1, 1, 1]
    assert Told.told == ["postinit", "postinit", "postinit", "onsuccess"]
    assert running.consumer.counts == {"done": 1, "retried": 2, "dead_lettered": 0}


def test_a_hook_that_makes_a_success_of_the_last_failure_makes_it_one() -> None:
    class Forgiving(Told):
        RETRY = Retry(max_attempts=1)

        def onerror(self, result: Result) -> Result:
            return Result(uuid=self.uuid)

    Controller.register(Forgiving.path, Forgiving)
    put("1", cls=Forgiving)
    running = Running()
    running.attempts()
    assert running.consumer.counts == {"done": 1, "dead_lettered": 0}


def test_a_hook_that_makes_a_failure_of_a_success_makes_it_one() -> None:
    class Picky(Told):
        RETRY = Retry(max_attempts=1)

        def run(self) -> Any:
            return Result()

        def onsuccess(self, result: Result) -> Result:
            return Result(uuid=self.uuid, retcode=1, stderr="not enough")

    Controller.register(Picky.path, Picky)
    put("1", cls=Picky)
    running = Running()
    running.attempts()
    assert running.consumer.counts["failed"] == 1
