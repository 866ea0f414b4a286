"""Tests of the work queue: lanes, the in-flight limit, retries and abandoned attempts. The tests start no thread."""

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
    queue = QueueUnderTest(ordering=ordering)
    queue.fetch_keys(keys)
    assert offsets(queue.start_all()) == at_once


@pytest.mark.parametrize("ordering", ["key", "partition"])
def test_partitions_run_independently(ordering: str) -> None:
    queue = QueueUnderTest(ordering=ordering)
    queue.partitions.on_assign({OTHER: Commit(0)})
    queue.fetch(record(0, b"a"), record(0, b"a", partition=1))
    assert len(queue.start_all()) == 2


def test_records_of_a_key_run_in_order() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("aaa")
    started = []
    for _ in range(3):
        (item,) = queue.start_all()
        started.append(item.record.offset)
        assert queue.task_done(item)
    assert started == [0, 1, 2]
    assert queue.start_all() == []


def test_empty_key_counts_as_a_key() -> None:
    queue = QueueUnderTest()
    queue.fetch(record(0, b""), record(1, b""))
    assert offsets(queue.start_all()) == [0]


def test_later_record_joins_the_lane_of_a_running_one() -> None:
    queue = QueueUnderTest()
    queue.fetch(record(0, b"a"))
    first = queue.start_next()
    queue.fetch(record(1, b"a"))
    assert queue.start_all() == []
    queue.task_done(first)
    assert offsets(queue.start_all()) == [1]


def test_empty_lane_is_removed() -> None:
    """Each record may have its own key, so lanes that stay would fill the memory."""
    queue = QueueUnderTest()
    queue.fetch_keys("ab")
    for item in queue.start_all():
        queue.task_done(item)
    assert queue.lanes._lanes == {}


def test_record_finished_twice_counts_once() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("-")
    item = queue.start_next()
    assert [queue.task_done(item), queue.task_done(item)] == [True, True]
    assert (queue.finished_count, queue.in_flight) == (1, 0)


# -- retries -----------------------------------------------------------------------------------------------------------


def test_retry_backoff_delays_the_record_and_its_lane() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("aab-")
    first, *others = queue.start_all()
    queue.requeue(first, 10)
    for item in others:
        queue.task_done(item)
    queue.clock.advance(9.9)
    assert queue.start_all() == []
    queue.clock.advance(0.1)
    (again,) = queue.start_all()
    assert (again.record.offset, again.attempt.number) == (0, 2)
    queue.task_done(again)
    assert offsets(queue.start_all()) == [1]


def test_retries_run_in_the_order_of_their_due_times() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("---")
    for item, seconds in zip(queue.start_all(), (30, 10, 20), strict=True):
        queue.requeue(item, seconds)
    queue.clock.advance(30)
    assert offsets(queue.start_all()) == [1, 2, 0]


def test_delayed_record_blocks_the_commit_and_frees_the_in_flight_limit() -> None:
    queue = QueueUnderTest(max_in_flight=3)
    queue.fetch_keys("--")
    first, second = queue.start_all()
    queue.requeue(first, 10)
    queue.task_done(second)
    assert queue.capacity() == 3
    assert queue.partitions.commits()[DICE] == Commit(0, "kser:1,1")


# -- the in-flight limit -----------------------------------------------------------------------------------------------


def test_in_flight_limit_bounds_the_number_of_records() -> None:
    queue = QueueUnderTest(max_in_flight=3)
    assert queue.capacity() == 3
    queue.fetch_keys("---")
    assert queue.capacity() == 0
    queue.task_done(queue.start_next())
    assert queue.capacity() == 1


def test_in_flight_limit_bounds_the_bytes_as_estimated_from_the_last_fetch() -> None:
    """The size of a fetch is known only afterwards, so the size of the last fetch is the estimate."""
    queue = QueueUnderTest(max_in_flight=1000, max_bytes=1000)
    queue.fetch(record(0, value=b"x" * 90, key=b"k" * 10))
    assert queue.capacity() == 10
    queue.fetch(*(record(n, value=b"x" * 100) for n in range(1, 10)))
    assert queue.capacity() == 0
    queue.task_done(queue.start_next())
    assert queue.capacity() == 2


def test_in_flight_limit_admits_one_record_of_any_size() -> None:
    queue = QueueUnderTest(max_bytes=10)
    queue.fetch(record(0, value=b"x" * 1000))
    assert queue.capacity() == 0
    queue.task_done(queue.start_next())
    assert queue.capacity() == 1


def test_revoked_records_free_the_in_flight_limit() -> None:
    queue = QueueUnderTest(max_in_flight=3, max_bytes=100)
    queue.fetch(*(record(n, value=b"x" * 40) for n in range(3)))
    queue.start_next()
    queue.partitions.on_revoke([DICE])
    assert (queue.capacity(), queue.in_flight) == (3, 0)


def test_in_flight_count_stays_correct_through_a_revocation() -> None:
    queue = QueueUnderTest(max_bytes=17)
    queue.fetch(*(record(n, b"a", b"xyz") for n in range(4)))
    first = queue.start_next()
    queue.revoke_and_reassign()
    queue.fetch(*(record(n, b"a", b"xyz") for n in range(4)))
    # Each record has 4 bytes, and one more is admitted while a byte is free.
    assert (queue.in_flight, queue.capacity()) == (4, 1)
    queue.task_done(first)
    for _ in range(3):
        queue.task_done(queue.start_next())
    assert (queue.in_flight, queue.capacity()) == (0, 5)


