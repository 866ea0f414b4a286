"""Tests of takeovers: a consumer continues the operations of others straight from the store, without a message."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from cdumay_result import Result

from kser.consumer.subscription import Subscription
from kser.dummy.producer import Producer
from kser.durable.execution import fail_unknown_class
from kser.errors import StoreUnavailable
from kser.retry import Retry
from kser.schemas import Message
from kser.sequencing.operation import Operation
from kser.sequencing.registry import OperationRegistry
from kser.sequencing.task import Task
from kser.status import CANCELLED, FAILED, PENDING, RUNNING, SUCCESS
from kser.store.memory import MemoryStore
from kser.store.model import DueReason, DueStep
from tests.consumer.harness import ConsumerThread, ScriptedTask, send_messages
from tests.durable.harness import (
    BOTH_MODES,
    LEASE_EXPIRED,
    DistributedSale,
    DurableHarness,
    Process,
    Sale,
    UnavailableStore,
    lose_records,
    send_raw_message,
    sent_messages,
)
from tests.store.harness import LEASE, RESEND
from tests.support import lines, run_concurrently, wait_until

#: The default of ``KSER_RESERVATION``.
RESERVATION = 5.0

ORDER = ["1.a", "1.b", "1.c"]


def reasons(harness: DurableHarness, kind: str = "taken-over", uuid: str = "1") -> list[str | None]:
    """Return the texts of the events of a kind."""
    return [event.text for event in harness.snapshot(uuid).events if event.kind == kind]


# -- what is taken over ------------------------------------------------------------------------------------------------


@BOTH_MODES
def test_consumer_takes_over_the_operation_of_a_dead_consumer(
    harness: DurableHarness, cls: type[Sale], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rules 12 and 20: expired leases, without a message."""
    harness.leave_expired_claim(cls)
    harness.first.step()
    assert (reasons(harness), ScriptedTask.ran[:1]) == ([DueReason.EXPIRED], ["1.a"])
    assert any(f"of operation 1 is taken over: {DueReason.EXPIRED}" in line for line in lines(caplog, logging.INFO))
    assert "sent-again" not in harness.event_kinds()
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ORDER)


@BOTH_MODES
@pytest.mark.parametrize("delay", [0, 10])
def test_retry_is_taken_over_when_it_is_due(harness: DurableHarness, cls: type[Sale], delay: float) -> None:
    """durability rule 27: by any consumer, and without a message."""
    ScriptedTask.script["1.b"] = [Retry.later(delay), None]
    send_raw_message(cls)
    other = harness.start_process(cls, group="other")
    while "1.b" not in ScriptedTask.ran:
        harness.first.step()
    if delay:
        harness.advance(delay - 0.5)
        other.handle()
        assert ScriptedTask.ran == ["1.a", "1.b"]
        harness.advance(0.5)
    else:
        lose_records()
    sent = len(sent_messages())
    other.step()
    assert (ScriptedTask.ran[:3], reasons(harness)) == (["1.a", "1.b", "1.b"], [DueReason.RETRY])
    other.handle()
    assert harness.status() == SUCCESS
    assert len(sent_messages()) == sent + (cls is DistributedSale)


