"""Tests of the grace period before a claim, in which an owner may renew its expired lease, and of busy consumers.

An owner that lives may be unable to renew its lease, because its row or the whole database is locked. The lock may end
at the moment at which another consumer searches for due steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from kser.durable.heartbeat import LOCK_INTERVAL, OUTAGE_INTERVAL, Heartbeat
from kser.errors import StoreUnavailable
from kser.retry import Retry
from kser.schemas import OPERATION_KEY, Message
from kser.status import RUNNING, SUCCESS
from kser.store import retrying
from kser.store.base import Renewal
from kser.store.memory import MemoryStore
from kser.store.model import Claim, OperationQuery
from tests.consumer.harness import ConsumerThread, ScriptedTask
from tests.durable.harness import (
    BOTH_MODES,
    DurableHarness,
    Process,
    Sale,
    lose_records,
    send_raw_message,
)
from tests.durable.test_nested_operations import Inner, Innermost, Outer
from tests.store.harness import LEASE, new_operation, reserve
from tests.support import lines, wait_until

pytestmark = pytest.mark.usefixtures("bus")

ORDER = ["1.a", "1.b", "1.c"]
GRACE = 0.8


def during_grace_period(process: Process, call: Callable[[], object]) -> list[float]:
    """Make a call in each grace period of a process; return a list of the lengths of these periods."""
    periods: list[float] = []

    def sleep(seconds: float) -> None:
        if seconds:
            periods.append(seconds)
            call()

    process.background_service._context.sleep = sleep
    return periods


# -- takeovers and records ---------------------------------------------------------------------------------------------


@BOTH_MODES
@pytest.mark.parametrize("by_record", [False, True], ids=["takeover", "record"])
@pytest.mark.parametrize("renews", [True, False], ids=["owner lives", "owner is gone"])
def test_owner_may_renew_its_lease_before_another_consumer_claims_the_step(
    harness: DurableHarness, cls: type[Sale], by_record: bool, renews: bool
) -> None:
    """durability rules 9 and 20c"""
    process = harness.start_process(cls, group="second")
    claim = harness.leave_expired_claim(cls, process)
    key = claim.id, claim.epoch
    renew = (lambda: harness.store.renew([key], "the owner", LEASE)) if renews else (lambda: None)
    periods = during_grace_period(process, renew)
    if by_record:
        process.work_queue.takeovers.close()
        harness.first.registry.producer.send("dice", claim_message(claim))
    process.handle()
    assert periods == pytest.approx([GRACE])
    if renews:
        row = harness.snapshot().operation
        assert (ScriptedTask.ran, row.owner, row.epoch) == ([], "the owner", claim.epoch)
        assert "taken-over" not in harness.event_kinds()
    else:
        assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ORDER)
        assert harness.event_kinds().count("taken-over") == (not by_record)


def claim_message(claim: Claim) -> Any:
    """Return the message of a claimed step."""
    target = claim.root.target
    return Message(target.uuid, target.entrypoint, metadata={OPERATION_KEY: claim.root.uuid})


def test_takeover_whose_reservation_expires_in_its_grace_period_is_dropped(harness: DurableHarness) -> None:
    """durability rule 20b: it counts as no takeover, so nothing is postponed."""
    process = harness.start_process(Sale, group="second")
    harness.leave_expired_claim(Sale, process)
    during_grace_period(process, lambda: harness.advance(6))
    process.step()
    assert (ScriptedTask.ran, harness.snapshot().operation.epoch) == ([], 1)
    assert harness.snapshot().operation.send_count == 0
    during_grace_period(process, lambda: None)
    process.handle()
    assert harness.status() == SUCCESS


@pytest.mark.parametrize("by_record", [False, True], ids=["takeover", "record"])
def test_step_in_its_grace_period_is_given_back_at_shutdown(
    harness: DurableHarness, by_record: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 30"""
    process = harness.start_process(Sale, group="second", workers=2)
    claim = harness.leave_expired_claim(Sale, process)
    if by_record:
        monkeypatch.setattr(process.host, "free_workers", lambda: 0)
        monkeypatch.setattr(process.host, "may_hold_urgent", lambda: False)
        harness.first.registry.producer.send("dice", claim_message(claim))
    during_grace_period(process, process.stop_gracefully)
    with ConsumerThread(process.consumer) as thread:
        thread.join()
    row = harness.snapshot().operation
    assert (ScriptedTask.ran, row.epoch) == ([], 1)
    assert row.take_at is not None
    assert row.take_at <= harness.store_harness.now


