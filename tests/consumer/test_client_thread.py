"""Tests of the thread that owns the Kafka client: if it is stuck, dead or fenced, the consumer ends with a reason."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kser.consumer.base import BaseConsumer
from kser.consumer.client import Partition
from kser.consumer.exit_status import ExitStatus, exit_status
from kser.errors import ClientError, ClientFenced, ClientStuck, GroupSettingError, SettingError
from tests.consumer.harness import (
    MANUAL_COMMIT,
    NO_INTERVAL_COMMIT,
    ConsumerThread,
    FaultyClient,
    FaultyConsumer,
    ScriptedTask,
    committed,
    send_messages,
)
from tests.support import ROOT, WAIT_SECONDS, lines, wait_until

pytestmark = pytest.mark.usefixtures("bus")

#: Options of a consumer whose client may take little more than one poll.
IMPATIENT: dict[str, Any] = {"revoke_timeout": 0, "client_timeout": 1.2}

FENCED = ClientFenced("another process uses the group instance id 'a'")


# -- a client that does not return -------------------------------------------------------------------------------------


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Return the event for which a stuck client waits; it is set at the end of the test."""
    event = threading.Event()
    yield event
    event.set()


def stick_poll(consumer: FaultyConsumer, gate: threading.Event) -> None:
    consumer.current_client.poll = lambda *_: gate.wait()  # type: ignore[method-assign,assignment,return-value]


def stick_commit(consumer: FaultyConsumer, gate: threading.Event) -> None:
    consumer.current_client.commit = lambda *_: gate.wait()  # type: ignore[method-assign,assignment,return-value]
    send_messages("1")


def stick_creation(consumer: FaultyConsumer, gate: threading.Event) -> None:
    consumer._kser_poller._connect = lambda: gate.wait()  # type: ignore[assignment,return-value]
    consumer.current_client.faults = {"poll": ClientError("broken", fatal=True)}


def stick_rebalance(consumer: FaultyConsumer, gate: threading.Event) -> None:
    consumer._kser_partitions.on_revoke = lambda _: gate.wait()  # type: ignore[method-assign,assignment,return-value]
    wait_until(lambda: consumer.assignment)
    consumer.client.create_topic("dice", 2)


