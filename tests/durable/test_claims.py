"""Tests of claims: only the owner of a claim can record."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
from cdumay_result import Result

from kser.durable.context import DurabilitySettings
from kser.errors import SettingError, StoreUnavailable
from kser.retry import Retry
from kser.schemas import OPERATION_KEY, Message
from kser.sequencing.registry import OperationRegistry
from kser.status import FAILED, RUNNING, SUCCESS
from kser.store import retrying
from kser.store.base import Store
from kser.store.memory import MemoryStore
from kser.store.model import ClaimRefused, Mode
from tests.consumer.harness import ScriptedTask, committed
from tests.durable.harness import (
    BOTH_WAYS,
    LEASE_EXPIRED,
    TURN,
    DurableHarness,
    Sale,
    Spread,
    in_other_thread,
    send_raw_message,
)
from tests.store.harness import LEASE, claim_request
from tests.support import lines


def retval(**values: Any) -> Result:
    """A successful result with something in it."""
    return Result(retval=values)


# -- one claim, the root's -----------------------------------------------------------------------------------------


@BOTH_WAYS
def test_running_operation_row_names_its_owner_and_lease(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 6"""
    seen: list[Any] = []
    ScriptedTask.script["1.b"] = lambda: seen.append(harness.stored().operation)
    send_raw_message(cls)
    harness.first.handle()
    (row,) = seen
    assert (row.status, row.step, row.owner) == (RUNNING, 1, harness.first.registry._kser_operations._context.owner)
    assert row.next_check_at - harness.store_harness.now == pytest.approx(LEASE, abs=5)
    after = harness.stored().operation
    assert (after.owner, after.next_check_at) == (None, None)


def test_owner_differs_at_each_start_of_a_process(harness: DurableHarness) -> None:
    """durability rule 6"""
    second = harness.process()
    assert second.registry._kser_operations._context.owner != harness.registry._kser_operations._context.owner


def test_message_of_a_launched_operation_follows_the_stored_mode(harness: DurableHarness) -> None:
    """durability rule 6: a launched operation is distributed even if its class is not."""
    harness.first.class_of(Sale)("1").build().launch()
    send_raw_message(Sale)
    assert harness.first.step() == 2
    assert (harness.stored().operation.mode, ScriptedTask.ran) == (Mode.DISTRIBUTED, ["1.a"])
    harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b", "1.c"]


def test_task_message_of_a_local_operation_runs_nothing(harness: DurableHarness) -> None:
    """durability rule 6"""
    harness.first.class_of(Sale)("1").build().send()
    result = harness.first.run(Message("1.b", ScriptedTask.path, metadata={OPERATION_KEY: "1"}))
    assert (result.retcode, ScriptedTask.ran, harness.stored().operation.mode) == (0, [], Mode.LOCAL)


# -- one compare-and-set -------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_claimed_operation_is_not_claimed_by_another_consumer(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 7"""
    second = harness.process(cls, group="second")
    ScriptedTask.script["1.b"] = in_other_thread(second.handle)
    send_raw_message(cls)
    harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b", "1.c"]
    claim = harness.store.claim("1", "1", claim_request())
    assert isinstance(claim, ClaimRefused)


