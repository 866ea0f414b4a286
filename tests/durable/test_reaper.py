"""Tests of the reaper: it sends the steps that a dead consumer left behind."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
from cdumay_result import Result

from kser.dummy.producer import Producer
from kser.durable import recovery
from kser.retry import Retry
from kser.schemas import Message
from kser.status import FAILED, PENDING, RUNNING, SUCCESS
from kser.store.model import ClaimRefused, DueReason
from tests.consumer.harness import ConsumerThread, ScriptedTask
from tests.durable.harness import (
    BOTH_MODES,
    LEASE_EXPIRED,
    TAKEOVER_DUE,
    TICK_INTERVAL,
    DistributedSale,
    DurableHarness,
    Sale,
    UnavailableStore,
    UnreachableProducer,
    lose_records,
    send_raw_message,
    sent_messages,
)
from tests.store.harness import LEASE, RESEND, claim_request
from tests.support import lines, run_concurrently, wait_until


def due_reasons(harness: DurableHarness, uuid: str = "1") -> list[str | None]:
    """Return the reasons for which the reaper sent the steps of an operation."""
    return [event.text for event in harness.snapshot(uuid).events if event.kind == "sent-again"]


# -- due steps ---------------------------------------------------------------------------------------------------------


@BOTH_MODES
def test_reaper_sends_the_step_of_a_dead_consumer_after_lease_expiry(
    harness: DurableHarness, cls: type[Sale], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 20: expired leases."""
    harness.first.class_of(cls)("1").build().send()
    harness.claim_and_die()
    lose_records()
    harness.advance_with_reaper(LEASE - TICK_INTERVAL)
    assert sent_messages() == []
    harness.advance_with_reaper(2 * TICK_INTERVAL)
    assert (due_reasons(harness), len(sent_messages())) == ([DueReason.EXPIRED], 1)
    assert any(f"of operation 1 is sent: {DueReason.EXPIRED}" in line for line in lines(caplog, logging.INFO))


