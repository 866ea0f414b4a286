"""Tests of graceful shutdown and rebalance while a stored operation runs."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, ClassVar

import pytest
from cdumay_result import Result

from kser.dummy.broker import InMemoryBroker
from kser.sequencing.operation import Operation
from kser.sequencing.task import Task
from kser.status import RUNNING, SUCCESS
from kser.store.model import DueReason
from tests.consumer.harness import DICE, ConsumerThread, ScriptedTask, committed, send_messages
from tests.durable.harness import (
    BOTH_MODES,
    DistributedSale,
    DurableHarness,
    HookedSale,
    Sale,
    UnavailableStore,
    in_other_thread,
    send_raw_message,
    sent_messages,
    worker_threads,
)
from tests.store.harness import LEASE
from tests.support import WAIT_SECONDS, lines, wait_until

# -- graceful shutdown -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_graceful_shutdown_stops_an_operation_at_its_next_checkpoint(
    harness: DurableHarness, workers: int, gate: threading.Event
) -> None:
    """durability rule 30: the claim is released, and the next step is due."""
    process = harness.start_process(Sale, group="stopped", workers=workers)
    ScriptedTask.script["1.b"] = lambda: gate.wait(WAIT_SECONDS)
    send_raw_message(Sale)
    assert isinstance(process.stop_during("1.b", gate), SystemExit)
    row = harness.snapshot().operation
    assert (ScriptedTask.ran, row.status, row.step, row.owner) == (["1.a", "1.b"], RUNNING, 2, None)
    assert harness.task_statuses()[:2] == [SUCCESS, SUCCESS]
    assert (len(sent_messages()), row.due_reason) == (1, DueReason.RELEASED)
    assert row.take_at is not None
    assert row.take_at <= harness.store_harness.now
    harness.start_process(Sale, group="second").handle()
    assert (ScriptedTask.ran, harness.status()) == (["1.a", "1.b", "1.c"], SUCCESS)
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]


def test_graceful_shutdown_leaves_the_next_step_of_a_distributed_operation_to_others(
    harness: DurableHarness, gate: threading.Event
) -> None:
    """durability rule 30"""
    process = harness.start_process(DistributedSale, group="stopped")
    ScriptedTask.script["1.b"] = lambda: gate.wait(WAIT_SECONDS)
    send_raw_message(DistributedSale)
    process.stop_during("1.b", gate)
    assert ScriptedTask.ran == ["1.a", "1.b"]
    harness.start_process(DistributedSale, group="second").handle()
    assert (ScriptedTask.ran, harness.status()) == (["1.a", "1.b", "1.c"], SUCCESS)


@BOTH_MODES
def test_graceful_shutdown_lets_the_last_task_end_its_operation(
    harness: DurableHarness, cls: type[Sale], gate: threading.Event
) -> None:
    """durability rule 30"""
    process = harness.start_process(cls, group="stopped")
    ScriptedTask.script["1.c"] = lambda: gate.wait(WAIT_SECONDS)
    send_raw_message(cls)
    process.stop_during("1.c", gate)
    assert (ScriptedTask.ran, harness.status()) == (["1.a", "1.b", "1.c"], SUCCESS)


@pytest.mark.usefixtures("hooked_classes")
def test_graceful_shutdown_leaves_the_onsuccess_hook_to_the_next_consumer(
    harness: DurableHarness, gate: threading.Event
) -> None:
    """durability rule 30: the end of an operation is a step too."""
    process = harness.start_process(HookedSale, group="stopped")
    ScriptedTask.script["1.c"] = lambda: gate.wait(WAIT_SECONDS)
    send_raw_message(HookedSale)
    process.stop_during("1.c", gate)
    assert HookedSale.hook_calls == []
    harness.start_process(HookedSale, group="second").handle()
    assert (ScriptedTask.ran, HookedSale.hook_calls) == (["1.a", "1.b", "1.c"], [("onsuccess", "1")])
    assert harness.status() == SUCCESS


@BOTH_MODES
def test_task_exceeding_the_shutdown_timeout_releases_its_claim_at_once(
    harness: DurableHarness, cls: type[Sale], gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 30: no consumer waits for the lease expiry, and the late result is not recorded."""
    process = harness.start_process(
        cls, group="stopped", workers=2, shutdown_timeout=0.2, consumer_clock=time.monotonic
    )
    ScriptedTask.script["1.b"] = [
        lambda: gate.wait(WAIT_SECONDS) and Result(retval={"late": 1}),
        lambda: Result(retval={"b": 1}),
    ]
    send_raw_message(cls)
    with ConsumerThread(process.consumer) as thread:
        wait_until(lambda: "1.b" in ScriptedTask.ran)
        process.consumer.stop()
        thread.join()
        row = harness.snapshot().operation
        assert (row.status, row.step, row.owner) == (RUNNING, 1, None)
        assert harness.event_kinds()[-1] == "released"
        harness.start_process(cls, group="second").handle()
        assert harness.status() == SUCCESS
        before = harness.snapshot()
        gate.set()
        wait_until(lambda: not worker_threads())
    assert harness.snapshot() == before
    assert harness.operation().result.retval == {"b": 1}
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]
    assert any("was abandoned; its late result is dropped" in line for line in lines(caplog, logging.WARNING))


