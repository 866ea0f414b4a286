"""Tests of the reaper: it sends the steps that a dead consumer left behind."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
from cdumay_result import Result

from kser.dummy.broker import InMemoryBroker
from kser.dummy.producer import Producer
from kser.durable import recovery
from kser.errors import StoreUnavailable
from kser.retry import Retry
from kser.status import FAILED, PENDING, RUNNING, SUCCESS
from kser.store.base import Store
from kser.store.model import DueReason
from tests.consumer.harness import ConsumerThread, ScriptedTask
from tests.durable.harness import (
    BOTH_WAYS,
    LEASE_EXPIRED,
    TURN,
    DurableHarness,
    Process,
    Sale,
    Spread,
    send_raw_message,
    sent_messages,
)
from tests.store.harness import LEASE, RESEND
from tests.support import WAIT_SECONDS, lines, wait_until


def reasons(harness: DurableHarness, uuid: str = "1") -> list[str | None]:
    """Why it was sent again."""
    return [event.text for event in harness.stored(uuid).events if event.kind == "sent-again"]


def forget(topic: str = "dice") -> None:
    """Lose everything that was sent to a topic."""
    for log in InMemoryBroker.at("").topics.get(topic, []):
        log.clear()


# -- what it takes up --------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_reaper_sends_the_step_of_a_dead_consumer_after_lease_expiry(
    harness: DurableHarness, cls: type[Sale], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 20: expired leases."""
    harness.first.class_of(cls)("1").build().send()
    harness.claim_and_die()
    forget()
    harness.advance_with_reaper(LEASE - TURN)
    assert sent_messages() == []
    harness.advance_with_reaper(2 * TURN)
    assert (reasons(harness), len(sent_messages())) == ([DueReason.EXPIRED], 1)
    assert any(f"of operation 1 is sent: {DueReason.EXPIRED}" in line for line in lines(caplog, logging.INFO))


