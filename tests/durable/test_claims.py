"""Tests of claims: only the owner of a claim can record."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from typing import Any

import pytest
from cdumay_result import Result

from kser.durable.context import DurabilitySettings
from kser.errors import FencedError, SettingError, StoreUnavailable
from kser.retry import Retry
from kser.schemas import OPERATION_KEY, Message
from kser.sequencing.registry import OperationRegistry
from kser.status import FAILED, RUNNING, SUCCESS
from kser.store import retrying
from kser.store.base import Store
from kser.store.memory import MemoryStore
from kser.store.model import Checkpoint, ClaimRefused, Mode, OperationSnapshot
from tests.consumer.harness import ConsumerThread, ScriptedTask, committed
from tests.durable.harness import (
    BOTH_MODES,
    LEASE_EXPIRED,
    TICK_INTERVAL,
    DistributedSale,
    DurableHarness,
    Process,
    Sale,
    WrappedStore,
    in_other_thread,
    lose_records,
    send_raw_message,
)
from tests.store.harness import LEASE, claim_request
from tests.support import WAIT_SECONDS, lines, wait_until


class LostReplyStore(WrappedStore):
    """A store in which one call ends in an outage.

    :param number: which call of ``method`` it is, counted from 1.
    :param takes_effect: whether the call takes effect, so that only its reply is lost.
    """

    def __init__(self, store: Store, method: str, number: int, takes_effect: bool) -> None:
        super().__init__(store)
        self._calls_left = {method: number}
        self._takes_effect = takes_effect

    def __getattr__(self, name: str) -> Any:
        method = super().__getattr__(name)
        if name not in self._calls_left:
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls_left[name] -= 1
            if self._calls_left[name]:
                return method(*args, **kwargs)
            if self._takes_effect:
                method(*args, **kwargs)
            raise StoreUnavailable("the connection broke")

        return call


class RenewalStore(WrappedStore):
    """A store that records the claims of each renewal."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.renewals: list[list[tuple[int, int]]] = []

    def renew(self, claims: Any, owner: str, lease: float) -> Any:
        self.renewals.append(sorted(claims))
        return self._store.renew(claims, owner, lease)


# -- owner and mode ----------------------------------------------------------------------------------------------------


@BOTH_MODES
def test_running_operation_row_names_its_owner_and_lease(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 6"""
    snapshots: list[OperationSnapshot] = []
    ScriptedTask.script["1.b"] = lambda: snapshots.append(harness.snapshot())
    send_raw_message(cls)
    harness.first.handle()
    (running,) = snapshots
    row = running.operation
    assert (row.status, row.step, row.owner) == (RUNNING, 1, running.attempts[0].consumer)
    assert row.lease_until - harness.store_harness.now == pytest.approx(LEASE, abs=5)
    after = harness.snapshot().operation
    assert (after.owner, after.lease_until, after.take_at) == (None, None, None)


def test_owner_differs_at_each_start_of_a_process(harness: DurableHarness) -> None:
    """durability rule 6"""
    send_raw_message(Sale)
    harness.first.handle()
    second = harness.start_process(Sale, group="second")
    send_raw_message(Sale, uuid="2")
    second.handle()
    assert harness.snapshot("1").attempts[0].consumer != harness.snapshot("2").attempts[0].consumer


def test_message_of_a_launched_operation_follows_the_stored_mode(harness: DurableHarness) -> None:
    """durability rule 6: a launched operation is distributed even if its class is not."""
    harness.first.class_of(Sale)("1").build().launch()
    send_raw_message(Sale)
    assert harness.first.step() == 2
    assert (harness.snapshot().operation.mode, ScriptedTask.ran) == (Mode.DISTRIBUTED, ["1.a"])
    harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b", "1.c"]


def test_task_message_of_a_local_operation_runs_nothing(harness: DurableHarness) -> None:
    """durability rule 6"""
    harness.first.class_of(Sale)("1").build().send()
    result = harness.first.run(Message("1.b", ScriptedTask.path, metadata={OPERATION_KEY: "1"}))
    assert (result.retcode, ScriptedTask.ran, harness.snapshot().operation.mode) == (0, [], Mode.LOCAL)


# -- claims and epochs -------------------------------------------------------------------------------------------------


@BOTH_MODES
def test_claimed_operation_is_not_claimed_by_another_consumer(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 7"""
    second = harness.start_process(cls, group="second")
    ScriptedTask.script["1.b"] = in_other_thread(second.handle)
    send_raw_message(cls)
    harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b", "1.c"]
    claim = harness.store.claim("1", "1", claim_request())
    assert isinstance(claim, ClaimRefused)


@BOTH_MODES
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
    harness.start_process(cls, group="second").handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ["1.a", "1.b", "1.c"])


