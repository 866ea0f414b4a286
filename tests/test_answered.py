"""Records that a database answers for, and what runs beside a consumer. No threads of the consumer's own here."""

from __future__ import annotations

import threading
from typing import Any
from uuid import UUID

import pytest

from kser.consumer.beside import Beside
from kser.consumer.client import Commit
from kser.consumer.workers import Workers
from kser.delivery import CURRENT, GIVEN_UP, Abandoned, Delivery, Failure
from kser.errors import SettingError, StoreUnavailable
from kser.retry import Retry
from kser.sequencing.handover import StepDelivery
from kser.sequencing.task import Task
from tests.desk import Desk, offsets
from tests.engine import DICE, PATIENCE, Act, consumer_of, put, until

# -- the dispatch ------------------------------------------------------------------------------------------------------


def test_a_record_that_is_answered_for_may_be_committed_while_it_is_worked_on() -> None:
    desk = Desk()
    desk.enter_keys("--")
    first = desk.next()
    desk.answer(first)
    assert (desk.commits(), desk.in_flight) == ({DICE: Commit(1)}, 1)
    assert desk.running() == [first]


def test_it_makes_room_for_others() -> None:
    desk = Desk(max_in_flight=2)
    desk.enter_keys("--")
    assert desk.room() == 0
    desk.answer(desk.next())
    assert desk.room() == 1


def test_answering_and_finishing_count_once() -> None:
    desk = Desk()
    desk.enter_keys("--")
    job = desk.next()
    desk.answer(job)
    desk.answer(job)
    assert desk.finish(job) is True
    assert (desk.in_flight, desk.settled, desk.commits()) == (1, 1, {DICE: Commit(1)})


def test_its_lane_still_waits_for_it() -> None:
    desk = Desk()
    desk.enter_keys("aa")
    job = desk.next()
    desk.answer(job)
    assert desk.all() == []
    desk.finish(job)
    assert offsets(desk.all()) == [1]


def test_nobody_waits_for_it_when_its_partition_goes() -> None:
    desk = Desk()
    desk.enter_keys("-")
    job = desk.next()
    desk.answer(job)
    draining = desk.on_revoke([DICE])
    assert draining.drained
    assert draining.commits() == {DICE: Commit(1)}
    # It was committed, so that it is no loss either.
    assert desk.finish(job) is True


def test_one_that_is_answered_for_after_its_partition_went_is_finished_all_the_same() -> None:
    desk = Desk()
    desk.enter_keys("-")
    job = desk.next()
    draining = desk.on_revoke([DICE])
    assert not draining.drained
    desk.answer(job)
    assert draining.drained
    assert (desk.finish(job), desk.in_flight) == (True, 0)


def test_a_partition_that_returns_does_not_begin_it_again() -> None:
    desk = Desk()
    desk.enter_keys("--")
    job = desk.next()
    desk.answer(job)
    desk.come_back()
    desk.enter_keys("--")
    assert offsets(desk.all()) == [1]
    desk.finish(job)
    assert desk.in_flight == 1


def test_a_stuck_one_is_stood_in_for_although_its_offset_is_free() -> None:
    desk = Desk()
    desk.enter_keys("aa")
    job = desk.next()
    desk.answer(job)
    verdict = TimeoutError("too long")
    assert desk.expire(job, verdict, job.decision) is True
    (stand_in,) = desk.all()
    assert (stand_in.verdict, stand_in.answered, stand_in.record.offset) == (verdict, True, 0)
    assert desk.finish(job) is True
    desk.finish(stand_in)
    assert offsets(desk.all()) == [1]
    assert desk.in_flight == 1


def test_the_stand_in_of_a_stuck_one_runs_also_when_the_partition_has_gone() -> None:
    """It has to tell the database, whoever has the partition now."""
    desk = Desk()
    desk.enter_keys("-")
    job = desk.next()
    desk.answer(job)
    desk.on_revoke([DICE])
    desk.expire(job, TimeoutError("too long"), job.decision)
    (stand_in,) = desk.all()
    assert desk.finish(stand_in) is True


def test_one_that_is_given_up_is_not_run_again_by_kafka() -> None:
    desk = Desk()
    desk.enter_keys("-")
    job = desk.next()
    desk.answer(job)
    assert desk.abandon(job) is True
    assert desk.commits() == {DICE: Commit(1)}


# -- the delivery ------------------------------------------------------------------------------------------------------


def test_what_is_answered_for_is_neither_tried_again_nor_a_dead_letter() -> None:
    delivery = Delivery(Retry(max_attempts=9))
    delivery.answer()
    assert delivery.postpones(ConnectionError("no"), Failure("failed", "", "no")) is False
    assert (delivery.retry_in, delivery.failure) == (None, None)