@BOTH_WAYS
def test_claim_of_a_dead_consumer_is_taken_over_after_lease_expiry(
    harness: DurableHarness, cls: type[Sale], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 7"""
    harness.first.class_of(cls)("1").build().send()
    harness.claim_and_die()
    harness.advance(LEASE - 5)
    harness.first.handle()
    assert (ScriptedTask.ran, committed()) == ([], 1)
    assert f"{cls.path}[1]: nothing to do for this message: held, RUNNING" in lines(caplog, logging.INFO)
    harness.advance(6)
    again = harness.process(cls, group="again")
    again.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ["1.a", "1.b", "1.c"])


@BOTH_WAYS
def test_epoch_always_increases(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 7: not for another attempt, not for a resume."""
    seen: list[int] = []

    def look(then: BaseException | None = None) -> Any:
        def act() -> None:
            seen.append(harness.stored().operation.epoch)
            if then is not None:
                raise then

        return act

    ScriptedTask.script["1.b"] = [look(Retry.later(5)), look(ConnectionError("no")), look(), look()]
    send_raw_message(cls)
    harness.first.handle()
    harness.advance(6)
    harness.first.background_service.reap()
    harness.first.handle()
    while harness.status() != FAILED:
        harness.advance(60)
        harness.first.background_service.reap()
        harness.first.handle()
        ScriptedTask.script["1.b"] = look(ConnectionError("no"))
    ScriptedTask.script["1.b"] = look()
    operation = harness.registry.get("1")
    assert operation is not None
    operation.resume()
    harness.first.handle()
    assert harness.status() == SUCCESS
    assert seen == sorted(set(seen))
    assert harness.stored().operation.epoch > seen[-1]


# -- the fence -----------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_consumer_that_lost_its_claim_is_fenced(
    harness: DurableHarness, cls: type[Sale], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 8: its code ran, and the result of the later claim is the one that is kept."""
    second = harness.process(cls, group="second")

    def late() -> Result:
        in_other_thread(lambda: harness.advance(LEASE_EXPIRED), second.handle)()
        return retval(by="the first")

    ScriptedTask.script["1.b"] = [late, lambda: retval(by="the second")]
    send_raw_message(cls)
    harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b", "1.b", "1.c"]
    operation = harness.registry.get("1")
    assert operation is not None
    assert (operation.status, operation.result.retval) == (SUCCESS, {"by": "the second"})
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]
    (dropped,) = [line for line in lines(caplog, logging.WARNING) if "is dropped" in line]
    assert dropped.startswith(
        f"{cls.path}[1]: the outcome of its step is dropped: another consumer has claimed operation 1, or the operation"
        " has ended"
    )


@BOTH_WAYS
def test_consumer_that_lost_its_claim_neither_runs_nor_sends_the_next_step(
    harness: DurableHarness, cls: type[Sale]
) -> None:
    """durability rule 8"""
    second = harness.process(cls, group="second")
    ScriptedTask.script["1.a"] = [in_other_thread(lambda: harness.advance(LEASE_EXPIRED), second.step), None]
    send_raw_message(cls)
    if cls is Spread:
        # The first one only sends the task.
        harness.first.step()
    harness.first.step()
    if cls is Sale:
        assert ScriptedTask.ran == ["1.a", "1.a", "1.b", "1.c"]
    else:
        assert (ScriptedTask.ran, harness.stored().operation.step) == (["1.a", "1.a"], 1)
        harness.first.handle()
        assert ScriptedTask.ran == ["1.a", "1.a", "1.b", "1.c"]
    assert Counter(kind for kind in harness.event_kinds() if kind == "task-succeeded") == {"task-succeeded": 3}


# -- the heartbeat -------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_heartbeat_renews_the_claim_while_its_task_runs(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 9"""
    second = harness.process(cls, group="second")

    def long() -> None:
        for _ in range(10):
            harness.advance(LEASE / 3)
            harness.first.background_service.renew_leases()

    ScriptedTask.script["1.b"] = in_other_thread(long, second.handle)
    send_raw_message(cls)
    harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b", "1.c"]


def test_heartbeat_renews_only_active_claims(harness: DurableHarness) -> None:
    """durability rule 9: a leaked claim would otherwise be renewed without end."""
    asked: list[Any] = []

    class Asked(Watching):
        def renew(self, claims: Any, owner: str, lease: float) -> Any:
            asked.append(sorted(claims))
            return self._store.renew(claims, owner, lease)

    process = harness.process(Sale, store=Asked(harness.store))
    ScriptedTask.script["1.b"] = in_other_thread(process.background_service.renew_leases)
    harness.first.send(Sale, "other")
    harness.claim_and_die("other")
    send_raw_message(Sale)
    process.background_service.renew_leases()
    process.consumer.REGISTRY.run(Message("1", Sale.path).dumps())
    process.background_service.renew_leases()
    row = harness.stored().operation
    assert asked == [[(row.id, 1)]]


def test_heartbeat_renews_the_claim_after_lease_expiry_without_another_owner(harness: DurableHarness) -> None:
    """durability rule 9: a process that was stopped for long continues."""
    second = harness.process(Sale, group="second")
    ScriptedTask.script["1.b"] = in_other_thread(
        lambda: harness.advance(5 * LEASE),
        harness.first.background_service.renew_leases,
        lambda: harness.advance(LEASE - 5),
        second.handle,
    )
    send_raw_message(Sale)
    harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b", "1.c"]


def test_lost_claim_is_logged_at_the_next_heartbeat(harness: DurableHarness, caplog: pytest.LogCaptureFixture) -> None:
    """durability rule 9"""
    second = harness.process(Sale, group="second")
    ScriptedTask.script["1.b"] = [
        in_other_thread(
            lambda: harness.advance(LEASE_EXPIRED), second.handle, harness.first.background_service.renew_leases
        ),
        None,
    ]
    send_raw_message(Sale)
    harness.first.handle()
    assert f"{Sale.path}[1]: the claim was lost; the result of the running task will not be recorded" in lines(
        caplog, logging.WARNING
    )


@pytest.mark.parametrize(
    "end",
    [None, ConnectionError("no"), SystemExit(3), KeyboardInterrupt()],
    ids=["success", "failure", "SystemExit", "KeyboardInterrupt"],
)
@BOTH_WAYS
def test_every_outcome_releases_the_claim(harness: DurableHarness, cls: type[Sale], end: BaseException | None) -> None:
    """durability rule 9"""
    ScriptedTask.script["1.b"] = end
    send_raw_message(cls)
    try:
        harness.first.handle()
    except KeyboardInterrupt:
        assert isinstance(end, KeyboardInterrupt)
    assert harness.registry._kser_operations._context.active_claims() == []
    assert harness.stored().operation.owner is None


def test_raising_prerun_hook_releases_the_claim(harness: DurableHarness) -> None:
    """durability rule 9"""

    class Bad(Sale):
        def prerun(self) -> None:
            raise ConnectionError("no")

    harness.first.subscribe_copy(Bad)
    send_raw_message(Bad)
    harness.first.handle()
    assert harness.registry._kser_operations._context.active_claims() == []
    assert ScriptedTask.ran == []


# -- a COMMIT of unknown outcome -----------------------------------------------------------------------------------


class Watching:
    """A store that somebody looks over the shoulder of."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class Unsure(Watching):
    """A store whose answer to a call gets lost, the so-manieth one."""

    def __init__(self, store: Store, method: str, number: int, before: bool) -> None:
        super().__init__(store)
        self._left = {method: number}
        self._before = before

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in self._left:
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self._left[name] -= 1
            if self._left[name] or not self._before:
                answer = found(*args, **kwargs)
            if not self._left[name]:
                raise StoreUnavailable("the connection broke")
            return answer

        return call


@pytest.mark.parametrize("before", [True, False], ids=["refused", "acknowledgement lost"])
@pytest.mark.parametrize(
    ("method", "number"), [("save", 1), ("claim", 1), ("claim", 2), *(("checkpoint", number) for number in range(1, 5))]
)
@BOTH_WAYS
def test_store_call_with_unknown_outcome_is_repeated_and_applied_once(
    harness: DurableHarness, cls: type[Sale], method: str, number: int, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 10: the call is repeated with the same arguments and returns the same value."""
    monkeypatch.setattr(retrying, "_BACKOFF", lambda _failures: 0.01)
    process = harness.process(cls, store=Unsure(harness.store, method, number, before), group="unsure")
    send_raw_message(cls)
    process.handle()
    # One that was accepted without its consumer hearing of it is sent by a reaper.
    harness.advance_with_reaper(TURN)
    process.handle()
    assert (harness.status(), harness.tasks(), ScriptedTask.ran) == (SUCCESS, [SUCCESS] * 3, ["1.a", "1.b", "1.c"])
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]
    assert Counter(harness.event_kinds())["task-succeeded"] == 3
    assert Counter(harness.event_kinds())["claimed"] == (1 if cls is Sale else 3)