@BOTH_MODES
def test_epoch_always_increases(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 7: neither a retry nor a resume starts the epochs over."""
    epochs: list[int] = []

    def record_epoch(error: BaseException | None = None) -> Any:
        def action() -> None:
            epochs.append(harness.snapshot().operation.epoch)
            if error is not None:
                raise error

        return action

    ScriptedTask.script["1.b"] = [record_epoch(Retry.later(5)), record_epoch(ConnectionError("no")), record_epoch()]
    send_raw_message(cls)
    harness.first.handle()
    harness.advance(6)
    harness.first.background_service.reap()
    harness.first.handle()
    assert harness.status() == FAILED
    harness.operation().resume()
    harness.first.handle()
    assert harness.status() == SUCCESS
    assert len(epochs) == 3
    assert epochs == sorted(set(epochs))
    assert harness.snapshot().operation.epoch > epochs[-1]


# -- fencing -----------------------------------------------------------------------------------------------------------


@BOTH_MODES
def test_consumer_that_lost_its_claim_is_fenced(
    harness: DurableHarness, cls: type[Sale], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 8: the task ran under both claims, and the result of the later claim is stored."""
    second = harness.start_process(cls, group="second")

    def exceed_the_lease() -> Result:
        in_other_thread(lambda: harness.advance(LEASE_EXPIRED), second.handle)()
        return Result(retval={"by": "the first"})

    ScriptedTask.script["1.b"] = [exceed_the_lease, lambda: Result(retval={"by": "the second"})]
    send_raw_message(cls)
    harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b", "1.b", "1.c"]
    operation = harness.operation()
    assert (operation.status, operation.result.retval) == (SUCCESS, {"by": "the second"})
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]
    (dropped,) = [line for line in lines(caplog, logging.WARNING) if "is dropped" in line]
    assert dropped.startswith(
        f"{cls.path}[1]: the outcome of its step is dropped: another consumer has claimed operation 1, or the operation"
        " has ended"
    )


@BOTH_MODES
def test_consumer_that_lost_its_claim_neither_runs_nor_sends_the_next_step(
    harness: DurableHarness, cls: type[Sale]
) -> None:
    """durability rule 8"""
    second = harness.start_process(cls, group="second")
    ScriptedTask.script["1.a"] = [in_other_thread(lambda: harness.advance(LEASE_EXPIRED), second.step), None]
    send_raw_message(cls)
    if cls is DistributedSale:
        # The first step only sends the message of the first task.
        harness.first.step()
    harness.first.step()
    if cls is Sale:
        assert ScriptedTask.ran == ["1.a", "1.a", "1.b", "1.c"]
    else:
        assert (ScriptedTask.ran, harness.snapshot().operation.step) == (["1.a", "1.a"], 1)
        harness.first.handle()
        assert ScriptedTask.ran == ["1.a", "1.a", "1.b", "1.c"]
    assert harness.event_kinds().count("task-succeeded") == 3


# -- heartbeat ---------------------------------------------------------------------------------------------------------


