"""Tests of the consumer on the in-memory transport: commits, exceptions, shutdown and the log."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from kser.consumer.base import BaseConsumer
from kser.consumer.logs import ConsumerLogger
from kser.dummy.broker import InMemoryBroker
from kser.errors import SettingError
from tests.consumer.harness import MANUAL_COMMIT, FaultyConsumer, ScriptedTask, committed, new_consumer, send_messages
from tests.support import Clock, lines, record_of, records

pytestmark = pytest.mark.usefixtures("bus")


# -- commits -----------------------------------------------------------------------------------------------------------


def test_messages_are_handled_in_order_and_counted() -> None:
    send_messages("1", "2", "3")
    consumer = new_consumer()
    assert (consumer.step(timeout=0), consumer.step(timeout=0)) == (3, 0)
    assert ScriptedTask.ran == ["1", "2", "3"]
    assert consumer.counts["done"] == 3


@pytest.mark.parametrize(("commit", "expected"), [("after", [0, 1]), ("before", [1, 2])])
def test_manual_commit_happens_after_or_before_its_message(commit: str, expected: list[Any]) -> None:
    """D5, D7"""
    offsets: list[Any] = []
    ScriptedTask.script["1"] = ScriptedTask.script["2"] = lambda: offsets.append(committed())
    send_messages("1", "2")
    new_consumer({**MANUAL_COMMIT, "auto_offset_reset": "earliest"}, commit=commit).run_until_idle()
    assert offsets == expected
    assert committed() == 2


def test_manual_commits_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    send_messages("1", "2")
    new_consumer(MANUAL_COMMIT).step(timeout=0)
    assert lines(caplog).count("Consumer: Manual commit done.") == 2


def test_interval_commit_happens_at_the_end_of_the_interval(caplog: pytest.LogCaptureFixture) -> None:
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
    """D17: a group that was killed before its first commit restarts at the same position, not behind new records."""
    send_messages("1")
    new_consumer().step(timeout=0)
    assert committed() == 0
    new_consumer({"group_id": "other"}, commit="before").step(timeout=0)
    assert InMemoryBroker.at("").committed["other", ("dice", 0)].offset == 1


# -- exceptions of tasks and registries --------------------------------------------------------------------------------


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

    class RaisingRegistry:
        def run(self, data: Any) -> None:
            raise RuntimeError("registry")

    send_messages("1")
    consumer = new_consumer(MANUAL_COMMIT)
    consumer.REGISTRY = RaisingRegistry()
    assert consumer.step(timeout=0) == 1
    assert (committed(), consumer.counts["failed"]) == (1, 1)
    record = record_of(
        caplog, "Consumer: the message at offset 0 of dice[0] failed, because the registry raised an exception"
    )
    assert (record.levelname, bool(record.exc_info)) == ("ERROR", True)


def test_registry_receives_text_or_undecodable_bytes() -> None:
    values: list[Any] = []

    class RecordingRegistry:
        @staticmethod
        def run(data: Any) -> None:
            values.append(data)

    InMemoryBroker.at("").send("dice", "é".encode())
    InMemoryBroker.at("").send("dice", b"\xff")
    consumer = new_consumer()
    consumer.REGISTRY = RecordingRegistry
    consumer.step(timeout=0)
    assert values == ["é", b"\xff"]


# -- steps and shutdown ------------------------------------------------------------------------------------------------


def test_step_ends_after_a_second_of_work() -> None:
    clock = Clock()
    ScriptedTask.script["1"] = lambda: clock.advance(1)
    send_messages("1", "2")
    consumer = FaultyConsumer(MANUAL_COMMIT, clock=clock)
    assert (consumer.step(timeout=0.1), consumer.step(timeout=0.1)) == (1, 1)
    first, second = consumer.current_client.polls
    assert first.timeout == 0.1
    assert second.timeout < 0.05, "a record is in flight"


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


# -- errors of the consumer --------------------------------------------------------------------------------------------


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


# -- the log -----------------------------------------------------------------------------------------------------------


def test_log_line_begins_with_the_consumer_and_names_the_calling_function(caplog: pytest.LogCaptureFixture) -> None:
    log = ConsumerLogger(logging.getLogger("kser.dummy.consumer"), "Consumer")
    with caplog.at_level(logging.INFO, "kser"):
        log.info("100 % of it", extra={"kmsg": {}})
    (line,) = caplog.records
    caller = "test_log_line_begins_with_the_consumer_and_names_the_calling_function"
    assert (line.getMessage(), line.module, line.funcName) == ("Consumer: 100 % of it", "test_consumer", caller)
    assert line.kmsg == {}  # type: ignore[attr-defined]
