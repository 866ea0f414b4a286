"""Partitions come and go: what runs is adopted when they return, and late when they do not. No threads here."""

from __future__ import annotations

from kser.consumer.client import Commit
from tests.desk import OTHER, Desk, offsets, record
from tests.engine import DICE


def test_of_a_partition_that_is_given_up_nothing_more_is_begun() -> None:
    desk = Desk()
    desk.enter_keys("--aa")
    first, waiting, _ = desk.all()
    desk.retry(waiting, 5)
    draining = desk.on_revoke([DICE])
    desk.time.pass_by(5)
    assert desk.all() == []
    assert not draining.drained
    assert desk.finish(first) is False
    assert draining.commits() == {DICE: Commit(1)}


def test_what_runs_is_waited_for_and_what_it_gives_is_committed() -> None:
    desk = Desk()
    desk.enter_keys("--")
    first, second = desk.all()
    draining = desk.on_revoke([DICE])
    desk.finish(second)
    assert not draining.drained
    desk.finish(first)
    assert draining.drained
    draining.wait()
    assert draining.commits() == {DICE: Commit(2)}


def test_what_takes_too_long_is_not_waited_for() -> None:
    desk = Desk(revoke_timeout=10)
    desk.enter_keys("--")
    desk.next()
    desk.finish(desk.next())
    draining = desk.on_revoke([DICE])
    desk.time.pass_by(9.9)
    assert not draining.drained
    desk.time.pass_by(0.1)
    assert draining.drained
    draining.wait()
    assert draining.commits() == {DICE: Commit(0, "kser:1,1")}


def test_what_runs_is_adopted_when_its_partition_returns_and_is_not_begun_again() -> None:
    desk = Desk()
    desk.enter_keys("aa-")
    running = desk.next()
    desk.come_back()
    desk.enter_keys("aa-")
    (keyless,) = desk.all()
    assert keyless.record.offset == 2
    assert desk.finish(running) is True
    assert offsets(desk.all()) == [1]
    assert desk.commits() == {DICE: Commit(1, "")}


def test_what_was_finished_while_its_partition_was_away_is_not_begun_again() -> None:
    desk = Desk()
    desk.enter_keys("--")
    first, second = desk.all()
    desk.on_revoke([DICE])
    assert desk.finish(second) is False
    desk.on_assign({DICE: Commit(0)})
    desk.enter_keys("--")
    assert desk.all() == []
    desk.finish(first)
    assert desk.commits() == {DICE: Commit(2)}


def test_what_was_finished_before_it_is_handed_out_once_more_is_not_begun_again() -> None:
    desk = Desk()
    desk.enter_keys("--")
    first = desk.next()
    desk.come_back()
    assert desk.finish(first) is True
    desk.enter_keys("--")
    assert offsets(desk.all()) == [1]
    assert desk.commits() == {DICE: Commit(1)}


def test_a_retry_that_waits_keeps_its_attempt_over_a_rebalance() -> None:
    desk = Desk()
    desk.enter_keys("aa")
    desk.retry(desk.next(), 10)
    desk.come_back()
    desk.enter_keys("aa")
    assert desk.all() == []
    desk.time.pass_by(10)
    (again,) = desk.all()
    assert (again.record.offset, again.attempt) == (0, 2)
    desk.finish(again)
    assert offsets(desk.all()) == [1]


def test_what_fails_while_its_partition_is_away_is_tried_again_when_it_is_back() -> None:
    desk = Desk()
    desk.enter_keys("-")
    running = desk.next()
    desk.on_revoke([DICE])
    desk.retry(running, 10)
    desk.on_assign({DICE: Commit(0)})
    desk.enter_keys("-")
    assert desk.all() == []
    desk.time.pass_by(10)
    (again,) = desk.all()
    assert again.attempt == 2


def test_what_others_have_done_meanwhile_is_not_done_here() -> None:
    desk = Desk()
    desk.enter_keys("---")
    _, waiting, running = desk.all()
    desk.retry(waiting, 1)
    desk.on_revoke([DICE])
    desk.on_assign({DICE: Commit(2)})
    desk.time.pass_by(1)
    assert desk.all() == []
    desk.enter(record(2), record(3))
    assert offsets(desk.all()) == [3]
    desk.finish(running)
    assert desk.commits() == {DICE: Commit(3)}


def test_a_group_that_went_back_begins_anew() -> None:
    """Somebody deleted what it had committed, or reset it: what is asked for is done again."""
    desk = Desk()
    desk.enter_keys("--")
    for job in desk.all():
        desk.finish(job)
    commits = desk.on_revoke([DICE]).commits()
    desk.on_assign(commits)
    desk.on_revoke([DICE])
    desk.on_assign({DICE: Commit(0)})
    desk.enter_keys("--")
    assert offsets(desk.all()) == [0, 1]


def test_a_position_that_is_new_makes_what_was_known_untrue() -> None:
    desk = Desk()
    desk.enter_keys("-")
    old = desk.next()
    desk.on_reset({DICE: Commit(0)})
    desk.enter_keys("-")
    (new,) = desk.all()
    assert desk.finish(old) is False
    assert desk.commits() == {}
    assert desk.finish(new) is True
    assert desk.commits() == {DICE: Commit(1)}


def test_what_was_lost_and_comes_back_is_adopted_too() -> None:
    desk = Desk()
    desk.enter_keys("--")
    desk.next()
    desk.on_lost([DICE])
    assert desk.assignment == frozenset()
    desk.on_assign({DICE: Commit(0)})
    desk.enter_keys("--")
    assert offsets(desk.all()) == [1]


def test_what_the_group_knows_to_be_finished_is_not_begun() -> None:
    desk = Desk()
    desk.on_assign({OTHER: Commit(0, "kser:1,2")})
    desk.enter(*(record(n, partition=1) for n in range(4)))
    assert offsets(desk.all()) == [0, 3]


def test_giving_up_what_one_never_had_is_nothing() -> None:
    desk = Desk()
    draining = desk.on_revoke([OTHER])
    assert draining.drained
    assert draining.commits() == {}