# -- commits -----------------------------------------------------------------------------------------------------------


def test_committed_offset_is_not_committed_again() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("--")
    queue.task_done(queue.start_next())
    commits = queue.partitions.commits()
    assert commits == {DICE: Commit(1)}
    queue.partitions.mark_committed({**commits, OTHER: Commit(5)})
    assert queue.partitions.commits() == {}


def test_partition_without_a_group_starts_at_its_first_record() -> None:
    queue = WorkQueue()
    partitions = PartitionTable(queue)
    partitions.put({OTHER: [record(7, partition=1)]})
    item = queue.get(0)
    assert item is not None
    queue.task_done(item)
    assert partitions.commits() == {OTHER: Commit(8)}


def test_records_of_a_revoked_partition_are_ignored() -> None:
    queue = QueueUnderTest()
    queue.partitions.on_revoke([DICE])
    queue.fetch_keys("--")
    assert (queue.start_all(), queue.in_flight, queue.partitions.assignment) == ([], 0, frozenset())


# -- blocked partitions ------------------------------------------------------------------------------------------------


def failed(item: WorkItem) -> WorkItem:
    """Mark a record as failed, so that it needs a dead letter."""
    item.attempt.failure = Failure(FAILED, "KeyError", "x")
    return item


def test_unwritten_dead_letter_blocks_its_partition() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("--")
    queue.retry_dead_letter(failed(queue.start_next()), 30)
    assert set(queue.partitions.blocked_partitions()) == {DICE}
    assert offsets(queue.start_all()) == [1]
    queue.clock.advance(30)
    (again,) = queue.start_all()
    assert (again.attempt.failure, again.attempt.number, again.dead_letter_tries) == (
        Failure(FAILED, "KeyError", "x"),
        1,
        1,
    )
    assert set(queue.partitions.blocked_partitions()) == {DICE}
    queue.task_done(again)
    assert set(queue.partitions.blocked_partitions()) == set()


def test_unwritten_dead_letter_blocks_its_partition_through_a_rebalance() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("--")
    queue.retry_dead_letter(failed(queue.start_next()), 30)
    queue.revoke_and_reassign()
    assert set(queue.partitions.blocked_partitions()) == {DICE}


def test_partition_is_blocked_when_its_commit_metadata_is_nearly_full() -> None:
    queue = QueueUnderTest(ordering="none", max_in_flight=10_000)
    queue.partitions.put({DICE: [record(n) for n in range(4000)]})
    for item in queue.start_all():
        if item.record.offset % 2:
            queue.task_done(item)
    queue.partitions.mark_committed(queue.partitions.commits())
    assert set(queue.partitions.blocked_partitions()) == {DICE}


# -- time limits and abandoned attempts --------------------------------------------------------------------------------


def test_timed_out_attempt_is_followed_by_its_timeout_error() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("aa")
    item, timeout_error = queue.start_next(), TimeoutError("late")
    assert queue.time_out(item, timeout_error, item.attempt.outcome)
    assert item.attempt.abandoned
    (replacement,) = queue.start_all()
    assert (replacement.record, replacement.attempt.number, replacement.attempt.timeout_error) == (
        item.record,
        1,
        timeout_error,
    )
    queue.task_done(item)
    assert queue.partitions.commits() == {}
    queue.task_done(replacement)
    assert queue.partitions.commits() == {DICE: Commit(1)}


def test_abandoned_attempt_leaves_its_record_unfinished() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("--")
    item = queue.start_next()
    queue.task_done(queue.start_next())
    assert queue.abandon(item.attempt)
    assert (queue.running(), queue.partitions.commits()) == ([], {DICE: Commit(0, "kser:1,1")})


def test_finished_attempt_can_neither_time_out_nor_be_abandoned() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("-")
    item = queue.start_next()
    queue.task_done(item)
    assert (
        queue.time_out(item, TimeoutError(), item.attempt.outcome),
        queue.abandon(item.attempt),
        item.attempt.abandoned,
    ) == (False, False, False)


# -- pause and shutdown ------------------------------------------------------------------------------------------------


def test_paused_queue_hands_out_no_record() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("---")
    queue.requeue(queue.start_next(), 1)
    queue.pause(True)
    queue.clock.advance(1)
    assert queue.start_all() == []
    queue.pause(False)
    assert sorted(offsets(queue.start_all())) == [0, 1, 2]


def test_closed_queue_hands_out_no_record_and_still_counts_finished_ones() -> None:
    queue = QueueUnderTest()
    queue.fetch_keys("aa-b")
    first, keyless, _ = queue.start_all()
    queue.close()
    assert queue.capacity() == 0
    assert queue.task_done(first) is True
    queue.requeue(keyless, 0)
    queue.clock.advance(1)
    assert queue.start_all() == []
    assert queue.partitions.commits() == {DICE: Commit(1)}


def test_closed_queue_does_not_hand_out_records_that_arrive_later() -> None:
    """A poll that is under way at the shutdown may return records."""
    queue = QueueUnderTest()
    queue.close()
    queue.fetch_keys("-")
    assert queue.start_all() == []


# -- the group lease ---------------------------------------------------------------------------------------------------


def test_expired_group_lease_stops_new_attempts_until_renewed() -> None:
    queue = QueueUnderTest(max_silence=3)
    queue.fetch_keys("--")
    queue.clock.advance(3)
    assert queue.get(0) is None
    queue.group_lease.renew()
    assert queue.start_next().record.offset == 0
