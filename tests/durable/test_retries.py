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
from tests.consumer.harness import PATIENCE, Act, InThread, committed, put, until
from tests.durable.harness import BOTH_WAYS, Process, Sale, Shop, Spread, bare, expire, meanwhile
from tests.support import lines

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
        return [Act("1.a"), self.own("1.b"), Act("1.c")]


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
def forget(shop: Shop) -> Iterator[None]:
    for cls in (Told, Tried, Trying, TryingSpread, Patient, PatientSpread, Bare, BareSpread):
        shop.first.learn(cls)
    yield
    Told.told.clear()
    Told.fails = 99


def after(shop: Shop, seconds: float, process: Process | None = None) -> int:
    """Let time pass, have the reaper look, and handle what there is; returns how many attempts were made in all."""
    shop.pass_by(seconds)
    (process or shop.first).companion.reap()
    (process or shop.first).handle()
    return len([each for each in Told.told if each[0] == "run"])


# -- another attempt ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Trying, TryingSpread, Patient, PatientSpread])
def test_retry_policy_gives_another_attempt_after_its_backoff(shop: Shop, cls: type[Trying]) -> None:
    """durability rule 27: the task's policy, or that of its operation."""
    Told.fails = 2
    bare(cls)
    assert after(shop, 0) == 1
    assert [after(shop, 9), after(shop, 2), after(shop, 8), after(shop, 3)] == [1, 2, 2, 3]
    assert (shop.status(), shop.tasks()) == (SUCCESS, [SUCCESS] * 3)
    assert [each for each in Told.told if each[0] == "run"] == [("run", 1), ("run", 2), ("run", 3)]
    assert Act.seen == ["1.a", "1.c"]
    assert shop.attempts() == [(0, 1, SUCCESS), (1, 1, FAILED), (1, 2, FAILED), (1, 3, SUCCESS), (2, 1, SUCCESS)]
    assert ("onerror", 1) not in Told.told


@pytest.mark.parametrize("cls", [Bare, BareSpread])
def test_retry_policy_of_the_consumer_applies_as_the_default(shop: Shop, cls: type[Trying]) -> None:
    """durability rule 27"""
    process = shop.process(Told, cls, group="patient", retry=THRICE)
    bare(cls)
    assert after(shop, 0, process) == 1
    assert [after(shop, 11, process), after(shop, 11, process), after(shop, 99, process)] == [2, 3, 3]
    assert shop.status() == FAILED


@pytest.mark.parametrize("cls", [Bare, BareSpread])
def test_task_without_a_retry_policy_has_one_attempt(shop: Shop, cls: type[Trying]) -> None:
    """durability rule 27"""
    bare(cls)
    assert after(shop, 0) == 1
    assert (shop.status(), Told.told[-1]) == (FAILED, ("onerror", 1))


@TRYING
def test_task_fails_after_its_last_attempt_and_onerror_is_called(shop: Shop, cls: type[Trying]) -> None:
    """durability rule 27"""
    bare(cls)
    after(shop, 0)
    after(shop, 11)
    assert after(shop, 11) == 3
    assert (shop.status(), shop.tasks()) == (FAILED, [SUCCESS, FAILED, PENDING])
    assert Told.told[-1] == ("onerror", 3)
    assert after(shop, 1000) == 3


@TRYING
def test_retry_backoff_releases_the_claim_and_acks_the_message(shop: Shop, cls: type[Trying]) -> None:
    """durability rule 27: the worker is free."""
    bare(cls)
    put("other")
    shop.first.handle()
    row = shop.stored().operation
    assert (row.status, row.owner, row.step) == (RUNNING, None, 1)
    assert row.due_at == pytest.approx(shop.world.now + 10, abs=3)
    assert row.next_check_at == row.due_at
    assert "other" in Act.seen
    assert committed() == len(InMemoryBroker.at("").values("dice"))
    assert shop.first.consumer._kser_work_queue.running() == []
    assert shop.first.consumer.counts.get("retried") is None


@TRYING
def test_duplicate_message_does_not_shorten_the_retry_backoff(shop: Shop, cls: type[Trying]) -> None:
    """durability rule 27"""
    bare(cls)
    after(shop, 0)
    bare(cls)
    shop.first.handle()
    assert Told.told == [("run", 1)]


@TRYING
def test_retry_survives_its_consumer(shop: Shop, cls: type[Trying]) -> None:
    """durability rule 27: another one makes the next attempt."""
    Told.fails = 1
    bare(cls)
    after(shop, 0)
    shop.first.consumer.close()
    second = shop.process(Tried, cls)
    assert after(shop, 11, second) == 2
    assert shop.status() == SUCCESS


