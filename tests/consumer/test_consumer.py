"""Tests of the consumer on the in-memory transport, step by step or with its threads."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from kser import lockfiles
from kser.consumer.base import BaseConsumer
from kser.consumer.logs import ConsumerLogger
from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.errors import SettingError
from tests.consumer.harness import MANUAL_COMMIT, FaultyConsumer, ScriptedTask, committed, new_consumer, send_messages
from tests.support import Clock, lines, record_of, records

pytestmark = pytest.mark.usefixtures("bus")


@pytest.fixture
def slow_first_message() -> Clock:
    """Return a clock that the message with the uuid 1 advances by two seconds, so that a step ends after it."""
    clock = Clock()
    ScriptedTask.script["1"] = lambda: clock.advance(2)
    return clock


# -- commits -----------------------------------------------------------------------------------------------------------


def test_messages_are_handled_in_order_and_counted() -> None:
    send_messages("1", "2", "3")
    consumer = new_consumer()
    assert (consumer.step(timeout=0), consumer.step(timeout=0)) == (3, 0)
    assert ScriptedTask.ran == ["1", "2", "3"]
    assert consumer.counts["done"] == 3


@pytest.mark.parametrize(("commit", "seen"), [("after", [0, 1]), ("before", [1, 2])])
def test_manual_commit_happens_after_or_before_its_message(commit: str, seen: list[Any]) -> None:
    """D5, D7"""
    offsets: list[Any] = []
    ScriptedTask.script["1"] = ScriptedTask.script["2"] = lambda: offsets.append(committed())
    send_messages("1", "2")
    new_consumer({**MANUAL_COMMIT, "auto_offset_reset": "earliest"}, commit=commit).run_until_idle()
    assert offsets == seen
    assert committed() == 2


def test_manual_commits_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    send_messages("1", "2")
    new_consumer(MANUAL_COMMIT).step(timeout=0)
    assert lines(caplog).count("Consumer: Manual commit done.") == 2


def test_interval_commits_happen_when_the_interval_is_over(caplog: pytest.LogCaptureFixture) -> None:
    """D7"""
    clock = Clock()
    consumer = new_consumer({"auto_commit_interval_ms": 3000}, clock=clock)
    send_messages("1")
    consumer.step(timeout=0)
    clock.advance(2.9)
    consumer.step(timeout=0)
    assert committed() == 0
    clock.advance(0.2)
    consumer.step(timeout=0)
    assert committed() == 1
    assert "Consumer: Manual commit done." not in lines(caplog)


def test_finished_records_are_committed_at_close() -> None:
    """D7"""
    consumer = new_consumer()
    send_messages("1", "2")
    consumer.step(timeout=0)
    assert committed() == 0
    consumer.close()
    assert committed() == 2


def test_restarted_consumer_continues_behind_the_committed_offset() -> None:
    send_messages("1")
    first = new_consumer()
    first.run_until_idle()
    first.close()
    send_messages("2")
    new_consumer().run_until_idle()
    assert ScriptedTask.ran == ["1", "2"]


def test_consumer_without_a_group_commits_nothing_and_logs_a_warning(
    caplog: pytest.LogCaptureFixture, bus: InMemoryBroker
) -> None:
    """D18"""
    send_messages("1")
    consumer = new_consumer({"group_id": None, **MANUAL_COMMIT, "auto_offset_reset": "earliest"})
    consumer.run_until_idle()
    consumer.close()
    assert (ScriptedTask.ran, bus.committed) == (["1"], {})
    (line,) = lines(caplog, logging.WARNING)
    assert line.startswith("Consumer: without group_id no offset can be committed")
    assert line.endswith("set group_id")


def test_new_group_commits_its_start_position_at_the_assignment() -> None:
    """D17: a group that is killed before its first commit begins again where it began, not behind what has come."""
    send_messages("1")
    new_consumer().step(timeout=0)
    assert committed() == 0
    new_consumer({"group_id": "other"}, commit="before").step(timeout=0)
    assert InMemoryBroker.at("").committed["other", ("dice", 0)].offset == 1


# -- what tasks do to the loop -----------------------------------------------------------------------------------------


def test_interrupt_ends_the_consumer_and_leaves_its_message_uncommitted() -> None:
    """C8"""
    ScriptedTask.script["2"] = KeyboardInterrupt()
    send_messages("1", "2", "3")
    with pytest.raises(KeyboardInterrupt):
        new_consumer().run()
    assert (ScriptedTask.ran, committed()) == (["1", "2"], 1)
    assert Path(os.environ["RUNNING_FILE"]).read_text() == ""


@pytest.mark.parametrize("error", [SystemExit(1), SystemExit(), ValueError("x")])
def test_raising_task_fails_alone_even_with_system_exit(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    """C8"""
    ScriptedTask.script["1"] = error
    send_messages("1", "2")
    assert new_consumer(MANUAL_COMMIT).step(timeout=0) == 2
    assert (ScriptedTask.ran, committed()) == (["1", "2"], 2)
    assert record_of(caplog, f"Controller.Failed: {ScriptedTask.path}[1]")


def test_raising_registry_is_logged_and_its_message_is_committed(caplog: pytest.LogCaptureFixture) -> None:
    """D4"""

    class Raising:
        def run(self, data: Any) -> None:
            raise RuntimeError("registry")

    send_messages("1")
    consumer = new_consumer(MANUAL_COMMIT)
    consumer.REGISTRY = Raising()
    assert consumer.step(timeout=0) == 1
    assert (committed(), consumer.counts["failed"]) == (1, 1)
    record = record_of(caplog, "Consumer: the registry raised an exception at offset 0 of dice[0]")
    assert (record.levelname, bool(record.exc_info)) == ("ERROR", True)


def test_registry_receives_text_or_undecodable_bytes() -> None:
    got: list[Any] = []

    class Collect:
        @staticmethod
        def run(data: Any) -> None:
            got.append(data)

    InMemoryBroker.at("").send("dice", "é".encode())
    InMemoryBroker.at("").send("dice", b"\xff")
    consumer = new_consumer()
    consumer.REGISTRY = Collect
    consumer.step(timeout=0)
    assert got == ["é", b"\xff"]


def test_step_ends_after_a_second_of_work(slow_first_message: Clock) -> None:
    send_messages("1", "2")
    consumer = FaultyConsumer(MANUAL_COMMIT, clock=slow_first_message)
    assert (consumer.step(timeout=0.1), consumer.step(timeout=0.1)) == (1, 1)
    first, second = (timeout for timeout, _, _ in consumer.current_client.polls)
    assert (first, second < 0.05) == (0.1, True)


def test_graceful_shutdown_lets_the_running_message_end_and_starts_no_other() -> None:
    consumer = new_consumer()
    ScriptedTask.script["1"] = consumer.stop
    send_messages("1", "2")
    with pytest.raises(SystemExit) as caught:
        consumer.run()
    assert (caught.value.code, ScriptedTask.ran, committed()) == (0, ["1"], 1)


def test_run_logs_its_settings_and_its_end(caplog: pytest.LogCaptureFixture) -> None:
    consumer = new_consumer()
    ScriptedTask.script["1"] = consumer.stop
    send_messages("1")
    with pytest.raises(SystemExit):
        consumer.run()
    own = [record for record in records(caplog) if record.name == "kser.dummy.consumer"]
    assert [(record.levelname, record.getMessage()) for record in own] == [
        ("INFO", "Consumer.Starting..."),
        (
            "INFO",
            "Consumer: commit=after, workers=1, ordering=key, group=dummy, topics=dice, retry=None, dead letters=None",
        ),
        ("INFO", "Closing consumer and exiting"),
    ]


# -- control files -----------------------------------------------------------------------------------------------------


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
    """D10: looked at every second, logged at most every 30 s."""
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
    assert [limit for _, limit, _ in consumer.current_client.polls] == [0] * 31
    pause.unlink()
    clock.advance(1)
    assert consumer.step(timeout=0) == 1


@pytest.mark.parametrize("buffered", [False, True])
def test_a_paused_consumer_does_not_spin(buffered: bool, slow_first_message: Clock) -> None:
    """A pause may last for hours; also while there are records that were taken before it began."""
    consumer = new_consumer(clock=slow_first_message)
    if buffered:
        send_messages("1", "2")
        consumer.step(timeout=0)
    Path(os.environ["LOCK_FILE"]).touch()
    slow_first_message.advance(1)
    begin = time.monotonic()
    for _ in range(5):
        assert consumer.step(timeout=0.02) == 0
    assert time.monotonic() - begin >= 0.08


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


def test_stop_during_the_terminate_file_check_is_not_lost() -> None:
    """A signal handler runs between any two steps of the interpreter."""

    class Signalled(Consumer):
        def should_stop(self) -> bool:  # type: ignore[override]
            self.stop()
            return False

    send_messages("1")
    assert Signalled({}, ["dice"]).step(timeout=0) == 0
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


def test_a_terminate_file_is_seen_within_a_second_of_work() -> None:
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


def test_a_stale_terminate_file_is_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
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
    class Mine(Consumer):
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
    consumer = Mine({}, ["dice"], clock=clock)
    handled = [consumer.step(timeout=0)]
    send_messages("2")
    clock.advance(1)
    assert [*handled, consumer.step(timeout=0)] == [1, 0]
    assert ScriptedTask.ran == ["cleaned", "1"]


def test_running_file_of_another_process_is_not_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """D9"""
    monkeypatch.setattr(lockfiles, "running_file", lockfiles.RunningFile())
    path = Path(os.environ["RUNNING_FILE"])
    consumer = new_consumer()
    path.write_text("a sibling's")
    consumer.close()
    assert path.read_text() == "a sibling's"
    path.write_text("")


def test_running_file_of_a_dead_process_is_cleared_at_the_start() -> None:
    """D9"""
    path = Path(os.environ["RUNNING_FILE"])
    path.write_text("shop.Pay[1]")
    new_consumer()
    assert path.read_text() == ""


# -- ends --------------------------------------------------------------------------------------------------------------


def test_unexpected_error_ends_the_loop_and_closes_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    consumer = FaultyConsumer()
    monkeypatch.delenv("LOCK_FILE")
    with pytest.raises(KeyError, match="LOCK_FILE"):
        consumer.run()
    assert consumer.current_client.closed == 1


def test_transport_must_implement_connect_and_make_producer() -> None:
    consumer = object.__new__(BaseConsumer)
    for method in (consumer._kser_connect, consumer.make_producer):
        with pytest.raises(NotImplementedError):
            method()


def test_invalid_option_is_rejected_before_a_client_is_created() -> None:
    with pytest.raises(SettingError, match="commit must be one of 'after', 'before', 'never'; it is 'sometimes'"):
        new_consumer(commit="sometimes")
    assert InMemoryBroker.at("").groups == {}


# -- the logger --------------------------------------------------------------------------------------------------------


def test_log_line_begins_with_the_consumer_and_names_the_calling_function(caplog: pytest.LogCaptureFixture) -> None:
    log = ConsumerLogger(logging.getLogger("kser.dummy.consumer"), "Consumer")
    with caplog.at_level(logging.INFO, "kser"):
        log.info("100 % of it", extra={"kmsg": {}})
    (line,) = caplog.records
    caller = "test_log_line_begins_with_the_consumer_and_names_the_calling_function"
    assert (line.getMessage(), line.module, line.funcName) == ("Consumer: 100 % of it", "test_consumer", caller)
    assert line.kmsg == {}  # type: ignore[attr-defined]
