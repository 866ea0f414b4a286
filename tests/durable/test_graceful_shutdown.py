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
from tests.consumer.harness import DICE, ConsumerThread, ScriptedTask, committed, send_messages
from tests.durable.harness import (
    BOTH_WAYS,
    DurableHarness,
    Process,
    Sale,
    Spread,
    in_other_thread,
    send_raw_message,
    sent_messages,
)
from tests.support import WAIT_SECONDS, lines, wait_until


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    found = threading.Event()
    yield found
    found.set()


def others(harness: DurableHarness, *classes: type[Any]) -> Process:
    """A process that takes over."""
    return harness.process(*classes, group="others")


# -- at shutdown -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_graceful_shutdown_stops_an_operation_at_its_next_checkpoint(
    harness: DurableHarness, workers: int, gate: threading.Event
) -> None:
    """durability rule 30: its claim is released, with the next step ready."""
    process = harness.process(Sale, group="ending", workers=workers)
    ScriptedTask.script["1.b"] = lambda: gate.wait(WAIT_SECONDS)
    send_raw_message(Sale)
    with ConsumerThread(process.consumer) as thread:
        wait_until(lambda: "1.b" in ScriptedTask.ran)
        process.consumer.stop()
        wait_until(lambda: process.consumer._kser_poller.shutting_down)
        gate.set()
        assert isinstance(thread.join(), SystemExit)
    row = harness.stored().operation
    assert (ScriptedTask.ran, row.status, row.step, row.owner) == (["1.a", "1.b"], RUNNING, 2, None)
    assert harness.tasks()[:2] == [SUCCESS, SUCCESS]
    assert (len(sent_messages()), row.send_count, row.due_at <= harness.store_harness.now) == (2, 1, True)
    others(harness, Sale).handle()
    assert (ScriptedTask.ran, harness.status()) == (["1.a", "1.b", "1.c"], SUCCESS)
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]


def test_graceful_shutdown_sends_the_next_step_of_a_distributed_operation(
    harness: DurableHarness, gate: threading.Event
) -> None:
    """durability rule 30"""
    process = harness.process(Spread, group="ending")
    ScriptedTask.script["1.b"] = lambda: gate.wait(WAIT_SECONDS)
    send_raw_message(Spread)
    with ConsumerThread(process.consumer) as thread:
        wait_until(lambda: "1.b" in ScriptedTask.ran)
        process.consumer.stop()
        wait_until(lambda: process.consumer._kser_poller.shutting_down)
        gate.set()
        thread.join()
    assert ScriptedTask.ran == ["1.a", "1.b"]
    others(harness, Spread).handle()
    assert (ScriptedTask.ran, harness.status()) == (["1.a", "1.b", "1.c"], SUCCESS)


@BOTH_WAYS
def test_graceful_shutdown_lets_the_last_task_end_its_operation(
    harness: DurableHarness, cls: type[Sale], gate: threading.Event
) -> None:
    """durability rule 30"""
    process = harness.process(cls, group="ending")
    ScriptedTask.script["1.c"] = lambda: gate.wait(WAIT_SECONDS)
    send_raw_message(cls)
    with ConsumerThread(process.consumer) as thread:
        wait_until(lambda: "1.c" in ScriptedTask.ran)
        process.consumer.stop()
        wait_until(lambda: process.consumer._kser_poller.shutting_down)
        gate.set()
        thread.join()
    assert (ScriptedTask.ran, harness.status()) == (["1.a", "1.b", "1.c"], SUCCESS)


def test_graceful_shutdown_leaves_the_onsuccess_hook_to_the_next_consumer(
    harness: DurableHarness, gate: threading.Event
) -> None:
    """durability rule 30: an end is a step like another one."""

    class Hooked(Sale):
        told: ClassVar[list[str]] = []

        def onsuccess(self, result: Result) -> Result:
            self.told.append(self.uuid)
            return result

    process = harness.process(Hooked, group="ending")
    ScriptedTask.script["1.c"] = lambda: gate.wait(WAIT_SECONDS)
    send_raw_message(Hooked)
    with ConsumerThread(process.consumer) as thread:
        wait_until(lambda: "1.c" in ScriptedTask.ran)
        process.consumer.stop()
        wait_until(lambda: process.consumer._kser_poller.shutting_down)
        gate.set()
        thread.join()
    others(harness, Hooked).handle()
    assert (ScriptedTask.ran, Hooked.told, harness.status()) == (["1.a", "1.b", "1.c"], ["1"], SUCCESS)


