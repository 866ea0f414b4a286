"""Tests of several workers of one consumer, each in its own thread."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kser.controller import Controller
from kser.retry import Retry
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task
from tests.consumer.harness import (
    MANUAL_COMMIT,
    ConsumerThread,
    ScriptedTask,
    committed,
    new_consumer,
    send_messages,
    worker_threads,
)
from tests.support import WAIT_SECONDS, Clock, wait_until

pytestmark = pytest.mark.usefixtures("bus")


def test_single_worker_runs_tasks_in_the_main_thread() -> None:
    threads: list[threading.Thread] = []
    ScriptedTask.script["1"] = lambda: threads.append(threading.current_thread())
    consumer = new_consumer()
    ScriptedTask.script["2"] = consumer.stop
    send_messages("1", "2")
    with pytest.raises(SystemExit):
        consumer.run()
    assert threads == [threading.main_thread()]


def test_workers_run_concurrently_up_to_their_number() -> None:
    together = threading.Barrier(3, timeout=WAIT_SECONDS)
    names: list[str] = []

    def meet() -> None:
        names.append(threading.current_thread().name)
        together.wait()

    ScriptedTask.script.update(dict.fromkeys("123456", meet))
    send_messages(*"123456")
    consumer = new_consumer(MANUAL_COMMIT, workers=3)
    with ConsumerThread(consumer):
        wait_until(lambda: committed() == 6)
        assert len(worker_threads()) == 3
    assert set(names) == {"kser-worker"}
    assert consumer.counts["done"] == 6


def test_slow_message_blocks_only_the_commit() -> None:
    gate = threading.Event()
    ScriptedTask.script["slow"] = lambda: gate.wait(WAIT_SECONDS)
    send_messages("slow", *"123")
    with ConsumerThread(new_consumer(MANUAL_COMMIT, workers=2)):
        wait_until(lambda: len(ScriptedTask.ran) == 4)
        assert committed() == 0
        gate.set()
        wait_until(lambda: committed() == 4)


def test_messages_of_a_key_neither_overlap_nor_overtake() -> None:
    class KeyedTask(Task):
        succeeded: ClassVar[dict[str, list[str]]] = defaultdict(list)
        running: ClassVar[set[str]] = set()
        failed: ClassVar[set[str]] = set()
        overlaps: ClassVar[list[str]] = []

        def run(self) -> None:
            key = self.uuid[0]
            if key in self.running:
                self.overlaps.append(self.uuid)
            self.running.add(key)
            try:
                threading.Event().wait(0.0005)
                if self.uuid.endswith("5") and self.uuid not in self.failed:
                    self.failed.add(self.uuid)
                    raise ConnectionError("once")
                self.succeeded[key].append(self.uuid)
            finally:
                self.running.discard(key)

    Controller.register(KeyedTask.path, KeyedTask)
    sent: dict[str, list[str]] = {key: [f"{key}{n}" for n in range(40)] for key in "abcde"}
    for number in range(40):
        for key, uuids in sent.items():
            send_messages(uuids[number], cls=KeyedTask, key=key.encode())
    with ConsumerThread(new_consumer(MANUAL_COMMIT, workers=8, retry=Retry(delay=0.001))):
        wait_until(lambda: committed() == 200)
    assert KeyedTask.overlaps == []
    assert dict(KeyedTask.succeeded) == sent


def test_each_worker_has_a_line_in_the_running_file() -> None:
    path = Path(os.environ["RUNNING_FILE"])
    gate, started = threading.Event(), threading.Barrier(3, timeout=WAIT_SECONDS)

    def wait_for_gate() -> None:
        started.wait()
        gate.wait(WAIT_SECONDS)

    ScriptedTask.script.update({"1": wait_for_gate, "2": wait_for_gate})
    send_messages("1", "2")
    with ConsumerThread(new_consumer(workers=2)):
        started.wait()
        assert sorted(path.read_text().split("\n")) == [f"{ScriptedTask.path}[1]", f"{ScriptedTask.path}[2]"]
        gate.set()
        wait_until(lambda: path.read_text() == "")


def test_attempt_number_is_local_to_its_worker() -> None:
    class RecordingTask(Task):
        RETRY = Retry(max_attempts=3, delay=0)
        attempts: ClassVar[dict[str, list[tuple[int, int]]]] = defaultdict(list)

        def run(self) -> None:
            number = self.attempt
            threading.Event().wait(0.001)
            self.attempts[self.uuid].append((number, self.attempt))
            if self.uuid.startswith("bad"):
                raise ConnectionError("no")

    Controller.register(RecordingTask.path, RecordingTask)
    bad, good = ([f"{kind}{number}" for number in range(20)] for kind in ("bad", "good"))
    send_messages(*bad, *good, cls=RecordingTask)
    with ConsumerThread(new_consumer(MANUAL_COMMIT, workers=4)):
        wait_until(lambda: committed() == 40)
    assert RecordingTask.attempts == {
        **{uuid: [(1, 1), (2, 2), (3, 3)] for uuid in bad},
        **{uuid: [(1, 1)] for uuid in good},
    }


@pytest.mark.parametrize("workers", [1, 3])
def test_task_that_raises_keyboard_interrupt_ends_the_consumer_uncommitted(workers: int) -> None:
    """C8"""
    ScriptedTask.script["1"] = KeyboardInterrupt()
    send_messages("1")
    consumer = new_consumer(MANUAL_COMMIT, workers=workers)
    with ConsumerThread(consumer) as thread:
        assert isinstance(thread.join(), KeyboardInterrupt)
    assert committed() == 0
    assert Path(os.environ["RUNNING_FILE"]).read_text() == ""


def test_task_that_raises_system_exit_does_not_end_the_consumer() -> None:
    ScriptedTask.script["1"] = SystemExit(1)
    send_messages("1", "2", "3")
    consumer = new_consumer(MANUAL_COMMIT, workers=2)
    with ConsumerThread(consumer):
        wait_until(lambda: committed() == 3)
    assert consumer.counts["failed"] == 1


def test_pause_stops_all_workers() -> None:
    send_messages("1")
    consumer = new_consumer(MANUAL_COMMIT, workers=3)
    pause = Path(os.environ["LOCK_FILE"])
    with ConsumerThread(consumer):
        wait_until(lambda: committed() == 1)
        pause.touch()
        wait_until(lambda: consumer._kser_poller.paused)
        send_messages("2", "3")
        threading.Event().wait(0.1)
        assert ScriptedTask.ran == ["1"]
        pause.unlink()
        wait_until(lambda: committed() == 3)


def test_arriving_record_wakes_an_idle_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    # Neither the timeout of a wait nor a check of the control files wakes a worker, so only the record can.
    monkeypatch.setattr("kser.consumer.worker_pool.IDLE_WAIT", 3 * WAIT_SECONDS)
    consumer = new_consumer(MANUAL_COMMIT, workers=2, clock=Clock())
    with ConsumerThread(consumer):
        wait_until(lambda: consumer.assignment)
        for uuid in "123":
            send_messages(uuid)
            wait_until(lambda uuid=uuid: uuid in ScriptedTask.ran)


def test_many_messages_are_handled_exactly_once() -> None:
    uuids = [str(number) for number in range(2000)]
    send_messages(*uuids)
    consumer = new_consumer({"auto_commit_interval_ms": 10}, workers=8, max_in_flight=50, ordering="none")
    with ConsumerThread(consumer):
        wait_until(lambda: committed() == 2000)
    assert sorted(ScriptedTask.ran) == sorted(uuids)
    assert consumer.counts == {"done": 2000, "dead_lettered": 0}


def test_class_subscribed_while_running_gets_the_shared_producer() -> None:
    consumer = new_consumer(MANUAL_COMMIT, workers=2)
    with ConsumerThread(consumer):
        wait_until(lambda: consumer.assignment)
        registry = OperationRegistry()

        def run(self: Task) -> Any:
            return registry.producer.send("elsewhere", self.to_Message())

        late_class = registry.subscribe(type("LateTask", (Task,), {"run": run, "__module__": __name__}))
        send_messages("1", cls=late_class)
        wait_until(lambda: committed() == 1)
    assert consumer.counts == {"done": 1, "dead_lettered": 0}


def test_workers_end_at_shutdown() -> None:
    consumer = new_consumer(workers=4)
    with ConsumerThread(consumer):
        wait_until(lambda: len(worker_threads()) == 4)
    wait_until(lambda: not worker_threads())
