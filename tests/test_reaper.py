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
from tests.durable import BOTH_WAYS, TURN, Process, Sale, Shop, Spread, bare, expire, sent
from tests.engine import PATIENCE, Act, InThread, until
from tests.store_world import LEASE, RESEND
from tests.support import lines


def reasons(shop: Shop, uuid: str = "1") -> list[str | None]:
    """Why it was sent again."""
    return [event.text for event in shop.stored(uuid).events if event.kind == "sent-again"]


def forget(topic: str = "dice") -> None:
    """Lose everything that was sent to a topic."""
    for log in InMemoryBroker.at("").topics.get(topic, []):
        log.clear()


# -- what it takes up --------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_reaper_sends_the_step_of_a_dead_consumer_after_lease_expiry(
    shop: Shop, cls: type[Sale], caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 20: expired leases."""
    shop.first.known(cls)("1").build().send()
    shop.seize()
    forget()
    shop.live(LEASE - TURN)
    assert sent() == []
    shop.live(2 * TURN)
    assert (reasons(shop), len(sent())) == ([DueReason.EXPIRED], 1)
    assert any(f"of operation 1 is sent: {DueReason.EXPIRED}" in line for line in lines(caplog, logging.INFO))


@BOTH_WAYS
def test_reaper_sends_a_step_that_was_never_sent(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 20: its consumer died between checkpoint and sending."""
    producer, shop.registry._kser_producer = shop.registry._kser_producer, Producer({"max_request_size": 1})
    shop.first.known(cls)("1").build().send()
    shop.registry._kser_producer = producer
    shop.live(0)
    assert reasons(shop) == []
    shop.live(TURN)
    assert (reasons(shop), len(sent())) == ([DueReason.UNSENT], 1)