@BOTH_WAYS
def test_reaper_sends_a_step_that_was_never_sent(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 20: its consumer died between checkpoint and sending."""
    producer, harness.registry._kser_producer = harness.registry._kser_producer, Producer({"max_request_size": 1})
    harness.first.class_of(cls)("1").build().send()
    harness.registry._kser_producer = producer
    harness.advance_with_reaper(0)
    assert reasons(harness) == []
    harness.advance_with_reaper(TURN)
    assert (reasons(harness), len(sent_messages())) == ([DueReason.UNSENT], 1)


@BOTH_WAYS
def test_reaper_sends_a_retry_at_due_at(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 20"""
    ScriptedTask.script["1.b"] = [Retry.later(100), None]
    send_raw_message(cls)
    harness.first.handle()
    harness.advance_with_reaper(95)
    assert reasons(harness) == []
    harness.advance_with_reaper(10)
    assert reasons(harness) == [DueReason.RETRY]
    harness.first.handle()
    assert harness.status() == SUCCESS


@BOTH_WAYS
def test_reaper_resends_an_unclaimed_step_with_growing_backoff(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 20: a lost record or a recreated topic; after 60 s, doubled up to an hour."""
    harness.first.class_of(cls)("1").build().send()
    harness.first.consumer.close()
    times: list[float] = []
    began = harness.store_harness.now
    for _ in range(700):
        harness.advance(30)
        times += [harness.store_harness.now - began] * harness.first.background_service.reap()
        harness.first.background_service.record_sends()
    gaps = [round((later - earlier) / RESEND) for earlier, later in zip([0.0, *times], times, strict=False)]
    assert gaps[:6] == [1, 2, 4, 8, 16, 32]
    assert set(gaps[6:]) == {60}
    assert set(reasons(harness)) == {DueReason.UNCLAIMED}


@BOTH_WAYS
def test_reaper_recovers_a_lost_record_within_a_minute(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 20"""
    harness.first.class_of(cls)("1").build().send()
    forget()
    harness.first.consumer.close()
    other = harness.process(cls, group="other")
    harness.advance_with_reaper(RESEND + TURN, other)
    other.handle()
    assert harness.status() == SUCCESS


def test_concurrent_reapers_send_each_step_once(harness: DurableHarness) -> None:
    """durability rule 20: by compare-and-set."""
    processes = [harness.first, *(harness.process(Sale, group=str(number)) for number in range(7))]
    for number in range(40):
        harness.first.send(Sale, str(number))
    harness.advance(RESEND + 1)
    forget()
    counts: list[int] = []
    together = threading.Barrier(len(processes))

    def reap(process: Process) -> None:
        together.wait(WAIT_SECONDS)
        counts.append(process.background_service.reap())

    threads = [threading.Thread(target=reap, args=(process,)) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    assert sum(counts) == 40
    assert sorted(kmsg.uuid for kmsg in sent_messages()) == sorted(str(number) for number in range(40))


def test_reaper_sends_to_the_stored_topic_with_the_shared_producer(harness: DurableHarness) -> None:
    """durability rule 20: the class need not be known here."""
    harness.first.class_of(Sale)("1").build().send(topic="orders")
    stranger = harness.process(group="stranger")
    stranger.registry._kser_producer = None
    stranger.consumer._kser_shared_producer.attach(stranger.registry.controller)
    harness.advance(RESEND + 1)
    assert stranger.background_service.reap() == 1
    assert [kmsg.uuid for kmsg in sent_messages("orders")] == ["1", "1"]


def test_reaper_retries_a_failed_send_soon(harness: DurableHarness) -> None:
    """durability rule 20"""

    class Down:
        def send(self, topic: str, kmsg: Any, **options: Any) -> Result:
            return Result(uuid=kmsg.uuid, retcode=500, stderr="no broker answers")

        def bulk_send(self, topic: str, kmsgs: Any, timeout: float) -> Result:
            return Result(retcode=500, retval={"failed": {kmsg.uuid: "no broker answers" for kmsg in kmsgs}})

    for number in range(3):
        harness.first.send(Sale, str(number))
    forget()
    up = harness.registry._kser_producer
    harness.registry._kser_producer = Down()  # type: ignore[assignment]
    harness.advance(RESEND + 1)
    assert harness.first.background_service.reap() == 3
    harness.registry._kser_producer = up
    harness.advance_with_reaper(TURN)
    assert sorted(kmsg.uuid for kmsg in sent_messages()) == ["0", "1", "2"]


def test_reaper_takes_more_steps_than_one_batch(harness: DurableHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """durability rule 20"""
    monkeypatch.setattr(recovery, "BATCH", 2)
    for number in range(5):
        harness.first.send(Sale, str(number))
    harness.advance(RESEND + 1)
    assert harness.first.background_service.reap() == 5


def test_reaper_survives_an_unexpected_exception(harness: DurableHarness, caplog: pytest.LogCaptureFixture) -> None:
    """durability rule 20"""
    harness.first.send(Sale)
    forget()
    take_due = harness.store.take_due_steps

    def unknown(*given: object, **options: object) -> object:
        raise RuntimeError("what no database says")

    harness.store.take_due_steps = unknown  # type: ignore[method-assign, assignment]
    harness.advance(RESEND + 1)
    harness.first.background_service.tick()
    assert any("unexpected error in the heartbeat or the reaper" in line for line in lines(caplog))
    harness.store.take_due_steps = take_due  # type: ignore[method-assign]
    harness.advance_with_reaper(3 * RESEND)
    assert len(sent_messages()) >= 1


def test_running_consumer_has_a_reaper(harness: DurableHarness) -> None:
    """durability rule 20: in a thread of its own, beside whatever the workers do."""
    harness.first.class_of(Sale)("1").build().send()
    forget()
    harness.store_harness.advance(RESEND + 1)
    with ConsumerThread(harness.first.consumer):
        wait_until(lambda: harness.status() == SUCCESS)
    assert reasons(harness) == [DueReason.UNCLAIMED]


# -- whom it believes dead ---------------------------------------------------------------------------------------------


class Away:
    """A store that is away as long as the test says so."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.away = False

    def __getattr__(self, name: str) -> Any:
        if self.away:
            raise StoreUnavailable("the database is away")
        return getattr(self._store, name)


def test_reaper_waits_a_lease_after_an_outage_before_lease_expiry_counts(harness: DurableHarness) -> None:
    """durability rule 21: while the database was away no lease could be prolonged."""
    away = Away(harness.store)
    process = harness.process(Sale, store=away, group="judge")
    harness.first.send(Sale)
    harness.claim_and_die()
    harness.advance_with_reaper(2 * TURN, process)
    away.away = True
    harness.advance_with_reaper(2 * LEASE, process)
    away.away = False
    process.background_service.tick()
    assert DueReason.EXPIRED not in reasons(harness)
    harness.advance_with_reaper(LEASE - TURN, process)
    assert DueReason.EXPIRED not in reasons(harness)
    harness.advance_with_reaper(2 * TURN, process)
    assert DueReason.EXPIRED in reasons(harness)


def test_reaper_that_just_started_takes_no_expired_leases(harness: DurableHarness) -> None:
    """durability rule 21"""
    harness.first.send(Sale)
    harness.claim_and_die()
    harness.advance(10 * LEASE)
    harness.first.background_service.tick()
    assert reasons(harness) == []


def test_reaper_that_was_stopped_itself_takes_no_expired_leases(harness: DurableHarness) -> None:
    """durability rule 21: the reaper cannot know if the owners could reach the database meanwhile."""
    harness.advance_with_reaper(2 * LEASE)
    harness.first.send(Sale)
    harness.claim_and_die()
    harness.advance(2 * LEASE)
    harness.first.background_service.tick()
    assert DueReason.EXPIRED not in reasons(harness)


# -- those that kill their consumer ------------------------------------------------------------------------------------


@BOTH_WAYS
def test_poison_message_fails_its_step_after_too_many_claims_and_can_be_resumed(
    harness: DurableHarness, cls: type[Sale]
) -> None:
    """durability rule 22"""
    harness.first.class_of(cls)("1").build().send()
    for _ in range(20):
        harness.claim_and_die()
        harness.advance(LEASE_EXPIRED)
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran, harness.tasks()) == (FAILED, [], [FAILED, PENDING, PENDING])
    operation = harness.registry.get("1")
    assert operation is not None
    assert "20 consumers died during this step" in operation.result.stderr
    assert harness.attempts() == []
    operation.resume()
    harness.first.handle()
    assert (harness.status(), ScriptedTask.ran) == (SUCCESS, ["1.a", "1.b", "1.c"])


def test_consumer_deaths_are_counted_per_step(harness: DurableHarness) -> None:
    """durability rule 22: only the claims of one step count."""
    harness.first.class_of(Spread)("1").build().send()
    for name in "abc":
        for _ in range(12):
            harness.claim_and_die()
            harness.advance(LEASE_EXPIRED)
        assert ScriptedTask.ran == ["1.a", "1.b", "1.c"][: "abc".index(name)]
        harness.first.step()
    harness.first.handle()
    assert harness.status() == SUCCESS


def test_exhausted_claims_are_recorded_as_an_event(harness: DurableHarness) -> None:
    """durability rule 22"""
    harness.first.class_of(Sale)("1").build().send()
    for _ in range(20):
        harness.claim_and_die()
        harness.advance(LEASE_EXPIRED)
    assert harness.status() == RUNNING
    harness.first.handle()
    assert harness.event_kinds().count("claimed") == 21
    (text,) = [event.text for event in harness.stored().events if event.kind == "exhausted"]
    assert text is not None
    assert text.startswith("20 consumers died")
