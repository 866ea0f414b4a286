"""Between the client's thread and the workers: lanes, room, and what is given up. No threads here."""

from __future__ import annotations

import pytest

from kser.consumer.client import Commit
from kser.consumer.dispatch import Dispatch
from kser.consumer.job import Job
from kser.delivery import FAILED, Failure
from tests.desk import OTHER, Desk, offsets, record
from tests.engine import DICE

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
def test_what_may_run_at_once_is_a_matter_of_the_ordering(ordering: str, keys: str, at_once: list[int]) -> None:
    desk = Desk(ordering=ordering)
    desk.enter_keys(keys)
    assert offsets(desk.all()) == at_once


@pytest.mark.parametrize("ordering", ["key", "partition"])
def test_partitions_do_not_wait_for_each_other(ordering: str) -> None:
    desk = Desk(ordering=ordering)
    desk.on_assign({OTHER: Commit(0)})
    desk.enter(record(0, b"a"), record(0, b"a", partition=1))
    assert len(desk.all()) == 2


def test_records_of_a_key_follow_each_other_in_order() -> None:
    desk = Desk()
    desk.enter_keys("aaa")
    seen = []
    for _ in range(3):
        (job,) = desk.all()
        seen.append(job.record.offset)
        assert desk.finish(job)
    assert seen == [0, 1, 2]
    assert desk.all() == []


def test_an_empty_key_is_a_key() -> None:
    desk = Desk()
    desk.enter(record(0, b""), record(1, b""))
    assert offsets(desk.all()) == [0]


def test_what_comes_later_joins_the_lane_of_what_runs() -> None:
    desk = Desk()
    desk.enter(record(0, b"a"))
    first = desk.next()
    desk.enter(record(1, b"a"))
    assert desk.all() == []
    desk.finish(first)
    assert offsets(desk.all()) == [1]


def test_a_lane_that_is_empty_is_forgotten() -> None:
    """There may be as many keys as there are records."""
    desk = Desk()
    desk.enter_keys("ab")
    for job in desk.all():
        desk.finish(job)
    assert desk._lanes._lanes == {}


def test_a_job_counts_once_however_often_it_is_finished() -> None:
    desk = Desk()
    desk.enter_keys("-")
    job = desk.next()
    assert [desk.finish(job), desk.finish(job)] == [True, True]
    assert (desk.settled, desk.in_flight) == (1, 0)


# -- retries -----------------------------------------------------------------------------------------------------------


def test_a_retry_waits_its_time_and_so_does_its_lane() -> None:
    desk = Desk()
    desk.enter_keys("aab-")
    first, *others = desk.all()
    desk.retry(first, 10)
    for job in others:
        desk.finish(job)
    desk.time.pass_by(9.9)
    assert desk.all() == []
    desk.time.pass_by(0.1)
    (again,) = desk.all()
    assert (again.record.offset, again.attempt) == (0, 2)
    desk.finish(again)
    assert offsets(desk.all()) == [1]


def test_retries_come_in_the_order_of_their_times() -> None:
    desk = Desk()
    desk.enter_keys("---")
    for job, seconds in zip(desk.all(), (30, 10, 20), strict=True):
        desk.retry(job, seconds)
    desk.time.pass_by(30)
    assert offsets(desk.all()) == [1, 2, 0]


def test_a_record_that_waits_holds_the_commit_but_no_room_that_others_need() -> None:
    desk = Desk(max_in_flight=3)
    desk.enter_keys("--")
    first, second = desk.all()
    desk.retry(first, 10)
    desk.finish(second)
    assert desk.room() == 3
    assert desk.commits()[DICE] == Commit(0, "kser:1,1")


# -- room --------------------------------------------------------------------------------------------------------------


def test_there_is_room_for_so_many_records() -> None:
    desk = Desk(max_in_flight=3)
    assert desk.room() == 3
    desk.enter_keys("---")
    assert desk.room() == 0
    desk.finish(desk.next())
    assert desk.room() == 1


def test_there_is_room_for_so_many_bytes_as_far_as_can_be_told() -> None:
    """What a poll brings is known afterwards; it is held against what the last one brought."""
    desk = Desk(max_in_flight=1000, max_bytes=1000)
    desk.enter(record(0, value=b"x" * 90, key=b"k" * 10))
    assert desk.room() == 10
    desk.enter(*(record(n, value=b"x" * 100) for n in range(1, 10)))
    assert desk.room() == 0
    desk.finish(desk.next())
    assert desk.room() == 2


def test_there_is_always_room_for_one_record_however_large() -> None:
    desk = Desk(max_bytes=10)
    desk.enter(record(0, value=b"x" * 1000))
    assert desk.room() == 0
    desk.finish(desk.next())
    assert desk.room() == 1


def test_what_is_given_up_makes_room() -> None:
    desk = Desk(max_in_flight=3, max_bytes=100)
    desk.enter(*(record(n, value=b"x" * 40) for n in range(3)))
    desk.next()
    desk.on_revoke([DICE])
    assert (desk.room(), desk.in_flight, desk._budget.bytes) == (3, 0, 0)


