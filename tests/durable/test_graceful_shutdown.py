"""Tests of graceful shutdown and rebalance while a stored operation runs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from cdumay_result import Result

from kser.dummy.broker import InMemoryBroker
from kser.errors import StoreUnavailable
from kser.status import RUNNING, SUCCESS
from tests.consumer.harness import DICE, PATIENCE, Act, InThread, committed, put, until
from tests.durable.harness import BOTH_WAYS, Process, Sale, Shop, Spread, bare, meanwhile, sent
from tests.support import lines


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    found = threading.Event()
    yield found
    found.set()


def others(shop: Shop, *classes: type[Any]) -> Process:
    """A process that takes over."""
    return shop.process(*classes, group="others")


# -- at shutdown -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_graceful_shutdown_stops_an_operation_at_its_next_checkpoint(
    shop: Shop, workers: int, gate: threading.Event
) -> None:
    """durability rule 30: its claim is released, with the next step ready."""
    process = shop.process(Sale, group="ending", workers=workers)
    Act.acts["1.b"] = lambda: gate.wait(PATIENCE)
    bare(Sale)
    with InThread(process.consumer) as thread:
        until(lambda: "1.b" in Act.seen)
        process.consumer.stop()
        until(lambda: process.consumer._kser_poller.shutting_down)
        gate.set()
        assert isinstance(thread.join(), SystemExit)
    row = shop.stored().operation
    assert (Act.seen, row.status, row.step, row.owner) == (["1.a", "1.b"], RUNNING, 2, None)
    assert shop.tasks()[:2] == [SUCCESS, SUCCESS]
    assert (len(sent()), row.send_count, row.due_at <= shop.world.now) == (2, 1, True)
    others(shop, Sale).handle()
    assert (Act.seen, shop.status()) == (["1.a", "1.b", "1.c"], SUCCESS)
    assert shop.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]


def test_graceful_shutdown_sends_the_next_step_of_a_distributed_operation(shop: Shop, gate: threading.Event) -> None:
    """durability rule 30"""
    process = shop.process(Spread, group="ending")
    Act.acts["1.b"] = lambda: gate.wait(PATIENCE)
    bare(Spread)
    with InThread(process.consumer) as thread:
        until(lambda: "1.b" in Act.seen)
        process.consumer.stop()
        until(lambda: process.consumer._kser_poller.shutting_down)
        gate.set()
        thread.join()
    assert Act.seen == ["1.a", "1.b"]
    others(shop, Spread).handle()
    assert (Act.seen, shop.status()) == (["1.a", "1.b", "1.c"], SUCCESS)


@BOTH_WAYS
def test_graceful_shutdown_lets_the_last_task_end_its_operation(
    shop: Shop, cls: type[Sale], gate: threading.Event
) -> None:
    """durability rule 30"""
    process = shop.process(cls, group="ending")
    Act.acts["1.c"] = lambda: gate.wait(PATIENCE)
    bare(cls)
    with InThread(process.consumer) as thread:
        until(lambda: "1.c" in Act.seen)
        process.consumer.stop()
        until(lambda: process.consumer._kser_poller.shutting_down)
        gate.set()
        thread.join()
    assert (Act.seen, shop.status()) == (["1.a", "1.b", "1.c"], SUCCESS)


def test_graceful_shutdown_leaves_the_onsuccess_hook_to_the_next_consumer(shop: Shop, gate: threading.Event) -> None:
    """durability rule 30: an end is a step like another one."""

    class Hooked(Sale):
        told: ClassVar[list[str]] = []

        def onsuccess(self, result: Result) -> Result:
            self.told.append(self.uuid)
            return result

    process = shop.process(Hooked, group="ending")
    Act.acts["1.c"] = lambda: gate.wait(PATIENCE)
    bare(Hooked)
    with InThread(process.consumer) as thread:
        until(lambda: "1.c" in Act.seen)
        process.consumer.stop()
        until(lambda: process.consumer._kser_poller.shutting_down)
        gate.set()
        thread.join()
    others(shop, Hooked).handle()
    assert (Act.seen, Hooked.told, shop.status()) == (["1.a", "1.b", "1.c"], ["1"], SUCCESS)


@BOTH_WAYS
def test_task_exceeding_the_shutdown_timeout_releases_its_claim_at_once(
    shop: Shop, cls: type[Sale], gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 30: no consumer waits for the lease expiry, and the late result is not recorded."""
    process = shop.process(cls, group="ending", workers=2, shutdown_timeout=0.2)
    process.consumer._kser_clock = time.monotonic
    Act.acts["1.b"] = [lambda: gate.wait(PATIENCE) and Result(retval={"late": 1}), lambda: Result(retval={"b": 1})]
    bare(cls)
    with InThread(process.consumer) as thread:
        until(lambda: "1.b" in Act.seen)
        process.consumer.stop()
        thread.join()
        row = shop.stored().operation
        assert (row.status, row.step, row.owner) == (RUNNING, 1, None)
        assert shop.kinds()[-1] == "released"
        others(shop, cls).handle()
        assert shop.status() == SUCCESS
        before = shop.stored()
        gate.set()
        until(lambda: not [each for each in threading.enumerate() if each.name == "kser-worker"])
    assert shop.stored() == before
    operation = shop.registry.get("1")
    assert operation is not None
    assert operation.result.retval == {"b": 1}
    assert shop.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]
    assert any("was abandoned; its late result is dropped" in line for line in lines(caplog, logging.WARNING))


