"""Tests of outages and slow databases that the chaos runs found (rules 9, 21 and 33)."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from kser.errors import SchemaMismatch, StoreUnavailable
from kser.status import SUCCESS
from kser.store.memory import MemoryStore
from kser.store.model import ClaimRefused
from tests.consumer.harness import ConsumerThread, ScriptedTask
from tests.durable.harness import TURN, DurableHarness, Process, Sale, Spread, in_other_thread, sent_messages
from tests.store.harness import LEASE, claim_request
from tests.support import lines, message, wait_until

pytestmark = pytest.mark.usefixtures("bus")


class AwayStore(MemoryStore):
    """Cannot be reached before somebody says so."""

    def __init__(self) -> None:
        super().__init__()
        self.here = threading.Event()
        self.asked = 0

    def check(self) -> None:
        self.asked += 1
        if not self.here.is_set():
            raise StoreUnavailable("there is no server")
        super().check()


def arrive(process: Process) -> None:
    """A message comes of somebody who has no database."""
    process.registry.producer.send("dice", message(Sale, uuid="1"))


@pytest.mark.parametrize("workers", [1, 2])
def test_consumer_started_during_a_database_outage_waits_for_the_database(workers: int) -> None:
    store = AwayStore()
    process = Process(None, Sale, workers=workers)
    process.registry._kser_store = store
    arrive(process)
    with ConsumerThread(process.consumer) as thread:
        # Those who wait, and what runs beside.
        wait_until(lambda: store.asked > 6)
        assert thread.ending is None
        assert store.get_operation("1") is None
        store.here.set()
        wait_until(lambda: (row := store.get_operation("1")) is not None and row.status == "SUCCESS")
        wait_until(lambda: [each.name for each in threading.enumerate()].count("kser-services") == 1)


def test_graceful_shutdown_ends_a_consumer_that_waits_for_its_database() -> None:
    process = Process(None, Sale, workers=2)
    process.registry._kser_store = store = AwayStore()
    arrive(process)
    with ConsumerThread(process.consumer) as thread:
        wait_until(lambda: store.asked > 6)
        process.consumer.stop()
        assert isinstance(thread.join(), SystemExit)
    store.here.set()
    other = Process(store, Sale)
    assert other.handle() == 1, "the message was handed back"
    other.consumer.close()


def test_database_with_another_schema_version_is_rejected_at_the_start() -> None:
    class Old(MemoryStore):
        def check(self) -> None:
            raise SchemaMismatch("run something")

    process = Process(None, Sale, workers=2)
    process.registry._kser_store = Old()
    with ConsumerThread(process.consumer) as thread:
        assert isinstance(thread.join(), SchemaMismatch)


# -- it makes everybody wait -------------------------------------------------------------------------------------------


def hold_up(harness: DurableHarness, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the next question for what is due wait, soon: somebody has locked the database."""
    harness.advance(TURN)
    take_due = harness.store.take_due_steps

    def wait(*given: Any, **options: Any) -> Any:
        monkeypatch.setattr(harness.store, "take_due_steps", take_due)
        harness.advance(seconds)
        return take_due(*given, **options)

    monkeypatch.setattr(harness.store, "take_due_steps", wait)


def test_reaper_takes_no_expired_leases_after_a_database_delay(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 21: no owner could renew its lease meanwhile."""
    harness.advance_with_reaper(2 * LEASE)
    harness.first.send(Sale)
    claim = harness.claim_and_die()
    before = len(sent_messages())
    hold_up(harness, monkeypatch, LEASE + 1)
    harness.first.background_service.tick()
    assert len(sent_messages()) == before
    assert harness.store.renew([(claim.id, claim.epoch)], "a dead consumer", LEASE) == {claim.id}
    assert isinstance(harness.store.claim("1", "1", claim_request("other")), ClaimRefused)


def test_lease_expiry_after_a_database_delay_frees_the_claim_of_a_dead_owner(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 21"""
    harness.advance_with_reaper(2 * LEASE)
    harness.first.send(Sale)
    harness.claim_and_die()
    hold_up(harness, monkeypatch, LEASE + 1)
    harness.first.background_service.tick()
    harness.advance_with_reaper(LEASE + TURN)
    harness.first.handle()
    assert harness.status() == SUCCESS


def test_lost_claim_is_logged_once(harness: DurableHarness, caplog: pytest.LogCaptureFixture) -> None:
    second = harness.process(Sale, group="second")
    beats = [harness.first.background_service.renew_leases] * 3
    ScriptedTask.script["1.b"] = [in_other_thread(lambda: harness.advance(LEASE + 1), second.handle, *beats), None]
    harness.first.send(Sale)
    harness.first.handle()
    assert len([line for line in lines(caplog, logging.WARNING) if "the claim was lost" in line]) == 1


# -- Kafka makes everybody wait ----------------------------------------------------------------------------------------


def test_released_claim_is_not_logged_as_lost_while_the_next_step_is_sent(
    harness: DurableHarness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 9"""
    harness.first.send(Spread)
    send = harness.registry.producer.send

    def slowly(*given: Any, **options: Any) -> Any:
        harness.first.background_service.renew_leases()
        return send(*given, **options)

    monkeypatch.setattr(harness.registry.producer, "send", slowly)
    harness.first.handle()
    assert harness.status() == SUCCESS
    assert [line for line in lines(caplog, logging.WARNING) if "was lost" in line] == []