@BOTH_MODES
def test_heartbeat_renews_the_claim_while_its_task_runs(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 9"""
    second = harness.start_process(cls, group="second")

    def run_for_several_leases() -> None:
        for _ in range(10):
            harness.advance(LEASE / 3)
            harness.first.background_service.renew_leases()

    ScriptedTask.script["1.b"] = in_other_thread(run_for_several_leases, second.handle)
    send_raw_message(cls)
    harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b", "1.c"]


def test_heartbeat_renews_only_active_claims(harness: DurableHarness) -> None:
    """durability rule 9: a leaked claim would otherwise be renewed without end."""
    store = RenewalStore(harness.store)
    process = harness.start_process(Sale, store=store)
    ScriptedTask.script["1.b"] = in_other_thread(process.background_service.renew_leases)
    harness.first.send(Sale, "other")
    harness.claim_and_die("other")
    send_raw_message(Sale)
    process.background_service.renew_leases()
    process.run(Message("1", Sale.path))
    process.background_service.renew_leases()
    assert store.renewals == [[(harness.snapshot().operation.id, 1)]]


def test_heartbeat_renews_the_claim_after_lease_expiry_without_another_owner(harness: DurableHarness) -> None:
    """durability rule 9: a process that was stopped for longer than its lease continues."""
    second = harness.start_process(Sale, group="second")
    ScriptedTask.script["1.b"] = in_other_thread(
        lambda: harness.advance(5 * LEASE),
        harness.first.background_service.renew_leases,
        lambda: harness.advance(LEASE - 5),
        second.handle,
    )
    send_raw_message(Sale)
    harness.first.handle()
    assert ScriptedTask.ran == ["1.a", "1.b", "1.c"]


def test_lost_claim_is_logged_once_at_the_next_heartbeat(
    harness: DurableHarness, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 9"""
    second = harness.start_process(Sale, group="second")
    heartbeats = [harness.first.background_service.renew_leases] * 3
    ScriptedTask.script["1.b"] = [
        in_other_thread(lambda: harness.advance(LEASE_EXPIRED), second.handle, *heartbeats),
        None,
    ]
    send_raw_message(Sale)
    harness.first.handle()
    assert [line for line in lines(caplog, logging.WARNING) if "the claim was lost" in line] == [
        f"{Sale.path}[1]: the claim was lost; the result of the running task will not be recorded"
    ]


@pytest.mark.parametrize(
    "outcome",
    [None, ConnectionError("no"), SystemExit(3), KeyboardInterrupt()],
    ids=["success", "failure", "SystemExit", "KeyboardInterrupt"],
)
@BOTH_MODES
def test_every_outcome_releases_the_claim(
    harness: DurableHarness, cls: type[Sale], outcome: BaseException | None
) -> None:
    """durability rule 9"""
    store = RenewalStore(harness.store)
    process = harness.start_process(cls, store=store, group="second")
    ScriptedTask.script["1.b"] = outcome
    send_raw_message(cls)
    try:
        process.handle()
    except KeyboardInterrupt:
        assert isinstance(outcome, KeyboardInterrupt)
    process.background_service.renew_leases()
    assert store.renewals == []
    assert harness.snapshot().operation.owner is None


def test_raising_prerun_hook_releases_the_claim(harness: DurableHarness) -> None:
    """durability rule 9"""

    class FailingPrerun(Sale):
        def prerun(self) -> None:
            raise ConnectionError("no")

    store = RenewalStore(harness.store)
    process = harness.start_process(FailingPrerun, store=store, group="second")
    send_raw_message(FailingPrerun)
    process.handle()
    assert process.consumer.counts["failed"] == 1
    process.background_service.renew_leases()
    assert store.renewals == []
    assert ScriptedTask.ran == []


def test_released_claim_is_not_logged_as_lost_while_the_next_step_is_sent(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 9"""
    harness.first.send(DistributedSale)
    send = harness.registry.producer.send

    def renew_and_send(*args: Any, **options: Any) -> Any:
        harness.first.background_service.renew_leases()
        return send(*args, **options)

    monkeypatch.setattr(harness.registry.producer, "send", renew_and_send)
    harness.first.handle()
    assert harness.status() == SUCCESS
    assert [line for line in lines(caplog, logging.WARNING) if "was lost" in line] == []


def test_claim_that_cannot_be_released_does_not_affect_the_others(
    harness: DurableHarness, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 9: at the shutdown of a consumer whose running tasks were abandoned."""
    gate = threading.Event()

    class FencedRelease(WrappedStore):
        def checkpoint(self, checkpoint: Checkpoint) -> str:
            is_release = any(event.kind == "released" for event in checkpoint.events)
            if is_release and checkpoint.root_id == harness.snapshot("1").operation.id:
                raise FencedError("the worker has recorded its step")
            return self._store.checkpoint(checkpoint)

    process = harness.start_process(
        Sale,
        store=FencedRelease(harness.store),
        group="second",
        workers=2,
        shutdown_timeout=0,
        consumer_clock=time.monotonic,
    )
    for uuid in ("1", "2"):
        ScriptedTask.script[f"{uuid}.a"] = lambda: gate.wait(WAIT_SECONDS)
        send_raw_message(Sale, uuid=uuid)
    with ConsumerThread(process.consumer) as thread:
        wait_until(lambda: {"1.a", "2.a"} <= set(ScriptedTask.ran))
        process.consumer.stop()
        thread.join()
        owners = [harness.snapshot(uuid).operation.owner for uuid in ("1", "2")]
        gate.set()
    assert owners[0] is not None
    assert owners[1] is None
    assert [line for line in lines(caplog, logging.WARNING) if "could not be released" in line] == [
        "a claim could not be released, and expires with its lease: the worker has recorded its step"
    ]


# -- calls with an unknown outcome -------------------------------------------------------------------------------------


@pytest.mark.parametrize("takes_effect", [False, True], ids=["refused", "reply lost"])
@pytest.mark.parametrize(
    ("method", "number"), [("save", 1), ("claim", 1), ("claim", 2), *(("checkpoint", number) for number in range(1, 5))]
)
@BOTH_MODES
def test_store_call_with_unknown_outcome_is_repeated_and_applied_once(
    harness: DurableHarness,
    cls: type[Sale],
    method: str,
    number: int,
    takes_effect: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """durability rule 10: the call is repeated with the same arguments and returns the same value."""
    monkeypatch.setattr(retrying, "_BACKOFF", lambda _failures: 0.01)
    store = LostReplyStore(harness.store, method, number, takes_effect)
    process = harness.start_process(cls, store=store, group="second")
    send_raw_message(cls)
    process.handle()
    # If the reply of the acceptance was lost, the reaper sends the first step.
    harness.advance_with_reaper(TICK_INTERVAL)
    process.handle()
    assert (harness.status(), harness.task_statuses(), ScriptedTask.ran) == (
        SUCCESS,
        [SUCCESS] * 3,
        ["1.a", "1.b", "1.c"],
    )
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]
    assert Counter(harness.event_kinds())["task-succeeded"] == 3
    assert Counter(harness.event_kinds())["claimed"] == (1 if cls is Sale else 3)


# -- clocks and settings -----------------------------------------------------------------------------------------------


def test_fast_process_clock_causes_no_lease_expiry(harness: DurableHarness) -> None:
    """durability rule 11: times are compared inside the store."""
    harness.first.send(Sale)
    harness.claim_and_die()
    fast = harness.start_process(Sale, group="fast")
    fast.clock.advance(100 * LEASE)
    fast.handle()
    assert ScriptedTask.ran == []


def test_timestamps_come_from_the_store(harness: DurableHarness) -> None:
    """durability rule 11"""
    harness.store_harness.advance(1_000_000)
    send_raw_message(Sale)
    harness.first.handle()
    stored = harness.snapshot()
    row = stored.operation
    times = [row.created_at, row.started_at, row.ended_at]
    times += [attempt.ended_at for attempt in stored.attempts] + [event.at for event in stored.events]
    for recorded_at in times:
        assert recorded_at == pytest.approx(harness.store_harness.now, abs=30)


@BOTH_MODES
def test_operation_continues_within_two_seconds_of_lease_expiry(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 12"""
    harness.first.class_of(cls)("1").build().send()
    harness.advance_with_reaper(2 * LEASE)
    harness.claim_and_die()
    lose_records()
    harness.advance_with_reaper(LEASE - TICK_INTERVAL)
    harness.advance(TICK_INTERVAL + 2)
    harness.first.handle()
    assert harness.status() == SUCCESS


def test_durability_settings_have_defaults_and_are_configurable(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 12"""
    defaults = DurabilitySettings(harness.registry.settings)
    assert vars(defaults) == {
        "lease": 15,
        "heartbeat": 3,
        "look": 0.25,
        "reservation": 5,
        "grace": 0.8,
        "reaper": 1,
        "resend": 60,
        "max_claims": 20,
        "max_sends": 20,
        "unknown_after": 3600,
    }
    values = {"lease": 60, "look": 0.5, "reservation": 8, "reaper": 0.5, "resend": 90, "max_claims": 3, "max_sends": 4}
    for name, value in values.items():
        monkeypatch.setenv(f"KSER_{name.upper()}", str(value))
    configured = DurabilitySettings(harness.registry.settings)
    assert vars(configured) == {**values, "heartbeat": 12, "grace": 0.8, "unknown_after": 3600}


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("KSER_LEASE", "soon", "KSER_LEASE must be a number above 0; it is 'soon'"),
        ("KSER_LEASE", "0", "KSER_LEASE must be a number above 0; it is '0'"),
        ("KSER_RESEND", "-1", "KSER_RESEND must be a number above 0; it is '-1'"),
        ("KSER_HEARTBEAT", "7.5", r"KSER_HEARTBEAT must be less than half of KSER_LEASE \(15 s\); it is 7.5 s"),
        ("KSER_LOOK", "0", "KSER_LOOK must be a number above 0; it is '0'"),
        ("KSER_RESERVATION", "long", "KSER_RESERVATION must be a number above 0; it is 'long'"),
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
        _ = OperationRegistry(store=MemoryStore()).background_service


SECONDS = ("LEASE", "HEARTBEAT", "LOOK", "RESERVATION", "REAPER", "RESEND", "UNKNOWN_AFTER")


@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf", "-inf", "1e400"])
@pytest.mark.parametrize("name", [*SECONDS, "MAX_CLAIMS", "MAX_SENDS"])
def test_impossible_number_in_a_setting_is_rejected(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """durability rule 12"""
    monkeypatch.setenv(f"KSER_{name}", value)
    with pytest.raises(SettingError, match=rf"KSER_{name} must be a (whole )?number above 0; it is '{value}'"):
        _ = OperationRegistry(store=MemoryStore()).background_service


@pytest.mark.parametrize("name", SECONDS)
def test_time_for_which_no_thread_can_wait_is_rejected(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """durability rule 12"""
    monkeypatch.setenv(f"KSER_{name}", "1e10")
    with pytest.raises(SettingError, match=rf"KSER_{name} must be a number of seconds, 100,000,000 or less; it is"):
        _ = OperationRegistry(store=MemoryStore()).background_service


@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf"])
def test_consumer_ends_if_a_durability_setting_is_invalid(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """durability rule 12"""
    monkeypatch.setenv("KSER_LOOK", value)
    process = Process(MemoryStore(), Sale, opens_store=False)
    with ConsumerThread(process.consumer) as thread:
        error = thread.join()
    assert isinstance(error, SettingError)
    assert error.message == f"KSER_LOOK must be a number above 0; it is {value!r}"