def test_graceful_shutdown_releases_an_operation_waiting_for_its_database(shop: Shop) -> None:
    """durability rule 30: its message is not acked yet."""
    tried = threading.Event()

    class Away:
        name = "away"

        def check(self) -> None:
            """It was there at the start."""

        def __getattr__(self, name: str) -> Any:
            def call(*_: Any, **__: Any) -> Any:
                tried.set()
                raise StoreUnavailable("the database is away")

            return call

    process = shop.process(Sale, store=Away(), group="ending", workers=2)
    bare(Sale)
    with InThread(process.consumer) as thread:
        assert tried.wait(PATIENCE)
        until(process.consumer._kser_work_queue.running)
        process.consumer.stop()
        assert isinstance(thread.join(), SystemExit)
    others(shop, Sale).handle()
    again = shop.process(Sale, group="ending")
    again.handle()
    assert (Act.seen, shop.status()) == (["1.a", "1.b", "1.c"], SUCCESS)
    assert InMemoryBroker.at("").committed[("ending", DICE)].offset == 1


# -- on revoke ---------------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_rebalance_lets_an_operation_continue_under_its_claim(shop: Shop, cls: type[Sale]) -> None:
    """durability rule 30"""
    InMemoryBroker.at("").create_topic("dice", 2)
    seconds: list[Process] = []

    def rebalance() -> None:
        seconds.append(shop.process(cls))
        for _ in range(4):
            seconds[0].step()
            shop.first.consumer._kser_poller.poll_once(0)

    Act.acts["1.a"] = meanwhile(rebalance)
    put("1", cls=cls, partition=1)
    shop.first.handle()
    seconds[0].handle()
    for process in (shop.first, seconds[0], shop.first):
        process.handle()
    assert (sorted(Act.seen), shop.status()) == (["1.a", "1.b", "1.c"], SUCCESS)
    assert shop.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]


def test_consumer_expelled_from_its_group_continues_its_operation(shop: Shop) -> None:
    """durability rule 30: the lease counts, not the group."""

    def expel() -> None:
        client: Any = shop.first.consumer._kser_poller._client
        client.expel()
        shop.first.consumer._kser_poller.poll_once(0)

    Act.acts["1.b"] = meanwhile(expel)
    bare(Sale)
    shop.first.handle()
    assert (Act.seen, shop.status(), committed()) == (["1.a", "1.b", "1.c"], SUCCESS, 1)


@BOTH_WAYS
def test_shutdown_timeout_does_not_count_as_an_attempt(shop: Shop, cls: type[Sale], gate: threading.Event) -> None:
    """durability rule 30"""
    numbers: list[int] = []
    process = shop.process(cls, group="ending", workers=2, shutdown_timeout=0.2)
    process.consumer._kser_clock = time.monotonic
    Act.acts["1.b"] = [lambda: gate.wait(PATIENCE), None]
    bare(cls)
    with InThread(process.consumer) as thread:
        until(lambda: "1.b" in Act.seen)
        process.consumer.stop()
        thread.join()

        class Counted(Act):
            def run(self) -> Any:
                numbers.append(self.attempt)
                return super().run()

        other = others(shop, cls)
        other.registry.controller.ENTRYPOINTS[Act.path] = Counted
        other.handle()
        gate.set()
    assert numbers == [1, 1]
    assert shop.stored().operation.claim_count == 0
