"""Tests of the work queue: lanes, the in-flight limit, retries and abandoned attempts. No threads here."""

from __future__ import annotations

import pytest

from kser.attempt import FAILED, Failure
from kser.consumer.client import Commit
from kser.consumer.partition_table import PartitionTable
from kser.consumer.work_item import WorkItem
from kser.consumer.work_queue import WorkQueue
from tests.consumer.harness import DICE
from tests.consumer.queue_under_test import OTHER, QueueUnderTest, offsets, record

# -- lanes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ordering", "keys", "at_once"),
    [
        ("key", "aabb", [0, 2]),
        ("key", "----", [0, 1, 2, 3]),
        ("key", "a-a-", [0, 1, 3]),
        ("partition", "ab--", [0]),
        ("none", "aab-", [0, 1, 2, 3]),
    ],
)
def test_ordering_decides_which_records_run_concurrently(ordering: str, keys: str, at_once: list[int]) -> None:
    desk = QueueUnderTest(ordering=ordering)
    desk.enter_keys(keys)
    assert offsets(desk.all()) == at_once


@pytest.mark.parametrize("ordering", ["key", "partition"])
def test_partitions_run_independently(ordering: str) -> None:
    desk = QueueUnderTest(ordering=ordering)
    desk.partitions.on_assign({OTHER: Commit(0)})
    desk.enter(record(0, b"a"), record(0, b"a", partition=1))
    assert len(desk.all()) == 2


def test_records_of_a_key_run_in_order() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("aaa")
    seen = []
    for _ in range(3):
        (item,) = desk.all()
        seen.append(item.record.offset)
        assert desk.task_done(item)
    assert seen == [0, 1, 2]
    assert desk.all() == []


def test_empty_key_counts_as_a_key() -> None:
    desk = QueueUnderTest()
    desk.enter(record(0, b""), record(1, b""))
    assert offsets(desk.all()) == [0]


def test_later_record_joins_the_lane_of_a_running_one() -> None:
    desk = QueueUnderTest()
    desk.enter(record(0, b"a"))
    first = desk.next()
    desk.enter(record(1, b"a"))
    assert desk.all() == []
    desk.task_done(first)
    assert offsets(desk.all()) == [1]


def test_empty_lane_is_removed() -> None:
    """There may be as many keys as there are records."""
    desk = QueueUnderTest()
    desk.enter_keys("ab")
    for item in desk.all():
        desk.task_done(item)
    assert desk.lanes._lanes == {}


def test_record_finished_twice_counts_once() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("-")
    item = desk.next()
    assert [desk.task_done(item), desk.task_done(item)] == [True, True]
    assert (desk.finished_count, desk.in_flight) == (1, 0)


# -- retries -----------------------------------------------------------------------------------------------------------


def test_retry_backoff_delays_the_record_and_its_lane() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("aab-")
    first, *others = desk.all()
    desk.requeue(first, 10)
    for item in others:
        desk.task_done(item)
    desk.time.advance(9.9)
    assert desk.all() == []
    desk.time.advance(0.1)
    (again,) = desk.all()
    assert (again.record.offset, again.attempt.number) == (0, 2)
    desk.task_done(again)
    assert offsets(desk.all()) == [1]


def test_retries_run_in_the_order_of_their_due_times() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("---")
    for item, seconds in zip(desk.all(), (30, 10, 20), strict=True):
        desk.requeue(item, seconds)
    desk.time.advance(30)
    assert offsets(desk.all()) == [1, 2, 0]


def test_delayed_record_blocks_the_commit_and_frees_the_in_flight_limit() -> None:
    desk = QueueUnderTest(max_in_flight=3)
    desk.enter_keys("--")
    first, second = desk.all()
    desk.requeue(first, 10)
    desk.task_done(second)
    assert desk.capacity() == 3
    assert desk.partitions.commits()[DICE] == Commit(0, "kser:1,1")


# -- room --------------------------------------------------------------------------------------------------------------


def test_in_flight_limit_bounds_the_number_of_records() -> None:
    desk = QueueUnderTest(max_in_flight=3)
    assert desk.capacity() == 3
    desk.enter_keys("---")
    assert desk.capacity() == 0
    desk.task_done(desk.next())
    assert desk.capacity() == 1


def test_in_flight_limit_bounds_the_bytes_as_estimated_from_the_last_fetch() -> None:
    """The size of a fetch is known only afterwards, so the size of the last fetch is the estimate."""
    desk = QueueUnderTest(max_in_flight=1000, max_bytes=1000)
    desk.enter(record(0, value=b"x" * 90, key=b"k" * 10))
    assert desk.capacity() == 10
    desk.enter(*(record(n, value=b"x" * 100) for n in range(1, 10)))
    assert desk.capacity() == 0
    desk.task_done(desk.next())
    assert desk.capacity() == 2


def test_in_flight_limit_admits_one_record_of_any_size() -> None:
    desk = QueueUnderTest(max_bytes=10)
    desk.enter(record(0, value=b"x" * 1000))
    assert desk.capacity() == 0
    desk.task_done(desk.next())
    assert desk.capacity() == 1


def test_revoked_records_free_the_in_flight_limit() -> None:
    desk = QueueUnderTest(max_in_flight=3, max_bytes=100)
    desk.enter(*(record(n, value=b"x" * 40) for n in range(3)))
    desk.next()
    desk.partitions.on_revoke([DICE])
    assert (desk.capacity(), desk.in_flight, desk._in_flight_limit.bytes) == (3, 0, 0)