@BOTH_MODES
def test_reaper_sends_a_step_that_was_never_sent(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 20: a consumer may die between checkpoint and send."""
    with harness.first.producer_replaced(UnreachableProducer()):
        harness.first.class_of(cls)("1").build().send()
    harness.advance_with_reaper(0)
    assert due_reasons(harness) == []
    harness.advance_with_reaper(TICK_INTERVAL)
    assert (due_reasons(harness), len(sent_messages())) == ([DueReason.UNSENT], 1)


@BOTH_MODES
def test_reaper_sends_a_retry_at_due_at(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 20"""
    ScriptedTask.script["1.b"] = [Retry.later(100), None]
    send_raw_message(cls)
    harness.first.handle()
    harness.advance_with_reaper(95)
    assert due_reasons(harness) == []
    harness.advance_with_reaper(10)
    assert due_reasons(harness) == [DueReason.RETRY]
    harness.first.handle()
    assert harness.status() == SUCCESS


@BOTH_MODES
def test_reaper_resends_an_unclaimed_step_with_growing_backoff(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 20: the record was lost or the topic recreated; the delay doubles from 60 s to an hour."""
    harness.first.class_of(cls)("1").build().send()
    harness.first.consumer.close()
    sent_at: list[float] = []
    started_at = harness.store_harness.now
    for _ in range(700):
        harness.advance(30)
        sent_at += [harness.store_harness.now - started_at] * harness.first.background_service.reap()
        harness.first.background_service.record_sends()
    delays = [round((later - earlier) / RESEND) for earlier, later in itertools.pairwise([0.0, *sent_at])]
    assert delays[:6] == [1, 2, 4, 8, 16, 32]
    assert set(delays[6:]) == {60}
    assert set(due_reasons(harness)) == {DueReason.UNCLAIMED}


@BOTH_MODES
def test_reaper_recovers_a_lost_record_within_a_minute(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 20"""
    harness.first.class_of(cls)("1").build().send()
    lose_records()
    harness.first.consumer.close()
    second = harness.start_process(cls, group="second")
    harness.advance_with_reaper(RESEND + TICK_INTERVAL, second)
    second.handle()
    assert harness.status() == SUCCESS


def test_concurrent_reapers_send_each_step_once(harness: DurableHarness) -> None:
    """durability rule 20: a reaper takes a step by compare-and-set."""
    processes = [harness.first, *(harness.start_process(Sale, group=str(number)) for number in range(7))]
    for number in range(40):
        harness.first.send(Sale, str(number))
    harness.advance(RESEND + 1)
    lose_records()
    counts = run_concurrently(*[process.background_service.reap for process in processes])
    assert sum(counts) == 40
    assert sorted(kmsg.uuid for kmsg in sent_messages()) == sorted(str(number) for number in range(40))


def test_reaper_sends_to_the_stored_topic_with_the_shared_producer(harness: DurableHarness) -> None:
    """durability rule 20: the process of the reaper need not know the class."""
    harness.first.class_of(Sale)("1").build().send(topic="orders")
    second = harness.start_process(group="second", producer=None)
    # The first step attaches the producer of the consumer to the registry.
    second.step()
    harness.advance(RESEND + 1)
    assert second.background_service.reap() == 1
    assert [kmsg.uuid for kmsg in sent_messages("orders")] == ["1", "1"]


def test_reaper_retries_a_failed_send_soon(harness: DurableHarness) -> None:
    """durability rule 20"""
    for number in range(3):
        harness.first.send(Sale, str(number))
    lose_records()
    harness.advance(RESEND + 1)
    with harness.first.producer_replaced(UnreachableProducer()):
        assert harness.first.background_service.reap() == 3
    harness.advance_with_reaper(TICK_INTERVAL)
    assert sorted(kmsg.uuid for kmsg in sent_messages()) == ["0", "1", "2"]


def test_reaper_takes_more_steps_than_one_batch(harness: DurableHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """durability rule 20"""
    monkeypatch.setattr(recovery, "BATCH", 2)
    for number in range(5):
        harness.first.send(Sale, str(number))
    harness.advance(RESEND + 1)
    assert harness.first.background_service.reap() == 5


def test_reaper_survives_an_unexpected_exception(
    harness: DurableHarness, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 20"""
    harness.first.send(Sale)
    lose_records()

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("unexpected error of the driver")

    harness.advance(RESEND + 1)
    with monkeypatch.context() as patch:
        patch.setattr(harness.store, "take_due_steps", fail)
        harness.first.background_service.tick()
    assert any("unexpected error in the heartbeat or the reaper" in line for line in lines(caplog))
    harness.advance_with_reaper(3 * RESEND)
    assert len(sent_messages()) >= 1


def test_running_consumer_continues_lost_steps(harness: DurableHarness) -> None:
    """durability rule 20: the look for due steps has its own thread, and the reaper too."""
    harness.first.class_of(Sale)("1").build().send()
    lose_records()
    harness.store_harness.advance(RESEND + 1)
    with ConsumerThread(harness.first.consumer):
        wait_until(lambda: harness.status() == SUCCESS)
    events = [event.text for event in harness.snapshot().events if event.kind in ("taken-over", "sent-again")]
    assert set(events) == {DueReason.UNCLAIMED}


# -- expired leases ----------------------------------------------------------------------------------------------------


def test_reaper_waits_a_lease_after_an_outage_before_lease_expiry_counts(harness: DurableHarness) -> None:
    """durability rule 21: no owner could renew its lease during the outage."""
    store = UnavailableStore(harness.store)
    process = harness.start_process(Sale, store=store, group="second")
    harness.first.send(Sale)
    harness.claim_and_die()
    harness.advance_with_reaper(2 * TICK_INTERVAL, process)
    store.error = "the database does not respond"
    harness.advance_with_reaper(2 * LEASE, process)
    store.error = ""
    process.background_service.tick()
    assert DueReason.EXPIRED not in due_reasons(harness)
    harness.advance_with_reaper(LEASE - TICK_INTERVAL, process)
    assert DueReason.EXPIRED not in due_reasons(harness)
    harness.advance_with_reaper(2 * TICK_INTERVAL, process)
    assert DueReason.EXPIRED in due_reasons(harness)


def test_reaper_that_just_started_takes_no_expired_leases(harness: DurableHarness) -> None:
    """durability rule 21"""
    harness.first.send(Sale)
    harness.claim_and_die()
    harness.advance(10 * LEASE)
    harness.first.background_service.tick()
    assert due_reasons(harness) == []


def test_reaper_takes_no_expired_leases_after_a_pause_of_its_process(harness: DurableHarness) -> None:
    """durability rule 21: the reaper cannot know whether the owners could reach the database meanwhile."""
    harness.advance_with_reaper(2 * LEASE)
    harness.first.send(Sale)
    harness.claim_and_die()
    harness.advance(2 * LEASE)
    harness.first.background_service.tick()
    assert DueReason.EXPIRED not in due_reasons(harness)


def delay_next_reaper_query(harness: DurableHarness, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the next query for due steps take a number of seconds, as with a locked database."""
    harness.advance(TICK_INTERVAL)
    take_due_steps = harness.store.take_due_steps

    def wait(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(harness.store, "take_due_steps", take_due_steps)
        harness.advance(seconds)
        return take_due_steps(*args, **options)

    monkeypatch.setattr(harness.store, "take_due_steps", wait)


def test_reaper_takes_no_expired_leases_after_a_database_delay(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 21: the owners could not renew their leases during the delay."""
    harness.advance_with_reaper(2 * LEASE)
    harness.first.send(Sale)
    claim = harness.claim_and_die()
    sent_before = len(sent_messages())
    delay_next_reaper_query(harness, monkeypatch, LEASE_EXPIRED)
    harness.first.background_service.tick()
    assert len(sent_messages()) == sent_before
    assert harness.store.renew([(claim.id, claim.epoch)], "a dead consumer", LEASE) == {claim.id}
    assert isinstance(harness.store.claim("1", "1", claim_request("other")), ClaimRefused)


def test_lease_expiry_after_a_database_delay_frees_the_claim_of_a_dead_owner(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 21"""
    harness.advance_with_reaper(2 * LEASE)
    harness.first.send(Sale)
    harness.claim_and_die()
    delay_next_reaper_query(harness, monkeypatch, LEASE_EXPIRED)
    harness.first.background_service.tick()
    harness.advance_with_reaper(LEASE + TICK_INTERVAL)
    harness.first.handle()
    assert harness.status() == SUCCESS


# -- poison messages ---------------------------------------------------------------------------------------------------


@BOTH_MODES
def test_poison_message_fails_its_step_after_too_many_claims_and_can_be_resumed(
    harness: DurableHarness, cls: type[Sale]
) -> None:
    """durability rule 22"""
    harness.first.class_of(cls)("1").build().send()
    for _ in range(20):
        harness.claim_and_die()
        harness.advance(TAKEOVER_DUE)
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran, harness.task_statuses()) == (FAILED, [], [FAILED, PENDING, PENDING])
    operation = harness.operation()
    assert "20 consumers died during this step" in operation.result.stderr
    assert harness.attempts() == []
    operation.resume()
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ["1.a", "1.b", "1.c"])


def test_consumer_deaths_are_counted_per_step(harness: DurableHarness) -> None:
    """durability rule 22: only the claims of one step count."""
    harness.first.class_of(DistributedSale)("1").build().send()
    for name in "abc":
        for _ in range(12):
            harness.claim_and_die()
            harness.advance(TAKEOVER_DUE)
        assert ScriptedTask.ran == ["1.a", "1.b", "1.c"][: "abc".index(name)]
        harness.first.step()
    harness.first.handle()
    assert harness.status() == SUCCESS


def test_exhausted_claims_are_recorded_as_an_event(harness: DurableHarness) -> None:
    """durability rule 22"""
    harness.first.class_of(Sale)("1").build().send()
    for _ in range(20):
        harness.claim_and_die()
        harness.advance(TAKEOVER_DUE)
    assert harness.status() == RUNNING
    harness.first.handle()
    assert harness.event_kinds().count("claimed") == 21
    (text,) = [event.text for event in harness.snapshot().events if event.kind == "exhausted"]
    assert text is not None
    assert text.startswith("20 consumers died")


def test_missing_topics_delay_neither_the_heartbeat_nor_other_operations(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rules 9, 12 and 20"""

    class MissingTopicProducer(Producer):
        def send(self, topic: str, kmsg: Message, timeout: float = 60, **options: Any) -> Any:
            if topic.startswith("missing"):
                harness.advance(timeout)
                return Result(uuid=kmsg.uuid, retcode=500, stderr="there is no such topic")
            return super().send(topic, kmsg, timeout, **options)

    process = harness.start_process(Sale, producer=MissingTopicProducer({}))
    process.class_of(Sale)("dead").build().send()
    lose_records()
    harness.claim_and_die("dead")
    for number in range(6):
        process.class_of(Sale)(f"lost {number}").build().send(topic=f"missing {number}")
    heartbeats, started_at = [0.0], harness.store_harness.now
    renew_leases = process.background_service.renew_leases

    def record_heartbeat() -> None:
        heartbeats.append(harness.store_harness.now - started_at)
        renew_leases()

    # The service keeps the time of each routine under its name.
    record_heartbeat.__name__ = renew_leases.__name__
    monkeypatch.setattr(process.background_service, "renew_leases", record_heartbeat)
    while harness.store_harness.now - started_at < 600:
        process.background_service.tick()
        harness.advance(0.5)
    assert max(later - earlier for earlier, later in itertools.pairwise(heartbeats)) < LEASE * 2 / 3
    assert DueReason.EXPIRED in due_reasons(harness, "dead")
    assert len(harness.snapshot("lost 0").events) < 40
