"""Tests of the ways to end a consumer: exactly the finished offsets are committed, without waiting for a timeout."""

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
    repeated,
    send_records,
    uuids,
    wait_until,
)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

#: Seconds within which a consumer ends if it waits for no timeout: less than the session timeout and shutdown_timeout.
END_SECONDS = 5


@pytest.fixture(params=TRANSPORTS)
def start(
    kafka: Kafka, topic: Callable[..., str], tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[..., Worker]:
    """Return ``start()``: starts a worker; all workers share a group, a topic and a ledger."""
    settings, name = config(kafka), topic()

    def starter(**environment: str) -> Worker:
        return Worker(settings, name, tmp_path / "ledger", transport=request.param, **environment)

    return starter


def committed_offset(kafka: Kafka, worker: Worker) -> int | None:
    """Return the committed offset of a worker's group."""
    return committed(kafka, worker.group, worker.topic)


def send(kafka: Kafka, worker: Worker, *messages: Message) -> None:
    """Send messages to a worker."""
    send_records(kafka, worker.topic, messages)


def running_file() -> str:
    """Return the text of the running file."""
    return Path(os.environ["RUNNING_FILE"]).read_text()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_graceful_shutdown_of_an_idle_consumer_commits_and_waits_for_nothing(
    kafka: Kafka, start: Callable[..., Worker], number: signal.Signals
) -> None:
    with start() as worker:
        worker.wait_for_partitions(1)
        send(kafka, worker, message(), message())
        worker.wait_for("end", 2)
        worker.send_signal(number)
        assert worker.wait(END_SECONDS) == 0
        assert committed_offset(kafka, worker) == 2
        assert "Closing consumer and exiting" in worker.text
        assert "Traceback" not in worker.text
        assert running_file() == ""


@pytest.mark.parametrize("number", STOP_SIGNALS)
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
        assert worker.all_recorded("end") == uuids([first, second])
        ended_at = [entry.at for entry in entries(worker.ledger) if entry.subject == second.uuid][-1]
        assert time.monotonic() - ended_at < END_SECONDS
        assert committed_offset(kafka, worker) == 2
        assert running_file() == ""


@pytest.mark.parametrize("first", STOP_SIGNALS)
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
        worker.send_signal(second)
        # Python ends an uncaught KeyboardInterrupt with SIGINT; 143 is the status of a shell after SIGTERM.
        assert worker.wait(END_SECONDS) == status
        assert ("KeyboardInterrupt" in worker.text) == (second == signal.SIGINT)
        assert len(worker.all_recorded("end")) == 1
        assert committed_offset(kafka, worker) == 1
        assert running_file() == ""


def test_terminate_file_ends_a_busy_consumer_after_its_task_and_is_kept(
    kafka: Kafka, start: Callable[..., Worker]
) -> None:
    terminate = Path(os.environ["TERMINATE_FILE"])
    with start() as worker:
        worker.wait_for_partitions(1)
        # 30 tasks take longer than END_SECONDS, and the consumer checks the file between two of them.
        send(kafka, worker, *[message(seconds=0.2) for _ in range(30)])
        worker.wait_for("start")
        terminate.touch()
        assert worker.wait(END_SECONDS) == 0
        done = len(worker.all_recorded("end"))
        assert 0 < done < 30
        assert committed_offset(kafka, worker) == done
        assert "Closing consumer and exiting" in worker.text
    assert terminate.exists()


def test_terminate_file_ends_an_idle_consumer(kafka: Kafka, start: Callable[..., Worker]) -> None:
    with start() as worker:
        worker.wait_for_partitions(1)
        Path(os.environ["TERMINATE_FILE"]).touch()
        assert worker.wait(END_SECONDS) == 0
        assert committed_offset(kafka, worker) == 0


def test_keyboard_interrupt_in_a_task_ends_the_consumer_without_committing_it(
    kafka: Kafka, start: Callable[..., Worker]
) -> None:
    with start() as worker:
        worker.wait_for_partitions(1)
        send(kafka, worker, message(), message(then="interrupt"), message())
        worker.wait_for("start", 2)
        assert worker.wait() == -signal.SIGINT
        assert len(worker.all_recorded("start")) == 2
        assert committed_offset(kafka, worker) == 1
        assert running_file() == ""


def test_sys_exit_in_a_task_fails_that_task_alone(kafka: Kafka, start: Callable[..., Worker]) -> None:
    with start() as worker:
        worker.wait_for_partitions(1)
        last = message()
        send(kafka, worker, message(then="exit"), last)
        worker.wait_for("end")
        assert worker.all_recorded("end") == [last.uuid]
        assert re.search(r"Controller\.Failed: .*SystemExit.*7", worker.text)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert committed_offset(kafka, worker) == 2


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
        assert len(killed.all_recorded("end")) == 2
    before = committed_offset(kafka, killed) or 0
    assert before <= 1, "an unfinished message is committed"
    with start() as successor:
        successor.wait_for_partitions(1)
        wait_until(lambda: waiting.uuid in successor.recorded("end"), "the last message is handled")
        # Without a store an operation starts again from its first task.
        assert len(successor.recorded("end")) - successor.recorded("end").count(done.uuid) == 3
        assert f"{JOB}[{operation.uuid}]" in successor.text
        duplicates = repeated(successor.all_recorded("end"))
        print(f"committed before the kill: {before} of 1; run twice: {len(duplicates)}")
        successor.send_signal(signal.SIGTERM)
        assert successor.wait() == 0
        assert committed_offset(kafka, successor) == 3