@pytest.mark.parametrize("workers", [1, 2])
def test_graceful_shutdown_releases_a_message_waiting_for_the_database(harness: DurableHarness, workers: int) -> None:
    """durability rule 30: the message is not acked yet."""
    store = UnavailableStore(harness.store)
    process = harness.start_process(Sale, store=store, group="stopped", workers=workers)
    store.error = "the database does not respond"
    send_raw_message(Sale)
    with ConsumerThread(process.consumer) as thread:
        wait_until(lambda: store.failed_calls and process.work_queue.running())
        process.consumer.stop()
        assert isinstance(thread.join(), SystemExit)
    assert (ScriptedTask.ran, harness.store.get_operation("1")) == ([], None)
    harness.start_process(Sale, group="stopped").handle()
    assert (ScriptedTask.ran, harness.status()) == (["1.a", "1.b", "1.c"], SUCCESS)
    assert InMemoryBroker.at("").committed[("stopped", DICE)].offset == 1


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("short_backoff")
def test_graceful_shutdown_abandons_a_task_waiting_for_the_database(harness: DurableHarness, workers: int) -> None:
    """durability rule 30: another consumer runs the task again after the lease expiry."""
    store = UnavailableStore(harness.store)

    class CancelCheckingTask(Task):
        attempts: ClassVar[list[int]] = []

        def run(self) -> Result:
            self.attempts.append(self.attempt)
            if len(self.attempts) == 1:
                store.error = "the database does not respond"
                # The query waits for the end of the outage.
                assert not self.cancel_requested
            return Result()

    class CancelCheckingOperation(Operation):
        def build_tasks(self, **kwargs: Any) -> list[Task]:
            return [CancelCheckingTask(f"{self.uuid}.a")]

    classes = CancelCheckingTask, CancelCheckingOperation
    process = harness.start_process(
        *classes, store=store, group="stopped", workers=workers, shutdown_timeout=0.2, consumer_clock=time.monotonic
    )
    send_raw_message(CancelCheckingOperation)
    with ConsumerThread(process.consumer) as thread:
        wait_until(lambda: store.failed_calls > 1)
        process.consumer.stop()
        thread.join()
        wait_until(lambda: not worker_threads())
    assert InMemoryBroker.at("").committed[("stopped", DICE)].offset == 1
    store.error = ""
    second = harness.start_process(*classes, group="second")
    second.handle()
    assert (harness.status(), CancelCheckingTask.attempts) == (RUNNING, [1])
    harness.advance_with_reaper(2 * LEASE, second)
    second.handle()
    assert (harness.status(), CancelCheckingTask.attempts) == (SUCCESS, [1, 1])


# -- rebalance ---------------------------------------------------------------------------------------------------------


@BOTH_MODES
def test_rebalance_lets_an_operation_continue_under_its_claim(harness: DurableHarness, cls: type[Sale]) -> None:
    """durability rule 30"""
    InMemoryBroker.at("").create_topic("dice", 2)

    def rebalance() -> None:
        second = harness.start_process(cls)
        for _ in range(4):
            second.step()
            harness.first.poll()

    ScriptedTask.script["1.a"] = in_other_thread(rebalance)
    send_messages("1", cls=cls, partition=1)
    harness.first.handle()
    (first, second) = harness.processes
    for process in (second, first, second, first):
        process.handle()
    assert (sorted(ScriptedTask.ran), harness.status()) == (["1.a", "1.b", "1.c"], SUCCESS)
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]


def test_consumer_expelled_from_its_group_continues_its_operation(harness: DurableHarness) -> None:
    """durability rule 30: the lease decides who may continue, not the group."""
    first = harness.first
    ScriptedTask.script["1.b"] = in_other_thread(lambda: first.consumer.current_client.expel(), first.poll)
    send_raw_message(Sale)
    harness.first.handle()
    assert (ScriptedTask.ran, harness.status(), committed()) == (["1.a", "1.b", "1.c"], SUCCESS, 1)


@BOTH_MODES
def test_shutdown_timeout_does_not_count_as_an_attempt(
    harness: DurableHarness, cls: type[Sale], gate: threading.Event
) -> None:
    """durability rule 30"""
    process = harness.start_process(
        cls, group="stopped", workers=2, shutdown_timeout=0.2, consumer_clock=time.monotonic
    )
    ScriptedTask.script["1.b"] = [lambda: gate.wait(WAIT_SECONDS), None]
    send_raw_message(cls)
    with ConsumerThread(process.consumer) as thread:
        wait_until(lambda: "1.b" in ScriptedTask.ran)
        process.consumer.stop()
        thread.join()
        harness.start_process(cls, group="second").handle()
        gate.set()
    assert ScriptedTask.ran == ["1.a", "1.b", "1.b", "1.c"]
    assert harness.attempts() == [(0, 1, SUCCESS), (1, 1, SUCCESS), (2, 1, SUCCESS)]
    assert harness.snapshot().operation.claim_count == 0
