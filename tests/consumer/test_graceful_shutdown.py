"""Tests of the graceful shutdown: running records are finished or abandoned, and offsets are committed."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest

from kser.retry import Retry
from tests.consumer.harness import (
    MANUAL_COMMIT,
    NO_INTERVAL_COMMIT,
    ConsumerThread,
    FaultyConsumer,
    ScriptedTask,
    committed,
    new_consumer,
    send_messages,
    worker_threads,
)
from tests.support import WAIT_SECONDS, lines, wait_until

pytestmark = pytest.mark.usefixtures("bus")


@pytest.mark.parametrize("workers", [1, 3])
def test_graceful_shutdown_commits_running_records_and_starts_no_other(workers: int) -> None:
    gate = threading.Event()
    uuids = [str(number) for number in range(workers + 5)]
    ScriptedTask.script.update(dict.fromkeys(uuids, lambda: gate.wait(WAIT_SECONDS)))
    send_messages(*uuids)
    consumer = FaultyConsumer(NO_INTERVAL_COMMIT, workers=workers)
    with ConsumerThread(consumer) as thread:
        wait_until(lambda: len(ScriptedTask.ran) == workers)
        consumer.stop()
        wait_until(lambda: consumer.is_shutting_down)
        gate.set()
        ending = thread.join()
    assert isinstance(ending, SystemExit)
    assert ending.code == 0
    assert (sorted(ScriptedTask.ran), committed()) == (sorted(uuids[:workers]), workers)


def test_graceful_shutdown_closes_the_work_queue_before_the_poller_stops_fetching() -> None:
    """In the opposite order, an idle worker could start a record of the poll that is under way."""
    consumer = FaultyConsumer(workers=2)
    worker_pool = consumer._kser_worker_pool
    shutdown, was_shutting_down = worker_pool.shutdown, []

    def record_and_shut_down() -> None:
        was_shutting_down.append(consumer.is_shutting_down)
        shutdown()

    worker_pool.shutdown = record_and_shut_down  # type: ignore[method-assign]
    with ConsumerThread(consumer) as thread:
        consumer.stop()
        assert isinstance(thread.join(), SystemExit)
    assert was_shutting_down[0] is False


def test_graceful_shutdown_keeps_polling_the_group() -> None:
    """A running task may take longer than the session timeout of the group."""
    gate = threading.Event()
    ScriptedTask.script["1"] = lambda: gate.wait(WAIT_SECONDS)
    send_messages("1")
    consumer = FaultyConsumer()
    with ConsumerThread(consumer):
        wait_until(lambda: ScriptedTask.ran)
        consumer.stop()
        wait_until(lambda: consumer.is_shutting_down)
        polls = len(consumer.current_client.polls)
        wait_until(lambda: len(consumer.current_client.polls) > polls + 2)
        assert consumer.current_client.closed == 0
        gate.set()
    assert (consumer.current_client.closed, committed()) == (1, 1)


@pytest.mark.parametrize("workers", [2, 3])
def test_graceful_shutdown_abandons_records_after_shutdown_timeout(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()
    # The task ends only after the shutdown, because the test opens the gate later.
    ScriptedTask.script["slow"] = lambda: gate.wait(3 * WAIT_SECONDS)
    send_messages("quick", "slow")
    consumer = new_consumer(workers=workers, shutdown_timeout=0.2)
    with ConsumerThread(consumer) as thread:
        wait_until(lambda: len(ScriptedTask.ran) == 2)
        consumer.stop()
        ending = thread.join()
        assert isinstance(ending, SystemExit)
        assert (ending.code, committed()) == (0, 1)
        gate.set()
        wait_until(lambda: not worker_threads())
    assert committed() == 1
    warnings = [line for line in lines(caplog, logging.WARNING) if "shutdown_timeout" in line]
    assert warnings == [
        "Consumer: the message at offset 1 of dice[0] still runs after shutdown_timeout (0.2 s): its attempt is"
        " abandoned, and the message will run again"
    ]
    ScriptedTask.script.clear()
    new_consumer().run_until_idle()
    assert ScriptedTask.ran.count("slow") == 2


def test_graceful_shutdown_does_not_wait_for_delayed_records() -> None:
    ScriptedTask.script["1"] = [ConnectionError("no"), None]
    send_messages("1", "2")
    # Both times are longer than the test waits for the end of the consumer.
    consumer = new_consumer(MANUAL_COMMIT, retry=Retry(delay=60), shutdown_timeout=60)
    with ConsumerThread(consumer):
        wait_until(lambda: len(ScriptedTask.ran) == 2)
    assert committed() == 0
    new_consumer().run_until_idle()
    assert ScriptedTask.ran == ["1", "2", "1"]


def test_graceful_shutdown_with_commit_before_runs_every_committed_record() -> None:
    gate = threading.Event()
    ScriptedTask.script["1"] = lambda: gate.wait(WAIT_SECONDS)
    send_messages("1", "2", "3", key=b"a")
    consumer = FaultyConsumer({**MANUAL_COMMIT, "auto_offset_reset": "earliest"}, commit="before", workers=2)
    with ConsumerThread(consumer):
        wait_until(lambda: committed() and ScriptedTask.ran)
        consumer.stop()
        wait_until(lambda: consumer.is_shutting_down)
        gate.set()
    assert ScriptedTask.ran == ["1", "2", "3"][: committed()]


def test_graceful_shutdown_leaves_the_group() -> None:
    consumer = new_consumer(workers=2)
    with ConsumerThread(consumer):
        wait_until(lambda: consumer.assignment)
    other = new_consumer()
    other.step(timeout=0)
    assert len(other.assignment) == 1


def test_graceful_shutdown_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    send_messages("1")
    consumer = new_consumer(workers=3)
    with ConsumerThread(consumer):
        wait_until(lambda: ScriptedTask.ran)
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_graceful_shutdown_of_an_idle_consumer_does_not_wait_for_shutdown_timeout() -> None:
    consumer = new_consumer(shutdown_timeout=3 * WAIT_SECONDS)
    with ConsumerThread(consumer) as thread:
        wait_until(lambda: consumer.assignment)
        consumer.stop()
        thread.join()


def test_consumer_stopped_before_its_start_ends_at_once() -> None:
    send_messages("1")
    consumer = new_consumer()
    consumer.stop()
    with pytest.raises(SystemExit) as caught:
        consumer.run()
    assert (caught.value.code, ScriptedTask.ran) == (0, [])


def test_closing_twice_is_harmless() -> None:
    consumer = FaultyConsumer()
    consumer.close()
    consumer.close()
    assert consumer.current_client.closed == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_dead_poller_thread_ends_the_consumer_with_an_error(workers: int) -> None:
    """A consumer without its client thread would stay idle, or would end with status 0."""
    consumer = new_consumer(workers=workers)
    # A stopped poller ends its thread at once.
    consumer._kser_poller.stop(0)
    with ConsumerThread(consumer) as thread:
        ending = thread.join()
    assert isinstance(ending, RuntimeError)


def test_raising_should_stop_ends_the_consumer_after_its_commit() -> None:
    class FailingConsumer(FaultyConsumer):
        @staticmethod
        def should_stop() -> bool:
            if ScriptedTask.ran:
                raise ConnectionError("no redis")
            return False

    send_messages("1")
    consumer = FailingConsumer(MANUAL_COMMIT, workers=2)
    with ConsumerThread(consumer) as thread:
        ending = thread.join()
    assert isinstance(ending, ConnectionError)
    assert (consumer.current_client.closed, committed()) == (1, 1)


def test_terminate_file_ends_several_workers() -> None:
    consumer = new_consumer(MANUAL_COMMIT, workers=3)
    send_messages("1", "2")
    with ConsumerThread(consumer) as thread:
        wait_until(lambda: committed() == 2)
        Path(os.environ["TERMINATE_FILE"]).touch()
        ending = thread.join()
    assert isinstance(ending, SystemExit)
    assert ending.code == 0
