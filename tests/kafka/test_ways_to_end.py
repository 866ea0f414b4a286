"""Tests of the ways to end a consumer: exactly the finished offsets are committed, and the end is quick."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kser.schemas import Message
from tests.kafka.broker import Kafka
from tests.kafka.helpers import (
    JOB,
    TRANSPORTS,
    Worker,
    committed,
    config,
    entries,
    message,
    put,
    repeated,
    uuids,
    wait_until,
)

ORDERLY = (signal.SIGTERM, signal.SIGINT)

# What "within a second" means on a machine that does other things too; the program's own end is part of it.
QUICKLY = 1.5


@pytest.fixture(params=TRANSPORTS)
def start(
    kafka: Kafka, topic: Callable[..., str], tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[..., Worker]:
    """``start()`` starts a worker; they share group, topic and ledger."""
    settings, name = config(kafka), topic()

    def starter(**environment: str) -> Worker:
        return Worker(settings, name, tmp_path / "ledger", transport=request.param, **environment)

    return starter


def offset(kafka: Kafka, worker: Worker) -> int | None:
    return committed(kafka, worker.group, worker.topic)


def send(kafka: Kafka, worker: Worker, *messages: Message) -> None:
    put(kafka, worker.topic, messages)


def running_file() -> str:
    return Path(os.environ["RUNNING_FILE"]).read_text()


@pytest.mark.parametrize("number", ORDERLY)
def test_graceful_shutdown_of_an_idle_consumer_commits_within_a_second(
    kafka: Kafka, start: Callable[..., Worker], number: signal.Signals
) -> None:
    with start() as worker:
        worker.wait_for_partitions(1)
        send(kafka, worker, message(), message())
        worker.wait_for("end", 2)
        at = worker.send_signal(number)
        assert worker.wait() == 0
        took = time.monotonic() - at
        assert took < QUICKLY, took
        print(f"{number.name} while idle: ended after {took:.2f} s")
        assert offset(kafka, worker) == 2
        assert "Closing consumer and exiting" in worker.text
        assert "Traceback" not in worker.text
        assert running_file() == ""


@pytest.mark.parametrize("number", ORDERLY)
def test_graceful_shutdown_finishes_the_running_task_and_starts_no_other(
    kafka: Kafka, start: Callable[..., Worker], number: signal.Signals
) -> None:
    with start() as worker:
        worker.wait_for_partitions(1)
        first, second, third = message(), message(seconds=1.5), message()
        send(kafka, worker, first, second, third)
        worker.wait_for("start", 2)
        worker.send_signal(number)
        assert worker.wait() == 0
        assert worker.noted("end") == uuids([first, second])
        took = time.monotonic() - entries(worker.ledger)[-1].at
        assert took < QUICKLY, took
        print(f"{number.name} in a task: ended {took:.2f} s after the task")
        assert offset(kafka, worker) == 2
        assert running_file() == ""


@pytest.mark.parametrize("first", ORDERLY)
@pytest.mark.parametrize(("second", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_second_signal_aborts_the_running_task_without_committing_it(
    kafka: Kafka, start: Callable[..., Worker], first: signal.Signals, second: signal.Signals, status: int
) -> None:
    with start() as worker:
        worker.wait_for_partitions(1)
        send(kafka, worker, message(), message(seconds=30))
        worker.wait_for("start", 2)
        worker.send_signal(first)
        with pytest.raises(AssertionError, match="still runs"):
            worker.wait(0.5)
        at = worker.send_signal(second)
        # What Python makes of a KeyboardInterrupt that nobody catches, or what a shell shows of a SIGTERM.
        assert worker.wait() == status
        took = time.monotonic() - at
        assert took < QUICKLY, took
        print(f"{second.name} after {first.name}: ended after {took:.2f} s")
        assert ("KeyboardInterrupt" in worker.text) == (second == signal.SIGINT)
        assert len(worker.noted("end")) == 1
        assert offset(kafka, worker) == 1
        assert running_file() == ""


def test_terminate_file_ends_a_busy_consumer_after_its_task_and_is_kept(
    kafka: Kafka, start: Callable[..., Worker]
) -> None:
    terminate = Path(os.environ["TERMINATE_FILE"])
    with start() as worker:
        worker.wait_for_partitions(1)
        # 30 tasks are waiting: it is looked at between them too, though not at each.
        send(kafka, worker, *[message(seconds=0.2) for _ in range(30)])
        worker.wait_for("start")
        terminate.touch()
        at = time.monotonic()
        assert worker.wait() == 0
        took = time.monotonic() - at
        assert took < QUICKLY + 1, took
        print(f"terminate file: ended after {took:.2f} s")
        done = len(worker.noted("end"))
        assert 0 < done < 30
        assert offset(kafka, worker) == done
        assert "Closing consumer and exiting" in worker.text
    assert terminate.exists()


def test_terminate_file_ends_an_idle_consumer(kafka: Kafka, start: Callable[..., Worker]) -> None:
    with start() as worker:
        worker.wait_for_partitions(1)
        Path(os.environ["TERMINATE_FILE"]).touch()
        at = time.monotonic()
        assert worker.wait() == 0
        took = time.monotonic() - at
        assert took < QUICKLY + 0.5, took
        print(f"terminate file while idle: ended after {took:.2f} s")
        assert offset(kafka, worker) == 0


def test_keyboard_interrupt_in_a_task_ends_the_consumer_without_committing_it(
    kafka: Kafka, start: Callable[..., Worker]
) -> None:
    with start() as worker:
        worker.wait_for_partitions(1)
        send(kafka, worker, message(), message(then="interrupt"), message())
        worker.wait_for("start", 2)
        assert worker.wait() == -signal.SIGINT
        assert len(worker.noted("start")) == 2
        assert offset(kafka, worker) == 1
        assert running_file() == ""


def test_sys_exit_in_a_task_fails_that_task_alone(kafka: Kafka, start: Callable[..., Worker]) -> None:
    with start() as worker:
        worker.wait_for_partitions(1)
        last = message()
        send(kafka, worker, message(then="exit"), last)
        worker.wait_for("end")
        assert worker.noted("end") == [last.uuid]
        assert re.search(r"Controller\.Failed: .*SystemExit.*7", worker.text)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert offset(kafka, worker) == 2


def test_unfinished_messages_of_a_killed_consumer_are_redelivered_to_the_next(
    kafka: Kafka, start: Callable[..., Worker]
) -> None:
    with start() as killed:
        killed.wait_for_partitions(1)
        done, operation, waiting = message(), message(JOB, seconds=0.7), message()
        send(kafka, killed, done)
        killed.wait_for("end")
        send(kafka, killed, operation, waiting)
        # In the second task of the operation.
        killed.wait_for("start", 3)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
        assert len(killed.noted("end")) == 2
    before = offset(kafka, killed) or 0
    assert before <= 1, "what was not done is committed"
    with start() as successor:
        successor.wait_for_partitions(1)
        wait_until(lambda: waiting.uuid in successor.mine("end"), "the rest is done")
        # Without a store an operation starts again from its first task.
        assert len(successor.mine("end")) - successor.mine("end").count(done.uuid) == 3
        assert f"{JOB}[{operation.uuid}]" in successor.text
        print(f"committed before the kill: {before} of 1; done twice: {len(repeated(successor.noted('end')))}")
        successor.send_signal(signal.SIGTERM)
        assert successor.wait() == 0
        assert offset(kafka, successor) == 3