@pytest.mark.parametrize("stick", [stick_poll, stick_commit, stick_creation, stick_rebalance])
def test_consumer_whose_client_does_not_return_ends_with_the_place(
    stick: Callable[[FaultyConsumer, threading.Event], None], gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    consumer = FaultyConsumer(MANUAL_COMMIT, **IMPATIENT)
    with ConsumerThread(consumer) as thread:
        stick(consumer, gate)
        ending = thread.join()
    assert isinstance(ending, ClientStuck)
    assert exit_status(ending) == ExitStatus.CLIENT == 70
    text = "the Kafka client has not returned for 1.2 s (client_timeout) from "
    (line,) = [line for line in lines(caplog, logging.ERROR) if text in line]
    assert " in wait: " in line
    (stack,) = [line for line in lines(caplog) if "the stack of the Kafka client thread" in line]
    assert f"in {stick.__name__}" in stack or "<lambda>" in stack


def test_slow_client_that_makes_progress_does_not_end_the_consumer() -> None:
    consumer = FaultyConsumer(**IMPATIENT)
    poll, polls = consumer.current_client.poll, []

    def poll_slowly(*arguments: Any) -> Any:
        for _ in range(4):
            threading.Event().wait(0.5)
            consumer.current_client.progress()
        polls.append(1)
        return poll(*arguments)

    consumer.current_client.poll = poll_slowly  # type: ignore[method-assign]
    with ConsumerThread(consumer) as thread:
        wait_until(lambda: polls)
        assert thread.is_running


def run_program(*uuids: str, workers: int = 1) -> tuple[int, str]:
    """Run ``program.py`` until it ends; return its exit status and the last lines of its output."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.consumer.program", str(workers), "0.2", *uuids],
        env=os.environ | {"KSER_CLIENT_TIMEOUT": "1.2", "KSER_REVOKE_TIMEOUT": "0"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=3 * WAIT_SECONDS,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("uuids", "workers"),
    [
        pytest.param(["hang"], 1, id="the main thread is idle"),
        pytest.param(["hang", "endless"], 1, id="the main thread is in a task"),
        pytest.param(["hang", "stubborn"], 1, id="the main thread is in a task that nothing interrupts"),
        pytest.param(["hang", "stubborn", "stubborn"], 3, id="all workers are in tasks"),
    ],
)
def test_process_with_a_stuck_client_ends_with_status_70(uuids: list[str], workers: int) -> None:
    status, output = run_program(*uuids, workers=workers)
    assert status == 70, output
    assert "the Kafka client has not returned for 1.2 s (client_timeout)" in output


def test_process_with_a_dead_client_thread_ends_with_status_70() -> None:
    status, output = run_program("die")
    assert status == 70, output
    assert "the Kafka client thread has died" in output


def test_client_thread_that_dies_ends_the_consumer_with_its_error(caplog: pytest.LogCaptureFixture) -> None:
    class Unexpected(BaseException):
        """An error that the poller does not handle."""

    consumer = FaultyConsumer()

    def die(*_: object) -> Any:
        raise Unexpected("surprise")

    consumer.current_client.poll = die  # type: ignore[method-assign]
    with ConsumerThread(consumer) as thread:
        ending = thread.join()
    assert isinstance(ending, ClientStuck)
    assert "Unexpected('surprise')" in ending.message
    (line,) = lines(caplog, logging.ERROR)
    assert line == "FaultyConsumer: the Kafka client thread has died: Unexpected('surprise')"
    assert consumer.current_client.closed == 1


# -- a final error -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activity", ["poll", "commit"])
def test_fenced_consumer_begins_nothing_more(activity: str, caplog: pytest.LogCaptureFixture) -> None:
    ScriptedTask.script["1"] = lambda: consumer.current_client.faults.update({activity: FENCED})
    send_messages("1", "2", "3", "4")
    consumer = FaultyConsumer(MANUAL_COMMIT, max_in_flight=1)
    with ConsumerThread(consumer) as thread:
        ending = thread.join()
    assert ending is FENCED
    assert exit_status(ending) == ExitStatus.FENCED == 76
    assert ScriptedTask.ran[:1] == ["1"]
    assert len(ScriptedTask.ran) <= 2, "at most the record that was fetched before the error"
    assert lines(caplog, logging.ERROR) == [f"FaultyConsumer: {FENCED.message}; the consumer ends"]
    assert len(consumer.clients) == 1, "a new client would fence the other process"


def test_fenced_consumer_logs_which_messages_will_run_again(caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()
    ScriptedTask.script["2"] = lambda: gate.wait(WAIT_SECONDS)
    send_messages("1", "2", "3")
    consumer = FaultyConsumer(NO_INTERVAL_COMMIT, workers=2, ordering="partition")
    with ConsumerThread(consumer) as thread:
        wait_until(lambda: ScriptedTask.ran == ["1", "2"])
        consumer.current_client.faults = {"poll": FENCED, "commit": FENCED}
        wait_until(lambda: lines(caplog, logging.ERROR))
        gate.set()
        assert thread.join() is FENCED
    assert lines(caplog, logging.WARNING)[1:] == [
        "FaultyConsumer: messages still run, and will run again, because they cannot be committed: offset 1 of dice[0]",
        "FaultyConsumer: finished messages could not be committed and will be redelivered: dice[0] up to offset 2",
    ]
    assert (ScriptedTask.ran, committed()) == (["1", "2"], 0)


def test_fenced_consumer_does_not_name_running_messages_that_are_committed(caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()
    ScriptedTask.script["1"] = lambda: gate.wait(WAIT_SECONDS)
    send_messages("1")
    consumer = FaultyConsumer(MANUAL_COMMIT, workers=1, commit="before")
    with ConsumerThread(consumer) as thread:
        wait_until(lambda: ScriptedTask.ran == ["1"])
        assert committed() == 1
        consumer.current_client.faults = {"poll": FENCED, "commit": FENCED}
        wait_until(lambda: lines(caplog, logging.ERROR))
        gate.set()
        assert thread.join() is FENCED
    assert not any("run again" in line for line in lines(caplog, logging.WARNING))


@pytest.mark.parametrize(("error", "status"), [(FENCED, 76), (GroupSettingError("the session is too short"), 78)])
def test_final_error_in_the_main_thread_is_an_exit_status(error: ClientError, status: int) -> None:
    consumer = FaultyConsumer()
    consumer.current_client.faults = {"poll": error}
    with pytest.raises(SystemExit) as caught:
        consumer.run()
    assert (caught.value.code, caught.value.__cause__) == (status, error)


def test_setting_that_a_new_client_rejects_ends_the_consumer_with_status_78() -> None:
    class ConsumerWithoutReconnect(FaultyConsumer):
        def _kser_connect(self) -> FaultyClient:
            if self.clients:
                raise SettingError("the password file is gone")
            return super()._kser_connect()

    consumer = ConsumerWithoutReconnect()
    consumer.current_client.faults = {"poll": ClientError("broken", fatal=True)}
    with pytest.raises(SystemExit) as caught:
        consumer.run()
    assert caught.value.code == ExitStatus.SETTING == 78


def test_setting_error_at_the_start_is_status_78(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    consumer = FaultyConsumer()

    def start() -> None:
        raise SettingError("the tables are too old: run upgrade")

    monkeypatch.setattr(consumer._kser_services, "start", start)
    with pytest.raises(SystemExit) as caught:
        consumer.run()
    assert caught.value.code == 78
    assert lines(caplog, logging.ERROR) == ["FaultyConsumer: the tables are too old: run upgrade; the consumer ends"]


def test_step_raises_a_final_error() -> None:
    consumer = FaultyConsumer()
    consumer.current_client.faults = {"poll": FENCED}
    for _ in range(2):
        with pytest.raises(ClientFenced):
            consumer.step(timeout=0)
    consumer.close()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 0),
        (ClientStuck("no"), 70),
        (FENCED, 76),
        (GroupSettingError("no"), 78),
        (SettingError("no"), 78),
        (ClientError("no"), None),
        (RuntimeError("no"), None),
    ],
)
def test_exit_status_of_each_error(error: Exception | None, status: int | None) -> None:
    assert exit_status(error) == status


def test_orderly_end_is_status_0() -> None:
    consumer = FaultyConsumer()
    consumer.stop()
    with pytest.raises(SystemExit) as caught:
        consumer.run()
    assert caught.value.code == ExitStatus.OK == 0
    assert isinstance(consumer, BaseConsumer)
    assert consumer.assignment <= {Partition("dice", 0)}
