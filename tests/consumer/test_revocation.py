"""Tests of revoked partitions in the work queue: their running records are resumed when they return."""

from __future__ import annotations

from kser.consumer.client import Commit
from tests.consumer.harness import DICE
from tests.consumer.queue_under_test import OTHER, QueueUnderTest, offsets, record


def test_revoked_partition_starts_no_more_records() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("--aa")
    first, waiting, _ = queue.start_all()
    queue.requeue(waiting, 5)
    revocation = queue.partitions.on_revoke([DICE])
    queue.clock.advance(5)
    assert queue.start_all() == []
    assert not revocation.drained
    assert queue.task_done(first) is False
    assert revocation.commits() == {DICE: Commit(1)}


def test_revocation_waits_for_running_records_and_commits_them() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("--")
    first, second = queue.start_all()
    revocation = queue.partitions.on_revoke([DICE])
    queue.task_done(second)
    assert not revocation.drained
    queue.task_done(first)
    assert revocation.drained
    revocation.wait()
    assert revocation.commits() == {DICE: Commit(2)}


def test_revocation_waits_no_longer_than_revoke_timeout() -> None:
    queue = QueueUnderTest(revoke_timeout=10)
    queue.fetch_keys("--")
    queue.start_next()
    queue.task_done(queue.start_next())
    revocation = queue.partitions.on_revoke([DICE])
    queue.clock.advance(9.9)
    assert not revocation.drained
    queue.clock.advance(0.1)
    assert revocation.drained
    revocation.wait()
    assert revocation.commits() == {DICE: Commit(0, "kser:1,1")}


def test_running_record_is_resumed_when_its_partition_returns() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("aa-")
    running = queue.start_next()
    queue.revoke_and_reassign()
    queue.fetch_keys("aa-")
    (keyless,) = queue.start_all()
    assert keyless.record.offset == 2
    assert queue.task_done(running) is True
    assert offsets(queue.start_all()) == [1]
    assert queue.partitions.commits() == {DICE: Commit(1, "")}


def test_record_finished_while_revoked_is_not_started_again() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("--")
    first, second = queue.start_all()
    queue.partitions.on_revoke([DICE])
    assert queue.task_done(second) is False
    queue.partitions.on_assign({DICE: Commit(0)})
    queue.fetch_keys("--")
    assert queue.start_all() == []
    queue.task_done(first)
    assert queue.partitions.commits() == {DICE: Commit(2)}


def test_record_finished_before_its_redelivery_is_not_started_again() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("--")
    first = queue.start_next()
    queue.revoke_and_reassign()
    assert queue.task_done(first) is True
    queue.fetch_keys("--")
    assert offsets(queue.start_all()) == [1]
    assert queue.partitions.commits() == {DICE: Commit(1)}


def test_rebalance_keeps_the_attempt_number_of_a_delayed_retry() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("aa")
    queue.requeue(queue.start_next(), 10)
    queue.revoke_and_reassign()
    queue.fetch_keys("aa")
    assert queue.start_all() == []
    queue.clock.advance(10)
    (again,) = queue.start_all()
    assert (again.record.offset, again.attempt.number) == (0, 2)
    queue.task_done(again)
    assert offsets(queue.start_all()) == [1]


def test_record_failed_while_revoked_is_retried_when_its_partition_returns() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("-")
    running = queue.start_next()
    queue.partitions.on_revoke([DICE])
    queue.requeue(running, 10)
    queue.partitions.on_assign({DICE: Commit(0)})
    queue.fetch_keys("-")
    assert queue.start_all() == []
    queue.clock.advance(10)
    (again,) = queue.start_all()
    assert again.attempt.number == 2


def test_records_committed_by_another_consumer_are_not_run() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("---")
    _, waiting, running = queue.start_all()
    queue.requeue(waiting, 1)
    queue.partitions.on_revoke([DICE])
    queue.partitions.on_assign({DICE: Commit(2)})
    queue.clock.advance(1)
    assert queue.start_all() == []
    queue.fetch(record(2), record(3))
    assert offsets(queue.start_all()) == [3]
    queue.task_done(running)
    assert queue.partitions.commits() == {DICE: Commit(3)}


def test_offset_reset_of_the_group_starts_records_again() -> None:
    """The committed offset was deleted or reset, so the group requests the records again."""
    queue = QueueUnderTest()
    queue.fetch_keys("--")
    for item in queue.start_all():
        queue.task_done(item)
    commits = queue.partitions.on_revoke([DICE]).commits()
    queue.partitions.on_assign(commits)
    queue.partitions.on_revoke([DICE])
    queue.partitions.on_assign({DICE: Commit(0)})
    queue.fetch_keys("--")
    assert offsets(queue.start_all()) == [0, 1]


def test_new_start_position_discards_tracked_records() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("-")
    old = queue.start_next()
    queue.partitions.on_reset({DICE: Commit(0)})
    queue.fetch_keys("-")
    (new,) = queue.start_all()
    assert queue.task_done(old) is False
    assert queue.partitions.commits() == {}
    assert queue.task_done(new) is True
    assert queue.partitions.commits() == {DICE: Commit(1)}


def test_running_record_of_a_lost_partition_is_resumed_when_it_returns() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("--")
    queue.start_next()
    queue.partitions.on_lost([DICE])
    assert queue.partitions.assignment == frozenset()
    queue.partitions.on_assign({DICE: Commit(0)})
    queue.fetch_keys("--")
    assert offsets(queue.start_all()) == [1]


def test_records_finished_in_the_commit_metadata_are_not_started() -> None:
    queue = QueueUnderTest()
    queue.partitions.on_assign({OTHER: Commit(0, "kser:1,2")})
    queue.fetch(*(record(n, partition=1) for n in range(4)))
    assert offsets(queue.start_all()) == [0, 3]


def test_revocation_of_an_unassigned_partition_does_nothing() -> None:
    queue = QueueUnderTest()
    revocation = queue.partitions.on_revoke([OTHER])
    assert revocation.drained
    assert revocation.commits() == {}
