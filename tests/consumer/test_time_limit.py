"""Tests of TIME_LIMIT: an attempt that exceeds it fails, and its late result is dropped."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from cdumay_result import Result

from kser import signals
from kser.attempt import current_attempt
from kser.controller import Controller
from kser.entry import Entrypoint
from kser.retry import Retry
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from tests.consumer.harness import (
    MANUAL_COMMIT,
    ConsumerThread,
    FaultyConsumer,
    ScriptedTask,
    committed,
    new_consumer,
    send_messages,
    worker_threads,
)
from tests.support import WAIT_SECONDS, Clock, lines, recording_controller, wait_until

pytestmark = pytest.mark.usefixtures("bus")


class GatedTask(Task):
    """A task whose first attempt waits for the gate and ends with the late outcome; later attempts succeed at once."""

    TIME_LIMIT = 5
    events: ClassVar[list[Any]] = []
    gate: ClassVar[threading.Event]
    #: The exception that the first attempt raises, or the value that it returns.
    late_outcome: ClassVar[Any] = None

    def run(self) -> Any:
        self.events.append(("run", self.attempt))
        if self.events.count(("run", 1)) == 1 and self.attempt == 1:
            assert self.gate.wait(WAIT_SECONDS)
            if isinstance(self.late_outcome, Exception):
                raise self.late_outcome
            return self.late_outcome
        return None

    def postrun(self, result: Any) -> Any:
        self.events.append("postrun")
        return result

    def onsuccess(self, result: Result) -> Result:
        self.events.append("onsuccess")
        return result

    def onerror(self, result: Result) -> Result:
        self.events.append(f"onerror: {result.stderr}")
        return result


RecordingController = recording_controller(GatedTask.events)


@pytest.fixture(autouse=True)
def gate(bus: Any) -> Iterator[threading.Event]:
    GatedTask.gate = threading.Event()
    Controller.register(GatedTask.path, GatedTask)
    yield GatedTask.gate
    GatedTask.gate.set()
    GatedTask.events.clear()
    GatedTask.late_outcome = None


class TimedConsumer:
    """A consumer whose first attempt runs in a thread of the test, and the clock of its time limits."""

    def __init__(self, **options: Any) -> None:
        self.clock = Clock()
        self.consumer = FaultyConsumer(MANUAL_COMMIT, clock=self.clock, **options)
        self.consumer.REGISTRY = RecordingController
        #: The number of workers started in place of stuck ones.
        self.replaced_workers = 0
        self.consumer._kser_worker_pool._spawn = self._count_worker  # type: ignore[method-assign]

    def _count_worker(self) -> None:
        self.replaced_workers += 1

    def start_attempt(self) -> threading.Thread:
        """Fetch all records, start the first attempt in a thread, and wait until its task runs.

        An operation has a time limit before its first task begins, so the time limit alone does not show that.
        """
        self.consumer.poll()
        thread = threading.Thread(target=self.consumer.run_record)
        thread.start()
        running = self.consumer._kser_work_queue.running
        wait_until(lambda: ("run", 1) in GatedTask.events)
        assert [item for item in running() if item.attempt.time_limit is not None]
        return thread

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass, and enforce the time limits."""
        self.clock.advance(seconds)
        self.consumer._kser_worker_pool.enforce_time_limits()


TIMEOUT_ERROR = "the attempt took longer than TIME_LIMIT, 5 s"


def test_attempt_within_its_time_limit_is_not_affected() -> None:
    send_messages("1", cls=GatedTask)
    timed = TimedConsumer()
    thread = timed.start_attempt()
    timed.advance(4.9)
    GatedTask.gate.set()
    thread.join(WAIT_SECONDS)
    timed.advance(10)
    timed.consumer.step(timeout=0)
    assert GatedTask.events == [("run", 1), "postrun", "onsuccess", "controller: onsuccess"]
    assert (timed.replaced_workers, committed()) == (0, 1)


@pytest.mark.parametrize(
    "late_outcome",
    [None, Result(stdout="late"), Result(retcode=1, stderr="late"), ConnectionError("late")],
    ids=["nothing", "a result", "a failed result", "an exception"],
)
def test_attempt_that_times_out_fails_and_its_late_result_is_dropped(
    late_outcome: Any, caplog: pytest.LogCaptureFixture
) -> None:
    failures: list[str] = []

    def failed(sender: Any, entry: Any, result: Result) -> None:
        failures.append(result.stderr)

    GatedTask.late_outcome = late_outcome
    send_messages("1", cls=GatedTask)
    timed = TimedConsumer()
    with signals.entry_failed.connected_to(failed):
        thread = timed.start_attempt()
        timed.advance(5)
        assert timed.consumer.step(timeout=0) == 1
        assert GatedTask.events == [("run", 1), f"onerror: {TIMEOUT_ERROR}", "controller: onerror"]
        assert (timed.replaced_workers, committed(), timed.consumer.counts["failed"]) == (1, 1, 1)
        GatedTask.gate.set()
        thread.join(WAIT_SECONDS)
    assert GatedTask.events == [("run", 1), f"onerror: {TIMEOUT_ERROR}", "controller: onerror"]
    assert failures == [TIMEOUT_ERROR]
    assert timed.consumer.counts == {"done": 1, "failed": 1, "dead_lettered": 0}
    assert [line for line in lines(caplog, logging.WARNING) if "late" in line] == [
        "FaultyConsumer: the attempt at offset 0 of dice[0] was abandoned; its late result is dropped"
    ]


