"""Tests of the attempt: retries, the timer, the deterministic uuid, and the attempt of a step."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from kser.attempt import TIMED_OUT, Attempt, AttemptAbandoned, ConsumerCallbacks, Failure, TaskAttempt, current_attempt
from kser.retry import Retry
from kser.sequencing.task import Task
from tests.consumer.harness import ScriptedTask, new_consumer, send_messages
from tests.consumer.queue_under_test import QueueUnderTest, record
from tests.support import Clock


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
    restarts: list[Any] = []

    def restart() -> None:
        attempt: Any = current_attempt.get()
        started_at = attempt.started_at
        clock.advance(100)
        assert attempt.resolve(TIMED_OUT)
        attempt.restart_timer(5)
        # The outcome of the step before does not decide about this step.
        restarts.append((attempt.time_limit, attempt.started_at - started_at, attempt.resolve()))

    ScriptedTask.script["1"] = restart
    consumer.step(timeout=0)
    assert restarts == [(5, 100, True)]


def test_abandoned_attempt_stays_unfinished(bus: Any) -> None:
    send_messages("1")
    consumer = new_consumer()

    def abandon() -> None:
        attempt = current_attempt.get()
        assert attempt is not None
        attempt.abandon()

    ScriptedTask.script["1"] = abandon
    consumer.step(timeout=0)
    assert (consumer._kser_work_queue.running(), consumer._kser_partitions.commits()) == ([], {})
    assert consumer.counts["done"] == 0


def test_abandon_outside_a_consumer_raises() -> None:
    attempt = Attempt()
    with pytest.raises(AttemptAbandoned):
        attempt.abandon()
    assert attempt.abandoned


def test_redelivered_record_has_the_same_deterministic_uuid() -> None:
    def deliver() -> list[str]:
        queue = QueueUnderTest()
        queue.fetch_keys("--")
        return [item.attempt.deterministic_uuid() for item in queue.start_all()]

    first, second = deliver(), deliver()
    assert first == second
    assert len(set(first)) == 2
    assert {UUID(uuid).version for uuid in first} == {5}


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
    queries: list[int] = []

    def is_cancelled() -> bool:
        queries.append(1)
        return False

    step = TaskAttempt(None, Task("1"), 1, None, "op", is_cancelled)
    assert [step.cancel_requested for _ in range(100)] == [False] * 100
    assert len(queries) == 1
