"""Tests of rebalances on the in-memory transport: finished records are committed and not run again."""

from __future__ import annotations

import logging
import threading

import pytest

from kser.dummy.broker import InMemoryBroker
from kser.retry import Retry
from tests.consumer.harness import (
    MANUAL_COMMIT,
    NO_INTERVAL_COMMIT,
    ConsumerThread,
    FaultyConsumer,
    ScriptedTask,
    committed,
    send_messages,
)
from tests.support import WAIT_SECONDS, Clock, lines, wait_until

pytestmark = pytest.mark.usefixtures("bus")


def rebalance(*consumers: FaultyConsumer) -> None:
    """Poll with each consumer until a rebalance is complete."""
    for _ in range(2 * len(consumers)):
        for consumer in consumers:
            consumer.poll()


def test_rebalance_commits_finished_records() -> None:
    send_messages("1", "2", "3")
    first = FaultyConsumer(NO_INTERVAL_COMMIT)
    first.poll()
    first.run_record()
    assert committed() == 0
    second = FaultyConsumer(NO_INTERVAL_COMMIT)
    rebalance(first, second)
    assert committed() == 1
    second.close()
    first.run_until_idle()
    assert ScriptedTask.ran == ["1", "2", "3"]


def test_rebalance_continues_behind_finished_records_in_another_consumer(bus: InMemoryBroker) -> None:
    bus.create_topic("dice", 2)
    for number in range(10):
        send_messages(f"0/{number}", partition=0)
        send_messages(f"1/{number}", partition=1)
    first = FaultyConsumer(NO_INTERVAL_COMMIT)
    first.poll()
    for _ in range(7):
        first.run_record()
    second = FaultyConsumer(NO_INTERVAL_COMMIT)
    rebalance(first, second)
    assert len(first.assignment) == len(second.assignment) == 1
    while first.step(timeout=0) + second.step(timeout=0):
        pass
    first.close()
    second.close()
    assert sorted(ScriptedTask.ran) == sorted(f"{partition}/{number}" for partition in (0, 1) for number in range(10))
    assert (committed(0), committed(1)) == (10, 10)


def test_rebalance_waits_for_a_running_record_and_does_not_run_it_again() -> None:
    gate = threading.Event()
    ScriptedTask.script["1"] = lambda: gate.wait(WAIT_SECONDS)
    send_messages("1")
    first = FaultyConsumer(NO_INTERVAL_COMMIT)
    with ConsumerThread(first) as thread:
        wait_until(lambda: ScriptedTask.ran)
        second = FaultyConsumer(NO_INTERVAL_COMMIT)
        threading.Timer(0.1, gate.set).start()
        first.stop()
        while thread.is_running:
            second.step(timeout=0.01)
        second.run_until_idle()
        second.close()
    assert (ScriptedTask.ran, committed()) == (["1"], 1)


def test_rebalance_resumes_a_running_record_when_its_partition_returns(caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()
    ScriptedTask.script["1"] = lambda: gate.wait(WAIT_SECONDS)
    send_messages("1", "2")
    first = FaultyConsumer(NO_INTERVAL_COMMIT, revoke_timeout=0.05, workers=2)
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
    first.poll()
    item = first.start_record()
    first.current_client.expel()
    second = FaultyConsumer(MANUAL_COMMIT)
    assert second.step(timeout=0) == 1
    assert committed() == 1
    first.poll()
    first.run_started(item)
    first.commit()
    assert (ScriptedTask.ran, committed(), first.current_client.commits) == (["1", "1"], 1, [])
    (line,) = [line for line in lines(caplog, logging.INFO) if "was revoked" in line]
    assert line == (
        "FaultyConsumer: the message at offset 0 of dice[0] was finished after the partition was revoked, so it"
        " is not committed: it will run again, unless this consumer gets the partition back"
    )


def test_records_of_a_lost_partition_are_not_committed() -> None:
    """Another consumer owns the partition and may have committed later offsets."""
    send_messages("1", "2", "3")
    first = FaultyConsumer(NO_INTERVAL_COMMIT)
    first.poll()
    first.run_record()
    first.current_client.expel()
    second = FaultyConsumer(MANUAL_COMMIT)
    assert second.step(timeout=0) == 3
    first.poll()
    first.close()
    assert (first.current_client.commits, committed()) == ([], 3)
    assert ScriptedTask.ran == ["1", "1", "2", "3"]


def test_rebalance_keeps_the_attempt_number_of_a_delayed_record() -> None:
    attempts: list[int] = []
    ScriptedTask.script["1"] = ConnectionError("no")
    send_messages("1")
    clock = Clock()
    consumer = FaultyConsumer(
        NO_INTERVAL_COMMIT, retry=Retry(max_attempts=3, delay=10, backoff=1, jitter=False), clock=clock
    )
    for _ in range(3):
        attempts.append(consumer.step(timeout=0))
        InMemoryBroker.at("").create_topic("dice", len(InMemoryBroker.at("").topics["dice"]) + 1)
        consumer.step(timeout=0)
        clock.advance(10)
    assert (attempts, len(ScriptedTask.ran)) == ([1, 1, 1], 3)
    assert (consumer.counts["retried"], consumer.counts["failed"]) == (2, 1)


def test_added_partitions_start_at_their_beginning() -> None:
    consumer = FaultyConsumer(MANUAL_COMMIT)
    consumer.step(timeout=0)
    InMemoryBroker.at("").create_topic("dice", 2)
    send_messages("1", partition=1)
    consumer.run_until_idle()
    assert (ScriptedTask.ran, committed(1)) == (["1"], 1)


def test_commit_metadata_survives_the_death_of_its_consumer() -> None:
    """The metadata contains the records that the dead consumer finished above its unfinished record."""
    send_messages(*"123456")
    first = FaultyConsumer(MANUAL_COMMIT, ordering="none")
    first.poll()
    first.start_record()
    for _ in range(3):
        first.run_record()
    first.commit()
    first.current_client.expel()
    FaultyConsumer(MANUAL_COMMIT).run_until_idle()
    assert ScriptedTask.ran == ["2", "3", "4", "1", "5", "6"]
    assert committed() == 6


def test_late_commit_is_a_logged_error_and_is_retried(caplog: pytest.LogCaptureFixture) -> None:
    send_messages("1")
    consumer = FaultyConsumer(MANUAL_COMMIT)
    consumer.poll()
    consumer.current_client.expel()
    consumer.run_record()
    consumer.commit()
    (line,) = lines(caplog, logging.ERROR)
    assert line == "FaultyConsumer: the group 'dummy' has assigned these partitions to another member; trying again"
    consumer.run_until_idle()
    assert committed() == 1


def test_rebalance_fetches_unstarted_records_again() -> None:
    send_messages(*"12345")
    consumer = FaultyConsumer(NO_INTERVAL_COMMIT)
    consumer.poll()
    consumer.run_record()
    assert consumer.in_flight == 4
    InMemoryBroker.at("").create_topic("dice", 2)
    consumer.poll()
    assert consumer.in_flight == 4
    consumer.run_until_idle()
    assert ScriptedTask.ran == list("12345")
