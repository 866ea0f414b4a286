"""Tests of takeovers in a consumer: steps that it runs without a record, beside the records of its partitions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from kser.attempt import FAILED, Attempt, current_attempt
from kser.consumer.client import Commit
from kser.consumer.subscription import Subscription
from kser.consumer.takeover_host import ConsumerTakeovers
from kser.consumer.takeovers import TakeoverItem
from kser.consumer.work_item import WorkItem
from kser.controller import Controller
from kser.dummy.broker import InMemoryBroker
from kser.errors import TaskTimeout
from kser.retry import Retry
from kser.takeover import Takeover
from tests.consumer.harness import DICE, FaultyConsumer, ScriptedTask, committed, send_messages
from tests.consumer.queue_under_test import QueueUnderTest, record
from tests.support import Clock, lines, message

#: Seconds for which a step is reserved.
RESERVATION = 5.0


class TakeoversUnderTest(ConsumerTakeovers):
    """The takeovers of a work queue whose consumer can be paused."""

    def __init__(self, queue: QueueUnderTest, workers: int = 1) -> None:
        self.is_available = True
        self.ended: list[Takeover] = []
        super().__init__(queue, workers, None, Subscription(["dice"]), lambda: self.is_available)

    def new(self, name: str = "t") -> Takeover:
        """Return a takeover of the topic ``dice``, which records its end."""
        return Takeover("dice", name.encode(), 1, f"step {name} of operation 1", self.ended.append)

    def offer(self, *names: str) -> list[bool]:
        """Queue takeovers, and return whether the consumer accepted each."""
        return [self.put(self.new(name), RESERVATION) for name in names]


def names(items: list[WorkItem]) -> list[str]:
    """Return the offset of each record and the name of each takeover."""
    return [
        (item.record.value or b"").decode() if isinstance(item, TakeoverItem) else str(item.record.offset)
        for item in items
    ]


# -- how much ----------------------------------------------------------------------------------------------------------


def test_free_workers_are_those_without_a_record_or_a_takeover() -> None:
    """durability rule 20: no more is reserved than workers are free."""
    queue = QueueUnderTest()
    takeovers = TakeoversUnderTest(queue, workers=4)
    assert takeovers.free_workers() == 4
    queue.fetch_keys("--")
    assert takeovers.free_workers() == 2
    queue.start_next()
    takeovers.offer("t")
    assert takeovers.free_workers() == 1


def test_records_of_a_consumer_outside_of_its_group_leave_its_workers_free() -> None:
    """durability rule 20: takeovers need no group lease, and the records cannot start."""
    queue = QueueUnderTest(max_silence=10)
    takeovers = TakeoversUnderTest(queue)
    queue.fetch_keys("-")
    queue.clock.advance(11)
    assert takeovers.free_workers() == 1
    takeovers.offer("t")
    assert names(queue.start_all()) == ["t"]


@pytest.mark.parametrize("running", [1, 3])
def test_busy_consumer_holds_one_takeover(running: int) -> None:
    """durability rule 20"""
    queue = QueueUnderTest()
    takeovers = TakeoversUnderTest(queue, workers=running)
    queue.fetch_keys("-" * running)
    queue.start_all()
    assert (takeovers.free_workers(), takeovers.may_hold_urgent()) == (0, True)
    assert takeovers.offer("t", "u") == [True, False]
    assert not takeovers.may_hold_urgent()


def test_paused_consumer_takes_over_nothing() -> None:
    """durability rule 20"""
    queue = QueueUnderTest()
    takeovers = TakeoversUnderTest(queue)
    takeovers.is_available = False
    assert (takeovers.free_workers(), takeovers.may_hold_urgent(), takeovers.offer("t")) == (0, False, [False])


def test_consumer_takes_over_nothing_while_a_record_must_run_alone() -> None:
    """durability rule 20: its takeovers could not start."""
    queue = QueueUnderTest()
    takeovers = TakeoversUnderTest(queue, workers=4)
    takeovers.offer("t")
    tracker = queue.partitions._trackers[DICE]
    queue.lanes.exclusive = tracker
    assert (takeovers.free_workers(), takeovers.may_hold_urgent(), takeovers.offer("u")) == (0, False, [False])
    assert queue.start_all() == []
    queue.lanes.end_exclusive(tracker)
    assert (takeovers.free_workers(), takeovers.offer("u")) == (3, [True])
    assert names(queue.start_all()) == ["t", "u"]


def test_closed_queue_accepts_no_takeover() -> None:
    """durability rule 30: at shutdown no reservation is made."""
    queue = QueueUnderTest()
    queue.close()
    assert TakeoversUnderTest(queue).offer("t") == [False]


def test_takeover_counts_one_in_the_in_flight_limit_until_its_end() -> None:
    """durability rule 20"""
    queue = QueueUnderTest(max_in_flight=2)
    takeovers = TakeoversUnderTest(queue)
    takeovers.offer("t")
    assert queue.capacity() == 1
    item = queue.start_next()
    item.attempt.ack()
    assert queue.capacity() == 1
    queue.task_done(item)
    assert (queue.capacity(), len(takeovers.ended)) == (2, 1)


@pytest.mark.parametrize("size", [1, 60])
def test_takeover_does_not_change_how_many_records_fit_into_max_bytes(size: int) -> None:
    """durability rule 20: the average size of the records limits what is fetched."""
    queue = QueueUnderTest(max_bytes=100)
    takeovers = TakeoversUnderTest(queue, workers=4)
    queue.fetch(record(0, value=b"x" * 40))
    assert queue.capacity() == 2
    takeovers.offer("t" * size)
    assert queue.capacity() == (2 if size == 1 else 0)
    queue.task_done(queue.start_next())
    assert queue.capacity() == 2


def test_consumer_without_partitions_consumes_its_topics() -> None:
    """durability rule 20: the topics, with or without partitions."""
    queue = QueueUnderTest()
    takeovers = TakeoversUnderTest(queue)
    queue.partitions.on_revoke([DICE])
    assert set(takeovers.topics(list)) == {"dice"}


# -- when --------------------------------------------------------------------------------------------------------------


def test_takeover_starts_before_ready_records_but_no_second_one_does() -> None:
    """durability rule 20"""
    queue = QueueUnderTest()
    takeovers = TakeoversUnderTest(queue, workers=4)
    takeovers.offer("t", "u")
    queue.fetch_keys("----")
    assert names(queue.start_all()) == ["t", "0", "u", "1", "2", "3"]


def test_takeovers_start_one_after_the_other_while_no_record_is_ready() -> None:
    """durability rule 20"""
    queue = QueueUnderTest()
    TakeoversUnderTest(queue, workers=3).offer("t", "u", "v")
    assert names(queue.start_all()) == ["t", "u", "v"]


def test_takeover_is_in_no_lane() -> None:
    """durability rule 20"""
    queue = QueueUnderTest(ordering="partition")
    takeovers = TakeoversUnderTest(queue, workers=3)
    takeovers.offer("t", "u")
    queue.fetch_keys("a")
    assert names(queue.start_all()) == ["t", "0", "u"]


@pytest.mark.parametrize(("waited", "started"), [(RESERVATION - 0.1, ["t"]), (RESERVATION, []), (60, [])])
def test_takeover_that_has_not_begun_when_its_reservation_expires_is_dropped(waited: float, started: list[str]) -> None:
    """durability rule 20: another consumer may have reserved the step meanwhile."""
    queue = QueueUnderTest()
    takeovers = TakeoversUnderTest(queue)
    takeovers.offer("t")
    queue.clock.advance(waited)
    assert names(queue.start_all()) == started
    assert [takeover.is_started for takeover in takeovers.ended] == ([] if started else [False])
    assert queue.in_flight == len(started)


def test_takeover_of_a_paused_queue_waits() -> None:
    queue = QueueUnderTest()
    TakeoversUnderTest(queue).offer("t")
    queue.pause(True)
    assert queue.start_all() == []
    queue.pause(False)
    assert names(queue.start_all()) == ["t"]


def test_takeovers_that_have_not_begun_end_at_the_shutdown() -> None:
    """durability rule 30: their reservations are given back."""
    queue = QueueUnderTest()
    takeovers = TakeoversUnderTest(queue, workers=2)
    takeovers.offer("t", "u")
    queue.start_next()
    queue.close()
    assert [(takeover.value, takeover.is_started) for takeover in takeovers.ended] == [(b"u", False)]


def test_revocation_does_not_touch_a_takeover() -> None:
    """durability rule 20: the place in the group does not matter."""
    queue = QueueUnderTest()
    takeovers = TakeoversUnderTest(queue, workers=2)
    takeovers.offer("t", "u")
    first = queue.start_next()
    assert queue.partitions.on_revoke([DICE]).drained
    assert queue.task_done(first)
    assert names(queue.start_all()) == ["u"]


def test_takeover_commits_nothing() -> None:
    """durability rule 18: a takeover has no record."""
    queue = QueueUnderTest()
    TakeoversUnderTest(queue).offer("t")
    assert queue.task_done(queue.start_next())
    assert queue.partitions.commits() == {}


def test_timed_out_takeover_reports_its_timeout_without_the_group_lease() -> None:
    """durability rule 28"""
    queue = QueueUnderTest(max_silence=10)
    takeovers = TakeoversUnderTest(queue)
    takeovers.offer("t")
    stuck = queue.start_next()
    queue.clock.advance(60)
    error = TaskTimeout("too long")
    assert queue.time_out(stuck, error, stuck.attempt.outcome)
    queue.fetch(record(0))
    following = queue.start_next()
    assert (names([following]), following.attempt.timeout_error, following.attempt.number) == (["t"], error, 1)
    queue.task_done(stuck)
    assert takeovers.ended == []
    queue.task_done(following)
    assert (len(takeovers.ended), queue.in_flight) == (1, 1)


# -- in a consumer -----------------------------------------------------------------------------------------------------


class ScriptedController(Controller):
    """A controller that knows the scripted task."""

    ENTRYPOINTS: ClassVar[dict[Any, Any]] = {ScriptedTask.path: ScriptedTask}


@pytest.fixture
def consumer(bus: InMemoryBroker) -> Iterator[FaultyConsumer]:
    """Return a stepped consumer with dead letters and a retry policy."""
    consumer = FaultyConsumer(
        {}, clock=Clock(), dead_letter="dice.dlq", retry=Retry(max_attempts=3, delay=1, jitter=False)
    )
    consumer.REGISTRY = ScriptedController
    yield consumer
    consumer.close()


def take_over(consumer: FaultyConsumer, uuid: str = "t", **arguments: Any) -> list[Takeover]:
    """Queue the takeover of a task, and return the list to which its end adds it."""
    ended: list[Takeover] = []
    value = message(ScriptedTask, uuid=uuid, **arguments).dumps().encode()
    takeover = Takeover("dice", value, 7, f"step {uuid} of operation 1", ended.append)
    assert consumer._kser_services._host.put(takeover, RESERVATION)
    return ended


def test_takeover_runs_through_the_registry_like_a_record(consumer: FaultyConsumer) -> None:
    """durability rule 20: hooks, log lines, running file and time limits see no difference."""
    seen: list[Attempt | None] = []
    ScriptedTask.script["t"] = lambda: seen.append(current_attempt.get())
    ended = take_over(consumer)
    assert consumer.step(timeout=0) == 1
    (attempt,) = seen
    assert attempt is not None
    assert attempt.takeover is not None
    assert (ScriptedTask.ran, attempt.topic, attempt.takeover.epoch) == (["t"], "dice", 7)
    assert (ended, committed()) == ([attempt.takeover], 0)


def test_failed_takeover_is_neither_retried_nor_dead_lettered(
    consumer: FaultyConsumer, caplog: pytest.LogCaptureFixture
) -> None:
    """durability rule 18"""
    ScriptedTask.script["t"] = ValueError("broken")
    ended = take_over(consumer)
    assert consumer.run_until_idle() == 1
    consumer._kser_clock.advance(60)  # type: ignore[attr-defined]
    assert consumer.run_until_idle() == 0
    assert (len(ended), consumer.counts["dead_lettered"], consumer.client.topics.get("dice.dlq")) == (1, 0, None)
    assert any("ScriptedTask.Failed" in line for line in lines(caplog))


@pytest.mark.parametrize("value", [b"no JSON", b"\xff", b""])
def test_undecodable_takeover_is_not_dead_lettered(consumer: FaultyConsumer, value: bytes) -> None:
    """durability rule 18"""
    ended: list[Takeover] = []
    consumer._kser_services._host.put(Takeover("dice", value, 1, "step t of operation 1", ended.append), RESERVATION)
    assert consumer.run_until_idle() == 1
    assert (len(ended), ended[0].is_answered, consumer.counts["dead_lettered"]) == (1, False, 0)
    assert consumer.counts[FAILED] == 1


def test_takeover_beside_records_keeps_their_commits(consumer: FaultyConsumer) -> None:
    send_messages("1", "2")
    consumer.poll()
    take_over(consumer)
    consumer.run_until_idle()
    assert (ScriptedTask.ran, committed()) == (["t", "1", "2"], 2)


def test_takeover_of_a_consumer_that_commits_before_the_attempt_starts_without_a_commit(bus: InMemoryBroker) -> None:
    consumer = FaultyConsumer({}, clock=Clock(), commit="before")
    consumer.REGISTRY = ScriptedController
    take_over(consumer)
    assert (consumer.step(timeout=0), consumer.current_client.commits) == (1, [])
    consumer.close()


def test_stopping_consumer_takes_over_nothing(consumer: FaultyConsumer) -> None:
    """durability rule 30"""
    consumer.stop()
    assert consumer._kser_services._host.free_workers() == 0


def test_partition_commits_are_unchanged_by_a_takeover_with_an_unknown_offset() -> None:
    queue = QueueUnderTest()
    TakeoversUnderTest(queue).offer("t")
    queue.fetch_keys("-")
    for item in queue.start_all():
        queue.task_done(item)
    assert queue.partitions.commits() == {DICE: Commit(1)}
