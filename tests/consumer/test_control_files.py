"""Tests of the control files: pause file, terminate file and running file."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from kser import lockfiles
from kser.dummy.consumer import Consumer
from tests.consumer.harness import FaultyConsumer, ScriptedTask, committed, new_consumer, send_messages
from tests.support import Clock, lines

pytestmark = pytest.mark.usefixtures("bus")


@pytest.fixture
def slow_first_message() -> Clock:
    """Return a clock that the message with the uuid 1 advances by two seconds, so that a step ends after it."""
    clock = Clock()
    ScriptedTask.script["1"] = lambda: clock.advance(2)
    return clock


# -- the pause file ----------------------------------------------------------------------------------------------------


def test_construction_removes_the_pause_file(caplog: pytest.LogCaptureFixture) -> None:
    """D9"""
    path = Path(os.environ["LOCK_FILE"])
    path.touch()
    consumer = new_consumer()
    assert not path.exists()
    assert lines(caplog) == [f"Cleaning existing pause file {path}"]
    path.touch()
    del consumer
    assert path.exists()


def test_paused_consumer_takes_no_message_and_logs_every_30_s(caplog: pytest.LogCaptureFixture) -> None:
    """D10: the pause file is checked every second, and the warning is logged every 30 s."""
    clock = Clock()
    consumer = FaultyConsumer(clock=clock)
    pause = Path(os.environ["LOCK_FILE"])
    pause.touch()
    send_messages("1")
    for _ in range(30):
        assert consumer.step(timeout=0) == 0
        clock.advance(1)
    assert lines(caplog, logging.WARNING) == ["Consumer is paused"]
    consumer.step(timeout=0)
    assert lines(caplog, logging.WARNING) == ["Consumer is paused"] * 2
    assert [poll.limit for poll in consumer.current_client.polls] == [0] * 31
    pause.unlink()
    clock.advance(1)
    assert consumer.step(timeout=0) == 1


@pytest.mark.parametrize("in_flight", [0, 1])
def test_paused_consumer_waits_in_each_poll(in_flight: int, slow_first_message: Clock) -> None:
    """A pause may last for hours, so a paused consumer must not poll in a busy loop, even with records in flight."""
    consumer = FaultyConsumer(clock=slow_first_message)
    if in_flight:
        send_messages("1", "2")
        consumer.step(timeout=0)
    assert consumer.in_flight == in_flight
    Path(os.environ["LOCK_FILE"]).touch()
    slow_first_message.advance(1)
    for _ in range(5):
        assert consumer.step(timeout=0.02) == 0
    assert [poll.timeout for poll in consumer.current_client.polls[-5:]] == [0.02] * 5


def test_pause_delays_records_that_were_already_fetched(slow_first_message: Clock) -> None:
    send_messages("1", "2")
    consumer = new_consumer(clock=slow_first_message)
    pause = Path(os.environ["LOCK_FILE"])
    assert consumer.step(timeout=0) == 1
    pause.touch()
    assert consumer.step(timeout=0) == 0
    pause.unlink()
    slow_first_message.advance(1)
    assert consumer.step(timeout=0) == 1


# -- the terminate file ------------------------------------------------------------------------------------------------


def test_stop_during_the_terminate_file_check_is_not_lost() -> None:
    """A signal handler may run between any two instructions."""

    class StoppedConsumer(Consumer):
        def should_stop(self) -> bool:  # type: ignore[override]
            self.stop()
            return False

    send_messages("1")
    assert StoppedConsumer({}, ["dice"]).step(timeout=0) == 0
    assert ScriptedTask.ran == []


def test_new_terminate_file_ends_a_step_and_is_kept() -> None:
    """D6"""
    send_messages("1")
    path = Path(os.environ["TERMINATE_FILE"])
    path.touch()
    consumer = new_consumer()
    assert (consumer.step(timeout=0), ScriptedTask.ran, path.exists()) == (0, [], True)


def test_terminate_file_ends_a_run_and_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    """D6"""
    path = Path(os.environ["TERMINATE_FILE"])
    path.touch()
    with pytest.raises(SystemExit) as caught:
        new_consumer().run()
    assert (caught.value.code, path.exists()) == (0, True)
    assert lines(caplog)[-1] == "Closing consumer and exiting"


def test_terminate_file_is_noticed_within_a_second_of_work() -> None:
    """D6, D10"""
    send_messages("1", "2", "3")
    clock = Clock()
    consumer = new_consumer(clock=clock)

    def terminate() -> None:
        Path(os.environ["TERMINATE_FILE"]).touch()
        clock.advance(1)

    ScriptedTask.script["1"] = terminate
    assert [consumer.step(timeout=0) for _ in range(3)] == [1, 0, 0]
    consumer.close()
    assert (ScriptedTask.ran, committed()) == (["1"], 1)


def test_stale_terminate_file_is_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """D6"""
    path = Path(os.environ["TERMINATE_FILE"])
    path.touch()
    os.utime(path, (lockfiles.PROCESS_START - 60,) * 2)
    send_messages("1", "2")
    consumer = new_consumer()
    assert consumer.run_until_idle() == 2
    (line,) = lines(caplog, logging.WARNING)
    assert str(path) in line


def test_subclass_may_override_the_control_file_methods() -> None:
    class UserConsumer(Consumer):
        @staticmethod
        def is_active() -> bool:
            return "1" not in ScriptedTask.ran

        @staticmethod
        def should_stop() -> bool:
            return False

        @staticmethod
        def clean_lock() -> None:
            ScriptedTask.ran.append("cleaned")

    send_messages("1")
    clock = Clock()
    consumer = UserConsumer({}, ["dice"], clock=clock)
    handled = [consumer.step(timeout=0)]
    send_messages("2")
    clock.advance(1)
    assert [*handled, consumer.step(timeout=0)] == [1, 0]
    assert ScriptedTask.ran == ["cleaned", "1"]


# -- the running file --------------------------------------------------------------------------------------------------


def test_running_file_of_another_process_is_not_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """D9"""
    monkeypatch.setattr(lockfiles, "running_file", lockfiles.RunningFile())
    path = Path(os.environ["RUNNING_FILE"])
    consumer = new_consumer()
    path.write_text("another process")
    consumer.close()
    assert path.read_text() == "another process"
    path.write_text("")


def test_running_file_of_a_dead_process_is_cleared_at_the_start() -> None:
    """D9"""
    path = Path(os.environ["RUNNING_FILE"])
    path.write_text("shop.Pay[1]")
    new_consumer()
    assert path.read_text() == ""