@BOTH_WAYS
def test_task_exceeding_the_shutdown_timeout_releases_its_claim_at_once(
    harness: DurableHarness, cls: type[Sale], gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 30: no consumer waits for the lease expiry, and the late result is not recorded."""
    process = harness.process(cls, group="ending", workers=2, shutdown_timeout=0.2, consumer_clock=time.monotonic)
    ScriptedTask.script["1.b"] = [
        lambda: gate.wait(WAIT_SECONDS) and Result(retval={"late": 1}),
        lambda: Result(retval={"b": 1}),
    ]
    send_raw_message(cls)
    with ConsumerThread(process.consumer) as thread:
        wait_until(lambda: "1.b" in ScriptedTask.ran)
        process.consumer.stop()
        thread.join()
        row = harness.stored().operation
        assert (row.status, row.step, row.owner) == (RUNNING, 1, None)
        assert harness.event_kinds()[-1] == "released"
        others(harness, cls).handle()
        assert harness.status() == SUCCESS
        before = harness.stored()
        gate.set()
        wait_until(lambda: not [each for each in threading.enumerate() if each.name == "kser-worker"])
    assert harness.stored() == before
    operation = harness.registry.get("1")
    assert operation is not None
    assert operation.result.retval == {"b": 1}
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]
    assert any("was abandoned; its late result is dropped" in line for line in lines(caplog, logging.WARNING))


def test_graceful_shutdown_releases_an_operation_waiting_for_its_database(harness: DurableHarness) -> None:
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

    process = harness.process(Sale, store=Away(), group="ending", workers=2)
    send_raw_message(Sale)
    with ConsumerThread(process.consumer) as thread:
        assert tried.wait(WAIT_SECONDS)
        wait_until(process.consumer._kser_work_queue.running)
        process.consumer.stop()
        assert isinstance(thread.join(), SystemExit)
    others(harness, Sale).handle()
    again = harness.process(Sale, group="ending")
    again.handle()
    assert (ScriptedTask.ran, harness.status()) == (["1.a", "1.b", "1.c"], SUCCESS)
    assert InMemoryBroker.at("").committed[("ending", DICE)].offset == 1


# -- on revoke ---------------------------------------------------------------------------------------------------------


@BOTH_WAYS
def test_rebalance_lets_an_operation_continue_under_its_claim(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 30"""
    InMemoryBroker.at("").create_topic("dice", 2)
    seconds: list[Process] = []

    def rebalance() -> None:
        seconds.append(harness.process(cls))
        for _ in range(4):
            seconds[0].step()
            harness.first.consumer._kser_poller.poll_once(0)

    ScriptedTask.script["1.a"] = in_other_thread(rebalance)
    send_messages("1", cls=cls, partition=1)
    harness.first.handle()
    seconds[0].handle()
    for process in (harness.first, seconds[0], harness.first):
        process.handle()
    assert (sorted(ScriptedTask.ran), harness.status()) == (["1.a", "1.b", "1.c"], SUCCESS)
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]


def test_consumer_expelled_from_its_group_continues_its_operation(harness: DurableHarness) -> None:
    """durability rule 30: the lease counts, not the group."""

    def expel() -> None:
        client: Any = harness.first.consumer._kser_poller._client
        client.expel()
        harness.first.consumer._kser_poller.poll_once(0)

    ScriptedTask.script["1.b"] = in_other_thread(expel)
    send_raw_message(Sale)
    harness.first.handle()
    assert (ScriptedTask.ran, harness.status(), committed()) == (["1.a", "1.b", "1.c"], SUCCESS, 1)


@BOTH_WAYS
def test_shutdown_timeout_does_not_count_as_an_attempt(
    harness: DurableHarness, cls: type[Sale], gate: threading.Event
) -> None:
    """durability rule 30"""
    numbers: list[int] = []
    process = harness.process(cls, group="ending", workers=2, shutdown_timeout=0.2, consumer_clock=time.monotonic)
    ScriptedTask.script["1.b"] = [lambda: gate.wait(WAIT_SECONDS), None]
    send_raw_message(cls)
    with ConsumerThread(process.consumer) as thread:
        wait_until(lambda: "1.b" in ScriptedTask.ran)
        process.consumer.stop()
        thread.join()

        class Counted(ScriptedTask):
            def run(self) -> Any:
                numbers.append(self.attempt)
                return super().run()

        other = others(harness, cls)
        other.registry.controller.ENTRYPOINTS[ScriptedTask.path] = Counted
        other.handle()
        gate.set()
    assert numbers == [1, 1]
    assert harness.stored().operation.claim_count == 0