@BOTH_WAYS
def test_retry_later_counts_as_an_attempt(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 27: Retry.later needs no policy; without one, there are three attempts."""
    Act.acts["1.b"] = [Retry.later(50), Retry.later(5), Retry.later(1)]
    bare(cls)
    for seconds, seen in ((0, 1), (49, 1), (2, 2), (6, 3), (1000, 3)):
        after(shop, seconds)
        assert Act.seen.count("1.b") == seen
    assert shop.status() == FAILED
    assert [number for at, number, _ in shop.attempts() if at == 1] == [1, 2, 3]


@TRYING
def test_retried_attempt_is_emitted_and_logged_as_a_retry(
    shop: Shop, cls: type[Trying], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 27"""
    heard: list[Any] = []
    Told.fails = 1

    def hear(sender: Any, operation: str, position: int, new: str, attempt: int, error: Any) -> None:
        heard.append((operation, position, new, attempt, error))

    with signals.task_changed.connected_to(hear):
        bare(cls)
        after(shop, 0)
        after(shop, 11)
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
    assert shop.kinds().count("task-retried") == 1


@TRYING
def test_each_attempt_starts_from_a_fresh_object_with_earlier_results(shop: Shop, cls: type[Trying]) -> None:
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

    Act.acts["1.a"] = lambda: Result(retval={"a": 1})
    shop.first.learn(Fresh)
    shop.first.learn(Own)
    bare(Own)
    for _ in range(4):
        after(shop, 11)
    assert len(objects) == 3


@BOTH_WAYS
def test_owner_crash_does_not_count_as_an_attempt(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 27: recorded attempts count."""
    second = shop.process(group="second")
    numbers: list[int] = []

    class Dying(Act):
        def run(self) -> None:
            numbers.append(self.attempt)
            if len(numbers) == 1:
                meanwhile(lambda: shop.pass_by(expire()), second.handle)()

    class Own(cls):  # type: ignore[valid-type,misc]
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [Dying("1.a")]

    for process in (shop.first, second):
        process.learn(Dying)
        process.learn(Own)
    bare(Own)
    shop.first.handle()
    assert (numbers, shop.attempts()) == ([1, 1], [(0, 1, SUCCESS)])


# -- after a resume ----------------------------------------------------------------------------------------------------


@TRYING
def test_resume_restarts_the_retry_policy_and_continues_the_numbering(shop: Shop, cls: type[Trying]) -> None:
    """durability rules 25 and 27"""
    Told.fails = 5
    bare(cls)
    after(shop, 0)
    for _ in range(3):
        after(shop, 11)
    assert (shop.status(), Told.told[-1]) == (FAILED, ("onerror", 3))
    operation = shop.registry.get("1")
    assert operation is not None
    operation.resume()
    assert after(shop, 0) == 4
    assert shop.status() == RUNNING
    after(shop, 11)
    after(shop, 11)
    assert [number for what, number in Told.told if what == "run"] == [1, 2, 3, 4, 5, 6]
    assert shop.status() == SUCCESS


# -- time --------------------------------------------------------------------------------------------------------------


class Stuck(Task):
    """Does not return before the test lets it go, the first time."""

    TIME_LIMIT = 5
    gate: ClassVar[threading.Event]
    told: ClassVar[list[Any]] = []

    def run(self) -> Result:
        self.told.append(("run", self.attempt))
        if self.attempt == 1:
            assert self.gate.wait(PATIENCE)
        return Result(retval={"by": self.attempt})

    def onerror(self, result: Result) -> Result:
        self.told.append(("onerror", result.stderr))
        return result


class Holding(Sale):
    own: ClassVar[type[Task]] = Stuck

    def build_tasks(self, **kwargs: Any) -> list[Task]:
        return [Act("1.a"), self.own("1.b"), Act("1.c")]


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
    shop: Shop, cls: type[Holding], workers: int, gate: threading.Event
) -> None:
    """durability rule 28: the late result meets the fence."""
    process = shop.process(Stuck, cls, group="workers", workers=workers)
    with InThread(process.consumer):
        bare(cls)
        until(lambda: Stuck.told)
        shop.pass_by(6)
        until(shop.has_ended)
        assert (shop.status(), shop.tasks()) == (FAILED, [SUCCESS, FAILED, PENDING])
        put("2", "3", "4")
        until(lambda: {"2", "3", "4"} <= set(Act.seen))
        before = shop.stored()
        gate.set()
        until(lambda: len([t for t in threading.enumerate() if t.name == "kser-worker"]) == max(workers, 1))
    assert shop.stored() == before
    (attempt,) = [each for each in before.attempts if each.position == 1]
    assert (attempt.status, attempt.error) == (FAILED, "the attempt took longer than TIME_LIMIT, 5 s")
    assert Stuck.told == [("run", 1), ("onerror", "the attempt took longer than TIME_LIMIT, 5 s")]
    assert "1.c" not in Act.seen


@HOLDING
def test_timeout_of_an_attempt_with_a_lost_claim_is_fenced(
    shop: Shop, cls: type[Holding], gate: threading.Event
) -> None:
    """durability rules 8 and 28"""
    process = shop.process(Stuck, cls, group="workers", workers=2)
    process.stop_its_heart()
    with InThread(process.consumer):
        bare(cls)
        until(lambda: Stuck.told)
        shop.world.pass_by(expire())
        claim = shop.seize()
        process.clock.pass_by(6)
        until(lambda: len([t for t in threading.enumerate() if t.name == "kser-worker"]) == 3)
        until(lambda: process.consumer.counts["done"])
        gate.set()
    row = shop.stored().operation
    assert (row.status, row.epoch, row.step) == (RUNNING, claim.epoch, 1)
    assert shop.attempts() == [(0, 1, SUCCESS)]


@HOLDING
def test_timed_out_attempt_is_retried_while_the_first_is_stuck(
    shop: Shop, cls: type[Holding], gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 28"""
    monkeypatch.setattr(Stuck, "RETRY", Retry(max_attempts=2, delay=10, jitter=False), raising=False)
    process = shop.process(Stuck, cls, group="workers", workers=2)
    with InThread(process.consumer):
        bare(cls)
        until(lambda: Stuck.told)
        shop.pass_by(6)
        until(lambda: "task-retried" in shop.kinds())
        shop.pass_by(11)
        until(shop.has_ended)
        gate.set()
    assert (shop.status(), shop.tasks()) == (SUCCESS, [SUCCESS] * 3)
    assert shop.attempts() == [(0, 1, SUCCESS), (1, 1, FAILED), (1, 2, SUCCESS), (2, 1, SUCCESS)]
    operation = shop.registry.get("1")
    assert operation is not None
    assert operation.result.retval == {"by": 2}


@HOLDING
def test_task_timeout_does_not_apply_to_its_neighbours(shop: Shop, cls: type[Holding], gate: threading.Event) -> None:
    """durability rule 28: an operation may take as long as it likes."""
    seen: list[Any] = []
    gate.set()

    def look() -> None:
        seen.extend(item.attempt.time_limit for item in shop.first.consumer._kser_work_queue.running())

    Act.acts["1.a"] = Act.acts["1.c"] = look
    shop.first.learn(Stuck)
    shop.first.learn(cls)
    bare(cls)
    shop.first.handle()
    assert (seen, shop.status()) == ([None, None], SUCCESS)


@BOTH_WAYS
def test_operation_timeout_applies_to_each_task_separately(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 28"""
    seen: list[Any] = []

    class Timed(cls):  # type: ignore[valid-type,misc]
        TIME_LIMIT = 7

    Act.acts["1.a"] = Act.acts["1.c"] = lambda: seen.extend(
        (item.attempt.time_limit, item.attempt.started_at) for item in shop.first.consumer._kser_work_queue.running()
    )
    Act.acts["1.b"] = lambda: shop.pass_by(6)
    shop.first.learn(Timed)
    bare(Timed)
    shop.first.handle()
    (first, began), (last, begun) = seen
    assert (first, last) == (7, 7)
    assert begun - began >= 6
    assert shop.status() == SUCCESS


# -- dead letters ------------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_recorded_failure_is_not_dead_lettered(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 29: the store keeps it, and resume() replays it."""
    process = shop.process(cls, group="letters", dead_letter=True)
    Act.acts["1.b"] = ConnectionError("no")
    bare(cls)
    process.handle()
    assert shop.status() == FAILED
    assert InMemoryBroker.at("").topics.get("dice.dlq", [[]]) == [[]]
    assert (process.consumer.counts["dead_lettered"], process.consumer.counts.get("failed")) == (0, None)


@pytest.mark.parametrize("how", ["build", "hook", "unknown"])
def test_recorded_failure_of_any_cause_is_not_dead_lettered(shop: Shop, how: str) -> None:
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

    process = shop.process(Odd, group="letters", dead_letter=True)
    operation = shop.first.learn(Odd)("1")
    (operation if how == "build" else operation.build()).send()
    if how == "unknown":
        process.forget(Act)
    process.handle()
    assert shop.status() == FAILED
    assert process.consumer.counts["dead_lettered"] == 0


def test_failed_plain_task_is_still_dead_lettered(shop: Shop) -> None:
    """durability rule 29"""
    process = shop.process(Spread, group="letters", dead_letter=True)
    Act.acts["plain"] = ConnectionError("no")
    put("plain", cls=Act)
    process.handle()
    assert process.consumer.counts["dead_lettered"] == 1