def test_attempts_before_a_resume_do_not_count_for_the_policy() -> None:
    delivery = Delivery(Retry(max_attempts=3, delay=10, backoff=2, jitter=False))
    delivery.attempt, delivery.forgiven = 4, 3
    assert delivery.postpones(ConnectionError("no"), Failure("failed", "", "no")) is True
    assert delivery.retry_in == 10
    delivery.attempt = 6
    assert delivery.postpones(ConnectionError("no"), Failure("failed", "", "no")) is False


def test_a_part_of_the_work_has_a_time_of_its_own(bus: Any) -> None:
    put("1", "2")
    consumer = consumer_of()
    seen: list[Any] = []

    def part() -> None:
        job: Any = CURRENT.get()
        before = job.taken
        consumer._dispatch.clock = lambda: before + 100
        assert job.decide(GIVEN_UP)
        job.begin(5)
        seen.append((job.timeout, job.taken - before, job.decide()))

    Act.acts["1"] = part
    consumer.step(timeout=0)
    # Whoever decided about the part before decided nothing about this one.
    assert seen == [(5, 100, True)]


def test_an_attempt_that_is_handed_back_stays_unfinished(bus: Any) -> None:
    put("1")
    consumer = consumer_of()

    def give_back() -> None:
        delivery = CURRENT.get()
        assert delivery is not None
        delivery.hand_back()

    Act.acts["1"] = give_back
    consumer.step(timeout=0)
    assert (consumer._dispatch.running(), consumer._dispatch.commits()) == ([], {})
    assert consumer.counts["done"] == 0


def test_outside_of_a_consumer_handing_back_ends_the_attempt() -> None:
    delivery = Delivery()
    with pytest.raises(Abandoned):
        delivery.hand_back()
    assert delivery.abandoned


def test_a_record_has_an_identity_that_is_the_same_at_each_delivery() -> None:
    found = []
    for _ in range(2):
        desk = Desk()
        desk.enter_keys("--")
        found.append([job.identity() for job in desk.all()])
    assert found[0] == found[1]
    assert len(set(found[0])) == 2
    assert {UUID(each).version for each in found[0]} == {5}


def test_records_of_two_clusters_are_told_apart() -> None:
    desk = Desk()
    desk.enter_keys("-")
    job = desk.next()
    crew: Any = Workers.__new__(Workers)
    crew._dispatch = desk
    job.crew = crew
    one = job.identity()
    desk.cluster = lambda: "another"
    assert job.identity() != one


def test_a_message_from_nowhere_has_an_identity_of_its_own() -> None:
    assert Delivery().identity() != Delivery().identity()


def test_a_step_tells_the_message_that_it_runs_for_when_it_has_ended() -> None:
    outer = Delivery()
    task = Task("1")
    step = StepDelivery(outer, task, 3, None, "op", lambda: False)
    step.settle(task)
    assert outer.decide(GIVEN_UP) is False
    assert (step.attempt, step.operation_uuid) == (3, "op")


def test_a_step_whose_message_was_given_up_ends_there() -> None:
    outer = Delivery()
    outer.abandoned = True
    step = StepDelivery(outer, Task("1"), 1, None, "op", lambda: False)
    with pytest.raises(Abandoned):
        step.settle(Task("2"))


def test_whether_to_end_is_looked_up_now_and_then() -> None:
    looks: list[int] = []

    def look() -> bool:
        looks.append(1)
        return False

    step = StepDelivery(None, Task("1"), 1, None, "op", look)
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
    return any(thread.name == "kser-beside" for thread in threading.enumerate())


def test_without_anything_to_run_there_is_no_thread() -> None:
    beside = Beside(lambda: [])
    beside.start()
    assert not is_running()
    beside.close(PATIENCE)


def test_each_has_its_turns_and_is_closed_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kser.consumer.beside.TICK", 0.01)
    both = [Companion(), Companion()]
    beside = Beside(lambda: both)
    beside.start()
    until(lambda: all(len(each.told) > 2 for each in both))
    beside.close(PATIENCE)
    assert not is_running()
    assert [each.told[-1] for each in both] == ["close", "close"]


def test_those_that_come_later_have_their_turns_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kser.consumer.beside.TICK", 0.01)
    known = [Companion()]
    beside = Beside(lambda: list(known))
    beside.start()
    known.append(Companion())
    until(lambda: known[1].told)
    beside.close(PATIENCE)
    assert known[1].told[-1] == "close"


def test_one_that_cannot_work_here_is_said_at_the_start() -> None:
    def find() -> list[Companion]:
        raise SettingError("KSER_LEASE must be a number above 0")

    with pytest.raises(SettingError, match="KSER_LEASE"):
        Beside(find).start()
    assert not is_running()


def test_one_whose_database_is_away_begins_when_that_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kser.consumer.beside.TICK", 0.01)
    companion = Companion()
    trouble: list[Exception] = [StoreUnavailable("it does not answer")] * 3

    def find() -> list[Companion]:
        if trouble:
            raise trouble.pop()
        return [companion]

    beside = Beside(find)
    beside.start()
    until(lambda: companion.told)
    beside.close(PATIENCE)
    assert companion.told[-1] == "close"
