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
from tests.consumer.harness import Act, InThread, until
from tests.durable.harness import TURN, Process, Sale, Shop, Spread, meanwhile, sent
from tests.store.harness import LEASE, me
from tests.support import lines, message

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
    with InThread(process.consumer) as thread:
        # Those who wait, and what runs beside.
        until(lambda: store.asked > 6)
        assert thread.ending is None
        assert store.get_operation("1") is None
        store.here.set()
        until(lambda: (row := store.get_operation("1")) is not None and row.status == "SUCCESS")
        until(lambda: [each.name for each in threading.enumerate()].count("kser-services") == 1)


def test_graceful_shutdown_ends_a_consumer_that_waits_for_its_database() -> None:
    process = Process(None, Sale, workers=2)
    process.registry._kser_store = store = AwayStore()
    arrive(process)
    with InThread(process.consumer) as thread:
        until(lambda: store.asked > 6)
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
    with InThread(process.consumer) as thread:
        assert isinstance(thread.join(), SchemaMismatch)


# -- it makes everybody wait -------------------------------------------------------------------------------------------


def hold_up(shop: Shop, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the next question for what is due wait, soon: somebody has locked the database."""
    shop.pass_by(TURN)
    take_due = shop.store.take_due_steps

    def wait(*given: Any, **options: Any) -> Any:
        monkeypatch.setattr(shop.store, "take_due_steps", take_due)
        shop.pass_by(seconds)
        return take_due(*given, **options)

    monkeypatch.setattr(shop.store, "take_due_steps", wait)


def test_reaper_takes_no_expired_leases_after_a_database_delay(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """durability rule 21: no owner could renew its lease meanwhile."""
    shop.live(2 * LEASE)
    shop.first.send(Sale)
    claim = shop.seize()
    before = len(sent())
    hold_up(shop, monkeypatch, LEASE + 1)
    shop.first.companion.tick()
    assert len(sent()) == before
    assert shop.store.renew([(claim.id, claim.epoch)], "the dead", LEASE) == {claim.id}
    assert isinstance(shop.store.claim("1", "1", me("other")), ClaimRefused)


def test_lease_expiry_after_a_database_delay_frees_the_claim_of_a_dead_owner(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """durability rule 21"""
    shop.live(2 * LEASE)
    shop.first.send(Sale)
    shop.seize()
    hold_up(shop, monkeypatch, LEASE + 1)
    shop.first.companion.tick()
    shop.live(LEASE + TURN)
    shop.first.handle()
    assert shop.status() == SUCCESS


def test_lost_claim_is_logged_once(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    second = shop.process(Sale, group="second")
    beats = [shop.first.companion.renew_leases] * 3
    Act.acts["1.b"] = [meanwhile(lambda: shop.pass_by(LEASE + 1), second.handle, *beats), None]
    shop.first.send(Sale)
    shop.first.handle()
    assert len([line for line in lines(caplog, logging.WARNING) if "the claim was lost" in line]) == 1


# -- Kafka makes everybody wait ----------------------------------------------------------------------------------------


def test_released_claim_is_not_logged_as_lost_while_the_next_step_is_sent(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 9"""
    shop.first.send(Spread)
    send = shop.registry.producer.send

    def slowly(*given: Any, **options: Any) -> Any:
        shop.first.companion.renew_leases()
        return send(*given, **options)

    monkeypatch.setattr(shop.registry.producer, "send", slowly)
    shop.first.handle()
    assert shop.status() == SUCCESS
    assert [line for line in lines(caplog, logging.WARNING) if "was lost" in line] == []
