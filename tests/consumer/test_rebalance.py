"""Tests of rebalances on the in-memory transport: finished records are committed and not run again."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from kser.dummy.broker import InMemoryBroker
from kser.dummy.consumer import Consumer
from kser.retry import Retry
from tests.consumer.harness import (
    MANUAL_COMMIT,
    ConsumerThread,
    FaultyConsumer,
    ScriptedTask,
    committed,
    new_consumer,
    send_messages,
)
from tests.support import WAIT_SECONDS, Clock, lines, wait_until

pytestmark = pytest.mark.usefixtures("bus")

#: What is finished is not committed by itself.
LATER = {"auto_commit_interval_ms": 600_000}


def settle(*consumers: Consumer) -> None:
    """Let them poll until each knows its share."""
    for _ in range(2 * len(consumers)):
        for consumer in consumers:
            consumer._kser_poller.poll_once(0)


def test_rebalance_commits_finished_records() -> None:
    send_messages("1", "2", "3")
    first = new_consumer(LATER)
    first._kser_poller.poll_once(0)
    first._kser_worker_pool.step()
    assert committed() == 0
    second = new_consumer(LATER)
    settle(first, second)
    assert committed() == 1
    second.close()
    first.run_until_idle()
    assert ScriptedTask.ran == ["1", "2", "3"]


def test_rebalance_continues_behind_finished_records_in_another_consumer(bus: InMemoryBroker) -> None:
    bus.create_topic("dice", 2)
    for number in range(10):
        send_messages(f"0/{number}", partition=0)
        send_messages(f"1/{number}", partition=1)
    first = new_consumer(LATER)
    first._kser_poller.poll_once(0)
    for _ in range(7):
        first._kser_worker_pool.step()
    second = new_consumer(LATER)
    settle(first, second)
    assert len(first.assignment) == len(second.assignment) == 1
    while first.step(timeout=0) + second.step(timeout=0):
        """Until there is nothing more."""
    first.close()
    second.close()
    assert sorted(ScriptedTask.ran) == sorted(f"{partition}/{number}" for partition in (0, 1) for number in range(10))
    assert (committed(0), committed(1)) == (10, 10)


def test_rebalance_waits_for_a_running_record_and_does_not_run_it_again() -> None:
    gate = threading.Event()
    ScriptedTask.script["1"] = lambda: gate.wait(WAIT_SECONDS)
    send_messages("1")
    first = new_consumer(LATER)
    with ConsumerThread(first) as thread:
        wait_until(lambda: ScriptedTask.ran)
        second = new_consumer(LATER)
        threading.Timer(0.1, gate.set).start()
        first.stop()
        while thread._thread.is_alive():
            second.step(timeout=0.01)
        second.run_until_idle()
        second.close()
    assert (ScriptedTask.ran, committed()) == (["1"], 1)


def test_rebalance_resumes_a_running_record_when_its_partition_returns(caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()
    ScriptedTask.script["1"] = lambda: gate.wait(WAIT_SECONDS)
    send_messages("1", "2")
    first = FaultyConsumer(LATER, revoke_timeout=0.05, workers=2)
    with ConsumerThread(first):
        wait_until(lambda: len(ScriptedTask.ran) == 2 and first.counts["done"] == 1)
        InMemoryBroker.at("").create_topic("dice", 2)
        wait_until(lambda: len(first.assignment) == 2)
        assert committed() == 0
        gate.set()
        wait_until(lambda: first.counts["done"] == 2)
    assert (sorted(ScriptedTask.ran), committed()) == (["1", "2"], 2)
    assert not [line for line in lines(caplog) if "was revoked" in line]


def test_record_finished_after_a_lost_partition_is_logged_and_not_committed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    send_messages("1")
    first = FaultyConsumer(MANUAL_COMMIT, revoke_timeout=0)
    first._kser_poller.poll_once(0)
    item = first._kser_work_queue.get(0)
    assert item is not None
    first.current_client.expel()
    second = new_consumer(MANUAL_COMMIT)
    assert second.step(timeout=0) == 1
    assert committed() == 1
    first._kser_poller.poll_once(0)
    first._kser_worker_pool._attempt(item)
    first._kser_poller.commit()
    assert (ScriptedTask.ran, committed(), first.current_client.commits) == (["1", "1"], 1, [])
    (line,) = [line for line in lines(caplog, logging.INFO) if "was revoked" in line]
    assert line == (
        "FaultyConsumer: the message at offset 0 of dice[0] was finished after the partition was revoked: it is"
        " not committed, and will be redelivered if another consumer owns the partition"
    )


def test_records_of_a_lost_partition_are_not_committed() -> None:
    """Another consumer may be far ahead by now."""
    send_messages("1", "2", "3")
    first = FaultyConsumer(LATER)
    first._kser_poller.poll_once(0)
    first._kser_worker_pool.step()
    first.current_client.expel()
    second = new_consumer(MANUAL_COMMIT)
    assert second.step(timeout=0) == 3
    first._kser_poller.poll_once(0)
    first.close()
    assert (first.current_client.commits, committed()) == ([], 3)
    assert ScriptedTask.ran == ["1", "1", "2", "3"]


def test_rebalance_keeps_the_attempt_number_of_a_delayed_record() -> None:
    attempts: list[int] = []

    def attempt() -> None:
        raise ConnectionError("no")

    ScriptedTask.script["1"] = attempt
    send_messages("1")
    clock = Clock()
    consumer = new_consumer(LATER, retry=Retry(max_attempts=3, delay=10, backoff=1, jitter=False), clock=clock)
    for _ in range(3):
        attempts.append(consumer.step(timeout=0))
        InMemoryBroker.at("").create_topic("dice", len(InMemoryBroker.at("").topics["dice"]) + 1)
        consumer.step(timeout=0)
        clock.advance(10)
    assert (attempts, len(ScriptedTask.ran)) == ([1, 1, 1], 3)
    assert (consumer.counts["retried"], consumer.counts["failed"]) == (2, 1)


def test_added_partitions_start_at_their_beginning() -> None:
    consumer = new_consumer(MANUAL_COMMIT)
    consumer.step(timeout=0)
    InMemoryBroker.at("").create_topic("dice", 2)
    send_messages("1", partition=1)
    consumer.run_until_idle()
    assert (ScriptedTask.ran, committed(1)) == (["1"], 1)


def test_commit_metadata_survives_the_death_of_its_consumer() -> None:
    """Also not when the one who did it died: the commit carries it."""
    send_messages(*"123456")
    first = FaultyConsumer(MANUAL_COMMIT, ordering="none")
    first._kser_poller.poll_once(0)
    stuck = first._kser_work_queue.get(0)
    for _ in range(3):
        first._kser_worker_pool.step()
    first._kser_poller.commit()
    first.current_client.expel()
    assert stuck is not None
    new_consumer(MANUAL_COMMIT).run_until_idle()
    assert ScriptedTask.ran == ["2", "3", "4", "1", "5", "6"]
    assert committed() == 6


def test_late_commit_is_a_logged_error_and_is_retried(caplog: pytest.LogCaptureFixture) -> None:
    send_messages("1")
    consumer = FaultyConsumer(MANUAL_COMMIT)
    consumer._kser_poller.poll_once(0)
    consumer.current_client.expel()
    consumer._kser_worker_pool.step()
    consumer._kser_poller.commit()
    (line,) = lines(caplog, logging.ERROR)
    assert line == "FaultyConsumer: the group 'dummy' has assigned these partitions to another member; trying again"
    consumer.run_until_idle()
    assert committed() == 1


def held(consumer: Any) -> int:
    return consumer._kser_work_queue.in_flight


def test_rebalance_fetches_unstarted_records_again() -> None:
    send_messages(*"12345")
    consumer = new_consumer(LATER)
    consumer._kser_poller.poll_once(0)
    consumer._kser_worker_pool.step()
    assert held(consumer) == 4
    InMemoryBroker.at("").create_topic("dice", 2)
    consumer._kser_poller.poll_once(0)
    assert held(consumer) == 4
    consumer.run_until_idle()
    assert ScriptedTask.ran == list("12345")
