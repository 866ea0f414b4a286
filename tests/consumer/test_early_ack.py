"""Tests of acked records and of background services, without threads of the consumer."""

from __future__ import annotations

import threading
from typing import Any
from uuid import UUID

import pytest

from kser.attempt import TIMED_OUT, Attempt, AttemptAbandoned, ConsumerCallbacks, Failure, TaskAttempt, current_attempt
from kser.consumer.client import Commit
from kser.consumer.services import BackgroundServices
from kser.errors import SettingError, StoreUnavailable
from kser.retry import Retry
from kser.sequencing.task import Task
from tests.consumer.harness import DICE, ScriptedTask, new_consumer, send_messages
from tests.consumer.queue_under_test import QueueUnderTest, offsets, record
from tests.support import WAIT_SECONDS, Clock, wait_until

# -- the work queue ----------------------------------------------------------------------------------------------------


def test_acked_record_may_be_committed_while_it_runs() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("--")
    first = desk.next()
    desk.ack(first.attempt)
    assert (desk.partitions.commits(), desk.in_flight) == ({DICE: Commit(1)}, 1)
    assert desk.running() == [first]


def test_acked_record_no_longer_counts_towards_the_in_flight_limit() -> None:
    desk = QueueUnderTest(max_in_flight=2)
    desk.enter_keys("--")
    assert desk.capacity() == 0
    desk.ack(desk.next().attempt)
    assert desk.capacity() == 1


def test_ack_and_task_done_count_a_record_once() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("--")
    item = desk.next()
    desk.ack(item.attempt)
    desk.ack(item.attempt)
    assert desk.task_done(item) is True
    assert (desk.in_flight, desk.finished_count, desk.partitions.commits()) == (1, 1, {DICE: Commit(1)})


def test_lane_still_waits_for_an_acked_record() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("aa")
    item = desk.next()
    desk.ack(item.attempt)
    assert desk.all() == []
    desk.task_done(item)
    assert offsets(desk.all()) == [1]


def test_revocation_does_not_wait_for_an_acked_record() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("-")
    item = desk.next()
    desk.ack(item.attempt)
    revocation = desk.partitions.on_revoke([DICE])
    assert revocation.drained
    assert revocation.commits() == {DICE: Commit(1)}
    # It was committed, so that it is no loss either.
    assert desk.task_done(item) is True


def test_ack_after_revocation_finishes_the_record() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("-")
    item = desk.next()
    revocation = desk.partitions.on_revoke([DICE])
    assert not revocation.drained
    desk.ack(item.attempt)
    assert revocation.drained
    assert (desk.task_done(item), desk.in_flight) == (True, 0)


def test_acked_record_is_not_started_again_when_its_partition_returns() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("--")
    item = desk.next()
    desk.ack(item.attempt)
    desk.come_back()
    desk.enter_keys("--")
    assert offsets(desk.all()) == [1]
    desk.task_done(item)
    assert desk.in_flight == 1


def test_acked_record_that_times_out_gets_a_replacement_attempt() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("aa")
    item = desk.next()
    desk.ack(item.attempt)
    timeout_error = TimeoutError("too long")
    assert desk.time_out(item, timeout_error, item.attempt.outcome) is True
    (stand_in,) = desk.all()
    assert (stand_in.attempt.timeout_error, stand_in.attempt.acked, stand_in.record.offset) == (timeout_error, True, 0)
    assert desk.task_done(item) is True
    desk.task_done(stand_in)
    assert offsets(desk.all()) == [1]
    assert desk.in_flight == 1


def test_replacement_attempt_of_an_acked_record_runs_after_revocation() -> None:
    """The replacement has to record the timeout in the database, even if another consumer owns the partition."""
    desk = QueueUnderTest()
    desk.enter_keys("-")
    item = desk.next()
    desk.ack(item.attempt)
    desk.partitions.on_revoke([DICE])
    desk.time_out(item, TimeoutError("too long"), item.attempt.outcome)
    (stand_in,) = desk.all()
    assert desk.task_done(stand_in) is True


def test_abandoned_acked_record_is_not_redelivered() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("-")
    item = desk.next()
    desk.ack(item.attempt)
    assert desk.abandon(item.attempt) is True
    assert desk.partitions.commits() == {DICE: Commit(1)}


# -- the attempt -------------------------------------------------------------------------------------------------------


def test_acked_record_is_neither_retried_nor_dead_lettered() -> None:
    attempt = Attempt(Retry(max_attempts=9))
    attempt.ack()
    assert attempt.should_retry(ConnectionError("no"), Failure("failed", "", "no")) is False
    assert (attempt.retry_in, attempt.failure) == (None, None)


def test_attempts_before_a_resume_do_not_count_for_the_retry_policy() -> None:
    attempt = Attempt(Retry(max_attempts=3, delay=10, backoff=2, jitter=False))
    attempt.number, attempt.attempts_not_counted = 4, 3
    assert attempt.should_retry(ConnectionError("no"), Failure("failed", "", "no")) is True
    assert attempt.retry_in == 10
    attempt.number = 6
    assert attempt.should_retry(ConnectionError("no"), Failure("failed", "", "no")) is False