@BOTH_MODES
def test_resumed_operation_is_taken_over_at_once(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 25: whoever resumes need not send."""
    ScriptedTask.script["1.b"] = [ValueError("no"), None]
    send_raw_message(cls)
    harness.first.handle()
    sent = len(sent_messages())
    harness.operation().resume()
    assert len(sent_messages()) == sent
    harness.first.step()
    assert (reasons(harness), ScriptedTask.ran[:3]) == ([DueReason.RESUMED], ["1.a", "1.b", "1.b"])


@BOTH_MODES
def test_released_operation_is_taken_over_at_once(
    harness: DurableHarness, cls: type[Sale], gate: threading.Event
) -> None:
    """durability rule 30"""
    process = harness.start_process(cls, group="stopped")
    ScriptedTask.script["1.b"] = lambda: gate.wait(60)
    send_raw_message(cls)
    process.stop_during("1.b", gate)
    lose_records()
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran, reasons(harness)[:1]) == (SUCCESS, ORDER, [DueReason.RELEASED])


def test_step_handed_over_and_unclaimed_is_taken_over_after_one_lease(harness: DurableHarness) -> None:
    """durability rule 20: its message lies in a partition of a dead consumer."""
    send_raw_message(DistributedSale)
    while "1.a" not in ScriptedTask.ran:
        harness.first.step()
    harness.first.background_service.record_sends()
    lose_records()
    other = harness.start_process(DistributedSale, group="other")
    harness.advance(LEASE - 1)
    assert other.look() == 0
    harness.advance(2)
    other.handle()
    assert (harness.status(), reasons(harness)) == (SUCCESS, [DueReason.UNCLAIMED])


@BOTH_MODES
def test_operation_that_nobody_claimed_is_taken_over_after_a_minute(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 20: until then, its record may wait in its lane."""
    harness.first.class_of(cls)("1").build().send()
    lose_records()
    harness.advance(RESEND - 1)
    harness.first.handle()
    assert (harness.status(), reasons(harness)) == (PENDING, [])
    harness.advance(2)
    harness.first.handle()
    assert (harness.status(), reasons(harness)[0]) == (SUCCESS, DueReason.UNCLAIMED)


# -- who takes over ----------------------------------------------------------------------------------------------------


def other_topic(process: Process) -> None:
    process.host._subscription = Subscription(["other"])


def unknown_operation(process: Process) -> None:
    process.unsubscribe(Sale)


def unknown_task(process: Process) -> None:
    process.unsubscribe(ScriptedTask)


def paused(process: Process) -> None:
    process.consumer._kser_poller.paused = True


def stopping(process: Process) -> None:
    process.consumer.stop()


@pytest.mark.parametrize(
    "obstacle", [other_topic, unknown_operation, unknown_task, paused, stopping], ids=lambda call: call.__name__
)
def test_consumer_that_may_not_run_a_step_does_not_take_it_over(
    harness: DurableHarness, obstacle: Callable[[Process], None]
) -> None:
    """durability rules 6 and 20: the step is sent if nobody has taken it within a second."""
    harness.leave_expired_claim(Sale)
    obstacle(harness.first)
    assert (harness.first.look(), reasons(harness)) == (0, [])
    assert harness.first.background_service.reap() == 1
    assert (len(sent_messages()), reasons(harness, "sent-again")) == (1, [DueReason.EXPIRED])


def test_distributed_step_needs_only_the_class_of_its_task(harness: DurableHarness) -> None:
    """durability rule 6"""
    harness.leave_expired_claim(DistributedSale)
    harness.first.unsubscribe(DistributedSale)
    assert harness.first.look() == 1


class Nothing(Operation):
    """An operation that no test runs: its registry has a database."""


class SharedClasses(NamedTuple):
    """A process in which two registries with different databases subscribe the same classes."""

    process: Process
    #: The other registry. No operation of the test is in its database.
    other: OperationRegistry


@pytest.fixture(params=["first", "second", "alone"])
def shared_classes(harness: DurableHarness, request: pytest.FixtureRequest) -> SharedClasses:
    """Subscribe the classes to the other registry first, second or alone."""
    process = harness.start_process(Nothing, group="second")
    controller = process.registry.controller
    other = OperationRegistry(None, lambda: controller, producer=Producer({}), store=MemoryStore())
    process.unsubscribe(ScriptedTask)
    for cls in (ScriptedTask, Sale, DistributedSale):
        copy = type(cls.__name__, (cls,), {"__module__": cls.__module__})
        registries = [other, process.registry]
        for registry in registries[:1] if request.param == "alone" else registries:
            registry.subscribe(copy)
        if request.param == "second":
            copy._kser_registry = process.registry
    process.step()
    return SharedClasses(process, other)


@BOTH_MODES
def test_class_of_two_registries_is_taken_over_with_the_database_of_the_operation(
    harness: DurableHarness, cls: type[Sale], shared_classes: SharedClasses
) -> None:
    """durability rule 20b"""
    ScriptedTask.script["1.b"] = [Retry.later(10), None]
    send_raw_message(cls)
    while "1.b" not in ScriptedTask.ran:
        harness.first.step()
    lose_records()
    harness.advance(11)
    shared_classes.process.handle()
    assert (harness.status(), ScriptedTask.ran, reasons(harness)) == (
        SUCCESS,
        ["1.a", "1.b", "1.b", "1.c"],
        [DueReason.RETRY],
    )
    assert not shared_classes.other.find()


@BOTH_MODES
def test_record_of_a_class_of_two_registries_runs_with_the_database_of_its_operation(
    harness: DurableHarness, cls: type[Sale], shared_classes: SharedClasses
) -> None:
    """durability rule 6"""
    harness.first.class_of(cls)("1").build().send()
    shared_classes.process.handle()
    assert (harness.status(), ScriptedTask.ran, reasons(harness)) == (SUCCESS, ORDER, [])
    if shared_classes.process.registry in shared_classes.process.class_of(cls)._kser_registries:
        send_raw_message(cls)
        shared_classes.process.handle()
        assert ScriptedTask.ran == ORDER
    assert not shared_classes.other.find()


def test_consumer_without_partitions_takes_over(harness: DurableHarness) -> None:
    """durability rule 20: its place in the group does not matter."""
    harness.leave_expired_claim(Sale)
    harness.first.poll()
    partitions = harness.first.consumer.assignment
    assert partitions
    harness.first.consumer._kser_partitions.on_revoke(partitions)
    assert harness.first.look() == 1


@pytest.mark.parametrize(
    ("subscription", "taken"),
    [
        (Subscription(["^di.*"]), 1),
        (Subscription(["other", "^x", "^.*ice"]), 1),
        (Subscription(["^ice"]), 0),
        (Subscription(["^di.*"], r"dice"), 0),
    ],
    ids=["match", "several", "no match", "dead letters"],
)
def test_consumer_of_a_pattern_takes_over_the_topics_that_match(
    harness: DurableHarness, subscription: Subscription, taken: int
) -> None:
    """durability rule 20"""
    harness.leave_expired_claim(Sale)
    harness.first.host._subscription = subscription
    assert harness.first.look() == taken


def test_consumers_take_over_each_step_once(harness: DurableHarness) -> None:
    """durability rule 20: by compare-and-set."""
    processes = [harness.first, *(harness.start_process(Sale, group=str(number), workers=8) for number in range(7))]
    for number in range(40):
        harness.first.send(Sale, str(number))
    lose_records()
    harness.advance(RESEND + 1)
    for _ in range(len(processes)):
        # Of consumers that see the same steps at the same time, one gets them, and the others look again later.
        run_concurrently(*[lambda process=process: process.look() for process in processes])  # type: ignore[misc]
    waiting = [item.takeover.label for process in processes for item in process.work_queue.takeovers._waiting]
    assert (len(waiting), len(set(waiting))) == (40, 40)


@pytest.mark.parametrize("workers", [1, 3])
def test_no_more_is_reserved_than_workers_are_free(harness: DurableHarness, workers: int) -> None:
    """durability rule 20"""
    process = harness.start_process(Sale, group="second", workers=workers)
    for number in range(5):
        harness.first.send(Sale, str(number))
    lose_records()
    harness.advance(RESEND + 1)
    assert process.look() == workers
    assert process.look() == workers


@pytest.mark.parametrize(("is_urgent", "taken"), [(True, 1), (False, 0)])
def test_busy_consumer_takes_over_only_one_urgent_step(harness: DurableHarness, is_urgent: bool, taken: int) -> None:
    """durability rule 20: an expired lease or a retry that is due."""
    if is_urgent:
        harness.leave_expired_claim(Sale, uuid="1")
        harness.leave_expired_claim(Sale, uuid="2")
    else:
        harness.first.send(Sale, "1")
        lose_records()
        harness.advance(RESEND + 1)
    send_messages("plain")
    harness.first.poll()
    assert [harness.first.look(), harness.first.look()] == [taken, taken]


def test_process_does_not_take_over_what_its_own_worker_runs(harness: DurableHarness) -> None:
    """durability rule 9: the next heartbeat renews the lease."""
    seen: list[int] = []
    harness.advance_with_reaper(2 * LEASE)

    def let_the_lease_expire() -> None:
        for _ in range(4):
            # The contact with the store continues, but the heartbeat does not.
            harness.first.look()
            harness.advance(LEASE_EXPIRED / 4)
        seen.append(harness.first.look())
        harness.first.background_service.renew_leases()

    ScriptedTask.script["1.b"] = let_the_lease_expire
    send_raw_message(Sale)
    harness.first.handle()
    assert (seen, harness.status(), ScriptedTask.ran, reasons(harness)) == ([0], SUCCESS, ORDER, [])


# -- reservation and claim ---------------------------------------------------------------------------------------------


@BOTH_MODES
def test_owner_that_renews_its_lease_after_a_reservation_keeps_its_claim(
    harness: DurableHarness, cls: type[Sale], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rules 9 and 20: a reservation is no claim."""
    claim = harness.leave_expired_claim(cls)
    assert harness.first.look() == 1
    assert harness.store.renew([(claim.id, claim.epoch)], "a dead consumer", LEASE) == {claim.id}
    assert harness.first.consumer.run_record()
    row = harness.snapshot().operation
    assert (row.epoch, row.owner, row.claim_count, ScriptedTask.ran) == (claim.epoch, "a dead consumer", 1, [])
    assert any("nothing to do for this message: held" in line for line in lines(caplog, logging.INFO))
    harness.first.handle()
    assert ScriptedTask.ran == []


@BOTH_MODES
def test_takeover_of_a_step_that_another_consumer_has_claimed_runs_nothing(
    harness: DurableHarness, cls: type[Sale]
) -> None:
    """durability rules 7 and 20: the epoch is part of the compare."""
    harness.leave_expired_claim(cls)
    assert harness.first.look() == 1
    other = harness.claim_and_die()
    harness.advance(LEASE_EXPIRED + 5)
    harness.first.consumer._kser_work_queue.takeovers._waiting[0].deadline = float("inf")
    assert harness.first.consumer.run_record()
    assert (harness.snapshot().operation.epoch, ScriptedTask.ran) == (other.epoch, [])


@BOTH_MODES
def test_of_a_takeover_and_a_record_of_one_step_one_runs(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 20"""
    claim = harness.leave_expired_claim(cls)
    harness.first.background_service.reap()
    assert harness.first.look() == 1
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ORDER)
    assert harness.snapshot().operation.epoch >= claim.epoch


def test_takeover_that_has_not_begun_when_its_reservation_expires_is_dropped(harness: DurableHarness) -> None:
    """durability rule 20: by the clock of the process, from before the call."""
    harness.leave_expired_claim(Sale)
    assert harness.first.look() == 1
    harness.advance(RESERVATION + 0.1)
    assert not harness.first.consumer.run_record()
    assert ScriptedTask.ran == []
    assert harness.first.look() == 1


def test_reservation_counts_from_before_the_call(harness: DurableHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """durability rule 20"""
    harness.leave_expired_claim(Sale)
    reserve = harness.store.reserve_due_steps

    def reserve_slowly(*args: Any, **options: Any) -> Any:
        steps = reserve(*args, **options)
        harness.first.clock.advance(4)
        return steps

    monkeypatch.setattr(harness.store, "reserve_due_steps", reserve_slowly)
    assert harness.first.look() == 1
    harness.first.clock.advance(1)
    assert not harness.first.consumer.run_record()


def test_consumer_that_ends_gives_its_reservations_back(harness: DurableHarness) -> None:
    """durability rule 30: the next consumer takes the step over at once."""
    harness.leave_expired_claim(Sale)
    assert harness.first.look() == 1
    second = harness.start_process(Sale, group="second")
    assert second.look() == 0
    harness.first.consumer.close()
    harness.first.background_service.close(harness.first.host)
    row = harness.snapshot().operation
    assert row.take_at is not None
    assert row.take_at <= harness.store_harness.now


def test_running_consumer_that_stops_gives_its_reservations_back(
    harness: DurableHarness, gate: threading.Event
) -> None:
    """durability rule 30: while a task still runs."""
    process = harness.start_process(Sale, group="stopped", workers=2)
    ScriptedTask.script["x"] = ScriptedTask.script["y"] = lambda: gate.wait(60)
    ScriptedTask.script["1.a"] = [Retry.later(30), None]
    send_raw_message(Sale)
    harness.first.handle()
    with ConsumerThread(process.consumer):
        send_messages("x", "y")
        wait_until(lambda: {"x", "y"} <= set(ScriptedTask.ran))
        harness.advance(31)
        # All workers are busy, so the urgent takeover waits.
        wait_until(lambda: len(process.work_queue.takeovers) == 1)
        process.consumer.stop()
        wait_until(lambda: (harness.snapshot().operation.take_at or 0) <= harness.store_harness.now)
        gate.set()
    assert ScriptedTask.ran.count("1.a") == 1


def test_cancel_of_a_reserved_step_ends_the_operation_at_once(harness: DurableHarness) -> None:
    """durability rule 24"""
    ScriptedTask.script["1.b"] = [Retry.later(10), None]
    send_raw_message(Sale)
    harness.first.handle()
    harness.advance(11)
    assert harness.first.look() == 1
    assert harness.operation().cancel() == CANCELLED
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (CANCELLED, ["1.a", "1.b"])


def test_record_of_another_topic_claims_nothing(harness: DurableHarness, caplog: pytest.LogCaptureFixture) -> None:
    """durability rule 6: who may write to one topic cannot run the steps of another topic."""
    harness.first.class_of(Sale)("1").build().send(topic="orders")
    (kmsg,) = sent_messages("orders")
    harness.first.consumer.client.send("dice", kmsg.dumps().encode())
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (PENDING, [])
    assert any("nothing to do for this message: of another topic" in line for line in lines(caplog, logging.INFO))


# -- before the claim --------------------------------------------------------------------------------------------------


def test_takeover_that_fails_before_its_claim_waits_twice_as_long_each_time(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rules 17 and 20"""
    ScriptedTask.script["1.a"] = [Retry.later(10)]
    send_raw_message(Sale)
    harness.first.handle()
    harness.advance(11)
    monkeypatch.setattr(type(harness.first.registry.controller), "_onmessage", classmethod(lambda cls, kmsg: 1 / 0))
    waits = []
    for _ in range(4):
        harness.first.handle()
        harness.first.background_service.look(harness.first.host)
        row = harness.snapshot().operation
        assert row.take_at is not None
        waits.append(round((row.take_at - harness.store_harness.now) / RESEND))
        harness.advance(row.take_at - harness.store_harness.now + 0.01)
    assert waits == [1, 2, 4, 8]
    assert row.claim_count == 0


def test_takeover_whose_value_cannot_be_made_waits(harness: DurableHarness, caplog: pytest.LogCaptureFixture) -> None:
    """durability rule 20: the value is the one that the producer would have sent."""

    class FailingProducer(Producer):
        def _onmessage(self, kmsg: Message) -> Message:
            raise ConnectionError("no key server")

    harness.leave_expired_claim(Sale)
    with harness.first.producer_replaced(FailingProducer({})):
        assert harness.first.look() == 0
        harness.first.look()
    assert any("cannot be taken over: no key server" in line for line in lines(caplog))
    assert harness.snapshot().operation.send_count == 1


def test_takeover_runs_with_the_value_that_the_producer_would_have_sent(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 20"""
    seen: list[Any] = []

    class SigningProducer(Producer):
        def _onmessage(self, kmsg: Message) -> Message:
            kmsg.metadata["signature"] = "7"
            return kmsg

    harness.leave_expired_claim(Sale)
    controller = type(harness.first.registry.controller)
    onmessage = controller._onmessage

    def record(cls: type, kmsg: Message) -> Any:
        seen.append(kmsg)
        return onmessage(kmsg)

    monkeypatch.setattr(controller, "_onmessage", classmethod(record))
    with harness.first.producer_replaced(SigningProducer({})):
        harness.first.handle()
    assert [kmsg.metadata["signature"] for kmsg in seen] == ["7"]
    assert harness.status() == SUCCESS


def consumer_without_producer(harness: DurableHarness) -> Process:
    """Return a process whose consumer has made no producer yet, while a retry is due."""
    process = harness.start_process(Sale, producer=None, group="second")
    process.step()
    ScriptedTask.script["1.a"] = [Retry.later(10)]
    send_raw_message(Sale)
    harness.first.handle()
    harness.advance(11)
    return process


def test_takeover_waits_for_a_producer_that_is_being_made_and_blocks_nothing(
    harness: DurableHarness, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 20: an override of ``make_producer`` may wait for a broker."""
    process = consumer_without_producer(harness)
    make = process.consumer._kser_shared_producer._make
    monkeypatch.setattr(process.consumer._kser_shared_producer, "_make", lambda: (gate.wait(60), make())[1])
    for _ in range(3):
        assert process.look() == 0
    row = harness.snapshot().operation
    assert row.take_at is not None
    assert row.take_at <= harness.store_harness.now
    gate.set()
    wait_until(lambda: process.look() == 1)


def test_takeover_tries_again_soon_to_make_a_producer(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 20"""
    process = consumer_without_producer(harness)
    with monkeypatch.context() as patch:
        patch.setattr(process.consumer._kser_shared_producer, "_make", lambda: 1 / 0)
        wait_until(lambda: process.look() == 0 and "the producer cannot be made: division by zero" in caplog.text)
        patch.setattr(process.consumer._kser_shared_producer, "_prepare_at", 0)
        assert process.look() == 0
    assert caplog.text.count("the producer cannot be made") == 1
    wait_until(lambda: process.look() == 1)
    assert harness.snapshot().operation.send_count == 0


# -- outages -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def unavailable(harness: DurableHarness) -> UnavailableStore:
    """Return a store whose calls a test lets fail."""
    return UnavailableStore(harness.store)


@pytest.mark.usefixtures("short_backoff")
def test_reservation_from_before_an_outage_is_dropped(harness: DurableHarness, unavailable: UnavailableStore) -> None:
    """durability rules 21 and 33: the owner could not renew its lease during the outage."""
    process = harness.start_process(Sale, store=unavailable, group="second")
    harness.advance_with_reaper(LEASE, process)
    claim = harness.leave_expired_claim(Sale, process)
    assert process.look() == 1
    claim_call = unavailable._store.claim
    calls: list[Any] = []

    def lose(*args: Any) -> Any:
        calls.append(args)
        raise StoreUnavailable("the database does not respond")

    unavailable._store.claim = lose  # type: ignore[method-assign]
    try:
        assert process.consumer.run_record()
    finally:
        unavailable._store.claim = claim_call  # type: ignore[method-assign]
    row = harness.snapshot().operation
    assert (len(calls), row.epoch, row.send_count, ScriptedTask.ran) == (1, claim.epoch, 0, [])


@pytest.mark.usefixtures("short_backoff")
def test_claim_of_a_takeover_whose_reply_is_lost_is_read_back(
    harness: DurableHarness, unavailable: UnavailableStore
) -> None:
    """durability rule 10"""
    process = harness.start_process(Sale, store=unavailable, group="second")
    harness.advance_with_reaper(LEASE, process)
    harness.leave_expired_claim(Sale, process)
    assert process.look() == 1
    claim_call = unavailable._store.claim

    def lose_reply(*args: Any) -> Any:
        unavailable._store.claim = claim_call  # type: ignore[method-assign]
        claim_call(*args)
        raise StoreUnavailable("the database does not respond")

    unavailable._store.claim = lose_reply  # type: ignore[method-assign]
    process.handle()
    assert (harness.status(), ScriptedTask.ran, harness.event_kinds().count("claimed")) == (SUCCESS, ORDER, 2)


def test_nothing_is_reserved_during_an_outage(
    harness: DurableHarness, unavailable: UnavailableStore, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 33"""
    process = harness.start_process(Sale, store=unavailable, group="second")
    harness.advance_with_reaper(LEASE, process)
    harness.leave_expired_claim(Sale, process)
    unavailable.error = "the database does not respond"
    assert (process.look(), process.look()) == (0, 0)
    assert sum("work in flight waits" in line for line in lines(caplog)) == 1
    unavailable.error = ""
    assert process.look() == 0, "leases are trusted only after one lease of contact"
    harness.advance_with_reaper(LEASE, process)
    assert process.look() == 1


# -- time limits -------------------------------------------------------------------------------------------------------


@BOTH_MODES
def test_time_limit_holds_for_a_takeover(
    harness: DurableHarness, cls: type[Sale], gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 28"""
    process = harness.start_process(cls, group="second", workers=2)
    monkeypatch.setattr(process.class_of(ScriptedTask), "TIME_LIMIT", 5)
    # On a slow machine, the reaper would send the message of the retry before the takeover.
    monkeypatch.setattr(process.background_service, "reap", lambda: 0)
    ScriptedTask.script["1.a"] = [Retry.later(10), lambda: gate.wait(60)]
    send_raw_message(cls)
    harness.first.handle()
    harness.first.consumer.close()
    with ConsumerThread(process.consumer):
        # The records of the operation and of its first task come before the retry is due, so neither can claim it.
        wait_until(lambda: process.consumer.counts["done"] == (1 if cls is Sale else 2))
        harness.advance(10.5)
        wait_until(lambda: ScriptedTask.ran.count("1.a") == 2)
        assert reasons(harness)[-1] == DueReason.RETRY
        harness.advance(6)
        wait_until(harness.has_ended)
        gate.set()
    assert (harness.status(), harness.task_statuses()) == (FAILED, [FAILED, PENDING, PENDING])
    assert "TIME_LIMIT, 5 s" in str(harness.snapshot().attempts[-1].error)


# -- unknown classes ---------------------------------------------------------------------------------------------------


@BOTH_MODES
def test_consumer_that_does_not_know_the_class_of_a_step_leaves_it_to_others(
    harness: DurableHarness, cls: type[Sale], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rules 17 and 18: it claims nothing, acks the record, and logs one ERROR a class and minute."""
    process = harness.start_process(cls, group="second", dead_letter=True)
    process.unsubscribe(ScriptedTask)
    for number in range(3):
        harness.first.class_of(cls)(str(number)).build().send()
    process.handle()
    assert [harness.status(str(number)) for number in range(3)] == [PENDING] * 3
    errors = [line for line in lines(caplog, logging.ERROR) if "does not know class" in line]
    assert len(errors) == 1
    assert f"this consumer of dice does not know class {ScriptedTask.path}" in errors[0]
    assert process.consumer.counts == {"done": 3, "dead_lettered": 0}
    assert process.work_queue.in_flight == 0
    harness.first.handle()
    assert [harness.status(str(number)) for number in range(3)] == [SUCCESS] * 3


def test_consumer_that_does_not_know_the_operation_leaves_it_to_others(harness: DurableHarness) -> None:
    """durability rule 17"""
    harness.first.class_of(Sale)("1").send()
    process = harness.start_process(group="second")
    process.handle()
    assert (harness.status(), harness.snapshot().operation.refusal_count) == (PENDING, 1)
    harness.first.handle()
    assert harness.status() == SUCCESS


def test_local_operation_whose_next_class_is_unknown_is_released(harness: DurableHarness) -> None:
    """durability rules 6 and 17: another consumer continues at this task."""

    class NewTask(ScriptedTask):
        pass

    class MixedSale(Sale):
        def build_tasks(self, **kwargs: Any) -> list[Any]:
            return [ScriptedTask("1.a"), NewTask("1.b"), ScriptedTask("1.c")]

    old = harness.start_process(MixedSale, group="old")
    new = harness.start_process(MixedSale, NewTask, group="new")
    new.class_of(MixedSale)("1").build().send()
    old.handle()
    row = harness.snapshot().operation
    assert (ScriptedTask.ran, row.status, row.step, row.owner) == (["1.a"], RUNNING, 1, None)
    assert row.current_entrypoints == json.dumps([NewTask.path])
    new.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ORDER)


@BOTH_MODES
def test_step_that_no_consumer_knows_fails_after_its_sends_and_can_be_resumed(
    harness: DurableHarness, cls: type[Sale]
) -> None:
    """durability rule 17: refused for its class each time, at least ``max_sends`` times, over an hour."""
    harness.first.class_of(cls)("1").build().send()
    known = harness.first.registry.controller.ENTRYPOINTS.pop(ScriptedTask.path)
    sends = 0
    for _ in range(60):
        harness.first.handle()
        harness.advance(3601)
        sends += harness.first.background_service.reap()
        harness.first.background_service.record_sends()
        if harness.has_ended():
            break
    assert (harness.status(), harness.task_statuses()) == (FAILED, [FAILED, PENDING, PENDING])
    assert 18 <= sends <= 22
    assert "no consumer of topic dice knows class" in harness.operation().result.stderr
    assert ScriptedTask.path in harness.operation().result.stderr
    harness.first.registry.controller.ENTRYPOINTS[ScriptedTask.path] = known
    harness.operation().resume()
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ORDER)


@pytest.mark.parametrize(
    ("unknown", "named"),
    [
        ((Sale,), (Sale,)),
        ((ScriptedTask,), (ScriptedTask,)),
        ((Sale, ScriptedTask), (ScriptedTask, Sale)),
        ((), (ScriptedTask, Sale)),
    ],
)
def test_error_names_the_classes_that_the_consumer_does_not_know(
    harness: DurableHarness, unknown: tuple[type[Task], ...], named: tuple[type[Task], ...]
) -> None:
    """durability rule 17"""
    ScriptedTask.script["1.a"] = [Retry.later(10)]
    send_raw_message(Sale)
    harness.first.handle()
    harness.advance(11)
    row = harness.snapshot().operation
    process = harness.start_process(Sale, group="other")
    for cls in unknown:
        process.unsubscribe(cls)
    context = process.registry._kser_open()
    step = DueStep(
        id=row.id,
        uuid=row.uuid,
        epoch=row.epoch,
        target=row.target,
        reason=DueReason.UNKNOWN_CLASS,
        take_at=row.take_at or 0,
    )
    fail_unknown_class(context, step)
    names = " and ".join(cls.path for cls in named)
    assert f"no consumer of topic dice knows class {names}" in harness.operation().result.stderr
    assert harness.status() == FAILED


# -- the heartbeat -----------------------------------------------------------------------------------------------------


def test_no_send_and_no_takeover_delays_the_heartbeat(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    """durability rule 9: it has a thread of its own."""
    monkeypatch.setenv("KSER_HEARTBEAT", "0.02")
    blocked: list[str] = []

    class BlockedProducer(Producer):
        def send(self, topic: str, kmsg: Message, timeout: float = 60, **options: Any) -> Any:
            blocked.append(kmsg.uuid)
            gate.wait(60)
            return Result(uuid=kmsg.uuid)

    process = harness.start_process(Sale, group="second", producer=BlockedProducer({}))
    renewed: list[Any] = []
    beat = process.background_service._heartbeat._renew
    monkeypatch.setattr(process.background_service._heartbeat, "_renew", lambda keys: (renewed.append(1), beat(keys)))
    harness.first.class_of(Sale)("1").build().send(topic="nobody")
    harness.advance(RESEND + 1)
    store = harness.store_harness.other
    reserve = store.reserve_due_steps

    def blocked_look(*args: Any, **options: Any) -> Any:
        blocked.append("look")
        gate.wait(60)
        return reserve(*args, **options)

    monkeypatch.setattr(store, "reserve_due_steps", blocked_look)
    with ConsumerThread(process.consumer):
        wait_until(lambda: {"look", "1"} <= set(blocked))
        before = len(renewed)
        wait_until(lambda: len(renewed) > before + 3)
        gate.set()


def test_heartbeat_thread_ends_with_the_last_consumer_of_the_process(harness: DurableHarness) -> None:
    """durability rule 9"""

    def heartbeats() -> int:
        return sum(thread.name in ("kser-heartbeat", "kser-reaper") for thread in threading.enumerate())

    service, other = harness.first.background_service, object()
    service.start(harness.first.host)
    service.start(harness.first.host)
    service.start(other)  # type: ignore[arg-type]
    assert heartbeats() == 2
    service.close(harness.first.host)
    assert heartbeats() == 2
    service.close(other)  # type: ignore[arg-type]
    wait_until(lambda: heartbeats() == 0)


def test_heartbeat_of_a_running_consumer_uses_a_renewer_of_its_own(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    """durability rule 9: a connection of its own."""
    monkeypatch.setenv("KSER_HEARTBEAT", "0.02")
    process = harness.start_process(Sale, group="second")
    timeouts: list[float] = []
    lease_renewer = harness.store_harness.other.lease_renewer

    def record(timeout: float) -> Any:
        timeouts.append(timeout)
        return lease_renewer(timeout)

    monkeypatch.setattr(harness.store_harness.other, "lease_renewer", record)
    ScriptedTask.script["1.b"] = lambda: gate.wait(60)
    send_raw_message(Sale)
    with ConsumerThread(process.consumer):
        wait_until(lambda: "1.b" in ScriptedTask.ran)
        lease = harness.snapshot().operation.lease_until
        wait_until(lambda: harness.snapshot().operation.lease_until != lease)
        gate.set()
    assert timeouts == [0.02]
