"""Tests of TIME_LIMIT: an attempt that takes too long fails, and its late result is dropped."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from cdumay_result import Result

from kser import signals
from kser.controller import Controller
from kser.dummy.consumer import Consumer
from kser.entry import Entrypoint
from kser.retry import Retry
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from tests.consumer.harness import MANUAL_COMMIT, ConsumerThread, ScriptedTask, committed, new_consumer, send_messages
from tests.support import WAIT_SECONDS, Clock, lines, wait_until

pytestmark = pytest.mark.usefixtures("bus")


class Slow(Task):
    """Runs until the test lets it go, the first time; then does what the test says."""

    TIME_LIMIT = 5
    told: ClassVar[list[Any]] = []
    gate: ClassVar[threading.Event]
    ending: ClassVar[Any] = None

    def run(self) -> Any:
        self.told.append(("run", self.attempt))
        if self.told.count(("run", 1)) == 1 and self.attempt == 1:
            assert self.gate.wait(WAIT_SECONDS)
            if isinstance(self.ending, Exception):
                raise self.ending
            return self.ending
        return None

    def postrun(self, result: Any) -> Any:
        self.told.append("postrun")
        return result

    def onsuccess(self, result: Result) -> Result:
        self.told.append("onsuccess")
        return result

    def onerror(self, result: Result) -> Result:
        self.told.append(f"onerror: {result.stderr}")
        return result


class Hooked(Controller):
    @classmethod
    def onsuccess(cls, kmsg: Any, result: Any) -> Any:
        Slow.told.append("controller: onsuccess")
        return result

    @classmethod
    def onerror(cls, kmsg: Any, result: Any) -> Any:
        Slow.told.append("controller: onerror")
        return result


@pytest.fixture(autouse=True)
def gate(bus: Any) -> Iterator[threading.Event]:
    Slow.gate = threading.Event()
    Controller.register(Slow.path, Slow)
    yield Slow.gate
    Slow.gate.set()
    Slow.told.clear()
    Slow.ending = None


class Stepped:
    """A consumer whose attempts run in threads of the test, and whose time passes when the test says so."""

    def __init__(self, **options: Any) -> None:
        self.clock = Clock()
        self.consumer: Consumer = new_consumer(MANUAL_COMMIT, clock=self.clock, **options)
        self.consumer.REGISTRY = Hooked
        self.spawned = 0
        self.consumer._kser_worker_pool._spawn = self._count  # type: ignore[method-assign]

    def _count(self) -> None:
        self.spawned += 1

    def begin(self) -> threading.Thread:
        """Take in what there is and begin the first of it."""
        self.consumer._kser_poller.poll_once(0)
        thread = threading.Thread(target=self.consumer._kser_worker_pool.step)
        thread.start()
        wait_until(
            lambda: (
                self.consumer._kser_work_queue.running()
                and self.consumer._kser_work_queue.running()[0].attempt.time_limit is not None
            )
        )
        return thread

    def expire(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.consumer._kser_worker_pool.enforce_time_limits()


LATE_ERROR = "the attempt took longer than TIME_LIMIT, 5 s"


def test_attempt_within_its_timeout_is_not_affected() -> None:
    send_messages("1", cls=Slow)
    stepped = Stepped()
    thread = stepped.begin()
    stepped.expire(4.9)
    Slow.gate.set()
    thread.join(WAIT_SECONDS)
    stepped.expire(10)
    stepped.consumer.step(timeout=0)
    assert Slow.told == [("run", 1), "postrun", "onsuccess", "controller: onsuccess"]
    assert (stepped.spawned, committed()) == (0, 1)


@pytest.mark.parametrize(
    "ending",
    [None, Result(stdout="late"), Result(retcode=1, stderr="late"), ConnectionError("late")],
    ids=["nothing", "a result", "a failed result", "an exception"],
)
def test_attempt_that_times_out_fails_and_its_late_result_is_dropped(
    ending: Any, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[str] = []

    def failed(sender: Any, entry: Any, result: Result) -> None:
        heard.append(result.stderr)

    Slow.ending = ending
    send_messages("1", cls=Slow)
    stepped = Stepped()
    with signals.entry_failed.connected_to(failed):
        thread = stepped.begin()
        stepped.expire(5)
        assert stepped.consumer.step(timeout=0) == 1
        assert Slow.told == [("run", 1), f"onerror: {LATE_ERROR}", "controller: onerror"]
        assert (stepped.spawned, committed(), stepped.consumer.counts["failed"]) == (1, 1, 1)
        Slow.gate.set()
        thread.join(WAIT_SECONDS)
    assert Slow.told == [("run", 1), f"onerror: {LATE_ERROR}", "controller: onerror"]
    assert heard == [LATE_ERROR]
    assert stepped.consumer.counts == {"done": 1, "failed": 1, "dead_lettered": 0}
    assert [line for line in lines(caplog, logging.WARNING) if "late" in line] == [
        "Consumer: the attempt at offset 0 of dice[0] was abandoned; its late result is dropped"
    ]


def test_attempt_that_times_out_is_retried_by_its_policy() -> None:
    send_messages("1", cls=Slow)
    stepped = Stepped(retry=Retry(max_attempts=2, delay=10, jitter=False, on=(TimeoutError,)))
    thread = stepped.begin()
    stepped.expire(5)
    assert stepped.consumer.step(timeout=0) == 1
    stepped.clock.advance(10)
    assert stepped.consumer.step(timeout=0) == 1
    assert Slow.told == [("run", 1), ("run", 2), "postrun", "onsuccess", "controller: onsuccess"]
    assert committed() == 1
    Slow.gate.set()
    thread.join(WAIT_SECONDS)
    assert stepped.consumer.counts == {"done": 1, "retried": 1, "dead_lettered": 0}


def test_late_failure_of_a_timed_out_attempt_schedules_no_retry(caplog: pytest.LogCaptureFixture) -> None:
    Slow.ending = ConnectionError("late")
    send_messages("1", cls=Slow)
    stepped = Stepped(retry=Retry(max_attempts=3, delay=10, jitter=False))
    thread = stepped.begin()
    stepped.expire(5)
    Slow.gate.set()
    thread.join(WAIT_SECONDS)
    stepped.consumer.step(timeout=0)
    assert len([line for line in lines(caplog) if ".Retry: " in line]) == 1
    stepped.clock.advance(10)
    assert [stepped.consumer.step(timeout=0) for _ in range(2)] == [1, 0]


def test_records_of_the_same_key_wait_until_the_timeout_and_no_longer() -> None:
    send_messages("1", cls=Slow, key=b"a")
    send_messages("2", key=b"a")
    stepped = Stepped()
    thread = stepped.begin()
    assert stepped.consumer.step(timeout=0) == 0
    stepped.expire(5)
    assert stepped.consumer.step(timeout=0) == 2
    assert (ScriptedTask.ran, committed()) == (["2"], 2)
    Slow.gate.set()
    thread.join(WAIT_SECONDS)


def test_attempt_that_times_out_is_dead_lettered(bus: Any) -> None:
    send_messages("1", cls=Slow)
    stepped = Stepped(dead_letter=True)
    thread = stepped.begin()
    stepped.expire(5)
    stepped.consumer.step(timeout=0)
    Slow.gate.set()
    thread.join(WAIT_SECONDS)
    ((letter,),) = bus.topics["dice.dlq"]
    assert dict(letter.headers)["kser-dlq-error-class"] == b"kser.errors.TaskTimeout"


def test_operation_timeout_applies_to_the_whole_operation() -> None:
    class Whole(Operation):
        TIME_LIMIT = 7

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [Slow(), Slow()]

    Slow.ending = ConnectionError("late")
    Controller.register(Whole.path, Whole)
    send_messages("1", cls=Whole)
    stepped = Stepped()
    thread = stepped.begin()
    stepped.expire(6.9)
    assert stepped.consumer.step(timeout=0) == 0
    stepped.expire(0.1)
    assert stepped.consumer.step(timeout=0) == 1
    Slow.gate.set()
    thread.join(WAIT_SECONDS)
    assert Slow.told == [("run", 1), "controller: onerror"]


@pytest.mark.parametrize("value", [None, 0, -1, "5", True, float("nan"), object()])
def test_invalid_timeout_attribute_sets_no_limit(value: Any) -> None:
    """C18: TIME_LIMIT may be an attribute of the user with another meaning."""

    class Mine(Entrypoint):
        TIME_LIMIT = value
        items: ClassVar[list[Any]] = []

        def run(self) -> None:
            self.items.append(consumer._kser_work_queue.running()[0].attempt.time_limit)

    Controller.register(Mine.path, Mine)
    send_messages("1", cls=Mine)
    consumer = new_consumer()
    consumer.step(timeout=0)
    assert Mine.items == [None]


# -- with threads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_stuck_worker_is_replaced(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slow, "TIME_LIMIT", 0.2)
    send_messages("1", cls=Slow)
    consumer = new_consumer(MANUAL_COMMIT, workers=workers)
    with ConsumerThread(consumer):
        wait_until(lambda: consumer.counts.get("failed"))
        send_messages("2", "3", "4")
        wait_until(lambda: committed() == 4)
        alive = [thread.name for thread in threading.enumerate() if thread.name == "kser-worker"]
        # The stuck one and those that took the place of it.
        assert len(alive) == (1 if workers == 1 else 3)
        Slow.gate.set()
        wait_until(lambda: len([t for t in threading.enumerate() if t.name == "kser-worker"]) == max(workers, 1))
    assert sorted(ScriptedTask.ran) == ["2", "3", "4"]
    assert ("run", 1) in Slow.told
    assert "onsuccess" not in Slow.told