def test_attempt_that_times_out_is_retried_by_its_policy() -> None:
    send_messages("1", cls=GatedTask)
    timed = TimedConsumer(retry=Retry(max_attempts=2, delay=10, jitter=False, on=(TimeoutError,)))
    thread = timed.start_attempt()
    timed.advance(5)
    assert timed.consumer.step(timeout=0) == 1
    timed.clock.advance(10)
    assert timed.consumer.step(timeout=0) == 1
    assert GatedTask.events == [("run", 1), ("run", 2), "postrun", "onsuccess", "controller: onsuccess"]
    assert committed() == 1
    GatedTask.gate.set()
    thread.join(WAIT_SECONDS)
    assert timed.consumer.counts == {"done": 1, "retried": 1, "dead_lettered": 0}


def test_late_failure_of_a_timed_out_attempt_schedules_no_retry(caplog: pytest.LogCaptureFixture) -> None:
    GatedTask.late_outcome = ConnectionError("late")
    send_messages("1", cls=GatedTask)
    timed = TimedConsumer(retry=Retry(max_attempts=3, delay=10, jitter=False))
    thread = timed.start_attempt()
    timed.advance(5)
    GatedTask.gate.set()
    thread.join(WAIT_SECONDS)
    timed.consumer.step(timeout=0)
    assert len([line for line in lines(caplog) if ".Retry: " in line]) == 1
    timed.clock.advance(10)
    assert [timed.consumer.step(timeout=0) for _ in range(2)] == [1, 0]


def test_lane_waits_until_the_time_limit_and_no_longer() -> None:
    send_messages("1", cls=GatedTask, key=b"a")
    send_messages("2", key=b"a")
    timed = TimedConsumer()
    thread = timed.start_attempt()
    assert timed.consumer.step(timeout=0) == 0
    timed.advance(5)
    assert timed.consumer.step(timeout=0) == 2
    assert (ScriptedTask.ran, committed()) == (["2"], 2)
    GatedTask.gate.set()
    thread.join(WAIT_SECONDS)


def test_attempt_that_times_out_is_dead_lettered(bus: Any) -> None:
    send_messages("1", cls=GatedTask)
    timed = TimedConsumer(dead_letter=True)
    thread = timed.start_attempt()
    timed.advance(5)
    timed.consumer.step(timeout=0)
    GatedTask.gate.set()
    thread.join(WAIT_SECONDS)
    ((letter,),) = bus.topics["dice.dlq"]
    assert dict(letter.headers)["kser-dlq-error-class"] == b"kser.errors.TaskTimeout"


def test_time_limit_of_an_operation_applies_to_the_whole_operation() -> None:
    class TimedOperation(Operation):
        TIME_LIMIT = 7

        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [GatedTask(), GatedTask()]

    GatedTask.late_outcome = ConnectionError("late")
    Controller.register(TimedOperation.path, TimedOperation)
    send_messages("1", cls=TimedOperation)
    timed = TimedConsumer()
    thread = timed.start_attempt()
    timed.advance(6.9)
    assert timed.consumer.step(timeout=0) == 0
    timed.advance(0.1)
    assert timed.consumer.step(timeout=0) == 1
    GatedTask.gate.set()
    thread.join(WAIT_SECONDS)
    assert GatedTask.events == [("run", 1), "controller: onerror"]


@pytest.mark.parametrize("value", [None, 0, -1, "5", True, float("nan"), object()])
def test_invalid_time_limit_attribute_sets_no_limit(value: Any) -> None:
    """C18: TIME_LIMIT may be an attribute of the user with another meaning."""

    class UserEntrypoint(Entrypoint):
        TIME_LIMIT = value
        limits: ClassVar[list[Any]] = []

        def run(self) -> None:
            attempt = current_attempt.get()
            assert attempt is not None
            self.limits.append(attempt.time_limit)

    Controller.register(UserEntrypoint.path, UserEntrypoint)
    send_messages("1", cls=UserEntrypoint)
    new_consumer().step(timeout=0)
    assert UserEntrypoint.limits == [None]


# -- with threads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_stuck_worker_is_replaced(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GatedTask, "TIME_LIMIT", 0.2)
    send_messages("1", cls=GatedTask)
    consumer = new_consumer(MANUAL_COMMIT, workers=workers)
    with ConsumerThread(consumer):
        wait_until(lambda: consumer.counts.get("failed"))
        send_messages("2", "3", "4")
        wait_until(lambda: committed() == 4)
        # With one worker, the stuck worker is the thread of run(); its replacement is the only worker thread.
        assert len(worker_threads()) == (1 if workers == 1 else 3)
        GatedTask.gate.set()
        wait_until(lambda: len(worker_threads()) == workers)
    assert sorted(ScriptedTask.ran) == ["2", "3", "4"]
    assert ("run", 1) in GatedTask.events
    assert "onsuccess" not in GatedTask.events