def test_retry_waits_for_no_grace_period(harness: DurableHarness) -> None:
    """durability rule 27: it has no owner."""
    ScriptedTask.script["1.b"] = [Retry.later(5), None]
    periods = during_grace_period(harness.first, lambda: None)
    send_raw_message(Sale)
    harness.first.handle()
    harness.advance(5.1)
    harness.first.handle()
    assert (harness.status(), periods) == (SUCCESS, [])


# -- looks -------------------------------------------------------------------------------------------------------------


@BOTH_MODES
def test_consumer_looks_again_as_soon_as_a_worker_is_free(
    harness: DurableHarness, cls: type[Sale], monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 20: many due steps do not wait for one look each."""
    monkeypatch.setenv("KSER_LOOK", "60")
    monkeypatch.setenv("KSER_REAPER", "60")
    process = harness.start_process(cls, group="second", workers=2)
    for number in range(20):
        harness.first.class_of(cls)(str(number)).build().send(topic="dice")
        row = harness.snapshot(str(number)).operation
        harness.store.cancel(row.uuid, None)
        harness.store.resume(row.uuid, harness.snapshot(row.uuid).operation.epoch, f"token {number}")
    lose_records()
    with ConsumerThread(process.consumer):
        wait_until(lambda: all(harness.status(str(number)) == SUCCESS for number in range(20)))


def test_busy_consumer_leaves_a_due_retry_to_idle_consumers_at_first(harness: DurableHarness) -> None:
    """durability rule 20d: it holds only what nobody has taken for half a second, and not for long."""
    ScriptedTask.script["1.b"] = [Retry.later(5), None]
    seen: list[int] = []
    process = harness.start_process(Sale, group="second")

    def hold() -> None:
        harness.advance(5.1)
        seen.append(process.look())
        harness.advance(0.5)
        seen.append(process.look())
        take_at = harness.snapshot().operation.take_at
        assert take_at == pytest.approx(harness.store_harness.now + GRACE + 1, abs=1)

    ScriptedTask.script["other"] = hold
    send_raw_message(Sale)
    harness.first.handle()
    process.handle()
    harness.first.registry.producer.send("dice", Message("other", ScriptedTask.path))
    process.step()
    assert seen == [0, 1]


# -- the heartbeat -----------------------------------------------------------------------------------------------------


class ScriptedRenewer:
    """A renewer of leases with scripted outcomes."""

    def __init__(self, *outcomes: Any) -> None:
        self._outcomes = list(outcomes)
        self.renewed: list[list[int]] = []

    def renew(self, claims: Any, owner: str, lease: float) -> Renewal:
        self.renewed.append(sorted(root_id for root_id, _ in claims))
        outcome = self._outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return Renewal({root_id for root_id, _ in claims}, set(outcome))

    def close(self) -> None:
        """Do nothing."""


class StuckClaim:
    """An active claim whose task runs."""

    label, is_abandoned = "a task", False

    def __init__(self, root_id: int) -> None:
        self.key = root_id, 1


def heartbeat_of(harness: DurableHarness, *outcomes: Any) -> tuple[Heartbeat, ScriptedRenewer]:
    """Return a heartbeat whose process holds the claims 1 and 2."""
    context, renewer = harness.first.background_service._context, ScriptedRenewer(*outcomes)
    for root_id in (1, 2):
        context.register_claim(StuckClaim(root_id))  # type: ignore[arg-type]
    heartbeat = Heartbeat(context)
    heartbeat._own.renewer = renewer
    return heartbeat, renewer


def test_heartbeat_tries_locked_rows_again_at_short_intervals(harness: DurableHarness) -> None:
    """durability rule 9"""
    heartbeat, renewer = heartbeat_of(harness, [2], [2], [2], [], [])
    interval = harness.first.background_service._context.settings.heartbeat
    harness.advance(interval)
    waits = []
    for _ in range(2):
        waits.append(heartbeat._beat())
        harness.advance(LOCK_INTERVAL)
    harness.advance(interval)
    waits += [heartbeat._beat(), heartbeat._beat()]
    # The locked claim is tried alone, and all claims at the next heartbeat.
    assert (waits, renewer.renewed) == ([LOCK_INTERVAL] * 3 + [interval], [[1, 2], [2], [1, 2], [2]])
    assert LOCK_INTERVAL < GRACE / 2
    assert OUTAGE_INTERVAL < GRACE / 2


def test_heartbeat_reports_once_that_leases_are_not_renewed(
    harness: DurableHarness, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 33"""
    caplog.set_level(logging.INFO, "kser")
    locked = StoreUnavailable("the database is locked")
    heartbeat, renewer = heartbeat_of(harness, *[locked] * 40, [], locked, [])
    for _ in range(40):
        assert heartbeat._beat() == OUTAGE_INTERVAL
        harness.advance(0.25)
    for _ in range(3):
        heartbeat._beat()
        harness.advance(3)
    assert len(renewer.renewed) == 43
    assert [line for line in lines(caplog, logging.INFO) if "leases" in line] == [
        "the leases of the running operations were not renewed for 8 s, and other consumers take the operations over"
        " after 15 s: the database is locked",
        "the leases of the running operations are renewed again",
    ]


# -- outages -----------------------------------------------------------------------------------------------------------


def test_read_does_not_end_an_outage_of_writes(caplog: pytest.LogCaptureFixture, short_backoff: None) -> None:
    """durability rule 33: a locked or read-only database answers reads."""
    caplog.set_level(logging.INFO, "kser")

    class LockedStore(MemoryStore):
        is_locked = True

        def save(self, *args: Any) -> Any:
            if self.is_locked:
                raise StoreUnavailable("the database is locked")
            return super().save(*args)

    direct = LockedStore()
    store = retrying.RetryingStore(direct)
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            store.save(new_operation(1))
        store.get_operation("1")
        store.find(OperationQuery(), 5)
        assert reserve(store, known=[]) == []
    direct.is_locked = False
    store.get_operation("1")
    store.save(new_operation(1))
    assert [line.partition(";")[0] for line in lines(caplog, logging.INFO) if line.startswith("Store")] == [
        "Store: the database is locked",
        "Store: the database works again",
    ]


# -- classes -----------------------------------------------------------------------------------------------------------


def test_message_of_an_operation_whose_task_is_unknown_is_left_to_others(harness: DurableHarness) -> None:
    """durability rules 6 and 17: also the operation's own message, which arrives again."""
    ScriptedTask.script["1.b"] = [Retry.later(5), None]
    send_raw_message(Sale)
    harness.first.handle()
    harness.advance(5.1)
    process = harness.start_process(Sale, group="second")
    process.unsubscribe(ScriptedTask)
    process.handle()
    row = harness.snapshot().operation
    assert (row.status, row.owner, ScriptedTask.ran) == (RUNNING, None, ["1.a", "1.b"])
    harness.first.handle()
    assert harness.status() == SUCCESS


@pytest.mark.parametrize("unknown", [Inner, Innermost], ids=["nested", "nested deeper"])
def test_consumer_that_does_not_know_a_nested_operation_does_not_take_it_over(
    harness: DurableHarness, unknown: type[Any]
) -> None:
    """durability rule 6: a new version of the code is deployed to one consumer after the other."""
    for cls in (Outer, Inner, Innermost):
        harness.first.subscribe_copy(cls)
    ScriptedTask.script["1.in.deep.leaf"] = [Retry.later(5), None]
    send_raw_message(Outer)
    harness.first.handle()
    assert ScriptedTask.ran[-1] == "1.in.deep.leaf"
    harness.advance(5.1)
    process = harness.start_process(Outer, Inner, Innermost, group="second")
    process.unsubscribe(unknown)
    lose_records()
    process.handle()
    assert (harness.status(), ScriptedTask.ran.count("1.in.deep.leaf")) == (RUNNING, 1)
    process.subscribe_copy(unknown)
    process.handle()
    assert harness.status() == SUCCESS


@BOTH_MODES
def test_first_step_after_a_step_that_killed_consumers_is_not_delayed(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 22: the delay of a takeover belongs to the step that has ended."""
    process = harness.start_process(cls, group="second")
    harness.first.class_of(cls)("1").build().send()
    lose_records()
    for _ in range(5):
        harness.claim_and_die()
        harness.advance(LEASE + 20)
    row = harness.snapshot().operation
    assert row.claim_count == 5
    claims: list[tuple[float, float]] = []
    ScriptedTask.script["1.b"] = lambda: claims.append(
        (harness.snapshot().operation.take_at or 0, harness.snapshot().operation.lease_until or 0)
    )
    harness.advance_with_reaper(LEASE + 1, process)
    process.handle()
    assert harness.status() == SUCCESS
    assert [take_at - lease_until for take_at, lease_until in claims] == pytest.approx([0], abs=0.01)
