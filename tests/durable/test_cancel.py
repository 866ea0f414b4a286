"""Tests of the cancel of stored operations."""

from __future__ import annotations

from typing import Any

import pytest
from cdumay_result import Result

from kser import attempt, signals
from kser.retry import Retry
from kser.status import CANCELLED, FAILED, PENDING, RUNNING, SUCCESS
from tests.consumer.harness import ScriptedTask
from tests.durable.harness import (
    BOTH_MODES,
    HOOKED,
    LEASE_EXPIRED,
    TICK_INTERVAL,
    DurableHarness,
    HookedSale,
    Sale,
    in_other_thread,
    send_raw_message,
    sent_messages,
)
from tests.store.harness import LEASE


@BOTH_MODES
def test_unclaimed_operation_is_cancelled_at_once(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 24"""
    operation = harness.first.class_of(cls)("1").build().send()
    assert operation.cancel(reason="changed my mind") == CANCELLED
    assert (harness.status(), harness.snapshot().operation.cancel_reason) == (CANCELLED, "changed my mind")
    harness.first.handle()
    assert (ScriptedTask.ran, harness.task_statuses()) == ([], [PENDING] * 3)


@HOOKED
@pytest.mark.usefixtures("hooked_classes")
def test_claimed_operation_is_cancelled_after_its_running_task_without_hooks(
    harness: DurableHarness, cls: type[HookedSale]
) -> None:
    """durability rule 24: the result of the running task is recorded."""
    returned: list[str] = []

    def cancel() -> Result:
        in_other_thread(lambda: returned.append(harness.operation().cancel("enough")))()
        return Result(retval={"b": 1})

    ScriptedTask.script["1.b"] = cancel
    send_raw_message(cls)
    harness.first.handle()
    assert (returned, ScriptedTask.ran, HookedSale.hook_calls) == ([RUNNING], ["1.a", "1.b"], [])
    assert (harness.status(), harness.task_statuses()) == (CANCELLED, [SUCCESS, SUCCESS, PENDING])
    assert (harness.operation().result.retval, harness.event_kinds()[-1]) == ({"b": 1}, "ended")
    assert harness.event_kinds().count("ended") == 1


@BOTH_MODES
@pytest.mark.parametrize("error", [None, ConnectionError("no")], ids=["succeeds", "fails"])
def test_cancel_takes_effect_whether_the_running_task_succeeds_or_fails(
    harness: DurableHarness, cls: type[Sale], error: Exception | None
) -> None:
    """durability rule 24"""

    def cancel() -> None:
        in_other_thread(lambda: harness.store.cancel("1", None))()
        if error is not None:
            raise error

    ScriptedTask.script["1.b"] = cancel
    send_raw_message(cls)
    harness.first.handle()
    assert (harness.status(), harness.task_statuses()[1]) == (CANCELLED, SUCCESS if error is None else FAILED)


@BOTH_MODES
def test_task_sees_a_cancel_request(harness: DurableHarness, cls: type[Sale], monkeypatch: pytest.MonkeyPatch) -> None:
    """durability rule 24: the task may return early."""
    # A task queries the store at most once per interval.
    monkeypatch.setattr(attempt, "CANCEL_CHECK_INTERVAL", 0)
    requests: list[bool] = []

    class CancelledTask(ScriptedTask):
        def run(self) -> Any:
            requests.append(self.cancel_requested)
            harness.store.cancel("1", None)
            requests.append(self.cancel_requested)

    class CancelledSale(cls):  # type: ignore[valid-type,misc]
        def build_tasks(self, **kwargs: Any) -> list[Any]:
            return [CancelledTask("1.x")]

    harness.first.subscribe_copy(CancelledTask)
    harness.first.subscribe_copy(CancelledSale)
    send_raw_message(CancelledSale)
    harness.first.handle()
    assert (requests, harness.status()) == ([False, True], CANCELLED)


@BOTH_MODES
def test_cancel_after_the_last_checkpoint_returns_the_real_status(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 24"""
    send_raw_message(cls)
    harness.first.handle()
    before = harness.snapshot()
    assert harness.operation().cancel() == SUCCESS
    assert harness.snapshot() == before


@BOTH_MODES
def test_cancel_after_lease_expiry_of_a_dead_owner_takes_effect_at_once(
    harness: DurableHarness, cls: type[Sale]
) -> None:
    """durability rule 24"""
    operation = harness.first.class_of(cls)("1").build().send()
    harness.claim_and_die()
    assert operation.cancel() == RUNNING
    harness.advance(LEASE_EXPIRED)
    assert operation.cancel() == CANCELLED
    harness.first.handle()
    assert ScriptedTask.ran == []


@BOTH_MODES
def test_cancel_survives_owner_crash(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 24"""
    operation = harness.first.class_of(cls)("1").build().send()
    harness.claim_and_die()
    operation.cancel()
    harness.advance(LEASE_EXPIRED)
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (CANCELLED, [])


def test_operation_waiting_for_a_retry_is_cancelled_at_once(harness: DurableHarness) -> None:
    """durability rule 24"""
    ScriptedTask.script["1.b"] = Retry.later(100)
    send_raw_message(Sale)
    harness.first.handle()
    assert harness.operation().cancel() == CANCELLED
    harness.advance(101)
    harness.first.background_service.reap()
    harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b"]


@BOTH_MODES
def test_operation_changed_signal_reports_a_cancel(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 24"""
    changes: list[Any] = []

    def record_change(sender: Any, uuid: str, old: Any, new: str, **_: Any) -> None:
        changes.append((uuid, old, new, harness.status(uuid)))

    ScriptedTask.script["1.b"] = in_other_thread(lambda: harness.store.cancel("1", None))
    with signals.operation_changed.connected_to(record_change):
        send_raw_message(cls)
        harness.first.handle()
        harness.first.class_of(cls)("2").build().send().cancel()
    assert ("1", RUNNING, CANCELLED, CANCELLED) in changes
    assert ("2", PENDING, CANCELLED, CANCELLED) in changes


@BOTH_MODES
def test_release_of_an_interrupted_claim_applies_a_pending_cancel(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 24: the change is emitted, and no message is sent."""
    changes: list[Any] = []

    def record_change(sender: Any, old: Any, new: str, **_: Any) -> None:
        changes.append((old, new))

    def cancel_and_interrupt() -> None:
        in_other_thread(lambda: harness.store.cancel("1", None))()
        raise KeyboardInterrupt

    ScriptedTask.script["1.b"] = cancel_and_interrupt
    send_raw_message(cls)
    with signals.operation_changed.connected_to(record_change), pytest.raises(KeyboardInterrupt):
        harness.first.handle()
    assert (harness.status(), changes[-1]) == (CANCELLED, (RUNNING, CANCELLED))
    assert [kmsg.uuid for kmsg in sent_messages()] == (["1"] if cls is Sale else ["1", "1.a", "1.b"])


@BOTH_MODES
def test_poison_message_with_a_pending_cancel_is_cancelled_and_not_run_again(
    harness: DurableHarness, cls: type[Sale]
) -> None:
    """durability rule 24: the task that killed its consumer must not kill the next one."""
    operation = harness.first.class_of(cls)("1").build().send()
    harness.claim_and_die()
    assert operation.cancel("it kills") == RUNNING
    harness.advance_with_reaper(LEASE + 2 * TICK_INTERVAL)
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (CANCELLED, [])