def test_the_count_of_what_is_held_never_drifts() -> None:
    desk = Desk()
    desk.enter(*(record(n, b"a", b"xyz") for n in range(4)))
    first = desk.next()
    desk.come_back()
    desk.enter(*(record(n, b"a", b"xyz") for n in range(4)))
    assert (desk.in_flight, desk._budget.bytes) == (4, 16)
    desk.finish(first)
    for _ in range(3):
        desk.finish(desk.next())
    assert (desk.in_flight, desk._budget.bytes) == (0, 0)


# -- commits -----------------------------------------------------------------------------------------------------------


def test_what_was_committed_is_not_committed_again() -> None:
    desk = Desk()
    desk.enter_keys("--")
    desk.finish(desk.next())
    commits = desk.commits()
    assert commits == {DICE: Commit(1)}
    desk.committed({**commits, OTHER: Commit(5)})
    assert desk.commits() == {}


def test_without_a_group_a_partition_begins_with_its_first_record() -> None:
    dispatch = Dispatch()
    dispatch.offer({OTHER: [record(7, partition=1)]})
    job = dispatch.take(0)
    assert job is not None
    dispatch.finish(job)
    assert dispatch.commits() == {OTHER: Commit(8)}


def test_what_arrives_of_a_partition_that_was_taken_away_is_not_taken_in() -> None:
    desk = Desk()
    desk.on_revoke([DICE])
    desk.enter_keys("--")
    assert (desk.all(), desk.in_flight, desk.assignment) == ([], 0, frozenset())


# -- held --------------------------------------------------------------------------------------------------------------


def dead(job: Job) -> Job:
    job.failure = Failure(FAILED, "KeyError", "x")
    return job


def test_a_partition_whose_dead_letter_cannot_be_written_is_held() -> None:
    desk = Desk()
    desk.enter_keys("--")
    desk.bury_later(dead(desk.next()), 30)
    assert set(desk.held()) == {DICE}
    assert offsets(desk.all()) == [1]
    desk.time.pass_by(30)
    (again,) = desk.all()
    assert (again.failure, again.attempt, again.burials) == (Failure(FAILED, "KeyError", "x"), 1, 1)
    assert set(desk.held()) == {DICE}
    desk.finish(again)
    assert set(desk.held()) == set()


def test_a_partition_is_held_for_its_dead_letter_over_a_rebalance() -> None:
    desk = Desk()
    desk.enter_keys("--")
    desk.bury_later(dead(desk.next()), 30)
    desk.come_back()
    assert set(desk.held()) == {DICE}


def test_a_partition_is_held_when_what_is_finished_can_hardly_be_noted() -> None:
    desk = Desk(ordering="none", max_in_flight=10_000)
    desk.offer({DICE: [record(n) for n in range(4000)]})
    for job in desk.all():
        if job.record.offset % 2:
            desk.finish(job)
    desk.committed(desk.commits())
    assert set(desk.held()) == {DICE}


# -- attempts that are given up ----------------------------------------------------------------------------------------


def test_an_attempt_that_is_expired_is_followed_by_its_verdict() -> None:
    desk = Desk()
    desk.enter_keys("aa")
    job, verdict = desk.next(), TimeoutError("late")
    assert desk.expire(job, verdict, job.decision)
    assert job.abandoned
    (following,) = desk.all()
    assert (following.record, following.attempt, following.verdict) == (job.record, 1, verdict)
    desk.finish(job)
    assert desk.commits() == {}
    desk.finish(following)
    assert desk.commits() == {DICE: Commit(1)}


def test_an_attempt_that_is_abandoned_leaves_its_record_unfinished() -> None:
    desk = Desk()
    desk.enter_keys("--")
    job = desk.next()
    desk.finish(desk.next())
    assert desk.abandon(job)
    assert (desk.running(), desk.commits()) == ([], {DICE: Commit(0, "kser:1,1")})


def test_an_attempt_that_has_ended_is_not_given_up() -> None:
    desk = Desk()
    desk.enter_keys("-")
    job = desk.next()
    desk.finish(job)
    assert (desk.expire(job, TimeoutError(), job.decision), desk.abandon(job), job.abandoned) == (False, False, False)


# -- pause and end -----------------------------------------------------------------------------------------------------


def test_while_paused_nothing_is_given_to_workers() -> None:
    desk = Desk()
    desk.enter_keys("---")
    desk.retry(desk.next(), 1)
    desk.pause(True)
    desk.time.pass_by(1)
    assert desk.all() == []
    desk.pause(False)
    assert sorted(offsets(desk.all())) == [0, 1, 2]


def test_after_the_end_nothing_is_given_to_workers_and_what_runs_still_counts() -> None:
    desk = Desk()
    desk.enter_keys("aa-b")
    first, keyless, _ = desk.all()
    desk.close()
    assert desk.room() == 0
    assert desk.finish(first) is True
    desk.retry(keyless, 0)
    desk.time.pass_by(1)
    assert desk.all() == []
    assert desk.commits() == {DICE: Commit(1)}


# -- signs of life -----------------------------------------------------------------------------------------------------


def test_nothing_is_begun_while_the_client_gave_no_sign_of_life_for_long() -> None:
    desk = Desk(fence=3)
    desk.enter_keys("--")
    desk.time.pass_by(3)
    assert desk.take(0) is None
    desk.pulse.beat()
    assert desk.next().record.offset == 0
