"""Tests of acked records in the work queue: an acked record is finished for the group while its attempt runs."""

from __future__ import annotations

from kser.consumer.client import Commit
from tests.consumer.harness import DICE
from tests.consumer.queue_under_test import QueueUnderTest, offsets


def test_acked_record_may_be_committed_while_it_runs() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("--")
    first = queue.start_next()
    queue.ack(first.attempt)
    assert (queue.partitions.commits(), queue.in_flight) == ({DICE: Commit(1)}, 1)
    assert queue.running() == [first]


def test_acked_record_no_longer_counts_towards_the_in_flight_limit() -> None:
    queue = QueueUnderTest(max_in_flight=2)
    queue.fetch_keys("--")
    assert queue.capacity() == 0
    queue.ack(queue.start_next().attempt)
    assert queue.capacity() == 1


def test_ack_and_task_done_count_a_record_once() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("--")
    item = queue.start_next()
    queue.ack(item.attempt)
    queue.ack(item.attempt)
    assert queue.task_done(item) is True
    assert (queue.in_flight, queue.finished_count, queue.partitions.commits()) == (1, 1, {DICE: Commit(1)})


def test_lane_still_waits_for_an_acked_record() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("aa")
    item = queue.start_next()
    queue.ack(item.attempt)
    assert queue.start_all() == []
    queue.task_done(item)
    assert offsets(queue.start_all()) == [1]


def test_revocation_does_not_wait_for_an_acked_record() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("-")
    item = queue.start_next()
    queue.ack(item.attempt)
    revocation = queue.partitions.on_revoke([DICE])
    assert revocation.drained
    assert revocation.commits() == {DICE: Commit(1)}
    assert queue.task_done(item) is True, "committed, so the record is not lost"


def test_ack_after_revocation_finishes_the_record() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("-")
    item = queue.start_next()
    revocation = queue.partitions.on_revoke([DICE])
    assert not revocation.drained
    queue.ack(item.attempt)
    assert revocation.drained
    assert (queue.task_done(item), queue.in_flight) == (True, 0)


def test_acked_record_is_not_started_again_when_its_partition_returns() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("--")
    item = queue.start_next()
    queue.ack(item.attempt)
    queue.revoke_and_reassign()
    queue.fetch_keys("--")
    assert offsets(queue.start_all()) == [1]
    queue.task_done(item)
    assert queue.in_flight == 1


def test_acked_record_that_times_out_gets_a_replacement_attempt() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("aa")
    item = queue.start_next()
    queue.ack(item.attempt)
    timeout_error = TimeoutError("too long")
    assert queue.time_out(item, timeout_error, item.attempt.outcome) is True
    (replacement,) = queue.start_all()
    assert (replacement.attempt.timeout_error, replacement.attempt.acked, replacement.record.offset) == (
        timeout_error,
        True,
        0,
    )
    assert queue.task_done(item) is True
    queue.task_done(replacement)
    assert offsets(queue.start_all()) == [1]
    assert queue.in_flight == 1


def test_replacement_attempt_of_an_acked_record_runs_after_revocation() -> None:
    """The replacement has to record the timeout in the database, even if another consumer owns the partition."""
    queue = QueueUnderTest()
    queue.fetch_keys("-")
    item = queue.start_next()
    queue.ack(item.attempt)
    queue.partitions.on_revoke([DICE])
    queue.time_out(item, TimeoutError("too long"), item.attempt.outcome)
    (replacement,) = queue.start_all()
    assert queue.task_done(replacement) is True


def test_abandoned_acked_record_is_not_redelivered() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("-")
    item = queue.start_next()
    queue.ack(item.attempt)
    assert queue.abandon(item.attempt) is True
    assert queue.partitions.commits() == {DICE: Commit(1)}
