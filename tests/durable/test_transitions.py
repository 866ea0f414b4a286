"""Tests of the status transitions of stored operations, and of their signals."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from kser import signals
from kser.status import CANCELLED, FAILED, FINAL, PENDING, RUNNING, SUCCESS, TRANSITIONS, can_transition
from tests.consumer.harness import ScriptedTask
from tests.durable.harness import (
    BOTH_MODES,
    DurableHarness,
    Sale,
    in_other_thread,
    send_raw_message,
)
from tests.support import lines


@BOTH_MODES
@pytest.mark.parametrize("course", ["success", "failure", "cancel", "resume"])
def test_emitted_status_changes_are_transitions_of_the_table(
    harness: DurableHarness, cls: type[Sale], course: str
) -> None:
    """durability rule 26"""
    changes: list[Any] = []

    def record_change(sender: Any, old: Any, new: str, **_: Any) -> None:
        changes.append((old, new))

    with signals.operation_changed.connected_to(record_change):
        if course in ("failure", "resume"):
            ScriptedTask.script["1.b"] = [ConnectionError("no"), None]
        if course == "cancel":
            ScriptedTask.script["1.b"] = in_other_thread(lambda: harness.store.cancel("1", None))
        harness.first.class_of(cls)("1").build().send()
        harness.first.handle()
        if course == "resume":
            harness.operation().resume()
            harness.first.handle()
    expected = {
        "success": [(RUNNING, SUCCESS)],
        "failure": [(RUNNING, FAILED)],
        "cancel": [(RUNNING, CANCELLED)],
        "resume": [(RUNNING, FAILED), (FAILED, RUNNING), (RUNNING, SUCCESS)],
    }
    assert changes == [(None, PENDING), (PENDING, RUNNING), *expected[course]]
    assert all(can_transition(old, new) for old, new in changes if old is not None)


def test_final_statuses_have_no_transition_except_a_resume() -> None:
    """durability rule 26"""
    assert {SUCCESS, FAILED, CANCELLED} == FINAL
    assert {status: set(TRANSITIONS[status]) for status in FINAL} == {
        SUCCESS: set(),
        FAILED: {RUNNING},
        CANCELLED: {RUNNING},
    }


@BOTH_MODES
def test_each_transition_is_emitted_after_its_commit(harness: DurableHarness, cls: type[Sale]) -> None:
    changes: list[Any] = []

    def record_operation(sender: Any, uuid: str, entrypoint: str, old: Any, new: str, result: Any) -> None:
        changes.append((old, new, harness.status(uuid), sender is harness.registry))

    def record_task(sender: Any, operation: str, position: int, new: str, attempt: int, error: Any) -> None:
        changes.append((position, new, harness.task_statuses(operation)[position], attempt))

    with (
        signals.operation_changed.connected_to(record_operation),
        signals.task_changed.connected_to(record_task),
    ):
        harness.first.class_of(cls)("1").build().send()
        harness.first.handle()
    assert changes == [
        (None, PENDING, PENDING, True),
        (PENDING, RUNNING, RUNNING, True),
        (0, SUCCESS, SUCCESS, 1),
        (1, SUCCESS, SUCCESS, 1),
        (2, SUCCESS, SUCCESS, 1),
        (RUNNING, SUCCESS, SUCCESS, True),
    ]


@BOTH_MODES
def test_transitions_of_an_operation_received_as_a_message_are_emitted(
    harness: DurableHarness, cls: type[Sale]
) -> None:
    changes: list[Any] = []

    def record_change(sender: Any, old: Any, new: str, **_: Any) -> None:
        changes.append((old, new))

    with signals.operation_changed.connected_to(record_change):
        send_raw_message(cls)
        harness.first.handle()
    assert changes == [(None, PENDING), (PENDING, RUNNING), (RUNNING, SUCCESS)]


def test_second_cancel_emits_no_signal(harness: DurableHarness) -> None:
    changes: list[Any] = []

    def record_change(sender: Any, old: Any, new: str, **_: Any) -> None:
        changes.append((old, new))

    operation = harness.first.class_of(Sale)("1").build().send()
    with signals.operation_changed.connected_to(record_change):
        assert [operation.cancel(), operation.cancel()] == [CANCELLED, CANCELLED]
    assert changes == [(PENDING, CANCELLED)]


def test_raising_listener_is_logged_and_changes_nothing(
    harness: DurableHarness, caplog: pytest.LogCaptureFixture
) -> None:
    def raising(sender: Any, **_: Any) -> None:
        raise ConnectionError("no")

    with signals.operation_changed.connected_to(raising), signals.task_changed.connected_to(raising):
        send_raw_message(Sale)
        harness.first.handle()
    assert harness.status() == SUCCESS
    assert any("a listener of" in line for line in lines(caplog, logging.ERROR))