def test_step_restarts_the_timer_of_its_attempt(bus: Any) -> None:
    send_messages("1", "2")
    clock = Clock()
    consumer = new_consumer(clock=clock)
    seen: list[Any] = []

    def part() -> None:
        attempt: Any = current_attempt.get()
        before = attempt.started_at
        clock.advance(100)
        assert attempt.resolve(TIMED_OUT)
        attempt.restart_timer(5)
        seen.append((attempt.time_limit, attempt.started_at - before, attempt.resolve()))

    ScriptedTask.script["1"] = part
    consumer.step(timeout=0)
    # Whoever decided about the part before decided nothing about this one.
    assert seen == [(5, 100, True)]


def test_abandoned_attempt_stays_unfinished(bus: Any) -> None:
    send_messages("1")
    consumer = new_consumer()

    def give_back() -> None:
        attempt = current_attempt.get()
        assert attempt is not None
        attempt.abandon()

    ScriptedTask.script["1"] = give_back
    consumer.step(timeout=0)
    assert (consumer._kser_work_queue.running(), consumer._kser_partitions.commits()) == ([], {})
    assert consumer.counts["done"] == 0


def test_abandon_outside_a_consumer_raises() -> None:
    attempt = Attempt()
    with pytest.raises(AttemptAbandoned):
        attempt.abandon()
    assert attempt.abandoned


def test_redelivered_record_has_the_same_deterministic_uuid() -> None:
    found = []
    for _ in range(2):
        desk = QueueUnderTest()
        desk.enter_keys("--")
        found.append([item.attempt.deterministic_uuid() for item in desk.all()])
    assert found[0] == found[1]
    assert len(set(found[0])) == 2
    assert {UUID(each).version for each in found[0]} == {5}


def test_deterministic_uuids_differ_between_clusters() -> None:
    def uuid_in(cluster: str) -> str:
        attempt = Attempt(record=record(0))
        attempt.callbacks = ConsumerCallbacks(ignore, ignore, float, lambda: cluster, bool)
        return attempt.deterministic_uuid()

    def ignore(_: Attempt) -> None: ...

    assert uuid_in("") == Attempt(record=record(0)).deterministic_uuid()
    assert uuid_in("another") != uuid_in("")


def test_message_without_a_record_has_a_unique_uuid() -> None:
    assert Attempt().deterministic_uuid() != Attempt().deterministic_uuid()


def test_step_attempt_resolves_the_outer_attempt_when_it_ends() -> None:
    outer = Attempt()
    task = Task("1")
    step = TaskAttempt(outer, task, 3, None, "op", lambda: False)
    step.on_finished(task)
    assert outer.resolve(TIMED_OUT) is False
    assert (step.number, step.operation_uuid) == (3, "op")


def test_step_of_an_abandoned_attempt_raises() -> None:
    outer = Attempt()
    outer.mark_abandoned()
    step = TaskAttempt(outer, Task("1"), 1, None, "op", lambda: False)
    with pytest.raises(AttemptAbandoned):
        step.on_finished(Task("2"))


def test_cancel_requests_are_looked_up_at_a_limited_rate() -> None:
    looks: list[int] = []

    def look() -> bool:
        looks.append(1)
        return False

    step = TaskAttempt(None, Task("1"), 1, None, "op", look)
    assert [step.cancel_requested for _ in range(100)] == [False] * 100
    assert len(looks) == 1


# -- beside a consumer -------------------------------------------------------------------------------------------------


class Companion:
    """Notes its turns."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def tick(self) -> None:
        self.told.append("tick")

    def close(self) -> None:
        self.told.append("close")


def is_running() -> bool:
    return any(thread.name == "kser-services" for thread in threading.enumerate())


def test_no_thread_starts_without_background_services() -> None:
    beside = BackgroundServices(lambda: [])
    beside.start()
    assert not is_running()
    beside.close(WAIT_SECONDS)


def test_background_services_run_periodically_and_are_closed_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kser.consumer.services.TICK_INTERVAL", 0.01)
    both = [Companion(), Companion()]
    beside = BackgroundServices(lambda: both)
    beside.start()
    wait_until(lambda: all(len(each.told) > 2 for each in both))
    beside.close(WAIT_SECONDS)
    assert not is_running()
    assert [each.told[-1] for each in both] == ["close", "close"]


def test_background_services_added_later_run_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kser.consumer.services.TICK_INTERVAL", 0.01)
    known = [Companion()]
    beside = BackgroundServices(lambda: list(known))
    beside.start()
    known.append(Companion())
    wait_until(lambda: known[1].told)
    beside.close(WAIT_SECONDS)
    assert known[1].told[-1] == "close"


def test_misconfigured_background_service_raises_at_the_start() -> None:
    def find() -> list[Companion]:
        raise SettingError("KSER_LEASE must be a number above 0")

    with pytest.raises(SettingError, match="KSER_LEASE"):
        BackgroundServices(find).start()
    assert not is_running()


def test_background_service_starts_when_its_database_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kser.consumer.services.TICK_INTERVAL", 0.01)
    background_service = Companion()
    trouble: list[Exception] = [StoreUnavailable("it does not answer")] * 3

    def find() -> list[Companion]:
        if trouble:
            raise trouble.pop()
        return [background_service]

    beside = BackgroundServices(find)
    beside.start()
    wait_until(lambda: background_service.told)
    beside.close(WAIT_SECONDS)
    assert background_service.told[-1] == "close"