# -- time ----------------------------------------------------------------------------------------------------------


def test_fast_process_clock_causes_no_lease_expiry(harness: DurableHarness) -> None:
    """durability rule 11: times are compared inside the store."""
    harness.first.send(Sale)
    harness.claim_and_die()
    fast = harness.process(Sale, group="fast")
    fast.clock.advance(100 * LEASE)
    fast.handle()
    assert ScriptedTask.ran == []


def test_timestamps_come_from_the_store(harness: DurableHarness) -> None:
    """durability rule 11"""
    harness.store_harness.advance(1_000_000)
    send_raw_message(Sale)
    harness.first.handle()
    row, _, attempts, events, _ = harness.stored()
    times = [row.created_at, row.started_at, row.ended_at, *(each.ended_at for each in attempts)]
    for at in [*times, *(event.at for event in events)]:
        assert at == pytest.approx(harness.store_harness.now, abs=30)


@BOTH_WAYS
def test_operation_continues_within_five_seconds_of_lease_expiry(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 12"""
    harness.first.class_of(cls)("1").build().send()
    harness.first.consumer._kser_work_queue.pause(True)
    harness.advance_with_reaper(2 * LEASE)
    harness.claim_and_die()
    harness.advance_with_reaper(LEASE + 5 - TURN)
    assert harness.event_kinds().count("sent-again") >= 1
    harness.first.consumer._kser_work_queue.pause(False)
    harness.first.handle()
    assert harness.status() == SUCCESS


def test_durability_settings_have_defaults_and_are_configurable(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 12"""
    terms = DurabilitySettings(harness.registry.settings)
    assert (terms.lease, terms.heartbeat, terms.reaper, terms.resend, terms.max_claims) == (30, 10, 1, 60, 20)
    for name, value in {"LEASE": "60", "REAPER": "0.5", "RESEND": "90", "MAX_CLAIMS": "3"}.items():
        monkeypatch.setenv(f"KSER_{name}", value)
    terms = DurabilitySettings(harness.registry.settings)
    assert (terms.lease, terms.heartbeat, terms.reaper, terms.resend, terms.max_claims) == (60, 20, 0.5, 90, 3)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("KSER_LEASE", "soon", "KSER_LEASE must be a number above 0; it is 'soon'"),
        ("KSER_LEASE", "0", "KSER_LEASE must be a number above 0; it is '0'"),
        ("KSER_RESEND", "-1", "KSER_RESEND must be a number above 0; it is '-1'"),
        ("KSER_HEARTBEAT", "15", r"KSER_HEARTBEAT must be less than half of KSER_LEASE \(30 s\); it is 15 s"),
        ("KSER_MAX_CLAIMS", "nan", "KSER_MAX_CLAIMS must be a whole number above 0; it is 'nan'"),
        ("KSER_MAX_CLAIMS", "0.5", "KSER_MAX_CLAIMS must be a whole number above 0; it is '0.5'"),
    ],
)
def test_invalid_durability_settings_are_rejected_at_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, text: str
) -> None:
    """durability rule 12"""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingError, match=text):
        _ = OperationRegistry(store=MemoryStore())._kser_background_service