def test_in_flight_count_stays_correct_through_a_revocation() -> None:
    desk = QueueUnderTest()
    desk.enter(*(record(n, b"a", b"xyz") for n in range(4)))
    first = desk.next()
    desk.come_back()
    desk.enter(*(record(n, b"a", b"xyz") for n in range(4)))
    assert (desk.in_flight, desk._in_flight_limit.bytes) == (4, 16)
    desk.task_done(first)
    for _ in range(3):
        desk.task_done(desk.next())
    assert (desk.in_flight, desk._in_flight_limit.bytes) == (0, 0)


# -- commits -----------------------------------------------------------------------------------------------------------


def test_committed_offset_is_not_committed_again() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("--")
    desk.task_done(desk.next())
    commits = desk.partitions.commits()
    assert commits == {DICE: Commit(1)}
    desk.partitions.mark_committed({**commits, OTHER: Commit(5)})
    assert desk.partitions.commits() == {}


def test_partition_without_a_group_starts_at_its_first_record() -> None:
    queue = WorkQueue()
    partitions = PartitionTable(queue)
    partitions.put({OTHER: [record(7, partition=1)]})
    item = queue.get(0)
    assert item is not None
    queue.task_done(item)
    assert partitions.commits() == {OTHER: Commit(8)}


def test_records_of_a_revoked_partition_are_ignored() -> None:
    desk = QueueUnderTest()
    desk.partitions.on_revoke([DICE])
    desk.enter_keys("--")
    assert (desk.all(), desk.in_flight, desk.partitions.assignment) == ([], 0, frozenset())


# -- held --------------------------------------------------------------------------------------------------------------


def dead(item: WorkItem) -> WorkItem:
    item.attempt.failure = Failure(FAILED, "KeyError", "x")
    return item


def test_unwritten_dead_letter_blocks_its_partition() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("--")
    desk.retry_dead_letter(dead(desk.next()), 30)
    assert set(desk.partitions.blocked_partitions()) == {DICE}
    assert offsets(desk.all()) == [1]
    desk.time.advance(30)
    (again,) = desk.all()
    assert (again.attempt.failure, again.attempt.number, again.dead_letter_tries) == (
        Failure(FAILED, "KeyError", "x"),
        1,
        1,
    )
    assert set(desk.partitions.blocked_partitions()) == {DICE}
    desk.task_done(again)
    assert set(desk.partitions.blocked_partitions()) == set()


def test_unwritten_dead_letter_blocks_its_partition_through_a_rebalance() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("--")
    desk.retry_dead_letter(dead(desk.next()), 30)
    desk.come_back()
    assert set(desk.partitions.blocked_partitions()) == {DICE}


def test_partition_is_blocked_when_its_commit_metadata_is_nearly_full() -> None:
    desk = QueueUnderTest(ordering="none", max_in_flight=10_000)
    desk.partitions.put({DICE: [record(n) for n in range(4000)]})
    for item in desk.all():
        if item.record.offset % 2:
            desk.task_done(item)
    desk.partitions.mark_committed(desk.partitions.commits())
    assert set(desk.partitions.blocked_partitions()) == {DICE}


# -- attempts that are given up ----------------------------------------------------------------------------------------


def test_timed_out_attempt_is_followed_by_its_timeout_error() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("aa")
    item, timeout_error = desk.next(), TimeoutError("late")
    assert desk.time_out(item, timeout_error, item.attempt.outcome)
    assert item.attempt.abandoned
    (following,) = desk.all()
    assert (following.record, following.attempt.number, following.attempt.timeout_error) == (
        item.record,
        1,
        timeout_error,
    )
    desk.task_done(item)
    assert desk.partitions.commits() == {}
    desk.task_done(following)
    assert desk.partitions.commits() == {DICE: Commit(1)}


def test_abandoned_attempt_leaves_its_record_unfinished() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("--")
    item = desk.next()
    desk.task_done(desk.next())
    assert desk.abandon(item.attempt)
    assert (desk.running(), desk.partitions.commits()) == ([], {DICE: Commit(0, "kser:1,1")})


def test_finished_attempt_can_neither_time_out_nor_be_abandoned() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("-")
    item = desk.next()
    desk.task_done(item)
    assert (
        desk.time_out(item, TimeoutError(), item.attempt.outcome),
        desk.abandon(item.attempt),
        item.attempt.abandoned,
    ) == (False, False, False)


# -- pause and end -----------------------------------------------------------------------------------------------------


def test_paused_queue_hands_out_no_record() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("---")
    desk.requeue(desk.next(), 1)
    desk.pause(True)
    desk.time.advance(1)
    assert desk.all() == []
    desk.pause(False)
    assert sorted(offsets(desk.all())) == [0, 1, 2]


def test_closed_queue_hands_out_no_record_and_still_counts_finished_ones() -> None:
    desk = QueueUnderTest()
    desk.enter_keys("aa-b")
    first, keyless, _ = desk.all()
    desk.close()
    assert desk.capacity() == 0
    assert desk.task_done(first) is True
    desk.requeue(keyless, 0)
    desk.time.advance(1)
    assert desk.all() == []
    assert desk.partitions.commits() == {DICE: Commit(1)}


# -- signs of life -----------------------------------------------------------------------------------------------------


def test_expired_group_lease_stops_new_attempts_until_renewed() -> None:
    desk = QueueUnderTest(max_silence=3)
    desk.enter_keys("--")
    desk.time.advance(3)
    assert desk.get(0) is None
    desk.group_lease.renew()
    assert desk.next().record.offset == 0