@BOTH_WAYS
def test_reaper_sends_a_retry_at_due_at(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 20"""
    Act.acts["1.b"] = [Retry.later(100), None]
    bare(cls)
    shop.first.handle()
    shop.live(95)
    assert reasons(shop) == []
    shop.live(10)
    assert reasons(shop) == [DueReason.RETRY]
    shop.first.handle()
    assert shop.status() == SUCCESS


@BOTH_WAYS
def test_reaper_resends_an_unclaimed_step_with_growing_backoff(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 20: a lost record or a recreated topic; after 60 s, doubled up to an hour."""
    shop.first.known(cls)("1").build().send()
    shop.first.consumer.close()
    times: list[float] = []
    began = shop.world.now
    for _ in range(700):
        shop.pass_by(30)
        times += [shop.world.now - began] * shop.first.companion.reap()
        shop.first.companion.record_sends()
    gaps = [round((later - earlier) / RESEND) for earlier, later in zip([0.0, *times], times, strict=False)]
    assert gaps[:6] == [1, 2, 4, 8, 16, 32]
    assert set(gaps[6:]) == {60}
    assert set(reasons(shop)) == {DueReason.UNCLAIMED}


@BOTH_WAYS
def test_reaper_recovers_a_lost_record_within_a_minute(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 20"""
    shop.first.known(cls)("1").build().send()
    forget()
    shop.first.consumer.close()
    other = shop.process(cls, group="other")
    shop.live(RESEND + TURN, other)
    other.handle()
    assert shop.status() == SUCCESS


def test_concurrent_reapers_send_each_step_once(shop: Shop) -> None:
    """durability rule 20: by compare-and-set."""
    processes = [shop.first, *(shop.process(Sale, group=str(number)) for number in range(7))]
    for number in range(40):
        shop.first.send(Sale, str(number))
    shop.pass_by(RESEND + 1)
    forget()
    counts: list[int] = []
    together = threading.Barrier(len(processes))

    def reap(process: Process) -> None:
        together.wait(PATIENCE)
        counts.append(process.companion.reap())

    threads = [threading.Thread(target=reap, args=(process,)) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sum(counts) == 40
    assert sorted(kmsg.uuid for kmsg in sent()) == sorted(str(number) for number in range(40))


def test_reaper_sends_to_the_stored_topic_with_the_shared_producer(shop: Shop) -> None:
    """durability rule 20: the class need not be known here."""
    shop.first.known(Sale)("1").build().send(topic="orders")
    stranger = shop.process(group="stranger")
    stranger.registry._kser_producer = None
    stranger.consumer._kser_shared_producer.attach(stranger.registry.controller)
    shop.pass_by(RESEND + 1)
    assert stranger.companion.reap() == 1
    assert [kmsg.uuid for kmsg in sent("orders")] == ["1", "1"]


def test_reaper_retries_a_failed_send_soon(shop: Shop) -> None:
    """durability rule 20"""

    class Down:
        def send(self, topic: str, kmsg: Any, **options: Any) -> Result:
            return Result(uuid=kmsg.uuid, retcode=500, stderr="no broker answers")

        def bulk_send(self, topic: str, kmsgs: Any, timeout: float) -> Result:
            return Result(retcode=500, retval={"failed": {kmsg.uuid: "no broker answers" for kmsg in kmsgs}})

    for number in range(3):
        shop.first.send(Sale, str(number))
    forget()
    up = shop.registry._kser_producer
    shop.registry._kser_producer = Down()  # type: ignore[assignment]
    shop.pass_by(RESEND + 1)
    assert shop.first.companion.reap() == 3
    shop.registry._kser_producer = up
    shop.live(TURN)
    assert sorted(kmsg.uuid for kmsg in sent()) == ["0", "1", "2"]


def test_reaper_takes_more_steps_than_one_batch(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """durability rule 20"""
    monkeypatch.setattr(recovery, "BATCH", 2)
    for number in range(5):
        shop.first.send(Sale, str(number))
    shop.pass_by(RESEND + 1)
    assert shop.first.companion.reap() == 5


def test_reaper_survives_an_unexpected_exception(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """durability rule 20"""
    shop.first.send(Sale)
    forget()
    take_due = shop.store.take_due_steps

    def unknown(*given: object, **options: object) -> object:
        raise RuntimeError("what no database says")

    shop.store.take_due_steps = unknown  # type: ignore[method-assign, assignment]
    shop.pass_by(RESEND + 1)
    shop.first.companion.tick()
    assert any("unexpected error in the heartbeat or the reaper" in line for line in lines(caplog))
    shop.store.take_due_steps = take_due  # type: ignore[method-assign]
    shop.live(3 * RESEND)
    assert len(sent()) >= 1


def test_running_consumer_has_a_reaper(shop: Shop) -> None:
    """durability rule 20: in a thread of its own, beside whatever the workers do."""
    shop.first.known(Sale)("1").build().send()
    forget()
    shop.world.pass_by(RESEND + 1)
    with InThread(shop.first.consumer):
        until(lambda: shop.status() == SUCCESS)
    assert reasons(shop) == [DueReason.UNCLAIMED]


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


def test_reaper_waits_a_lease_after_an_outage_before_lease_expiry_counts(shop: Shop) -> None:
    """durability rule 21: while the database was away no lease could be prolonged."""
    away = Away(shop.store)
    process = shop.process(Sale, store=away, group="judge")
    shop.first.send(Sale)
    shop.seize()
    shop.live(2 * TURN, process)
    away.away = True
    shop.live(2 * LEASE, process)
    away.away = False
    process.companion.tick()
    assert DueReason.EXPIRED not in reasons(shop)
    shop.live(LEASE - TURN, process)
    assert DueReason.EXPIRED not in reasons(shop)
    shop.live(2 * TURN, process)
    assert DueReason.EXPIRED in reasons(shop)


def test_reaper_that_just_started_takes_no_expired_leases(shop: Shop) -> None:
    """durability rule 21"""
    shop.first.send(Sale)
    shop.seize()
    shop.pass_by(10 * LEASE)
    shop.first.companion.tick()
    assert reasons(shop) == []


def test_reaper_that_was_stopped_itself_takes_no_expired_leases(shop: Shop) -> None:
    """durability rule 21: the reaper cannot know if the owners could reach the database meanwhile."""
    shop.live(2 * LEASE)
    shop.first.send(Sale)
    shop.seize()
    shop.pass_by(2 * LEASE)
    shop.first.companion.tick()
    assert DueReason.EXPIRED not in reasons(shop)


# -- those that kill their consumer ------------------------------------------------------------------------------------


@BOTH_WAYS
def test_poison_message_fails_its_step_after_too_many_claims_and_can_be_resumed(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 22"""
    shop.first.known(cls)("1").build().send()
    for _ in range(20):
        shop.seize()
        shop.pass_by(expire())
    shop.first.handle()
    assert (shop.status(), Act.seen, shop.tasks()) == (FAILED, [], [FAILED, PENDING, PENDING])
    operation = shop.registry.get("1")
    assert operation is not None
    assert "20 consumers died during this step" in operation.result.stderr
    assert shop.attempts() == []
    operation.resume()
    shop.first.handle()
    assert (shop.status(), Act.seen) == (SUCCESS, ["1.a", "1.b", "1.c"])


def test_consumer_deaths_are_counted_per_step(shop: Shop) -> None:
    """durability rule 22: only the claims of one step count."""
    shop.first.known(Spread)("1").build().send()
    for name in "abc":
        for _ in range(12):
            shop.seize()
            shop.pass_by(expire())
        assert Act.seen == ["1.a", "1.b", "1.c"][: "abc".index(name)]
        shop.first.step()
    shop.first.handle()
    assert shop.status() == SUCCESS


def test_exhausted_claims_are_recorded_as_an_event(shop: Shop) -> None:
    """durability rule 22"""
    shop.first.known(Sale)("1").build().send()
    for _ in range(20):
        shop.seize()
        shop.pass_by(expire())
    assert shop.status() == RUNNING
    shop.first.handle()
    assert shop.kinds().count("claimed") == 21
    (text,) = [event.text for event in shop.stored().events if event.kind == "exhausted"]
    assert text is not None
    assert text.startswith("20 consumers died")
