"""Tests of the count of starts: a message that kills its process does not start again without end."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from kser.consumer.client import Commit
from kser.consumer.isolation import ISOLATION_TIME
from kser.consumer.starts import STARTS_PREFIX, StartCount
from kser.consumer.work_item import WorkItem
from kser.consumer.work_queue import WorkQueue
from kser.dummy.broker import InMemoryBroker
from kser.retry import Retry, RetryLater
from kser.takeover import Takeover
from tests.consumer.harness import (
    DICE,
    MANUAL_COMMIT,
    NO_INTERVAL_COMMIT,
    FaultyConsumer,
    ScriptedTask,
    committed,
    send_messages,
)
from tests.support import Clock, lines

#: The message that kills its process.
KILLER = "killer"


@pytest.fixture(autouse=True)
def _bus(bus: InMemoryBroker) -> None:
    """Start each test with an empty broker."""


def uuid_of(item: WorkItem) -> str:
    return str(json.loads(item.record.value or b"")["uuid"])


def die(consumer: FaultyConsumer) -> None:
    """End a consumer as a kill of its process does: it commits nothing, and its group notices its absence."""
    consumer.current_client.expel()


def kill_consumers(count: int, **options: Any) -> None:
    """Start consumers one after the other; each dies after it has received its records."""
    for _ in range(count):
        consumer = FaultyConsumer(MANUAL_COMMIT, **options)
        consumer.poll()
        die(consumer)


class Starts:
    """Consumers that start one after the other; each dies when it runs the killer.

    :param options: the options of the consumers.
    """

    def __init__(self, config: dict[str, Any] | None = None, **options: Any) -> None:
        self._config = MANUAL_COMMIT if config is None else config
        self._options = options
        self.consumer: FaultyConsumer
        #: The number of starts of the killer.
        self.kills = 0
        #: The counted starts of each consumer, in the metadata of its commits.
        self.metadata: list[str] = []

    def start(self) -> bool:
        """Start a consumer and run all messages; return False if the consumer has died."""
        self.consumer = FaultyConsumer(self._config, **self._options)
        try:
            for _ in range(20):
                self.consumer.poll()
                while (item := self.consumer._kser_work_queue.get(0)) is not None:
                    if uuid_of(item) == KILLER and item.attempt.failure is None:
                        self.kills += 1
                        die(self.consumer)
                        return False
                    self.consumer.run_started(item)
            self.consumer.close()
            return True
        finally:
            self.metadata += self.consumer.current_client.committed_metadata

    def start_until_one_lives(self) -> int:
        """Start consumers until one survives; return the number of starts."""
        count = 1
        while not self.start():
            count += 1
            assert count < 50, "the killer starts again without end"
        return count


@pytest.mark.parametrize("ordering", ["key", "partition", "none"])
@pytest.mark.parametrize("config", [MANUAL_COMMIT, NO_INTERVAL_COMMIT])
def test_message_that_kills_its_process_is_given_up_after_max_starts(
    ordering: str, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    send_messages("1", "2", KILLER, "3", "4")
    starts = Starts(config, max_starts=5, ordering=ordering)
    starts.start_until_one_lives()
    assert 5 <= starts.kills <= 8
    assert {"1", "2", "3", "4"} <= set(ScriptedTask.ran) and KILLER not in ScriptedTask.ran
    assert committed() == 5
    (line,) = [line for line in lines(caplog, logging.ERROR) if "given up" in line]
    assert "the message at offset 2 of dice[0] is given up" in line and "5 consumers have died" in line
    assert starts.consumer.counts["failed"] == 1


def test_first_message_that_kills_its_process_starts_exactly_max_starts_times() -> None:
    send_messages(KILLER, "1")
    starts = Starts()
    assert starts.start_until_one_lives() == 21
    assert starts.kills == 20
    assert ScriptedTask.ran == ["1"]
    counts = [Commit(0, metadata).word(STARTS_PREFIX) for metadata in starts.metadata]
    assert counts[:20] == [str(number) for number in range(1, 21)]


def test_dead_letter_of_a_given_up_message_names_max_starts(bus: InMemoryBroker) -> None:
    send_messages(KILLER)
    starts = Starts(max_starts=3, dead_letter=True)
    starts.start_until_one_lives()
    ((letter,),) = bus.topics["dice.dlq"]
    headers = dict(letter.headers)
    assert headers["kser-dlq-reason"] == b"max-starts"
    assert headers["kser-dlq-offset"] == b"0"
    assert headers["kser-dlq-error-message"] == b"3 consumers have died while they ran the message"


def test_two_messages_that_kill_their_processes_are_both_given_up() -> None:
    send_messages("1", KILLER, "2", KILLER, "3")
    Starts(max_starts=3, ordering="none").start_until_one_lives()
    assert committed() == 5
    assert {"1", "2", "3"} <= set(ScriptedTask.ran)


# -- isolation ---------------------------------------------------------------------------------------------------------


def started_offsets(consumer: FaultyConsumer) -> list[int]:
    """Return the offsets of the messages that may run at the same time."""
    offsets = []
    while (item := consumer._kser_work_queue.get(0)) is not None:
        offsets.append(item.record.offset)
    return offsets


def test_messages_run_one_at_a_time_from_the_third_start_on() -> None:
    send_messages("1", "2", "3")
    parallel = []
    for _ in range(4):
        consumer = FaultyConsumer(MANUAL_COMMIT, ordering="none")
        consumer.poll()
        parallel.append(started_offsets(consumer))
        die(consumer)
    assert parallel == [[0, 1, 2], [0, 1, 2], [0], [0]]


def test_isolated_messages_of_all_partitions_run_one_at_a_time(bus: InMemoryBroker) -> None:
    bus.create_topic("dice", 2)
    send_messages("1", "2", partition=0)
    send_messages("3", "4", partition=1)
    kill_consumers(2)
    consumer = FaultyConsumer(MANUAL_COMMIT)
    ran = []
    for _ in range(4):
        consumer.poll()
        item = consumer.start_record()
        assert consumer._kser_work_queue.get(0) is None
        consumer.run_started(item)
        ran.append(uuid_of(item))
    assert sorted(ran) == ["1", "2", "3", "4"]
    consumer.close()
    assert (committed(0), committed(1)) == (2, 2)


def isolated_consumer(**options: Any) -> FaultyConsumer:
    """Return a consumer that has isolated dice[0], after two consumers have died at its first message."""
    kill_consumers(2)
    return FaultyConsumer(MANUAL_COMMIT, **options)


@pytest.mark.parametrize(
    ("ordering", "now", "later"),
    [("none", ["1", "2"], ["1"]), ("key", ["1"], ["1", "2"]), ("partition", ["1"], ["1", "2"])],
)
def test_retry_in_an_isolated_partition_delays_only_the_records_of_its_lane(
    ordering: str, now: list[str], later: list[str]
) -> None:
    send_messages("1", "2", key=b"a")
    ScriptedTask.script["1"] = [ConnectionError("no"), None]
    clock = Clock()
    consumer = isolated_consumer(clock=clock, ordering=ordering, retry=Retry(max_attempts=2, delay=10, jitter=False))
    for _ in range(3):
        consumer.poll()
        consumer.run_record()
    assert ScriptedTask.ran == now
    clock.advance(11)
    for _ in range(3):
        consumer.poll()
        consumer.run_record()
    assert ScriptedTask.ran == now + later


@pytest.mark.parametrize("ordering", ["key", "partition", "none"])
@pytest.mark.parametrize("ending", ["retried", "acked"])
def test_isolated_partition_with_a_retry_or_an_acked_message_does_not_block_the_others(
    ordering: str, ending: str, bus: InMemoryBroker
) -> None:
    bus.create_topic("dice", 2)
    for _ in range(2):
        send_messages("1", "2", key=b"a", partition=0)
        send_messages("3", "4", key=b"b", partition=1)
    kill_consumers(2)
    consumer = FaultyConsumer(MANUAL_COMMIT, ordering=ordering)
    consumer.poll()
    first = consumer.start_record()
    ATTEMPT_ENDS[ending](consumer._kser_work_queue, first)
    others = []
    for _ in range(8):
        consumer.poll()
        if (item := consumer._kser_work_queue.get(0)) is not None:
            assert consumer._kser_work_queue.get(0) is None
            others.append(item.partition.partition)
            consumer.run_started(item)
    assert others.count(1 - first.partition.partition) == 4


def test_partition_is_isolated_for_a_limited_time() -> None:
    send_messages(*map(str, range(9)))
    clock = Clock()
    consumer = isolated_consumer(clock=clock, ordering="none")
    for _ in range(3):
        consumer.poll()
        assert consumer.run_record() and not consumer.run_record()
    clock.advance(ISOLATION_TIME)
    consumer.poll()
    assert started_offsets(consumer) == [3, 4, 5, 6, 7, 8]


def test_message_runs_alone_in_the_second_half_of_its_starts(
    bus: InMemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus.create_topic("dice", 2)
    send_messages("1", partition=0)
    kill_consumers(5, max_starts=10)
    send_messages("2", "3", partition=1)
    consumer = FaultyConsumer(MANUAL_COMMIT, max_starts=10, ordering="none")
    with monkeypatch.context() as patch:
        patch.setattr(consumer._kser_partitions, "blocked_partitions", lambda: {DICE})
        consumer.poll()
    other = consumer.start_record()
    assert uuid_of(other) == "2"
    consumer.poll()
    assert consumer._kser_work_queue.get(0) is None, "a message of another partition started"
    consumer.run_started(other)
    consumer.poll()
    suspect = consumer.start_record()
    assert uuid_of(suspect) == "1"
    assert consumer._kser_work_queue.get(0) is None
    consumer.run_started(suspect)
    consumer.poll()
    assert started_offsets(consumer) == [1]


@pytest.mark.parametrize("ending", ["finished", "timed out", "abandoned"])
def test_message_that_must_run_alone_waits_for_running_takeovers(ending: str) -> None:
    """A takeover that ends the process must not count as a start of the message."""
    send_messages("1")
    kill_consumers(2, max_starts=4)
    consumer = FaultyConsumer(MANUAL_COMMIT, max_starts=4)
    queue = consumer._kser_work_queue
    host = consumer._kser_services._host
    assert host.put(Takeover("dice", b"", 1, "step", lambda takeover: None), 5)
    running = queue.get(0)
    assert running is not None
    consumer.poll()
    consumer.poll()
    assert queue.get(0) is None, "a message started beside a takeover"
    ATTEMPT_ENDS[ending](queue, running)
    consumer.poll()
    assert uuid_of(consumer.start_record()) == "1"


ATTEMPT_ENDS: dict[str, Callable[[WorkQueue, WorkItem], object]] = {
    "finished": lambda queue, item: queue.task_done(item),
    "acked": lambda queue, item: queue.ack(item.attempt),
    "retried": lambda queue, item: queue.requeue(item, 3600),
    "dead letter not written": lambda queue, item: queue.retry_dead_letter(item, 3600),
    "timed out": lambda queue, item: queue.time_out(item, TimeoutError(), item.attempt.outcome),
    "abandoned": lambda queue, item: queue.abandon(item.attempt),
}


@pytest.mark.parametrize("ending", ATTEMPT_ENDS)
def test_other_partitions_start_when_the_attempt_that_runs_alone_has_ended(ending: str, bus: InMemoryBroker) -> None:
    bus.create_topic("dice", 2)
    send_messages("1", partition=0)
    kill_consumers(2, max_starts=4)
    consumer = FaultyConsumer(MANUAL_COMMIT, max_starts=4, ordering="none")
    consumer.poll()
    suspect = consumer.start_record()
    send_messages(*"23456", partition=1)
    consumer.poll()
    assert consumer._kser_work_queue.get(0) is None, "a message started beside the message that must run alone"
    ATTEMPT_ENDS[ending](consumer._kser_work_queue, suspect)
    started = []
    while (item := consumer._kser_work_queue.get(0)) is not None:
        started.append(item.partition.partition)
    assert started.count(1) == 5


def test_other_partitions_start_when_the_partition_that_must_run_alone_is_revoked(bus: InMemoryBroker) -> None:
    bus.create_topic("dice", 2)
    send_messages("1", partition=0)
    kill_consumers(2, max_starts=4)
    consumer = FaultyConsumer(MANUAL_COMMIT, max_starts=4, ordering="none")
    consumer.poll()
    send_messages("2", "3", partition=1)
    consumer.poll()
    consumer._kser_partitions.on_revoke([DICE])
    assert started_offsets(consumer) == [0, 1]


def test_record_waits_until_its_start_is_committed() -> None:
    send_messages("1")
    consumer = isolated_consumer()
    consumer.current_client.faults["commit"] = "the coordinator is away"
    for _ in range(3):
        consumer.poll()
    assert not consumer.run_record()
    consumer.current_client.faults.clear()
    consumer.poll()
    assert consumer.run_record()
    assert [Commit(0, text).word(STARTS_PREFIX) for text in consumer.current_client.committed_metadata][:1] == ["3"]


# -- retries -----------------------------------------------------------------------------------------------------------


class Lives:
    """Consumers that start one after the other on one clock, and die at each attempt at a killer.

    :param deadly: returns whether an attempt ends its process.
    """

    def __init__(self, deadly: Callable[[WorkItem], bool], **options: Any) -> None:
        self._deadly = deadly
        self._options = options
        self.clock = Clock()
        #: The UUIDs of the messages that were given up.
        self.given_up: set[str] = set()

    def live(self, seconds: float) -> None:
        """Run a consumer until it dies, at the latest after a time, when its process is killed."""
        consumer = FaultyConsumer(MANUAL_COMMIT, clock=self.clock, **self._options)
        end = self.clock() + seconds
        while True:
            consumer.poll()
            item = consumer._kser_work_queue.get(0)
            if item is None:
                if self.clock() >= end:
                    break
                self.clock.advance(0.5)
            elif item.attempt.failure is not None:
                self.given_up.add(uuid_of(item))
                consumer.run_started(item)
            elif self._deadly(item):
                break
            else:
                consumer.run_started(item)
        die(consumer)


@pytest.mark.parametrize("ordering", ["key", "partition", "none"])
def test_message_that_waits_for_a_retry_is_not_given_up_when_its_processes_are_killed(ordering: str) -> None:
    ScriptedTask.script["1"] = lambda: _raise(RetryLater(3600))
    send_messages("1", "2")
    lives = Lives(lambda item: False, max_starts=5, ordering=ordering)
    for _ in range(20):
        lives.live(10)
    assert lives.given_up == set()
    assert starts_in_metadata() == ""
    assert ScriptedTask.ran.count("1") == 20


@pytest.mark.parametrize("ordering", ["none", "key"])
@pytest.mark.parametrize("together", [True, False])
def test_message_that_kills_its_process_behind_a_waiting_message_is_the_one_given_up(
    ordering: str, together: bool
) -> None:
    ScriptedTask.script["1"] = lambda: _raise(RetryLater(3600))
    lives = Lives(lambda item: uuid_of(item) == KILLER, max_starts=6, ordering=ordering)
    send_messages("1")
    if not together:
        lives.live(10)
    send_messages("2", KILLER, "3")
    for _ in range(12):
        lives.live(10)
    assert lives.given_up == {KILLER}
    assert {"2", "3"} <= set(ScriptedTask.ran)


@pytest.mark.parametrize("delay", [1, 10, 60])
def test_message_whose_second_attempt_kills_its_process_is_given_up(delay: float) -> None:
    ScriptedTask.script["killer"] = lambda: _raise(RetryLater(delay))
    send_messages(KILLER, "1")
    lives = Lives(lambda item: uuid_of(item) == KILLER and item.attempt.number > 1, max_starts=5)
    for _ in range(8):
        lives.live(100)
    assert lives.given_up == {KILLER}
    assert "1" in ScriptedTask.ran


def waiting_consumer(clock: Clock, config: dict[str, Any], **options: Any) -> FaultyConsumer:
    """Return a consumer whose only message waits 60 seconds for a retry."""
    ScriptedTask.script["1"] = lambda: _raise(RetryLater(60))
    send_messages("1", key=b"a")
    consumer = FaultyConsumer(config, clock=clock, **options)
    consumer.poll()
    assert starts_in_metadata() == "1"
    consumer.run_record()
    consumer.commit()
    assert starts_in_metadata() == ""
    return consumer


def test_record_that_arrives_while_the_others_wait_starts_after_its_start_is_committed() -> None:
    consumer = waiting_consumer(Clock(), NO_INTERVAL_COMMIT)
    send_messages("2")
    consumer.poll()
    assert starts_in_metadata() == "0,1-1"
    consumer.run_record()
    consumer.commit()
    assert starts_in_metadata() == ""


def test_start_of_a_retry_is_committed_before_the_retry_is_due() -> None:
    clock = Clock()
    consumer = waiting_consumer(clock, NO_INTERVAL_COMMIT)
    clock.advance(57)
    consumer.poll()
    assert starts_in_metadata() == ""
    clock.advance(2)
    consumer.poll()
    assert starts_in_metadata() == "1"
    assert not consumer.run_record(), "the retry is not due yet"


@pytest.mark.parametrize("ordering", ["key", "partition"])
def test_start_of_an_isolated_record_does_not_count_while_it_waits_for_its_lane(ordering: str) -> None:
    ScriptedTask.script["1"] = lambda: _raise(RetryLater(3600))
    send_messages("1", "2", key=b"a")
    consumer = isolated_consumer(ordering=ordering)
    for _ in range(4):
        consumer.poll()
        consumer.run_record()
    assert ScriptedTask.ran == ["1"]
    assert starts_in_metadata() == "2"


def _raise(error: Exception) -> None:
    raise error


# -- what counts -------------------------------------------------------------------------------------------------------


def starts_in_metadata() -> str:
    return InMemoryBroker.at("").committed["dummy", DICE].word(STARTS_PREFIX).partition(";")[0]


def test_start_without_a_started_message_does_not_count() -> None:
    """For example, the database is away and the process ends."""
    send_messages("1")
    for _ in range(30):
        consumer = FaultyConsumer(MANUAL_COMMIT, max_starts=3)
        consumer._kser_poller.paused = True
        consumer.poll()
        die(consumer)
    assert starts_in_metadata() == ""
    assert Starts(max_starts=3).start_until_one_lives() == 1
    assert ScriptedTask.ran == ["1"]


def test_orderly_end_ends_the_count() -> None:
    send_messages("1")
    for _ in range(10):
        consumer = FaultyConsumer(MANUAL_COMMIT, max_starts=3)
        consumer.poll()
        consumer.start_record()
        assert starts_in_metadata() == "1"
        consumer.close()
        assert starts_in_metadata() == ""


def test_revocation_ends_the_count() -> None:
    send_messages("1")
    consumer = FaultyConsumer(MANUAL_COMMIT, revoke_timeout=0)
    consumer.poll()
    assert starts_in_metadata() == "1"
    other = FaultyConsumer(MANUAL_COMMIT)
    consumer.poll()
    assert starts_in_metadata() == ""
    other.close()


def test_progress_ends_the_count() -> None:
    send_messages("1", "2")
    kill_consumers(2)
    assert starts_in_metadata() == "2"
    consumer = FaultyConsumer(MANUAL_COMMIT)
    consumer.poll()
    consumer.run_record()
    consumer.poll()
    assert committed() == 1 and starts_in_metadata() == "1"


def test_consumer_that_loses_its_partition_and_lives_does_not_count_again() -> None:
    send_messages("1")
    consumer = FaultyConsumer(MANUAL_COMMIT, max_starts=3)
    for _ in range(10):
        consumer.poll()
        assert starts_in_metadata() == "1"
        consumer.current_client.expel()
    consumer.poll()
    assert consumer.run_record()


def test_start_is_counted_with_one_commit() -> None:
    send_messages(*map(str, range(50)))
    consumer = FaultyConsumer(NO_INTERVAL_COMMIT)
    for _ in range(5):
        consumer.poll()
        consumer.run_record()
    assert consumer.current_client.committed_metadata == ["starts:1"]


@pytest.mark.parametrize("mode", ["before", "never"])
def test_other_commit_modes_count_no_starts(mode: str) -> None:
    send_messages("1", "2")
    consumer = FaultyConsumer(MANUAL_COMMIT, commit=mode)
    for _ in range(3):
        consumer.poll()
        consumer.run_record()
    consumer.poll()
    assert not any("starts" in text for text in consumer.current_client.committed_metadata)


def test_count_that_cannot_be_removed_is_not_reported_as_a_finished_message(caplog: pytest.LogCaptureFixture) -> None:
    send_messages("1")
    consumer = FaultyConsumer(MANUAL_COMMIT)
    consumer.poll()
    consumer.current_client.faults["commit"] = "the coordinator is away"
    consumer.close()
    assert not any("finished messages could not be committed" in line for line in lines(caplog, logging.WARNING))


@pytest.mark.parametrize(
    "metadata", ["", "kser:1,2", "starts:", "starts:x kser:1,2", "starts:-1", "starts:²", "starts:1,2-x"]
)
def test_metadata_without_a_valid_count_counts_no_start(metadata: str) -> None:
    assert StartCount(Commit(7, metadata)).at(7) == 0


def test_count_belongs_to_the_committed_offset() -> None:
    count = StartCount(Commit(7, "starts:3 kser:1,2"))
    assert (count.at(7), count.at(8)) == (3, 0)
    assert count.annotate(Commit(7, "kser:1,4")) == Commit(7, "starts:3 kser:1,4")
    assert count.annotate(Commit(8, "kser:1,4")) == Commit(8, "kser:1,4")


def test_counts_of_records_above_the_committed_offset_are_read_back() -> None:
    count = StartCount(Commit(7, "starts:2,3-4"))
    assert [count.at(offset) for offset in (7, 8, 10)] == [2, 0, 4]
    assert count.annotate(Commit(7)) == Commit(7, "starts:2,3-4")
    assert count.annotate(Commit(9, "kser:1,4")) == Commit(9, "starts:0,1-4 kser:1,4")
    assert count.annotate(Commit(11)) == Commit(11)
