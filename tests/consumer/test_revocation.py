"""Tests of revoked partitions in the work queue: running records are resumed when they return. No threads here."""

from __future__ import annotations

from kser.consumer.client import Commit
from tests.consumer.harness import DICE
from tests.consumer.queue_under_test import OTHER, QueueUnderTest, offsets, record


def test_revoked_partition_starts_no_more_records() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("--aa")
    first, waiting, _ = desk.all()
    desk.requeue(waiting, 5)
    revocation = desk.partitions.on_revoke([DICE])
    desk.time.advance(5)
    assert desk.all() == []
    assert not revocation.drained
    assert desk.task_done(first) is False
    assert revocation.commits() == {DICE: Commit(1)}


def test_revocation_waits_for_running_records_and_commits_them() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("--")
    first, second = desk.all()
    revocation = desk.partitions.on_revoke([DICE])
    desk.task_done(second)
    assert not revocation.drained
    desk.task_done(first)
    assert revocation.drained
    revocation.wait()
    assert revocation.commits() == {DICE: Commit(2)}


def test_revocation_waits_no_longer_than_revoke_timeout() -> None:
    desk = QueueUnderTest(revoke_timeout=10)
    desk.enter_keys("--")
    desk.next()
    desk.task_done(desk.next())
    revocation = desk.partitions.on_revoke([DICE])
    desk.time.advance(9.9)
    assert not revocation.drained
    desk.time.advance(0.1)
    assert revocation.drained
    revocation.wait()
    assert revocation.commits() == {DICE: Commit(0, "kser:1,1")}


def test_running_record_is_resumed_when_its_partition_returns() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("aa-")
    running = desk.next()
    desk.come_back()
    desk.enter_keys("aa-")
    (keyless,) = desk.all()
    assert keyless.record.offset == 2
    assert desk.task_done(running) is True
    assert offsets(desk.all()) == [1]
    assert desk.partitions.commits() == {DICE: Commit(1, "")}


def test_record_finished_while_revoked_is_not_started_again() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("--")
    first, second = desk.all()
    desk.partitions.on_revoke([DICE])
    assert desk.task_done(second) is False
    desk.partitions.on_assign({DICE: Commit(0)})
    desk.enter_keys("--")
    assert desk.all() == []
    desk.task_done(first)
    assert desk.partitions.commits() == {DICE: Commit(2)}


def test_record_finished_before_its_redelivery_is_not_started_again() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("--")
    first = desk.next()
    desk.come_back()
    assert desk.task_done(first) is True
    desk.enter_keys("--")
    assert offsets(desk.all()) == [1]
    assert desk.partitions.commits() == {DICE: Commit(1)}


def test_rebalance_keeps_the_attempt_number_of_a_delayed_retry() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("aa")
    desk.requeue(desk.next(), 10)
    desk.come_back()
    desk.enter_keys("aa")
    assert desk.all() == []
    desk.time.advance(10)
    (again,) = desk.all()
    assert (again.record.offset, again.attempt.number) == (0, 2)
    desk.task_done(again)
    assert offsets(desk.all()) == [1]


def test_record_failed_while_revoked_is_retried_when_its_partition_returns() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("-")
    running = desk.next()
    desk.partitions.on_revoke([DICE])
    desk.requeue(running, 10)
    desk.partitions.on_assign({DICE: Commit(0)})
    desk.enter_keys("-")
    assert desk.all() == []
    desk.time.advance(10)
    (again,) = desk.all()
    assert again.attempt.number == 2


def test_records_committed_by_another_consumer_are_not_run() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("---")
    _, waiting, running = desk.all()
    desk.requeue(waiting, 1)
    desk.partitions.on_revoke([DICE])
    desk.partitions.on_assign({DICE: Commit(2)})
    desk.time.advance(1)
    assert desk.all() == []
    desk.enter(record(2), record(3))
    assert offsets(desk.all()) == [3]
    desk.task_done(running)
    assert desk.partitions.commits() == {DICE: Commit(3)}


def test_offset_reset_of_the_group_starts_records_again() -> None:
    """The committed offset was deleted or reset, so its records are requested again."""
    desk = QueueUnderTest()
    desk.enter_keys("--")
    for item in desk.all():
        desk.task_done(item)
    commits = desk.partitions.on_revoke([DICE]).commits()
    desk.partitions.on_assign(commits)
    desk.partitions.on_revoke([DICE])
    desk.partitions.on_assign({DICE: Commit(0)})
    desk.enter_keys("--")
    assert offsets(desk.all()) == [0, 1]


def test_new_start_position_discards_tracked_records() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("-")
    old = desk.next()
    desk.partitions.on_reset({DICE: Commit(0)})
    desk.enter_keys("-")
    (new,) = desk.all()
    assert desk.task_done(old) is False
    assert desk.partitions.commits() == {}
    assert desk.task_done(new) is True
    assert desk.partitions.commits() == {DICE: Commit(1)}


def test_running_record_of_a_lost_partition_is_resumed_when_it_returns() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("--")
    desk.next()
    desk.partitions.on_lost([DICE])
    assert desk.partitions.assignment == frozenset()
    desk.partitions.on_assign({DICE: Commit(0)})
    desk.enter_keys("--")
    assert offsets(desk.all()) == [1]


def test_records_finished_in_the_commit_metadata_are_not_started() -> None:
    desk = QueueUnderTest()
    desk.partitions.on_assign({OTHER: Commit(0, "kser:1,2")})
    desk.enter(*(record(n, partition=1) for n in range(4)))
    assert offsets(desk.all()) == [0, 3]


def test_revocation_of_an_unassigned_partition_does_nothing() -> None:
    desk = QueueUnderTest()
    revocation = desk.partitions.on_revoke([OTHER])
    assert revocation.drained
    assert revocation.commits() == {}
